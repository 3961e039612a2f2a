"""``python -m gpdfx.cli.demo``: train a student with its dynamic teacher, collapse, read reports.

Handwritten digits that ship with scikit-learn, random weights, no download, under three minutes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import gpdfx

from .. import models
from ..errors import install
from ..train.recipes import RECIPES, with_changes
from ..train.run import TrainConfig, train

try:
    from rich.console import Console
except ImportError as error:
    raise ImportError(f"{error}; {install('train,vision')}") from error

console = Console(highlight=False)


def digits(folder: Path) -> None:
    """Train a small CNN with its dynamic teacher on handwritten digits, and look at the files."""
    console.rule("1. gpdfx train --data digits", align="left")
    recipe = with_changes(RECIPES["digits"], epochs=12)
    config = TrainConfig(data="digits", labels=50, out=str(folder), recipe=recipe)
    summary = train(config)
    print("One seed on easy digits: this shows how it works, not how much it gains.")
    print(f"the files of the run, the gap over epochs as curves.png among them: {folder}")

    console.rule("2. plain = gpdfx.collapse(teacher)", align="left")
    student = models.cnn(num_classes=10, in_chans=1)
    teacher = gpdfx.load(folder / "teacher.safetensors", student)
    plain = gpdfx.collapse(teacher.eval())
    print("parameters {:,} -> {:,}".format(*summary["parameters"].values()))
    images = torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        difference = (plain(images) - teacher.student(images)).abs().max().item()
    same = type(plain) is type(student) and plain.state_dict().keys() == student.state_dict().keys()
    print(f"largest difference of its logits from teacher.student's: {difference:g}")
    print(f"the student's own class and state_dict keys: {'yes' if same else 'no'}")


def known_networks() -> None:
    """Expand a torchvision and a timm network; print what the compiler did."""
    try:
        import timm
        import torchvision
    except ImportError as error:
        print(f"skipped ({error}); for this step, {install('vision')}")
        return
    size = 64
    images = torch.randn(2, 3, size, size)
    for name, model in (
        ("torchvision resnet18", torchvision.models.resnet18(weights=None)),
        ("timm vit_tiny_patch16_224", timm.create_model("vit_tiny_patch16_224", img_size=size)),
    ):
        print(f"{name}, {size} x {size} pixels", flush=True)
        with console.status("expanding"):
            teacher = gpdfx.expand(model, ratio=2, example_inputs=(images,))
        print(f"{teacher.report()}\n", flush=True)


def main() -> None:
    """Run the demo."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors this small gain nothing from threads, and wait for them
    digits(Path(tempfile.mkdtemp(prefix="gpdfx-demo-")))
    console.rule("3. teacher.report() of two known networks", align="left")
    known_networks()
    console.rule("what to try next", align="left")
    print("gpdfx.expand(model, ratio=2)  your own model (example_inputs=(x,) for its input size)")
    print("teacher.report()              what widened, what did not and why, how exact it is")
    print("gpdfx train --help            your own data, networks, recipes")
    print("make test                     the checks behind these numbers")


if __name__ == "__main__":
    main()
