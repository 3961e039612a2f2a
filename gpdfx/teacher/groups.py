"""Parameter groups for an optimizer over a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..control import covers
from ..errors import InputError, check_choice
from ..passes.folded import PREFIX
from .module import Teacher

Group = dict[str, Any]
PARAMETRIZATIONS = ("student", "paper")
# For W stored as W / r: (power of r for the learning rate, for the weight decay).
POWERS = {"sgd": (2, -2), "adam": (1, -1)}


def param_groups(
    teacher: Teacher,
    weight_decay: float = 0.0,
    *,
    lr: float | None = None,
    no_decay: Sequence[str] = (),
    parametrization: str = "student",
    optimizer: str = "sgd",
) -> list[Group]:
    """Groups for ``torch.optim``: scales of branches, norms and biases are not decayed.

    Args:
        weight_decay: of everything else.
        lr: of all groups; left to the optimizer if not given.
        no_decay: patterns (see ``gpdfx.control``) of further parameters that are not decayed.
        parametrization: ``"student"``: the stored weights are the student's, so its own recipe
            holds. ``"paper"``: steps are those of weights stored as W / r, r the copies of an
            input channel (arXiv 2410.04140, section 3.2): for SGD learning rate times r**2 and
            decay over r**2, for Adam's family learning rate times r and decay over r (and its eps
            over r, which is left as it is). Needs ``lr``.
        optimizer: ``"sgd"`` or ``"adam"``; matters for ``"paper"`` alone.

    Returns:
        Dicts with ``params``, ``param_names``, ``weight_decay`` and, if given, ``lr``.

    Raises:
        InputError: for ``"paper"``: input channels with different numbers of copies, by name.
    """
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    check_choice("optimizer", optimizer, POWERS)
    paper = parametrization == "paper"
    if paper and lr is None:
        raise InputError("the paper's parametrization scales learning rates", remedy="pass lr=")
    copies = _copies(teacher) if paper else {}
    rate, decay = POWERS[optimizer]
    groups: dict[tuple[float, int], Group] = {}
    for name, p in teacher.named_parameters():
        if not p.requires_grad:
            continue
        kept = _plain(name, p) or any(covers(pattern, [name]) for pattern in no_decay)
        r = copies.get(name, 1)
        key = 0.0 if kept else weight_decay * r**decay, r
        group = groups.setdefault(key, {"params": [], "param_names": [], "weight_decay": key[0]})
        group["params"].append(p)
        group["param_names"].append(name)
        if lr is not None:
            group["lr"] = lr * r**rate
    return list(groups.values())


def _plain(name: str, p: nn.Parameter) -> bool:
    """Vectors and scalars, that is norms and biases; and the scales of branches."""
    return p.ndim < 2 or (name.startswith(PREFIX) and name.endswith(".scales"))


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
