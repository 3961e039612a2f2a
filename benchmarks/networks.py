"""Which networks the benchmarks measure, and how one is built at its smallest input.

A network is named ``library:model``, for example ``timm:convnext_atto``; weights are random. The
networks of ``ZOOS`` are rows of a table, which says how to build and what to feed them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks import libraries, zoo_tasks, zoo_transformers
from benchmarks.tables import RESULTS
from gpdfx.calls.examples import infer_inputs

LIMIT = 150_000_000  # parameters; float64 teachers of larger networks do not fit everywhere
SAMPLE_LIMIT = 50_000_000  # 250 larger ones would take a day on two cores
SIZES = (64, 96, 128, 160, 192, 224, 256)
# Batch norm over two values gives -1 and 1 whatever they are: its gradient is rounding, and where a
# small image ends as one pixel a batch of two has no more values than that.
BATCH = 4
SIZE_KEYWORD = {"timm": "img_size", "torchvision": "image_size"}
ZOOS = {"tasks": zoo_tasks, "transformers": zoo_transformers, "libraries": libraries}


# --------------------------------------------------------------------------- lists
def torchvision_all() -> list[str]:
    """All classification networks of torchvision."""
    return [f"torchvision:{n}" for n in torchvision.models.list_models(module=torchvision.models)]


def zoo(suite: str) -> list[str]:
    """All rows of a table."""
    return [f"{suite}:{n}" for n in ZOOS[suite].TABLE]


def timm_all() -> list[str]:
    """The whole registry of timm, deprecated names left out."""
    return [f"timm:{n}" for n in timm.list_models()]


def timm_files() -> list[str]:
    """The smallest network of each model file of timm (results/timm_files.txt).

    A file whose networks all have more than ``LIMIT`` parameters has none.
    """

    def smallest() -> Iterator[tuple[str, int]]:
        for file in timm.list_modules():
            sizes = [(count(n), n) for n in timm.list_models(module=file)]
            fitting = [(size, n) for size, n in sizes if size <= LIMIT]
            if fitting:
                size, name = min(fitting)
                yield name, size

    return _kept("timm_files", smallest)


def timm_sample(number: int, seed: int) -> list[str]:
    """``number`` networks of timm of at most ``SAMPLE_LIMIT`` parameters, drawn with ``seed``
    (results/timm_sample_<number>_<seed>.txt)."""

    def drawn() -> Iterator[tuple[str, int]]:
        names = timm.list_models()
        sizes = ((n, count(n)) for n in random.Random(seed).sample(names, len(names)))
        return islice(((n, size) for n, size in sizes if size <= SAMPLE_LIMIT), number)

    return _kept(f"timm_sample_{number}_{seed}", drawn)


def count(name: str) -> int:
    """Parameters of a timm network, without allocating them."""
    with torch.device("meta"):
        model = timm.create_model(name)
    return sum(p.numel() for p in model.parameters())


def _kept(title: str, make: Callable[[], Iterable[tuple[str, int]]]) -> list[str]:
    """A list that takes minutes to make is made once; the file pins it for later versions."""
    path = RESULTS / f"{title}.txt"
    if not path.exists():
        head = f"# timm {timm.__version__}: network, parameters"
        lines = [head, *(f"{name} {size}" for name, size in make())]
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    rows = path.read_text().splitlines()
    return [f"timm:{row.split()[0]}" for row in rows if not row.startswith("#")]


# --------------------------------------------------------------------------- building
def construct(name: str, **keywords: Any) -> nn.Module:
    """The network with random weights, the same at every call."""
    library, _, model = name.partition(":")
    torch.manual_seed(0)
    makers = {"timm": timm.create_model, "torchvision": torchvision.models.get_model}
    if library not in makers:
        raise ValueError(f"{name!r} does not begin with timm: or torchvision:")
    network: nn.Module = makers[library](model, **keywords)
    return network


def build(name: str, size: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The network, and its positional and keyword inputs: from a table, or a batch of images."""
    suite, _, model = name.partition(":")
    if suite in ZOOS:
        return ZOOS[suite].build(model)
    network, x = _smallest(name, size)
    return network, (x,), {}


def _smallest(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """The network and a batch of square images, the smallest from ``size`` upwards that it runs on
    in eval and train mode: as it is, or constructed for that size. 0 is its own size."""
    trial = construct(name)
    channels, *usual = infer_inputs(trial)[0].shape[1:]
    keyword = SIZE_KEYWORD[name.partition(":")[0]]
    for s in (s for s in SIZES if 0 < size <= s < usual[-1]):
        x = _images(channels, s, s)
        if _runs(trial, x):
            return construct(name), x
        try:
            resized = construct(name, **{keyword: s})
        except Exception:  # no such argument, or a size that this architecture cannot have
            continue
        if _runs(resized, x):
            return construct(name, **{keyword: s}), x
    return construct(name), _images(channels, *usual)


def _images(*shape: int) -> Tensor:
    return torch.randn((BATCH, *shape), generator=torch.Generator().manual_seed(0))


def _runs(model: nn.Module, x: Tensor) -> bool:
    """Finite outputs in both modes; an empty feature map gives none, or an error."""
    try:
        with torch.no_grad():
            outputs = [model.train(training)(x) for training in (False, True)]
    except Exception:  # whatever the network raises for an input that is too small
        return False
    leaves = pytree.tree_leaves(outputs)
    return all(bool(y.isfinite().all()) for y in leaves if isinstance(y, Tensor))
