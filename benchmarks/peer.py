"""The reference implementation's step, out of a checkout of guoyongcs/GPD; nothing of it is copied.

    python -m benchmarks.speed --peer PATH

Its calls are those of its CNN/train_dkd.py without a static teacher (``--use_orepa
--kd_loss_type sce --kd_ratio 3``): forward and backward of the teacher, then those of the student.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed_steps import Setting

MODULES = ("gpd_utils", "orepa_ft", "models")


@dataclass(frozen=True)
class Peer:
    """Its modules, by their names there."""

    gpd_utils: Any
    orepa_ft: Any
    models: Any

    def build(self, setting: Setting) -> tuple[nn.Module, list[str]]:
        """Its widened network for training, and the layers that it gave branches."""
        name = setting.network.rpartition(":")[2]
        make = getattr(self.models, name, None)
        if make is None or not name.startswith("resnet") or setting.ratio != int(setting.ratio):
            raise SystemExit(
                f"no rows of the reference for {setting.network} at ratio {setting.ratio}: they "
                "are for ResNets and whole ratios"
            )
        with silent():
            student = self.orepa_ft.transfer2orepa(make(), train_from_scratch=True)
            kind = self.orepa_ft.OREPA
            layers = [n for n, m in student.named_modules() if isinstance(m, kind)]
            wide = self.gpd_utils.gpd_init(
                student,
                first_module_name_list=["conv1"],
                last_module_name_list=["fc"],
                test_input=[torch.rand(1, setting.channels, setting.size, setting.size)],
                gpd_ratio=int(setting.ratio),
            )
        placed: nn.Module = setting.placed(wide)
        return placed.train(), layers

    def backward(self, net: Any, x: Tensor, y: Tensor) -> None:
        """Forward and backward of teacher and student, as its training loop calls them."""
        wide = self.gpd_utils.forward_expanded(net, x)
        loss, _, _ = self.gpd_utils.enhance_with_es(
            net,
            x,
            wide,
            F.cross_entropy(wide, y),
            F.cross_entropy,
            [y],
            kd_loss_type="sce",
            kd_loss_weight=3,
        )
        loss.backward()


def load_peer(path: Path) -> Peer:
    """Import it. Leaves no file in the checkout."""
    folder = path / "CNN"
    if not (folder / "gpd_utils.py").is_file():
        raise SystemExit(
            f"{path} is no checkout of github guoyongcs/GPD: it has no CNN/gpd_utils.py"
        )
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings(), without_einops():
            warnings.simplefilter("ignore")
            return Peer(*(importlib.import_module(name) for name in MODULES))
    except ImportError as error:
        raise SystemExit(
            f"the reference implementation in {path} does not import: {error}. It asks for timm "
            "0.6.13; newer ones that still have timm.models.layers do"
        ) from error
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = kept


@contextlib.contextmanager
def without_einops() -> Iterator[None]:
    """Its transformers import ``einops``, which its ResNets never call: an empty one will do."""
    if importlib.util.find_spec("einops") is not None:
        yield
        return
    stand_in = types.ModuleType("einops")
    stand_in.rearrange = None  # type: ignore[attr-defined]
    sys.modules["einops"] = stand_in
    try:
        yield
    finally:
        del sys.modules["einops"]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """It prints as it goes."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
