"""Networks by name: ``timm:NAME``, ``torchvision:NAME``, ``package.module:CALLABLE``, and two of
our own for small data, ``gpdfx:cnn`` and ``gpdfx:cnn1d``. Nothing is ever downloaded.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GpdfxError, InputError, described, install, nearest, suggest
from .files import read_tensors
from .passes.program import raised_at

Shape = tuple[int, ...]
Options = dict[str, Any]
Builder = Callable[[], nn.Module]


# --------------------------------------------------------------------------- networks of our own
def cnn(num_classes: int = 10, in_chans: int = 1) -> nn.Module:
    """Three 3x3 convolutions, for small images (N, in_chans, H, W)."""
    return _convolutions(nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d, 3, in_chans, num_classes)


def cnn1d(num_classes: int = 10, in_chans: int = 1) -> nn.Module:
    """Three convolutions of length 5, for short signals (N, in_chans, L)."""
    return _convolutions(nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d, 5, in_chans, num_classes)


def _convolutions(
    conv: Any, norm: Any, pool: Any, length: int, inputs: int, outputs: int
) -> nn.Module:
    layers: list[nn.Module] = []
    for width, stride in ((16, 1), (32, 2), (32, 2)):
        layers += [conv(inputs, width, length, stride, length // 2, bias=False)]
        layers += [norm(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, pool(1), nn.Flatten(), nn.Linear(inputs, outputs))


OWN: dict[str, Callable[..., nn.Module]] = {"cnn": cnn, "cnn1d": cnn1d}
DEFAULTS = {"digits": "gpdfx:cnn", "mnist1d": "gpdfx:cnn1d"}
"""Source of data -> the student that a run has if none is named."""


# --------------------------------------------------------------------------- by name
def load(
    name: str, *, classes: int | None = None, shape: Shape | None = None, seed: int = 0
) -> nn.Module:
    """Build a model by its command-line name, with random weights.

    Args:
        classes: of its logits, and
        shape: of one input, (C, H, W) or (C, L): passed on to constructors that take
            ``num_classes``, ``in_chans`` (and ``img_size`` where timm bakes it).
        seed: of the weights.

    Raises:
        InputError: an unknown name, with what comes near.
    """
    library, _, model = name.partition(":")
    if not model:
        other = "write timm:NAME, torchvision:NAME or package.module:CALLABLE"
        raise InputError(f"{name!r} names no library", remedy=_near(name, "", other))
    asked = {"num_classes": classes, "in_chans": shape and shape[0]}
    options = {key: value for key, value in asked.items() if value is not None}
    find = {"timm": _timm, "torchvision": _torchvision, "gpdfx": _gpdfx}.get(library)
    try:
        create = find(model, options, shape) if find else _imported(library, model, options)
    except ImportError as error:
        raise InputError(str(error), remedy=install("vision")) from error
    torch.manual_seed(seed)
    with _users_code(f"{name} cannot be built"):
        network = create()
    if not isinstance(network, nn.Module):
        text = f"{name} gives a {type(network).__name__}, not a torch.nn.Module"
        raise InputError(text, remedy=CALLABLE)
    return network


CALLABLE = "name a function, class or functools.partial that returns the network without arguments"
LIBRARIES: dict[str, Callable[[], Collection[str]]] = {
    "timm": lambda: importlib.import_module("timm").list_models(),
    "torchvision": lambda: importlib.import_module("torchvision").models.list_models(),
    "gpdfx": lambda: OWN,
}


def _near(model: str, library: str, otherwise: str) -> str:
    """A remedy with the names that come near in all libraries that are there, first in this one."""
    places: dict[str, str] = {}
    for place in sorted(LIBRARIES, key=lambda name: name != library):
        with contextlib.suppress(ImportError):
            places = dict.fromkeys(LIBRARIES[place](), place) | places
    close = [f"{places[name]}:{name}" for name in nearest(model, places)]
    return f"did you mean {', '.join(close)}?" if close else otherwise


def _check_known(model: str, library: str) -> None:
    if model not in LIBRARIES[library]():
        listed = f"{library}.{'models.' * (library == 'torchvision')}list_models() names all"
        remedy = _near(model, library, listed)
        raise InputError(f"{library} has no model {model!r}", remedy=remedy)


def _gpdfx(name: str, options: Options, shape: Shape | None) -> Builder:
    _check_known(name, "gpdfx")
    return partial(OWN[name], **options)


def _timm(name: str, options: Options, shape: Shape | None) -> Builder:
    import timm

    _check_known(name, "timm")
    if options.get("in_chans") == 3:  # the default, which not every network takes as an argument
        del options["in_chans"]
    pretrained = timm.models.get_pretrained_cfg(name)
    if shape is not None and getattr(pretrained, "fixed_input_size", False):
        options["img_size"] = shape[1:]
    return partial(timm.create_model, name, **options)


def _torchvision(name: str, options: Options, shape: Shape | None) -> Builder:
    """Without weights, also where a backbone would bring its own."""
    import torchvision

    _check_known(name, "torchvision")
    builder = torchvision.models.get_model_builder(name)
    none = dict.fromkeys({"weights", "weights_backbone"} & {*inspect.signature(builder).parameters})
    return partial(builder, **none, **_taken(options, ["num_classes"]))


def _imported(module: str, name: str, options: Options) -> Builder:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if module.endswith(".py"):  # a file below the working folder
        module = ".".join(Path(module).with_suffix("").parts)
    with _users_code(f"{module} cannot be imported"):
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            remedy = suggest(module, LIBRARIES, "write package.module:CALLABLE; " + CALLABLE)
            raise InputError(f"cannot find {module}:{name}: {error}", remedy=remedy) from error
    try:
        builder = getattr(found, name)
    except AttributeError as error:
        remedy = suggest(name, [k for k in vars(found) if k[0] != "_"], CALLABLE)
        raise InputError(f"cannot find {module}:{name}: {error}", remedy=remedy) from error
    if isinstance(builder, nn.Module):
        return lambda: builder
    if not callable(builder):
        text = f"{module}:{name} is a {type(builder).__name__}, and cannot be called"
        raise InputError(text, remedy=CALLABLE)
    try:
        parameters = inspect.signature(builder).parameters
    except ValueError:  # compiled code need not say
        return partial(builder)
    taken = _taken(options, parameters)
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if missing := [p for p in needed if p not in taken]:
        keywords = ", ".join(f"{p}=..." for p in missing)
        raise InputError(
            f"{module}:{name} needs {', '.join(missing)}",
            remedy=f"write NAME = functools.partial({name}, {keywords}), or a function without "
            f"arguments, in {module}.py, and give {module}:NAME",
        )
    return partial(builder, **taken)


@contextlib.contextmanager
def _users_code(what: str) -> Iterator[None]:
    """What the code of a network raises where it is imported or built, as one line of it."""
    try:
        yield
    except (GpdfxError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{what}: {described(error)}",
            source=raised_at(error),
            remedy="mend that, or name another network",
        ) from error


def _taken(options: Options, names: Collection[str]) -> Options:
    return {key: value for key, value in options.items() if key in names}


# --------------------------------------------------------------------------- weights
WRAPPERS = "module.", "_orig_mod."
"""What DistributedDataParallel and torch.compile put before every key."""


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], more: Builder | None = None
) -> dict[str, torch.Size]:
    """Read a ``state_dict`` into a model: a safetensors file, or one of ``torch.save`` that holds
    tensors (also under ``state_dict`` or ``model``). No code of the file runs.

    Args:
        more: builds the network for more classes. What the file has for another number of classes
            is left out: what differs from the model in no size but those that differ in ``more()``.

    Returns:
        What was left out, and its size in the file.

    Raises:
        InputError: no such file, or the first keys that do not fit.
    """
    state, own = read_weights(path), model.state_dict()
    sizes = {k: (state[k].shape, x.shape) for k, x in own.items() if k in state}
    other = {k: pair for k, pair in sizes.items() if pair[0] != pair[1]}
    wider = more().state_dict() if other and more is not None else {}
    left = {k for k, pair in other.items() if k in wider and _by_classes(*pair, wider[k].shape)}
    faults = {
        "of another size": [
            f"{k} {(*a,)}, not {(*b,)}" for k, (a, b) in other.items() if k not in left
        ]
    }
    if other.keys() == left:
        found = model.load_state_dict(state | {k: own[k] for k in left}, strict=False)
        faults = {"missing": found.missing_keys, "unknown": found.unexpected_keys}
    wrong = [f"{what}: {_first(names)}" for what, names in faults.items() if names]
    if wrong:
        raise InputError(
            f"the weights of {path} do not fit {type(model).__name__}: {'; '.join(wrong)}",
            remedy="give weights of this very network; its classifier alone may be of other "
            "classes, where training begins and the network's constructor takes num_classes",
        )
    return {k: theirs for k, (theirs, _) in other.items()}


def _by_classes(theirs: torch.Size, mine: torch.Size, wider: torch.Size) -> bool:
    """Whether sizes differ by the number of classes alone.

    (1000, 64), (10, 64), (11, 64) -> True; (1000, 32), (10, 64), (11, 64) -> False
    """
    same_rank = len(theirs) == len(mine) == len(wider)
    return same_rank and all(a == b or b != c for a, b, c in zip(theirs, mine, wider, strict=True))


def _first(names: list[str], count: int = 3) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The ``state_dict`` of a file; see ``load_weights``."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"there is no file {file}", remedy="name a state_dict in a file")
    state: Any
    try:
        if file.suffix == ".safetensors":
            state, _ = read_tensors(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged, of another kind, or one that wants to run code
        raise InputError(
            f"cannot read weights from {file}: {described(error)}",
            remedy="save the state_dict with safetensors.torch.save_file or torch.save",
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise InputError(f"{file} holds no state_dict", remedy="save model.state_dict()")
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): x for name, x in state.items()}
    return dict(state)
