"""How a run begins: weights for other classes, what is said before the first step; and that the
best student is kept."""

from __future__ import annotations

import json
import os
import stat
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gpdfx
from gpdfx import files, models
from gpdfx.cli.app import main
from gpdfx.train import log, run
from gpdfx.train.config import TrainConfig
from gpdfx.train.evaluate import evaluate, load_run
from gpdfx.train.recipes import RECIPES, with_changes

from .runs import TINY, command, go
from .small_networks import tiny

Sizes = dict[str, tuple[int, ...]]


# --------------------------------------------------------------------------- weights
def written(folder: Path, model: nn.Module, **changes: Any) -> str:
    """A file of weights; ``changes``: entries to replace (``None``: to leave out)."""
    state = {k: v.clone() for k, v in model.state_dict().items()} | changes
    save_file({k: v for k, v in state.items() if v is not None}, folder / "w.safetensors")
    return str(folder / "w.safetensors")


def test_a_head_of_other_classes_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    file, given = written(tmp_path, other := tiny(7, 1)), other.state_dict()
    options = ["--weights", file, "--epochs", "1", "--lr", "1e-9"]
    assert main(command(tmp_path / "run", *options)) == 0
    said = (
        f"3.2.weight {tuple(given['3.2.weight'].shape)}, 3.2.bias (7,) of {file} are left out: "
        "the data has 10 classes"
    )
    assert f"note: {said}\n" in capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / run.SUMMARY).read_text())
    assert said in summary["notes"]
    state = load_file(tmp_path / "run" / run.STUDENT)
    fresh = models.load("tests.small_networks:tiny", classes=10, shape=(1, 8, 8)).state_dict()
    torch.testing.assert_close(state["0.weight"], given["0.weight"])
    for name in ("3.2.weight", "3.2.bias"):
        torch.testing.assert_close(state[name], fresh[name])


@pytest.mark.parametrize(
    ("name", "shape", "left"),
    [
        ("timm:resnet10t", (3, 64, 64), {"fc.weight", "fc.bias"}),
        ("torchvision:squeezenet1_1", (3, 64, 64), {"classifier.1.weight", "classifier.1.bias"}),
        ("torchvision:vit_b_16", (3, 224, 224), {"heads.head.weight", "heads.head.bias"}),
        ("gpdfx:cnn1d", (1, 40), {"11.weight", "11.bias"}),
    ],
)
def test_the_classifier_is_found(
    tmp_path: Path, name: str, shape: tuple[int, ...], left: set[str]
) -> None:
    load = partial(models.load, name, shape=shape)
    file, model = written(tmp_path, given := load(classes=12)), load(classes=5, seed=1)
    assert models.load_weights(model, file, partial(load, classes=6)).keys() == left
    assert all(
        torch.equal(x, given.state_dict()[k])
        for k, x in model.state_dict().items()
        if k not in left
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"3.2.bias": None}, "missing: 3.2.bias"),
        ({"stem.weight": torch.ones(2)}, "unknown: stem.weight"),
        ({"0.weight": torch.ones(4, 3, 3, 3)}, "of another size: 0.weight (4, 3, 3, 3), not"),
        ({"3.2.weight": torch.ones(7, 99)}, "of another size: 3.2.weight (7, 99), not"),
        ({f"more.{i}": torch.ones(2) for i in range(9)}, "more.0, more.1, more.2 and 6 more"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = written(tmp_path, tiny(7, 1), **changes)
    with pytest.raises(gpdfx.InputError) as caught:
        models.load_weights(tiny(10, 1), file, partial(tiny, 11, 1))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_a_static_teacher_has_the_classes_of_the_data(tmp_path: Path) -> None:
    file = written(tmp_path, models.cnn(7))
    with pytest.raises(gpdfx.InputError, match=r"of another size: 11\.weight \(7, 32\), not"):
        go(tmp_path / "run", static_teacher="gpdfx:cnn", static_weights=file)


@pytest.mark.parametrize("prefix", models.WRAPPERS)
def test_a_wrappers_prefix_is_taken_off(tmp_path: Path, prefix: str) -> None:
    given = {prefix + k: v for k, v in tiny(10, 1).state_dict().items()}
    save_file(given, tmp_path / "w.safetensors")
    model = tiny(10, 1)
    assert models.load_weights(model, tmp_path / "w.safetensors") == {}
    assert torch.equal(model.state_dict()["0.weight"], given[f"{prefix}0.weight"])


# --------------------------------------------------------------------------- notes
def test_what_is_said_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--labels", "2", "--epochs", "1", "--static-teacher", "gpdfx:cnn", "--static-random"]
    assert main(command(tmp_path / "run", *argv)) == 0
    error = capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / run.SUMMARY).read_text())
    assert summary["notes"] == [
        "an epoch is one step: there are 20 training samples for a batch of 26",
        "the static teacher has no weights: it is as gpdfx:cnn builds it, untrained unless that "
        "loads some",
    ]
    first = error.splitlines()
    assert [f"note: {note}" for note in summary["notes"]] == first[:2]
    assert summary["config"]["recipe"]["kd"] == "dkd"
    assert main(command(tmp_path / "other", "--quiet", "--labels", "2", "--epochs", "1")) == 0
    assert capsys.readouterr().err == ""
    summary = json.loads((tmp_path / "other" / run.SUMMARY).read_text())
    assert len(summary["notes"]) == 1
    assert summary["config"]["recipe"]["kd"] == "none"


def test_a_test_set_that_is_the_validation_set(tmp_path: Path) -> None:
    from PIL import Image

    for k, name in enumerate(("train/a/0", "train/b/0", "val/a/0", "val/b/0")):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (9, 9), (50 * k, 9, 9)).save(tmp_path / f"{name}.png")
    source = f"imagefolder:{tmp_path}"
    recipe = with_changes(RECIPES["resnet18"], batch_size=1)
    config = TrainConfig("gpdfx:cnn", data=source, size=8, recipe=recipe)
    data = config.open_data()
    text = f"{source} has no test set: test accuracies are those of the validation set"
    assert run.notes_on(config, data) == [text]
    for k, name in enumerate(("a", "a", "b")):
        (tmp_path / "test" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "test" / name / f"{k}.png")
        if k == 1:
            with pytest.raises(gpdfx.InputError, match="train and test have different classes: "):
                config.open_data()
    data = config.open_data()
    assert (len(data.validation), len(data.test)) == (2, 3)
    assert run.notes_on(config, data) == []


# --------------------------------------------------------------------------- the best student
def stopped_in_epoch_two(patched: pytest.MonkeyPatch, place: Any, method: str) -> None:
    do = getattr(place, method)

    def stopped(self: Any, *more: Any) -> None:
        if (more[0]["epoch"] if more else self.progress.epoch) == 2:
            raise KeyboardInterrupt
        do(self, *more)

    patched.setattr(place, method, stopped)


def test_the_best_student_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the run stops after that epoch, and where it is killed between the checkpoint and
    the file."""
    measure, folders = run.measure, {name: tmp_path / name for name in ("whole", "log", "file")}

    def told(net: Any, split: Any, *more: Any) -> dict[str, float]:
        of_test = len(split) == 300
        return measure(net, split, *more) | (
            {} if of_test else {"student": (0.1, 0.7, 0.4, 0.7)[net.epoch]}
        )

    monkeypatch.setattr(run, "measure", told)
    recipe = with_changes(TINY, epochs=4)
    for name, place in {"log": (log.RunLog, "end_epoch"), "file": (run.Run, "_keep_best")}.items():
        with monkeypatch.context() as patched:
            stopped_in_epoch_two(patched, *place)
            with pytest.raises(KeyboardInterrupt):
                go(folders[name], recipe=recipe)
    summary, *_ = [go(folder, recipe=recipe) for folder in folders.values()]
    assert (summary["best_epoch"], summary["validation"]["best"]) == (2, 0.7)
    last, best = ([(f / n).read_bytes() for f in folders.values()] for n in (run.STUDENT, run.BEST))
    assert len({*last}) == len({*best}) == 1
    assert last != best
    text, accuracy = log.table(summary), summary["test"]["best"]
    assert f"epoch 2 ({run.BEST})" in text
    assert f"{accuracy:.2%}" in text
    assert main(["eval", str(folders["whole"]), "--best", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == {"best": accuracy}
    state = load_run(folders["whole"], best=True)[2].state_dict()
    assert all(torch.equal(x, state[k]) for k, x in load_file(folders["file"] / run.BEST).items())


def test_a_best_student_that_is_gone_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"plain": True, "recipe": with_changes(TINY, epochs=1)}
    test = go(tmp_path / "one", **changes)["test"]
    assert test["best"] == test["student"]  # there is one epoch
    monkeypatch.setattr(run.Run, "_keep_best", lambda self: None)
    assert "best" not in go(tmp_path / "run", **changes)["test"]
    with pytest.raises(gpdfx.InputError, match=r"no file .*student_best\.safetensors"):
        evaluate(tmp_path / "run", device="cpu", best=True)


# --------------------------------------------------------------------------- permissions
@pytest.mark.skipif(os.name == "nt", reason="other permissions")
def test_files_have_the_users_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        go(tmp_path / "run", recipe=with_changes(TINY, epochs=1))
        files.write_text(tmp_path / "text", "x")
    finally:
        os.umask(before)
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "run").iterdir()}
    modes = {name: mode for name, mode in found.items() if "." in name}
    assert {run.STATE, run.STUDENT, run.BEST, "log.csv", "curves.png"} <= modes.keys()
    assert {*modes.values()} == {0o640}
    assert stat.S_IMODE((tmp_path / "text").stat().st_mode) == 0o640


# --------------------------------------------------------------------------- a damaged run
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no summary of a run: Expecting"),
        ("[]", "it has no title, parameters"),
        ("{}", "it has no title, parameters"),
    ],
)
def test_a_damaged_summary(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a finished run, which ends once more by telling it."""
    argv = command(tmp_path / "run", "--plain", "--epochs", "1", "--quiet")
    assert main(argv) == main([*argv, "--json"]) == 0
    table, _, again = capsys.readouterr().out.partition("{")
    assert json.loads("{" + again)["best_epoch"] == 1
    assert "best student" in table
    (tmp_path / "run" / run.SUMMARY).write_text(text)
    assert main(argv) == 1
    assert words in capsys.readouterr().err


def test_a_network_may_be_named_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_mine").mkdir()
    code = "from torch import nn\n\ndef net(num_classes): return nn.Linear(4, num_classes)\n"
    (tmp_path / "nets_of_mine" / "flat.py").write_text(code)
    for name in ("nets_of_mine/flat.py:net", "nets_of_mine.flat:net"):
        found = models.load(name, classes=7)
        assert isinstance(found, torch.nn.Linear)
        assert found.out_features == 7
    with pytest.raises(gpdfx.InputError, match=r"cannot find nets_of_mine\.other:net"):
        models.load("nets_of_mine/other.py:net")
