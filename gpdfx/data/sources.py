"""Where data comes from: packages that ship it, files on disk, or our own generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .mnist1d import LENGTH, mnist1d
from .splits import Data, Split, everything, generator, permutation, validation_split

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


def load_digits(seed: int, augment: bool) -> Data:
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise InputError(
            f"digits come with scikit-learn ({error})", remedy="pip install 'gpdfx[train]'"
        ) from error
    images, targets = load(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)
    order = permutation(len(x), "digits")
    pool = order[300:]
    mean, std = x[pool].mean(), x[pool].std()
    clean, moved = Stored(x, mean, std), Stored(x, mean, std, shift if augment else None)
    whole = everything(clean, torch.from_numpy(targets).long())
    train, validation = (pool[part] for part in validation_split(len(pool), seed))
    return Data(
        "digits",
        Split(moved, train, whole.labels[train]),
        whole.subset(validation),
        whole.subset(order[:300]),
        10,
        (1, 8, 8),
    )


def load_mnist1d(seed: int) -> Data:
    x, labels = mnist1d(5000, generator("mnist1d"))
    whole = everything(Stored(x, torch.zeros(()), torch.ones(())), labels)
    train, validation = validation_split(4000, seed)
    parts = train, validation, torch.arange(4000, 5000)
    a, b, c = (whole.subset(part) for part in parts)
    return Data("mnist1d", a, b, c, 10, (1, LENGTH))


def load_cifar10(path: Path, seed: int, augment: bool) -> Data:
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
    x, labels = (
        torch.cat(parts)
        for parts in zip(*(_records(folder / name) for name in CIFAR_TRAIN), strict=True)
    )
    test_x, test_labels = _records(folder / CIFAR_TEST)
    mean, std = (255 * torch.tensor(t).reshape(3, 1, 1) for t in (CIFAR_MEAN, CIFAR_STD))
    clean, moved = Stored(x, mean, std), Stored(x, mean, std, crop_flip if augment else None)
    train, validation = validation_split(len(x), seed)
    return Data(
        "cifar10",
        Split(moved, train, labels[train]),
        Split(clean, validation, labels[validation]),
        everything(Stored(test_x, mean, std), test_labels),
        10,
        (3, 32, 32),
    )


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


def load_imagefolder(path: Path, size: int, augment: bool) -> Data:
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
    except ImportError as error:
        raise InputError(
            f"imagefolder reads images by torchvision ({error})",
            remedy="pip install 'gpdfx[vision]'",
        ) from error
    missing = [str(path / name) for name in ("train", "val") if not (path / name).is_dir()]
    if missing:
        raise InputError(
            f"there is no folder {', '.join(missing)}",
            remedy=f"images belong in {path}/train/CLASS and {path}/val/CLASS",
        )
    standard = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        v2.ToPureTensor(),
    ]
    whole = v2.Compose([v2.Resize(math.ceil(size * 8 / 7)), v2.CenterCrop(size), *standard])
    random = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *standard])
    try:
        train = ImageFolder(str(path / "train"), random if augment else whole)
        val = ImageFolder(str(path / "val"), whole)
    except FileNotFoundError as error:  # says which folder or class
        raise InputError(str(error), remedy="every class needs at least one image") from error
    if train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(
            f"train and val have different classes: only one of them has {', '.join(only[:5])}",
            remedy="give both the same folders",
        )
    test = everything(val, torch.tensor(val.targets))
    name = path.resolve().name
    return Data(
        name,
        everything(train, torch.tensor(train.targets)),
        test,
        test,
        len(val.classes),
        (3, size, size),
    )
