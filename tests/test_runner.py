"""Steps that run compiled or as a CUDA graph: the eager ones' numbers, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import gpdfx
from gpdfx.cli.app import main
from gpdfx.distill import streams
from gpdfx.train import log, run
from gpdfx.train import state as states
from gpdfx.train.networks import SavedBuffers, make_net
from gpdfx.train.ranks import Ranks
from gpdfx.train.recipes import with_changes
from gpdfx.train.steps import runner
from gpdfx.train.steps.step import Stepper

from .runs import TINY, command, config, go, make
from .small_networks import tiny

CPU = Ranks(torch.device("cpu"))
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
on_gpu = lambda test: GPU[0](GPU[1](test))  # noqa: E731
X, Y = torch.randn(8, 1, 8, 8), torch.arange(8)


class Counted:
    """Compiles in a moment, and counts how often."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, net: nn.Module, mode: str) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            self.graphs += 1
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        return torch.compile(net, backend=backend, dynamic=False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    torch._dynamo.reset()
    counted = Counted()
    monkeypatch.setattr(runner, "compile_network", counted)
    return counted


def stepper(ranks: Ranks = CPU, **changes: Any) -> Stepper:
    torch.manual_seed(0)
    chosen = config(Path("none"), **changes)
    net = make_net(chosen, tiny(10, 1), None, torch.randn(2, 1, 8, 8), verify=False)
    return Stepper(net.to(ranks.device).train(), chosen, ranks, 5)


def same_state(one: Stepper, other: Stepper, **tolerance: float) -> None:
    a, b = (states.flatten_module(s.net) for s in (one, other))
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], msg=name, **tolerance)


# --------------------------------------------------------------------------- compiled
@pytest.mark.parametrize("plain", [False, True])
def test_compiled_steps_are_the_eager_ones(counted: Counted, plain: bool) -> None:
    """A short batch and a skipped one in between; epochs do not compile again."""
    eager, fast = (stepper(compile=mode, plain=plain) for mode in ("none", "default"))
    for at in range(12):
        x, y = (X[:3], Y[:3]) if at == 2 else (X, Y)
        x = x / 0 if at == 4 else x
        found = []
        for one in (eager, fast):
            one.net.epoch = at
            found.append(one(x, y, at))
        assert (found[0] is None) is (found[1] is None) is (at == 4)
        if found[0] is not None and found[1] is not None:
            assert found[0] == pytest.approx(found[1], rel=1e-4)
    same_state(eager, fast, rtol=1e-4, atol=1e-5)
    assert counted.graphs == 1


def test_the_soft_targets_first_epoch_compiles_once_more(counted: Counted) -> None:
    one = stepper(compile="default", start_epoch=3, branches=None)
    terms = []
    for epoch in range(6):
        one.net.epoch = epoch
        terms.append("gap" in (one(X, Y, epoch) or {}))
    assert terms == [False] * 3 + [True] * 3
    assert counted.graphs == 2


@contextlib.contextmanager
def stopping(monkeypatch: pytest.MonkeyPatch, steps: int) -> Iterator[None]:
    """A run is stopped in its next step."""
    end_step, left = log.RunLog.end_step, [None] * steps

    def interrupted(self: log.RunLog, values: Any) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        end_step(self, values)

    with monkeypatch.context() as patched:
        patched.setattr(log.RunLog, "end_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.slow
def test_a_compiled_run_may_stop_and_change_its_mode(
    tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"branches": None, "compile": "default"}
    go(tmp_path / "whole", **changes)
    assert counted.graphs == 1
    for name, mode in (("killed", "default"), ("changed", "none")):
        with stopping(monkeypatch, steps=3):
            go(tmp_path / name, checkpoint_every=1, **changes)
        go(tmp_path / name, **(changes | {"compile": mode}))
    whole, killed, changed = (
        load_file(tmp_path / name / run.STUDENT) for name in ("whole", "killed", "changed")
    )
    for name, x in whole.items():
        assert torch.equal(x, killed[name]), name
        torch.testing.assert_close(x, changed[name], rtol=1e-3, atol=1e-4)


def test_a_compilers_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler here")

    monkeypatch.setattr(
        runner,
        "compile_network",
        lambda net, mode: torch.compile(net, backend=backend, dynamic=False),
    )
    torch._dynamo.reset()
    with pytest.raises(gpdfx.InputError, match=r"no compiler here(.|\n)*without --compile"):
        stepper(compile="default", plain=True)(X, Y, 0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_a_run_with_the_real_compiler(tmp_path: Path, mode: str) -> None:
    """Without dropout, whose draws are the compiler's own."""
    torch._dynamo.reset()
    changes: dict[str, Any] = {"student": "tests.small_networks:Smooth", "branches": "orepa"}
    changes["recipe"] = with_changes(TINY, epochs=1)
    go(tmp_path / "eager", **changes)
    go(tmp_path / "compiled", compile=mode, time_steps=1, **changes)
    one, other = (load_file(tmp_path / name / run.STUDENT) for name in ("eager", "compiled"))
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("extract", ["first", "mean"])
def test_uneven_copies_compile(extract: str) -> None:
    """The indices of first copies are made once, by whoever is first: here without gradients."""
    torch._dynamo.reset()
    x, y = torch.randn(6, 3, 9, 9), torch.tensor([0, 1, 2, 3, 4, 0])
    gpd = make(ratio=1.5, extract=extract, branches=None, static=False).eval()
    with torch.inference_mode():
        expected = gpd(x, y).loss.item()
    for call in (gpd, torch.compile(gpd, fullgraph=True, backend="aot_eager")):
        gpd.zero_grad()
        loss = call(x, y).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected)
        assert gpd.teacher.get_parameter("a.weight").grad is not None


# --------------------------------------------------------------------------- refused
def test_a_graph_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*command(out), "--cuda-graph"]) == 1
    said = capsys.readouterr().err
    assert "--cuda-graph needs a GPU" in said
    assert "--compile works on CPUs" in said
    assert not out.exists()
    several = Ranks(torch.device("cuda"), 0, 2)
    with pytest.raises(gpdfx.InputError, match="one process"):
        runner.check_execution(config(out, cuda_graph=True), several)


def test_modes_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(gpdfx.InputError, match="max-autotune-no-cudagraphs"):
        config(tmp_path, compile="max-autotune", cuda_graph=True)
    with pytest.raises(gpdfx.InputError, match="compile is 'fast'"):
        config(tmp_path, compile="fast")


# --------------------------------------------------------------------------- as a graph
class Replayed:
    """Stands in for a CUDA graph where there is no GPU: a replay computes again, into the tensors
    that the capture left."""

    def __init__(self, one: runner.GraphRunner) -> None:
        self.one, self.replays = one, 0

    def replay(self) -> None:
        one, self.replays = self.one, self.replays + 1
        one.net.zero_grad()
        result = runner.Runner.__call__(one, one.x, one.y)
        runner.Runner.backward(one, result)
        with torch.no_grad():
            one.result.loss.copy_(result.loss)
            for name, term in result.terms.items():
                one.result.terms[name].copy_(term)
            for p, grad in one.grads:
                assert p.grad is not None
                grad.copy_(p.grad)
        one.net.zero_grad()


@contextlib.contextmanager
def no_gpu(monkeypatch: pytest.MonkeyPatch, one: runner.GraphRunner) -> Iterator[None]:
    """A capture runs what it records, which a GPU does not: buffers are put back."""

    class Stream:
        def __init__(self, device: Any = None) -> None:
            pass

        def wait_stream(self, other: Any) -> None:
            pass

    @contextlib.contextmanager
    def graph(graph: Any, **_: Any) -> Any:
        buffers = SavedBuffers(one.net)
        with torch.random.fork_rng([]):
            yield
        buffers.restore()

    def on(given: dict[str, Any]) -> dict[str, bool]:
        return {"enabled": given.get("enabled", True)}

    fork = torch.random.fork_rng
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "Stream", Stream)
        patched.setattr(torch.cuda, "current_stream", Stream)
        patched.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        patched.setattr(torch.cuda, "CUDAGraph", lambda: Replayed(one))
        patched.setattr(torch.cuda, "graph", graph)
        patched.setattr(torch.random, "fork_rng", lambda *_, **given: fork([], **on(given)))
        yield


def test_a_graphs_bookkeeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything about captured steps but the capture: a short batch, one that is not finite, the
    epoch in which the loss changes, statistics and randomness after the warm-up."""
    eager, fast = stepper(start_epoch=1), stepper(start_epoch=1)
    captured = runner.GraphRunner(fast.net, fast.config, fast.ranks, fast.scaler)
    fast.run = captured
    graphs = []
    with no_gpu(monkeypatch, captured):
        for at in range(8):
            x, y = (X[:3], Y[:3]) if at == 2 else (X + at, Y.roll(at))
            x = x / 0 if at == 3 else x
            for one in (eager, fast):
                one.net.epoch = at // 5
            expected, found = eager(x, y, at), fast(x, y, at)
            assert found == pytest.approx(expected)
            graphs.append(captured.graph)
    same_state(eager, fast)
    assert fast.skipped == 1
    assert len(set(map(id, graphs))) == 2  # one more when the soft target counts
    assert [g.replays for g in dict.fromkeys(graphs)] == [4, 3]  # type: ignore[union-attr]


@on_gpu
@pytest.mark.parametrize(
    "changes",
    [{}, {"amp": "bf16"}, {"amp": "fp16"}, {"plain": True}, {"compile": "default"}],
    ids=["gpd", "bf16", "fp16", "plain", "compiled"],
)
def test_captured_steps_are_the_eager_ones(changes: dict[str, Any]) -> None:
    ranks = Ranks(torch.device("cuda", 0))
    torch.backends.cudnn.deterministic = True
    eager = stepper(ranks, **{**changes, "compile": "none"})
    fast = stepper(ranks, cuda_graph=True, **changes)
    x, y = X.cuda(), Y.cuda()
    skipped = 0
    for at in range(8):
        chosen = (x[:3], y[:3]) if at == 4 else (x + at, y.roll(at))
        found = [one(*chosen, at) for one in (eager, fast)]
        skipped += found[0] is None
        assert (found[0] is None) == (found[1] is None)
        exact = not changes or "plain" in changes
        if "compile" not in changes:  # whose dropout draws otherwise
            assert found[0] == pytest.approx(found[1], rel=1e-4 if exact else 3e-2)
    assert skipped <= (4 if changes.get("amp") == "fp16" else 0)  # its scale begins too large
    assert fast.run.graph is not None  # type: ignore[attr-defined]


@on_gpu
@pytest.mark.parametrize("execution", [{"cuda_graph": True}, {"compile": "max-autotune"}])
def test_a_run_on_a_gpu(tmp_path: Path, execution: dict[str, Any]) -> None:
    recipe = with_changes(TINY, epochs=1)
    for name, chosen in (("eager", {}), ("fast", execution)):
        changes = {"device": "cuda", "student": "tests.small_networks:Smooth", "recipe": recipe}
        go(tmp_path / name, **changes, **chosen)
    one, other = (load_file(tmp_path / name / run.STUDENT) for name in ("eager", "fast"))
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], rtol=1e-2, atol=1e-3)


# --------------------------------------------------------------------------- streams
def test_without_a_gpu_nothing_overlaps() -> None:
    """The option is accepted, and changes no number."""
    x, y = torch.randn(6, 3, 9, 9), torch.tensor([0, 1, 2, 3, 4, 0])
    one, other = (make(overlap_static=on).eval()(x, y) for on in (False, True))
    assert torch.equal(one.loss, other.loss)
    order = []
    join = streams.start(lambda: order.append("called"), (x, {}), beside=True)
    order.append("started")
    assert join() is None
    assert order == ["called", "started"]


@on_gpu
def test_a_static_teacher_on_its_own_stream() -> None:
    x, y = torch.randn(6, 3, 9, 9, device="cuda"), torch.tensor([0, 1, 2, 3, 4, 0], device="cuda")
    gpds = [make(overlap_static=on).cuda().eval() for on in (False, True)]
    for _ in range(20):
        found: list[Tensor] = []
        for gpd in gpds:
            gpd.zero_grad()
            out = gpd(x, y)
            out.loss.backward()
            found.append(out.loss.detach())
        torch.testing.assert_close(*found)
        x = F.pad(x, (0, 0, 0, 0)) + 0.1
