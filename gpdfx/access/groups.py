"""Parameter groups for an optimizer over a teacher, or over what trains it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import nn

from ..control import covers
from ..errors import InputError, check_choice
from ..passes.folded import PREFIX
from ..teacher.decay import layers_of, student_name
from ..teacher.module import Teacher
from .find import find_teacher, prefix_of, unwrapped

Group = dict[str, Any]
PARAMETRIZATIONS = ("student", "paper")
# For W stored as W / r: (power of r for the learning rate, for the weight decay).
POWERS = {"sgd": (2, -2), "adam": (1, -1)}


def param_groups(
    teacher: nn.Module,
    weight_decay: float = 0.0,
    *,
    lr: float | None = None,
    no_decay: Sequence[str] = (),
    layer_decay: float | None = None,
    parametrization: str = "student",
    optimizer: str = "sgd",
) -> list[Group]:
    """Groups for ``torch.optim`` with every trainable parameter once: scales of branches, norms,
    biases, and what the student's ``no_weight_decay()`` names, are not decayed.

    Args:
        teacher: a teacher, or what holds one: a ``GPD``, whose losses of features train along.
        weight_decay: of everything else.
        lr: of all groups; left to the optimizer if not given.
        no_decay: patterns (see ``gpdfx.control``) of further parameters that are not decayed, by
            the student's names.
        layer_decay: as timm's, for students with a ``group_matcher``: the learning rate of a layer
            is ``lr * layer_decay ** (layers behind it)``. Needs ``lr``.
        parametrization: ``"student"``: the stored weights are the student's, so its own recipe
            holds. ``"paper"``: steps are those of weights stored as W / r, r the copies of an
            input channel (arXiv 2410.04140, section 3.2): for SGD learning rate times r**2 and
            decay over r**2, for Adam's family learning rate times r and decay over r (and its eps
            over r, which is left as it is). Needs ``lr``.
        optimizer: ``"sgd"`` or ``"adam"``; matters for ``"paper"`` alone.

    Returns:
        Dicts with ``params``, ``param_names``, ``weight_decay`` and, if given, ``lr``.

    Raises:
        InputError: no teacher, bad numbers; for ``layer_decay``: a student without layers; for
            ``"paper"``: input channels with different numbers of copies, by name.
    """
    found = find_teacher("param_groups", teacher)
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    check_choice("optimizer", optimizer, POWERS)
    paper = parametrization == "paper"
    given = {"weight_decay": weight_decay, "lr": lr, "layer_decay": layer_decay}
    for what, x in given.items():
        if x is not None and not (isinstance(x, Real) and math.isfinite(x) and x >= 0):
            raise InputError(f"{what} is {x!r}", remedy="pass a number of at least 0")
    if (paper or layer_decay is not None) and lr is None:
        what = "the paper's parametrization" if paper else "layer_decay"
        raise InputError(f"{what} scales learning rates", remedy="pass lr=")
    copies, scales = _copies(found) if paper else {}, _scales(found, layer_decay)
    (rate, decay), prefix = POWERS[optimizer], prefix_of(teacher)
    undecayed = found.no_weight_decay()
    groups: dict[tuple[float, float], Group] = {}
    for name, p in unwrapped(teacher).named_parameters():
        if not p.requires_grad:
            continue
        of = name.removeprefix(prefix) if name.startswith(prefix) else None
        names = [name] if of is None else [of, student_name(found, of)]
        kept = p.ndim < 2 if of is None else of in undecayed
        kept = kept or any(covers(pattern, [name, *names]) for pattern in no_decay)
        r = copies.get(names[0], 1)
        key = 0.0 if kept else weight_decay * r**decay, r**rate * scales.get(names[-1], 1.0)
        group = groups.setdefault(key, {"params": [], "param_names": [], "weight_decay": key[0]})
        group["params"].append(p)
        group["param_names"].append(name)
        if lr is not None:
            group["lr"] = lr * key[1]
    return list(groups.values())


def _scales(teacher: Teacher, layer_decay: float | None) -> dict[str, float]:
    """The student's parameters -> what multiplies their learning rates."""
    if layer_decay is None:
        return {}
    layers = layers_of(teacher)
    if layers is None:
        raise InputError(
            f"layer_decay: {type(teacher._student).__name__} does not say what its layers are",
            remedy="give it a method group_matcher(coarse=False) as timm's networks have, or set "
            "the lr of the groups yourself",
        )
    return {name: layer_decay ** (max(layers.values()) - k) for name, k in layers.items()}


def _copies(teacher: Teacher) -> dict[str, int]:
    """Parameter -> the copies of what it contracts; of a branch, the parameter that is linear in
    its kernel's size stands for the weight."""
    found: dict[str, int] = {}
    uneven = []
    for name, shares in teacher._facts.shares.items():
        maps, layout = teacher._facts.maps[name], shares.layout
        table = teacher._tensor(shares.table)
        found[name] = table.shape[layout.at]  # a class for every copy, if they are equal in number
        if not maps[layout.dim % len(maps)].even:
            uneven.append(name)
    if uneven:
        raise InputError(
            f"the paper's parametrization is not defined for {', '.join(uneven[:3])}: their input "
            "channels have different numbers of copies",
            remedy='use a whole ratio, or parametrization="student"',
        )
    for fold in teacher.folds():
        one = fold.branched
        for name, branch in one.chosen.named().items():
            carrier = (branch.fused(one.layer) or branch).carrier
            if carrier and not branch.norm:
                found[f"{PREFIX}.{one.weight}.{name}.{carrier}"] = found.get(one.weight, 1)
    return found
