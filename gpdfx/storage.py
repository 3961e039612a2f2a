"""A file that a teacher can be made from again: tensors, and how it was made as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from . import files
from .access.find import find_teacher
from .access.states import check_keys, to_dtype
from .branches.sets import read, spell
from .calls import sparse
from .compiler import expand
from .control import ExpandOptions
from .errors import InputError
from .files import AsPath, Tensors
from .teacher.captured import Section
from .teacher.module import Teacher

FORMAT = "gpdfx teacher 1"


def save(teacher: nn.Module, path: AsPath) -> None:
    """Write a teacher: a safetensors file, tied tensors once, with a JSON header that holds how it
    was made, so that ``load`` needs the student's class and this file. The file appears whole or
    not at all."""
    found = find_teacher("save", teacher)
    facts = found._facts
    first: dict[tuple[int, ...], str] = {}
    same: dict[str, str] = {}
    tensors: Tensors = {}
    for name, x in found.state_dict(keep_vars=True).items():
        known = first.setdefault((id(x),), name)
        if known == name:
            tensors[name] = x
        else:
            same[name] = known
    example, spec = _spell_inputs(facts.example)
    header = {
        "format": FORMAT,
        "versions": {"torch": torch.__version__, "gpdfx": version()},
        "recipe": _spell_options(facts.options),
        "inputs": spec,
        "same": same,
        "unshared": [*found.own_parameters()],
        "sizes": [[[*one.sizes.symbols], one.sizes.conditions] for one in _sections(found)],
        "student": _structure(found._student),
    }
    header["hash"] = files.hash_json(header["student"])
    files.write_tensors(path, files.cpu_copies(tensors | example), {"gpdfx": json.dumps(header)})


def load(
    path: AsPath,
    student: nn.Module,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    branches: Any = None,
) -> Teacher:
    """Make the teacher of a file again. Nothing but tensors and JSON is read: no code is run.

    Args:
        path: what ``save`` wrote.
        student: a module of the student's class and sizes, whatever its weights.
        example_inputs, example_kwargs: needed where the example's structure is more than tensors
            in tuples, lists and dicts.
        branches: needed where branches were of a kind of your own.

    Raises:
        InputError: not such a file, or one of another architecture: the first difference.
    """
    if not isinstance(student, nn.Module):
        text = f"load takes the file and a module like the student, not {type(student).__name__}"
        raise InputError(text, remedy="gpdfx.load(path, student)")
    header, stored = _read(path)
    _check_structure(header["student"], _structure(student))
    options = dict(header["recipe"])
    inputs = _read_inputs(header["inputs"], stored)
    if example_inputs is not None or example_kwargs is not None:
        inputs = (tuple(example_inputs or ()), dict(example_kwargs or {}))
    if inputs is None:
        raise InputError(
            "the file does not hold the example inputs: they are more than tensors in tuples, "
            "lists and dicts",
            remedy="pass example_inputs= and example_kwargs= as to expand",
        )
    spelled = options.pop("branches")
    chosen = branches if branches is not None else {p: read(s) for p, s in spelled.items()}
    given = {"branches": chosen, "example_inputs": inputs[0], "example_kwargs": inputs[1]}
    state = {k: v for k, v in stored.items() if not k.startswith(_EXAMPLE)}
    state |= {name: state[known] for name, known in header["same"].items()}
    for verify in (False, True):  # the check may have taken a module apart
        teacher: Teacher = expand(student, **options, **given, verify=verify)
        teacher.unshare(header.get("unshared", ()))
        own = teacher.state_dict()
        if own.keys() == state.keys() and all(own[k].shape == x.shape for k, x in state.items()):
            break
    for section, (free, known) in zip(_sections(teacher), header.get("sizes", ()), strict=False):
        section.sizes = section.sizes.settled(section.call.shapes, set(free), set(known))
    teacher = to_dtype(teacher, state)
    check_keys(state, teacher.state_dict(), "the teacher")
    teacher.load_state_dict(state)
    return teacher


def _read(path: AsPath) -> tuple[dict[str, Any], Tensors]:
    """Header and tensors of a file that ``save`` wrote."""
    try:
        tensors, metadata = files.read_tensors(path)
        header: dict[str, Any] = json.loads(metadata.get("gpdfx", "{}"))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}", remedy="pass what gpdfx.save wrote") from None
    except Exception as error:  # truncated, corrupt or of another kind
        raise InputError(
            f"{path} is not a safetensors file: {error}", remedy="pass what gpdfx.save wrote"
        ) from error
    if header.get("format") != FORMAT or header.get("hash") != files.hash_json(
        header.get("student")
    ):
        raise InputError(f"{path} holds no teacher", remedy="pass what gpdfx.save wrote")
    return header, tensors


def version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gpdfx")
    except PackageNotFoundError:
        return "source"


def _sections(teacher: Teacher) -> list[Section]:
    return [section for part in teacher._parts.values() for section in part.sections]


def _spell_options(options: ExpandOptions) -> dict[str, Any]:
    control = options.control
    return {
        "ratio": control.ratios,
        "keep": list(control.keep),
        "round_to": control.round_to,
        "branches": {p: spell(s) for p, s in control.branches.items()},
        **{k: getattr(options, k) for k in ("scales", "shares", "extract", "randomness")},
        **{k: getattr(options, k) for k in ("features", "dynamic", "seed")},
    }


def _structure(student: nn.Module) -> dict[str, Any]:
    """What makes two students the same architecture: their class, and their tensors' sizes."""
    state = student.state_dict(keep_vars=True)
    return {
        "class": type(student).__name__,
        "tensors": {name: list(x.shape) for name, x in state.items() if isinstance(x, Tensor)},
    }


def _check_structure(saved: dict[str, Any], given: dict[str, Any]) -> None:
    if files.hash_json(saved) == files.hash_json(given):
        return
    difference = f"a {given['class']}, the file's a {saved['class']}"
    if tensor := files.first_difference(saved["tensors"], given["tensors"], absent="absent"):
        name, theirs, mine = tensor
        difference = f"{name} is {mine}, in the file {theirs}"
    raise InputError(
        f"the student is of another architecture: {difference}",
        remedy="pass a module of the class and sizes that the teacher was made from",
    )


# --------------------------------------------------------------------------- example inputs
_EXAMPLE = "example_input."


def _spell_inputs(inputs: Any) -> tuple[Tensors, Any]:
    """The tensors of an example call, and its structure as JSON; none if that does not hold it."""
    tensors: Tensors = {}

    def spelled(x: Any) -> Any:
        if sparse.is_sparse(x):
            layouts = {layout: name for name, layout in sparse.LAYOUTS.items()}
            return {"sparse": [layouts[x.layout], *map(spelled, sparse.parts(x))]}
        if isinstance(x, Tensor):
            name = f"{_EXAMPLE}{len(tensors)}"
            tensors[name] = x
            return {"tensor": name}
        if type(x) in (tuple, list):
            return {type(x).__name__: [spelled(y) for y in x]}
        if type(x) is dict and all(isinstance(k, str) for k in x):
            return {"dict": {k: spelled(y) for k, y in x.items()}}
        if x is None or isinstance(x, bool | int | float | str):
            return {"value": x}
        raise TypeError

    try:
        return tensors, spelled(inputs)
    except TypeError:
        return {}, None


def _read_inputs(spelled: Any, tensors: Tensors) -> Any:
    if spelled is None:
        return None
    ((kind, x),) = spelled.items()
    match kind:
        case "tensor":
            return tensors[x]
        case "sparse":
            layout, *parts = x
            return sparse.made(sparse.LAYOUTS[layout], [_read_inputs(y, tensors) for y in parts])
        case "tuple":
            return tuple(_read_inputs(y, tensors) for y in x)
        case "list":
            return [_read_inputs(y, tensors) for y in x]
        case "dict":
            return {k: _read_inputs(y, tensors) for k, y in x.items()}
        case _:
            return x
