"""``gpdfx train``, ``eval`` and ``export``: an option for every field of ``TrainConfig`` and of its
recipe, with the words of their docstrings.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from ..memory import keep_memory
from ..train import log
from ..train.config import Device, TrainConfig, default_recipe
from ..train.evaluate import evaluate, export
from ..train.recipes import RECIPES, TrainingRecipe, get_recipe, with_changes
from ..train.run import train
from .options import add_branches, add_command, add_ratio, number_or_none, one_or_all, ratios, whole

EXAMPLES = """
the three scenarios:
  from scratch      gpdfx train --student timm:resnet18 --data imagefolder:PATH --out run
  static teacher    gpdfx train --student timm:resnet18 --static-teacher torchvision:resnet34
                      --static-weights FILE --data imagefolder:PATH --amp bf16 --out run
  fine-tuning       gpdfx train --student timm:resnet18 --weights FILE --data imagefolder:PATH

The same command goes on with a run that was stopped. On several GPUs:
  torchrun --nproc-per-node 8 -m gpdfx train ...
"""


# What a field's type does not say.
SHAPES: dict[str, dict[str, Any]] = {
    **{name: {"metavar": "MODEL"} for name in ("student", "static_teacher")},
    **{name: {"metavar": "FILE"} for name in ("weights", "static_weights")},
    "data": {"metavar": "SOURCE"},
    "unshared": {"metavar": "PATTERN", "nargs": "+"},
    "out": {"metavar": "FOLDER"},
    "compile": {"metavar": "MODE", "nargs": "?", "const": "default"},
    "checkpoint_every": {"metavar": "STEPS"},
    "milestones": {"metavar": "EPOCH", "nargs": "+"},
    "clip": {"type": number_or_none},
}


def add_training(commands: Any) -> None:
    """Add the three commands to a parser's."""
    command = add_command(
        commands,
        "train",
        _train,
        "train a student with its dynamic teacher, or go on training",
        usage="gpdfx train [OPTION ...]",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    command.set_defaults(json=False, quiet=False)
    for title, names in field_groups(TrainConfig).items():
        group = command.add_argument_group(title)
        if title == "the method":
            add_ratio(group, "2")
            add_branches(group)
        _add_fields(group, TrainConfig, names, defaults=True)
    group.add_argument(
        "--no-verify", dest="verify", action="store_false", help="skip expand's check"
    )
    group.add_argument("--quiet", action="store_true", help="show nothing meanwhile")
    group.add_argument("--json", action="store_true", help="print the summary as JSON")
    group = command.add_argument_group("the recipe", "changes to it; unchanged where not given")
    text = f"{', '.join(RECIPES)} (that of the data's name, or else resnet18)"
    group.add_argument("--recipe", metavar="NAME", help=text)
    _add_fields(group, TrainingRecipe, get_type_hints(TrainingRecipe), defaults=False)

    run = argparse.ArgumentParser(add_help=False)
    run.add_argument("folder", metavar="RUN", help="the folder of a finished run")
    run.add_argument("--json", action="store_true", help="print JSON")
    best = "the student that was the best on validation, not the last"
    text = "measure a run's student and teacher again"
    command = add_command(commands, "eval", _eval, text, parents=[run])
    command.add_argument("--best", action="store_true", help=best)
    command.add_argument("--data", metavar="SOURCE", help="another source with the same classes")
    command.add_argument("--device", choices=get_args(Device), default="auto")
    text = "write a run's student, or its teacher, as ONNX, and check it"
    command = add_command(commands, "export", _export, text, parents=[run])
    command.add_argument("--onnx", metavar="FILE", required=True, help="the file to write")
    text = "the wide network instead, plain, its branches merged"
    group = command.add_mutually_exclusive_group()
    group.add_argument("--best", action="store_true", help=best)
    group.add_argument("--teacher", action="store_true", help=text)


def _add_fields(group: Any, kind: type, names: Iterable[str], *, defaults: bool) -> None:
    """Options for fields of a dataclass; ``defaults``: say them."""
    types, words = get_type_hints(kind), field_words(kind)
    for name in names:
        text, default = words.get(name), getattr(kind, name, None)
        if defaults and default not in (None, "", ()) and not isinstance(default, bool):
            text = f"{text or ''} ({default})"
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **_shape(name, types[name]))


def field_groups(kind: type) -> dict[str, dict[str, str]]:
    """Title -> field -> its words in a class's docstring, where they stand below the title as
    ``name: words``."""
    groups: dict[str, dict[str, str]] = {}
    for title, text in re.findall(r"^(.+):\n((?: {4}.*\n?)+)", inspect.getdoc(kind) or "", re.M):
        fields = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", text, re.M)
        groups[title] = {name: " ".join(words.split()) for name, words in fields}
    return groups


def field_words(kind: type) -> dict[str, str]:
    """Field -> its words, of all groups."""
    return {name: text for group in field_groups(kind).values() for name, text in group.items()}


def _shape(name: str, kind: Any) -> dict[str, Any]:
    """How the command line reads a field."""
    kinds = (kind, *get_args(kind))
    if kind is bool:
        shape: dict[str, Any] = {"action": "store_true"}
    elif get_origin(kind) is Literal:
        shape = {"choices": get_args(kind)}
    elif str in kinds:
        shape = {}
    else:
        shape = {"type": whole if int in kinds else float, "metavar": "NUMBER"}
    return shape | SHAPES.get(name, {})


# --------------------------------------------------------------------------- what they do
def make_config(options: argparse.Namespace) -> TrainConfig:
    """The configuration that the options of ``gpdfx train`` ask for."""
    given = dict(vars(options))
    name = given.pop("recipe", None)
    recipe = default_recipe(given.get("data", "")) if name is None else get_recipe(name)
    if "ratio" in given:
        given["ratio"] = ratios(given["ratio"])
    if "branches" in given:
        given["branches"] = one_or_all(dict(given["branches"]))
    changes, chosen = (
        {f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given}
        for kind in (TrainingRecipe, TrainConfig)
    )
    return TrainConfig(**chosen, recipe=with_changes(recipe, **changes))


def _train(options: argparse.Namespace) -> tuple[str, Any]:
    config = make_config(options)
    if config.device == "cpu" or not torch.cuda.is_available():
        keep_memory()
    summary = train(config, quiet=options.quiet)
    return log.table(summary), summary


def _eval(options: argparse.Namespace) -> tuple[str, Any]:
    log.check_installed()
    measured = evaluate(options.folder, options.data, options.device, best=options.best)
    return log.accuracy_table(measured), measured


def _export(options: argparse.Namespace) -> tuple[str, Any]:
    done = export(options.folder, options.onnx, teacher=options.teacher, best=options.best)
    text = (
        f"wrote {done['file']} ({done['bytes']:,} bytes, opset {done['opset']}); onnxruntime's "
        f"logits are torch's to {done['error']:.1e}"
    )
    return text, done
