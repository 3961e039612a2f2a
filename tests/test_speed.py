"""The speed benchmark on a network that trains in a moment: rows, counts, files, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

import gpdfx
from benchmarks import speed, timing
from benchmarks.peer import load_peer
from benchmarks.speed_steps import Setting, Task, make_step, plain_wide
from benchmarks.tables import Table, read
from gpdfx.kernels.fold import reference
from gpdfx.passes.folded import teachers

SMALL = ["--device", "cpu", "--network", "gpdfx:cnn", "--channels", "1", "--size", "12"]
SMALL += ["--batch", "3", "--pairs", "2"]
SETTING = Setting("gpdfx:cnn", "cpu", size=12, batch=3, ratio=2.0, dtype="fp32", channels=1)


def test_rows_files_and_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "INPUTS", 1)  # or zeros are multiplied, and counted
    out, readme = tmp_path / "speed_cpu.csv", tmp_path / "README.md"
    readme.write_text("before\n<!-- speed -->\nstale\n<!-- end of speed -->\nafter\n")
    argv = [*SMALL, "--out", str(out)]
    speed.main([*argv, "--branches", "none", "orepa"])
    speed.main([*argv, "--only", "noise"])  # replaces the first row
    rows = read(out)
    assert rows[0]["what"] == rows[0]["against"] == "plain wide"
    found = {(r["what"], r["against"], r["branches"]): r for r in rows}
    assert len(found) == len(rows) == 8
    for row in rows:
        assert not row["error"]
        assert 0 < float(row["low"]) <= float(row["median"]) <= float(row["high"])
        assert row["torch"] == torch.__version__
        assert int(row["ops"]) > 0
    assert float(found["plain wide", "plain wide", ""]["macs"]) == 1
    none, orepa = (found["teacher step", "plain wide", name] for name in ("none", "orepa"))
    assert none["macs"] == "1.000"
    fold = found["fold forward", "copy of its bytes", "orepa"]
    both = found["fold forward + backward", "copy of its bytes", "orepa"]
    # The backward folds nothing again and takes two products for each of the forward, and the
    # scale of the origin one multiply-add an element.
    assert float(both["macs"]) == pytest.approx(3 * float(fold["macs"]), rel=0.05)
    assert float(orepa["macs"]) == pytest.approx(1 + float(both["macs"]), abs=2e-3)
    assert out.with_suffix(".svg").read_text().startswith("<?xml")
    speed.main(["summary", "--out", str(out), "--into", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n<!-- speed -->\ngpdfx:cnn x2, 12 px, batch 3, fp32;")
    assert text.endswith("<!-- end of speed -->\nafter\n")
    assert text.count("| teacher step / plain wide |") == 2
    assert "stale" not in text


def test_what_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Setting, branches: object) -> gpdfx.GPD:
        if branches == "orepa":
            raise RuntimeError("no room\nfor it")
        return gpd(self, branches)

    gpd = Setting.gpd
    monkeypatch.setattr(Setting, "gpd", fails)
    out = tmp_path / "speed_cpu.csv"
    speed.main([*SMALL, "--out", str(out), "--only", "teacher", "--branches", "orepa", "none"])
    failed, fine = read(out)
    assert failed["what"] == "branched orepa eager"
    assert failed["error"] == "RuntimeError: no room for it"
    assert fine["median"]


def test_the_plain_wide_network_is_the_teachers_without_gpdfx() -> None:
    student = torchvision.models.resnet18(num_classes=10)
    example = (torch.randn(2, 3, 32, 32),)
    teacher = gpdfx.expand(student, 2, example_inputs=example, branches=None, verify=False)
    wide = plain_wide(student, teacher)
    assert type(wide) is type(student)
    assert wide.get_parameter("layer4.1.conv2.weight").shape == (1024, 1024, 3, 3)
    assert wide(example[0]).shape == (2, 10)
    with pytest.raises(SystemExit, match="GroupNorm"):
        plain_wide(nn.Sequential(nn.GroupNorm(2, 4)), gpdfx.expand(nn.Sequential(nn.Linear(4, 4))))


def test_the_plain_wide_transformer_computes_as_the_teacher_does() -> None:
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 1}
    student = timm.models.VisionTransformer(**options, num_classes=3).eval()
    example = (torch.randn(2, 3, 16, 16),)
    teacher = gpdfx.expand(student, 2, example_inputs=example, branches=None, verify=False)
    wide = plain_wide(student, teacher)
    assert wide.get_submodule("blocks.0.attn").num_heads == 4
    own, folded = dict(teacher.named_parameters()), teacher._fold()
    wide.load_state_dict({name: folded.get(teachers(name), p) for name, p in own.items()})
    torch.testing.assert_close(wide(*example), student(*example))


def test_a_step_trains_and_is_counted() -> None:
    net = Task(SETTING.student())
    step = make_step(net, SETTING, "eager")
    before = [p.detach().clone() for p in net.parameters()]
    step.run()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert sum(x.numel() for x in step.state()) == 3 * sum(p.numel() for p in net.parameters())
    a, b = torch.randn(5, 7, requires_grad=True), torch.randn(7, 3)
    counts = timing.counted(lambda: (a.t().t() @ b).sum().backward())
    assert counts.macs == 2 * 5 * 7 * 3
    assert counts.ops < 8


def test_quantiles_and_pairs() -> None:
    calls: list[str] = []
    pairs = timing.paired(lambda: calls.append("a"), lambda: calls.append("b"), 3, steps=2)
    assert "".join(calls) == "ab" + "bbaa" + "aabb" + "bbaa"
    assert len(pairs) == 3
    assert timing.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {
        **{"median": "3.5", "low": "2", "high": "5", "pairs": 6}
    }


def test_a_row_is_written_in_place_of_its_like(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    table = Table(path, ("k", "v"), ("k",))
    for value in (1, 2):
        table.replace([{"k": "x", "v": value, "more": 0}])
        table.replace([{"k": value, "v": value}])
    assert [tuple(row.values()) for row in read(path)] == [("x", "2"), ("1", "1"), ("2", "2")]


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.main(["--device", "cpu", "--compile", "graph"])
    assert "needs a GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no checkout"):
        speed.main([*SMALL, "--peer", str(tmp_path)])
    (tmp_path / "CNN").mkdir()
    (tmp_path / "CNN" / "gpd_utils.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(SystemExit, match="not_installed_anywhere"):
        load_peer(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["CNN", "gpd_utils.py"]


def test_a_checkout_is_called_as_its_loop_does(tmp_path: Path) -> None:
    """A stand-in for a checkout, with the functions that the rows call."""
    folder = tmp_path / "CNN"
    folder.mkdir()
    (folder / "models.py").write_text(
        "from einops import rearrange\nimport torchvision\nresnet18 = torchvision.models.resnet18\n"
    )
    (folder / "orepa_ft.py").write_text(
        "class OREPA: pass\ndef transfer2orepa(model, train_from_scratch): return model\n"
    )
    (folder / "gpd_utils.py").write_text(
        "def gpd_init(model, **options): return model\n"
        "def forward_expanded(model, x): return model(x)\n"
        "def enhance_with_es(model, x, wide, loss, criterion, given, **options):\n"
        "    loss.backward()\n"
        "    return criterion(model(x), *given), None, None\n"
    )
    peer = load_peer(tmp_path)
    setting = Setting("torchvision:resnet18", "cpu", size=32, batch=2, ratio=2.0, dtype="fp32")
    net, layers = peer.build(setting)
    assert layers == []
    make_step(net, setting, "eager", backward=peer.backward).run()
    with pytest.raises(SystemExit, match="ResNets"):
        peer.build(SETTING)
