"""What ``expand``, the command line and a run of training say while they work."""

from __future__ import annotations

import inspect
import io
import logging
import os
import pty
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import torch
from torch import Tensor, nn

import gpdfx
from gpdfx.calls import progress
from gpdfx.cli.app import main
from gpdfx.train import log


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stay at whatever is noted until the thread has surely written it, once each."""
    seen = set[str]()
    for name in ("at", "of"):
        note = getattr(progress, name)

        def noted(*args: str, note: Any = note, **what: str) -> None:
            note(*args, **what)
            if (text := str(progress._AT)) not in seen:
                seen.add(text)
                time.sleep(0.05)

        monkeypatch.setattr(progress, name, noted)


class Screen:
    """Reads what comes at the far end of a terminal."""

    def __init__(self, far: int, near: TextIO) -> None:
        self.text, self.far, self.near = "", far, near
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a test, not before: pytest sets streams of its own when one begins."""
        monkeypatch.setattr(sys, "stderr", self.near)
        monkeypatch.setattr(sys, "__stderr__", self.near)

    def _read(self) -> None:
        while not self.text.endswith("!"):
            self.text += os.read(self.far, 4096).decode()

    def read(self) -> str:
        """All that was written, up to now."""
        if self.reader.is_alive():
            self.near.write("!")
            self.near.flush()
            self.reader.join()
        return self.text[:-1]


@pytest.fixture
def terminal() -> Iterator[Screen]:
    """A terminal, to be this process's stderr."""
    far, near = pty.openpty()
    with os.fdopen(near, "w") as stream:
        screen = Screen(far, stream)
        yield screen
        screen.read()
    os.close(far)


def test_a_terminal_shows_stage_and_node(terminal: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal.on(monkeypatch)
    monkeypatch.setattr(progress, "EVERY", 0.001)
    linger(monkeypatch)
    with progress.shown(after=0.0):
        gpdfx.expand(Small(), 2, example_inputs=(torch.randn(2, 5),), branches=None)
    lines = terminal.read().split("\r\x1b[K")
    for part in (
        *("capturing Small in train mode", "widening"),
        *("checking probe weights in", "checking real weights in eval mode, the teacher"),
        *("reporting",),
    ):
        assert any(line.startswith(f"gpdfx: {part}") for line in lines), part
    assert lines[-1] == ""  # nothing stays


def test_what_is_quick_shows_nothing(terminal: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """``expand`` of one layer is quick on any machine, if an hour is."""
    terminal.on(monkeypatch)
    monkeypatch.setattr(inspect.unwrap(progress.shown), "__defaults__", (3600.0,))
    gpdfx.expand(nn.Linear(3, 2), 2)
    assert terminal.read() == ""


@pytest.mark.parametrize("whose", ["a file's", "another's"])
def test_without_a_terminal_nothing_is_written(
    terminal: Screen, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    terminal.on(monkeypatch)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: whose == "another's")
    monkeypatch.setattr(sys, "stderr", stream)
    if whose == "a file's":
        monkeypatch.setattr(sys, "__stderr__", stream)
    with progress.shown(after=0.0):
        time.sleep(0.02)
    assert stream.getvalue() == ""


def test_the_line_goes_where_expand_fails(
    terminal: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.on(monkeypatch)

    def fails() -> None:
        with progress.shown(after=0.0):
            time.sleep(0.05)
            gpdfx.expand(nn.Linear(3, 2), 0.5)

    with pytest.raises(gpdfx.InputError):
        fails()
    assert terminal.read().endswith("\r\x1b[K")


def test_inside_another_one_nothing_is_shown_twice(
    terminal: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.on(monkeypatch)
    monkeypatch.setattr(progress, "EVERY", 3600.0)
    before = threading.active_count()
    with progress.shown(after=0.0), progress.shown(after=0.0):
        assert threading.active_count() == before + 1
    with progress.shown(quiet=True), progress.shown(after=0.0):
        assert threading.active_count() == before


def test_a_line_of_its_own_clears_what_is_shown(
    terminal: Screen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress.say("without a terminal")
    assert capsys.readouterr().err == "without a terminal\n"
    terminal.on(monkeypatch)
    monkeypatch.setattr(progress, "EVERY", 3600.0)
    progress.say("before")
    progress.at("loading")
    with progress.shown(after=0.0):
        while "loading" not in terminal.text:
            time.sleep(0.01)
        progress.say("note: this")
    assert terminal.read().startswith(
        "before\r\n\r\x1b[Kgpdfx: loading (0 s)\r\x1b[Knote: this\r\n"
    )


# --------------------------------------------------------------------------- without a terminal
def test_a_library_logs_every_half_minute_to_those_who_ask(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINES", 0.05)
    progress.at("checking", "weights")
    for level, expected in ((logging.WARNING, 0), (logging.INFO, 2)):
        caplog.set_level(level, "gpdfx")
        with progress.shown():
            end = time.monotonic() + 20 * bool(expected)
            while len(caplog.messages) < expected and time.monotonic() < end:
                time.sleep(0.01)
        assert len(caplog.messages) >= expected
        assert all(text == "checking weights (0 s)" for text in caplog.messages[:2])
    assert caplog.messages


def test_the_command_line_says_what_it_is_at(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["explain", "tests.networks:Norms", "a.weight"]
    assert main(command) == 0
    assert capsys.readouterr().err == ""  # it took no half minute
    monkeypatch.setattr(progress, "LINES", 0.02)
    assert main(command) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("gpdfx: capturing Norms in train mode (") for line in lines)
    assert not logging.getLogger("gpdfx").handlers


def test_a_run_without_a_terminal_says_a_line_within_long_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    shown = log.RunLog(tmp_path, epochs=4, done=2, quiet=False, board=False)
    shown.begin_epoch(4000, 100)
    for _ in range(20):
        clock[0] += 2.0
        shown.end_step({"loss": 2.314})
    shown.close()
    # 20 steps took 40 s; of this epoch 3,885 are left, and another of 4,000
    line = "epoch 3, step 115 of 4,000: loss 2.314, about 4.4 h left"
    assert capsys.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (700, "12 min"), (7200, "2.0 h")]
)
def test_durations_are_rough(seconds: float, text: str) -> None:
    assert log.roughly(seconds) == text
