"""Train a student with its dynamic teacher, from the data to files, and go on where a run stopped.

    summary = train(TrainConfig(data="digits", out="run"))

The folder of a run holds ``state.safetensors`` (the checkpoint), ``student_best.safetensors`` (the
plain student's ``state_dict`` after the epoch that was the best on validation), ``log.csv``,
``tensorboard/``, and at the end ``student.safetensors`` (after the last epoch),
``teacher.safetensors`` (for ``gpdfx.load``), ``curves.png`` and ``summary.json``. The same call on
a folder that holds a checkpoint goes on from there. Randomness is a function of seed, epoch and
step, so that a run which was killed ends, on CPUs and without ``amp``, with the same parameters bit
for bit; half precision ends within its rounding, for not every CPU's products of it are the same
twice.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import files, storage
from ..calls import progress
from ..data.loaders import mix, steps_per_epoch, train_loader
from ..data.splits import Split, generator
from ..errors import InputError
from . import log
from . import state as states
from .config import TrainConfig as TrainConfig
from .config import notes_on
from .evaluate import accuracies, measure, read_summary
from .folder import hold, sweep
from .networks import example_inputs, fine_tune, freeze_idle, load_network, make_net
from .ranks import Ranks, join
from .state import BEST, STATE, STUDENT, SUMMARY, TEACHER
from .steps.estimate import Estimate, estimate
from .steps.runner import check_execution
from .steps.step import Stepper, TimedStepper


def train(config: TrainConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Train, or go on training, in ``config.out``; see ``TrainConfig`` for what there is to ask.

    Under ``torchrun`` every process trains on its part of each batch, and the first one writes.

    Returns:
        The summary, as in ``summary.json``: ``config``, ``versions``, ``parameters``,
        ``validation`` and ``test`` accuracies, ``notes``, ``skipped`` steps, ``step_time``,
        ``seconds``.

    Raises:
        InputError: something that does not fit: names, data, weights; or a folder in which another
            run is training, or with a run of other settings, a damaged checkpoint or other files,
            which stay as they are.
        TrainingError: ``config.patience`` steps in a row without a finite loss.
    """
    log.check_installed()
    with join(config.device) as ranks, hold(Path(config.out), ranks):
        return Run(config, ranks, quiet or ranks.rank > 0).finish()


class Run:
    """A run between its checkpoints."""

    def __init__(self, config: TrainConfig, ranks: Ranks, quiet: bool) -> None:
        self.config, self.ranks, self.quiet = config, ranks, quiet
        self.recipe, self.out = config.numbers, Path(config.out)
        check_execution(config, ranks)
        saved = states.find_checkpoint(self.out)
        ranks.wait()  # before the first rank writes what the others look for
        self.data = data = config.open_data()
        self.steps = steps_per_epoch(data, self.recipe.batch_size)
        static = config.static_weights
        self.sizes = {"classes": data.classes, "shape": [*data.shape]}
        self.identity = {
            "config": config.identity(),
            "data": self.sizes | {"samples": len(data.train)},
            "static": files.hash_file(static) if static else None,
        }
        if saved is not None:
            states.check_same(saved[1]["identity"], self.identity, self.out)
        if ranks.rank == 0:
            sweep(self.out)
        self.progress, self.began = states.Progress(), time.perf_counter()
        if saved is not None:
            names = dataclasses.asdict(self.progress)
            self.progress = states.Progress(**{name: saved[1][name] for name in names})
        if self.is_finished:
            return
        if saved is not None and not saved[0]:
            raise InputError(
                f"the run in {self.out} is finished, and its {SUMMARY} is not there any more",
                remedy="train in another folder; its student and its teacher are still there",
            )
        progress.at(f"loading {config.student}")
        with progress.shown(quiet=quiet):
            self._build(begin=saved is None)
        if saved is not None:
            self.stepper.restore(*saved)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.progress.epoch == self.recipe.epochs and (self.out / SUMMARY).exists()

    def _build(self, begin: bool) -> None:
        config, data, device = self.config, self.data, self.ranks.device
        load = partial(load_network, data=data, seed=config.seed)
        student = load(config.student)
        if begin:
            notes = notes_on(config, data) + fine_tune(student, config, data)
            self.progress.notes = notes
            for note in () if self.quiet else notes:
                progress.say(f"note: {note}")
        self.static: nn.Module | None = None
        if config.static_teacher:
            static = load(config.static_teacher, weights=config.static_weights)
            self.static = static.eval().requires_grad_(False).to(device)
        example = example_inputs(data, config.seed)
        self.net = make_net(config, student, self.static, example, config.verify and begin)
        self.net.to(device)
        if self.ranks.world > 1:
            freeze_idle(self.net, example.to(device), torch.tensor([0, 1], device=device))
        self.stepper = Stepper(self.net, config, self.ranks, self.steps)
        self.timed_stepper = TimedStepper(self.stepper)

    def _save(self) -> None:
        self.ranks.broadcast(self.net.buffers())
        if self.ranks.rank == 0:
            self._write(*self.stepper.flatten())

    def _write(self, tensors: files.Tensors, stepper: states.Facts) -> None:
        facts = {"identity": self.identity, "versions": states.versions()}
        facts |= dataclasses.asdict(self.progress) | {"seconds": self._seconds()} | stepper
        self.out.mkdir(parents=True, exist_ok=True)
        states.write_state(self.out / STATE, tensors, facts)

    def _close(self) -> None:
        """The checkpoint of a finished run keeps no tensors: ``gpdfx.load`` reads the teacher."""
        self._write({}, {})

    def _seconds(self) -> float:
        return self.progress.seconds + time.perf_counter() - self.began

    # ---- the loop
    def finish(self) -> dict[str, Any]:
        """Train what is left, and write everything."""
        if self.is_finished:
            return read_summary(self.out, log.SHOWN)
        done = self.progress
        begin = not done.epoch and not done.step
        if begin:
            done.cost = done.cost or states.as_json(estimate(self.stepper, self.data))
            if done.static_accuracy is None:
                done.static_accuracy = self._measure_static(self.data.validation).get("static")
            self._save()
        options = {"quiet": self.quiet, "board": self.ranks.rank == 0}
        shown = log.RunLog(self.out, self.recipe.epochs, done.epoch, **options)
        with contextlib.closing(shown) as self.log:
            if begin and done.cost and not self.quiet:
                self.log.say(str(Estimate(**done.cost)))
            if not begin:
                self._keep_best()
                self.log.say(f"going on after epoch {done.epoch}, step {done.step}")
            while done.epoch < self.recipe.epochs:
                self._run_epoch()
                self._end_epoch()
        return self._finish()

    def _run_epoch(self) -> None:
        config, recipe, ranks, done = self.config, self.recipe, self.ranks, self.progress
        size, share = recipe.batch_size, {"rank": ranks.rank, "world": ranks.world}
        keys = {"seed": config.seed, "epoch": done.epoch, "start": done.step * size}
        batches = train_loader(self.data, size, workers=config.workers, **keys, **share)
        alphas = {"mixup": recipe.mixup, "cutmix": recipe.cutmix}
        self.net.epoch = done.epoch
        self.net.train()
        self.log.begin_epoch(self.steps, done.step)
        for x, y in batches:
            x, y = (t.to(ranks.device, non_blocking=True) for t in (x, y))
            at = done.epoch * self.steps + done.step
            if any(alphas.values()):
                draw = generator("mix", config.seed, at, ranks.rank)
                x, y = mix(x, y, self.data.classes, generator=draw, **alphas)
            values = self.timed_stepper(x, y, at)
            for name, value in [*(values or {}).items(), ("steps", float(values is not None))]:
                done.sums[name] = done.sums.get(name, 0.0) + value
            done.step += 1
            self.log.end_step(values)
            if config.checkpoint_every and (at + 1) % config.checkpoint_every == 0:
                self._save()

    def _end_epoch(self) -> None:
        ranks, done = self.ranks, self.progress
        ranks.broadcast(self.net.buffers())
        names = sorted(done.sums.keys() - {"steps"})
        totals = [done.sums.get(name, 0.0) for name in (*names, "steps")]
        sums = torch.tensor(totals, dtype=torch.float64, device=ranks.device)
        *losses, steps = ranks.sum(sums).tolist()
        means = {n: s / steps if steps else math.nan for n, s in zip(names, losses, strict=True)}
        done.history.append(
            {
                "epoch": done.epoch + 1,
                "step": (done.epoch + 1) * self.steps,
                "lr": self.stepper.optimizer.param_groups[0]["lr"],
                "loss": means.pop("loss", math.nan),
                **{f"loss_{name}": mean for name, mean in means.items()},
                **measure(self.net, self.data.validation, self.config, ranks),
                "skipped": self.stepper.skipped,
                "seconds": self._seconds(),
            }
        )
        done.epoch, done.step, done.sums = done.epoch + 1, 0, {}
        self._save()
        self._keep_best()
        if ranks.rank == 0:
            log.write_log(self.out / "log.csv", done.history)
        self.log.end_epoch(done.history[-1])

    def _keep_best(self) -> None:
        """Write the student of the epoch that has just ended, if none was better. After the
        checkpoint, and so once more where a run goes on that was killed between the two."""
        done = self.progress
        ended = done.epoch and not done.step and done.best()["epoch"] == done.epoch
        if ended and self.ranks.rank == 0:
            student = self.net.collapse(average=False)
            files.write_tensors(self.out / BEST, files.cpu_copies(student.state_dict()))

    def _measure_best(self, student: nn.Module, split: Split) -> dict[str, float]:
        """Of the best student; nothing where someone has taken its file away."""
        file, ranks, best = self.out / BEST, self.ranks, copy.deepcopy(student)
        there = ranks.rank > 0 or file.exists()
        if not ranks.all(torch.tensor(there, device=ranks.device)):
            return {}
        if ranks.rank == 0:
            best.load_state_dict(files.read_tensors(file)[0])
        ranks.broadcast((*best.parameters(), *best.buffers()))
        return accuracies(split, {"best": best.eval()}, self.config, ranks)

    def _measure_static(self, split: Split) -> dict[str, float]:
        return accuracies(split, {"static": self.static}, self.config, self.ranks)

    # ---- the end
    def _finish(self) -> dict[str, Any]:
        student = self.net.collapse(average=False)
        summary = self._summarize(student)
        if self.ranks.rank == 0:
            files.write_tensors(self.out / STUDENT, files.cpu_copies(student.state_dict()))
            if self.net.teacher is not None:
                storage.save(self.net.teacher, self.out / TEACHER)
            history, static = self.progress.history, self.progress.static_accuracy
            log.write_log(self.out / "log.csv", history)
            best, title = self.progress.best(), summary["title"]
            log.draw(self.out / "curves.png", history, best, static, title)
            files.write_text(self.out / SUMMARY, json.dumps(summary, indent=1) + "\n")
            self._close()
        self.ranks.wait()
        return summary

    def _summarize(self, student: nn.Module) -> dict[str, Any]:
        history, teacher = self.progress.history, self.net.teacher
        validation = {k: x for k, x in history[-1].items() if k in ("student", "teacher", "gap")}
        best = self.progress.best()
        validation["best"] = best["student"]
        test = measure(self.net, self.data.test, self.config, self.ranks)
        test |= self._measure_best(student, self.data.test)
        networks = {"student": student, "teacher": teacher, "static": self.static}
        if self.static is not None:
            validation["static"] = self.progress.static_accuracy
            test |= self._measure_static(self.data.test)
        macs = () if teacher is None else teacher.report().macs
        return {
            "title": f"{self.config.student} on {self.config.data}",
            "config": states.as_json(self.config),
            "versions": states.versions(),
            "device": self.ranks.device_name(),
            "world": self.ranks.world,
            **self.sizes,
            "parameters": {
                name: sum(p.numel() for p in network.parameters())
                for name, network in networks.items()
                if network is not None
            },
            "multiply_adds": dict(zip(networks, macs, strict=False)),
            "validation": validation,
            "test": test,
            "best_epoch": best["epoch"],
            "notes": self.progress.notes,
            "skipped": self.stepper.skipped,
            "steps": self.progress.epoch * self.steps,
            "estimate": self.progress.cost,
            "step_time": self.timed_stepper.result(),
            "seconds": self._seconds(),
            "out": str(self.out),
        }
