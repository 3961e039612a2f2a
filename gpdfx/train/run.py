"""Train a student with its dynamic teacher, from the data to files, and go on where a run stopped.

    summary = train(TrainConfig(data="digits", out="run"))

The folder of a run holds ``state.safetensors`` (the checkpoint), ``log.csv``, ``tensorboard/``,
and at the end ``student.safetensors`` (the plain student's ``state_dict``), ``teacher.safetensors``
(for ``gpdfx.load``), ``curves.png`` and ``summary.json``. The same call on a folder that holds a
checkpoint goes on from there. Randomness is a function of seed, epoch and step, so that a run which
was killed ends, on CPUs, with the same parameters bit for bit.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import models
from ..data.datasets import load_data
from ..data.loaders import mix, steps_per_epoch, train_loader
from ..data.splits import Data, Split, generator
from ..errors import InputError
from ..storage import save, version
from . import log
from . import state as states
from .config import TrainConfig as TrainConfig
from .evaluate import accuracies, check_logits
from .runner import check_way
from .step import Net, Place, Stepper, freeze_idle, join, make_net
from .step_time import Clock

STATE, STUDENT, TEACHER, SUMMARY = (
    "state.safetensors",
    "student.safetensors",
    "teacher.safetensors",
    "summary.json",
)


def train(config: TrainConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Train, or go on training, in ``config.out``; see ``TrainConfig`` for what there is to ask.

    Under ``torchrun`` every process trains on its part of each batch, and the first one writes.

    Returns:
        The summary, as in ``summary.json``: ``config``, ``versions``, ``parameters``,
        ``validation`` and ``test`` accuracies, ``skipped`` steps, ``step_time``, ``seconds``.

    Raises:
        InputError: something that does not fit: names, data, weights; or a folder with a run of
            other settings, a damaged checkpoint or other files, which stay as they are.
        TrainingError: ``config.patience`` steps in a row without a finite loss.
    """
    log.check_installed()
    with join(config.device) as place:
        return Run(config, place, quiet or place.rank > 0).go()


class Run:
    """A run between its checkpoints. ``epoch``, ``step`` (in it): what is done."""

    def __init__(self, config: TrainConfig, place: Place, quiet: bool) -> None:
        self.config, self.place, self.quiet = config, place, quiet
        self.recipe, self.out = config.numbers, Path(config.out)
        check_way(config, place)
        saved = self._look()
        place.wait()  # before the first rank writes what the others look for
        self.data = open_data(config)
        self.steps = steps_per_epoch(self.data, self.recipe.batch_size)
        static_hash = states.hash_file(config.static_weights) if config.static_weights else None
        self.identity = {
            "config": config.identity(),
            "data": {
                "classes": self.data.classes,
                "shape": list(self.data.shape),
                "samples": len(self.data.train),
            },
            "static": static_hash,
        }
        if saved is not None:
            states.check_same(saved[1]["identity"], self.identity, self.out)
        self.epoch = self.step = 0
        self.history: list[dict[str, Any]] = []
        self.sums: dict[str, float] = {}
        self.seconds, self.began = 0.0, time.perf_counter()
        self.static_accuracy: float | None = None
        self._build(begin=saved is None)
        if saved is not None:
            self._restore(*saved)

    def _look(self) -> tuple[states.Tensors, states.Facts] | None:
        """The checkpoint, if there is one; refuse a folder with anything else in it."""
        if (self.out / STATE).exists():
            return states.read_state(self.out / STATE)
        strange = [p.name for p in self.out.glob("*") if p.name != f"{STATE}.tmp"]
        if strange:
            raise InputError(
                f"the folder {self.out} is not empty and holds no run: {', '.join(strange[:3])}",
                remedy="give a new folder",
            )
        return None

    # ---- networks
    def _build(self, begin: bool) -> None:
        config, data, device = self.config, self.data, self.place.device
        student = models.load(
            config.student, classes=data.classes, shape=data.shape, seed=config.seed
        )
        if config.weights and begin:
            models.load_weights(student, config.weights)
        example = torch.randn(2, *data.shape, generator=generator("example", config.seed))
        check_logits(config.student, student, example, data.classes)
        self.static: nn.Module | None = None
        if config.static_teacher:
            self.static = models.load(
                config.static_teacher, classes=data.classes, shape=data.shape, seed=config.seed
            )
            if config.static_weights:
                models.load_weights(self.static, config.static_weights)
            check_logits(config.static_teacher, self.static, example, data.classes)
            self.static.eval().requires_grad_(False).to(device)
        self.net: Net = make_net(config, student, self.static, example, config.verify and begin)
        self.net.to(device)
        if self.place.world > 1:
            freeze_idle(self.net, example.to(device), torch.tensor([0, 1], device=device))
        self.stepper = Stepper(self.net, config, self.place, self.steps)
        self.clock = Clock(self.net, self.stepper)

    def _restore(self, tensors: states.Tensors, facts: states.Facts) -> None:
        states.restore_module(self.net, tensors)
        states.restore_optimizer(self.stepper.optimizer, tensors, facts["optimizer"])
        if facts["scaler"]:
            self.stepper.scaler.load_state_dict(facts["scaler"])
        self.stepper.skipped, self.stepper.in_row = facts["skipped"], facts["in_row"]
        self.epoch, self.step, self.sums = facts["epoch"], facts["step"], facts["sums"]
        self.history, self.seconds = facts["history"], facts["seconds"]
        self.static_accuracy = facts["static_accuracy"]

    def _save(self) -> None:
        self.place.share([*self.net.buffers()])
        if self.place.rank > 0:
            return
        tensors, optimizer = states.flatten_optimizer(self.stepper.optimizer.state_dict())
        facts = {
            "identity": self.identity,
            "versions": versions(),
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
            "static_accuracy": self.static_accuracy,
            "seconds": self._elapsed(),
            "skipped": self.stepper.skipped,
            "in_row": self.stepper.in_row,
            "scaler": self.stepper.scaler.state_dict(),
            "optimizer": optimizer,
        }
        states.write_state(self.out / STATE, tensors | states.flatten_module(self.net), facts)

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began

    # ---- the loop
    def go(self) -> dict[str, Any]:
        """Train what is left, and write everything."""
        finished = self.out / SUMMARY
        if self.epoch == self.recipe.epochs and finished.exists():
            summary: dict[str, Any] = json.loads(finished.read_text())
            return summary
        if self.place.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
        begin = not self.epoch and not self.step
        if begin and self.static is not None and self.static_accuracy is None:
            (self.static_accuracy,) = self._accuracies(self.data.validation, [self.static])
        if begin:
            self._save()
        self.bars = log.Watch(
            self.out, self.recipe.epochs, self.epoch, quiet=self.quiet, board=self.place.rank == 0
        )
        try:
            if not begin:
                self.bars.say(f"going on after epoch {self.epoch}, step {self.step}")
            while self.epoch < self.recipe.epochs:
                self._run_epoch()
        finally:
            self.bars.close()
        return self._finish()

    def _run_epoch(self) -> None:
        config, recipe, place = self.config, self.recipe, self.place
        batches = train_loader(
            self.data,
            recipe.batch_size,
            seed=config.seed,
            epoch=self.epoch,
            start=self.step * recipe.batch_size,
            workers=config.workers,
            rank=place.rank,
            world=place.world,
        )
        self.net.epoch = self.epoch
        self.net.train()
        self.bars.begin_epoch(self.steps, self.step)
        for x, y in batches:
            x = x.to(place.device, non_blocking=True)
            y = y.to(place.device, non_blocking=True)
            at = self.epoch * self.steps + self.step
            if recipe.mixup or recipe.cutmix:
                draw = generator("mix", config.seed, at, place.rank)
                mixing = {"mixup": recipe.mixup, "cutmix": recipe.cutmix}
                x, y = mix(x, y, self.data.classes, generator=draw, **mixing)
            values = self.clock(x, y, at)
            for name, value in (values or {}).items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.sums["steps"] = self.sums.get("steps", 0.0) + (values is not None)
            self.step += 1
            self.bars.advance(values)
            if config.checkpoint_every and (at + 1) % config.checkpoint_every == 0:
                self._save()
        self._end_epoch()

    def _end_epoch(self) -> None:
        place, sums = self.place, dict(self.sums)
        place.share([*self.net.buffers()])
        good = sums.pop("steps", 0.0)
        names = sorted(sums)
        totals = torch.tensor([*(sums[n] for n in names), good], dtype=torch.float64)
        *total, good = place.add(totals.to(place.device)).tolist()
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": (self.epoch + 1) * self.steps,
            "lr": self.stepper.optimizer.param_groups[0]["lr"],
        }
        means = {n: t / good if good else math.nan for n, t in zip(names, total, strict=True)}
        row["loss"] = means.pop("loss", math.nan)
        row |= {f"loss_{name}": value for name, value in means.items()}
        row |= self._measure(self.data.validation)
        row |= {"skipped": self.stepper.skipped, "seconds": self._elapsed()}
        self.history.append(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        self._save()
        if place.rank == 0:
            log.write_log(self.out / "log.csv", self.history)
        self.bars.end_epoch(row)

    # ---- measuring
    def _measure(self, split: Split) -> dict[str, float]:
        """Accuracies of the plain student and the dynamic teacher, and the gap."""
        self.net.eval()
        networks: list[Callable[[Tensor], Any]] = [self.net.collapse()]
        once: AbstractContextManager[None] = nullcontext()
        if self.net.teacher is not None:
            networks.append(self.net.teacher)
            once = self.net.teacher._folded_once()
        with once:
            student, *rest = self._accuracies(split, networks)
        self.net.train()
        return {"student": student} | (
            {"teacher": rest[0], "gap": rest[0] - student} if rest else {}
        )

    def _accuracies(self, split: Split, networks: list[Callable[[Tensor], Any]]) -> list[float]:
        return accuracies(split, networks, self.recipe.batch_size, self.place, self.config.workers)

    # ---- the end
    def _finish(self) -> dict[str, Any]:
        last = self.history[-1]
        final: dict[str, Any] = {k: last[k] for k in ("student", "teacher", "gap") if k in last}
        best = max(self.history, key=lambda row: row["student"])
        final["best"] = {"student": best["student"], "epoch": best["epoch"]}
        test = self._measure(self.data.test)
        student = self.net.collapse()
        parameters = {"student": _count(student)}
        macs: dict[str, int] = {}
        if self.net.teacher is not None:
            parameters["teacher"] = _count(self.net.teacher)
            macs = dict(zip(("student", "teacher"), self.net.teacher.report().macs, strict=True))
        if self.static is not None:
            final["static"] = self.static_accuracy
            (test["static"],) = self._accuracies(self.data.test, [self.static])
            parameters["static"] = _count(self.static)
        summary = {
            "title": f"{self.config.student} on {self.config.data}",
            "config": states.as_json(self.config),
            "versions": versions(),
            "device": _name(self.place),
            "world": self.place.world,
            "classes": self.data.classes,
            "shape": list(self.data.shape),
            "parameters": parameters,
            "multiply_adds": macs,
            "validation": final,
            "test": test,
            "skipped": self.stepper.skipped,
            "steps": self.epoch * self.steps,
            "step_time": self.clock.result(),
            "seconds": self._elapsed(),
            "out": str(self.out),
        }
        if self.place.rank == 0:
            state = {k: x.cpu().clone().contiguous() for k, x in student.state_dict().items()}
            with states.Replacing(self.out / STUDENT) as fresh:
                save_file(state, fresh)
            if self.net.teacher is not None and not self.config.unshared:
                save(self.net.teacher, self.out / TEACHER)
            log.write_log(self.out / "log.csv", self.history)
            title = str(summary["title"])
            log.draw(self.out / "curves.png", self.history, self.static_accuracy, title)
            states.write_text(self.out / SUMMARY, json.dumps(summary, indent=1) + "\n")
        self.place.wait()
        return summary


# --------------------------------------------------------------------------- parts
def open_data(config: TrainConfig) -> Data:
    """The data of a run."""
    return load_data(
        config.data,
        seed=config.seed,
        labels=config.labels,
        noise=config.noise,
        size=config.size,
    )


def versions() -> dict[str, str]:
    """Of what computes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpdfx": version(),
    }


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _name(place: Place) -> str:
    cuda = place.device.type == "cuda"
    return torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
