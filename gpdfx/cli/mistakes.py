"""What the command line says where something is wrong: what, what to do about it, an exit code.

    gpdfx: timm has no model 'resnet1o'
      what to do: did you mean timm:resnet10t?

A traceback is shown for no mistake of the person's, unless ``GPDFX_TRACEBACK`` is set.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from ..errors import GpdfxError, InputError, described, nearest, suggest


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command as gpdfx does, with what comes near."""

    def error(self, message: str) -> NoReturn:
        remedy = f"{self.prog} --help tells what there is"
        if wrong := re.search(r"invalid choice: (.+?) \(choose from (.+)\)", message):
            name, *known = (text.strip("'\"") for text in (wrong[1], *wrong[2].split(", ")))
            remedy = suggest(name, known, remedy)
        self.exit(2, f"gpdfx: {message}\n  what to do: {remedy}\n")

    def options(self) -> list[str]:
        """All that it has, as ``--static-teacher``."""
        return [name for name in self._option_string_actions if name.startswith("--")]


def parse(parser: Parser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Parser]:
    """The options of a command, and its own parser. Exits with 2 where they are wrong."""
    try:
        options, unknown = parser.parse_known_args(argv)
    except SystemExit:
        flush()  # of --help
        raise
    command: Parser = options.parser
    for word in unknown:
        if word.startswith("-"):
            name, known = word.partition("=")[0], command.options()
            near = [f"--{k}" for k in nearest(name.lstrip("-"), [k[2:] for k in known])]
            remedy = f"did you mean {', '.join(near)}?" if near else f"see {command.prog} --help"
            command.exit(2, f"gpdfx: there is no option {name}\n  what to do: {remedy}\n")
    if unknown:
        command.error(f"there is no place for {' '.join(unknown)}")
    return options, command


# --------------------------------------------------------------------------- words
def in_options(text: str, known: Sequence[str]) -> str:
    """A sentence of the Python API in the words of the command line; lines of code stay.

    static_teacher='NAME' -> --static-teacher NAME; keep=["a", "b"] -> --keep a b
    warmup_epochs is 5, config.recipe.lr was 1 -> --warmup-epochs is 5, --lr was 1
    """
    if "--size" in known:
        text = re.sub(r"example_inputs=\(\w+,\)", "--size NUMBER", text)
    text = re.sub(r"\bpass (example_\w+=)", r"in Python, pass \1", text)

    def option(found: re.Match[str]) -> str:
        path, name, value = found["path"], found["name"], found["value"]
        given, off = f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"
        if value == "False" and off in known:
            return off
        if given not in known or not (path or value is not None or "_" in name):
            return found[0]
        words = "none" if value == "None" else re.sub(r"[]['\"(),]+", " ", value or "")
        return " ".join([given, *words.split()] if value != "True" else [given])

    value = r"""'[^']*'|"[^"]*"|\[[^]]*\]|\([^)]*\)|[\w.+-]*\w|"""
    name = rf"(?P<path>config\.(?:recipe\.)?)?(?P<name>[a-z]\w*)(?:=(?P<value>{value}))?"
    pattern = re.compile(rf"(?<![\w.:/'\"-]){name}(?![\w/:{{-]|\.\w)")
    return "\n".join(
        line if line.startswith("  at: ") else pattern.sub(option, line)
        for line in text.split("\n")
    )


# --------------------------------------------------------------------------- errors
def answer(error: BaseException, command: Parser) -> int:
    """Say on stderr what was wrong; returns the exit code."""
    if os.environ.get("GPDFX_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):  # whoever reads has enough
        flush()
        return 1
    if isinstance(error, KeyboardInterrupt):
        again = "; the same command goes on with the run" * (command.prog == "gpdfx train")
        print(f"gpdfx: stopped{again}", file=sys.stderr)
        return 130
    told = error if isinstance(error, GpdfxError) else _told(error, command)
    print(f"gpdfx: {in_options(str(told), command.options())}", file=sys.stderr)
    return 1


REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on that disk, or give another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give a place that is yours"),
    errno.EMFILE: "close files, or raise the limit on open ones (ulimit -n)",
}


def _told(error: BaseException, command: Parser) -> GpdfxError:
    """What is no error of gpdfx's own: the system's, of the person's code, or else our bug."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAll" in str(error):
        text = f"there is not enough memory ({described(error)})"
        smaller = [x for x in ("--batch-size", "--size", "--ratio") if x in command.options()]
        return InputError(text, remedy=f"a smaller {' or '.join(smaller) or 'network'}")
    place = _place(error)
    if isinstance(error, OSError) and error.errno is not None:
        named = "".join(f": {name}" for name in (error.filename, error.filename2) if name)
        remedy = REMEDIES.get(error.errno, "give another file or folder")
        return InputError(f"{error.strerror}{named}", source=place, remedy=remedy)
    if place is not None:
        remedy = "mend that: it is no code of gpdfx's"
        return InputError(f"your code fails: {described(error)}", source=place, remedy=remedy)
    return GpdfxError(f"this is a bug in gpdfx: {described(error)}", remedy=_reported(error))


LIBRARIES = ("<", *sysconfig.get_paths().values(), str(Path(torch.__file__).parents[1]))


def _place(error: BaseException) -> str | None:
    """The innermost line that is no library's, if it is not ours."""
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        if frame.f_globals.get("__name__", "").partition(".")[0] == "gpdfx":
            return None
        if not frame.f_code.co_filename.startswith(LIBRARIES):
            return f"{os.path.basename(frame.f_code.co_filename)}:{line}"
    return None


def _reported(error: BaseException) -> str:
    """Write a bug's traceback to a file; what to do with it."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="gpdfx-bug-", suffix=".txt", delete=False
        ) as file:
            file.write(f"{sys.argv}\ntorch {torch.__version__}\n{text}")
    except OSError:  # there is no place for it
        return f"report it, with this:\n{text}"
    return f"report it, with the traceback in {file.name} (GPDFX_TRACEBACK=1 shows it)"


def flush() -> None:
    """Write out what was printed, or, where nobody reads it, nothing more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
