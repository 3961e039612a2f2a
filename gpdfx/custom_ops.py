"""A user's own op gets a rule: a signature, which the op itself must bear out (``check/op.py``)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .check.op import Fault, check_rule, draws, linear, shown
from .errors import InputError
from .kernels.user_function import UserFunction
from .passes.infer import Inferred
from .passes.program import Program, is_tensor, module_path, source, value
from .passes.rules import CUSTOM, rule_of
from .passes.rules.elementwise import elementwise
from .passes.rules.signature import Signature, SignatureError, parse, sig, tensor_arguments
from .passes.rules.writer import Rule
from .torch_private import custom_overload, hint, is_overload, is_packet, tree_leaves, tree_map


@dataclass(frozen=True)
class Custom(Rule):
    """A user's row of the rule table. ``seen``: the arguments that it was checked on."""

    op: Any = None
    seen: set[str] = field(default_factory=set)


def rule(op: Any, signature: str, example: Sequence[Any] | None = None, **sizes: str) -> None:
    """Say how an op treats axes, so that it widens instead of running at the student's width.

        gpdfx.rule(torch.ops.mylib.scale, "b c ..., c -> b c ...", example=(x, weight))

    A signature reads like einops: one pattern per tensor argument (``c?``: may be None), an arrow,
    one pattern per result.

    ``c``       an axis; where a name recurs the axes are the same. One that stands only on the
                left is contracted: the last operand that has it (a weight, if one has it) is
                multiplied by shares, in which the op has to be linear
    ``(g c)``   a product of axes, outer first
    ``...``     any number of dimensions, broadcast between operands
    ``*s``      any number of dimensions along which positions matter; one that stands only on the
                right is new, and stays
    ``c!``      an axis that the op has to see at the student's width (it sorts, takes statistics)

    Args:
        op: an overload, a packet (for its default overload) or what ``torch.library.custom_op``
            returned; one that gpdfx has no rule for. An earlier rule of yours is replaced.
        signature: see above.
        example: positional arguments on which the signature is checked now, no named axis of size
            one. It is checked again, on random values, for whatever shapes ``expand`` meets.
        sizes: axis -> the integer argument that states its size: ``g="groups"``.

    Raises:
        InputError: the signature cannot be read, does not fit the op's arguments, or is not borne
            out by the op (from ``expand`` if it shows there). The op keeps its earlier rule.
    """
    overload = _overload(op)
    new = _custom(overload, signature, sizes)
    if example is not None and not isinstance(example, tuple | list):
        raise InputError(
            f"example is a {type(example).__name__}",
            remedy="pass a tuple of positional arguments: example=(x, weight)",
        )
    if example is not None:
        _check(new, tuple(example), {}, ())
    CUSTOM[overload] = new


def unrule(op: Any) -> None:
    """Forget a rule that was given to an op by ``rule``."""
    overload = _overload(op)
    if CUSTOM.pop(overload, None) is None:
        raise InputError(f"{overload} has no rule of yours", remedy="give it one by gpdfx.rule")


def check_rules(program: Inferred) -> None:
    """Check the user's rules on the shapes and arguments of every node that has one."""
    for node, op in program.inference.ops.items():
        if isinstance(op.rule, Custom):
            given = tree_leaves((node.args, node.kwargs))
            static = [op.is_static(x) for x in given if is_tensor(x)]
            args, kwargs = tree_map(_number, (tuple(node.args), dict(node.kwargs)))
            _check(op.rule, args, kwargs, static, node)


def learn_functions(program: Program) -> None:
    """Find out along which dimensions the user's functions treat elements alike, by running them,
    forward and backward."""
    graphs = [mode.graph for mode in program.modes.values()]
    graphs += [child.graph for child in program.children.values()]  # type: ignore[misc]
    known: dict[Any, UserFunction] = {}
    for node in (node for graph in graphs for node in graph.nodes):
        if isinstance(node.target, UserFunction):
            args = tree_map(_number, tuple(node.args))
            twin = known.setdefault((node.target, *map(shown, args)), node.target)
            if twin is node.target:
                _learn(twin, args)
            node.target.learn_from(twin)


def _learn(function: UserFunction, args: tuple[Any, ...]) -> None:
    function.draws = draws(function, args)
    if function.draws:
        function.why = "it draws random numbers, at the student's width"
        return
    if not linear(function, args):
        function.why = "its backward is not linear in the gradient, which copies share"
        return
    rank = max((x.ndim for x in args if isinstance(x, Tensor)), default=0)

    def fault(moving: Collection[int]) -> Fault | None:
        return check_rule(elementwise(moving), function, args, {}, (), strict=False)

    moving: Collection[int] = range(rank)
    found = fault(moving)
    if found and not found.untried:
        moving = [d for d in range(rank) if not fault([d])]
        found = fault(moving) if moving else found
    if found:
        function.why = f"it is not elementwise: {found.text}"
    else:
        function.rule = elementwise(moving)


def _number(x: Any) -> Any:
    """What a node stands for; a number at the example's sizes."""
    x = value(x)
    symbolic = isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool)
    return hint(x) if symbolic else x


# --------------------------------------------------------------------------- reading the op
def _overload(op: Any) -> Any:
    op = custom_overload(op)
    if is_packet(op):
        if "default" not in op.overloads():
            names = ", ".join(f"{op}.{name}" for name in op.overloads())
            raise InputError(f"{op} has no default overload", remedy=f"pass one of {names}")
        op = op.default
    if not is_overload(op):
        raise InputError(
            f"{op!r} is no op",
            remedy="pass torch.ops.LIBRARY.NAME, or what torch.library.custom_op returned; a plain "
            "function needs no rule, torch.export looks into it",
        )
    return op


def _custom(op: Any, text: str, sizes: dict[str, str]) -> Custom:
    """The rule, if the signature reads and fits the op's schema."""
    if rule_of(op) is not None and op not in CUSTOM:
        raise InputError(f"gpdfx has a rule for {op}", remedy="leave it to that")
    schema = op._schema
    if schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags:
        does = "writes to its arguments" if schema.is_mutable else "draws random numbers"
        raise InputError(
            f"{op} {does}, which a signature cannot describe",
            remedy="give it no rule: it runs at the student's width, between bridges",
        )
    if not isinstance(text, str):
        raise InputError(f"the signature is {text!r}", remedy='write it as "b c, c -> b c"')
    try:
        signature = parse(text)
    except SignatureError as error:
        raise InputError(str(error), remedy="see help(gpdfx.rule)") from error
    tensors = tensor_arguments(op)
    lists = [a.name for a in schema.arguments if "List[" in str(a.type) and a.name in tensors]
    results = [str(r.type) for r in schema.returns]
    if lists or set(results) != {"Tensor"}:
        raise InputError(
            f"{op} takes a list of tensors ({', '.join(lists)})"
            if lists
            else f"{op} returns ({', '.join(results)}), and not only tensors",
            remedy="wrap it in an op that takes and returns single tensors",
        )
    for what, patterns, have in (
        ("tensor arguments", signature.inputs, tensors),
        ("results", signature.outputs, results),
    ):
        if len(patterns) != len(have):
            raise InputError(
                f"{text!r} has {len(patterns)} patterns for the {what} of {op}, which are "
                f"{len(have)}: {', '.join(have)}",
                remedy="write one pattern each, c? for a tensor that may be None",
            )
    _check_names(signature, text)
    integers = [a.name for a in schema.arguments if str(a.type) == "int"]
    for name, argument in sizes.items():
        if not any(name in dim for dims in signature.inputs for dim in dims):
            raise InputError(f"no axis is called {name} in {text!r}", remedy="name one of its axes")
        if argument not in integers:
            raise InputError(
                f"{op} has no integer argument {argument!r}, the size of {name}",
                remedy=f"name one of: {', '.join(integers) or '(it has none)'}",
            )
    made = sig(text, " ".join(tensors), **sizes)
    return Custom(made.infer, made.widen, text, op)


def _check_names(signature: Signature, text: str) -> None:
    """On the right stands what stands on the left; what is new there is spelled ``*name``."""
    known = {n for dims in signature.inputs for dim in dims for n in dim}
    for name in (n for dims in signature.outputs for dim in dims for n in dim):
        if name not in known and name[0] != "*":
            places = re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)
            at = next(m.start() for m in places if m.start() > text.index("->"))
            error = SignatureError(f"{name!r} stands only on the right", text, at)
            raise InputError(str(error), remedy=f"write *{name.strip('.')} if it is a new axis")


# --------------------------------------------------------------------------- asking the op
def _check(
    custom: Custom,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    static: Sequence[bool],
    node: fx.Node | None = None,
) -> None:
    """Raise ``InputError`` if the op does not bear out its rule on tensors like these. ``static``:
    which of them come from weights alone; ``node``: where they come from, else an example of the
    user's, in which no named axis may have size one."""
    tensors = [shown(x) for x in tree_leaves((args, kwargs))]
    key = repr((tensors, *static))
    if key in custom.seen:
        return
    fault = check_rule(custom, custom.op, args, kwargs, static, strict=node is None)
    if fault and not (custom.seen and fault.untried):  # values that only the example has
        verdict = "cannot be tried with" if fault.untried else "does not bear out"
        raise InputError(
            f"{custom.op} {verdict} {custom.text!r} on {', '.join(tensors)}:\n  {fault.text}",
            module_path=(module_path(node) or None) if node else None,
            source=(source(node) or None) if node else None,
            remedy=fault.remedy,
        )
    custom.seen.add(key)
