"""Data for training: sources, few labels, label noise, and an order that survives a restart.

    data = load_data("digits", labels=25, noise=0.2)
    for x, y in train_loader(data, 128, seed=0, epoch=3, start=5 * 128):  # from the sixth batch on
        x, targets = mix(x, y, data.classes, mixup=0.8, generator=generator("mix", 0, 3, 5))

Nothing is downloaded. Everything random is a pure function of a key such as (seed, epoch, sample),
not of a state that workers, ranks and restarts would have to share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .errors import InputError
from .explain import suggest

SOURCES = {
    "digits": "handwritten digits that ship with scikit-learn",
    "mnist1d": "MNIST-1D signals, generated here",
    "cifar10:PATH": "a folder with CIFAR-10's binary version",
    "imagefolder:PATH": "a folder with train/CLASS/IMAGE and val/CLASS/IMAGE",
}
VALIDATION = 0.1  # of the training samples, where the source has no validation set of its own
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = "test_batch.bin"
CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then red, green and blue, row by row
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Samples(Protocol):
    """What a source gives: ``samples[i]`` begins with the input; labels are kept apart."""

    def __getitem__(self, index: int, /) -> Sequence[Any]: ...


@dataclass(frozen=True, eq=False)
class Split(Dataset[tuple[Tensor, int]]):
    """Some samples of a source, with labels of their own: item i is (x, int label).

    ``indices`` and ``labels``: (N,) int64.
    """

    samples: Samples
    indices: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples[int(self.indices[index])][0], int(self.labels[index])

    def subset(self, chosen: Tensor) -> Split:
        """These samples, in this order; ``chosen``: (M,) positions in this split."""
        return Split(self.samples, self.indices[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Data:
    """Splits that yield (x, int label). ``shape`` of one x: (C, H, W), or (C, L) for signals."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    shape: tuple[int, ...]


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
    imagefolder:PATH    (3, size,     train / val / val      random resized crop, flip
                        size)
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
    kind, colon, path = source.partition(":")
    known = {name.partition(":")[0]: name for name in SOURCES}
    if kind not in known:
        raise InputError(f"there is no source {source!r}", remedy=near(kind, known.values()))
    if bool(path) != (":" in known[kind]) or (colon and not path):
        raise InputError(f"source {source!r} is not complete", remedy=f"write {known[kind]}")
    if size is not None and (kind != "imagefolder" or size < 1):
        raise InputError(
            f"size is {size!r} for {kind}", remedy="it is the number of pixels of imagefolder:PATH"
        )
    if labels is not None and (not isinstance(labels, int) or labels < 1):
        raise InputError(f"labels is {labels!r}", remedy="pass a number of samples per class")
    if not 0 <= noise <= 1:
        raise InputError(f"noise is {noise!r}", remedy="pass a part between 0 and 1")
    if kind == "digits":
        data = _digits(seed, augment)
    elif kind == "mnist1d":
        data = _mnist1d(seed)
    elif kind == "cifar10":
        data = _cifar10(Path(path), seed, augment)
    else:
        data = _imagefolder(Path(path), size or 224, augment)
    train = data.train
    if labels is not None:
        train = _few_labels(train, labels, data.classes, seed)
    if noise:
        train = _noisy_labels(train, noise, data.classes, seed)
    return Data(data.name, train, data.validation, data.test, data.classes, data.shape)


def near(name: str, known: Any) -> str:
    """A remedy that names what comes near, or else all that there is."""
    remedy = suggest(name, known)
    return remedy if remedy.startswith("did you mean") else f"choose from {', '.join(known)}"


# --------------------------------------------------------------------------- randomness
def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by ``key`` alone, for example ("mix", seed, epoch, step)."""
    return torch.Generator().manual_seed(_number(*key))


def _number(*key: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=6).digest())


def _permutation(length: int, *key: int | str) -> Tensor:
    return torch.randperm(length, generator=generator(*key))


# --------------------------------------------------------------------------- splits and labels
def _all(samples: Samples, labels: Tensor) -> Split:
    return Split(samples, torch.arange(len(labels)), labels)


def _validation(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of the training and of the validation samples, each in ascending order."""
    order = _permutation(length, "validation", seed)
    count = round(length * VALIDATION)
    return order[count:].sort().values, order[:count].sort().values


def _few_labels(train: Split, count: int, classes: int, seed: int) -> Split:
    per_class = torch.bincount(train.labels, minlength=classes)
    short = (per_class < count).nonzero().flatten().tolist()
    if short:
        raise InputError(
            f"labels is {count}, but of class {', '.join(map(str, short))} there are only "
            f"{', '.join(str(int(per_class[c])) for c in short)} training samples",
            remedy=f"pass at most labels={int(per_class.min())}",
        )
    order = _permutation(len(train), "labels", seed)
    chosen = [order[train.labels[order] == c][:count] for c in range(classes)]
    return train.subset(torch.cat(chosen).sort().values)


def _noisy_labels(train: Split, part: float, classes: int, seed: int) -> Split:
    draw = generator("noise", seed)
    wrong = torch.randperm(len(train), generator=draw)[: round(part * len(train))]
    labels = train.labels.clone()
    labels[wrong] += torch.randint(1, classes, (len(wrong),), generator=draw)
    return Split(train.samples, train.indices, labels % classes)


# --------------------------------------------------------------------------- the sources
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


def _digits(seed: int, augment: bool) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            f"digits come with scikit-learn ({error})", remedy="pip install 'gpdfx[train]'"
        ) from error
    images, targets = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)
    order = _permutation(len(x), "digits")
    pool = order[300:]
    mean, std = x[pool].mean(), x[pool].std()
    clean, moved = Stored(x, mean, std), Stored(x, mean, std, shift if augment else None)
    everything = _all(clean, torch.from_numpy(targets).long())
    train, validation = (pool[part] for part in _validation(len(pool), seed))
    return Data(
        "digits",
        Split(moved, train, everything.labels[train]),
        everything.subset(validation),
        everything.subset(order[:300]),
        10,
        (1, 8, 8),
    )


# Ten shapes of twelve points: where the pen is, left (-) or right (+), on its way down the digit.
# fmt: off
TEMPLATES = (
    ( 0,  3,  5,  6,  6,  6,  6,  6,  6,  5,  3,  0),
    ( 0, -3, -2,  0,  1,  2,  3,  3,  3,  3,  3,  0),
    ( 0,  4,  6,  6,  4,  2, -1, -3, -4, -4, -2,  0),
    ( 0,  4,  6,  5,  2,  0,  2,  5,  6,  5,  3,  0),
    ( 0, -2, -4, -6, -5,  4,  4,  4,  4,  4,  4,  0),
    ( 0, -3, -5, -5, -3,  1,  5,  6,  6,  5,  3,  0),
    ( 0, -3, -5, -6, -5, -2,  2,  5,  6,  5,  3,  0),
    ( 0,  4,  6,  6,  5,  3,  1, -1, -3, -5, -6,  0),
    ( 0,  3,  5,  4,  1, -1,  1,  4,  6,  6,  4,  0),
    ( 0, -4, -5, -2,  2,  4,  5,  5,  5,  5,  4,  0),
)
# fmt: on
WIDTH, LENGTH = 72, 40  # samples before and after the last resampling


def mnist1d(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signals (count, 1, 40) and labels (count,): every class equally often, in random order.

    As in MNIST-1D (arXiv 2011.14439): a template of 12 points, standardised; 36 to 60 zeros after
    it; resampled to 72 points (so it is stretched); scaled by 0.8 to 1.2; moved by up to 47 points,
    around the end; outside the template gaussian noise of deviation 0.25, smoothed by a gaussian
    of 2 points; on all of it iid noise of deviation 0.02; sheared by up to 0.19 at either end;
    resampled to 40 points. The templates are our own.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=draw)

    labels = (torch.arange(count) % 10)[torch.randperm(count, generator=draw)]
    template = torch.tensor(TEMPLATES, dtype=torch.float32)
    template = (template - template.mean(1, True)) / template.std(1, correction=0, keepdim=True)
    template = template - template[:, :1]
    points = template.shape[1]
    padding = torch.randint(36, 61, (count, 1), generator=draw)
    at = torch.linspace(0, 1, WIDTH) * (points + padding - 1)
    x = _interpolate(F.pad(template[labels], (0, WIDTH - points)), at) * uniform(0.8, 1.2)
    start = torch.randint(48, (count, 1), generator=draw)
    moved = (torch.arange(WIDTH) - start) % WIDTH
    x, inside = x.gather(1, moved), (at < points).gather(1, moved)
    reach = 8  # four deviations
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / 2) ** 2)
    hiss = 0.25 * torch.randn(count, 1, WIDTH + 2 * reach, generator=draw)
    smooth = F.conv1d(hiss, (bell / bell.sum()).reshape(1, 1, -1)).squeeze(1)
    x = torch.where(inside, x, smooth)
    x = x + 0.02 * torch.randn(count, WIDTH, generator=draw)
    x = x - uniform(-0.375, 0.375) * torch.linspace(-0.5, 0.5, WIDTH)
    x = _interpolate(x, torch.linspace(0, WIDTH - 1, LENGTH).expand(count, -1))
    return x.unsqueeze(1), labels


def _interpolate(x: Tensor, at: Tensor) -> Tensor:
    """x (N, L) at positions (N, M) between 0 and L - 1, linearly."""
    left = at.floor().long().clamp(max=x.shape[1] - 2)
    return torch.lerp(x.gather(1, left), x.gather(1, left + 1), at - left)


def _mnist1d(seed: int) -> Data:
    x, labels = mnist1d(5000, generator("mnist1d"))
    everything = _all(Stored(x, torch.zeros(()), torch.ones(())), labels)
    train, validation = _validation(4000, seed)
    parts = train, validation, torch.arange(4000, 5000)
    a, b, c = (everything.subset(part) for part in parts)
    return Data("mnist1d", a, b, c, 10, (1, LENGTH))


def _cifar10(path: Path, seed: int, augment: bool) -> Data:
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
    train, validation = _validation(len(x), seed)
    return Data(
        "cifar10",
        Split(moved, train, labels[train]),
        Split(clean, validation, labels[validation]),
        _all(Stored(test_x, mean, std), test_labels),
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


def _imagefolder(path: Path, size: int, augment: bool) -> Data:
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
    test = _all(val, torch.tensor(val.targets))
    name = path.resolve().name
    return Data(
        name,
        _all(train, torch.tensor(train.targets)),
        test,
        test,
        len(val.classes),
        (3, size, size),
    )
