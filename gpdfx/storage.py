"""A file that a teacher can be made from again: tensors, and how it was made as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import files, memory
from .access.find import find_teacher, unwrapped
from .access.states import check_keys, to_dtype
from .branches.sets import read, spell
from .calls import sharded, sparse
from .calls.held import cast_each, has_gradient, registered
from .compiler import expand
from .control import ExpandOptions
from .errors import InputError
from .files import AsPath, Tensors
from .passes.program import duplicate
from .teacher.captured import Section
from .teacher.module import Teacher

FILE = files.Format(
    "gpdfx teacher 2", key="gpdfx", what="teacher", remedy="pass what gpdfx.save wrote"
)
FORMS = {"dtypes": {str: str}, "trainable": [str]}
HEADER = {
    "versions": {str: str},
    "recipe": {
        "ratio": {str: (int, float)},
        "keep": [str],
        "round_to": int,
        "branches": {str: (str, list)},
        **dict.fromkeys(("scales", "shares", "extract", "randomness", "dynamic"), str),
        "features": [str],
        "seed": int,
    },
    "inputs": object,
    "same": {str: str},
    "unshared": [str],
    "gpd": {str: (int, float, type(None))},
    "sizes": [{"free": [str], "conditions": [str]}],
    "student": {"class": str, "tensors": {str: [int]}},
    "expanded": FORMS,
    "saved": FORMS,
}
"""What the header has to be, for ``files.first_misfit``. ``same``: other name of a tied tensor ->
its name; ``expanded``: of the student's tensors when it was expanded; ``saved``: of the teacher's
when it was saved."""
DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    )
}
"""What a student's tensors can be of, by name."""
_GPD = ".gpd."
OTHER = "pass a module of the class and sizes that the teacher was made from"
ROOM = 64, 2**28
"""A teacher may take so many times the bytes of its file while it is made, or so many, before it is
refused: what the check took apart is wider at first."""


def save(teacher: nn.Module, path: AsPath) -> None:
    """Write a teacher: a safetensors file, tied tensors once, with a JSON header that holds how it
    was made, so that ``load`` needs the student's class and this file, and a checksum over all of
    it (see ``files.Format`` for what that costs). Which parameters train and the dtype of each
    tensor come back, too. The file appears whole or not at all. Under ``fully_shard`` every process
    calls this, and the first one writes.

    ``teacher``: a teacher, or what holds one, as ``gpdfx.collapse`` takes it. The file of a ``GPD``
    is read by ``load``, too, which gives its teacher, and by ``GPD.load``."""
    holder = unwrapped(teacher)
    sharded.release(holder)
    stored = getattr(type(holder), "stored", None)  # of a GPD, not a module of the student's
    settings, tensors = stored(holder) if stored else ({}, {})
    _write(path, find_teacher("save", teacher), settings, tensors)


def _write(path: AsPath, teacher: Teacher, gpd: Mapping[str, Any], more: Tensors) -> None:
    """``gpd``: settings; ``more``: tensors beside the teacher's."""
    facts, student = teacher._facts, teacher._student
    first: dict[tuple[int, ...], str] = {}
    same: dict[str, str] = {}
    tensors: Tensors = {}
    for name, x in teacher.state_dict(keep_vars=True).items():
        known = first.setdefault((id(x),), name)
        if known == name:
            tensors[name] = x
        else:
            same[name] = known
    example, spec = _spell_inputs(facts.example)
    names = {name: facts.alias.get(name, name) for name in registered(student)}
    header = {
        "versions": {"torch": torch.__version__, "gpdfx": version()},
        "recipe": _spell_options(facts.options),
        "inputs": spec,
        "same": same,
        "unshared": [*teacher.own_parameters()],
        "sizes": [
            {"free": [*one.sizes.symbols], "conditions": [*one.sizes.conditions]}
            for one in _sections(teacher)
        ],
        "student": _structure(student),
        "expanded": _forms(student, {name: facts.dtypes[own] for name, own in names.items()}),
        "saved": _forms(teacher),
        "gpd": dict(gpd),
    }
    every = tensors | example | {_GPD + name: x for name, x in more.items()}
    writes = all(map(sharded.is_first, every.values()))
    for name in filter(lambda name: sharded.is_sharded(every[name]), [*every]):
        found = sharded.gathered(every[name])
        if writes:
            every[name] = found.detach().cpu()
    if writes:
        FILE.write(path, every, header)


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
        student: a module of the student's class and sizes, whatever its weights, their dtypes, and
            which of them train; it is not changed.
        example_inputs, example_kwargs: needed where the example's structure is more than tensors
            in tuples, lists and dicts.
        branches: needed where branches were of a kind of your own.

    Raises:
        InputError: not such a file, or one that is cut short or changed by a bit; a header with
            anything unknown, missing or absurd; another architecture: the first difference.
    """
    if not isinstance(student, nn.Module):
        text = f"load takes the file and a module like the student, not {type(student).__name__}"
        raise InputError(text, remedy="gpdfx.load(path, student)")
    return make(read_file(path), student, example_inputs, example_kwargs, branches)


@dataclass(frozen=True)
class Stored:
    """A file's content. ``state``: the teacher's ``state_dict``; ``inputs``: its example, if it is
    in the file; ``more``: the tensors that a ``GPD`` has beside it."""

    header: dict[str, Any]
    state: Tensors
    inputs: Any
    more: Tensors


def read_file(path: AsPath) -> Stored:
    """Read and check a file."""
    tensors, header = FILE.read(path)
    state = {name: x for name, x in tensors.items() if not name.startswith(".")}
    others = {name: x for name, x in tensors.items() if name.startswith(".")}
    faults = _faults(header, state)
    inputs, fault = None, next(faults, None)
    if fault is None:
        state |= {name: state[known] for name, known in header["same"].items()}
        try:
            inputs = _read_inputs(header["inputs"], others)
            if inputs is not None and [type(x) for x in inputs] != [tuple, dict]:
                raise ValueError("they are no positional and keyword inputs")
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            fault = f"header.inputs cannot be read ({type(error).__name__}: {error})"
    if fault is not None:
        text = f"the header of the teacher {path} is not as gpdfx writes it: {fault}"
        raise InputError(text, remedy=FILE.remedy)
    more = {k.removeprefix(_GPD): x for k, x in others.items() if k.startswith(_GPD)}
    return Stored(header, state, inputs, more)


def _faults(header: Any, state: Tensors) -> Iterator[str]:
    """What is wrong with a header."""
    if misfit := files.first_misfit(header, HEADER, "header"):
        yield misfit
        return
    expanded, saved = (header[key]["dtypes"] for key in ("expanded", "saved"))
    for known in header["same"].values():
        if known not in state:
            yield f"header.same names {known!r}, which is not in it"
    for word in (*expanded.values(), *saved.values()):
        if word not in DTYPES:
            yield f"there is no dtype {word!r}"
    for name, x in state.items():
        if name in saved and DTYPES[saved[name]] != x.dtype:
            yield f"{name} is not {saved[name]}"


def make(
    stored: Stored,
    student: nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    branches: Any = None,
) -> Teacher:
    """The teacher of a file's content; see ``load``."""
    header, state, inputs = stored.header, stored.state, stored.inputs
    _check_structure(header["student"], _structure(student))
    options = dict(header["recipe"])
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
    if _forms(student) != header["expanded"]:
        student = duplicate(student)
        _give_forms(student, header["expanded"])
    times, least = ROOM
    most = max(least, times * sum(x.nbytes for x in state.values()))
    for verify in (False, True):  # the check may have taken a module apart
        with memory.at_most(most, "the file holds far less", FILE.remedy):
            teacher: Teacher = expand(student, **options, **given, verify=verify)
        teacher.unshare(header["unshared"])
        own = teacher.state_dict()
        if own.keys() == state.keys() and all(own[k].shape == x.shape for k, x in state.items()):
            break
    for section, one in zip(_sections(teacher), header["sizes"], strict=False):
        free, known = set(one["free"]), set(one["conditions"])
        section.sizes = section.sizes.settled(section.call.shapes, free, known)
    check_keys(state, teacher.state_dict(), "the teacher")
    to_dtype(teacher, state)
    _give_forms(teacher, header["saved"])
    teacher.load_state_dict(state)
    return teacher


# --------------------------------------------------------------------------- dtypes, what trains
def _forms(module: nn.Module, dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, Any]:
    """Of all its tensors; ``dtypes``: others than it has now."""
    dtypes = dtypes or {name: x.dtype for name, x in registered(module).items()}
    return {
        "dtypes": {name: _word(dtype) for name, dtype in dtypes.items()},
        "trainable": [name for name, p in module.named_parameters() if p.requires_grad],
    }


def _give_forms(module: nn.Module, forms: Mapping[str, Any]) -> None:
    """The inverse of ``_forms``, in place. Raises ``InputError`` for a tensor of another kind."""
    dtypes = {name: DTYPES[word] for name, word in forms["dtypes"].items()}
    for name, x in registered(module).items():
        d = dtypes.get(name, x.dtype)
        if (d.is_floating_point, d.is_complex) != (x.is_floating_point(), x.is_complex()):
            text = f"{name} is {_word(x.dtype)}, in the file {_word(d)}"
            raise InputError(f"the student is of another architecture: {text}", remedy=OTHER)
    code = module._code.modules if isinstance(module, Teacher) else ()
    for part in (module, *code):
        cast_each(part, dtypes)
    trainable = set(forms["trainable"])
    for name, p in module.named_parameters():
        p.requires_grad_(name in trainable and has_gradient(p))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    if saved == given:
        return
    difference = f"a {given['class']}, the file's a {saved['class']}"
    if tensor := files.first_difference(saved["tensors"], given["tensors"], absent="absent"):
        name, theirs, mine = tensor
        difference = f"{name} is {mine}, in the file {theirs}"
    raise InputError(f"the student is of another architecture: {difference}", remedy=OTHER)


# --------------------------------------------------------------------------- example inputs
_EXAMPLE = ".example_input."  # no tensor of a module has a name that begins with a dot


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
        case "value":
            return x
        case "tensor":
            return tensors[x]
        case "sparse":
            layout, *parts = x
            at, *rest = (_read_inputs(y, tensors) for y in parts)
            if bool((at < 0).any()):  # beyond its size is left out
                raise ValueError("an index of a sparse tensor is negative")
            return sparse.made(sparse.LAYOUTS[layout], [at, *rest])
        case "tuple":
            return tuple(_read_inputs(y, tensors) for y in x)
        case "list":
            return [_read_inputs(y, tensors) for y in x]
        case "dict":
            return {k: _read_inputs(y, tensors) for k, y in x.items()}
        case _:
            raise ValueError(f"no kind {kind!r}")
