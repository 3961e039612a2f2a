"""The accuracy benchmark: its statistics by hand, its CSVs after a kill, and every method once."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from benchmarks import accuracy_summary as stats
from benchmarks.accuracy import final, freeze, left, search, steps_of, tables
from benchmarks.accuracy_methods import BY_NAME, METHODS, accuracy, build, train
from benchmarks.accuracy_tasks import TASKS, batches, load, network

TINY = dataclasses.replace(TASKS[2], steps=2)
RATES = {(TINY.name, "plain"): 1e-2, (TINY.name, "wide"): 1e-2}


# --------------------------------------------------------------------------- statistics
def test_t_interval_by_hand():
    e = stats.estimate([1.0, 2.0, 3.0, 6.0])  # mean 3, variance 14 / 3, t(0.975, 3) = 3.182446
    half = 3.182446305 * math.sqrt(14 / 3) / 2
    assert (e.mean, e.count) == (3.0, 4)
    assert e.low == pytest.approx(3 - half, rel=1e-8)
    assert e.high == pytest.approx(3 + half, rel=1e-8)
    # The p value with 2 degrees of freedom has a closed form: 1 - x / sqrt(2 + x^2).
    e = stats.estimate([0.0, 1.0, 2.0])
    assert e.p == pytest.approx(1 - math.sqrt(3) / math.sqrt(2 + 3), rel=1e-12)


def test_interval_of_too_few_or_equal_values():
    assert math.isnan(stats.estimate([5.0]).low)
    assert stats.estimate([2.0, 2.0, 2.0]) == stats.Estimate(2.0, 2.0, 2.0, 3, 0.0)
    assert stats.estimate([0.0, 0.0]).p == 1.0


def test_differences_are_paired_by_seed():
    one, other = {1: 90.0, 2: 80.0, 3: 70.0, 9: 0.0}, {3: 69.0, 2: 78.0, 1: 87.0}
    e = stats.paired(one, other)  # 3, 2, 1: mean 2, s = 1, t(0.975, 2) = 4.302653
    assert (e.mean, e.count) == (2.0, 3)
    assert e.high - 2 == pytest.approx(4.30265273 / math.sqrt(3), rel=1e-8)


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


def test_best_control_is_chosen_on_validation_and_among_controls():
    means = {"plain": 80, "kd": 85, "gpd": 99, "wide": 98}
    rates = [{"task": "a", "method": m, "validation": str(v)} for m, v in means.items()]
    rates.append({"task": "b", "method": "born-again", "validation": "90"})
    assert stats.best_control(rates, "a") == "kd"


# --------------------------------------------------------------------------- files
def test_a_torn_row_is_cut_off_and_measured_again(tmp_path):
    table = tables(tmp_path).final
    row = {"lr": "0.01", "steps": 2, "student": 50.0, "teacher": 60.0, "seconds": 1.0}
    for seed in (1, 2):
        table.append({"task": "t", "method": "m", "seed": seed} | row)
    whole = table.path.read_text()
    for torn in range(whole.rindex("\nt,m,2") + 1, len(whole)):
        table.path.write_text(whole[:torn])
        assert [*table.done()] == [("t", "m", "1")]
        table.append({"task": "t", "method": "m", "seed": 2} | row)
        assert table.path.read_text() == whole


def test_search_and_final_go_on_where_they_stopped(tmp_path):
    methods, out = METHODS[:1], tables(tmp_path)
    search([TINY], methods, [0, 1], out)
    found = out.search.path.read_text()
    best = out.rates.done()[TINY.name, "plain"]
    means = {
        lr: sum(float(r["student"]) for r in out.search.rows() if float(r["lr"]) == lr) / 2
        for lr in TINY.grid
    }
    assert means[float(best["lr"])] == max(means.values()) == float(best["validation"])

    lines = found.splitlines(keepends=True)  # stopped in the middle
    out.search.path.write_text("".join(lines[:4]) + lines[4][:9])
    out.rates.path.unlink()
    search([TINY], methods, [0, 1], out)
    again = [line.rsplit(",", 1)[0] for line in out.search.path.read_text().splitlines()]
    assert again == [line.rsplit(",", 1)[0] for line in found.splitlines()]  # seconds may differ

    final([TINY], methods, [100, 101], out)
    before = out.final.path.read_bytes()
    final([TINY], methods, [100, 101], out)
    assert out.final.path.read_bytes() == before
    assert left([TINY], methods, out)["final"] == 18
    with pytest.raises(SystemExit, match="run search first"):
        final([TINY], METHODS[:2], [100], out)


def test_time_is_measured_once_and_kept(tmp_path):
    out = tables(tmp_path)
    row = {"plain_ms": 1.0, "gpd_ms": 4.4, "ratio": 4.4, "torch": "x", "machine": "y"}
    out.clock.append({"task": TINY.name} | row)
    assert steps_of(TINY, BY_NAME["plain-clock"], out) == round(4.4 * 2)
    assert steps_of(TINY, BY_NAME["plain-x3"], out) == 6


def test_freeze_takes_the_smaller_of_equal_rates_and_tells_edges(tmp_path):
    out = tables(tmp_path)
    for lr, student in zip(TINY.grid, (70.0, 70.0, 60.0, 10.0), strict=True):
        key = {"task": TINY.name, "method": "plain", "lr": f"{lr:g}", "seed": 0}
        figures = {"steps": 2, "student": student, "teacher": math.nan, "seconds": 0.0}
        out.search.append(key | figures)
    freeze(TINY, METHODS[0], 2, [0], out)
    row = out.rates.rows()[0]
    assert (float(row["lr"]), row["edge"]) == (TINY.grid[0], "low")


# --------------------------------------------------------------------------- runs
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_trains(method):
    run = train(TINY, method, 1e-2, 0, 2, RATES)
    student, test = run.student(), load(TINY, 0)["test"]
    width = getattr(method.config, "width", 1)
    start = network(TINY.source, width, 0)
    assert student.state_dict().keys() == start.state_dict().keys()
    after, before = student.state_dict(), start.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert 0 <= accuracy(student, test) <= 100
    assert math.isnan(accuracy(run.teacher, test)) == (method.name not in stats.GPD_ROWS)


def test_methods_of_a_seed_start_alike():
    x, _ = load(TINY, 3)["test"]
    start = network(TINY.source, 1, 3).eval()(x)
    for name in ("plain", "branches", "gpd-apart", "gpd-mean"):
        ours = build(TINY, BY_NAME[name].config, 3).student().eval()(x)
        torch.testing.assert_close(ours, start)
    one, other = (list(batches(load(TINY, 3)["train"], 4, 3)) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))


def test_summary_pairs_and_picture(tmp_path):
    rows, rates = [], []
    for k, method in enumerate(METHODS):
        key = {"task": TINY.name, "method": method.name}
        rates.append(key | {"lr": "0.01", "steps": "2", "validation": str(k), "edge": ""})
        for seed in (100, 101, 102):
            student = str(50 + k + 0.1 * (seed * k % 7))
            teacher = "60" if method.name in stats.GPD_ROWS else "nan"
            rows.append(key | {"seed": str(seed), "student": student, "teacher": teacher})
    text = stats.summary(rows, rates)
    assert "Best control on validation: branches" in text
    assert f"against plain, {len(stats.GPD_ROWS)} comparisons" in text
    stats.write_pairs(rows, rates, tmp_path / "pairs.csv")
    pairs = (tmp_path / "pairs.csv").read_text().splitlines()
    assert len(pairs) == 1 + len(METHODS) * (len(METHODS) - 1) // 2
    stats.draw(rows, rates, tmp_path / "a.svg")
    assert TINY.name in (tmp_path / "a.svg").read_text()
