"""Data for training: sources, few labels, label noise, and an order that survives a restart.

    data = load_data("digits", labels=25, noise=0.2)
    for x, y in train_loader(data, 128, seed=0, epoch=3, start=5 * 128):  # from the sixth batch on
        x, targets = mix(x, y, data.classes, mixup=0.8, generator=generator("mix", 0, 3, 5))

Nothing is downloaded, and everything random is a function of a key (``gpdfx.data.splits``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..errors import InputError, near
from .sources import load_cifar10, load_digits, load_imagefolder, load_mnist1d
from .splits import Data, few_labels, noisy_labels

SOURCES: dict[str, Callable[..., Data]] = {
    "digits": load_digits,
    "mnist1d": load_mnist1d,
    "cifar10:PATH": load_cifar10,
    "imagefolder:PATH": load_imagefolder,
}


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
    usages = {usage.partition(":")[0]: usage for usage in SOURCES}
    if kind not in usages:
        raise InputError(f"there is no source {source!r}", remedy=near(kind, usages.values()))
    usage = usages[kind]
    if not bool(colon) == bool(path) == (":" in usage):
        raise InputError(f"source {source!r} is not complete", remedy=f"write {usage}")
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
