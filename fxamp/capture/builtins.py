"""Which answers do Python's builtins give about traced values?

``isinstance(x, torch.Tensor)`` is False for a proxy, and ``len(x)``, ``int(x.shape[0] / 2)`` or ``max(a, b)`` fail:
the first silently traces the wrong branch. While a model is traced, the module globals of its forward see
versions that know proxies: they are recorded, or answered, or refused.
"""

from __future__ import annotations

import builtins
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

import torch
from torch import fx
from torch.fx.proxy import TraceError

__all__ = ["shadowed_builtins"]


def _isinstance(value: Any, kinds: Any) -> bool:
    if not isinstance(value, fx.Proxy):
        return isinstance(value, kinds)
    known = _kind(value.node)
    if known is None:
        raise TraceError("asks for the type of a value that is not known while tracing")
    flat = kinds if isinstance(kinds, tuple) else (kinds,)
    return any(isinstance(kind, type) and issubclass(known, kind) for kind in flat)


def _is_tensor(value: Any) -> bool:
    return _isinstance(value, torch.Tensor)


def _kind(value: Any) -> type | None:
    """What a traced value will be: a tensor, a size, an int; None when it cannot be told."""
    if not isinstance(value, fx.Node):
        return type(value)
    if value.op in ("placeholder", "get_attr"):
        return torch.Tensor  # an input is taken to be a tensor, unless example inputs say more
    if value.target is getattr:
        return _ATTRIBUTES.get(str(value.args[1]))
    if value.op == "call_method" and value.target in _QUERIES:
        return torch.Size if value.target == "size" and len(value.args) == 1 and not value.kwargs else int
    if value.target is operator.getitem:
        return {torch.Size: int, torch.Tensor: torch.Tensor}.get(_kind(value.args[0]) or object)
    if getattr(value.target, "__module__", None) == "_operator":
        kinds = {_kind(argument) for argument in value.args}
        return torch.Tensor if torch.Tensor in kinds else int if kinds == {int} else None
    return torch.Tensor if value.op != "call_module" and _gives_one_tensor(value) else None


_ATTRIBUTES: Final[dict[str, type]] = {
    "shape": torch.Size,
    "ndim": int,
    "dtype": torch.dtype,
    "device": torch.device,
    "T": torch.Tensor,
    "mT": torch.Tensor,
    "data": torch.Tensor,
}
_QUERIES: Final = ("size", "dim", "numel", "ndimension")


def _gives_one_tensor(node: fx.Node) -> bool:
    """Whether every overload of the ATen operator of that name gives back one tensor."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    packet = getattr(torch.ops.aten, str(name).strip("_"), None)
    if packet is None:
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return all([str(value.type) for value in schema.returns] == ["Tensor"] for schema in schemas)


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        proxy = next((value for value in args if isinstance(value, fx.Proxy)), None)
        if proxy is None:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", function, args, kwargs)

    return call


def _len(value: Any) -> Any:
    if isinstance(value, fx.Proxy) and type(value).__len__ is fx.Proxy.__len__:
        return value.tracer.create_proxy("call_function", len, (value,), {})
    return len(value)


_SHADOWS: Final[dict[str, Callable[..., Any]]] = {
    "isinstance": _isinstance,
    "len": _len,
    **{name: _recorded(getattr(builtins, name)) for name in ("int", "float", "max", "min", "round")},
}


@contextmanager
def shadowed_builtins(*functions: Any) -> Iterator[None]:
    """Shows the versions that know proxies to the modules these functions are written in.

    Names that such a module defines itself, and modules of torch, are left alone.
    """
    undo: list[tuple[dict[str, Any], str]] = []
    try:
        for function in functions:
            namespace = getattr(inspect.unwrap(function), "__globals__", {})
            if str(namespace.get("__name__", "torch")).partition(".")[0] == "torch":
                continue
            for name, shadow in _SHADOWS.items():
                if name not in namespace:
                    namespace[name] = shadow
                    undo.append((namespace, name))
        with mock.patch.object(torch, "is_tensor", _is_tensor):
            yield
    finally:
        for namespace, name in undo:
            del namespace[name]
