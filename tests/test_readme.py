"""What the README says is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpdfx.passes.rules import SIGNATURES, TABLE

README = (Path(__file__).parents[1] / "README.md").read_text()
CONTRIBUTING = README.partition("## Contributing")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"\*\*(.+?)\*\*.*?```python\n(.*?)```", CONTRIBUTING, re.DOTALL)


@pytest.mark.parametrize(("what", "code"), EXAMPLES, ids=[what for what, _ in EXAMPLES])
def test_the_examples_for_contributors_run(what: str, code: str) -> None:
    exec(compile(code, f"<README: {what}>", "exec"), {"__name__": what})


def test_there_is_one_for_each_kind() -> None:
    assert [what for what, _ in EXAMPLES] == ["An op rule", "A branch", "A pass", "A loss"]


def test_the_number_of_signatures_is_stated() -> None:
    told = f"{SIGNATURES} of the {len(TABLE)} rows of the rule table are signatures"
    assert told in " ".join(README.split())
