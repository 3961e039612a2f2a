"""Checkpoints both ways: weights, moving averages and optimizer states of student and teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import sharded
from ..calls.held import cast, cast_tensor, has_gradient
from ..errors import InputError
from ..passes.program import duplicate
from ..teacher.module import Teacher
from .collapse import filled
from .find import OF_GPD, find_teacher, prefix_of, unwrapped

State = Mapping[str, Any]


# --------------------------------------------------------------------------- two-way maps
def to_student(state: State, teacher: nn.Module, *, strict: bool = True) -> dict[str, Any]:
    """CBR of a teacher's checkpoint: what the student of the same training has.

    Args:
        state: a ``state_dict`` of a teacher like this one, or of a ``GPD``; that of moving averages
            of it (``torch.optim.swa_utils.AveragedModel``); or of an optimizer over its parameters,
            in the order of ``teacher.named_parameters()`` or with ``param_names``. What wrappers
            put before all names is understood (``module.``, ``_orig_mod.``, the attribute of a
            module of the user's), and what is not of the teacher left out.
        teacher: a teacher, or what holds one, as ``collapse`` takes it.
        strict: refuse an optimizer's state of weights that have branches: what moved are their
            branches, and no momentum of the merged weight follows from theirs. If false, the
            student's optimizer begins anew for these.

    Returns:
        The same kind of state, under the student's own names; tensors are copies. Losses of
        features, which are of the training alone, are left out. Of a state of DTensors all is
        gathered: a collective.

    Raises:
        InputError: names the keys that do not fit, or the parameters that have no such state.
    """
    found = find_teacher("to_student(state, teacher)", teacher)
    if _of_optimizer(state, "to_student"):
        return _optimizer(state, teacher, found, strict, back=True)
    sharded.release(found)
    known = found.state_dict()
    prefix, own, rest = _unwrap(state, known)
    check_keys(own, known, "the teacher")
    like = to_dtype(duplicate(found._student), own)
    with sharded.holding(found, _cast(found, own, own)):
        plain = filled(found, like)
    return _wrap(prefix, plain.state_dict(), rest)


def to_teacher(state: State, teacher: nn.Module, *, strict: bool = True) -> dict[str, Any]:
    """IR of a student's checkpoint: the state of this teacher with the student's function, or of
    the ``GPD`` that holds it.

    Every copy takes the student's value (of its moments, too); the branches keep their parameters
    and add nothing at first; shares, and losses of features, stay. Arguments, returns and raises:
    as ``to_student``; of a teacher under ``fully_shard``, whose branches it gathers, every process
    calls this.
    """
    found = find_teacher("to_teacher(state, teacher)", teacher)
    if _of_optimizer(state, "to_teacher"):
        return _optimizer(state, teacher, found, strict, back=False)
    sharded.release(unwrapped(teacher))
    student = filled(found, found._student)
    prefix, own, rest = _unwrap(state, student.state_dict())
    check_keys(own, student.state_dict(), "the student")
    to_dtype(student, own).load_state_dict(own)
    with found._settled():
        tensors = _cast(found, {}, own, copies=True)
    beside = {k: sharded.gathered(x) for k, x in unwrapped(teacher).state_dict().items()}
    with sharded.holding(found, tensors):
        found.load_student(student)
        made = {prefix_of(teacher) + name: x for name, x in found.state_dict().items()}
    return _wrap(prefix, beside | made, rest)


def _cast(teacher: Teacher, given: State, like: State, copies: bool = False) -> dict[str, Tensor]:
    """All tensors of a teacher by name, or those given in their place, on its device and in the
    dtype of a state; ``copies``: that may be written to."""
    kind, made = _dtype_of(like), dict[tuple[int, int], Tensor]()
    tensors: dict[str, Tensor] = {}
    walks = teacher.named_parameters, teacher.named_buffers
    for name, own in chain.from_iterable(walk(remove_duplicate=False) for walk in walks):
        x = given.get(name, own)
        if (key := (id(own), id(x))) not in made:  # tied ones stay tied
            x = x.detach().to(own.device, own.dtype if kind is None else x.dtype, copy=copies)
            made[key] = x if kind is None else cast_tensor(x, kind)
        tensors[name] = made[key]
    return tensors


def to_dtype(module: Any, state: State) -> Any:
    """In the dtype of a state: averages are often kept in a wider one."""
    kind = _dtype_of(state)
    return module if kind is None else cast(module, kind)


def _dtype_of(state: State) -> torch.dtype | None:
    """The one that all its floating-point tensors have."""
    dtypes = {x.dtype for x in state.values() if isinstance(x, Tensor) and x.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def check_keys(given: State, known: State, whose: str) -> None:
    missing = [k for k in known if k not in given]
    unknown = [k for k in given if k not in known]
    both = [(k, given[k], v) for k, v in known.items() if k in given and isinstance(v, Tensor)]
    other = [
        f"{k} {tuple(getattr(x, 'shape', ()))} instead of {tuple(v.shape)}"
        for k, x, v in both
        if not isinstance(x, Tensor) or x.shape != v.shape
    ]
    bare = [f"{k} is {type(x).__name__}" for k, x, _ in both if not isinstance(x, Tensor)]
    narrow = [f"{k} is {x.dtype}" for k, x, v in both if isinstance(x, Tensor) and not _holds(x, v)]
    for what, names in (
        ("lacks", missing),
        ("has no", unknown),
        ("has what is no tensor:", bare),
        ("has other sizes:", other),
        ("has dtypes that hold no weights:", narrow),
    ):
        if names:
            subject = f"the state of {whose}" if what != "has no" else whose
            raise InputError(
                f"{subject} {what} {', '.join(names[:3])}"
                + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
                remedy="pass the state_dict of the very network that was expanded, and a teacher "
                "with the same ratio, branches and shares",
            )


def _holds(x: Tensor, known: Tensor) -> bool:
    """Whether a tensor can have the values of a known one: whole numbers cannot those of weights,
    nor real ones complex ones, nor bytes, which need their scales."""
    whole = not has_gradient(known)
    alike = x.is_complex() == known.is_complex() and has_gradient(x)
    return whole or (alike and x.itemsize > 1)


def _unwrap(state: State, known: State) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The prefix for the result, the state of what has these names without the prefix that wrappers
    put before all of them, and what an average keeps beside it (their number)."""
    rest = {k: v for k, v in state.items() if k == "n_averaged"}
    first = next(iter(known), "")
    before = sorted({k.removesuffix(first) for k in state if k.endswith(first)}, key=len)
    fits = (p for p in before if all(p + k in state for k in known))
    prefix = next(fits, next(iter(before), ""))
    own = {k: v for k, v in state.items() if k.startswith(prefix) and k not in rest}
    own = {k.removeprefix(prefix): sharded.gathered(v) for k, v in own.items()}
    return "module." if rest else "", own, rest


def _wrap(prefix: str, own: State, rest: dict[str, Any]) -> dict[str, Any]:
    return rest | {prefix + k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()}


# --------------------------------------------------------------------------- optimizers
def _of_optimizer(state: State, what: str) -> bool:
    if not isinstance(state, Mapping):
        text = f"{what} takes a state_dict first, not {type(state).__name__}"
        raise InputError(text, remedy=f"gpdfx.{what}(network.state_dict(), teacher)")
    return set(state) >= {"state", "param_groups"}


def _optimizer(
    state: State, holder: nn.Module, teacher: Teacher, strict: bool, *, back: bool
) -> dict[str, Any]:
    """``holder``: what the optimizer's parameters are of, the teacher or a ``GPD``."""
    student = dict(teacher._student.named_parameters())
    wide = dict(unwrapped(holder).named_parameters())
    source, target = (wide, student) if back else (student, wide)
    groups = _groups_of(state, [*source], "teacher" if back else "student")
    branched = {fold.branched.weight for fold in teacher.folds()} if back else set()
    moments: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    home: dict[str, int] = {}
    for name, begin, end, move in _ways(teacher, prefix_of(holder), back):
        if begin not in groups:
            continue
        number, home[end] = groups[begin]
        held = state["state"].get(number, {})
        tensors = {k: x for k, x in held.items() if isinstance(x, Tensor)}
        odd = [k for k, x in tensors.items() if x.shape not in (source[begin].shape, ())]
        if held and move is not _same and name in branched:
            refused[name] = "it has branches"
        elif odd:
            refused[name] = f"its {odd[0]} is not of the parameter's shape"
        elif held:
            moments[end] = {
                k: move(name, sharded.gathered(x)).clone()
                if k in tensors and x.ndim
                else copy.deepcopy(x)
                for k, x in held.items()
            }
    if refused and strict:
        some = "; ".join(f"{n}: {why}" for n, why in [*refused.items()][:3])
        more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise InputError(
            f"no state of the optimizer follows for {some}{more}",
            remedy="pass strict=False: the optimizer begins anew for these",
        )
    return _regroup(state["param_groups"], home, [*target], moments)


def _ways(
    teacher: Teacher, prefix: str, back: bool
) -> Iterator[tuple[str, str, str, Callable[[str, Tensor], Tensor]]]:
    """The student's name of each parameter, where its state comes from, where it goes to, and what
    becomes of it. ``prefix``: before a teacher's names."""
    own = {name: f"{prefix}{teacher._own_name}.{name}" for name in teacher.own_parameters()}
    for name, _ in teacher._student.named_parameters():
        if back and name not in own:
            yield name, prefix + name, name, teacher.narrow
        if not back:
            yield name, name, prefix + name, teacher.widen
        if name in own:
            yield name, *((own[name], name) if back else (name, own[name])), _same


def _same(name: str, x: Tensor) -> Tensor:
    return x


def _groups_of(state: State, known: list[str], whose: str) -> dict[str, tuple[Any, int]]:
    """Name of a parameter -> its number in the optimizer, and that of its group."""
    try:
        groups = state["param_groups"]
        given = [(k, g) for g, group in enumerate(groups) for k in group["params"]]
        names = [n for group in groups for n in group.get("param_names", ())]
        keys = [k for k, _ in given]  # by names in those of torch.distributed.checkpoint
        names = names or (keys if all(isinstance(k, str) for k in keys) else known)
        lost = {k: held.keys() for k, held in state["state"].items()}.keys() - dict(given).keys()
    except (TypeError, KeyError, AttributeError) as error:
        text = f"this has state and param_groups, but is no optimizer's state_dict ({error!r})"
        raise InputError(text, remedy="pass optimizer.state_dict()") from error
    if lost:
        text = f"the optimizer's state of {next(iter(lost))!r} is of none of its groups"
        raise InputError(text, remedy="pass optimizer.state_dict()")
    inside = {n.removeprefix(OF_GPD): n for n in known}  # of gpd.teacher's, and gpd is given
    names = [inside.get(n, n) if n not in known else n for n in names]
    if len(names) != len(given) or not set(names) <= set(known):
        raise InputError(
            f"the optimizer has other parameters ({len(given)}) than the {whose} ({len(known)})",
            remedy="make the optimizer of gpdfx.param_groups or of named_parameters(): its state "
            "then has names",
        )
    return dict(zip(names, given, strict=True))


def _regroup(
    groups: list[dict[str, Any]],
    home: dict[str, int],
    target: list[str],
    moments: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The same groups over other parameters; those that are new join the first group."""
    order = [[n for n in target if home.get(n, 0) == g] for g in range(len(groups))]
    place = {name: k for k, name in enumerate(n for names in order for n in names)}
    made = [
        {k: v for k, v in group.items() if k not in ("params", "param_names")}
        | {"params": [place[n] for n in names], "param_names": names}
        for group, names in zip(groups, order, strict=True)
        if names
    ]
    return {"state": {place[n]: m for n, m in moments.items()}, "param_groups": made}
