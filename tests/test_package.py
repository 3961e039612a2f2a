"""The package as it is installed, imported and left again."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import weakref
from collections.abc import Sized
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gpdfx
from gpdfx.kernels.fold.site import key_of, sites_of
from gpdfx.teacher import extract

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("gpdfx", "passes", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BESIDE = ("passes", "kernels")
BUILD = ("-q", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
EXPAND = """
import torch
from torch import nn
import gpdfx, gpdfx.kernels.copies, gpdfx.passes.widen
net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
teacher = gpdfx.expand(net, 2, example_inputs=(torch.randn(3, 4),))
assert teacher.report().widened == 1
print(gpdfx.__file__)
"""
slow = pytest.mark.slow


def python(*args: str, cwd: Path, path: tuple[Path, ...] = (), python: str = sys.executable) -> str:
    """What a fresh process prints."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def checkout(folder: Path, links: bool) -> Path:
    """A copy of what the package is made of, as git writes it with links or without them."""
    folder.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", *(() if links else BESIDE))
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignore = unwanted if part == "gpdfx" else shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / part, folder / part)
    if not links:
        for name in BESIDE:
            (folder / "gpdfx" / name).write_text(f"../{name}")
    return folder


def wheel(source: Path, folder: Path) -> Path:
    """Built, and unpacked by an installer."""
    python("-m", "pip", "wheel", *BUILD, "-w", str(folder / "wheel"), str(source), cwd=folder)
    (built,) = (folder / "wheel").glob("*.whl")
    target = folder / "installed"
    python("-m", "pip", "install", *BUILD, "--target", str(target), str(built), cwd=folder)
    return target


def unpacked_sdist(source: Path, folder: Path) -> Path:
    build = "from setuptools.build_meta import build_sdist; build_sdist(__import__('sys').argv[1])"
    python("-c", build, str(folder), cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "sdist", filter="data")
    (inner,) = (folder / "sdist").iterdir()
    return inner


# --------------------------------------------------------------------------- installed in all ways
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_bare_checkout_works_from_another_folder(links: bool, tmp_path: Path) -> None:
    source = checkout(tmp_path / "source", links)
    assert str(source) in python("-c", EXPAND, cwd=tmp_path, path=(source,))


@pytest.mark.parametrize(
    ("links", "sdist"),
    [(False, True), pytest.param(True, False, marks=slow), pytest.param(True, True, marks=slow)],
)
def test_a_wheel_holds_all(links: bool, sdist: bool, tmp_path: Path) -> None:
    """``sdist``: built from the source distribution, which has no links in any case."""
    source = checkout(tmp_path / "source", links)
    if sdist:
        source = unpacked_sdist(source, tmp_path)
    target = wheel(source, tmp_path)
    names = {p.relative_to(target).as_posix() for p in (target / "gpdfx").rglob("*.py")}
    wanted = {
        (Path("gpdfx") / p.relative_to(ROOT / "gpdfx")).as_posix()
        for p in (ROOT / "gpdfx").rglob("*.py")
    }
    wanted |= {
        f"gpdfx/{p.relative_to(ROOT)}" for name in BESIDE for p in (ROOT / name).rglob("*.py")
    }
    assert names == wanted
    for name in ("py.typed", "report/picture/page.html"):
        assert (target / "gpdfx" / name).exists()
    assert str(target) in python("-c", EXPAND, cwd=tmp_path, path=(target,))


@slow
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_an_editable_install_works(links: bool, tmp_path: Path) -> None:
    source, venv = checkout(tmp_path / "source", links), tmp_path / "venv"
    python("-m", "venv", "--without-pip", str(venv), cwd=tmp_path)
    own = str(venv / "bin" / "python")
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(python("-c", purelib, cwd=tmp_path, python=own).strip())
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    python("-m", "pip", "--python", own, "install", *BUILD, "-e", str(source), cwd=tmp_path)
    assert str(source) in python("-c", EXPAND, cwd=tmp_path, python=own)


def test_what_is_missing_comes_by_an_extra() -> None:
    code = "".join(p.read_text() for p in (ROOT / "gpdfx").rglob("*.py"))
    named = {
        x
        for many in re.findall(r"(?:install|needs_extra)\(['\"]([\w,]+)", code)
        for x in many.split(",")
    }
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"train", "vision", "onnx"} <= named <= known.keys()


# --------------------------------------------------------------------------- beside other packages
def test_the_folder_kernels_gives_way_to_a_package_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("real = True")
    code = "import kernels, gpdfx.kernels.copies; assert kernels.real"
    python("-c", code, cwd=tmp_path, path=(ROOT, tmp_path))


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_models_of_transformers_are_imported_from_the_root() -> None:
    python("-c", "from transformers import BertModel", cwd=ROOT)


def test_passes_are_imported_as_a_part_of_gpdfx(tmp_path: Path) -> None:
    code = "import passes"
    with pytest.raises(AssertionError, match=r"import gpdfx\.passes, not passes"):
        python("-c", code, cwd=tmp_path, path=(ROOT,))


# --------------------------------------------------------------------------- imported quickly
HEAVY = (
    *("torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.tensor"),
    *("torch.distributed.fsdp", "torch.testing", "torch.utils.tensorboard", "torchvision", "timm"),
    *("transformers", "matplotlib", "sklearn", "scipy", "pandas", "PIL", "rich", "onnx"),
    *("onnxscript", "onnxruntime", "tensorboard", "pytest", "hypothesis", "setuptools"),
    *("sympy", "networkx", "triton"),
)


def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import gpdfx
print(*(name for name in {HEAVY} if name in sys.modules and name not in before))
"""
    assert python("-c", code, cwd=tmp_path, path=(ROOT,)).split() == []


def test_the_first_copies_are_marked_as_torch_marks_constants() -> None:
    """Tried with torch 2.14."""

    def function() -> None: ...

    mark = vars(torch.compiler.assume_constant_result(function))
    assert mark
    assert mark.items() <= vars(extract._first).items()


# --------------------------------------------------------------------------- and left again
class Joined(nn.Module):
    """The first copies of what it joins are no block: their index is a tensor."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, hidden), nn.Linear(4, 3)
        self.head = nn.Linear(hidden + 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([self.left(x), self.right(x)], 1).relu())
        return out


def expanded(hidden: int) -> gpdfx.Teacher:
    return gpdfx.expand(Joined(hidden), 2, example_inputs=(torch.randn(3, 4),))


def tables() -> dict[str, int]:
    """The sizes of all that modules of ours hold."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "gpdfx":
            for key, value in list(vars(module).items()):
                if isinstance(value, Sized) and not isinstance(value, type | str):
                    found[f"{name}.{key}"] = len(value)
                elif hasattr(value, "cache_info") and not isinstance(value, type):
                    assert value.cache_info().maxsize is not None, f"{name}.{key} is not bounded"
    return found


@pytest.mark.parametrize("count", [8, pytest.param(50, marks=slow)])
def test_nothing_is_left_of_many_teachers(count: int) -> None:
    expanded(4).student(torch.randn(2, 4))
    gc.collect()
    before = tables()
    alive = []
    for k in range(count):
        teacher = expanded(5 + k)
        teacher.student(torch.randn(2, 4))
        alive.append(weakref.ref(teacher))
    assert len(extract._FIRST) > before["gpdfx.teacher.extract._FIRST"]
    del teacher
    gc.collect()
    assert not any(one() for one in alive)
    assert tables() == before


def test_gradients_arrive_after_the_teacher_is_gone() -> None:
    teacher = expanded(6)
    weight = teacher.get_parameter("left.weight")
    loss = teacher(torch.randn(3, 4)).sum() + teacher.student(torch.randn(3, 4)).sum()
    del teacher
    gc.collect()
    loss.backward()
    assert weight.grad is not None


def test_a_key_says_all_of_its_layers() -> None:
    teacher = gpdfx.expand(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten()),
        1.5,
        example_inputs=(torch.randn(2, 3, 8, 8),),
    )
    chunks = [*teacher._folding.whole, *teacher._folding.alone]
    assert any(site.terms for chunk in chunks for site in chunk.sites.values())
    for chunk in chunks:
        sites = tuple(chunk.sites.values())
        assert sites_of(chunk.key) == sites
        assert key_of(sites_of(chunk.key)) == chunk.key
