"""What ``expand`` shows on a terminal while it works."""

from __future__ import annotations

import inspect
import io
import os
import pty
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

import pytest
import torch
from torch import Tensor, nn

import gpdfx
from gpdfx.calls import progress


class Slow(nn.Module):
    """Takes its time wherever it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return self.b(self.a(x).relu())


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
    with progress.shown(after=0.0):
        gpdfx.expand(Slow(), 2, example_inputs=(torch.randn(2, 5),), branches=None)
    lines = terminal.read().split("\r\x1b[K")
    for part in ("capture Slow in train mode", "transform", "verify probe weights in", "report"):
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
