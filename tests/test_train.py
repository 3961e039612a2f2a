"""Runs: what they leave, that a killed one ends bit for bit like another, what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import gpdfx
from gpdfx import files, models
from gpdfx.cli.app import main
from gpdfx.cli.commands import field_words
from gpdfx.data.sources import SOURCES
from gpdfx.train import log, networks, run
from gpdfx.train import state as states
from gpdfx.train.config import Compile, TrainConfig, read_config
from gpdfx.train.evaluate import evaluate, export
from gpdfx.train.folder import LOCK, hold
from gpdfx.train.ranks import Ranks
from gpdfx.train.recipes import RECIPES, TrainingRecipe, with_changes
from gpdfx.train.steps.step import Stepper

from . import small_networks
from .runs import TINY, command, config, go, keep_last_checkpoint
from .small_networks import tiny

ROOT = Path(__file__).parent.parent


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def start(argv: list[str], module: str = "gpdfx", **environment: str) -> subprocess.Popen[bytes]:
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module, *argv],
        cwd=ROOT,
        env=os.environ | quiet | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def python(code: str, *argv: str) -> subprocess.Popen[bytes]:
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    argv = (sys.executable, "-W", "ignore", "-c", code, *argv)
    return subprocess.Popen(argv, cwd=ROOT, env=os.environ | quiet, stdout=subprocess.PIPE)


def start_two(argv: list[str]) -> list[subprocess.Popen[bytes]]:
    """Two ranks of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [start(argv, "tests.runs", RANK=str(r), LOCAL_RANK=str(r), **place) for r in range(2)]


def finish(process: subprocess.Popen[bytes]) -> str:
    text = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, text
    return text


# --------------------------------------------------------------------------- what a run leaves
@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a static teacher, mixed batches and timed steps."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = with_changes(TINY, mixup=0.2, cutmix=1.0, label_smoothing=0.1)
    weights = folder / "static.safetensors"
    torch.manual_seed(5)
    save_file(models.cnn().state_dict(), weights)
    static = {"static_teacher": "gpdfx:cnn", "static_weights": str(weights)}
    go(folder / "run", recipe=recipe, time_steps=2, checkpoint_every=3, **static)
    return folder / "run"


def test_a_run_leaves_its_files(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    names = {"state.safetensors", "student.safetensors", "teacher.safetensors", "log.csv"}
    assert names | {"curves.png", "summary.json"} <= {p.name for p in finished.iterdir()}
    assert not list(finished.glob("*.tmp"))
    _, facts = states.read_state(finished / "state.safetensors")
    assert [row["step"] for row in facts["history"]] == [5, 10]
    terms = {"loss_teacher", "loss_student", "loss_gap", "loss_teacher_kd", "loss_student_kd"}
    for row in facts["history"]:
        assert row["gap"] == row["teacher"] - row["student"]
        assert row["loss"] == pytest.approx(sum(row[name] for name in terms), rel=1e-5)
    assert len((finished / "log.csv").read_text().splitlines()) == 3
    student = models.load("tests.small_networks:tiny", classes=10, shape=(1, 8, 8))
    state = load_file(finished / "student.safetensors")
    assert state.keys() == student.state_dict().keys()
    assert summary["parameters"]["student"] == sum(p.numel() for p in student.parameters())
    assert set(summary["test"]) == {"student", "best", "teacher", "gap", "static"}
    assert summary["step_time"]["pairs"] == 2
    assert summary["step_time"]["ratio"] > 0
    assert states.as_json(read_config(summary["config"])) == summary["config"]
    text = log.table(summary)
    assert "dynamic teacher" in text
    assert "static teacher" in text


def test_eval_reproduces_the_summary(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert main(["eval", str(finished), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for part in ("validation", "test"):
        assert found[part] == {k: summary[part][k] for k in ("student", "teacher")}
    assert evaluate(finished, "digits", "cpu") == found


def test_export_is_onnxruntimes(finished: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    done = export(finished, tmp_path / "student.onnx")
    assert done["error"] < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"))
    student = models.load("tests.small_networks:tiny", classes=10, shape=(1, 8, 8))
    models.load_weights(student, finished / "student.safetensors")
    x = torch.randn(7, 1, 8, 8)
    (logits,) = session.run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), student.eval()(x))


def test_a_teacher_is_exported_plain(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "teacher.onnx"
    assert main(["export", str(finished), "--onnx", str(file), "--teacher"]) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    student = models.load("tests.small_networks:tiny", classes=10, shape=(1, 8, 8))
    teacher = gpdfx.load(finished / "teacher.safetensors", student).eval()
    x = torch.randn(7, 1, 8, 8)
    (logits,) = onnxruntime.InferenceSession(str(file)).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), teacher(x), rtol=1e-4, atol=1e-5)
    without = shutil.copytree(finished, tmp_path / "run")
    (without / "teacher.safetensors").unlink()
    with pytest.raises(gpdfx.InputError, match=r"holds no teacher\.safetensors"):
        export(without, file, teacher=True)


def test_a_wrong_export_is_not_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("gpdfx.train.evaluate._difference", lambda *_: float("nan"))
    with pytest.raises(gpdfx.GpdfxError, match="logits differ"):
        export(finished, tmp_path / "student.onnx")
    assert not list(tmp_path.iterdir())


def test_a_finished_run_stays_as_it_is(finished: Path) -> None:
    before = contents(finished)
    summary = json.loads(before["summary.json"])
    assert run.train(read_config(summary["config"]), quiet=True) == summary
    assert contents(finished) == before


# --------------------------------------------------------------------------- the scenarios
@pytest.mark.parametrize(
    "changes",
    [
        {"plain": True},
        {"unshared": ("3.2",), "extract": "mean", "shares": "uniform", "branches": None},
        {"amp": "bf16"},
        {"amp": "fp16"},
        {"data": "mnist1d", "student": "", "branches": {"*": None, "0.weight": "orepa"}},
    ],
    ids=["plain", "unshared", "bf16", "fp16", "mnist1d"],
)
def test_scenarios(tmp_path: Path, changes: dict[str, Any]) -> None:
    summary = go(tmp_path / "run", **{"recipe": with_changes(TINY, epochs=1)} | changes)
    assert 0 <= summary["test"]["student"] <= 1
    assert ("teacher" in summary["test"]) is not changes.get("plain", False)
    kept = not changes.get("plain")
    assert (tmp_path / "run" / "teacher.safetensors").exists() is kept
    assert summary["skipped"] == 0 or changes.get("amp") == "fp16"
    assert evaluate(tmp_path / "run", device="cpu")["test"]["student"] == summary["test"]["student"]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_fine_tuning_begins_at_the_weights(tmp_path: Path, suffix: str) -> None:
    given = {k: torch.randn_like(v) for k, v in tiny(10, 1).state_dict().items() if v.ndim}
    given |= {"1.num_batches_tracked": torch.tensor(3), "1.running_var": torch.ones(4)}
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": given}, file)
    else:
        save_file(given, file)
    go(tmp_path / "run", weights=str(file), recipe=with_changes(TINY, epochs=1, lr=1e-9))
    state = load_file(tmp_path / "run" / "student.safetensors")
    for name in ("0.weight", "3.2.weight", "3.2.bias"):
        torch.testing.assert_close(state[name], given[name])


def test_networks_fit_the_data() -> None:
    x = torch.randn(2, 1, 32, 32)
    for name in ("timm:vit_tiny_patch16_224", "timm:resnet10t"):
        assert models.load(name, classes=5, shape=(1, 32, 32)).eval()(x).shape == (2, 5)
    colour = x.expand(-1, 3, -1, -1)
    for name in ("torchvision:squeezenet1_1", "tests.small_networks:tiny"):
        shape, images = ((3, 32, 32), colour) if "torch" in name else ((1, 8, 8), x[..., :8, :8])
        assert models.load(name, classes=5, shape=shape).eval()(images).shape == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["digits", "mnist1d"])
def test_the_student_learns(tmp_path: Path, source: str) -> None:
    recipe = with_changes(RECIPES[source], epochs=12)
    summary = run.train(TrainConfig(data=source, out=str(tmp_path / "run"), recipe=recipe))
    assert summary["test"]["student"] > {"digits": 0.95, "mnist1d": 0.6}[source]
    assert summary["test"]["teacher"] > 0.6


# --------------------------------------------------------------------------- stopped and resumed
@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [("sgd", {}), ("adamw", {}), ("adamw", {"plain": True}), ("adamw", {"amp": "fp16"})],
    ids=["sgd", "adamw", "plain", "fp16"],
)
def test_a_stopped_run_ends_bit_for_bit_like_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, changes: dict[str, Any]
) -> None:
    """In float16 the state comes back bit for bit, but what follows is as near as rounding lets
    it be: on a CPU with instructions for it two runs were seen to part."""
    keep_last_checkpoint(monkeypatch)
    changes = changes | {"recipe": with_changes(TINY, optimizer=optimizer, lr=0.01, mixup=0.4)}
    go(tmp_path / "whole", **changes)
    end_step = log.RunLog.end_step
    for stop in (1, 4, 5):  # nothing but the first checkpoint; amid an epoch; at its last step
        count = 0

        def interrupted(self: Any, values: Any, stop: int = stop) -> None:
            nonlocal count
            count += 1
            if count > stop:
                raise KeyboardInterrupt
            end_step(self, values)

        with monkeypatch.context() as patched:
            patched.setattr(log.RunLog, "end_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                go(tmp_path / "parts", checkpoint_every=2, **changes)
        assert_restored(tmp_path / "parts", checkpoint_every=2, **changes)
    go(tmp_path / "parts", checkpoint_every=2, workers=0, patience=7, **changes)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    one, other = (states.read_state(folder / run.STATE) for folder in (whole, parts))
    assert one[0].keys() == other[0].keys()
    if "amp" in changes:
        assert all((x - other[0][k]).double().abs().mean() < 5e-3 for k, x in one[0].items())
        return
    assert (whole / run.STUDENT).read_bytes() == (parts / run.STUDENT).read_bytes()
    assert all(torch.equal(x, other[0][name]) for name, x in one[0].items())
    rows = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in s[1]["history"]]
        for s in (one, other)
    ]
    assert rows[0] == rows[1]


def assert_restored(folder: Path, **changes: Any) -> None:
    """What the next step depends on is what the checkpoint holds, bit for bit."""
    tensors, facts = states.read_state(folder / run.STATE)
    restored, mine = run.Run(
        config(folder, **changes), Ranks(torch.device("cpu")), True
    ).stepper.flatten()
    assert tensors.keys() == restored.keys()
    assert all(torch.equal(x, restored[name]) for name, x in tensors.items())
    assert mine == {name: facts[name] for name in mine}


def kill_and_resume(tmp_path: Path, kills: int, epochs: int) -> None:
    changes = {"recipe": with_changes(TINY, epochs=epochs), "checkpoint_every": 1}
    torch.set_num_threads(1)
    go(tmp_path / "whole", **changes)
    argv = command(tmp_path / "killed", "--epochs", str(epochs), "--checkpoint-every", "1")
    state, dice = tmp_path / "killed" / run.STATE, random.Random(0)
    seen = []
    for _ in range(kills):
        process = start(argv)
        stamp, writes = 0, dice.randint(2, 9)  # of the checkpoint, before it is killed
        while process.poll() is None and writes:
            now = state.stat().st_mtime_ns if state.exists() else 0
            writes -= now != stamp
            stamp = now
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was over before it was killed"
        _, facts = states.read_state(state)
        seen.append(5 * facts["epoch"] + facts["step"])
    assert seen == sorted(set(seen))  # each went on from where the last one was killed
    go(tmp_path / "killed", **changes)
    student = (tmp_path / "killed" / run.STUDENT).read_bytes()
    assert student == (tmp_path / "whole" / run.STUDENT).read_bytes(), f"killed at steps {seen}"


def test_killed_twice(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=2, epochs=8)


@pytest.mark.slow
def test_killed_ten_times(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=10, epochs=40)


# --------------------------------------------------------------------------- one run in a folder
ALONE = Ranks(torch.device("cpu"))
KILLED_WRITING = """
import resource, signal, sys
from gpdfx.cli.app import main
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))
main(sys.argv[1:])
"""
KILLED_WITH_A_CHILD = """
import os, signal, sys, time
from pathlib import Path
from tests.test_train import ALONE, hold
with hold(Path(sys.argv[1]), ALONE):
    if child := os.fork():
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(1)
    time.sleep(300)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="kills itself as Linux does")
def test_killed_in_its_first_checkpoint_it_begins_anew(tmp_path: Path) -> None:
    """Amid the first file that it writes."""
    out = tmp_path / "run"
    (process := python(KILLED_WRITING, *command(out, "--epochs", "1"))).communicate()
    assert process.returncode == -signal.SIGXFSZ
    lock, left, ours = sorted(p.name for p in out.iterdir())
    assert (lock, left[:4], ours[: len(run.STATE)]) == (LOCK, ".tmp", run.STATE)
    for name in (f"{run.STATE}.0123abcd.tmp", f"{run.STUDENT}.00000000.tmp"):  # a moment later
        (out / name).write_text("cut sho")
    go(out, recipe=with_changes(TINY, epochs=1))
    names = {p.name for p in out.iterdir()}
    assert {run.STATE, run.STUDENT, run.TEACHER, run.SUMMARY} < names
    assert not names & {lock, left, ours}
    assert not [n for n in names if n.endswith(".tmp")]


def test_files_of_others_are_not_taken_for_left_overs(begun: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.tmp").write_text("mine")
    with pytest.raises(gpdfx.InputError, match=r"holds no run: notes\.tmp"):
        go(tmp_path)
    assert contents(tmp_path) == {"notes.tmp": b"mine"}
    left = begun / f"{run.STATE}.0123abcd.tmp"
    left.write_text("cut sho")
    with pytest.raises(gpdfx.InputError, match="other settings"):
        go(begun, seed=3)
    assert left.exists()
    left.unlink()


def test_a_folder_is_one_runs_at_a_time(begun: Path, tmp_path: Path) -> None:
    before = contents(begun)
    with hold(begun, ALONE):
        with pytest.raises(gpdfx.InputError, match="another run is training in the folder"):
            go(begun)
        with hold(begun, dataclasses.replace(ALONE, rank=1)):  # another one of the same run
            assert contents(begun) == before | {LOCK: b""}
    assert contents(begun) == before
    with hold(tmp_path / "a" / "b", ALONE):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(gpdfx.InputError, match="cannot be written to"):
        go(tmp_path / "file" / "run")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_nothing_holds_the_folder_of_a_run_that_was_killed(tmp_path: Path) -> None:
    """Not even a loader's process that lives a little longer."""
    process = python(KILLED_WITH_A_CHILD, str(tmp_path))
    child = int(process.communicate()[0])
    try:
        assert process.returncode == -signal.SIGKILL
        with hold(tmp_path, ALONE):
            os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_all_ranks_are_refused(tmp_path: Path) -> None:
    with hold(tmp_path / "run", ALONE):
        two = start_two(command(tmp_path / "run", *SMOOTH))
        said = [p.communicate(timeout=300)[0].decode() for p in two]
    assert [p.returncode for p in two] == [1, 1]
    assert "another run is training" in said[0]
    assert "the first rank cannot have the folder" in said[1]
    assert not any("Traceback" in text for text in said)


# --------------------------------------------------------------------------- refused checkpoints
def test_every_damage_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    tensors = {"a": torch.randn(3), "b.c": torch.tensor(2), "empty": torch.zeros(0, 2)}
    tensors["half"] = torch.randn(2, 2).bfloat16()
    facts = {"epoch": 3, "text": "ä", "number": 0.1}
    states.write_state(file, tensors, facts)
    found, told = states.read_state(file)
    assert told == facts
    assert all(
        torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in tensors.items()
    )
    whole, dice = file.read_bytes(), random.Random(0)
    damaged = [whole[:n] for n in (0, 5, 100, len(whole) - 1)] + [whole + b"\0"]
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << dice.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(gpdfx.InputError, match="checkpoint"):
            states.read_state(file)
        assert file.read_bytes() == content


def test_an_error_leaves_the_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    files.write_text(file, "before")
    with pytest.raises(ZeroDivisionError), files.replacing(file) as fresh:
        fresh.write_text(str(1 / 0))
    with pytest.raises(TypeError):
        states.write_state(file, {}, {"epoch": object()})
    assert contents(tmp_path) == {"file": b"before"}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a bug stopped amid its second epoch."""
    out = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run.Run, "_finish", lambda self: {})
        go(out)
    return out


@pytest.mark.parametrize("kind", ["truncated", "flipped", "foreign", "pickle", "missing"])
def test_a_bad_checkpoint_is_refused(begun: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name, content in contents(begun).items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    state = out / run.STATE
    whole = state.read_bytes()
    if kind == "truncated":
        state.write_bytes(whole[: len(whole) // 2])
    elif kind == "flipped":
        state.write_bytes(whole[:-50] + bytes([whole[-50] ^ 4]) + whole[-49:])
    elif kind == "foreign":
        save_file({"a": torch.ones(2)}, state)
    elif kind == "pickle":
        torch.save({"a": torch.ones(2)}, state)
    else:
        state.unlink()
    before = contents(out)
    word = "holds no run" if kind == "missing" else "state.safetensors"
    with pytest.raises(gpdfx.InputError, match=word):
        go(out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": with_changes(TINY, lr=0.07)}, "config.recipe.lr was 0.05 and is now 0.07"),
        ({"seed": 3}, "config.seed was 0 and is now 3"),
        ({"branches": None}, "config.branches was 'auto' and is now None"),
        ({"labels": 14}, "config.labels was 13 and is now 14"),
        ({"student": "gpdfx:cnn"}, "config.student"),
    ],
)
def test_other_settings_are_refused(begun: Path, changes: dict[str, Any], words: str) -> None:
    before = contents(begun)
    with pytest.raises(gpdfx.InputError) as caught:
        go(begun, **changes)
    assert words in str(caught.value)
    assert contents(begun) == before


def test_another_network_under_the_same_name_is_refused(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(begun)
    monkeypatch.setattr(small_networks, "tiny", models.cnn)
    with pytest.raises(gpdfx.InputError, match=r"teacher\.0\.weight is float32 \(32, 1, 3, 3\)"):
        go(begun)
    assert contents(begun) == before


# --------------------------------------------------------------------------- losses that are not
def stepper(tmp_path: Path, **changes: Any) -> Stepper:
    torch.manual_seed(0)
    chosen = config(tmp_path / "none", **changes)
    net = networks.make_net(chosen, tiny(10, 1), None, torch.randn(2, 1, 8, 8), verify=False)
    return Stepper(net.train(), chosen, Ranks(torch.device("cpu")), 5)


@pytest.mark.parametrize("what", ["input", "gradient"])
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_step_changes_nothing(tmp_path: Path, what: str, first: bool) -> None:
    step = stepper(tmp_path, patience=3)
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    if not first:
        assert step(x, y, 0) is not None
    before = {name: t.clone() for name, t in states.flatten_module(step.net).items()}
    if what == "input":
        bad = x.clone()
        bad[3] = torch.inf
    else:
        bad = x
        step.net.criterion = lambda logits, y: (0 * logits).sqrt().sum()
    assert step(bad, y, 1) is None
    assert step(bad, y, 2) is None
    assert (step.skipped, step.in_row) == (2, 2)
    after = states.flatten_module(step.net)
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    step.net.criterion = F.cross_entropy
    assert step(x, y, 3) is not None
    assert (step.skipped, step.in_row) == (2, 0)
    assert not torch.equal(
        before["model.teacher.1.running_mean"], after["model.teacher.1.running_mean"]
    )
    step.net.criterion = lambda logits, y: F.cross_entropy(logits, y) * torch.nan
    assert step(x, y, 4) is step(x, y, 5) is None
    with pytest.raises(gpdfx.errors.TrainingError, match="3 steps in a row"):
        step(x, y, 6)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def poisoned(recipe: TrainingRecipe) -> Any:
        calls = iter(range(10**6))  # three of a step: teacher, student, and what it counts
        return lambda out, y: F.cross_entropy(out, y) * (torch.nan if next(calls) > 21 else 1)

    monkeypatch.setattr(networks, "make_criterion", poisoned)
    out = tmp_path / "run"
    assert main(command(out, "--patience", "3", "--checkpoint-every", "1")) == 1
    error = capsys.readouterr().err
    assert "not finite in 3 steps in a row" in error
    assert "lower learning rate" in error
    tensors, facts = states.read_state(out / run.STATE)
    assert (facts["epoch"], facts["step"], facts["skipped"]) == (1, 4, 2)
    assert all(t.isfinite().all() for t in tensors.values())


# --------------------------------------------------------------------------- several processes
def relative(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    scale = {name: max(float(x.abs().max()), 1e-3) for name, x in one.items()}
    return max(float((x - other[n]).abs().max()) / scale[n] for n, x in one.items())


SMOOTH = [
    *("--student", "tests.small_networks:Smooth", "--labels", "40", "--batch-size", "20"),
    *("--epochs", "1", "--lr", "0.01"),
]


def check_two_against_one(tmp_path: Path) -> None:
    recipe = with_changes(TINY, epochs=1, batch_size=20, lr=0.01)
    student = "tests.small_networks:Smooth"
    with pytest.MonkeyPatch.context() as patch:
        keep_last_checkpoint(patch)
        summary = go(tmp_path / "one", student=student, labels=40, recipe=recipe)
    one, facts = states.read_state(tmp_path / "one" / run.STATE)
    two, others = states.read_state(tmp_path / "two" / run.STATE)
    assert facts["history"][0]["step"] == others["history"][0]["step"] == 20
    parameters = [{k: x for k, x in t.items() if k.startswith("model.")} for t in (one, two)]
    assert relative(*parameters) < 1e-6
    students = [load_file(tmp_path / name / run.STUDENT) for name in ("one", "two")]
    assert relative(*students) < 1e-6
    # Momentum is the sum of the gradients of all steps; names, because idle ones are left out.
    momenta = []
    for tensors, told in ((one, facts), (two, others)):
        groups = told["optimizer"]["param_groups"]
        names = {k: n for g in groups for k, n in zip(g["params"], g["param_names"], strict=True)}
        found = {k.split(".")[1]: x for k, x in tensors.items() if k.startswith("optimizer.")}
        momenta.append({names[int(k)]: x for k, x in found.items()})
    assert relative(*momenta) < 1e-5
    again = json.loads((tmp_path / "two" / run.SUMMARY).read_text())
    assert again["world"] == 2
    assert again["test"] == pytest.approx(summary["test"], abs=0.005)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    two = start_two(command(tmp_path / "two", *SMOOTH))
    assert "all files are in" in finish(two[0])
    assert "all files are in" not in finish(two[1])
    check_two_against_one(tmp_path)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [sys.executable, *torchrun, "-m", "tests.runs", *command(tmp_path / "two", *SMOOTH)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    check_two_against_one(tmp_path)


# --------------------------------------------------------------------------- the command line
STATIC = ("--static-teacher", "gpdfx:cnn")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "digts"], ("no source 'digts'", "did you mean digits")),
        (["--recipe", "vitt"], ("no recipe 'vitt'", "vit")),
        (["--lr", "-1"], ("lr is -1.0", "change these values")),
        (["--student", "gpdfx:cn"], ("no model 'cn'", "did you mean gpdfx:cnn")),
        (["--student", "gpdfx:cnn1d"], ("does not run on inputs (2, 1, 8, 8)", "num_classes")),
        (["--data", "cifar10:x", "--student", ""], ("no student of its own", "timm:resnet18")),
        (["--weights", "nowhere.pt"], ("no file nowhere.pt", "state_dict")),
        (["--weights", "README.md"], ("cannot read weights", "save_file")),
        (["--static-weights", "x"], ("no static teacher", "torchvision:resnet34")),
        (
            ["--static-teacher", "gpdfx:cnn", "--static-random", "--kd", "reviewkd"],
            ("features", "dkd"),
        ),
        (["--patience", "0"], ("patience is 0", "at least 1")),
        (["--unshared", "nothing"], ("matches no parameter", "what to do")),
        (["--out", "gpdfx"], ("not empty and holds no run", "new folder")),
    ],
)
def test_refusals_say_what_to_do(
    tmp_path: Path, argv: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path / "run", *argv)) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_refused(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, begun):
        assert main(["eval", str(folder)]) == 1
        assert "holds no finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["train", "--amp", "fp8"], ["train", "--epochs", "x"], ["eval"], ["export", "run"], []]
)
def test_wrong_commands_exit_with_two(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_every_setting_has_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    fields = (*dataclasses.fields(TrainConfig), *dataclasses.fields(TrainingRecipe))
    for field in fields:
        name = field.name if field.name != "verify" else "no_verify"
        assert f"--{name.replace('_', '-')}" in text
    words = field_words(TrainConfig)
    assert words["data"].startswith(", ".join(SOURCES))
    assert words["compile"].endswith(", ".join(get_args(Compile)[2:]))
    assert words.keys() | {"ratio", "branches", "recipe", "verify"} == {
        field.name for field in dataclasses.fields(TrainConfig)
    }
