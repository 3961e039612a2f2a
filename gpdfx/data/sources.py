"""Data for training: sources, few labels, label noise, and an order that survives a restart.

    data = load_data("digits", labels=25, noise=0.2)
    for x, y in train_loader(data, 128, seed=0, epoch=3, start=5 * 128):  # from the sixth batch on
        x, targets = mix(x, y, data.classes, mixup=0.8, generator=generator("mix", 0, 3, 5))

Nothing is downloaded, and everything random is a function of a key (``gpdfx.data.splits``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, near, needs_extra
from .mnist1d import mnist1d
from .splits import Data, Split, few_labels, generator, noisy_labels, permutation

VALIDATION = 0.1  # of the training samples, where the source has no validation set of its own
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = "test_batch.bin"
CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then red, green and blue, row by row
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True, eq=False)
class Stored:
    """Samples in memory: x (N, ...), changed by ``augment`` and then standardised."""

    x: Tensor
    mean: Tensor
    std: Tensor
    augment: Callable[[Tensor], Tensor] | None = None

    def __getitem__(self, index: int, /) -> tuple[Tensor]:
        x = self.x[index]
        return (((self.augment(x) if self.augment else x).float() - self.mean) / self.std,)


def shift(x: Tensor, by: int = 1) -> Tensor:
    """Move an image (C, H, W) by up to ``by`` pixels; what comes in is 0."""
    height, width = x.shape[-2:]
    top, left = torch.randint(2 * by + 1, (2,)).tolist()
    return F.pad(x, [by] * 4)[..., top : top + height, left : left + width]


def crop_flip(x: Tensor) -> Tensor:
    """CIFAR's usual augmentation: pad by 4, crop at random, mirror every second image."""
    x = shift(x, 4)
    return x.flip(-1) if torch.rand(()) < 0.5 else x


def _in_memory(
    name: str, samples: Stored, labels: Tensor, pool: Tensor, test: Tensor, seed: int
) -> Data:
    """A source with ten classes. ``pool``: positions of what is for training and validation, of
    which only training samples are augmented."""
    plain = replace(samples, augment=None)
    order = permutation(len(pool), "validation", seed)
    count = round(len(pool) * VALIDATION)
    train, validation = (pool[part.sort().values] for part in (order[count:], order[:count]))
    parts = ((samples, train), (plain, validation), (plain, test))
    a, b, c = (Split(source, part, labels[part]) for source, part in parts)
    return Data(name, a, b, c, 10, tuple(samples.x.shape[1:]))


def load_digits(*, seed: int, augment: bool, **_: Any) -> Data:
    """Handwritten digits that ship with scikit-learn."""
    with needs_extra("train", "digits come with scikit-learn"):
        from sklearn.datasets import load_digits as load
    images, targets = load(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)
    order = permutation(len(x), "digits")
    pool, test = order[300:], order[:300]
    samples = Stored(x, x[pool].mean(), x[pool].std(), shift if augment else None)
    return _in_memory("digits", samples, torch.from_numpy(targets).long(), pool, test, seed)


def load_mnist1d(*, seed: int, **_: Any) -> Data:
    """MNIST-1D signals, generated here."""
    x, labels = mnist1d(5000, generator("mnist1d"))
    samples = Stored(x, torch.zeros(()), torch.ones(()))
    pool, test = torch.arange(5000).split([4000, 1000])
    return _in_memory("mnist1d", samples, labels, pool, test, seed)


def load_cifar10(*, path: Path, seed: int, augment: bool, **_: Any) -> Data:
    """A folder with CIFAR-10's binary version."""
    inner = path / "cifar-10-batches-bin"
    folder = inner if inner.is_dir() else path
    for place in (folder, path / "cifar-10-batches-py"):
        if (place / "data_batch_1").exists() and not (folder / CIFAR_TRAIN[0]).exists():
            raise InputError(
                f"{place} is the Python version of CIFAR-10: pickles, which run code when read",
                remedy="use the binary version, the folder cifar-10-batches-bin",
            )
    missing = [name for name in (*CIFAR_TRAIN, CIFAR_TEST) if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} has no {', '.join(missing)}",
            remedy="give the folder cifar-10-batches-bin of CIFAR-10's binary version, unpacked",
        )
    records = [_records(folder / name) for name in (*CIFAR_TRAIN, CIFAR_TEST)]
    x, labels = (torch.cat(parts) for parts in zip(*records, strict=True))
    pool, test = torch.arange(len(x)).tensor_split([-len(records[-1][1])])
    mean, std = (255 * torch.tensor(t).reshape(3, 1, 1) for t in (CIFAR_MEAN, CIFAR_STD))
    samples = Stored(x, mean, std, crop_flip if augment else None)
    return _in_memory("cifar10", samples, labels, pool, test, seed)


def _records(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) of one file."""
    raw = np.fromfile(path, dtype=np.uint8)
    if not len(raw) or len(raw) % CIFAR_RECORD:
        raise InputError(
            f"{path} has {len(raw)} bytes, which are not whole records of {CIFAR_RECORD}",
            remedy="it was cut short, or is another data set; unpack CIFAR-10's binary version",
        )
    records = torch.from_numpy(raw).reshape(-1, CIFAR_RECORD)
    labels = records[:, 0].long()
    if labels.max() > 9:
        raise InputError(
            f"{path} has the label {int(labels.max())}; CIFAR-10 has 0 to 9",
            remedy="unpack CIFAR-10's binary version again",
        )
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def load_imagefolder(*, path: Path, size: int, augment: bool, **_: Any) -> Data:
    """A folder with train/CLASS/IMAGE and val/CLASS/IMAGE, and with test/CLASS/IMAGE or without."""
    with needs_extra("vision", "imagefolder reads images by torchvision"):
        from torchvision.datasets import ImageFolder
        from torchvision.datasets.folder import default_loader
        from torchvision.transforms import v2
    missing = [str(path / name) for name in ("train", "val") if not (path / name).is_dir()]
    if missing:
        raise InputError(
            f"there is no folder {', '.join(missing)}",
            remedy=f"images belong in {path}/train/CLASS and {path}/val/CLASS",
        )
    standard = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    standard += [v2.Normalize(IMAGENET_MEAN, IMAGENET_STD), v2.ToPureTensor()]
    whole = v2.Compose([v2.Resize(math.ceil(size * 8 / 7)), v2.CenterCrop(size), *standard])
    random = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *standard])
    names = ["train", "val", *["test"] * any(path.glob("test/*/"))]
    changes = {"train": random if augment else whole}

    def load(file: str) -> Any:
        try:
            return default_loader(file)
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow finds wrong with it
            text = f"the image {file} cannot be read ({type(error).__name__})"
            raise InputError(text, remedy="replace it, or take it away") from error

    try:
        folders = {
            name: ImageFolder(str(path / name), changes.get(name, whole), loader=load)
            for name in names
        }
    except FileNotFoundError as error:  # says which folder or class
        raise InputError(str(error), remedy="every class needs at least one image") from error
    classes = folders["train"].classes
    for name in names[1:]:
        if only := sorted({*classes} ^ {*folders[name].classes}):
            raise InputError(
                f"train and {name} have different classes: only one of them has "
                f"{', '.join(only[:5])}",
                remedy="give both the same folders",
            )
    train, val, *test = (
        Split(x, torch.arange(len(x)), torch.tensor(x.targets)) for x in folders.values()
    )
    shape = (3, size, size)
    return Data(path.resolve().name, train, val, test[0] if test else val, len(classes), shape)


# --------------------------------------------------------------------------- by name
SOURCES: dict[str, Callable[..., Data]] = {
    "digits": load_digits,
    "mnist1d": load_mnist1d,
    "cifar10:PATH": load_cifar10,
    "imagefolder:PATH": load_imagefolder,
}


def usage_of(source: str) -> str:
    """``"cifar10:here"`` -> ``"cifar10:PATH"``. Raises ``InputError`` for what is no source."""
    kind, colon, path = source.partition(":")
    usages = {usage.partition(":")[0]: usage for usage in SOURCES}
    if kind not in usages:
        raise InputError(f"there is no source {source!r}", remedy=near(kind, usages.values()))
    usage = usages[kind]
    if not bool(colon) == bool(path) == (":" in usage):
        raise InputError(f"source {source!r} is not complete", remedy=f"write {usage}")
    return usage


def load_data(
    source: str,
    *,
    seed: int = 0,
    labels: int | None = None,
    noise: float = 0.0,
    size: int | None = None,
    augment: bool = True,
) -> Data:
    """Training, validation and test set of a source.

    The test set is always the same: ``seed`` chooses the validation set, the few labels and the
    noise. Where a source has no validation set of its own it is a tenth of the training samples.

    =================== ============= ====================== ==========================
    source              x             train/validation/test  augmentation
    =================== ============= ====================== ==========================
    digits              (1, 8, 8)     1347 / 150 / 300       shift by up to one pixel
    mnist1d             (1, 40)       3600 / 400 / 1000      none
    cifar10:PATH        (3, 32, 32)   45000 / 5000 / 10000   pad 4 and crop, flip
    imagefolder:PATH    (3, size,     train / val / test,    random resized crop, flip
                        size)         else val once more
    =================== ============= ====================== ==========================

    ``digits`` and ``cifar10`` are standardised by their training samples, ``imagefolder`` by
    ImageNet's mean and deviation. ``mnist1d`` follows the recipe of MNIST-1D (Greydanus 2020,
    arXiv 2011.14439) with templates of our own, so accuracies are not those of that paper.

    Args:
        labels: keep this many training samples of every class; fewer are a subset of more. The
            validation set keeps its size.
        noise: the part of the training labels that becomes another class, drawn uniformly.
            Validation and test labels stay right.
        size: pixels of ``imagefolder`` (224); validation images are resized to 8/7 of it before
            the crop.
        augment: whether training samples are augmented.

    Raises:
        InputError: an unknown source, missing or damaged files, fewer samples than ``labels``.
    """
    usage, (kind, _, path) = usage_of(source), source.partition(":")
    if size is not None and (kind != "imagefolder" or size < 1):
        raise InputError(
            f"size is {size!r} for {kind}", remedy="it is the number of pixels of imagefolder:PATH"
        )
    if labels is not None and (not isinstance(labels, int) or labels < 1):
        raise InputError(f"labels is {labels!r}", remedy="pass a number of samples per class")
    if not 0 <= noise <= 1:
        raise InputError(f"noise is {noise!r}", remedy="pass a part between 0 and 1")
    data = SOURCES[usage](path=Path(path), seed=seed, augment=augment, size=size or 224)
    if labels is not None:
        data = replace(data, train=few_labels(data.train, labels, data.classes, seed))
    if noise:
        data = replace(data, train=noisy_labels(data.train, noise, data.classes, seed))
    return data
