"""Many layers that the fused fold computes together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..kernels.fold import elements, fold, register
from ..passes.names import Folded, Lowered, module_of, students, teachers
from .fold import Fold

CHUNK = 2**20
"""Elements of weights in one fold on the CPU. A chunk's backward begins when the gradients of all
its weights are known, and they wait in memory until then; on a GPU launches count for more."""


class Chunk:
    """Neighbouring layers that are folded together; ``sites`` by weight; ``places``: module and
    name of each of their tensors; ``index``: whose place each site's tensors have."""

    def __init__(self, lowered: Mapping[str, Lowered], net: nn.Module) -> None:
        self.sites = {name: one.site for name, one in lowered.items()}
        self.key = register(tuple(self.sites.values()))
        numbers: dict[str, int] = {}
        paths = [path for name, one in lowered.items() for path in _paths(name, one, net)]
        self.index = tuple(numbers.setdefault(path, len(numbers)) for path in paths)
        ends = [path.rpartition(".") for path in numbers]
        self.places = [(net.get_submodule(parent), leaf) for parent, _, leaf in ends]

    @property
    def on_gpu(self) -> bool:
        return find(*self.places[0]).is_cuda

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register(tuple(self.sites.values()))  # in this process

    def tensors(self) -> list[Tensor]:
        """Those of its places."""
        return [find(module, leaf) for module, leaf in self.places]

    def __call__(self, teacher: bool, student: bool) -> Folded:
        """The weights of teacher and student."""
        tensors = self.tensors()
        folded: dict[str, Tensor] = {}
        weights = fold(self.key, self.index, tensors, teacher=teacher, student=student)
        for name, (wide, own) in zip(self.sites, weights, strict=True):
            if wide is not None:
                folded[teachers(name)] = wide
            if own is not None:
                folded[students(name)] = own
        return folded


def _paths(name: str, lowered: Lowered, net: nn.Module) -> list[str]:
    """The tensors of a site, in its order."""
    own = module_of(name)
    if lowered.site.bare:
        return [name, *lowered.shares]
    branches: Fold = net.get_submodule(own)  # type: ignore[assignment]
    rest = zip(branches.linear, lowered.site.names, strict=True)
    theirs = [f"{own}.{key}.{tensor}" for key, names in rest for tensor in names]
    return [name, f"{own}.scales", *lowered.shares, *theirs]


def chunks(lowered: Mapping[str, Lowered], net: nn.Module, limit: float = CHUNK) -> list[Chunk]:
    """All layers of the fused fold, in order, in chunks of about ``limit`` elements."""
    found: list[dict[str, Lowered]] = []
    held = 0
    for name, one in lowered.items():
        size = elements(one.site.layer)
        if not found or held + size > limit:
            found.append({})
            held = 0
        found[-1][name] = one
        held += size
    return [Chunk(those, net) for those in found]


def find(module: nn.Module, leaf: str) -> Tensor:
    """A parameter or buffer."""
    tensor = module._parameters.get(leaf)
    found = module._buffers[leaf] if tensor is None else tensor
    assert found is not None
    return found


def operator_get(module: nn.Module, name: str) -> Tensor:
    """``module.a.b.c`` by a dotted name."""
    path, _, leaf = name.rpartition(".")
    return find(module.get_submodule(path), leaf)
