"""Which answers do Python's builtins give about traced values?

``isinstance(x, torch.Tensor)`` is False for a proxy, which silently traces the wrong branch, and ``len(x)`` or
``max(a, b)`` fail. While a model is traced, the builtins know proxies: a call is recorded, answered or refused.
Code of torch that handles proxies itself gets the plain answers.
"""

from __future__ import annotations

import builtins
import functools
import operator
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final
from unittest import mock

import torch
from torch import fx
from torch.fx.proxy import TraceError

from fxamp.capture.source import is_library

__all__ = [
    "NUMBERS",
    "known_kind",
    "plain_builtins",
    "shadowed_builtins",
    "shadowed_numbers",
    "standing_for",
    "unpatched",
]

# Code of torch's that is traced into.
_TRACED: Final = tuple(
    os.path.join(os.path.dirname(torch.__file__), *path)
    for path in (
        ("nn", "modules", ""),
        ("nn", "functional.py"),
        ("functional.py",),
        ("_tensor.py",),
        ("_linalg_utils.py",),
        ("_lowrank.py",),
        ("masked", ""),
        ("distributions", ""),
    )
)
_plain_isinstance = builtins.isinstance


def _asked_by_user() -> bool:
    """Whether it is the user's code that asks, or a module's or a question of torch's on its behalf."""
    code = sys._getframe(2).f_code
    return not is_library(code.co_filename) or code.co_filename.startswith(_TRACED) or code.co_name == "is_tensor"


def _isinstance(value: Any, kinds: Any) -> bool:
    if not _plain_isinstance(value, fx.Proxy) or not _asked_by_user():
        return _plain_isinstance(value, kinds)
    real = value.__dict__.get("_tensor")
    if real is not None:
        return _plain_isinstance(real, kinds)  # a parameter may be asked whether it is one
    known = _known_kind(value)
    flat = kinds if _plain_isinstance(kinds, tuple) else (kinds,)
    return any(_plain_isinstance(kind, type) and issubclass(known, kind) for kind in flat)


def _hasattr(value: Any, name: str) -> bool:
    if not _plain_isinstance(value, fx.Proxy) or not _asked_by_user():
        return _plain_hasattr(value, name)
    real = value.__dict__.get("_tensor")
    if real is not None:
        return _plain_hasattr(type(real), name) or _plain_hasattr(real, name)
    return _plain_hasattr(_known_kind(value), name)


def _callable(value: Any) -> bool:
    if not _plain_isinstance(value, fx.Proxy) or not _asked_by_user():
        return _plain_callable(value)
    if value.__dict__.get("_tensor") is not None:
        return False  # though a proxy is
    method = _plain_isinstance(value, fx.proxy.Attribute) and value._node is None
    return method or any("__call__" in vars(kind) for kind in _known_kind(value).__mro__)


_plain_hasattr, _plain_callable = builtins.hasattr, builtins.callable
_STANDS_FOR: Final = "__fxamp_stands_for__"


def standing_for(function: Any, patch: Any) -> Callable[..., Any]:
    """The patch, marked so that ``unpatched`` finds what it is in the place of."""
    setattr(patch, _STANDS_FOR, function)
    return patch  # type: ignore[no-any-return]


def unpatched(value: Any) -> Any:
    """What a value is while nothing is traced."""
    return getattr(value, _STANDS_FOR, value)


standing_for(_plain_isinstance, _isinstance)
standing_for(_plain_hasattr, _hasattr)
standing_for(_plain_callable, _callable)


def _known_kind(value: fx.Proxy) -> type:
    facts = getattr(value.tracer, "facts", None)
    known = (facts.kind(value.node) if facts is not None else None) or known_kind(value.node)
    if known is None:
        raise TraceError("asks for the type of a value that is not known while tracing")
    if value.node.op == "placeholder":
        value.node.meta["asked"] = True  # a call that brings something else needs another graph
    return known


def known_kind(value: Any) -> type | None:
    """What a traced value will be: a tensor, a size, an int; None when it cannot be told."""
    if not _plain_isinstance(value, fx.Node):
        return type(value)
    waiting = [value]  # and not by recursion: programs go on for thousands of calls, and use values twice
    while waiting:
        node = waiting.pop()
        unknown = [source for source in _kind_sources(node) if source not in _kinds]
        if unknown and node not in _kinds:
            waiting += [node, *unknown]
        elif node not in _kinds:
            _kinds[node] = _kind_of(node)
    return _kinds[value]


_kinds: Final[weakref.WeakKeyDictionary[fx.Node, type | None]] = weakref.WeakKeyDictionary()


def _kind_sources(node: fx.Node) -> list[fx.Node]:
    """The values whose kinds tell that of a node."""
    if node.target is getattr or node.target is operator.getitem:
        return node.all_input_nodes[:1]
    return node.all_input_nodes if getattr(node.target, "__module__", None) == "_operator" else []


def _kind_of(value: fx.Node) -> type | None:
    if value.op in ("placeholder", "get_attr"):
        return torch.Tensor  # an input is taken to be a tensor, unless example inputs say more
    if value.target is getattr:
        of_device = known_kind(value.args[0]) is torch.device
        return (_OF_A_DEVICE if of_device else _ATTRIBUTES).get(str(value.args[1]))
    if value.op == "call_method" and value.target in _QUERIES:
        return torch.Size if value.target == "size" and len(value.args) == 1 and not value.kwargs else int
    if value.target is operator.getitem:
        if isinstance(value.args[1], slice):  # a part of what it was
            return known_kind(value.args[0])
        return {torch.Size: int, torch.Tensor: torch.Tensor}.get(known_kind(value.args[0]) or object)
    if getattr(value.target, "__module__", None) == "_operator":
        if "kind" not in value.meta:  # each operand may be made of the same ones
            kinds = {known_kind(argument) for argument in value.args}
            value.meta["kind"] = torch.Tensor if torch.Tensor in kinds else int if kinds == {int} else None
        return value.meta["kind"]  # type: ignore[no-any-return]
    return torch.Tensor if value.op != "call_module" and _gives_one_tensor(value.target) else None


_ATTRIBUTES: Final[dict[str, type]] = {
    "shape": torch.Size,
    "ndim": int,
    "dtype": torch.dtype,
    "device": torch.device,
    "layout": torch.layout,
    "T": torch.Tensor,
    "mT": torch.Tensor,
    "data": torch.Tensor,
}
NUMBERS: Final = (int, torch.Size, torch.dtype, torch.device, torch.layout, str)
"""The kinds of values that are known to be no tensors."""
_OF_A_DEVICE: Final[dict[str, type]] = {"type": str, "index": int}
_QUERIES: Final = ("size", "dim", "numel", "ndimension")


@functools.cache
def _gives_one_tensor(target: Any) -> bool:
    """Whether every overload of the ATen operator of that name gives back one tensor."""
    name = target if _plain_isinstance(target, str) else getattr(target, "__name__", "")
    packet = getattr(torch.ops.aten, str(name).strip("_"), None)
    if packet is None:
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return all([str(value.type) for value in schema.returns] == ["Tensor"] for schema in schemas)


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        proxy = next((value for value in args if _plain_isinstance(value, fx.Proxy)), None)
        if proxy is None:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", function, args, kwargs)

    return standing_for(function, call)


def _shadow_len() -> Callable[..., Any]:
    length = builtins.len

    def call(value: Any) -> Any:
        if _plain_isinstance(value, fx.Proxy) and not _plain_hasattr(type(value), "shape"):
            fixed = value.tracer.fixed_length(value)
            return fixed or value.tracer.create_proxy("call_function", length, (value,), {})
        return length(value)

    return standing_for(length, call)


class _NumberKind(type):
    """``int`` and ``float`` that record a call with a traced value, and are the plain ones to whoever asks."""

    plain: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _recorded(cls.plain)(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return _plain_isinstance(instance, cls.plain)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.plain)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.plain

    def __hash__(cls) -> int:
        return hash(cls.plain)


class _Int(int, metaclass=_NumberKind):
    plain = __fxamp_stands_for__ = int


class _Float(float, metaclass=_NumberKind):
    plain = __fxamp_stands_for__ = float


@contextmanager
def shadowed_builtins(*, numbers: bool) -> Iterator[None]:
    """Puts the versions that know proxies in place of the builtins until the block ends.

    Args:
        numbers: ``int`` and ``float`` too. These are also types, so that is only for code that needs it.
    """
    recorded = {name: _recorded(getattr(builtins, name)) for name in ("max", "min", "round")}
    shadows: Any = {
        "isinstance": _isinstance,
        "hasattr": _hasattr,
        "callable": _callable,
        "len": _shadow_len(),
        **recorded,
    }
    finfo = _recorded(torch.finfo)
    both = shadowed_numbers() if numbers else nullcontext()
    with mock.patch.multiple(builtins, **shadows), mock.patch.object(torch, "finfo", finfo), both, _answered_plainly():
        yield


@contextmanager
def _answered_plainly() -> Iterator[None]:
    """Spares code that gets the plain answers anyway, by ``_asked_by_user``, the question whose code it is."""
    plain = {"isinstance": _plain_isinstance, "hasattr": _plain_hasattr}
    spaces = [space for space in _tracing_spaces() if plain.keys().isdisjoint(space)]
    try:
        for space in spaces:
            space.update(plain)
        yield
    finally:
        for space in spaces:
            for name in plain:
                del space[name]


@functools.cache
def _tracing_spaces() -> tuple[dict[str, Any], ...]:
    """The variables of the files of torch and of ours that make a graph, and handle proxies themselves."""
    return tuple(vars(module) for name, module in list(sys.modules.items()) if name.startswith(_TRACING))


_TRACING: Final = (
    "torch.fx._symbolic_trace",
    "torch.fx.graph",
    "torch.fx.node",
    "torch.fx.proxy",
    "torch.utils._pytree",
    "torch._library.opaque_object",
    "torch.nn.parameter",
    "fxamp.capture.",
    "fxamp.policy.",
)


@contextmanager
def plain_builtins() -> Iterator[None]:
    """The builtins as they are without a trace until the block ends, for code that is no part of the model."""
    patched = [(space, name, space[name]) for space in _SPACES for name in _SHADOWED if name in space]
    try:
        for space, name, value in patched:
            space[name] = unpatched(value)
        yield
    finally:
        for space, name, value in patched:
            space[name] = value


_SPACES: Final[tuple[dict[str, Any], ...]] = (vars(builtins), vars(torch))
_SHADOWED: Final = (
    "isinstance",
    "hasattr",
    "callable",
    "len",
    "max",
    "min",
    "round",
    "int",
    "float",
    "finfo",
    "Generator",
)


@contextmanager
def shadowed_numbers() -> Iterator[None]:
    """Records ``int`` and ``float`` of traced values until the block ends."""
    shadows: Any = {"int": _Int, "float": _Float}
    with mock.patch.multiple(builtins, **shadows):
        yield
