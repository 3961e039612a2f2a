"""Data and recipes: what is random depends on its key alone, and bad files are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpdfx
from gpdfx.data.loaders import epoch_order, eval_loader, mix, steps_per_epoch, train_loader
from gpdfx.data.sources import (
    CIFAR_MEAN,
    CIFAR_RECORD,
    CIFAR_STD,
    CIFAR_TEST,
    CIFAR_TRAIN,
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_data,
)
from gpdfx.data.splits import Data, Split, generator
from gpdfx.train.recipes import (
    RECIPES,
    TrainingRecipe,
    get_recipe,
    learning_rate,
    lr_factor,
    make_optimizer,
    set_learning_rate,
    with_changes,
)

Batches = list[tuple[Tensor, Tensor]]


def refused(call: Callable[[], Any], *words: str) -> None:
    """An InputError with a remedy and these words."""
    with pytest.raises(gpdfx.InputError) as caught:
        call()
    assert caught.value.remedy
    for word in words:
        assert word in str(caught.value)


def tensors(split: Split) -> tuple[Tensor, Tensor]:
    pairs = [split[i] for i in range(len(split))]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def batches(loader: Iterable[Any]) -> Batches:
    return [(x, y) for x, y in loader]


def same(one: Batches, other: Batches) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def part_of(data: Data, count: int) -> Data:
    """The first training samples alone, for speed."""
    train = data.train.subset(torch.arange(count))
    return Data(data.name, train, data.validation, data.test, data.classes, data.shape)


# --------------------------------------------------------------------------- sources
@pytest.mark.parametrize(
    ("source", "sizes", "shape"),
    [("digits", (1347, 150, 300), (1, 8, 8)), ("mnist1d", (3600, 400, 1000), (1, 40))],
)
def test_sources(source: str, sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    data = load_data(source, augment=False)
    splits = (data.train, data.validation, data.test)
    assert tuple(map(len, splits)) == sizes
    assert data.shape == shape
    assert data.classes == 10
    x, y = data.train[0]
    assert x.shape == shape
    assert x.dtype == torch.float32
    assert type(y) is int
    used = torch.cat([split.indices for split in splits])
    assert len(used.unique()) == sum(sizes), "a sample is in two splits"
    assert len(data.test.labels.unique()) == 10


@pytest.mark.parametrize("source", ["digits", "mnist1d"])
def test_seed_chooses_validation_and_never_the_test_set(source: str) -> None:
    one, again, other = (load_data(source, seed=seed, augment=False) for seed in (1, 1, 2))
    for name in ("train", "validation", "test"):
        for a, b in zip(tensors(getattr(one, name)), tensors(getattr(again, name)), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(one.validation.indices, other.validation.indices)
    for a, b in zip(tensors(one.test), tensors(other.test), strict=True):
        assert torch.equal(a, b)


def test_digits_are_standardised() -> None:
    data = load_data("digits", augment=False)
    x = torch.cat([tensors(data.train)[0], tensors(data.validation)[0]])
    assert abs(x.mean().item()) < 1e-4
    assert abs(x.std().item() - 1) < 1e-4


def test_mnist1d_is_neither_hopeless_nor_trivial() -> None:
    data = load_data("mnist1d")
    x, y = tensors(data.train)
    assert torch.bincount(torch.cat([y, data.validation.labels, data.test.labels])).tolist() == (
        [500] * 10
    )
    means = torch.stack([x[y == c].mean(0).flatten() for c in range(10)])
    test, labels = tensors(data.test)
    accuracy = (torch.cdist(test.flatten(1), means).argmin(1) == labels).float().mean().item()
    assert 0.2 < accuracy < 0.6  # chance is 0.1


# --------------------------------------------------------------------------- labels and noise
def test_labels_per_class() -> None:
    few, more = (load_data("digits", seed=3, labels=n) for n in (7, 20))
    assert torch.bincount(few.train.labels).tolist() == [7] * 10
    assert torch.bincount(more.train.labels).tolist() == [20] * 10
    assert set(few.train.indices.tolist()) < set(more.train.indices.tolist())
    assert len(few.validation) == 150
    truth = load_data("digits", seed=3).train
    right = dict(zip(truth.indices.tolist(), truth.labels.tolist(), strict=True))
    assert [right[i] for i in few.train.indices.tolist()] == few.train.labels.tolist()


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_noise_changes_that_part_of_the_training_labels_alone(noise: float) -> None:
    clean, noisy, other = (
        load_data("digits", seed=seed, noise=p) for seed, p in ((0, 0.0), (0, noise), (1, noise))
    )
    wrong = clean.train.labels != noisy.train.labels
    assert torch.equal(clean.train.indices, noisy.train.indices)
    assert wrong.sum().item() == round(noise * len(wrong))
    assert noisy.train.labels.min() >= 0
    moved = (noisy.train.labels - clean.train.labels)[wrong] % 10
    counts = torch.bincount(moved, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 0.5 * counts.sum() / 9, "not uniform over the other classes"
    assert torch.equal(clean.validation.labels, noisy.validation.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    assert noisy.train[int(wrong.nonzero()[0])][1] == noisy.train.labels[wrong][0]
    assert not torch.equal(noisy.train.labels, other.train.labels)


def test_noise_falls_on_the_labels_that_are_kept() -> None:
    clean, noisy = (load_data("digits", labels=20, noise=p) for p in (0.0, 0.25))
    assert torch.equal(clean.train.indices, noisy.train.indices)
    assert (clean.train.labels != noisy.train.labels).sum() == 50


# --------------------------------------------------------------------------- order
def test_batches_depend_on_seed_and_epoch_alone() -> None:
    data = part_of(load_data("digits"), 200)

    def epoch(seed: int = 0, number: int = 0, **options: int) -> Batches:
        return batches(train_loader(data, 32, seed=seed, epoch=number, **options))

    one = epoch()
    assert len(one) == steps_per_epoch(data, 32) == 6
    assert all(x.shape == (32, 1, 8, 8) and y.shape == (32,) for x, y in one)
    torch.manual_seed(123)  # the state of the global generator does not matter
    before = torch.get_rng_state()
    assert same(one, epoch())
    assert torch.equal(before, torch.get_rng_state()), "the loader used up global randomness"
    assert not same(one, epoch(seed=1))
    assert not same(one, epoch(number=1))
    assert same(one, epoch(workers=2))
    assert same(one[2:], epoch(start=2 * 32))
    assert same(one[2:], epoch(start=2 * 32, workers=2))


def test_augmentation_differs_by_epoch_and_sample() -> None:
    data = part_of(load_data("digits"), 40)
    plain = tensors(part_of(load_data("digits", augment=False), 40).train)[0]

    def epoch(number: int) -> dict[int, Tensor]:
        loader = train_loader(data, 40, seed=0, epoch=number)
        order = epoch_order(40, 0, number)
        return dict(zip(order, next(iter(loader))[0], strict=True))

    first, second = epoch(0), epoch(1)
    changed = sum(not torch.equal(first[i], second[i]) for i in range(40))
    moved = sum(not torch.equal(first[i], plain[i]) for i in range(40))
    assert 20 < changed < 40  # 8 in 9, on average
    assert 20 < moved < 40


def test_shift_is_by_one_pixel() -> None:
    one, many = load_data("digits", augment=False), load_data("digits")
    background = one.train[0][0].min()
    x = torch.full((1, 10, 10), background.item())
    x[:, 1:9, 1:9] = one.train[0][0]
    possible = [x[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    seen = set()
    for _ in range(150):
        y = many.train[0][0]
        hits = [k for k, p in enumerate(possible) if torch.equal(p, y)]
        assert hits, "not a shift by up to one pixel"
        seen.add(hits[0])
    assert len(seen) == 9


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one_process(world: int) -> None:
    data = part_of(load_data("digits"), 103)

    def rank(r: int, of: int, start: int = 0) -> Batches:
        return batches(train_loader(data, 16, seed=5, epoch=2, rank=r, world=of, start=start))

    whole = rank(0, 1)
    parts = [rank(r, world) for r in range(world)]
    assert [len(p) for p in parts] == [len(whole)] * world
    for step, (x, y) in enumerate(whole):
        assert all(len(p[step][1]) == 16 // world for p in parts)
        together = torch.stack([p[step][0] for p in parts], 1).flatten(0, 1)
        assert torch.equal(together, x)
        assert torch.equal(torch.stack([p[step][1] for p in parts], 1).flatten(), y)
    for r in range(world):  # and after a restart from one process to several
        assert same(parts[r][3:], rank(r, world, 48))


def test_sampler_leaves_out_the_tail_alone() -> None:
    parts = [epoch_order(11, 0, 0, rank=r, world=3) for r in range(3)]
    assert [len(p) for p in parts] == [3, 3, 3]
    assert len({i for p in parts for i in p}) == 9
    assert sorted(epoch_order(11, 0, 0)) == list(range(11))
    assert epoch_order(11, 0, 0) != list(range(11))
    assert epoch_order(11, 0, 0, start=12) == []


def test_small_data_still_gives_a_batch() -> None:
    data = load_data("digits", labels=2)
    assert [len(y) for _, y in batches(train_loader(data, 64, seed=0, epoch=0))] == [20]
    assert steps_per_epoch(data, 64) == 1


def test_eval_loader_keeps_every_sample() -> None:
    test = load_data("digits").test
    x, y = tensors(test)
    got = batches(eval_loader(test, 128))
    assert [len(b) for _, b in got] == [128, 128, 44]
    assert torch.equal(torch.cat([a for a, _ in got]), x)
    ranks = [torch.cat([b for _, b in eval_loader(test, 64, rank=r, world=7)]) for r in range(7)]
    assert sum(map(len, ranks)) == 300
    assert torch.equal(ranks[3], y[3::7])


# --------------------------------------------------------------------------- CIFAR-10
def write_cifar(folder: Path, per_file: int = 10) -> np.ndarray:
    """Six tiny files; returns the records of the test file (per_file, 3073)."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in (*CIFAR_TRAIN, CIFAR_TEST):
        records = draw.integers(0, 256, (per_file, CIFAR_RECORD), dtype=np.uint8)
        records[:, 0] = np.arange(per_file) % 10
        records.tofile(folder / name)
    return records


def test_cifar10(tmp_path: Path) -> None:
    records = write_cifar(tmp_path / "cifar-10-batches-bin")
    data = load_data(f"cifar10:{tmp_path}", augment=False)
    assert (len(data.train), len(data.validation), len(data.test)) == (45, 5, 10)
    x, y = data.test[3]
    assert x.shape == data.shape == (3, 32, 32)
    assert y == 3
    for channel, row, column in ((0, 0, 1), (1, 5, 0), (2, 31, 31)):
        byte = int(records[3, 1 + channel * 1024 + row * 32 + column])
        expected = (byte / 255 - CIFAR_MEAN[channel]) / CIFAR_STD[channel]
        assert abs(x[channel, row, column].item() - expected) < 1e-5
    direct = load_data(f"cifar10:{tmp_path / 'cifar-10-batches-bin'}", augment=False)
    assert torch.equal(direct.test[3][0], x)


def test_cifar10_augmentation(tmp_path: Path) -> None:
    """Every image is a crop of the padded one, mirrored or not."""
    write_cifar(tmp_path / "bin")
    source = f"cifar10:{tmp_path / 'bin'}"
    plain, moved = load_data(source, augment=False), load_data(source)
    x = plain.train[0][0]
    black = (-torch.tensor(CIFAR_MEAN) / torch.tensor(CIFAR_STD)).reshape(3, 1, 1)
    wide = black.expand(3, 40, 40).clone()
    wide[:, 4:36, 4:36] = x
    crops = {(i, j): wide[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)}
    mirrored = 0
    for _ in range(20):
        y = moved.train[0][0]
        upright = any(torch.allclose(y, c, atol=1e-5) for c in crops.values())
        mirrored += not upright
        assert upright or any(torch.allclose(y.flip(-1), c, atol=1e-5) for c in crops.values())
    assert 0 < mirrored < 20
    assert torch.equal(moved.test[0][0], plain.test[0][0])


def test_cifar10_refusals(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cut")
    path = tmp_path / "cut" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-100])
    refused(lambda: load_data(f"cifar10:{tmp_path / 'cut'}"), "data_batch_3.bin", "30630", "3073")
    path.write_bytes(b"")
    refused(lambda: load_data(f"cifar10:{tmp_path / 'cut'}"), "data_batch_3.bin", "0 bytes")
    path.write_bytes(bytes([77]) + bytes(CIFAR_RECORD - 1))
    refused(lambda: load_data(f"cifar10:{tmp_path / 'cut'}"), "label 77")
    path.unlink()
    (tmp_path / "cut" / CIFAR_TEST).unlink()
    refused(lambda: load_data(f"cifar10:{tmp_path / 'cut'}"), "data_batch_3.bin, test_batch.bin")
    refused(lambda: load_data(f"cifar10:{tmp_path / 'nowhere'}"), "nowhere", "binary version")


class Trap:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar10_pickles_are_never_read(tmp_path: Path, inner: str) -> None:
    import pickle

    folder = tmp_path / "data" / inner
    folder.mkdir(parents=True)
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(trap)
    refused(lambda: load_data(f"cifar10:{tmp_path / 'data'}"), "pickle", "cifar-10-batches-bin")
    assert not (tmp_path / "sprung").exists()


# --------------------------------------------------------------------------- image folders
@pytest.fixture
def images(tmp_path: Path) -> Path:
    from PIL import Image

    for split, count in (("train", 6), ("val", 3)):
        for c, colour in (("ant", (200, 30, 30)), ("bee", (30, 30, 200))):
            folder = tmp_path / split / c
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (40 + i, 50), colour)
                image.putpixel((3 + i, 7), (255, 255, 255))
                image.save(folder / f"{i}.png")
    return tmp_path


def test_imagefolder(images: Path) -> None:
    data = load_data(f"imagefolder:{images}", size=28)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 6, 6)
    assert data.classes == 2
    assert data.shape == (3, 28, 28)
    for split in (data.train, data.validation, data.test):
        x, y = split[len(split) - 1]
        assert x.shape == data.shape
        assert type(x) is Tensor
        assert y == 1
    x = data.validation[0][0]
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    expected = (torch.tensor([200, 30, 30]) / 255 - mean) / std
    assert torch.allclose(x[:, -1, -1], expected, atol=1e-5)
    assert load_data(f"imagefolder:{images}").shape == (3, 224, 224)
    few = load_data(f"imagefolder:{images}", size=28, labels=2, noise=1.0)
    assert few.train.labels.tolist() == [1, 1, 0, 0]
    assert len(few.validation) == 6


def test_imagefolder_is_deterministic(images: Path) -> None:
    data = load_data(f"imagefolder:{images}", size=28)
    one, again = (batches(train_loader(data, 4, seed=0, epoch=1)) for _ in range(2))
    assert same(one, again)
    assert same(one, batches(train_loader(data, 4, seed=0, epoch=1, workers=2)))
    assert not same(one, batches(train_loader(data, 4, seed=0, epoch=2)))


def test_imagefolder_refusals(images: Path) -> None:
    refused(lambda: load_data(f"imagefolder:{images}/nowhere"), "nowhere/train", "nowhere/val")
    (images / "val" / "cow").mkdir()
    refused(lambda: load_data(f"imagefolder:{images}"), "cow", "at least one image")
    (images / "val" / "cow").rmdir()
    (images / "val" / "bee").rename(images / "val" / "wasp")
    refused(lambda: load_data(f"imagefolder:{images}"), "different classes", "bee", "wasp")
    (images / "empty" / "train").mkdir(parents=True)
    (images / "empty" / "val").mkdir()
    refused(lambda: load_data(f"imagefolder:{images}/empty"), "empty/train")


# --------------------------------------------------------------------------- bad arguments
@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("digit", {}, ("'digit'", "did you mean digits?")),
        ("cifar", {}, ("cifar10:PATH",)),
        ("qqq", {}, ("choose from digits, mnist1d, cifar10:PATH, imagefolder:PATH",)),
        ("", {}, ("choose from digits",)),
        ("cifar10", {}, ("write cifar10:PATH",)),
        ("cifar10:", {}, ("write cifar10:PATH",)),
        ("digits:here", {}, ("write digits",)),
        ("digits", {"size": 32}, ("imagefolder",)),
        ("imagefolder:x", {"size": 0}, ("size is 0",)),
        ("digits", {"labels": 0}, ("labels is 0",)),
        ("digits", {"labels": 2.5}, ("labels is 2.5",)),
        ("digits", {"labels": 500}, ("labels is 500", "pass at most labels=1")),
        ("digits", {"noise": 1.5}, ("noise is 1.5",)),
        ("digits", {"noise": math.nan}, ("noise is nan",)),
    ],
)
def test_bad_sources(source: str, options: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: load_data(source, **options), *words)


def test_missing_extras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("sklearn.datasets", "torchvision.datasets"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    refused(lambda: load_data("digits"), "pip install '.[train]'")
    refused(lambda: load_data(f"imagefolder:{tmp_path}"), "pip install '.[vision]'")
    load_data("mnist1d")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"world": 3}, "shared equally by 3"),
        ({"rank": 2, "world": 2}, "rank is 2"),
        ({"workers": -1}, "workers is -1"),
        ({"start": -1}, "start is -1"),
    ],
)
def test_bad_loaders(options: dict[str, int], word: str) -> None:
    data = load_data("digits")
    arguments = {"batch_size": 16, "seed": 0, "epoch": 0, **options}
    refused(lambda: train_loader(data, **arguments), word)


# --------------------------------------------------------------------------- mixup and cutmix
@pytest.mark.parametrize("shape", [(3, 9, 14), (2, 40)])
def test_cutmix_targets_are_the_areas(shape: tuple[int, ...]) -> None:
    y = torch.arange(8)
    x = torch.arange(8.0).reshape(-1, *(1,) * len(shape)).expand(-1, *shape).contiguous()
    shares = set()
    for step in range(30):
        mixed, targets = mix(x, y, 8, cutmix=1.0, generator=generator("cut", step))
        area = torch.stack([(mixed == c).float().flatten(1).mean(1) for c in range(8)], 1)
        assert torch.allclose(targets, area, atol=1e-6)
        assert torch.allclose(targets.sum(1), torch.ones(8))
        own = targets[0, 0].item()
        shares.add(round(own, 4))
        for n in range(8):  # the box is a box, the same in all samples and channels
            where = (mixed[n] != n).any(0)
            assert torch.equal(where, (mixed[n] != n).all(0))
            if where.any():
                spots = where.nonzero()
                box = spots.max(0).values - spots.min(0).values + 1
                assert box.prod() == where.sum()
    assert len(shares) > 10
    assert torch.equal(x[:, 0].flatten(1)[:, 0], y.float()), "the batch itself was changed"


def test_mixup_mixes_inputs_as_targets() -> None:
    y = torch.tensor([0, 1, 2, 1, 0])
    x = torch.eye(3)[y].reshape(5, 3, 1, 1).expand(-1, -1, 4, 4)
    shares = set()
    for step in range(20):
        mixed, targets = mix(x, y, 3, mixup=0.8, generator=generator("mixup", step))
        assert torch.allclose(mixed.mean((2, 3)), targets, atol=1e-6)
        assert torch.allclose(targets.sum(1), torch.ones(5))
        shares |= {round(t, 4) for t in targets.flatten().tolist()}
    assert len(shares) > 20


def test_mix_draws_from_its_generator_alone() -> None:
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6)
    state = torch.get_rng_state()

    def once(seed: int) -> tuple[Tensor, Tensor]:
        return mix(x, y, 6, mixup=0.8, cutmix=1.0, generator=generator(seed))

    assert all(torch.equal(a, b) for a, b in zip(once(1), once(1), strict=True))
    assert not torch.equal(once(1)[0], once(2)[0])
    assert torch.equal(state, torch.get_rng_state())
    mixed = [once(seed)[0] for seed in range(60)]
    whole = sum((m != x).flatten(1).any(1).any() and not _has_pixels_of(m, x) for m in mixed)
    assert 15 < whole < 45, "mixup and cutmix do not take turns evenly"
    same_x, targets = mix(x, y, 6, generator=generator(0))
    assert same_x is x
    assert torch.equal(targets, torch.eye(6))
    refused(lambda: mix(x, y, 6, mixup=-1.0, generator=generator(0)), "mixup is -1.0")


def _has_pixels_of(mixed: Tensor, x: Tensor) -> bool:
    """All values of ``mixed`` are values of x: cutmix."""
    return bool(torch.isin(mixed, x).all())


# --------------------------------------------------------------------------- recipes
def test_step_schedule() -> None:
    recipe = RECIPES["resnet18"]
    at = {0: 1, 29: 1, 30: 0.1, 59: 0.1, 60: 0.01, 90: 0.001, 99: 0.001}
    for epoch, factor in at.items():
        assert lr_factor(recipe, epoch * 5004, 5004) == pytest.approx(factor)
    assert lr_factor(recipe, 30 * 5004 - 1, 5004) == 1
    assert learning_rate(recipe, 60 * 7, 7) == pytest.approx(0.001)


def test_cosine_schedule() -> None:
    recipe = TrainingRecipe(epochs=12, batch_size=8, lr=0.5, warmup_epochs=2)
    at = {0: 0.05, 4: 0.25, 9: 0.5, 10: 0.5, 35: 0.25, 60: 0.0, 99: 0.0}
    for step, rate in at.items():
        assert learning_rate(recipe, step, 5) == pytest.approx(rate, abs=1e-12)
    assert 0 < learning_rate(recipe, 59, 5) < 0.001
    third = 10 + 50 / 3  # cos(60 degrees)
    low, high = (learning_rate(recipe, int(third) + i, 5) for i in (1, 0))
    assert low < 0.375 < high
    always = with_changes(recipe, epochs=2)
    assert [lr_factor(always, s, 2) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    refused(lambda: lr_factor(recipe, -1, 5), "step is -1")


def test_make_optimizer_keeps_what_groups_bring() -> None:
    weight, bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [weight], "lr": 0.4}, {"params": [bias], "weight_decay": 0.0}]
    recipe = TrainingRecipe(
        epochs=4,
        batch_size=8,
        lr=0.1,
        momentum=0.7,
        schedule="step",
        milestones=[2],  # type: ignore[arg-type]
    )
    optimizer = make_optimizer(recipe, groups)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [g["momentum"] for g in optimizer.param_groups] == [0.7, 0.7]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0.0]
    for step, rates in ((0, [0.4, 0.1]), (5, [0.4, 0.1]), (6, [0.04, 0.01]), (0, [0.4, 0.1])):
        set_learning_rate(optimizer, recipe, step, 3)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(rates)
    adamw = make_optimizer(RECIPES["vit"], [weight])
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["weight_decay"] == 0.05


def test_recipes_of_the_paper() -> None:
    cnn, mobile, vit = (RECIPES[name] for name in ("resnet18", "mobilenet", "vit"))
    assert (cnn.optimizer, cnn.batch_size, cnn.lr, cnn.momentum) == ("sgd", 256, 0.1, 0.9)
    assert (cnn.weight_decay, cnn.epochs, cnn.milestones) == (1e-4, 100, (30, 60, 90))
    assert (cnn.kd_beta, mobile.kd_beta, cnn.lam, cnn.temperature) == (0.5, 2.0, 3.0, 1.0)
    assert (vit.optimizer, vit.epochs, vit.weight_decay) == ("adamw", 300, 0.05)
    assert (vit.mixup, vit.cutmix, vit.label_smoothing) == (0.8, 1.0, 0.1)
    assert vit.lr == pytest.approx(5e-4 * vit.batch_size / 512)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epoch": 3}, ("no epoch", "epochs")),
        ({"epochs": 0, "lr": -1.0}, ("epochs is 0", "lr is -1.0")),
        ({"epochs": True}, ("epochs is True",)),
        ({"epochs": 2.5}, ("epochs is 2.5",)),
        ({"lr": math.nan}, ("lr is nan",)),
        ({"lr": "0.1"}, ("lr is '0.1'",)),
        ({"optimizer": "lion"}, ("optimizer is 'lion'", "sgd, adamw")),
        ({"schedule": "linear"}, ("schedule is 'linear'",)),
        ({"schedule": "step"}, ("no milestones",)),
        ({"milestones": (5, 3)}, ("ascending",)),
        ({"label_smoothing": 1.2}, ("label_smoothing is 1.2",)),
        ({"clip": 0}, ("clip is 0",)),
        ({"temperature": 0.0}, ("temperature is 0.0",)),
        ({"warmup_epochs": 31}, ("warmup_epochs is 31",)),
        ({"kd": "dk"}, ("none, kd, dkd, reviewkd",)),
    ],
)
def test_bad_recipes(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: with_changes(RECIPES["digits"], **changes), *words)


def test_with_changes() -> None:
    recipe = get_recipe("digits")
    changed = with_changes(recipe, epochs=2, clip=None)
    assert (changed.epochs, changed.clip, changed.lr) == (2, None, recipe.lr)
    assert recipe == RECIPES["digits"]
    refused(lambda: get_recipe("digit"), "did you mean digits")
    refused(lambda: get_recipe("qqqq"), "choose from resnet18")


@pytest.mark.parametrize("name", ["digits", "mnist1d"])
def test_fused_updates_are_the_plain_ones(name: str) -> None:
    """Also of a layer whose first gradient comes later than the others'."""
    torch.manual_seed(0)
    recipe = with_changes(RECIPES[name], lr=0.1)
    begun, grads = torch.randn(3, 5), torch.randn(4, 3, 5)
    updated = []
    for fused in (False, True):
        one, late = nn.Parameter(begun.clone()), nn.Parameter(begun.clone())
        optimizer = make_optimizer(recipe, [one, late], fused=fused)
        for step, grad in enumerate(grads):
            one.grad, late.grad = grad.clone(), grad.clone() if step > 1 else None
            optimizer.step()
        updated.append(torch.stack([one.detach(), late.detach()]))
    torch.testing.assert_close(*updated)
    assert not torch.equal(updated[0][1], begun)
