"""A teacher goes where its student could: other types, devices, memory formats, compilers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx
from benchmarks import networks
from gpdfx.passes.canonicalize import canonicalize
from gpdfx.passes.capture.export import capture, whole
from gpdfx.passes.capture.inline import inline
from gpdfx.passes.capture.submodules import recapture
from gpdfx.passes.follow import bakes_constants, follow, follow_device
from gpdfx.passes.program import Program, value

from .networks import NETWORKS


class Baking(nn.Module):
    """Every way to bake a type or a device into a graph: factories, casts, limits of a type."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        position = torch.arange(y.shape[1], device=y.device, dtype=y.dtype)[None, :, None]
        scale = torch.full((1,), 0.5, dtype=self.a.weight.dtype, device=x.device)
        precise = y.float()  # nothing, but in half precision
        y = self.b(y * scale + position / 7) + precise.tanh().type_as(y)
        late = torch.triu(torch.ones(y.shape[1], y.shape[1], device=y.device), 1).bool()
        scores = y @ y.transpose(1, 2)
        scores = scores.masked_fill(late, torch.finfo(scores.dtype).min)
        return self.c(F.softmax(scores, dim=-1, dtype=torch.float32).type_as(y) @ y)


def baking() -> tuple[nn.Module, gpdfx.Teacher, Tensor]:
    torch.manual_seed(0)
    model, x = Baking(), torch.randn(4, 5, 6)
    return model, gpdfx.expand(model, 1.5, example_inputs=(x,)), x


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_that_capture_baked_follow(dtype: torch.dtype) -> None:
    model, teacher, x = baking()
    assert teacher.report().widened == 1.0
    model.to(dtype), teacher.to(dtype)
    x = x.to(dtype)
    y, want = teacher(x), model(x)
    assert y.dtype is want.dtype is dtype
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype is dtype for p in teacher.parameters())


class Splits(nn.Module):
    """Tensors out of several at once."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.stack((a, b), 0).unbind(0)[1] + torch.var_mean(a, 1, keepdim=True)[0]


def test_a_split_bakes_no_type() -> None:
    """So that no second capture looks for it."""
    splits = nn.Sequential(nn.Linear(4, 8), Splits(), nn.Dropout(0.1))
    for model, shape, bakes in ((splits, (2, 4), False), (Baking(), (2, 3, 6), True)):
        program = capture(model, whole(model, (torch.randn(shape),), {}), False, "batch")
        assert bakes_constants(program) == bakes


class Cache:
    """A state, and what is noted of it."""

    def __init__(self, state: Tensor) -> None:
        self.state, self.dtype, self.device = state, state.dtype, state.device


class Cached(nn.Module):
    """Returns a cache beside its result."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Cache, torch.dtype]:
        y = self.a(x)
        return self.b(y), Cache(y), torch.float16


def test_types_and_devices_that_a_result_holds_follow() -> None:
    model, x = Cached(), torch.randn(4, 6)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,))
    assert not teacher.report().apart
    assert teacher.report().widened == 1
    cache: Cache
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "cpu"), (torch.float64, "meta")):
        _, cache, own = teacher.to(device, dtype)(x.to(device, dtype))
        assert cache.dtype is cache.state.dtype is dtype
        assert cache.device == cache.state.device == torch.device(device)
        assert own is torch.float16  # what does not follow stays


def test_devices_that_capture_baked_follow() -> None:
    """On the meta device every tensor that stayed behind is an error."""
    _, teacher, x = baking()
    y = teacher.to("meta")(x.to("meta"))
    assert y.device.type == "meta"
    assert teacher.student(x.to("meta")).shape == y.shape


def test_autocast_is_the_students() -> None:
    model, teacher, x = baking()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, want = teacher(x), model(x)
    assert y.dtype is want.dtype
    torch.testing.assert_close(y, want, rtol=5e-2, atol=5e-2)


def test_channels_last_stays() -> None:
    case = NETWORKS["unet"]
    model = case.model().to(memory_format=torch.channels_last)
    teacher = gpdfx.expand(model, 2, example_inputs=case.inputs(), dynamic="batch")
    for name, mine in model.named_parameters():
        p = teacher.get_parameter(name)
        same = p.is_contiguous(memory_format=torch.channels_last) if p.ndim == 4 else True
        assert same == (mine.is_contiguous(memory_format=torch.channels_last) or p.ndim != 4), name
    plain = gpdfx.collapse(teacher)
    for name, p in plain.named_parameters():
        assert p.stride() == model.get_parameter(name).stride(), name


def test_moved_to_channels_last_shares_and_branches_keep_their_order() -> None:
    """They have four or five dimensions and are no images."""
    case = NETWORKS["unet"]
    model = case.model()
    gpd = gpdfx.GPD(model, ratio=2, branches="auto", example_inputs=case.inputs())
    x = case.inputs()[0]
    before = gpd.teacher(x)
    own = ("_shares.", "_branches.")
    tensors = {**dict(gpd.teacher.named_parameters()), **dict(gpd.teacher.named_buffers())}
    strides = {name: t.stride() for name, t in tensors.items() if name.startswith(own)}
    assert {len(s) for s in strides.values()} >= {4, 5}
    gpd.to(memory_format=torch.channels_last)
    moved = {**dict(gpd.teacher.named_parameters()), **dict(gpd.teacher.named_buffers())}
    assert all(moved[name] is t for name, t in tensors.items() if name in strides)
    assert all(moved[name].stride() == stride for name, stride in strides.items())
    for name, _ in model.named_parameters():
        p = moved[name]
        assert p.ndim != 4 or p.is_contiguous(memory_format=torch.channels_last), name
    torch.testing.assert_close(gpd.teacher(x), before)
    gpd.double()
    assert {t.dtype for t in gpd.parameters()} == {torch.float64}


class Images(nn.Module):
    """Has images as results, and numbers that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.register_buffer("table", torch.arange(8.0).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b((self.norm(self.a(x)) + self.table).relu())
        return y


def images(**options: Any) -> tuple[gpdfx.GPD, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 9, 9), torch.arange(4)[:, None, None].expand(4, 5, 5)
    gpd = gpdfx.GPD(Images(), Images(), unshared="b.bias", example_inputs=(x,), **options)
    return gpd, x, y


def test_channels_last_is_another_order_alone() -> None:
    gpd, x, y = images(extract="mean")
    last: dict[str, Any] = {"memory_format": torch.channels_last}
    moved = copy.deepcopy(gpd).to(**last)
    out, want = moved(x.to(**last), y), gpd(x, y)
    for one, other in zip(out[:3], want[:3], strict=True):
        torch.testing.assert_close(one, other)
        assert one.ndim < 4 or one.is_contiguous(**last)
    out.loss.backward(), want.loss.backward()
    grads = [[p.grad for p in net.parameters()] for net in (moved, gpd)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    for net in (moved.teacher, moved.collapse()):
        for path in ("a", "b"):
            weight = net.get_submodule(path).weight
            assert weight.is_contiguous(**last)
            assert weight.grad is None or weight.grad.is_contiguous(**last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_all_of_gpd_takes_a_type(dtype: torch.dtype) -> None:
    gpd, x, y = images()
    want = gpd(x, y)
    out = copy.deepcopy(gpd).to(dtype)(x.to(dtype), y)
    for one, other in zip(out[1:4], want[1:4], strict=True):
        assert one.dtype is dtype
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05)


def test_a_copy_or_a_pickle_of_gpd_is_another() -> None:
    gpd, x, y = images()
    state = {k: v.clone() for k, v in gpd.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(gpd, buffer)
    buffer.seek(0)
    others = (copy.deepcopy(gpd), pickle.loads(pickle.dumps(gpd)))
    others += (torch.load(buffer, weights_only=False),)
    want = gpd.eval()(x, y).loss
    for other in others:
        assert torch.equal(other.eval()(x, y).loss, want)
        optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
        other.train()(x, y).loss.backward()
        optimizer.step()
        assert not torch.equal(other.collapse().a.weight, gpd.collapse().a.weight)
    assert all(torch.equal(v, state[k]) for k, v in gpd.state_dict().items())


@pytest.mark.parametrize("by_meta", [True, False])
def test_to_empty_leaves_what_a_state_dict_fills(by_meta: bool) -> None:
    """Constants, and the static teacher, are in none."""
    gpd, x, y = images(extract="mean")
    want, state = gpd.eval()(x, y), gpd.state_dict()
    other = copy.deepcopy(gpd)
    if by_meta:
        other.to("meta")
        assert other(x.to("meta"), y.to("meta")).loss.is_meta
        other.double()
    other.to_empty(device="cpu").float()
    with torch.no_grad():
        for p in other.parameters():
            p.fill_(torch.nan)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x, y), want, rtol=0, atol=0)
    assert torch.equal(other.student(x), want.student_logits)


@pytest.mark.parametrize("branches", ["dbb", "mobileone"])
def test_under_autocast_normalized_branches_keep_their_statistics_type(branches: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(4, 3, 9, 9)
    found = []
    for half in (False, True):
        teacher = gpdfx.expand(model, 2, branches=branches, scales="scratch", example_inputs=(x,))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = teacher.train()(x)
        y.float().square().mean().backward()
        found.append({name: b.clone() for name, b in teacher.named_buffers() if "running" in name})
        found[-1]["y"] = y
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(found[1], found[0], rtol=5e-2, atol=5e-2, check_dtype=False)
    assert {b.dtype for name, b in found[1].items() if name != "y"} == {torch.float32}


def told(program: Program) -> list[str]:
    """All that a pass could change in place."""
    nodes = [
        (key, n.name, n.op, n.target, n.args, n.kwargs, list(n.users), sorted(n.meta))
        for key, n in program.each()
    ]
    return list(map(str, (*nodes, list(program.tensors), list(program.children))))


class Region(Baking):
    """Every kind of node that a pass before widening takes out, puts in or respells."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            center = x.mean(1, keepdim=True)
        y = super().forward(self.drop(self.norm(x - center)))
        return y.clone().add_(1)


class Positions(nn.Module):
    """Makes numbers of a named dtype at sizes that are free, and one deliberate cast."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1] * 2 // 2, dtype=torch.float32) / (x.shape[1] + 1)
        y = self.enter(x) + steps.to(x.dtype)[:, None]
        return self.leave(y.softmax(-1, dtype=torch.float32).to(y.dtype))


class Masked(Positions):
    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        later = torch.full((x.shape[1], x.shape[1]), torch.finfo(y.dtype).min, dtype=y.dtype)
        later = later.triu(1)
        return self.leave((y @ y.mT + later).softmax(-1) @ y)


class Resized(Positions):
    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        grid = torch.zeros(x.shape[0], x.shape[1] - 1, 6, dtype=y.dtype)
        return self.leave(torch.cat([grid + y[:, 1:], y[:, :1]], 1))


class Corner(Positions):
    """Takes what a size says of each dimension: at the example's, all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y, n = self.enter(x), x.shape[1]
        mix = self.mix[:n, :n] * torch.ones(n, n).triu()
        return self.leave(mix.to(y.dtype) @ y)


class AsksForSizes(Positions):
    """Goes another way where sizes are plain numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 1 if type(x.shape[1]) is int else y


@pytest.mark.parametrize("kind", [Positions, Masked, Resized, Corner, AsksForSizes])
def test_dtypes_are_followed_by_a_capture_of_fixed_sizes(kind: type[Positions]) -> None:
    model, x = kind(), torch.randn(2, 4, 5)
    program = inline(capture(model, whole(model, (x,), {})))
    assert {mode.level for mode in program.modes.values()} == {"sizes"}
    twin = inline(recapture(program, kind().double(), torch.float64, False, "none"))
    assert follow(program, twin)[1] == (kind is not AsksForSizes)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=None).double()
    other = torch.randn(3, 4 if kind is Corner else 7, 5, dtype=torch.float64)
    torch.testing.assert_close(teacher(other), model.double()(other))


class FreeOnly(Positions):
    """Does not export where sizes are plain numbers."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() and type(x.shape[1]) is int:
            raise ValueError("for free sizes only")
        y = self.enter(x)
        return self.leave(y) * self.leave(torch.ones(*y.shape, dtype=y.dtype))


def test_dtypes_are_followed_by_a_capture_of_free_sizes_else() -> None:
    model, x = FreeOnly(), torch.randn(2, 4, 5)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=None).double()
    assert not teacher.report().apart
    other = torch.randn(3, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(teacher(other), model.double()(other))


@pytest.mark.parametrize("functional", [False, True])
def test_passes_make_another_program(functional: bool) -> None:
    model, x = Region(), torch.randn(4, 5, 6)
    program = capture(model, whole(model, (x,), {}), functional, "batch")
    double = inline(recapture(program, Region().double(), torch.float64, functional))
    for step in (inline, lambda p: follow(p, double)[0], follow_device, canonicalize):
        before, twin = told(program), told(double)
        result = step(program)
        result.check()
        assert told(program) == before
        assert told(result) != before or functional  # which leaves no region to inline
        assert told(double) == twin
        program = result
    for _, node in program.each():
        given = program.tensors.get(str(node.target)) if node.op == "get_attr" else None
        assert given is None or value(node) is given
        assert not hasattr(node.target, "_schema") or value(node) is not None


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, more: dict[str, Tensor], k: int = 1) -> dict[str, Tensor]:
        y = self.a(x + more["y"] * k).relu()
        return {"logits": self.b(y), "hidden": y}


def test_compiles_in_one_graph() -> None:
    torch.manual_seed(0)
    x, more = torch.randn(4, 4), {"y": torch.randn(4, 4)}
    inputs = {"example_inputs": (x, more), "example_kwargs": {"k": 2}}
    teacher = gpdfx.expand(Several(), 2, **inputs)
    compiled = torch.compile(teacher, fullgraph=True, backend="aot_eager")
    out = compiled(x, more, k=2)
    torch.testing.assert_close(out["logits"], teacher(x, more, k=2)["logits"])
    sum(y.sum() for y in out.values()).backward()
    assert teacher.a.weight.grad is not None


def test_a_language_model_still_generates() -> None:
    pytest.importorskip("transformers")
    model, args, kwargs = networks.build("transformers:LlamaForCausalLM", 0)
    teacher = gpdfx.expand(model, 2, example_inputs=args, example_kwargs=kwargs, dynamic="batch")
    assert teacher.report().widened == 1.0
    plain = gpdfx.collapse(teacher).eval()
    assert type(plain) is type(model)
    options = {"max_new_tokens": 5, "do_sample": False}
    prompt = kwargs["input_ids"][:1, :4]
    assert torch.equal(plain.generate(prompt, **options), model.eval().generate(prompt, **options))
    out = teacher.eval()(**kwargs)
    assert type(out) is type(model(**kwargs))
    assert out["logits"] is out.logits
