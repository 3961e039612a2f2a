"""Lines of code by room: no blank lines, no comments, no docstrings.

    python -m benchmarks.code_lines                 # the files as they are
    python -m benchmarks.code_lines HEAD~5 HEAD     # and as they were in these revisions

A room is a folder of ``gpdfx`` or a file beside them; ``SUMS`` says what adds up.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("gpdfx", "passes", "kernels", "benchmarks", "examples", "tests")
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
FOLD = {"gpdfx/teacher/fold.py", "gpdfx/teacher/folding.py", "passes/folded.py"}
SUMS = {
    "core": ("algebra", "calls", "passes", "rules", "teacher", "access", "check"),
    "fold": ("branches", "kernels", "fold"),
    "training": ("train", "data", "models"),
    "benchmarks": ("benchmarks",),
    "tests": ("tests",),
}
"""What is in none of them is the rest."""

Sources = Iterable[tuple[str, str]]
"""Paths from the root of the checkout, and what is in them."""


def code_lines(source: str) -> int:
    """Lines that hold code."""
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            held.difference_update(range(value.lineno, (value.end_lineno or 0) + 1))
    return len(held)


def room_of(path: str) -> str:
    """The room of a file."""
    top, *inner = path.split("/")
    if path in FOLD:
        return "fold"
    if path.startswith("passes/rules/"):
        return "rules"
    return inner[0].removesuffix(".py") if top == "gpdfx" else top


def sum_of(room: str) -> str:
    """What a room adds to."""
    return next((name for name, rooms in SUMS.items() if room in rooms), "rest")


def as_they_are() -> Iterator[tuple[str, str]]:
    """The files of the checkout; links are not followed."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield path.relative_to(ROOT).as_posix(), path.read_text()


def as_they_were(revision: str) -> Iterator[tuple[str, str]]:
    """The files of a revision."""
    command = ["git", "archive", "--format=tar", revision]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file and member.name.endswith(".py") and member.name.split("/")[0] in FOLDERS:
                yield member.name, file.read().decode()


def count(sources: Sources) -> Counter[str]:
    """Lines by room."""
    found: Counter[str] = Counter()
    for path, source in sources:
        found[room_of(path)] += code_lines(source)
    return found


def table(columns: dict[str, Counter[str]]) -> str:
    """Rooms under their sums, one column a version."""
    names = dict.fromkeys(room for counts in columns.values() for room in counts)
    width = max(12, *(len(name) + 2 for name in columns))
    lines = [f"{'':20}" + "".join(f"{name:>{width}}" for name in columns)]
    for group in (*SUMS, "rest"):
        rooms = [room for room in names if sum_of(room) == group]
        total = [sum(counts[room] for room in rooms) for counts in columns.values()]
        lines.append(f"{group:20}" + "".join(f"{number:>{width},}" for number in total))
        for room in rooms if rooms != [group] else []:
            own = [counts[room] for counts in columns.values()]
            lines.append(f"  {room:18}" + "".join(f"{number:>{width},}" for number in own))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.code_lines")
    parser.add_argument("revisions", nargs="*", metavar="REVISION", help="of git")
    given = parser.parse_args()
    columns = {revision: count(as_they_were(revision)) for revision in given.revisions}
    print(table(columns | {"now": count(as_they_are())}))


if __name__ == "__main__":
    main()
