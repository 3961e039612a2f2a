"""Ops by kind: what torch composes of others, counts, losses, and ops of which nothing is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gpdfx
from benchmarks import ops

Join = Callable[[Tensor, Tensor, Tensor], Tensor]


class Joined(nn.Module):
    """Two features and a weight, joined by an op, then a head."""

    def __init__(self, join: Join) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.codes, self.join = nn.Parameter(torch.randn(5, 8)), join

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.join(self.a(x), self.b(x), self.codes))


def report(join: Join, ratio: float = 1.5) -> Any:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6)
    return gpdfx.expand(Joined(join), ratio, example_inputs=(x,), branches=None).report()


COMPOSED: dict[str, Join] = {
    "tensordot": lambda a, b, w: torch.tensordot(torch.tensordot(a, w, ([2], [1])), w, ([2], [0])),
    "narrow": lambda a, b, w: torch.cat((a.narrow(2, 0, 3), b.narrow(-1, 3, 5)), -1),
    "broadcast": lambda a, b, w: torch.broadcast_tensors(a[:, :, None], w)[0].sum(2) * b,
    "aliases": lambda a, b, w: torch.special.expit(a).multiply(torch.absolute(b)).negative(),
    "distance": lambda a, b, w: a * functional.pairwise_distance(a, b)[..., None],
    "triplet": lambda a, b, w: a + functional.triplet_margin_loss(a, b, a - b),
    "chain": lambda a, b, w: torch.linalg.multi_dot([a[0], w.T, w]) + b,
    "divergence": lambda a, b, w: a * functional.kl_div(a.log_softmax(-1), b.softmax(-1)),
    "matrix norm": lambda a, b, w: a / torch.linalg.matrix_norm(b, keepdim=True),
    "written": lambda a, b, w: a.clone().absolute_().multiply_(b),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_ops_that_others_make_up_widen(name: str) -> None:
    found = report(COMPOSED[name])
    assert not found.bridged
    assert found.widened == 1


WIDE: dict[str, Join] = {
    "counts": lambda a, b, w: a * (b > 0).sum(-1, keepdim=True),
    "counts in a row": lambda a, b, w: a * (b > a).long().sum((1, 2), keepdim=True),
    "nonzero": lambda a, b, w: a * torch.count_nonzero(b.relu(), -1)[..., None],
    "codebook": lambda a, b, w: w[torch.cdist(a, w).argmin(-1)] + b,
    "codebook by angle": lambda a, b, w: a * functional.cosine_similarity(b, w[0], -1)[..., None],
    "mean loss": lambda a, b, w: a * functional.mse_loss(b, a.detach()),
    "sum of losses": lambda a, b, w: a * functional.huber_loss(b, a, reduction="sum"),
    "solve": lambda a, b, w: torch.linalg.solve(a @ a.mT + 4 * torch.eye(4), b),
    "differences": lambda a, b, w: a + b.diff(dim=-1, prepend=a[..., :1]),
    "quantile": lambda a, b, w: a * torch.quantile(b, 0.3, -1, keepdim=True),
}


@pytest.mark.parametrize("name", WIDE)
def test_counts_distances_losses_and_solves_widen(name: str) -> None:
    """Copies are counted once: a half of an integer is none."""
    assert report(WIDE[name]).widened == 1


def test_what_is_bridged_on_purpose_says_why() -> None:
    found = report(lambda a, b, w: a * torch.linalg.svdvals(b)[..., :1, None])
    assert [b.reason for b in found.bridged] == ["a factorization mixes all rows and columns"]


def test_what_autocast_casts_as_a_whole_stays_whole_there() -> None:
    def loss(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = functional.cosine_embedding_loss(a[0], b[0], torch.ones(4))
        return a * y

    assert {b.op for b in report(loss).bridged} == {"aten.cosine_embedding_loss.default"}


# --------------------------------------------------------------------------- ops of libraries
LIBRARY = torch.library.Library("gpdfx_test_ops", "DEF")
LIBRARY.define("sorted_pair(Tensor x, Tensor[] more) -> (Tensor, Tensor)")
LIBRARY.define("shift(Tensor(a!) x, int by) -> ()")
LIBRARY.define("noise(Tensor x) -> Tensor", tags=[torch.Tag.nondeterministic_seeded])
LIBRARY.define("spectrum(Tensor x) -> Tensor")
LIBRARY.define("gate(Tensor x, Tensor y) -> Tensor")


def _sorted_pair(x: Tensor, more: list[Tensor]) -> tuple[Tensor, Tensor]:
    values, order = (x + sum(more)).sort(-1)
    return values, order.clone()


def _shift(x: Tensor, by: int) -> None:
    x.copy_(x.roll(by, -1))


COMPOSITE: dict[str, Any] = {
    "sorted_pair": _sorted_pair,
    "noise": lambda x: x + torch.randn_like(x),
    "spectrum": lambda x: torch.fft.fft(x, dim=-1),
}
for _name, _made in COMPOSITE.items():
    LIBRARY.impl(_name, _made, "CompositeImplicitAutograd")
LIBRARY.impl("shift", _shift, "CompositeExplicitAutograd")
LIBRARY.impl("gate", lambda x, y: torch.sigmoid(x) * y, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "gpdfx_test_ops::gate",
    lambda ctx, g: (
        g
        * ctx.saved_tensors[1]
        * torch.sigmoid(ctx.saved_tensors[0])
        * torch.sigmoid(-ctx.saved_tensors[0]),
        g * torch.sigmoid(ctx.saved_tensors[0]),
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=LIBRARY,
)


def _written(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    y = a * 2
    torch.ops.gpdfx_test_ops.shift(y, 1)
    return y.detach() * b


LIBRARIES: dict[str, Join] = {
    "several results": lambda a, b, w: torch.ops.gpdfx_test_ops.sorted_pair(a, [b, a])[0] * a,
    "integers": lambda a, b, w: a * torch.ops.gpdfx_test_ops.sorted_pair(a, [b])[1],
    "complex": lambda a, b, w: torch.ops.gpdfx_test_ops.spectrum(a).abs() + b,
    "draws": lambda a, b, w: torch.ops.gpdfx_test_ops.noise(a) * b,
    "with a derivative of its own": lambda a, b, w: torch.ops.gpdfx_test_ops.gate(a, b) + b,
    "writes": _written,
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_ops_of_libraries_are_lossless(name: str) -> None:
    """Whatever they are made of, or if nothing is known of them."""
    torch.manual_seed(0)
    model, x, other = Joined(LIBRARIES[name]).eval(), torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    teacher = gpdfx.expand(model, 1.5, example_inputs=(x,), branches=None).eval()
    torch.manual_seed(1)
    wanted = model(other)
    torch.manual_seed(1)
    torch.testing.assert_close(teacher(other), wanted, rtol=1e-4, atol=1e-4)


def test_an_op_of_which_nothing_is_known_is_bridged() -> None:
    found = report(lambda a, b, w: torch.ops.gpdfx_test_ops.gate(a, a) @ w.T @ w)
    assert {(b.op, b.reason) for b in found.bridged} == {
        ("gpdfx_test_ops.gate.default", "no rule for this op")
    }
    assert found.widened == 1


# --------------------------------------------------------------------------- the table
def test_every_op_has_a_class() -> None:
    """None is in no class, and the page is what the code says, by the torch that wrote it."""
    page = ops.table()
    if f"of PyTorch {ops.version()}:" in ops.FILE.read_text():
        assert page == ops.FILE.read_text(), "python -m benchmarks.ops writes it anew"
