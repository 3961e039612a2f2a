"""``gpdfx train``, ``eval`` and ``export``: an option for every field of ``TrainConfig`` and of its
recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..branches.sets import SETS
from ..data.datasets import SOURCES
from ..train.config import AMP, TrainConfig, default_recipe
from ..train.recipes import CHOICES, RECIPES, TrainingRecipe, get_recipe, with_changes
from ..train.runner import COMPILE

EXAMPLES = """
the three scenarios:
  from scratch      gpdfx train --student timm:resnet18 --data imagefolder:PATH --out run
  static teacher    gpdfx train --student timm:resnet18 --static-teacher torchvision:resnet34
                      --static-weights FILE --data imagefolder:PATH --amp bf16 --out run
  fine-tuning       gpdfx train --student timm:resnet18 --weights FILE --data imagefolder:PATH

The same command goes on with a run that was stopped. On several GPUs:
  torchrun --nproc-per-node 8 -m gpdfx train ...
"""
NETWORK = "timm:NAME, torchvision:NAME or package.module:CALLABLE"
WEIGHTS = "a state_dict as safetensors, or of torch.save"
FIELDS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "networks and data": {
        "student": (f"{NETWORK}; digits and mnist1d have one of their own", {"metavar": "MODEL"}),
        "weights": (f"fine-tune these: {WEIGHTS}", {"metavar": "FILE"}),
        "static_teacher": ("a trained network to distil from as well", {"metavar": "MODEL"}),
        "static_weights": ("its weights", {"metavar": "FILE"}),
        "data": (", ".join(SOURCES), {"metavar": "SOURCE"}),
        "labels": ("keep this many training samples of a class", {"type": int}),
        "noise": ("the part of the training labels to make wrong", {"type": float}),
        "size": ("height and width of the images of imagefolder", {"type": int}),
    },
    "the method": {
        "plain": ("train the student alone, as a baseline", {"action": "store_true"}),
        "shares": ("of the copies of a weight", {"choices": ("random", "uniform")}),
        "extract": ("the student out of the copies", {"choices": ("first", "mean")}),
        "unshared": (
            "parameters that student and teacher have each for itself",
            {"nargs": "+", "metavar": "PATTERN"},
        ),
        "gap_temperature": ("of the dynamic teacher's soft target", {"type": float}),
        "gap_smoothing": ("of the dynamic teacher's soft target", {"type": float}),
        "teacher_weight": ("of the dynamic teacher's own losses", {"type": float}),
        "start_epoch": ("the first epoch with the dynamic teacher's target", {"type": int}),
    },
    "the run": {
        "out": ("its folder; one that holds this run is gone on with", {"metavar": "FOLDER"}),
        "seed": ("of all randomness", {"type": int}),
        "amp": ("the type of autocast", {"choices": AMP}),
        "device": ("where to train", {"choices": ("auto", "cpu", "cuda")}),
        "compile": (
            "torch.compile forward and backward; MODE: default (if left out), "
            + ", ".join(COMPILE[2:]),
            {"nargs": "?", "const": "default", "choices": COMPILE, "metavar": "MODE"},
        ),
        "cuda_graph": ("forward and backward as one CUDA graph", {"action": "store_true"}),
        "workers": ("processes that load data", {"type": int}),
        "checkpoint_every": ("steps; 0: every epoch alone", {"type": int, "metavar": "STEPS"}),
        "patience": ("bad steps in a row after which training stops", {"type": int}),
        "time_steps": ("steps to time against the plain student's", {"type": int}),
    },
}
RECIPE = {
    "batch_size": "of all processes together",
    "lr": "the highest learning rate",
    "momentum": "of SGD",
    "milestones": "epochs of schedule step",
    "gamma": "factor of schedule step",
    "warmup_epochs": "linear, part of the epochs",
    "mixup": "alpha; 0: off",
    "cutmix": "alpha; 0: off",
    "clip": "largest norm of the gradient, or none",
    "kd": "loss against the static teacher",
    "kd_alpha": "weight of kd, or dkd's alpha",
    "kd_beta": "dkd's beta",
    "temperature": "of kd",
    "lam": "weight of the dynamic teacher's soft target",
}


def add_training(commands: Any) -> None:
    """Add the three commands to a parser's."""
    text = "train a student with its dynamic teacher, or go on training"
    command = commands.add_parser(
        "train",
        usage="gpdfx train [OPTION ...]",
        help=text,
        description=text,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    command.set_defaults(run=_train, json=False, quiet=False)
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    for title, fields in FIELDS.items():
        group = command.add_argument_group(title)
        if title == "the method":
            add_method(group)
        for name, (text, options) in fields.items():
            shown = defaults[name]
            known = shown not in (None, "", ()) and not isinstance(shown, bool)
            text += f" ({shown})" if known else ""
            shape = {"metavar": "NUMBER"} if "type" in options else {}
            group.add_argument(_flag(name), help=text, **(shape | options))
        if title == "the run":
            group.add_argument(
                "--no-verify", dest="verify", action="store_false", help="skip expand's check"
            )
            group.add_argument("--quiet", action="store_true", help="show nothing meanwhile")
            group.add_argument("--json", action="store_true", help="print the summary as JSON")
    group = command.add_argument_group("the recipe", "changes to it; unchanged where not given")
    text = f"{', '.join(RECIPES)} (that of the data's name, or else resnet18)"
    group.add_argument("--recipe", metavar="NAME", help=text)
    for field in dataclasses.fields(TrainingRecipe):
        group.add_argument(_flag(field.name), help=RECIPE.get(field.name), **_kind(field))

    command = _add_run(commands, "eval", _eval, "measure a run's student and teacher again")
    command.add_argument("--data", metavar="SOURCE", help="another source with the same classes")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command = _add_run(commands, "export", _export, "write a run's student as ONNX, and check it")
    command.add_argument("--onnx", metavar="FILE", required=True, help="the file to write")


def add_method(group: Any) -> None:
    """The options that say how the teacher is made."""
    text = "width (2), of everything or of what matches a pattern; repeat, the last counts"
    group.add_argument(
        "--ratio", type=ratio, action="append", metavar="[PATTERN=]NUMBER", help=text
    )
    text = f"auto (default), none, {', '.join(SETS)}; of everything or of what matches a pattern"
    group.add_argument(
        "--branches", type=branches, action="append", metavar="[PATTERN=]SET", help=text
    )


def _add_run(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("folder", metavar="RUN", help="the folder of a finished run")
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _kind(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """How the command line reads a field of the recipe."""
    if field.name in CHOICES:
        return {"choices": CHOICES[field.name]}
    if field.name == "milestones":
        return {"type": int, "nargs": "+", "metavar": "EPOCH"}
    if field.name == "clip":
        return {"type": _number_or_none, "metavar": "NUMBER"}
    return {"type": int if field.type == "int" else float, "metavar": "NUMBER"}


def _number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def ratio(text: str) -> tuple[str, float]:
    """``"1.5"`` -> ``("*", 1.5)``, ``"layer4=1.5"`` -> ``("layer4", 1.5)``."""
    pattern, _, number = text.rpartition("=")
    try:
        return pattern or "*", float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither NUMBER nor PATTERN=NUMBER") from None


def ratios(given: list[tuple[str, float]] | None) -> float | dict[str, float]:
    """What ``expand`` takes: the number if there is one for all; where a pattern recurs, its last
    place counts."""
    found: dict[str, float] = {}
    for pattern, number in given or [("*", 2.0)]:
        found.pop(pattern, None)
        found[pattern] = number
    return found["*"] if [*found] == ["*"] else found


def branches(text: str) -> tuple[str, str | None]:
    """``"orepa"`` -> ``("*", "orepa")``, ``"head=none"`` -> ``("head", None)``."""
    pattern, _, name = text.rpartition("=")
    if name not in ("auto", "none", *SETS):
        raise argparse.ArgumentTypeError(f"{name!r} is none of auto, none, {', '.join(SETS)}")
    return pattern or "*", None if name == "none" else name


# --------------------------------------------------------------------------- what they do
def make_config(options: argparse.Namespace) -> TrainConfig:
    """The configuration that the options of ``gpdfx train`` ask for."""
    given = dict(vars(options))
    names = {f.name for f in dataclasses.fields(TrainingRecipe)}
    source = given.get("data", TrainConfig.data)
    recipe = get_recipe(given["recipe"]) if "recipe" in given else default_recipe(source)
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in names}
    fields = {f.name for f in dataclasses.fields(TrainConfig)} - {"recipe"}
    chosen = {k: v for k, v in given.items() if k in fields}
    if "ratio" in given:
        chosen["ratio"] = ratios(given["ratio"])
    if "branches" in given:
        spelled = dict(given["branches"])
        chosen["branches"] = spelled["*"] if [*spelled] == ["*"] else spelled
    return TrainConfig(**chosen, recipe=with_changes(recipe, **changes))


def _train(options: argparse.Namespace) -> tuple[str, Any]:
    import torch

    from ..memory import keep_memory
    from ..train import log
    from ..train.run import train

    config = make_config(options)
    if config.device == "cpu" or not torch.cuda.is_available():
        keep_memory()
    summary = train(config, quiet=options.quiet)
    return log.table(summary), summary


def _eval(options: argparse.Namespace) -> tuple[str, Any]:
    from ..train import log
    from ..train.export import evaluate

    log.check_installed()
    found = evaluate(options.folder, options.data, options.device)
    return log.accuracies(found), found


def _export(options: argparse.Namespace) -> tuple[str, Any]:
    from ..train.export import export

    done = export(options.folder, options.onnx)
    return (
        f"wrote {done['file']} ({done['bytes']:,} bytes, opset {done['opset']}); onnxruntime's "
        f"logits are torch's to {done['error']:.1e}",
        done,
    )
