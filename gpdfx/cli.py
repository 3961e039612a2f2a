"""The command line: ``gpdfx expand | explain | graph MODEL``.

MODEL is ``timm:NAME``, ``torchvision:NAME``, or ``package.module:CALLABLE`` for your own.
Exit codes: 0 done, 1 the model could not be expanded, 2 the command is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .branches import SETS
from .errors import GpdfxError
from .expand import expand
from .explain import explain, graph
from .models import load
from .passes.capture import LEVELS
from .teacher import Teacher


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        text, data = options.run(options)
    except GpdfxError as error:
        print(f"gpdfx: {error}", file=sys.stderr)
        return 1
    print(json.dumps(data, indent=1, default=str) if options.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("gpdfx", description="Wider teachers out of any network.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model", help="timm:NAME, torchvision:NAME or package.module:CALLABLE")
    text = "width (default 2), of everything or of what matches a pattern; repeat, the last counts"
    common.add_argument(
        "--ratio", type=_ratio, action="append", metavar="[PATTERN=]NUMBER", help=text
    )
    text = "modules or parameters that stay at the student's size"
    common.add_argument(
        "--keep", nargs="+", action="extend", default=[], metavar="PATTERN", help=text
    )
    text = "make widened axes multiples of this"
    common.add_argument("--round-to", type=int, default=1, metavar="NUMBER", help=text)
    text = f"auto (default), none, {', '.join(SETS)}; of everything or of what matches a pattern"
    common.add_argument(
        "--branches", type=_branches, action="append", metavar="[PATTERN=]SET", help=text
    )
    common.add_argument("--size", type=int, help="height and width of the example image")
    common.add_argument("--json", action="store_true", help="print JSON")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[common])
        command.set_defaults(run=run)
        return command

    command = add("expand", _expand, "expand a network, check it, print the report")
    command.add_argument("--no-verify", action="store_true", help="skip the equality check")
    text = "input sizes that may differ later: all (default), the batch, none; fewer are faster"
    command.add_argument("--dynamic", choices=LEVELS, default=LEVELS[0], help=text)
    command = add("explain", _explain, "why a parameter widened or did not")
    command.add_argument("parameter")
    command = add("graph", _graph, "draw which layers widen together and where bridges stand")
    command.add_argument("--out", required=True, help="FILE.svg, FILE.png or FILE.html")
    return parser


def _ratio(text: str) -> tuple[str, float]:
    """``"1.5"`` -> ``("*", 1.5)``, ``"layer4=1.5"`` -> ``("layer4", 1.5)``."""
    pattern, _, number = text.rpartition("=")
    try:
        return pattern or "*", float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither NUMBER nor PATTERN=NUMBER") from None


def _ratios(given: list[tuple[str, float]] | None) -> float | dict[str, float]:
    """What ``expand`` takes: the number if there is one for all; where a pattern recurs, its last
    place counts."""
    ratios: dict[str, float] = {}
    for pattern, number in given or [("*", 2.0)]:
        ratios.pop(pattern, None)
        ratios[pattern] = number
    return ratios["*"] if [*ratios] == ["*"] else ratios


def _branches(text: str) -> tuple[str, str | None]:
    """``"orepa"`` -> ``("*", "orepa")``, ``"head=none"`` -> ``("head", None)``."""
    pattern, _, name = text.rpartition("=")
    if name not in ("auto", "none", *SETS):
        raise argparse.ArgumentTypeError(f"{name!r} is none of auto, none, {', '.join(SETS)}")
    return pattern or "*", None if name == "none" else name


def _teacher(options: argparse.Namespace, verify: bool, dynamic: str = "batch") -> Teacher:
    with _working(f"expanding {options.model}"):
        model = load(options.model)
        inputs = (torch.randn(2, 3, options.size, options.size),) if options.size else None
        return expand(
            model,
            _ratios(options.ratio),
            keep=options.keep,
            round_to=options.round_to,
            branches=dict(options.branches or [("*", "auto")]),
            example_inputs=inputs,
            verify=verify,
            dynamic=dynamic,
        )


def _expand(options: argparse.Namespace) -> tuple[str, Any]:
    report = _teacher(options, not options.no_verify, options.dynamic).report()
    return str(report), report.to_dict()


def _explain(options: argparse.Namespace) -> tuple[str, Any]:
    explanation = explain(_teacher(options, False), options.parameter)
    return str(explanation), dataclasses.asdict(explanation)


def _graph(options: argparse.Namespace) -> tuple[str, Any]:
    graph(_teacher(options, False), options.out)
    return f"wrote {options.out}", {"out": options.out}


@contextlib.contextmanager
def _working(text: str) -> Iterator[None]:
    """A spinner on stderr while something takes its time; a line where there is no terminal."""
    try:
        from rich.console import Console
    except ImportError:
        print(f"{text} ...", file=sys.stderr)
        yield
        return
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        print(f"{text} ...", file=sys.stderr)
        yield


if __name__ == "__main__":
    sys.exit(main())
