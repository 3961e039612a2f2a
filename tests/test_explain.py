"""``explain`` and the command line."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

import gpdfx
from gpdfx.cli.app import main

from .networks import NETWORKS


def teacher(name: str) -> gpdfx.Teacher:
    case = NETWORKS[name]
    return gpdfx.expand(case.model(), 2, example_inputs=case.inputs(), verify=False)


def test_axes_groups_and_reasons() -> None:
    gpt = teacher("gpt")
    rows, columns = gpdfx.explain(gpt, "blocks.0.attention.qkv.weight").dimensions
    assert rows.axis == "72 = 3->6 x 8 + 3->6 x 8 + 3->6 x 8"
    assert columns.axis == "24->48"
    assert "embed.weight" in columns.group
    vocabulary = gpdfx.explain(gpt, "head.weight").dimensions[0]  # by its other name
    assert vocabulary.reason.startswith("lookup")


def test_the_chain_ends_at_the_cause() -> None:
    explanation = gpdfx.explain(teacher("odd"), "bank.weight")
    assert "bridge" in explanation.dimensions[0].reason
    assert "self.bank" in str(explanation)


def test_copies_of_a_teacher_explain_alike() -> None:
    """Leaves are equal only to themselves, wherever a teacher goes."""
    gpt = teacher("gpt")
    for other in (copy.deepcopy(gpt), pickle.loads(pickle.dumps(gpt))):
        for name in ("head.weight", "blocks.0.attention.qkv.weight"):
            assert gpdfx.explain(other, name) == gpdfx.explain(gpt, name)


def test_an_unknown_parameter_suggests_near_ones() -> None:
    with pytest.raises(gpdfx.InputError, match=r"did you mean .*head\.weight"):
        gpdfx.explain(teacher("unet"), "head.weigth")


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["expand", "tests.networks:Norms", "--ratio", "1.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["widened"] == 1.0
    assert max(report["error"].values()) < 1e-7
    assert main(["explain", "tests.networks:Norms", "a.weight"]) == 0
    assert "10->20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["expand", "timm:resnt18"], "did you mean timm:resnet18"),
        (["expand", "resnet18"], "names no library"),
        (["expand", "tests.networks:Nothing"], "cannot find"),
        (["expand", "tests.networks:Norms", "--ratio", "0.5"], "ratio is 0.5"),
    ],
)
def test_refusals_exit_with_one(
    argv: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 1
    assert word in capsys.readouterr().err


def test_a_wrong_command_exits_with_two() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["widen", "x"])
    assert caught.value.code == 2
