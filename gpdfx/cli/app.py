"""The command line: ``gpdfx expand | explain | graph MODEL``, ``gpdfx train``, ``gpdfx eval RUN``,
``gpdfx export RUN``.

MODEL is ``timm:NAME``, ``torchvision:NAME``, or ``package.module:CALLABLE`` for your own.
Exit codes: 0 done, 1 refused or failed (stderr says why and what to do), 2 the command is wrong,
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..calls import progress
from ..compiler import expand
from ..models import load
from ..passes.capture.limits import LEVELS
from ..report.explain import explain
from ..report.picture import check_file, graph
from ..teacher.module import Teacher
from .commands import add_training
from .mistakes import Parser, answer, parse
from .options import add_branches, add_command, add_ratio, ratios, whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options, command = parse(_parser(), argv)
    try:
        with progress.on_stderr():
            text, data = options.run(options)
        if os.environ.get("RANK", "0") == "0":  # torchrun starts several of us
            print(json.dumps(data, indent=1, default=str) if options.json else text, flush=True)
    except (Exception, KeyboardInterrupt) as error:
        return answer(error, command)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "gpdfx",
        description="Gap Preserving Distillation: train any network with a wider teacher that "
        "shares its parameters.",
        epilog="gpdfx COMMAND --help tells the options of each. A first run: "
        "gpdfx train --data digits --out run",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    add_training(commands)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model", help="timm:NAME, torchvision:NAME or package.module:CALLABLE")
    add_ratio(common, "default 2")
    text = "modules or parameters that stay at the student's size"
    common.add_argument(
        "--keep", nargs="+", action="extend", default=[], metavar="PATTERN", help=text
    )
    text = "make widened axes multiples of this"
    common.add_argument("--round-to", type=whole, default=1, metavar="NUMBER", help=text)
    add_branches(common)
    common.add_argument(
        "--size", type=partial(whole, low=1), help="height and width of the example image"
    )
    common.add_argument("--json", action="store_true", help="print JSON")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        return add_command(commands, name, run, text, parents=[common])

    command = add("expand", _expand, "expand a network, check it, print the report")
    command.add_argument("--no-verify", action="store_true", help="skip the equality check")
    text = "input sizes that may differ later: all (default), the batch, none; fewer are faster"
    command.add_argument("--dynamic", choices=LEVELS, default=LEVELS[0], help=text)
    command = add("explain", _explain, "why a parameter widened or did not")
    command.add_argument("parameter")
    command = add("graph", _graph, "draw which layers widen together and where bridges stand")
    command.add_argument(
        "--out", required=True, help="FILE.html, a page to search, FILE.svg or FILE.png"
    )
    return parser


def _teacher(options: argparse.Namespace, verify: bool, dynamic: str = "batch") -> Teacher:
    progress.at(f"loading {options.model}")
    with progress.shown(after=0.0):
        model = load(options.model)
        inputs = (torch.randn(2, 3, options.size, options.size),) if options.size else None
        return expand(
            model,
            ratios(options.ratio),
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
    check_file(options.out)  # before it takes its time
    graph(_teacher(options, False), options.out)
    return f"wrote {options.out}", {"out": options.out}


if __name__ == "__main__":
    sys.exit(main())
