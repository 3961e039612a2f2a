"""Random networks as runnable source code, so that a failure prints its own reproducer.

A network is a list of steps drawn by hypothesis, which shrinks it. Every step adds lines to
``__init__`` and ``forward`` and says what shape comes out: an image (channels, size) or tokens
(count, features).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import gpdfx
from gpdfx.branches.sets import SETS
from gpdfx.report.report import Report
from gpdfx.teacher.module import Teacher, take_first

from .helpers import facts, python_shell, summed
from .networks import tensors_equal

Draw = Callable[[Any], Any]


PRELUDE = """import random
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Reverse(torch.autograd.Function):  # a gradient of its own, that is linear
    @staticmethod
    def forward(ctx, x, k):
        ctx.k = k
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -ctx.k * g, None


class Surrogate(torch.autograd.Function):  # a step whose gradient is a bump
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype) + x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (1 + x.abs()) ** 2


class Scaled(torch.autograd.Function):  # not elementwise along the last axis
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / (1 + x.abs().mean(-1, keepdim=True))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.abs().mean(-1, keepdim=True)
"""
"""What every network may use."""


@dataclass
class Source:
    """A network being written. ``kind``: image or tokens; ``c``: channels; ``n``: size or count."""

    draw: Draw
    kind: str = "image"
    c: int = 3
    n: int = 8
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    count: int = 0

    def layer(self, code: str) -> str:
        name = f"self.m{self.count}"
        self.count += 1
        self.init.append(f"{name} = {code}")
        return name

    def add(self, *lines: str) -> None:
        self.forward += lines

    def one(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def divisors(self, low: int = 2) -> list[int]:
        return [d for d in range(low, self.c) if self.c % d == 0]

    def code(self) -> str:
        init = "\n        ".join(["super().__init__()", *self.init])
        body = "\n        ".join([*self.forward, "return x"])
        return (
            f"{PRELUDE}\n\nclass Net(nn.Module):\n    def __init__(self):\n        {init}\n\n"
            f"    def forward(self, x):\n        {body}\n"
        )


# --------------------------------------------------------------------------- image steps
def conv(s: Source) -> None:
    out = s.one(4, 6, 8, 12)
    groups = s.one(*[g for g in (1, 2, 3, 4) if s.c % g == 0 and out % g == 0])
    kernel, dilation = s.one((1, 1), (3, 1), (3, 2))
    stride = s.one(1, 2) if s.n >= 4 else 1
    pad = dilation * (kernel // 2)
    options = f"{s.c}, {out}, {kernel}, stride={stride}, padding={pad}, dilation={dilation}"
    s.add(f"x = {s.layer(f'nn.Conv2d({options}, groups={groups}, bias={s.one(True, False)})')}(x)")
    s.c, s.n = out, (s.n + stride - 1) // stride


def depthwise(s: Source) -> None:
    times = s.one(1, 2)
    s.add(f"x = {s.layer(f'nn.Conv2d({s.c}, {s.c * times}, 3, padding=1, groups={s.c})')}(x)")
    s.c *= times


def transposed(s: Source) -> None:
    out = s.one(4, 6)
    groups = s.one(*[g for g in (1, 2) if s.c % g == 0])
    code = f"nn.ConvTranspose2d({s.c}, {out}, 3, padding=1, groups={groups})"
    s.add(f"x = {s.layer(code)}(x)")
    s.c = out


def image_norm(s: Source) -> None:
    groups = s.one(*[g for g in (1, 2, 3, 4) if s.c % g == 0])
    kinds = (f"nn.BatchNorm2d({s.c})", f"nn.GroupNorm({groups}, {s.c})")
    s.add(f"x = {s.layer(s.one(*kinds, f'nn.InstanceNorm2d({s.c}, affine=True)'))}(x)")


def residual(s: Source) -> None:
    a = s.layer(f"nn.Conv2d({s.c}, {s.c}, 3, padding=1)")
    in_place = f"x = {a}(x).add_(x).mul_(0.5)"
    s.add(s.one(f"x = x + {a}(x)", in_place, f"x = x * torch.sigmoid({a}(x))"))


def concat(s: Source) -> None:
    out = s.one(2, 4, 5)
    a = s.layer(f"nn.Conv2d({s.c}, {out}, 1)")
    s.add(s.one(f"x = torch.cat([x, {a}(x)], 1)", f"x = torch.cat([{a}(x), x], 1)"))
    s.c += out


def gate(s: Source) -> None:
    a, b = s.layer(f"nn.Linear({s.c}, 3)"), s.layer(f"nn.Linear(3, {s.c})")
    s.add(f"x = x * {b}(F.relu({a}(x.mean((2, 3))))).sigmoid()[:, :, None, None]")


def shuffle(s: Source) -> None:
    if options := s.divisors():
        g = s.one(*options)
        s.add(f"x = x.unflatten(1, ({g}, {s.c // g})).transpose(1, 2).flatten(1, 2)")


def halves(s: Source) -> None:
    if s.c % 2 == 0:
        forms = ("x = torch.cat([b, a], 1)", "x = torch.cat([a * b, a], 1)", "x = a + b")
        form = s.one(*forms)
        s.add("a, b = x.chunk(2, 1)", form)
        s.c = s.c // 2 if form == forms[2] else s.c


def slices(s: Source) -> None:
    k = s.one(*range(1, s.c)) if s.c > 1 else 0
    if k:
        s.add(s.one(f"x = torch.cat([x[:, {k}:], x[:, :{k}]], 1)", f"x = x - x[:, {k - 1} : {k}]"))


def write(s: Source) -> None:
    k = max(1, s.c // 2)
    s.add("x = x.clone()", s.one(f"x[:, :{k}] = x[:, -{k}:] * 2", f"x[:, {k - 1}] += 1.0"))


def positions(s: Source) -> None:
    """Ops along the channel axis for which positions matter, or that have no rule."""
    eca = s.layer("nn.Conv1d(1, 1, 3, padding=1)")
    s.add(
        s.one(
            "x = x.cumsum(1)",
            "x = x.sort(1)[0]",
            "x = x.flip(1)",
            "x = x.roll(1, 1)",
            "x = x + x.argmax(1, keepdim=True) * 0.1",
            "x = x * x.topk(1, 1)[0]",
            f"x = x * {eca}(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]",
            "x = x + F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]",
        )
    )


def reduce(s: Source) -> None:
    s.add(
        s.one(
            "x = x.softmax(1) * 3",
            "x = x - x.mean(1, keepdim=True)",
            "x = x / (x.std(1, keepdim=True) + 1)" if s.c > 1 else "x = x",
            "x = x / (x.var(1, keepdim=True, unbiased=False) + 1)",
            "x = F.normalize(x, dim=1)",
            "x = x - x.amax(1, keepdim=True)",
            "x = x + x.logsumexp(1, keepdim=True)",
            "x = x * x.sum(1, keepdim=True).tanh()",
        )
    )


def pool(s: Source) -> None:
    if s.n >= 4:
        s.add(s.one("x = F.max_pool2d(x, 2)", "x = F.avg_pool2d(x, 2)"))
        s.n //= 2


def pixel(s: Source) -> None:
    if s.c % 4 == 0 and s.n <= 8:
        s.add("x = F.pixel_shuffle(x, 2)")
        s.c, s.n = s.c // 4, s.n * 2


def twice(s: Source) -> None:
    a = s.layer(f"nn.Conv2d({s.c}, {s.c}, 1)")
    s.add(f"x = {a}(F.relu({a}(x)))")


def to_tokens(s: Source) -> None:
    s.add("x = x.flatten(2).transpose(1, 2)")
    s.kind, s.n = "tokens", s.n * s.n


def scatter(s: Source) -> None:
    k = max(1, s.c // 2)
    s.add(
        s.one(
            f"x = torch.slice_scatter(x, x[:, -{k}:] * 2, 1, 0, {k})",
            f"x = torch.select_scatter(x, x[:, {k - 1}] + 1, 1, {k - 1})",
            "x = torch.slice_scatter(x, x[:, :, ::2] * 2, 2, 0, None, 2)",
        )
    )


def resize(s: Source) -> None:
    if s.n <= 8:
        mode = s.one("'nearest'", "'bilinear', align_corners=False", "'bicubic'")
        s.add(f"x = F.interpolate(x, scale_factor=2, mode={mode})")
        s.n *= 2


def windows(s: Source) -> None:
    if s.n % 2 == 0 and s.c <= 12:
        s.add("x = F.unfold(x, 2, stride=2)", f"x = x.unflatten(2, ({s.n // 2}, {s.n // 2}))")
        s.c, s.n = s.c * 4, s.n // 2


def strips(s: Source) -> None:
    """Convolutions between rows, that slide along the channels or along what is left."""
    kernel, pad = s.one(("(3, 1)", "(1, 0)"), ("(1, 3)", "(0, 1)"))
    a = s.layer(f"nn.Conv2d({s.n}, {s.n}, {kernel}, padding={pad})")
    s.add(f"x = x + {a}(x.transpose(1, 2)).transpose(1, 2)")


def volume(s: Source) -> None:
    """A 3d convolution over groups of channels."""
    if options := s.divisors():
        g, out = s.one(*options), s.one(2, 3)
        a = s.layer(f"nn.Conv3d({g}, {out}, 3, padding=1)")
        s.add(f"x = {a}(x.unflatten(1, ({g}, {s.c // g}))).flatten(1, 2)")
        s.c = out * (s.c // g)


def without_rule(s: Source) -> None:
    """Ops without a rule, on activations and on weights."""
    a = s.layer(f"nn.Conv2d({s.c}, {s.c}, 1)")
    s.add(
        s.one(
            "x = x.masked_scatter(x > 2, x)",
            f"x = F.conv2d(x, torch.linalg.pinv({a}.weight[..., 0, 0])[..., None, None], {a}.bias)",
            "x = x + torch.linalg.svdvals(x.flatten(2))[:, :1, None, None]",
        )
    )


def image_state(s: Source) -> None:
    """What forward keeps in a buffer: an average, or how often it was called."""
    _state(s, "(0, 2, 3)", "[:, None, None]")


# --------------------------------------------------------------------------- token steps
def linear(s: Source) -> None:
    out = s.one(4, 6, 12)
    s.add(f"x = {s.layer(f'nn.Linear({s.c}, {out})')}(x)")
    s.c = out


def token_norm(s: Source) -> None:
    s.add(f"x = {s.layer(s.one(f'nn.LayerNorm({s.c})', f'nn.RMSNorm({s.c})'))}(x)")


def mlp(s: Source) -> None:
    a, b = s.layer(f"nn.Linear({s.c}, {2 * s.c})"), s.layer(f"nn.Linear({s.c}, {s.c})")
    c = s.layer(f"nn.Linear({2 * s.c}, {s.c})")
    s.add(s.one(f"x = x + {b}(F.glu({a}(x), -1))", f"x = x + {b}({c}(F.gelu({a}(x))))"))


def attention(s: Source) -> None:
    """Packed in every axis order; explicit softmax or the fused op."""
    h = s.one(1, *s.divisors())
    d = s.c // h
    qkv, proj = s.layer(f"nn.Linear({s.c}, {3 * s.c})"), s.layer(f"nn.Linear({s.c}, {s.c})")
    unpack = {
        "3hd": f"q, k, v = y.unflatten(-1, (3, {h}, {d})).permute(2, 0, 3, 1, 4).unbind(0)",
        "h3d": f"q, k, v = y.unflatten(-1, ({h}, 3, {d})).permute(3, 0, 2, 1, 4)",
        "hd3": f"q, k, v = y.unflatten(-1, ({h}, {d}, 3)).permute(4, 0, 2, 1, 3)",
        "chunk": (
            f"q, k, v = (t.unflatten(-1, ({h}, {d})).transpose(1, 2) for t in y.chunk(3, -1))"
        ),
        "split": (
            f"q, k, v = (t.transpose(1, 2) for t in y.unflatten(-1, ({h}, {3 * d})).split({d}, -1))"
        ),
    }
    score = (
        "y = F.scaled_dot_product_attention(q, k, v)",
        f"y = (q @ k.transpose(-1, -2) * {d**-0.5}).softmax(-1) @ v",
        "y = torch.einsum('bhnm,bhmd->bhnd', torch.einsum('bhnd,bhmd->bhnm', q, k).softmax(-1), v)",
        "y = q @ (k.softmax(-2).transpose(-1, -2) @ v)",
    )
    score += (
        "y = F.scaled_dot_product_attention(q, k, v, is_causal=True)",
        "y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2 if self.training else 0.0)",
        "y = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)",
    )
    s.add(f"y = {qkv}(x)", unpack[s.one(*unpack)], s.one(*score))
    s.add(f"x = x + {proj}(y.transpose(1, 2).flatten(2))")


def mixer(s: Source) -> None:
    """Between tokens: by a linear layer, or by a convolution whose length are the features."""
    if s.one(True, False):
        s.add(f"x = x + {s.layer(f'nn.Linear({s.n}, {s.n})')}(x.transpose(1, 2)).transpose(1, 2)")
    else:
        s.add(f"x = x + {s.layer(f'nn.Conv1d({s.n}, {s.n}, 1)')}(x)")


def queries(s: Source) -> None:
    """Learned queries, the same for every sample."""
    count = s.one(2, 4)
    q, k = s.layer(f"nn.Parameter(torch.randn({count}, {s.c}))"), s.layer(f"nn.Linear({s.c}, 6)")
    a = s.layer(f"nn.Linear({s.c}, 6)")
    s.add(f"q, k = {a}({q}.expand(x.shape[0], -1, -1)), {k}(x)")
    scores = ("q @ k.transpose(1, 2)", "torch.einsum('bnd,bmd->bnm', q, k)")
    s.add(f"x = ({s.one(*scores)}).softmax(-1) @ x")
    s.n = count


def groups(s: Source) -> None:
    """Tokens are added up, or the largest taken, by group (as a graph network's edges are)."""
    if s.n < 2:
        return
    s.add(f"i = torch.arange({s.n}) % 2", "j = i[None, :, None].expand_as(x)")
    s.add(f"y = x.new_zeros((x.shape[0], 2, {s.c}))")
    forms = ("y.scatter_add_(1, j, x)", "y.index_add_(1, i, x)", "y.index_add(1, i, x, alpha=0.5)")
    largest = "y.scatter_reduce_(1, j, x, 'amax', include_self=False)"
    s.add(f"x = {s.one(*forms, largest)}")
    s.n = 2


def tied(s: Source) -> None:
    a, b = s.layer(f"nn.Linear({s.c}, {s.c})"), s.layer(f"nn.Linear({s.c}, {s.c})")
    s.init.append(f"{b}.weight = {a}.weight")
    s.add(s.one(f"x = {b}(F.silu({a}(x)))", f"x = {a}(x) @ {b}.weight"))


def standardized(s: Source) -> None:
    a = s.layer(f"nn.Linear({s.c}, {s.c})")
    s.add(f"w = {a}.weight", "w = (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1)")
    s.add(f"x = F.linear(x, w, {a}.bias)")


def recurrent(s: Source) -> None:
    kind, both = s.one("LSTM", "GRU", "RNN"), s.one(True, False)
    layers = s.one("num_layers=1", "num_layers=2", "num_layers=2, dropout=0.2")
    out = s.one(2, 3)
    options = f"{s.c}, {out}, batch_first=True, bidirectional={both}, {layers}"
    s.add(f"x = {s.layer(f'nn.{kind}({options})')}(x[:, :8])[0]")
    s.c, s.n = out * (1 + both), min(s.n, 8)


def along(s: Source) -> None:
    """A 1d convolution along the tokens."""
    out = s.one(4, 6)
    groups = s.one(*[g for g in (1, 2, 3) if s.c % g == 0 and out % g == 0])
    a = s.layer(f"nn.Conv1d({s.c}, {out}, 3, padding=1, groups={groups})")
    s.add(f"x = {a}(x.transpose(1, 2)).transpose(1, 2)")
    s.c = out


def masked(s: Source) -> None:
    """Attention that some tokens must not see, by position or by value."""
    qkv, proj = s.layer(f"nn.Linear({s.c}, {3 * s.c})"), s.layer(f"nn.Linear({s.c}, {s.c})")
    hidden = (
        "torch.ones(x.shape[1], x.shape[1]).triu(1).bool()",
        "(torch.arange(x.shape[1]) >= x.shape[1] - 1)[None]",
        "(x.detach().sum(2) < x.detach().sum(2).amax(1, keepdim=True) - 2)[:, None]",
        "torch.arange(x.shape[1])[:, None] < 1",  # for all tokens of one row
    )
    low = s.one("-1e4", "-1e9", "torch.finfo(x.dtype).min", "float('-inf')")
    plain = f"y = (q @ k.transpose(1, 2) * {s.c**-0.5}).masked_fill(m, {low}).softmax(-1)"
    dropped = "y = F.dropout(y.nan_to_num(0.0), 0.1, self.training) @ v"
    fused = "y = F.scaled_dot_product_attention(q, k, v, ~m.expand(x.shape[0], -1, x.shape[1]))"
    s.add(f"q, k, v = {qkv}(x).unflatten(-1, (3, {s.c})).unbind(-2)", f"m = {s.one(*hidden)}")
    s.add(*s.one((plain, dropped), (fused, "y = y.nan_to_num(0.0)")))
    s.add(f"x = x + {proj}(y)")


def token_state(s: Source) -> None:
    """The same as ``image_state``."""
    _state(s, "(0, 1)", "")


def to_image(s: Source) -> None:
    side = round(s.n**0.5)
    if side**2 != s.n:
        return
    s.add(f"x = x.transpose(1, 2).unflatten(2, ({side}, {side}))")
    s.kind, s.n = "image", side


# --------------------------------------------------------------------------- either
def _state(s: Source, dims: str, wide: str) -> None:
    name = f"m{s.count}"
    s.count += 1
    if s.one(True, False):
        s.init.append(f"self.register_buffer('{name}', torch.zeros({s.c}))")
        update = f"self.{name}.lerp_(x.detach().mean({dims}), 0.2)"
        s.add("if self.training:", f"    {update}", f"x = x - self.{name}{wide}")
    else:
        s.init.append(f"self.register_buffer('{name}', torch.zeros(()))")
        s.add(f"self.{name}.add_(1)", f"x = x * (1 + 0.1 * self.{name})")


def on_sizes(s: Source) -> None:
    """One of two ways, by the sizes of the input."""
    wide = s.kind == "image"
    a = s.layer(f"nn.Conv2d({s.c}, {s.c}, 1)" if wide else f"nn.Linear({s.c}, {s.c})")
    one = ("x.shape[0] > 2", "x.shape[0] != 3", "x.shape[0] % 2 == 0", "x.shape[0] == 1")
    more = ("x.shape[2] > x.shape[3]", "x.shape[2] % 2 == 0", "x.shape[3] >= 4", "x.shape[2] != 5")
    s.add(f"if {s.one(*one, *(more if wide else ('x.shape[1] > 3', 'x.shape[1] % 2 == 1')))}:")
    s.add(f"    x = x + {a}(x)", *s.one((), ("else:", "    x = x * 0.5")))


def own_gradient(s: Source) -> None:
    """A function of the user's, of activations or of a weight, or a hook on an activation."""
    wide = s.kind == "image"
    a = s.layer(f"nn.Conv2d({s.c}, {s.c}, 1)" if wide else f"nn.Linear({s.c}, {s.c})")
    call, hook = "F.conv2d" if wide else "F.linear", "y.register_hook(lambda g: g * 0.5)"
    kind = s.one("Reverse.apply({}, 0.5)", "Surrogate.apply({})", "Scaled.apply({})")
    s.add(
        *s.one(
            (f"x = {kind.format('x')}",),
            (f"x = {kind.format(f'{a}(x)')} * 0.5 + x",),
            (f"x = {call}(x, {kind.format(f'{a}.weight')}, {a}.bias)",),
            (f"y = {a}(x)", "if y.requires_grad:", f"    {hook}", "x = x + y.tanh()"),
        )
    )


def checkpointed(s: Source) -> None:
    """Layers of which no activation is saved."""
    wide, reentrant = s.kind == "image", s.one(True, False)
    a = s.layer(f"nn.Conv2d({s.c}, {s.c}, 1)" if wide else f"nn.Linear({s.c}, {s.c})")
    norm = s.layer(f"nn.GroupNorm(1, {s.c})" if wide else f"nn.LayerNorm({s.c})")
    inside = s.one(f"{a}", f"lambda y: {norm}({a}(y)).relu()", f"lambda y: F.dropout({a}(y), 0.2)")
    s.add(f"x = x + checkpoint({inside}, x, use_reentrant={reentrant})")


def in_python(s: Source) -> None:
    """State in an attribute, or a draw of Python's own: by the network itself."""
    name = f"m{s.count}"
    s.count += 1
    wide = s.kind == "image"
    a = s.layer(f"nn.Conv2d({s.c}, {s.c}, 1)" if wide else f"nn.Linear({s.c}, {s.c})")
    s.init.append(f"self.{name} = 0")
    forms = (
        (f"self.{name} += 1", f"x = x + {a}(x) / self.{name}"),
        ("if self.training:", f"    self.{name} += 1", f"x = x * (1 + 0.1 * self.{name})"),
        (
            "if self.training:",
            f"    self.{name} = 0.5 * self.{name} + x.detach().mean()",
            f"x = x - self.{name}",
        ),
        ("if not self.training or random.random() < 0.5:", f"    x = x + {a}(x)"),
    )
    s.add(*s.one(*forms))


def in_eval_mode(s: Source) -> None:
    """A norm or dropout that the user put into eval mode."""
    norm = f"nn.BatchNorm2d({s.c})" if s.kind == "image" else f"nn.LayerNorm({s.c})"
    a = s.layer(s.one(norm, "nn.Dropout(0.3)"))
    s.init.append(f"{a}.eval()")
    s.add(f"x = {a}(x)")


def activation(s: Source) -> None:
    kinds = ("F.relu(x)", "F.relu(x * 2, inplace=True)", "F.gelu(x)", "F.hardswish(x)", "x.tanh()")
    s.add(f"x = {s.one(*kinds, 'F.leaky_relu(x, 0.1)', 'x.clamp(-2, 2)', 'x * 0.5 + 1')}")


def dropout(s: Source) -> None:
    ones = "(1, 1, 1)" if s.kind == "image" else "(1, 1)"
    path = f"x = x * x.new_empty((x.shape[0], *{ones})).bernoulli_(0.8) if self.training else x"
    channels = "dropout2d" if s.kind == "image" else "dropout1d"
    kinds = ("dropout", channels, "alpha_dropout", "feature_alpha_dropout")
    always = "x = F.dropout(x, 0.2)"
    s.add(s.one(*(f"x = F.{kind}(x, 0.2, self.training)" for kind in kinds), path, always))


IMAGE = (
    *(conv, depthwise, transposed, image_norm, residual, concat, gate, shuffle, halves, slices),
    *(write, positions, reduce, pool, pixel, twice, to_tokens, activation, dropout),
    *(scatter, resize, windows, volume, strips, without_rule),
)
TOKENS = (
    *(linear, token_norm, mlp, attention, mixer, tied, standardized, to_image, activation, dropout),
    *(recurrent, along, queries, groups, masked),
)
EITHER_CALLS = (on_sizes, own_gradient, checkpointed, in_python, in_eval_mode)
IMAGE_CALLS, TOKEN_CALLS = (image_state, *EITHER_CALLS), (token_state, *EITHER_CALLS, masked)
"""Calls differ by more than their values, or do what no graph does."""


@st.composite
def networks(draw: Draw) -> str:
    """The source of a network from a (4, 3, 8, 8) image to 5 logits."""
    s = Source(draw)
    conv(s)
    count = draw(st.integers(1, 7))
    special = draw(st.integers(-1, count - 1))  # the place of a step by which calls differ, if any
    for k in range(count):
        every, some = (IMAGE, IMAGE_CALLS) if s.kind == "image" else (TOKENS, TOKEN_CALLS)
        draw(st.sampled_from(some if k == special else every))(s)
    s.add("x = x.mean((2, 3))" if s.kind == "image" else "x = x.mean(1)")
    s.add(f"x = {s.layer(f'nn.Linear({s.c}, 5)')}(x)")
    return s.code()


def build(code: str) -> nn.Module:
    """Run the source and make its network, seeded."""
    scope: dict[str, Any] = {}
    exec(code, scope)
    torch.manual_seed(0)
    model: nn.Module = scope["Net"]()
    return model


RATIOS = st.sampled_from([1.3, 1.5, 2, 2, 2.5, 3])


BRANCHES = st.sampled_from([None, "auto", *SETS])


SHARES = st.sampled_from(["random", "uniform"])


def check(
    code: str, ratio: Any, shares: str, branches: str | None = None, **options: Any
) -> Report:
    """Lossless in both modes; collapse is the identity; gradients are the student's own; call after
    call, and at other sizes; explain agrees with the report."""
    model = build(code)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    options |= {"shares": shares, "branches": branches}
    teacher = gpdfx.expand(model, ratio, example_inputs=(x,), **options)
    report = teacher.report()
    assert not [b for b in report.bridged if "rule" in b.reason and "no rule" not in b.reason]
    assert tensors_equal(model.state_dict(), gpdfx.collapse(teacher).state_dict())
    assert all(sizes.startswith("batch") for sizes in report.inputs.values()), report.inputs
    stays = {(f.parameter, f.dim) for f in report.fixed}
    for name, _ in model.named_parameters():
        for dim, d in enumerate(gpdfx.explain(teacher, name).dimensions):
            if d.student > 1:
                assert ((name, dim) in stays) == bool(d.reason), (name, dim, d)
                assert (d.teacher > d.student) == bool(d.group), (name, dim, d)
    model, teacher = model.double(), teacher.double()
    _same_gradients(copy.deepcopy(model).eval(), copy.deepcopy(teacher).eval(), x.double())
    _same_calls(model, teacher)  # in the modes that its modules were given in
    for training in (False, True):
        _same_calls(model.train(training), teacher.train(training))
    return report


def _same_gradients(model: nn.Module, teacher: Teacher, x: Tensor) -> None:
    """The student's view has its gradients, and so has the teacher, summed over copies."""
    found: list[dict[str, Tensor | None]] = []
    for run, owner in ((model, model), (teacher.student, teacher), (teacher, teacher)):
        _seed(2)  # dropout may be on in eval mode, too
        state = {n: b.clone() for n, b in owner.named_buffers()}
        run(x).square().sum().backward()
        found.append({name: p.grad for name, p in owner.named_parameters()})
        owner.zero_grad()
        for name, buffer in owner.named_buffers():
            buffer.copy_(state[name])
    for name, expected in found[0].items():
        if expected is not None:
            maps, first, whole = facts(teacher).maps[name], found[1][name], found[2][name]
            assert first is not None
            assert whole is not None
            _assert_close(take_first(first, maps), expected)
            _assert_close(summed(whole, maps), expected)


SIZES = (
    *((4, 3, 8, 8), (4, 3, 8, 8), (1, 3, 8, 8), (3, 3, 8, 8)),
    *((4, 3, 8, 6), (2, 3, 5, 9), (6, 3, 12, 12)),
)
"""Of calls in a row."""


def _same_calls(model: nn.Module, teacher: Teacher) -> None:
    """One after the other, at sizes that the model takes; the teacher may refuse another size than
    the first."""
    for k, size in enumerate(SIZES):
        x = torch.randn(size, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        try:
            _seed(k)
            copy.deepcopy(model)(x)
        except Exception:  # its own code at a size that it is not for
            continue
        try:
            if python_shell(teacher) is not None:  # a refusal may come after it has moved its state
                copy.deepcopy(teacher)(x)
            _seed(k)
            got = teacher(x)
        except gpdfx.InputError:
            assert size != SIZES[0]
            continue
        _seed(k)
        _assert_close(got, model(x))
        buffers = dict(teacher.named_buffers())
        for name, own in model.named_buffers():
            _assert_close(take_first(buffers[name], facts(teacher).maps[name]), own)


def _seed(k: int) -> None:
    torch.manual_seed(k)
    random.seed(k)


def _assert_close(got: Tensor, expected: Tensor) -> None:
    """As close as kernels are on strided views."""
    scale = float(expected.detach().abs().nan_to_num().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7 * scale + 1e-12, equal_nan=True)
