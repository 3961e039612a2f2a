"""Wrong command lines: one line that says what is wrong, one that says what to do, in the words of
the command line, and the exit code; no traceback."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpdfx.cli import app, mistakes
from gpdfx.cli.app import main
from gpdfx.cli.mistakes import in_options
from gpdfx.errors import InputError, nearest
from gpdfx.train import run
from gpdfx.train import state as states

from .runs import command

ROOT = Path(__file__).parents[1]
MODULE = "tests.test_cli_mistakes"


# --------------------------------------------------------------------------- networks with faults
class Needs(nn.Module):
    def __init__(self, width: int, depth: int, num_classes: int = 10) -> None:
        super().__init__()


def raises() -> nn.Module:
    raise KeyError("width")


def reads() -> nn.Module:
    return torch.load("nowhere.pt")


class Forgets(nn.Module):
    """Uses a layer that it does not have."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x.flatten(1))


class FailsLater(Forgets):
    """In its second epoch."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls > 6:
            raise ZeroDivisionError("seven")
        return self.first(x.flatten(1))


NUMBER = 3


def place(folder: Path) -> None:
    """What the commands below name, in the current folder."""
    from PIL import Image

    (folder / "a_file").write_text("x")
    (folder / "broken.py").write_text("import nothing_of_that_name\n")
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(3)\n")
    for name in ("train/a/0", "train/b/0", "val/a/0", "val/b/0"):
        (folder / "images" / name).parent.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / "images" / f"{name}.png")
        (folder / "broken" / name).parent.mkdir(parents=True)
        (folder / "broken" / f"{name}.png").write_bytes(b"\x89PNG no image")
    (folder / "empty" / "train").mkdir(parents=True)
    (folder / "empty" / "val").mkdir()


# --------------------------------------------------------------------------- the commands
TRAIN = ["train", "--device", "cpu", "--no-verify", "--time-steps", "0"]
IMAGES = [*TRAIN, "--student", "gpdfx:cnn", "--size", "8", "--epochs", "1", "--data"]
CNN = ["expand", "gpdfx:cnn"]
# What is typed -> the exit code, and words that are said.
MISTAKES: list[tuple[list[str], int, str]] = [
    # the command itself
    ([], 2, "required: COMMAND"),
    (["trian"], 2, "did you mean train?"),
    (
        [*TRAIN, "--brnaches", "orepa"],
        2,
        "no option --brnaches\n  what to do: did you mean --br",
    ),
    ([*TRAIN, "--static_teacher", "x"], 2, "did you mean --static-teacher"),
    ([*TRAIN, "digits"], 2, "there is no place for digits"),
    ([*TRAIN, "--epochs", "many"], 2, "argument --epochs: 'many' is no whole number"),
    ([*TRAIN, "--seed", str(2**63)], 2, f"--seed: '{2**63}' is no whole number"),
    ([*TRAIN, "--clip", "nope"], 2, "'nope' is neither a number nor none"),
    ([*TRAIN, "--amp", "bf61"], 2, "did you mean bf16, fp16?"),
    ([*CNN, "--size", "-3"], 2, "'-3' is no whole number of at least 1"),
    ([*CNN, "--ratio", "wide"], 2, "NUMBER nor PATTERN=NUMBER"),
    ([*CNN, "--branches", "orpea"], 2, "none of auto"),
    (["export", "run", "--onnx", "x", "--best", "--teacher"], 2, "not allowed with"),
    # networks
    (["expand", "resnet18"], 1, "names no library\n  what to do: did you mean timm:resnet18"),
    (["expand", "timm:resnet1o"], 1, "did you mean timm:resnet10t, "),
    (["expand", "torchvision:resnet10t"], 1, "did you mean timm:resnet10t, "),
    (["expand", "tmim:resnet18"], 1, "did you mean timm?"),
    (
        ["expand", "nothing_here:Net"],
        1,
        "No module named 'nothing_here'\n  what to do: write pack",
    ),
    (["expand", f"{MODULE}:Need"], 1, "did you mean Needs"),
    (["expand", f"{MODULE}:Needs"], 1, "needs width, depth\n  what to do: write NAME = functools."),
    (["expand", f"{MODULE}:raises"], 1, "KeyError: 'width'\n  at: test_cli_mistakes.py:"),
    (["expand", f"{MODULE}:reads"], 1, "FileNotFoundError: [Errno 2] No such file"),
    (["expand", f"{MODULE}:NUMBER"], 1, "is a int, and cannot be called"),
    (["expand", "os:getcwd"], 1, "gives a str, not a torch.nn.Module"),
    (
        ["expand", "broken:Net"],
        1,
        "No module named 'nothing_of_that_name'\n  at: broken.py:1",
    ),
    (["expand", "syntax:Net"], 1, "syntax cannot be imported: SyntaxError: "),
    (["expand", "exits:Net"], 1, "exits cannot be imported: SystemExit: 3\n  at: exits.py:2"),
    (["expand", f"{MODULE}:Forgets", "--size", "8"], 1, "no attribute 'second'\n"),
    (
        [*TRAIN, "--data", "digits", "--student", f"{MODULE}:Forgets"],
        1,
        "does not run on inputs (2, 1, 8, 8): AttributeError: 'Forgets' object has no attribute "
        "'second'\n  at: test_cli_mistakes.py:",
    ),
    # what expand is asked for
    ([*CNN, "--ratio", "0.5"], 1, "ratio is 0.5"),
    ([*CNN, "--round-to", "0"], 1, "--round-to is 0"),
    ([*CNN, "--keep", "12"], 1, "did you mean"),
    (["explain", "gpdfx:cnn", "0.weigth"], 1, "did you mean 0.weight"),
    (["graph", "gpdfx:cnn", "--out", "nowhere/x.svg"], 1, "no folder nowhere\n"),
    # settings of training
    ([*TRAIN, "--epochs", "-1"], 1, "epochs is -1, not a whole number"),
    ([*TRAIN, "--batch-size", "0"], 1, "--batch-size is 0, not a whole number"),
    ([*TRAIN, "--warmup-epochs", "99"], 1, "--warmup-epochs is 99, more than epochs"),
    ([*TRAIN, "--gap-temperature", "-1"], 1, "temperature is -1"),
    ([*TRAIN, "--labels", "9999"], 1, "pass at most --labels 1"),
    ([*TRAIN, "--recipe", "resnet1b"], 1, "did you mean resnet18"),
    ([*TRAIN, "--data", "cifra10:x"], 1, "did you mean cifar10:PATH"),
    ([*TRAIN, "--data", "imagefolder:x", "--student", "gpdfx:cnn"], 1, "no folder x/train, x/val"),
    (
        [*TRAIN, "--student", "gpdfx:cnn"],
        1,
        "has no data\n  what to do: name it, too: --data i",
    ),
    ([*TRAIN, "--static-teacher", "gpdfx:cnn"], 1, "give --static-weights FILE; --static-random"),
    (
        [*TRAIN, "--kd", "dkd"],
        1,
        "no static teacher\n  what to do: name it: --static-teacher",
    ),
    ([*TRAIN, "--static-weights", "a_file"], 1, "name it: --static-teacher torchvision:resnet34"),
    ([*TRAIN, "--weights", "a_file"], 1, "cannot read weights from a_file: "),
    ([*TRAIN, "--weights", "images"], 1, "there is no file images"),
    ([*TRAIN, "--cuda-graph"], 1, "leave out --cuda-graph"),
    # files and folders
    ([*TRAIN, "--out", "a_file"], 1, "the folder a_file cannot be written to"),
    ([*TRAIN, "--out", "/dev/null/x"], 1, "the folder /dev/null/x cannot be written to"),
    ([*TRAIN, "--out", "images"], 1, "the folder images is not empty and holds no run"),
    (["eval", "nowhere"], 1, "nowhere holds no finished run"),
    (["export", "a_file", "--onnx", "x.onnx"], 1, "a_file holds no finished run"),
    ([*IMAGES, "imagefolder:empty"], 1, "class folder"),
    (
        [*IMAGES, "imagefolder:broken"],
        1,
        "/0.png cannot be read (Unidentified",
    ),
    (
        [*IMAGES, "imagefolder:broken", "--workers", "1"],
        1,
        "/0.png cannot be read (Unidentified",
    ),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of a command that goes wrong: one error and what to do."""
    try:
        code = main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, error = capsys.readouterr()
    assert out == ""
    assert len(re.findall("^gpdfx: ", error, re.MULTILINE)) == 1, error
    assert error.count("\n  what to do: ") == 1, error
    assert "Traceback" not in error
    assert "='" not in error
    return code, error


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("argv", "code", "words"), MISTAKES, ids=[" ".join(argv)[-60:] for argv, *_ in MISTAKES]
)
def test_mistakes(
    argv: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, error = said(argv, capsys)
    assert found == code, error
    assert words in error


def test_near_names() -> None:
    assert nearest("resnet1o", ["resnet18", "resnet101", "resnet10t"])[0] == "resnet10t"
    assert nearest("resnetl8", ["resnet8", "resnet18", "resnet101"])[0] == "resnet18"
    assert nearest("vit_base", ["vit_tiny", "deit_base", "vit_base_p16"])[0] == "vit_base_p16"
    assert nearest("Layer1.Conv", ["layer1.conv", "layer2.conv"])[0] == "layer1.conv"
    assert nearest("", ["a"]) == nearest("qqq", ["resnet18"]) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name it: static_teacher='a:b', or", "name it: --static-teacher a:b, or"),
        ("static_random=True does", "--static-random does"),
        ("pass keep=['a', \"b\"]", "pass --keep a b"),
        ("or keep= for the largest", "or --keep for the largest"),
        ("config.recipe.lr was 0.1", "--lr was 0.1"),
        ("verify=False", "--no-verify"),
        ("branches=None", "--branches none"),
        ("the keep of it is lr", "the keep of it is lr"),
        ("no file my_cuda_graph.pt in cuda_graph/x", "no file my_cuda_graph.pt in cuda_graph/x"),
        ("pass example_inputs=(x,), two", "pass --size NUMBER, two"),
        ("pass example_inputs=(x, y)", "in Python, pass example_inputs=(x, y)"),
        ("lr_is=3\n  at: net.py:3 f(x, keep=True)", "lr_is=3\n  at: net.py:3 f(x, keep=True)"),
        ("ratio={'a': 2}, data='x'", "ratio={'a': 2}, data='x'"),
    ],
)
def test_words(text: str, told: str) -> None:
    known = ["static-teacher", "static-random", "keep", "lr", "no-verify", "branches", "ratio"]
    assert in_options(text, [f"--{k}" for k in (*known, "cuda-graph", "size")]) == told


# --------------------------------------------------------------------------- amid the work
def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), "Permission denied: x/y\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "make room on that disk"),
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "a smaller --size or --ratio"),
        (InputError("no", remedy="pass ratio=2"), "pass --ratio 2"),
    ],
)
def test_what_the_system_refuses(
    error: BaseException,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(app, "expand", failing(error))
    code, text = said(CNN, capsys)
    assert code == 1
    assert words in text


def test_files_that_are_not_ours_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the system refuses them; root may read all."""
    for name in ("w.safetensors", "w.pt", run.STATE):
        (tmp_path / name).write_text("x")
    monkeypatch.setattr("builtins.open", refusing(open, tmp_path))
    monkeypatch.setattr(Path, "open", refusing(Path.open, tmp_path))
    for name in ("w.safetensors", "w.pt"):
        code, text = said([*TRAIN, "--weights", str(tmp_path / name), "--out", "none"], capsys)
        assert (code, f"{name}: PermissionError: no" in text) == (1, True), text
    with pytest.raises(InputError, match=r"state\.safetensors cannot be read: no"):
        states.read_state(tmp_path / run.STATE)


def refusing(opened: Any, folder: Path) -> Any:
    def refuse(path: Any, *more: Any, **named: Any) -> Any:
        if folder in Path(str(path)).parents:
            raise PermissionError("no")
        return opened(path, *more, **named)

    return refuse


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full disk")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Where the checkpoint goes."""

    def full(path: Path, *more: Any) -> None:
        with run.files.replacing(path) as fresh:
            fresh.unlink()
            fresh.symlink_to("/dev/full")
            fresh.write_text("x" * 10**6)

    monkeypatch.setattr(run.files, "write_tensors", full)
    code, text = said(command(tmp_path / "run"), capsys)
    assert code == 1
    assert "state.safetensors cannot be written: No space left on device" in text
    assert "make room" in text


def test_a_network_that_fails_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = command(tmp_path / "run", "--student", f"{MODULE}:FailsLater", "--plain", "--quiet")
    code, text = said(argv, capsys)
    assert code == 1
    assert "your code fails: ZeroDivisionError: seven\n  at: test_cli_mistakes.py:" in text


def test_a_bug_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mistakes.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(app, "ratios", OURS["ratios"])
    code, text = said(CNN, capsys)
    assert code == 1
    assert "this is a bug in gpdfx: ZeroDivisionError: division by zero\n" in text
    (file,) = tmp_path.iterdir()
    assert str(file) in text
    assert "Traceback" in file.read_text()
    monkeypatch.setenv("GPDFX_TRACEBACK", "1")
    assert main(CNN) == 1
    assert "Traceback" in capsys.readouterr().err


OURS: dict[str, Any] = {"__name__": "gpdfx.cli.options"}
exec("def ratios(given): return 1 / 0", OURS)


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, argv, words in (("expand", CNN, "stopped\n"), ("train", TRAIN, "goes on with")):
        place = app if name == "expand" else sys.modules["gpdfx.cli.commands"]
        monkeypatch.setattr(place, name, failing(KeyboardInterrupt()))
        assert main(argv) == 130
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["train", "--help"], ["eval", "--help"]])
def test_a_reader_that_has_enough(argv: list[str]) -> None:
    """As ``| head -1``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpdfx", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0
