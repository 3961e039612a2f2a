"""What several commands share: commands themselves, and how much wider the teacher is."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

from ..branches.sets import SETS


def add_command(
    commands: Any, name: str, run: Any, text: str, **options: Any
) -> argparse.ArgumentParser:
    """A command that calls ``run`` with its options."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, **options
    )
    command.set_defaults(run=run, parser=command)
    return command


def add_ratio(group: Any, default: str) -> None:
    """The option that says how wide the teacher is."""
    text = f"width ({default}), of everything or of what matches a pattern; repeat, the last counts"
    group.add_argument(
        "--ratio", type=ratio, action="append", metavar="[PATTERN=]NUMBER", help=text
    )


def add_branches(group: Any) -> None:
    """The option that says which branches the teacher has."""
    text = f"auto (default), none, {', '.join(SETS)}; of everything or of what matches a pattern"
    group.add_argument(
        "--branches", type=branches, action="append", metavar="[PATTERN=]SET", help=text
    )


def whole(text: str, low: int = -(2**63)) -> int:
    """A whole number that torch can hold."""
    with contextlib.suppress(ValueError):
        if low <= int(text) < 2**63:
            return int(text)
    above = f" of at least {low}" if low > 0 else ""
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number{above}")


def number_or_none(text: str) -> float | None:
    """``"0.5"`` -> ``0.5``, ``"none"`` -> ``None``."""
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from None


def ratio(text: str) -> tuple[str, float]:
    """``"1.5"`` -> ``("*", 1.5)``, ``"layer4=1.5"`` -> ``("layer4", 1.5)``."""
    pattern, _, number = text.rpartition("=")
    try:
        return pattern or "*", float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither NUMBER nor PATTERN=NUMBER") from None


def ratios(given: Sequence[tuple[str, float]] | None) -> Any:
    """What ``expand`` takes: the number if there is one for all; where a pattern recurs, its last
    place counts."""
    by_pattern: dict[str, float] = {}
    for pattern, number in given or [("*", 2.0)]:
        by_pattern.pop(pattern, None)
        by_pattern[pattern] = number
    return one_or_all(by_pattern)


def one_or_all(by_pattern: dict[str, Any]) -> Any:
    """``{"*": 2}`` -> ``2``, and everything else as it is."""
    return by_pattern["*"] if [*by_pattern] == ["*"] else by_pattern


def branches(text: str) -> tuple[str, str | None]:
    """``"orepa"`` -> ``("*", "orepa")``, ``"head=none"`` -> ``("head", None)``."""
    pattern, _, name = text.rpartition("=")
    if name not in ("auto", "none", *SETS):
        raise argparse.ArgumentTypeError(f"{name!r} is none of auto, none, {', '.join(SETS)}")
    return pattern or "*", None if name == "none" else name
