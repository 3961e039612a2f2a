"""``gpdfx.rule``: the user's own ops widen; a signature that is not borne out is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx
from gpdfx.passes.rules import CUSTOM

from .helpers import program_of, verify

Function = Callable[..., Any]


def custom(function: Function) -> Any:
    """An opaque op with the function's schema; its derivative is the function's own."""
    op = torch.library.custom_op(f"gpdfx_tests::{function.__name__}", function, mutates_args=())
    op.register_fake(function)

    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in ctx.inputs]
        wrt = [x for x in inputs if isinstance(x, Tensor)]
        with torch.enable_grad():
            outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = iter(torch.autograd.grad(outputs, wrt, grads, allow_unused=True))
        return tuple(next(found) if isinstance(x, Tensor) else None for x in inputs)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.inputs = inputs

    op.register_autograd(backward, setup_context=setup)
    return op


@custom
def scale(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.reshape(-1, *(1,) * (x.ndim - 2))


@custom
def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias) + 0


@custom
def soft_project(x: Tensor, weight: Tensor) -> Tensor:
    """Linear in ``x``, not in the weight, which the shares would multiply."""
    return x @ F.softplus(weight).T


@custom
def soft_project_turned(weight: Tensor, x: Tensor) -> Tensor:
    return x @ F.softplus(weight).T


@custom
def blocks(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    parts = x.unflatten(-1, (groups, -1)), weight.unflatten(0, (groups, -1))
    return torch.einsum("...gi,goi->...go", *parts).flatten(-2)


@custom
def normalize(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * weight


@custom
def ordered(x: Tensor) -> Tensor:
    return x.sort(-1)[0]


@custom
def neighbour(x: Tensor) -> Tensor:
    return x.roll(1, -1)


@custom
def pairs(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


@custom
def both(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x * weight, x - weight


@custom
def with_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 2, x.sum(-1)


@custom
def pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


@custom
def look(table: Tensor, index: Tensor) -> Tensor:
    return table[index] + 0


@custom
def single(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise ValueError("float32 only")
    return x * 2


@custom
def zero(x: Tensor) -> Tensor:
    return x * 0


@custom
def noisy(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


@custom
def stacked(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs)


@torch.library.custom_op("gpdfx_tests::normalized_backward", mutates_args=())
def normalized_backward(x: Tensor) -> Tensor:
    """What comes back is scaled to length one: to one of many copies comes back less."""
    return x * 2


normalized_backward.register_fake(lambda x: torch.empty_like(x))
normalized_backward.register_autograd(lambda ctx, grad: grad / grad.norm())


@torch.library.custom_op("gpdfx_tests::without_backward", mutates_args=())
def without_backward(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("gpdfx_tests::double_", mutates_args=("x",))
def double_(x: Tensor) -> None:
    x.mul_(2)


ops = torch.ops.gpdfx_tests


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    CUSTOM.clear()


# --------------------------------------------------------------------------- right signatures
RIGHT: dict[str, tuple[Any, str, tuple[Any, ...]]] = {
    "scale": (scale, "b c ..., c -> b c ...", (r(2, 6, 5), r(6))),
    "scale, as a packet": (ops.scale, "b c ..., c -> b c ...", (r(2, 6), r(6))),
    "scale, as an overload": (ops.scale.default, "b c *s, c -> b c *s", (r(2, 6, 3, 3), r(6))),
    "project": (project, "... i, o i, o? -> ... o", (r(2, 3, 6), r(4, 6), r(4))),
    "project without bias": (project, "... i, o i, o? -> ... o", (r(2, 6), r(4, 6))),
    "not linear: that axis stays": (soft_project, "... i!, o i -> ... o", (r(2, 6), r(4, 6))),
    "linear in the last": (soft_project_turned, "o i, ... i -> ... o", (r(4, 6), r(2, 6))),
    "statistics": (normalize, "... c!, c -> ... c", (r(2, 6), r(6))),
    "order": (ordered, "... c! -> ... c", (r(2, 6),)),
    "order, by a star": (ordered, "b *c -> b *c", (r(2, 6),)),
    "two results": (both, "b c, c -> b c, b c", (r(2, 6), r(6))),
    "new axes": (pool, "b c *s -> b c *t", (r(2, 6, 4, 4),)),
    "indices": (look, "v! d, ... -> ... d", (r(7, 6), torch.tensor([[1, 6], [0, 3]]))),
    "one type": (single, "... -> ...", (r(2, 6),)),
    "no backward": (without_backward, "... -> ...", (r(2, 6),)),
    "an aten op": (torch.ops.aten.linalg_pinv, "b r! c! -> b c r", (r(3, 5, 6), 1e-6)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_signature_is_taken(name: str) -> None:
    op, signature, example = RIGHT[name]
    gpdfx.rule(op, signature, example=example)
    assert len(CUSTOM) == 1
    gpdfx.unrule(op)
    assert not CUSTOM


def test_a_size_that_an_argument_states() -> None:
    signature, example = "... (g i), (g o) i -> ... (g o)", (r(2, 6), r(9, 2), 3)
    gpdfx.rule(blocks, signature, example=example, g="groups")
    refused("does not read as (g i)", blocks, signature, example)
    refused("cannot be run: unflatten", blocks, signature, (r(2, 6), r(8, 2), 3), g="groups")
    refused("sizes", blocks, "... (g i), (o g) i -> ... (g i)", example, g="groups")
    refused("differs", blocks, "... (g i), (o g) i -> ... (o g)", example, g="groups")


# --------------------------------------------------------------------------- wrong ones
def refused(word: str, op: Any, signature: Any, example: Any = None, **sizes: str) -> None:
    before = dict(CUSTOM)
    with pytest.raises(gpdfx.InputError) as caught:
        gpdfx.rule(op, signature, example, **sizes)
    assert word in str(caught.value), str(caught.value)
    assert caught.value.remedy
    assert before == CUSTOM


# The faults that running the op must find: what is said, then what is true.
WRONG: dict[str, tuple[Any, str, tuple[Any, ...], str]] = {
    "axes that are one": (scale, "b c ..., d -> b c ...", (r(2, 6, 5), r(6)), "with c widened"),
    "axes that are two": (project, "... c, c c, c? -> ... c", (r(2, 6), r(4, 6)), "does not read"),
    "square, axes that are two": (project, "b c, c c, c? -> b c", (r(2, 6), r(6, 6)), "with c"),
    "swapped": (project, "b i, i o, o? -> b o", (r(2, 6), r(6, 6)), "with i widened"),
    "a sum that is none": (scale, "b c d, c -> b c", (r(2, 6, 5), r(6)), "its pattern 2"),
    "statistics": (normalize, "... c, c -> ... c", (r(2, 6), r(6)), "with c widened from 6 to 10"),
    "order": (ordered, "... c -> ... c", (r(2, 6),), "differs by"),
    "neighbours": (neighbour, "... c -> ... c", (r(2, 6),), "differs by"),
    "pairs": (pairs, "... c -> ... c", (r(2, 6),), "with c widened"),
    "under an ellipsis": (ordered, "... -> ...", (r(2, 6),), "a dimension under ..."),
    "shares where it is not linear": (
        soft_project,
        "... i, o i -> ... o",
        (r(2, 6), r(4, 6)),
        "with i widened",
    ),
    "distances": (
        torch.ops.aten._cdist_forward,
        "p m, q m -> p q",
        (r(3, 6), r(4, 6), 2.0, None),
        "with m widened",
    ),
    "looked up": (look, "v d, ... -> ... d", (r(7, 6), torch.tensor([1, 6])), "with v widened"),
    "results swapped": (with_sum, "b c -> b, b c", (r(2, 6),), "its pattern 1"),
    "kept in one result, summed in another": (
        with_sum,
        "b c -> b c, b",
        (r(2, 6),),
        "with c widened",
    ),
    "backward": (
        normalized_backward,
        "... -> ...",
        (r(2, 6),),
        "with a dimension under ... or * widened from 2 to 4 its gradient for 2 x 6 float64",
    ),
    "positions that move": (pool, "b c *s -> b c *s", (r(2, 6, 4, 4),), "sizes"),
    "too few dimensions": (scale, "b c, c -> b c", (r(2, 6, 5), r(6)), "its pattern 2"),
    "size one": (scale, "b c, c -> b c", (r(2, 1), r(1)), "size one"),
    "zero": (zero, "... -> ...", (r(2, 6),), "zero, or not finite"),
    "random": (noisy, "... -> ...", (r(2, 6),), "differs by"),
    "not its arguments": (scale, "b c, c -> b c", (r(2, 6),), "missing value"),
    "no tuple": (scale, "b c, c -> b c", r(2, 6), "a Tensor"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_signature_is_refused(name: str) -> None:
    op, signature, example, word = WRONG[name]
    refused(word, op, signature, example)


UNREADABLE: dict[str, tuple[Any, Any, str]] = {
    "no arrow": (scale, "b c, c", "one ->"),
    "two arrows": (scale, "b c -> c -> b c", "b c -> c -> b c\n    " + " " * 9 + "^"),
    "dots": (scale, "b c .., c -> b c ..", "cannot read '..'\n    b c .., c -> b c ..\n        ^"),
    "bracket": (scale, "b (g c, c -> b c", "cannot read '(g'"),
    "empty bracket": (scale, "b (), c -> b c", "cannot read '()'"),
    "star in a product": (scale, "b (*g c), c -> b c", "cannot read '(*g c)'"),
    "two stars": (scale, "*a *b, c -> *a", "one ... or *name"),
    "not text": (scale, None, "the signature is None"),
    "few operands": (scale, "b c -> b c", "2: x, weight"),
    "many results": (scale, "b c, c -> b c, c", "has 2 patterns for the results"),
    "unknown": (scale, "b c, c -> b d", "'d' stands only on the right\n    b c, c -> b d\n"),
    "unknown dots": (scale, "b c, c -> b ...", "'...' stands only on the right"),
    "built in": (torch.ops.aten.linear, "... i, o i, o? -> ... o", "has a rule"),
    "writes": (double_, "c -> c", "writes to its arguments"),
    "list": (stacked, "c -> n c", "a list of tensors (xs)"),
    "no op": (F.gelu, "c -> c", "is no op"),
    "no default": (torch.ops.aten.searchsorted, "c, d -> d", "no default overload"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_signature_is_refused(name: str) -> None:
    op, signature, word = UNREADABLE[name]
    refused(word, op, signature)


def test_sizes_that_are_none() -> None:
    refused("no axis is called h", blocks, "b (g i), (g o) i -> b (g o)", None, h="groups")
    refused("no integer argument 'n'", blocks, "b (g i), (g o) i -> b (g o)", None, g="n")
    with pytest.raises(gpdfx.InputError, match="no rule of yours"):
        gpdfx.unrule(scale)


# --------------------------------------------------------------------------- in a network
class Net(nn.Module):
    """Every op on widened axes, some on weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(9, 4)
        self.weights = nn.ParameterList([r(6), r(8, 6), r(8), r(12, 2), r(9, 12), r(9, 12)])

    def forward(self, x: Tensor) -> Tensor:
        s, w, b, g, p, q = self.weights
        x = scale(self.stem(x).transpose(1, 2), s).transpose(1, 2).relu()
        x = project(x, w, b).tanh()
        x = blocks(x, g, 4)
        y, z = both(x, ops.scale(g, g.mean(0)).sum(1))
        return self.head(soft_project(y, p) + project(z, q))


SIGNATURES = {
    "scale": "b c ..., c -> b c ...",
    "project": "... i, o i, o? -> ... o",
    "blocks": "... (g i), (g o) i -> ... (g o)",
    "both": "... c, c -> ... c, ... c",
    "soft_project": "... i!, o i -> ... o",
}


@pytest.mark.parametrize("ratio", [1.5, 2])
def test_a_network_of_ops_with_rules_widens(ratio: float) -> None:
    for name, signature in SIGNATURES.items():
        gpdfx.rule(getattr(ops, name), signature, **({"g": "groups"} if name == "blocks" else {}))
    net, x = Net(), r(3, 7, 5)
    report = gpdfx.expand(net, ratio, example_inputs=(x,)).report()  # raises if not lossless
    assert {b.op for b in report.bridged} == {"gpdfx_tests.soft_project.default"}
    assert sorted(g.before for g in report.groups) == [2, 3, 6, 9], report
    for name in SIGNATURES:
        gpdfx.unrule(getattr(ops, name))
    bridged = gpdfx.expand(net, ratio, example_inputs=(x,)).report().bridged
    assert "gpdfx_tests.project.default" in {b.op for b in bridged}


class Last(nn.Module):
    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.stem, self.weight, self.turned = nn.Linear(5, 6), nn.Parameter(r(4, 6)), turned

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return soft_project_turned(self.weight, x) if self.turned else soft_project(x, self.weight)


def test_expand_refuses_what_an_example_did_not_show() -> None:
    """Of two activations the last gets shares, in which the op is linear; here the weight would."""
    gpdfx.rule(soft_project_turned, "o i, ... i -> ... o", example=(r(4, 6), r(2, 6)))
    with pytest.raises(gpdfx.InputError, match="with i widened from 6 to 10") as caught:
        gpdfx.expand(Last(turned=True), 2, example_inputs=(r(3, 5),))
    assert "soft_project_turned(self.weight" in (caught.value.source or "")


def test_without_an_example_expand_refuses() -> None:
    gpdfx.rule(soft_project, "... i, o i -> ... o")
    for _ in range(2):  # and keeps refusing
        with pytest.raises(gpdfx.InputError, match="does not bear out") as caught:
            gpdfx.expand(Last(), 2, example_inputs=(r(3, 5),), verify=False)
    assert "soft_project.default" in str(caught.value)
    assert "'... i, o i -> ... o' on 3 x 6 float32, 4 x 6 float32" in str(caught.value)
    gpdfx.rule(soft_project, "... i!, o i -> ... o")  # replaces it
    gpdfx.expand(Last(), 2, example_inputs=(r(3, 5),))


def test_the_oracle_would_catch_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gpdfx.rule(soft_project, "... i, o i -> ... o")
    module = importlib.import_module("gpdfx.compiler")
    monkeypatch.setattr(module, "check_rules", lambda inference: None)
    call = ((r(3, 5),), {})
    with pytest.raises(gpdfx.LossyError) as caught:
        verify(program_of(Last(), call), call)
    assert caught.value.node == "soft_project"
    report = gpdfx.expand(Last(), 2, example_inputs=call[0]).report()
    assert "differs" in report.apart[""]  # taken apart: what is left of it is right


def test_a_refused_rule_leaves_the_earlier_one() -> None:
    gpdfx.rule(scale, "b c ..., c -> b c ...")
    refused("with c widened", scale, "b c ..., d -> b c ...", (r(2, 6), r(6)))
    assert CUSTOM[ops.scale.default].text == "b c ..., c -> b c ..."  # type: ignore[attr-defined]
