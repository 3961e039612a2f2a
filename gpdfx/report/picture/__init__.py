"""The picture: layers, by what widens together, in the order of the data flow."""

from __future__ import annotations

import html
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from ...access.find import find_teacher
from ...errors import InputError, check_place, install
from ...files import replacing, write_text
from .draw import svg

PAGE = Path(__file__).with_name("page.html")


def graph(teacher: nn.Module, out: str | Path) -> None:
    """Draw the layers in the order of the data flow, with the widths of student and teacher. Those
    whose output channels widen together have one letter and colour; what stays is dashed; merges
    are small, bridges hexagons. ``out`` ends in ``.svg``, in ``.html`` for a page to search and
    zoom in, which needs nothing beside it, or in ``.png``.

    Raises ``InputError`` for another ending, or a folder that does not exist.
    """
    found, out = find_teacher("graph", teacher), check_file(out)
    picture = svg(found)
    if out.suffix == ".png":
        with replacing(out) as fresh:
            fresh.write_bytes(_png(picture))
        return
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
    if out.suffix not in (".svg", ".html", ".png"):
        remedy = "use a name ending in .svg, .html or .png"
        raise InputError(f"cannot draw to {out.name}", remedy=remedy)
    missing = [name for name in ("resvg_py", "matplotlib") if find_spec(name) is None]
    if out.suffix == ".png" and missing:
        remedy = f"{install('train')}; or use a name ending in .svg or .html"
        raise InputError(f"a PNG needs {', '.join(missing)}", remedy=remedy)
    return out


def _png(picture: str) -> bytes:
    """With the fonts that come with matplotlib: a machine may have none."""
    import matplotlib
    import resvg_py

    image = resvg_py.svg_to_bytes(
        svg_string=picture,
        zoom=2,
        skip_system_fonts=True,
        font_dirs=[str(Path(matplotlib.get_data_path()) / "fonts" / "ttf")],
        sans_serif_family="DejaVu Sans",
        monospace_family="DejaVu Sans Mono",
    )
    return bytes(image)
