"""``python -m gpdfx.demo``: a student from training to expansion, joint training and collapse.

Handwritten digits that ship with scikit-learn, random weights, no download, under a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx

try:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    raise ImportError(f"{error}; the demo needs: pip install 'gpdfx[train,vision]'") from error

Network = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Data = tuple[Tensor, Tensor]
console = Console(highlight=False)


class Student(nn.Module):
    """A small convolutional network: a stem, a residual block, a depthwise-separable block."""

    def __init__(self, channels: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = conv_norm(1, channels)
        self.conv1 = conv_norm(channels, channels)
        self.conv2 = conv_norm(channels, channels)
        self.depthwise = conv_norm(channels, channels, stride=2, groups=channels)
        self.pointwise = conv_norm(channels, 2 * channels, kernel_size=1)
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 1, 8, 8) to logits (batch, classes)."""
        x = F.relu(self.stem(images))
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        x = F.relu(self.pointwise(self.depthwise(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def conv_norm(
    inputs: int, outputs: int, kernel_size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution and its batch norm; keeps height and width at stride 1."""
    padding = kernel_size // 2
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def load_data() -> tuple[Data, Data]:
    """Training and test set: images (n, 1, 8, 8) in [0, 1] and labels (n,)."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype("float32") / 16
    split = train_test_split(images, labels, test_size=0.5, stratify=labels, random_state=0)
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in split)
    return (x_train, y_train), (x_test, y_test)


def fit(model: nn.Module, loss: Loss, data: Data, epochs: int, title: str) -> Iterator[int]:
    """Train with AdamW, batches of 64 and a cosine schedule; yield the epochs done, in eval mode.

    ``loss`` maps a batch of images and labels to a scalar.
    """
    images, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in track(range(1, epochs + 1), f"{title:<16}", console=console):
        model.train()
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss(images[batch], labels[batch]).backward()
            optimizer.step()
        schedule.step()
        model.eval()
        yield epoch


def joint_loss(teacher: gpdfx.Teacher, images: Tensor, labels: Tensor, weight: float) -> Tensor:
    """GPD without a static teacher: CE(T, y) + CE(S, y) + weight * CE(S, softmax(sg(T))).

    T are the dynamic teacher's logits, S the student's on the same parameters; sg stops the
    gradient, and the soft target is smoothed by 0.1 (arXiv 2410.04140, section 3).
    """
    teacher_logits, student_logits = teacher(images), teacher.student(images)
    soft_target = teacher_logits.detach().softmax(1)
    return (
        F.cross_entropy(teacher_logits, labels)
        + F.cross_entropy(student_logits, labels)
        + weight * F.cross_entropy(student_logits, soft_target, label_smoothing=0.1)
    )


@torch.no_grad()
def accuracy(network: Network, data: Data) -> float:
    """Fraction of right predictions."""
    images, labels = data
    return (network(images).argmax(1) == labels).float().mean().item()


@torch.no_grad()
def largest_difference(one: Network, other: Network, images: Tensor) -> float:
    """Between the logits of two networks on the same images."""
    return (one(images) - other(images)).abs().max().item()


def digits() -> None:
    """Train a student, expand it, train both, collapse the teacher."""
    train, test = load_data()
    images, _ = test

    console.rule("1. train a student", align="left")
    student = Student()
    for _ in fit(student, lambda x, y: F.cross_entropy(student(x), y), train, 20, "student"):
        pass
    print(f"test accuracy {accuracy(student, test):.2%}")

    console.rule("2. teacher = gpdfx.expand(student, ratio=2, example_inputs=(x,))", align="left")
    teacher = gpdfx.expand(student, ratio=2, example_inputs=(images[:2],))
    print("parameters {:,} -> {:,}".format(*teacher.report().parameters))
    print(f"test accuracy {accuracy(student, test):.2%} -> {accuracy(teacher, test):.2%}")
    difference = largest_difference(student, teacher, images)
    print(f"largest difference of the logits {difference:.1e} (float32 rounding)")

    console.rule("3. train both, on shared parameters", align="left")
    table = Table("epoch", "dynamic teacher", "student", "gap", title="test accuracy")
    for epoch in fit(teacher, lambda x, y: joint_loss(teacher, x, y, 3.0), train, 10, "both"):
        wide, narrow = accuracy(teacher, test), accuracy(teacher.student, test)
        table.add_row(str(epoch), f"{wide:.2%}", f"{narrow:.2%}", f"{wide - narrow:+.2%}")
    console.print(table)
    print("One seed on easy digits: this shows how it works, not how much it gains.")

    console.rule("4. plain = gpdfx.collapse(teacher)", align="left")
    plain = gpdfx.collapse(teacher)
    difference = largest_difference(plain, teacher.student, images)
    same = type(plain) is Student and plain.state_dict().keys() == student.state_dict().keys()
    print(f"test accuracy {accuracy(plain, test):.2%}")
    print(f"largest difference of its logits from teacher.student's: {difference:g}")
    print(f"the student's own class and state_dict keys: {'yes' if same else 'no'}")


def known_networks() -> None:
    """Expand a torchvision and a timm network; print what the compiler did."""
    try:
        import timm
        import torchvision
    except ImportError as error:
        print(f"skipped ({error}); for this step: pip install 'gpdfx[vision]'")
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
    digits()
    console.rule("5. teacher.report() of two known networks", align="left")
    known_networks()
    console.rule("what to try next", align="left")
    print("gpdfx.expand(model, ratio=2)  your own model (example_inputs=(x,) for its input size)")
    print("teacher.report()              what widened, what did not and why, how exact it is")
    print("make test                     the checks behind these numbers")


if __name__ == "__main__":
    main()
