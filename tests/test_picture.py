"""Pictures: ``graph``, what it says and where that stands; and the curves of a run."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

import gpdfx
from gpdfx.cli.app import main
from gpdfx.report.picture.draw import escape
from gpdfx.report.picture.layout import Box, Layout, place
from gpdfx.train import log

from .networks import NETWORKS

SVG = "{http://www.w3.org/2000/svg}"
ODD = "a<b & c>"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class Drawn(nn.Module):
    """Something of each kind; one layer is called twice, one has an odd name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block = Block()
        self.add_module(ODD, nn.Conv2d(8, 4, 1))
        self.twice = nn.Linear(12, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = torch.cat([x, getattr(self, ODD)(x)], 1).mean((2, 3))
        x = self.twice(self.twice(x).relu())
        return self.head(x.cumsum(1))


@cache
def drawn() -> gpdfx.Teacher:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 3, 8, 8),)
    return gpdfx.expand(Drawn(), 2, example_inputs=inputs, branches=None, verify=False)


def picture(teacher: gpdfx.Teacher, folder: Path) -> ElementTree.Element:
    gpdfx.graph(teacher, folder / "picture.svg")
    return ElementTree.parse(folder / "picture.svg").getroot()


def nodes(root: ElementTree.Element) -> Iterator[tuple[str, ElementTree.Element]]:
    """Name -> mark; not those of the legend."""
    for mark in root.iterfind(f"{SVG}g[@class='network']/{SVG}g[@data-name]"):
        yield str(mark.get("data-name")), mark


def words(mark: ElementTree.Element) -> list[str]:
    """Its texts, as they are read."""
    return ["".join(text.itertext()) for text in mark.iter(f"{SVG}text")]


def test_a_picture_says_names_widths_and_groups(tmp_path: Path) -> None:
    root = picture(drawn(), tmp_path)
    assert {name: (mark.get("class"), *words(mark)) for name, mark in nodes(root)} == {
        "x": ("node input", "x", "2 x 3 x 8 x 8"),
        "stem": ("node layer", "stem", "conv 3x3 /2: 8 → 16", "A"),
        "block.first": ("node layer", "block.first", "conv 1x1: 6 → 12"),
        "block.second": ("node layer", "block.second", "conv 3x3: 8 → 16", "A"),
        "block +": ("node merge", "+", "A"),
        ODD: ("node layer", ODD, "conv 1x1: 4 → 8", "B"),
        "concat": ("node merge", "concat", "B", "A"),
        "twice": ("node layer", "twice", "linear: 12 → 24", "B", "A"),
        "twice (2)": ("node layer", "twice (2)", "linear: 12 → 24", "B", "A"),
        "cumsum": ("node bridge", "cumsum", "bridge: cumsum"),
        "head": ("node stays", "head", "linear: 10 stays"),
        "output": ("node output", "output"),
    }
    lines = {(str(x.get("data-from")), str(x.get("data-to"))) for x in root.iter(f"{SVG}path")}
    assert lines - {("None", "None")} == {
        *(("x", "stem"), ("stem", "block.first"), ("block.first", "block.second")),
        *(("stem", "block +"), ("block.second", "block +"), ("block +", ODD), (ODD, "concat")),
        *(("block +", "concat"), ("concat", "twice"), ("twice", "twice (2)")),
        *(("twice (2)", "cumsum"), ("cumsum", "head"), ("head", "output")),
    }
    assert "block (Block)" in words(root)
    assert {"8 → 16, 3 layers", "4 → 8, 2 layers"} <= {*words(root)}


def test_titles_say_shapes_groups_and_reasons(tmp_path: Path) -> None:
    titles = {
        name: mark.findtext(f"{SVG}title") for name, mark in nodes(picture(drawn(), tmp_path))
    }
    assert titles["block.second"] == (
        "block.second\nconv 3x3: 8 → 16\nblock.second.weight: 8 x 6 x 3 x 3 → 16 x 12 x 3 x 3\n"
        "parameters: 432 → 1,728\nwidens together with stem, twice"
    )
    reason = gpdfx.explain(drawn(), "head.weight").dimensions[0].reason
    assert reason.startswith("output")
    assert str(titles["head"]).endswith(f"output channels stay: {reason}")
    (bridge,) = drawn().report().bridged
    assert str(titles["cumsum"]).endswith(f"at the student's width: {bridge.reason}")


def test_what_no_xml_holds_is_escaped() -> None:
    assert escape('a<b&"c\x01') == "a&lt;b&amp;&quot;c?"


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, teacher in (("a", drawn()), ("b", pickle.loads(pickle.dumps(drawn())))):
        gpdfx.graph(teacher, tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize("name", ["odd", "gpt", "grouped"])
def test_all_layers_are_there_and_none_is_on_another(name: str, tmp_path: Path) -> None:
    case = NETWORKS[name]
    model = case.model()
    root = picture(gpdfx.expand(model, 2, example_inputs=case.inputs(), verify=False), tmp_path)
    matrices = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.ndim > 1}
    texts = {text.removesuffix(" (2)") for _, mark in nodes(root) for text in words(mark)}
    assert matrices <= texts
    boxes = [rectangle(mark) for _, mark in nodes(root)]
    for k, (x, y, w, h) in enumerate(boxes):
        for left, top, wide, high in boxes[:k]:
            assert x >= left + wide or left >= x + w or y >= top + high or top >= y + h


def rectangle(mark: ElementTree.Element) -> tuple[float, ...]:
    shape = next(x for x in mark if x.get("class") == "shape")
    if shape.tag == f"{SVG}rect":
        return tuple(float(shape.get(name, "")) for name in ("x", "y", "width", "height"))
    points = [tuple(map(float, p.split())) for p in shape.get("d", "").strip("Mz").split("L")]
    (x0, y0), (x1, y1) = (tuple(f(c) for c in zip(*points, strict=True)) for f in (min, max))
    return x0, y0, x1 - x0, y1 - y0


def test_a_block_of_two_names_is_drawn_for_each_call(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one = nn.Conv2d(3, 8, 1), Block()
            self.other = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(self.stem(x)))

    teacher = gpdfx.expand(
        Twice(), 2, example_inputs=(torch.randn(2, 3, 4, 4),), branches=None, verify=False
    )
    root = picture(teacher, tmp_path)
    inside = [f"one{what}{call}" for call in ("", " (2)") for what in (".first", ".second", " +")]
    assert [name for name, _ in nodes(root)] == ["x", "stem", *inside, "output"]
    assert "one (Block)" in words(root)


def test_parts_are_drawn_with_their_inputs(tmp_path: Path) -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) if float(y.detach().sum()) < 1e9 else y

    teacher = gpdfx.expand(Apart(), 2, example_inputs=(torch.randn(2, 4),), verify=False)
    assert teacher.report().apart
    found = {name: mark.get("class") for name, mark in nodes(picture(teacher, tmp_path))}
    assert found["a"] == found["b"] == "node stays"
    assert list(found.values()).count("node input") == 2


# --------------------------------------------------------------------------- where it stands
Edges = list[tuple[str, str]]


def laid_out(edges: Edges, sizes: Mapping[str, tuple[float, float]]) -> Layout:
    blocks = {name: [f"b{int(name) // 9}", f"b{int(name) // 9}.{int(name) // 3}"] for name in sizes}
    return place(sizes, edges, blocks, (60.0, 20.0))


@pytest.mark.parametrize("seed", range(40))
def test_no_box_meets_another_and_no_line_crosses_one(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.choice([3, 12, 60])
    sizes = {str(k): (draw.choice([30.0, 90.0]), draw.choice([20.0, 42.0])) for k in range(count)}
    edges = [
        (str(a), str(b))
        for b in range(1, count)
        for a in {b - 1 if draw.random() < 0.9 else 0, *draw.sample(range(b), min(b, seed % 3))}
    ]
    layout = laid_out(edges, sizes)
    boxes = [*layout.boxes.values(), *layout.ghosts.values()]
    assert layout.boxes.keys() == sizes.keys()
    for k, one in enumerate(boxes):
        assert not any(meet(area(one), area(other)) for other in boxes[:k])
        assert inside(area(one), (0, layout.size[0], 0, layout.size[1]))
    assert sorted((a, b) for a, b, _ in layout.lines) == sorted(set(edges))
    for _, b, way in layout.lines:
        assert way[-1] == (layout.boxes[b].x, layout.boxes[b].y)
        for (x0, y0), (x1, y1) in itertools.pairwise(way):
            assert y1 >= y0
            piece = (min(x0, x1), max(x0, x1), y0, y1)
            assert not any(meet(piece, area(box)) for box in boxes)
    frames = [area(box) for _, _, box in layout.frames]
    for k, one in enumerate(frames):
        assert all(not meet(one, other) or inside(one, other) for other in frames[:k])


Area = tuple[float, float, float, float]


def area(box: Box) -> Area:
    return box.x - box.width / 2, box.x + box.width / 2, box.y, box.y + box.height


def meet(a: Area, b: Area) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def inside(a: Area, b: Area) -> bool:
    return b[0] <= a[0] and a[1] <= b[1] and b[2] <= a[2] and a[3] <= b[3]


def test_a_residual_block_is_a_chain_beside_its_shortcut() -> None:
    edges = [("0", "1"), ("1", "2"), ("2", "3"), ("0", "3")]
    layout = place(
        {str(k): (80, 40) for k in range(4)}, edges, {str(k): [] for k in range(4)}, (0, 0)
    )
    assert len({box.x for box in layout.boxes.values()}) == 1
    assert [box.y for box in layout.boxes.values()] == [0, 66, 132, 198]
    ((_, _, way),) = [line for line in layout.lines if line[:2] == ("0", "3")]
    assert max(x for x, _ in way) > layout.boxes["1"].x + 40


def test_a_thousand_layers_are_laid_out_in_columns_in_a_moment() -> None:
    edges = [(str(k), str(k + 1)) for k in range(1199)]
    edges += [(str(k), str(k + 4)) for k in range(0, 1190, 4)]
    begin = time.perf_counter()
    layout = laid_out(edges, {str(k): (150.0, 42.0) for k in range(1200)})
    assert time.perf_counter() - begin < 10
    assert 0.5 < layout.size[0] / layout.size[1] < 4.5
    assert all(int(name) % 4 == 0 for _, name in layout.ghosts)  # cut where one value is read


# --------------------------------------------------------------------------- files
def test_other_formats_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(gpdfx.InputError, match=r"(?s)groups\.gif.*\.svg, \.html or \.png"):
        gpdfx.graph(drawn(), tmp_path / "groups.gif")
    assert main(["graph", "timm:there_is_none", "--out", "groups.gif"]) == 1
    assert "cannot draw to groups.gif" in capsys.readouterr().err  # before a network is looked for


def test_a_png_shows_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fonts are found on any machine."""
    pytest.importorskip("resvg_py")
    gpdfx.graph(drawn(), tmp_path / "groups.png")
    gpdfx.graph(drawn(), tmp_path / "groups.svg")
    image = Image.open(tmp_path / "groups.png").convert("L")
    title = np.asarray(image.crop((0, 0, image.width, 80)))
    assert 0.01 < (title < 100).mean() < 0.2
    width = re.search(r'width="([\d.]+)"', (tmp_path / "groups.svg").read_text())
    assert width is not None
    assert abs(image.width - 2 * float(width[1])) <= 2
    monkeypatch.setattr("gpdfx.report.picture.find_spec", lambda name: None)
    with pytest.raises(gpdfx.InputError, match=r"a PNG needs resvg_py(?s:.*)pip install"):
        gpdfx.graph(drawn(), tmp_path / "other.png")


def test_the_command_writes_a_page_that_needs_nothing_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "norms.html"
    assert main(["graph", "tests.networks:Norms", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "<!--" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "multiply-adds" in text
    assert dict(nodes(svg_of(out)))


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


USE = """<script>
const box = () => svg.getAttribute("viewBox").split(" ").map(Number), said = {};
const hit = () => nodes.filter(n => n.classList.contains("hit")).map(n => n.dataset.name);
main.dispatchEvent(new WheelEvent("wheel", {deltaY: -400, clientX: 400, clientY: 300}));
said.zoomed = box()[2] / W;
const [left] = box();
main.dispatchEvent(new PointerEvent("pointermove", {buttons: 1, movementX: 50}));
said.moved = Math.round((left - box()[0]) * svg.getScreenCTM().a);
const stem = nodes.find(n => n.dataset.name == "stem");
stem.dispatchEvent(new PointerEvent("pointerenter"));
said.more = more.textContent, said.together = hit();
stem.dispatchEvent(new PointerEvent("pointerleave"));
said.hidden = more.hidden, said.after = hit();
input.value = "Twice";
input.dispatchEvent(new Event("input"));
said.found = hit(), said.count = count.textContent;
const [, top_] = box();
input.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
said.next = box()[1] > top_;
all.click();
said.whole = box()[2] == W;
document.body.textContent = JSON.stringify(said);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_the_page_is_searched_zoomed_and_pointed_at(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    gpdfx.graph(drawn(), out)
    assert 'class="node layer hit" data-name="block.second"' in dom(f"{out.as_uri()}#Second")
    out.write_text(out.read_text(encoding="utf-8") + USE, encoding="utf-8")
    said = json.loads(re.sub("(?s).*<body>|</body>.*", "", dom(out.as_uri())))
    titles = {name: mark.findtext(f"{SVG}title") for name, mark in nodes(svg_of(out))}
    assert said == {
        "zoomed": 0.5,
        "moved": 50,
        "more": titles["stem"],
        "together": ["stem", "block.second", "block +", "concat", "twice", "twice (2)"],
        "hidden": True,
        "after": [],
        "found": ["twice", "twice (2)"],
        "count": "2 found, Enter: next",
        "next": True,
        "whole": True,
    }


def dom(address: str) -> str:
    """What a browser makes of a page."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def svg_of(page: Path) -> ElementTree.Element:
    text = page.read_text(encoding="utf-8")
    return ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])


@pytest.mark.slow
def test_the_picture_of_the_docs_is_what_the_command_draws(tmp_path: Path) -> None:
    out = tmp_path / "resnet18.svg"
    assert main(["graph", "torchvision:resnet18", "--out", str(out)]) == 0
    committed = Path(__file__).resolve().parents[1] / "docs" / "resnet18.svg"
    assert out.read_bytes() == committed.read_bytes()


# --------------------------------------------------------------------------- curves of a run
def curves(
    history: list[dict[str, float]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, list[float]]]:
    """Panel -> line -> its values."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    log.draw(folder / "curves.png", history, history[len(history) // 2], 0.5, "a run")
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    return {
        f"{panel.get_ylabel()}, {panel.get_yscale()}": {
            str(line.get_label()): [float(y) for y in line.get_ydata()] for line in panel.lines
        }
        for panel in figures[0].axes
    }


def test_curves_show_accuracies_gap_and_all_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = [(0.25, 0.5), (0.75, 0.5), (0.75, 1.0)]
    history = [
        {"epoch": k, "student": s, "teacher": t, "gap": t - s, "loss": 8.0 / 4**k}
        | ({"loss_gap": 1.0 / k} if k > 1 else {})  # it sets in later
        for k, (s, t) in enumerate(accuracies, start=1)
    ]
    panels = curves(history, tmp_path, monkeypatch)
    assert list(panels) == [
        "validation accuracy (%), linear",
        "gap (points), linear",
        "training loss, log",
    ]
    top, gap, losses = panels.values()
    assert top["student"] == [25, 75, 75]
    assert top["dynamic teacher"] == [50, 50, 100]
    assert top["best student: 75.0%, epoch 2"] == [75]
    assert top["static teacher"] == [50, 50]
    assert [25, -25, 25] in gap.values()
    assert losses["all terms"] == [2, 0.5, 0.125]
    assert losses["gap"] == pytest.approx([1 / 2, 1 / 3])


def test_curves_of_a_student_alone_have_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = [{"epoch": 1, "student": 0.5, "loss": math.nan, "loss_student": math.nan}]
    panels = curves(history, tmp_path, monkeypatch)
    assert list(panels) == ["validation accuracy (%), linear", "training loss, linear"]
