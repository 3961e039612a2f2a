"""The command for a GPU that is lent for minutes, rehearsed without one."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

import gpdfx
from benchmarks import gpu, gpu_goals, gpu_kernels
from benchmarks.speed_steps import Setting
from benchmarks.tables import read

ON_CPU = ("--device", "cpu", "--out")
WORKER = ("work", "--worker", "0", "--of", "1", *ON_CPU)


def test_a_rehearsal_writes_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--seconds", "300", *ON_CPU, str(tmp_path)])
    kernels, speed, goals, jobs = (
        read(tmp_path / name) for name in ("gpu_kernels.csv", "speed.csv", "goals.csv", "jobs.csv")
    )
    assert [(r["form"], r["type"]) for r in kernels] == gpu_kernels.forms()
    assert all(row["ok"] == "True" and float(row["ratio"]) <= 1.5 for row in kernels)
    ended = [row for row in jobs if row["state"] != "begun"]
    assert {row["state"] for row in ended} == {"done"}
    given = gpu.parse([*ON_CPU, str(tmp_path)])
    wanted = [job.name for phase in gpu.PHASES for job in gpu.jobs_of(phase, given)]
    assert [row["job"] for row in ended] == wanted
    each = [(r["what"], r["branches"], r["batch"]) for r in speed if not r["error"]]
    assert each[0] == ("plain wide", "", "3")
    steps = [one[1:] for one in each if one[0] in ("GPD step", "plain wide")]
    assert steps == [*[("", "3")] * 2, ("auto", "3"), ("acnet", "3"), *[("", "2")] * 2]
    found = {row["goal"]: row["reached"] for row in goals}
    assert found["teacher step / plain wide"] in ("yes", "no")
    assert found["reference step / GPD step, eager"] == "not measured in time"
    assert (tmp_path / "machine.txt").read_text().startswith("torch: ")
    assert (tmp_path / "left.txt").read_text() == ""
    told = capsys.readouterr().out
    assert (
        "| launches of a fold's direction beside products | <= 3 |  | not measured in time |"
        in told
    )
    assert "0 failed" in told


def test_what_does_not_fit_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.time()
    gpu.main(["--seconds", "1", *ON_CPU, str(tmp_path)])
    assert time.time() - start < 30
    left = (tmp_path / "left.txt").read_text().splitlines()
    assert left[0] == "kernels none/float32"
    assert "gpdfx:cnn eager 3 auto" in left
    assert f"{len(left)} not done in 1 s" in capsys.readouterr().out
    assert {row["reached"] for row in read(tmp_path / "goals.csv")} == {"not measured in time"}
    # a worker that has time for another kind
    until = str(time.time() + 2)
    gpu.main([*WORKER, str(tmp_path), "--phase", "steps", "--until", until])
    assert not read(tmp_path / "jobs.csv")


def test_what_fails_ends_its_process_and_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Setting, branches: object) -> gpdfx.GPD:
        if branches == "auto":
            raise RuntimeError("an illegal memory access")
        return gpd(self, branches)

    gpd = Setting.gpd
    monkeypatch.setattr(Setting, "gpd", fails)
    jobs = (gpu.SMALL, "eager", ("plain", "auto", "none"))
    monkeypatch.setitem(gpu.STEPS, "cpu", (jobs,))
    gpu.main(["--seconds", "0", *ON_CPU, str(tmp_path)])
    command = [*WORKER, str(tmp_path), "--phase", "steps", "--until", str(time.time() + 300)]
    with pytest.raises(SystemExit, match="3 auto failed: RuntimeError: an illegal memory access"):
        gpu.main(command)
    gpu.main(command)
    ended = [r["state"] for r in read(tmp_path / "jobs.csv") if r["state"] != "begun"]
    assert ended == ["done", "failed", "done"]
    errors = [(r["what"], r["error"]) for r in read(tmp_path / "speed.csv") if r["error"]]
    assert errors == [("branched auto eager", "RuntimeError: an illegal memory access")]


@pytest.mark.parametrize("end", ["hang", "crash"])
def test_a_worker_that_hangs_or_crashes_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A stand-in: in its first life it begins a job and hangs, or dies."""
    ends = {"hang": "time.sleep(99)", "crash": "os.abort()"}
    path = tmp_path / "jobs.csv"
    script = f"""import os, time
file = open({str(path)!r}, "a+")
if file.tell() < 99:
    file.write(f"one,kernels,0,begun,{{time.time()}},0.5,,\\n")
    file.flush()
    {ends[end]}
file.write(f"two,kernels,0,done,{{time.time()}},,1,\\n")
"""
    monkeypatch.setattr(gpu, "WORK", (sys.executable, "-c", script))
    given = gpu.parse([*ON_CPU, str(tmp_path)])
    gpu.journal(tmp_path).write([])
    gpu.look_after(given, "kernels", time.time() + 30, 1, 0)
    rows = read(path)
    assert [(r["job"], r["state"]) for r in rows] == [
        *(("one", "begun"), ("one", "failed"), ("two", "done"))
    ]
    assert rows[1]["error"] == ("took too long" if end == "hang" else "ended: -6")
    goals = gpu_goals.goals([], [], rows)
    assert (goals[0]["reached"], goals[0]["of"]) == ("no", "0 of 1 forms and types")


def test_goals_take_the_first_network_and_the_better_way() -> None:
    shared = {"network": "a", "size": "1", "batch": "1", "error": "", "branches": "auto"}
    rows = [
        {"what": what, "against": against, "way": way, "median": median} | shared | more
        for what, against, way, median, more in (
            ("teacher step", "plain wide", "eager", "1.3", {}),
            ("teacher step", "plain wide", "graph", "1.05", {}),
            ("teacher step", "plain wide", "graph", "1.01", {"network": "b"}),
            ("reference step", "GPD step", "eager", "2.5", {}),
            ("reference step", "GPD step", "eager", "1.6", {"branches": "its own"}),
            (
                "fold forward",
                "copy of its bytes",
                "eager",
                "0.5",
                {"launches": "7", "products": "4"},
            ),
            ("fold forward + backward", "", "eager", "0.5", {"launches": "20", "products": "12"}),
        )
    ]
    found = {row["goal"]: row for row in gpu_goals.goals(rows, [], [])}
    assert found["teacher step / plain wide"]["of"] == "auto, graph"
    assert found["teacher step / plain wide"]["reached"] == "yes"
    assert found["reference step / GPD step, eager"]["value"] == "1.6"
    assert found["reference step / GPD step, eager"]["reached"] == "no"
    assert found["launches of a fold's direction beside products"]["value"] == "5"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "--device cpu rehearses" in capsys.readouterr().err
