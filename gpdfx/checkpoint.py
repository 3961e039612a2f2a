"""Checkpoints both ways: weights, moving averages and optimizer states of student and teacher, and
a file that a teacher can be made from again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .branches import read, spell
from .control import Recipe
from .errors import InputError
from .expand import expand
from .teacher import Teacher, collapse

State = Mapping[str, Any]


# --------------------------------------------------------------------------- two-way maps
def to_student(state: State, teacher: Teacher, *, strict: bool = True) -> dict[str, Any]:
    """CBR of a teacher's checkpoint: what the student of the same training has.

    Args:
        state: a ``state_dict`` of a teacher like this one; that of moving averages of it
            (``torch.optim.swa_utils.AveragedModel``); or of an optimizer over its parameters, in
            the order of ``teacher.named_parameters()`` or with ``param_names``. Wrappers' prefixes
            (``module.``, ``_orig_mod.``) are understood.
        strict: refuse an optimizer's state of weights that have branches: what moved are their
            branches, and no momentum of the merged weight follows from theirs. If false, the
            student's optimizer begins anew for these.

    Returns:
        The same kind of state, under the student's own names; tensors are copies.

    Raises:
        InputError: names the keys that do not fit, or the parameters that have no such state.
    """
    if _of_optimizer(state):
        return _optimizer(state, teacher, strict, back=True)
    prefix, own, rest = _unwrap(state)
    twin = _reading(teacher, own)
    return _wrap(prefix, collapse(twin).state_dict(), rest)


def to_teacher(state: State, teacher: Teacher, *, strict: bool = True) -> dict[str, Any]:
    """IR of a student's checkpoint: the state of this teacher with the student's function.

    Every copy takes the student's value (of its moments, too); the branches keep their parameters
    and add nothing at first; shares stay. Arguments, returns and raises: as ``to_student``.
    """
    if _of_optimizer(state):
        return _optimizer(state, teacher, strict, back=False)
    prefix, own, rest = _unwrap(state)
    student = _to_dtype(collapse(teacher), own)
    _check_keys(own, student.state_dict(), "the student")
    student.load_state_dict(own)
    twin = _to_dtype(copy.deepcopy(teacher), own)
    twin.load_student(student)
    return _wrap(prefix, twin.state_dict(), rest)


def _reading(teacher: Teacher, state: State) -> Teacher:
    """A copy of the teacher with another one's state."""
    twin: Teacher = _to_dtype(copy.deepcopy(teacher), state)
    _check_keys(state, twin.state_dict(), "the teacher")
    twin.load_state_dict(state)
    return twin


def _to_dtype(module: Any, state: State) -> Any:
    """In the dtype of a state: averages are often kept in a wider one."""
    dtypes = {x.dtype for x in state.values() if isinstance(x, Tensor) and x.is_floating_point()}
    return module.to(dtypes.pop()) if len(dtypes) == 1 else module


def _check_keys(given: State, known: State, whose: str) -> None:
    missing = [k for k in known if k not in given]
    unknown = [k for k in given if k not in known]
    other = [
        f"{k} {tuple(given[k].shape)} instead of {tuple(v.shape)}"
        for k, v in known.items()
        if k in given and isinstance(v, Tensor) and given[k].shape != v.shape
    ]
    for what, names in (("lacks", missing), ("has no", unknown), ("has other sizes:", other)):
        if names:
            subject = f"the state of {whose}" if what != "has no" else whose
            raise InputError(
                f"{subject} {what} {', '.join(names[:3])}"
                + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
                remedy="pass the state_dict of the very network that was expanded, and a teacher "
                "with the same ratio, branches and shares",
            )


def _unwrap(state: State) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The prefix that a wrapper put before all names, the state without it, and what else the
    wrapper keeps (the number of averages)."""
    rest = {k: v for k, v in state.items() if k == "n_averaged"}
    own = {k: v for k, v in state.items() if k not in rest}
    prefix = ""
    for word in ("module.", "_orig_mod.", "module."):
        if own and all(k.startswith(word) for k in own):
            own = {k.removeprefix(word): v for k, v in own.items()}
            prefix += word if rest else ""  # other wrappers are of the training, not of the model
    return prefix, own, rest


def _wrap(prefix: str, own: State, rest: dict[str, Any]) -> dict[str, Any]:
    return rest | {prefix + k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()}


# --------------------------------------------------------------------------- optimizers
def _of_optimizer(state: State) -> bool:
    return set(state) >= {"state", "param_groups"}


def _optimizer(state: State, teacher: Teacher, strict: bool, *, back: bool) -> dict[str, Any]:
    student, wide = dict(collapse(teacher).named_parameters()), dict(teacher.named_parameters())
    source, target = (wide, student) if back else (student, wide)
    number = _names_of(state, list(source), "teacher" if back else "student")
    branched = {fold.branched.weight for fold in teacher.folds()} if back else set()
    moments: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name, held in ((number[k], held) for k, held in state["state"].items()):
        if name not in target:
            continue  # a branch's own
        size = source[name].shape
        odd = [k for k, x in held.items() if isinstance(x, Tensor) and x.shape not in (size, ())]
        if name in branched:
            refused[name] = "it has branches"
        elif odd:
            refused[name] = f"its {odd[0]} is not of the parameter's shape"
        else:
            move = teacher.narrow if back else teacher.widen
            moments[name] = {
                k: move(name, x).clone() if isinstance(x, Tensor) and x.ndim else copy.deepcopy(x)
                for k, x in held.items()
            }
    if refused and strict:
        some = "; ".join(f"{n}: {why}" for n, why in [*refused.items()][:3])
        more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise InputError(
            f"no state of the optimizer follows for {some}{more}",
            remedy="pass strict=False: the optimizer begins anew for these",
        )
    return _regroup(state["param_groups"], number, list(target), moments)


def _names_of(state: State, known: list[str], whose: str) -> dict[Any, str]:
    """The optimizer's number of a parameter -> its name."""
    groups = state["param_groups"]
    given = [k for group in groups for k in group["params"]]
    names = [n for group in groups for n in group.get("param_names", ())] or known
    if len(names) != len(given) or not set(names) <= set(known):
        raise InputError(
            f"the optimizer has other parameters ({len(given)}) than the {whose} ({len(known)})",
            remedy="make the optimizer of gpdfx.param_groups or of named_parameters(): its state "
            "then has names",
        )
    return dict(zip(given, names, strict=True))


def _regroup(
    groups: list[dict[str, Any]],
    number: dict[Any, str],
    target: list[str],
    moments: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The same groups over other parameters; those that are new join the first group."""
    home = {number[k]: g for g, group in enumerate(groups) for k in group["params"]}
    order = [[n for n in target if home.get(n, 0) == g] for g in range(len(groups))]
    place = {name: k for k, name in enumerate(n for names in order for n in names)}
    made = [
        {k: v for k, v in group.items() if k not in ("params", "param_names")}
        | {"params": [place[n] for n in names], "param_names": names}
        for group, names in zip(groups, order, strict=True)
        if names
    ]
    return {"state": {place[n]: m for n, m in moments.items()}, "param_groups": made}


# --------------------------------------------------------------------------- files
FORMAT = "gpdfx teacher 1"


def save(teacher: Teacher, path: str | os.PathLike[str]) -> None:
    """Write a teacher: a safetensors file, tied tensors once, with a JSON header that holds how it
    was made, so that ``load`` needs the student's class and this file. The file appears whole or
    not at all."""
    recipe = teacher._recipe
    assert recipe is not None
    first: dict[tuple[int, ...], str] = {}
    same: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, x in teacher.state_dict(keep_vars=True).items():
        known = first.setdefault((id(x),), name)
        if known == name:
            tensors[name] = x.detach().contiguous().cpu().clone()
        else:
            same[name] = known
    example, spec = _spell_inputs(recipe.inputs)
    header = {
        "format": FORMAT,
        "versions": {"torch": torch.__version__, "gpdfx": version()},
        "recipe": _spell_recipe(recipe),
        "inputs": spec,
        "same": same,
        "student": _structure(teacher._student),
    }
    header["hash"] = _hash(header["student"])
    target = Path(path)
    fresh = target.with_name(target.name + ".tmp")
    save_file({**tensors, **example}, fresh, {"gpdfx": json.dumps(header)})
    os.replace(fresh, target)


def load(
    path: str | os.PathLike[str],
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
    header = _header(path)
    _check_structure(header["student"], _structure(student))
    recipe = dict(header["recipe"])
    with safe_open(str(path), "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    inputs = _read_inputs(header["inputs"], stored)
    if example_inputs is not None or example_kwargs is not None:
        inputs = (tuple(example_inputs or ()), dict(example_kwargs or {}))
    if inputs is None:
        raise InputError(
            "the file does not hold the example inputs: they are more than tensors in tuples, "
            "lists and dicts",
            remedy="pass example_inputs= and example_kwargs= as to expand",
        )
    spelled = recipe.pop("branches")
    chosen = branches if branches is not None else {p: read(s) for p, s in spelled.items()}
    teacher: Teacher = expand(
        student,
        **recipe,
        branches=chosen,
        example_inputs=inputs[0],
        example_kwargs=inputs[1],
        verify=False,
    )
    state = {k: v for k, v in stored.items() if not k.startswith(_EXAMPLE)}
    state |= {name: state[known] for name, known in header["same"].items()}
    teacher = _to_dtype(teacher, state)
    _check_keys(state, teacher.state_dict(), "the teacher")
    teacher.load_state_dict(state)
    return teacher


def _header(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get("gpdfx", "{}")
        header: dict[str, Any] = json.loads(text)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}", remedy="pass what gpdfx.save wrote") from None
    except Exception as error:  # truncated, corrupt or of another kind
        raise InputError(
            f"{path} is not a safetensors file: {error}", remedy="pass what gpdfx.save wrote"
        ) from error
    if header.get("format") != FORMAT or header.get("hash") != _hash(header.get("student")):
        raise InputError(f"{path} holds no teacher", remedy="pass what gpdfx.save wrote")
    return header


def version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gpdfx")
    except PackageNotFoundError:
        return "source"


def _spell_recipe(recipe: Recipe) -> dict[str, Any]:
    control = recipe.control
    return {
        "ratio": control.ratios,
        "keep": list(control.keep),
        "round_to": control.round_to,
        "branches": {p: spell(s) for p, s in control.branches.items()},
        **{k: getattr(recipe, k) for k in ("scales", "shares", "extract", "randomness")},
        **{k: getattr(recipe, k) for k in ("features", "dynamic", "seed")},
    }


def _structure(student: nn.Module) -> dict[str, Any]:
    """What makes two students the same architecture: their class, and their tensors' sizes."""
    state = student.state_dict(keep_vars=True)
    return {
        "class": type(student).__name__,
        "tensors": {name: list(x.shape) for name, x in state.items() if isinstance(x, Tensor)},
    }


def _hash(structure: Any) -> str:
    return hashlib.sha256(json.dumps(structure, sort_keys=True).encode()).hexdigest()


def _check_structure(saved: dict[str, Any], given: dict[str, Any]) -> None:
    if _hash(saved) == _hash(given):
        return
    difference = f"a {given['class']}, the file's a {saved['class']}"
    one, other = saved["tensors"], given["tensors"]
    for name in dict.fromkeys((*one, *other)):
        if one.get(name) != other.get(name):
            mine, theirs = (x.get(name, "absent") for x in (other, one))
            difference = f"{name} is {mine}, in the file {theirs}"
            break
    raise InputError(
        f"the student is of another architecture: {difference}",
        remedy="pass a module of the class and sizes that the teacher was made from",
    )


# --------------------------------------------------------------------------- example inputs
_EXAMPLE = "example_input."


def _spell_inputs(inputs: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of an example call, and its structure as JSON; none if that does not hold it."""
    tensors: dict[str, Tensor] = {}

    def spelled(x: Any) -> Any:
        if isinstance(x, Tensor):
            name = f"{_EXAMPLE}{len(tensors)}"
            tensors[name] = x.detach().contiguous().cpu().clone()
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


def _read_inputs(spelled: Any, tensors: dict[str, Tensor]) -> Any:
    if spelled is None:
        return None
    ((kind, x),) = spelled.items()
    match kind:
        case "tensor":
            return tensors[x]
        case "tuple":
            return tuple(_read_inputs(y, tensors) for y in x)
        case "list":
            return [_read_inputs(y, tensors) for y in x]
        case "dict":
            return {k: _read_inputs(y, tensors) for k, y in x.items()}
        case _:
            return x
