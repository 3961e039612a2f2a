"""The picture: layers, by what widens together, in the order of the data flow."""

from __future__ import annotations

import html
from pathlib import Path

from torch import nn

from ...access.find import find_teacher
from ...errors import InputError, check_place
from ...files import write_text
from .draw import svg

PAGE = Path(__file__).with_name("page.html")


def graph(teacher: nn.Module, out: str | Path) -> None:
    """Draw the layers in the order of the data flow, with the widths of student and teacher. Those
    whose output channels widen together have one letter and colour; what stays is dashed; merges
    are small, bridges hexagons. ``out`` ends in ``.svg``, or ``.html`` for a page to search and
    zoom in, which needs nothing beside it.

    Raises ``InputError`` for another ending, or a folder that does not exist.
    """
    found, out = find_teacher("graph", teacher), check_file(out)
    picture = svg(found)
    if out.suffix == ".html":
        report = found.report()
        slots = {"TITLE": html.escape(report.name), "REPORT": html.escape(str(report))}
        text = PAGE.read_text(encoding="utf-8")
        for slot, content in {**slots, "SVG": picture}.items():
            text = text.replace(f"<!--{slot}-->", content)
        picture = text
    write_text(out, picture)


def check_file(out: str | Path) -> Path:
    """Where a picture can be written. Raises ``InputError`` where it cannot."""
    out = check_place(out)
    if out.suffix not in (".svg", ".html"):
        raise InputError(
            f"cannot draw to {out.name}",
            remedy="use a name ending in .svg or .html; browsers and image editors make other "
            "formats of an SVG",
        )
    return out
