"""What the user asks for: ratios by module, what to keep, round numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gpdfx
from gpdfx.cli.app import main
from gpdfx.control import make_control

from .networks import NETWORKS
from .random_networks import build, check, networks


class Block(nn.Module):
    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(size), nn.Linear(size, hidden)
        self.down = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A residual stream of 10, hidden sizes 12 and 14, a neck of 9. Not made in the order in which
    it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 10), nn.Linear(9, 4)
        self.neck = nn.Linear(10, 9)
        self.blocks = nn.Sequential(Block(10, 12), Block(10, 14))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.neck(self.blocks(self.stem(x)))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(tokens)).relu())


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def expand(model: nn.Module, ratio: Any = 2, x: Tensor = X, **options: Any) -> gpdfx.Teacher:
    """Expand and check, as a user does."""
    return gpdfx.expand(model, ratio, example_inputs=(x,), dynamic="batch", **options)


def widths(teacher: gpdfx.Teacher) -> dict[str, int]:
    """Parameter -> its number of rows."""
    return {n: p.shape[0] for n, p in teacher.named_parameters()}


def refused(*words: str, ratio: Any = 2, **options: Any) -> None:
    with pytest.raises(gpdfx.InputError) as caught:
        gpdfx.expand(Net(), ratio, example_inputs=(X,), **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert caught.value.remedy


# --------------------------------------------------------------------------- patterns
@pytest.mark.parametrize(
    ("ratios", "name", "ratio"),
    [
        ({"*": 2, "blocks": 3}, "blocks.0.up.weight", 3),
        ({"blocks": 3, "*": 2}, "blocks.0.up.weight", 2),  # later entries win
        ({"blocks.*": 3}, "blocks.0.up.weight", 3),
        ({"blocks.[1-9]": 3}, "blocks.0.up.weight", 1),  # nothing covers it
        ({"*.up": 3, "*.0.up.bias": 4}, "blocks.0.up.weight", 3),
        ({"*.up": 3, "*.0.up.bias": 4}, "blocks.0.up.bias", 4),
        ({"*": 2, "blocks.0.u?.weight": 3}, "blocks.0.up.weight", 3),
        ({"*": 2, "*k": 3}, "neck.weight", 3),
        (2.5, "stem.bias", 2.5),
    ],
)
def test_the_last_pattern_that_covers_a_parameter_counts(
    ratios: Any, name: str, ratio: float
) -> None:
    control = make_control(Net(), ratios)
    assert control.ratio_of([name]) == ratio
    assert control.ratio == ratios


def test_a_tied_parameter_goes_by_all_its_names() -> None:
    model, tokens = Tied(), torch.randint(0, 7, (2, 5))
    assert widths(expand(model, {"*": 2, "head": 3}, tokens))["mix.weight"] == 18
    report = expand(model, 2, tokens, keep="head.weight").report()
    assert {f.reason for f in report.fixed if f.parameter == "mix.weight"} == {
        "kept (embed.weight)"
    }


# --------------------------------------------------------------------------- ratios
def test_ratios_by_module() -> None:
    teacher = expand(Net(), {"*": 2, "blocks.1": 1.5, "neck": 3})
    found, report = widths(teacher), teacher.report()
    assert (found["blocks.0.up.weight"], found["blocks.1.up.weight"]) == (24, 21)
    assert (found["neck.weight"], found["head.weight"]) == (27, 4)
    assert (found["stem.weight"], found["blocks.1.down.weight"]) == (20, 20)
    (conflict,) = report.conflicts
    assert (conflict.group.before, conflict.group.after, conflict.taken) == (10, 20, 2)
    assert conflict.asked["stem.weight"] == conflict.asked["blocks.0.down.weight"] == 2
    assert {n for n, r in conflict.asked.items() if r == 1.5} == {
        f"blocks.1.{n}" for n in ("norm.weight", "norm.bias", "down.weight", "down.bias")
    }
    assert "10 -> 20: 2 by stem.weight, blocks.0.down.weight; 1.5 by blocks.1" in str(report)
    assert report.ratio == {"*": 2, "blocks.1": 1.5, "neck": 3}
    assert json.loads(json.dumps(report.to_dict(), default=str))["conflicts"][0]["taken"] == 2


def test_what_no_pattern_covers_has_ratio_one() -> None:
    teacher = expand(Net(), {"neck": 2, "blocks.0": 2})
    report = teacher.report()
    assert {(g.before, g.after) for g in report.groups} == {(9, 18), (12, 24)}
    assert [(c.taken, c.asked["blocks.0.down.weight"]) for c in report.conflicts] == [(1, 2)]
    (up, stream) = gpdfx.explain(teacher, "blocks.1.up.weight").dimensions
    assert (up.reason, stream.reason) == ("ratio 1 (blocks.1.up.weight)", "ratio 1 (stem.weight)")
    assert "self.up(self.norm(x))" in stream.chain[0]
    assert report.widened == 1
    assert "kept" in str(report)


def test_a_head_follows_what_comes_in_and_may_object() -> None:
    """Its rows are the output; all that could widen is what the neck brings."""
    assert not expand(Net(), {"*": 2, "neck": 1.5}, verify=False).report().conflicts
    report = expand(Net(), {"*": 2, "head": 1}, verify=False).report()
    (conflict,) = report.conflicts
    assert conflict.asked == {"neck.weight": 2, "head.weight": 1}
    assert conflict.taken == 2


def test_norms_and_biases_follow_and_may_object() -> None:
    assert not expand(Net(), {"*": 2, "neck.weight": 1.5}, verify=False).report().conflicts
    report = expand(Net(), {"*": 2, "neck.bias": 1.5}, verify=False).report()
    assert [c.asked for c in report.conflicts] == [{"neck.weight": 2, "neck.bias": 1.5}]


def test_behind_a_bridge_an_axis_belongs_to_its_reader() -> None:
    class Bridged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y.masked_scatter(y > 0.5, y))

    teacher = expand(Bridged(), {"a": 2, "b": 3})
    own = [n for n in dict(teacher.named_parameters()) if not n.startswith("_")]
    shapes = {n: tuple(teacher.get_parameter(n).shape) for n in own}
    assert shapes == {"a.weight": (10, 6), "a.bias": (10,), "b.weight": (4, 15), "b.bias": (4,)}
    assert not teacher.report().conflicts


# --------------------------------------------------------------------------- keep
def test_keep() -> None:
    teacher = expand(Net(), 2, keep=["blocks.0.up", "neck.bias"])
    report, found = teacher.report(), widths(teacher)
    kept = {(f.parameter, f.dim): f.reason for f in report.fixed if f.reason.startswith("kept")}
    assert kept["blocks.0.up.weight", 0] == "kept (blocks.0.up.weight)"
    assert kept["blocks.1.up.weight", 1] == "kept (blocks.0.up.weight)"  # the stream stays too
    assert kept["head.weight", 1] == "kept (neck.bias)"
    assert [n for n, width in found.items() if width == 28] == [
        "blocks.1.up.weight",
        "blocks.1.up.bias",
    ]
    assert report.widened == 1
    assert report.to_dict()["keep"] == ("blocks.0.up", "neck.bias")
    stem = gpdfx.explain(teacher, "stem.weight").dimensions[0]
    assert stem.reason == "kept (blocks.0.up.weight)"
    assert "self.up(self.norm(x))" in stem.chain[-1]


def test_keep_explains_products() -> None:
    """72 rows of qkv, a sum of heads x 8: each part stays because it was asked to."""
    case = NETWORKS["gpt"]
    teacher = gpdfx.expand(
        case.model(), keep="blocks.0.attention.qkv.bias", example_inputs=case.inputs(), verify=False
    )
    rows, columns = gpdfx.explain(teacher, "blocks.0.attention.qkv.weight").dimensions
    assert (rows.teacher, columns.teacher) == (72, 48)
    assert rows.reason == "kept (blocks.0.attention.qkv.bias)"
    fixed = [f for f in teacher.report().fixed if f.parameter == "blocks.0.attention.qkv.weight"]
    assert {f.reason for f in fixed} == {rows.reason}


# --------------------------------------------------------------------------- round numbers
def test_round_to() -> None:
    teacher = expand(Net(), 1.5, round_to=8)
    assert {(g.before, g.after) for g in teacher.report().groups} == {
        (10, 16),
        (12, 24),
        (14, 24),
        (9, 16),
    }
    assert not teacher.report().unrounded
    assert ", round to 8" in str(teacher.report())


def test_round_to_in_products_and_where_it_cannot() -> None:
    """Heads of 3 x 5 become 8, so that they make 40 together; 10 + 1 is never a multiple."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(6, 45), nn.Linear(15, 10)
            self.scale, self.out = nn.Parameter(torch.randn(3, 1, 1)), nn.Linear(11, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 3, 5)).permute(2, 0, 3, 1, 4)
            y = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
            y = self.proj(y.transpose(1, 2).flatten(2))
            return self.out(torch.cat([y, x[..., :1]], -1))

    teacher = expand(Heads(), 2, torch.randn(2, 7, 6), round_to=8)
    report = teacher.report()
    assert {(g.before, g.after) for g in report.groups} == {(3, 8), (10, 24)}
    assert report.unrounded == ("out.weight dim 1 (11 -> 25)",)
    assert "no multiple of 8: out.weight" in str(report)
    heads = expand(Heads(), 2, torch.randn(2, 7, 6), round_to=5, verify=False)
    assert heads.report().unrounded == ("scale dim 0 (3 -> 6)", "out.weight dim 1 (11 -> 21)")


# --------------------------------------------------------------------------- any network
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt", {"ratio": {"*": 2, "blocks.0": 1.5, "blocks.1.mlp": 3}, "round_to": 8}),
        ("grouped", {"ratio": 1.5, "keep": "c.bias", "round_to": 4}),
        ("odd", {"ratio": {"*": 1.5, "mix": 2, "bank": 1}, "round_to": 8}),
        ("unet", {"ratio": {"down.1": 2, "up.*": 1.5}, "keep": "merge.1.0"}),
    ],
)
def test_lossless(name: str, options: dict[str, Any]) -> None:
    case = NETWORKS[name]
    options = {"example_inputs": case.inputs(), "dynamic": "batch", **options}
    teacher = gpdfx.expand(case.model(), **options)  # raises if not
    assert teacher.report().groups


def test_random_wishes() -> None:
    """Lossless, and report and explain agree, whatever is asked of whatever network."""

    @seed(0)
    @settings(
        max_examples=6,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(networks(), st.data())
    def run(code: str, data: st.DataObject) -> None:
        layers = [n for n, m in build(code).named_children() if any(True for _ in m.parameters())]
        some = st.sampled_from(layers) if layers else st.nothing()
        by_layer = st.dictionaries(some, st.sampled_from([1, 1.3, 3]), max_size=len(layers))
        wishes = {
            "ratio": {"*": data.draw(st.sampled_from([1.5, 2])), **data.draw(by_layer)},
            "keep": data.draw(st.lists(some, max_size=1)),
            "round_to": data.draw(st.sampled_from([1, 4, 8])),
        }
        note(f"{wishes}\n{code}")
        check(code, shares="random", **wishes)

    run()


# --------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("ratio", [0.5, float("nan"), float("inf"), True, "2", None, {"*": 2}])
def test_a_bad_ratio_names_its_pattern(ratio: Any) -> None:
    refused("ratio['blocks']", repr(ratio), ratio={"*": 2, "blocks": ratio})


def test_patterns_that_match_nothing_suggest_near_names() -> None:
    refused("ratio['block']", "did you mean blocks", ratio={"*": 2, "block": 2})
    refused("keep: 'nek'", "did you mean neck", keep="nek")
    refused("keep: 'blocks.2.*'", "did you mean blocks", keep=["stem", "blocks.2.*"])
    refused("keep: 'blocks.0.act'", keep=["blocks.0.act"])
    refused("no pattern", keep=[1])
    refused("no pattern", ratio={0: 2})
    refused("keep is 1", keep=1)
    refused("ratio is {}", ratio={})


@pytest.mark.parametrize("unit", [0, -8, 1.5, 8.0, True, "8", None])
def test_a_bad_round_to(unit: Any) -> None:
    refused("round_to is", repr(unit), round_to=unit)


# --------------------------------------------------------------------------- command line
def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    model = "tests.test_control:Net"
    asked = ["--ratio", "2", "--ratio", "blocks.1=1.5", "--keep", "neck", "--round-to", "4"]
    assert main(["expand", model, *asked, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ratio"] == {"*": 2, "blocks.1": 1.5}
    assert (report["keep"], report["round_to"]) == (["neck"], 4)
    assert {(g["before"], g["after"]) for g in report["groups"]} == {(12, 24), (14, 24)}
    assert main(["explain", model, "stem.weight", "--keep", "neck", "head"]) == 0
    assert "stays: kept (neck.weight)" in capsys.readouterr().out
    assert main(["expand", model, "--keep", "nek"]) == 1
    assert "did you mean neck" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["expand", model, "--ratio", "neck=wide"])
    assert caught.value.code == 2
    assert "PATTERN=NUMBER" in capsys.readouterr().err
