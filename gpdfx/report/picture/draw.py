"""The picture as SVG: text is text, and the ``<title>`` of each node says more of it."""

from __future__ import annotations

import html
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping

from ...teacher.module import Teacher
from ..flow import Step
from .layout import LEVELS, Box, Point, place
from .nodes import CHIP, WORD, Node, read

COLORS = (
    *("#bfdbfe", "#fed7aa", "#bbf7d0", "#fbcfe8", "#fde68a", "#ddd6fe"),
    *("#a5f3fc", "#fecaca", "#d9f99d", "#e9d5ff", "#99f6e4", "#fde2c8"),
)
STYLE = """
text { font: 12px Helvetica, Arial, 'DejaVu Sans', sans-serif; fill: #111827 }
.name, .block { font-family: ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace }
.name { font-weight: bold } .path, .block { font-weight: normal; fill: #4b5563 }
.mid { text-anchor: middle } .head { font-size: 17px; font-weight: bold }
.shape { fill: #fff; stroke: #374151 } .line { fill: none; stroke: #6b7280 }
.frame { fill: #f1f5f9; stroke: #cbd5e1 } .depth1 { fill: #fff }
.block { paint-order: stroke; stroke: #fff; stroke-width: 4px }
.stays .shape { fill: #e5e7eb; stroke-dasharray: 5 3 }
.bridge .shape { fill: #fef08a; stroke-width: 2.5 }
.ghost .shape, .input .shape, .output .shape { stroke: #9ca3af }
.chip { fill: #fff; stroke: #374151 } .letter { font-weight: bold; font-size: 11px }
"""
GHOST = (190.0, 24.0)
MARGIN = 20.0
WIDTHS = "64 → 128: output channels, student → teacher"
GROUPS = 24
"""Groups that the legend names."""
PART = 2 / 3
"""A block that holds more than this of what is around it is not drawn: it says little."""
Nodes = Mapping[str, Node]


def svg(teacher: Teacher) -> str:
    """The whole picture, the same text for the same network."""
    nodes, report = read(teacher), teacher.report()
    sizes = {name: node.size(name) for name, node in nodes.items()}
    layout = place(sizes, list(report.evidence.layers.edges), _blocks(nodes), GHOST)
    modules = dict(teacher._student.named_modules(remove_duplicate=False))
    parts = [_rect(box, 6, f"frame depth{depth}") for _, depth, box in layout.frames]
    parts += [_line(a, b, way) for a, b, way in layout.lines]
    for block, _, box in layout.frames:
        words = f"{block} ({type(modules[block]).__name__})" if block in modules else block
        parts.append(_text(box.x - box.width / 2 + 7, box.y + 14, "block", words))
    parts += [_ghost(name, box) for (_, name), box in layout.ghosts.items()]
    parts += [_node(name, nodes[name], box) for name, box in layout.boxes.items()]
    width = max(layout.size[0], 760.0)
    head = f"{report.name}, {report.control}: widened {report._widened()}"
    legend, top = _legend(nodes, width, textwrap.shorten(head, 90, placeholder=" ..."))
    size = f"{width + 2 * MARGIN:.0f} {layout.size[1] + top + 2 * MARGIN:.0f}".split()
    frame = f'width="{size[0]}" height="{size[1]}" viewBox="0 0 {size[0]} {size[1]}"'
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>',
            f"<style>{STYLE}</style>",
            '<rect width="100%" height="100%" fill="#fff"/>',
            *_moved(MARGIN, MARGIN, legend),
            *_moved(MARGIN, MARGIN + top, parts, "network"),
            "</svg>\n",
        )
    )


def _blocks(nodes: Nodes) -> dict[str, list[str]]:
    """Node -> the modules around it that are drawn, outer ones first."""
    around = {}
    for name, node in nodes.items():
        inside = f"{node.step.module}."  # a tied weight has the name of another module's
        steps = (w if (w := node.step.weight).startswith(inside) else inside).split(".")[:-1]
        around[name] = [".".join(steps[: k + 1]) for k in range(len(steps))]
    count = Counter(path for paths in around.values() for path in paths)
    blocks: dict[str, list[str]] = {}
    for name, paths in around.items():
        outer, blocks[name] = len(nodes), []
        for path in paths:
            if 1 < count[path] <= outer * PART and len(blocks[name]) < LEVELS:
                outer = count[path]
                blocks[name].append(path)
    return blocks


# --------------------------------------------------------------------------- marks
def _node(name: str, node: Node, box: Box) -> str:
    title = "\n".join((name, node.text, *node.more))
    left, mid = box.x - box.width / 2, box.y + box.height / 2
    chips = "".join(
        _chip(left + box.width - CHIP * (k + 0.5) - 3, mid + 9 * (node.kind != "merge"), letter)
        for k, letter in enumerate(reversed(node.letters))
    )
    if node.kind == "merge":
        x = box.x - CHIP * len(node.letters) / 2
        words = _text(x, mid + 4, "mid", node.text)
    elif node.text:
        x = left + (18 if node.kind == "bridge" else 10)
        words = _name(x, box.y + 17, name) + _text(x, box.y + 34, "", node.text)
    else:
        words = _name(left + 10, mid + 4, name)
    fill = _fill(node.letters[0]) if node.letters else ""
    radius = 12 if node.kind in ("merge", "input", "output") else 4
    shape = _hexagon(box) if node.kind == "bridge" else _rect(box, radius, "shape", fill)
    data = f'data-name="{escape(name)}" data-groups="{" ".join(node.letters)}"'
    inside = f"<title>{escape(title)}</title>{shape}{words}{chips}"
    return f'<g class="node {node.kind}" {data}>{inside}</g>'


def _ghost(name: str, box: Box) -> str:
    short = name if len(name) < 20 else "…" + name[-19:]
    words = _text(box.x, box.y + 16, "mid", f"from {short}")
    return f'<g class="ghost"><title>{escape(name)}</title>{_rect(box, 12, "shape")}{words}</g>'


def _name(x: float, y: float, name: str) -> str:
    """A path with its last part in bold."""
    path, dot, last = name.rpartition(".")
    return (
        f'<text class="name" x="{x:.0f}" y="{y:.0f}">'
        f'<tspan class="path">{escape(path + dot)}</tspan>{escape(last)}</text>'
    )


def _text(x: float, y: float, kind: str, text: str) -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}">{escape(text)}</text>'


def _chip(x: float, y: float, letter: str) -> str:
    half = 8.0 + 3 * (len(letter) - 1)
    box = Box(x, y - 8, 2 * half, 16)
    return _rect(box, 8, "chip") + _text(x, y + 4, "letter mid", letter)


def _rect(box: Box, radius: float, kind: str, fill: str = "") -> str:
    return (
        f'<rect class="{kind}"{fill} x="{box.x - box.width / 2:.1f}" y="{box.y:.1f}" '
        f'width="{box.width:.1f}" height="{box.height:.1f}" rx="{radius}"/>'
    )


def _hexagon(box: Box) -> str:
    x0, x1, y0, y1 = box.x - box.width / 2, box.x + box.width / 2, box.y, box.y + box.height
    mid = (y0 + y1) / 2
    points = (x0, mid), (x0 + 10, y0), (x1 - 10, y0), (x1, mid), (x1 - 10, y1), (x0 + 10, y1)
    return f'<path class="shape" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}z"/>'


def _line(a: str, b: str, way: list[Point]) -> str:
    """Down the way, bent between rows; an arrow's head at its end."""
    (x, y), *rest = way
    path = f"M{x:.1f} {y:.1f}"
    for to, down in rest:
        mid = (y + down) / 2
        bend = f"C{x:.1f} {mid:.1f} {to:.1f} {mid:.1f} {to:.1f} {down:.1f}"
        path += f"V{down:.1f}" if to == x else bend
        x, y = to, down
    ends = f'data-from="{escape(a)}" data-to="{escape(b)}"'
    return f'<path class="line" {ends} d="{path}m-3 -6l3 6l3 -6"/>'


def _fill(letter: str) -> str:
    place = 0
    for char in letter:
        place = 26 * place + ord(char) - ord("A") + 1
    return f' style="fill:{COLORS[(place - 1) % len(COLORS)]}"'


def escape(text: str) -> str:
    """For XML, which takes no control characters."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "?", text))


def _moved(x: float, y: float, parts: list[str], kind: str = "legend") -> Iterator[str]:
    yield f'<g class="{kind}" transform="translate({x:.0f} {y:.0f})">'
    yield from parts
    yield "</g>"


# --------------------------------------------------------------------------- legend
SAMPLES = (
    (Step("layer", "", "conv"), (64, 128), "A", "widens together with the others of its letter"),
    (Step("layer", "", "conv"), (64, 128), "", "widens with no other layer"),
    (Step("layer", "", "linear"), (10, 10), "", "stays at the student's width"),
    (Step("merge", "", "+"), None, "", "values meet"),
    (Step("bridge", "", "op"), None, "", "runs at the student's width"),
)


def _legend(nodes: Nodes, width: float, head: str) -> tuple[list[str], float]:
    """What the marks mean that this picture has, and its groups; and how high that is."""
    parts, y = [_text(0, 14, "head", head), _text(0, 38, "", WIDTHS)], 48.0
    seen = {(n.kind, bool(n.letters) and n.kind != "merge") for n in nodes.values()}
    samples = [(Node(step, w, tuple(letter), ()), words) for step, w, letter, words in SAMPLES]
    marks = [_sample(n, words) for n, words in samples if (n.kind, bool(n.letters)) in seen]
    for line in (marks, _groups(nodes)):
        x, high = 0.0, max((h for _, h, _ in line), default=0.0) + 8
        for w, _, mark in line:
            if x and x + w > width:
                x, y = 0.0, y + high
            parts += _moved(x, y + high / 2, [mark])
            x += w
        y += high
    return parts, y + 16


def _sample(node: Node, words: str) -> tuple[float, float, str]:
    """Width, height and mark."""
    name = "" if node.kind == "merge" else "name"
    w, h = node.size(name)
    mark = _node(name, node, Box(w / 2, -h / 2, w, h)) + _text(w + 8, 4, "", words)
    return w + WORD * len(words) + 28, h, mark


def _groups(nodes: Nodes) -> list[tuple[float, float, str]]:
    groups: dict[str, list[Node]] = {}
    for node in nodes.values():
        for letter in node.letters if node.kind == "layer" else ():
            groups.setdefault(letter, []).append(node)
    marks = []
    for letter, members in list(groups.items())[:GROUPS]:
        alone = next((n for n in members if n.letters == (letter,)), members[0])
        before, after = alone.widths or (0, 0)
        words = f"{before} → {after}, {len({n.step.weight for n in members})} layers"
        shape = _rect(Box(16, -9, 32, 18), 4, "shape", _fill(letter)) + _chip(16, 0, letter)
        marks.append((40 + WORD * len(words) + 16, 18.0, shape + _text(40, 4, "", words)))
    more = f"and {len(groups) - GROUPS} more groups"
    return marks + [(150.0, 18.0, _text(0, 4, "", more))] * (len(groups) > GROUPS)
