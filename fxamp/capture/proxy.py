"""What does a traced value do that torch.fx's own does not?

``x += y`` and ``x[i] = y`` are recorded as the writes they are (plain torch.fx turns the first into
``x = x + y`` and refuses the second), attributes are read where the program reads them, and setting
an attribute of a traced value is refused instead of lost.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import fx
from torch.fx.proxy import Attribute, TraceError

from fxamp.capture.builtins import known_kind
from fxamp.capture.calls import assign
from fxamp.capture.failures import HiddenError
from fxamp.capture.packed import ORDERS, hands_on_at_once
from fxamp.capture.source import user_frame

__all__ = ["MAY_BE_NONE", "AmpAttribute", "AmpParameterProxy", "AmpProxy", "SettlingProxy"]

_OWN = frozenset({"tracer", "node", "root", "attr", "_node", "_tensor"})
# Attributes of a tensor that code asks whether they are None, which a trace cannot see.
MAY_BE_NONE: Final = frozenset({"grad", "grad_fn", "_base", "_grad", "_grad_fn"})
_REFLECTED = "radd rsub rmul rtruediv rfloordiv rmod rpow rmatmul rand ror rxor".split()
_INPLACE = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift".split()


class _Recorded(fx.Proxy):
    """What our proxies add to torch.fx's."""

    def __getattr__(self, name: str) -> Any:
        if name in ORDERS and not hands_on_at_once(user_frame(sys._getframe(1))):
            raise TraceError(f"asks for the {name} of a packed sequence, which only a run tells")
        if name in MAY_BE_NONE:
            what = f"reads .{name} of a tensor, which may be None at another call"
            raise self.tracer._refusal(what)  # type: ignore[attr-defined]
        kind = self._kind()
        if name.startswith("__array") or (kind is not None and not hasattr(kind, name)):
            raise AttributeError(name)  # numpy asks; it would take a traced value for an array
        attribute = (AmpAttribute if self.tracer.facts is None else SettlingAttribute)(self, name)  # type: ignore[attr-defined]
        if not callable(getattr(torch.Tensor, name, None)):
            # Data, not a method: its value is taken here, not at the first use.
            value = self.tracer.create_proxy("call_function", getattr, (self, name), {})
            if value is None:
                return None
            attribute._node = value.node
        return attribute

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_is_param":
            raise TraceError("makes a parameter, which would be a new one at every call")
        if name not in _OWN and not hasattr(torch.Tensor, name) and self.tracer.is_users(self):  # type: ignore[attr-defined]
            self.tracer.create_proxy("call_function", assign, (self, name, value), {})
            return
        if name not in _OWN:
            raise HiddenError(f"sets the attribute '{name}' of a tensor")
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        # A tensor is found by identity; of a size or a dtype, a set or a dict wants the value.
        return object.__hash__(self) if self._kind() is None else hash(self.tracer.settled(self))  # type: ignore[attr-defined]

    def _kind(self) -> type | None:
        """What this will be, when that is known and no tensor."""
        method = isinstance(self, AmpAttribute) and self._node is None
        kind = None if method else known_kind(self.node)
        return None if kind is torch.Tensor else kind

    def __len__(self) -> int:
        # Only C code asks, on its way to iterate: the builtin is another one while a model is traced.
        return self.tracer.settled_length(self)  # type: ignore[attr-defined, no-any-return]

    def __contains__(self, value: Any) -> Any:
        # Of a tensor, whether any element is the value; Python would go by its rows.
        return self.tracer.create_proxy("call_function", operator.contains, (self, value), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _record_inplace(name: str) -> Any:
    target = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


def _record_named(name: str) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_method", name, (self, other), {})


def _record_reflected(name: str) -> Any:
    plain = getattr(fx.Proxy, name)

    def method(self: Any, other: Any) -> Any:
        if isinstance(other, fx.Proxy | torch.Tensor):  # called by its name: what a tensor does, it does from its side
            return self.tracer.create_proxy("call_method", name, (self, other), {})
        return plain(self, other)

    return method


for _name in _INPLACE:
    setattr(_Recorded, f"__{_name}__", _record_inplace(_name))
for _name in ("__div__", "__idiv__", "__rdiv__"):  # torch's own names from Python 2, which torch.fx takes for operators
    setattr(_Recorded, _name, _record_named(_name))
for _name in _REFLECTED:
    setattr(_Recorded, f"__{_name}__", _record_reflected(f"__{_name}__"))


class AmpProxy(_Recorded):
    """A traced value."""


class AmpAttribute(_Recorded, Attribute):
    """An attribute of a traced value, or a method of it that is about to be called."""


class _Settling(_Recorded):
    """A value that example inputs tell about: where Python needs a number, it gets that one."""

    def __index__(self) -> int:
        value = self.tracer.settled(self)  # type: ignore[attr-defined]
        if not isinstance(value, int):
            raise TypeError("a traced value cannot be interpreted as an integer")
        return value


class SettlingProxy(_Settling, AmpProxy):
    """A traced value, when example inputs are given."""


class SettlingAttribute(_Settling, AmpAttribute):
    """An attribute of a traced value, when example inputs are given."""


class AmpParameterProxy(_Recorded):
    """A traced parameter or buffer. Its shape is known while tracing, so code may branch on it."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self._tensor = tensor

    @property
    def requires_grad(self) -> Any:
        if isinstance(self._tensor, torch.nn.Parameter):
            return self.tracer.answer(self._tensor, "requires_grad")  # type: ignore[attr-defined]
        return self.__getattr__("requires_grad")

    @property
    def shape(self) -> torch.Size:
        self.node.meta["sized"] = True  # so that nobody gives it another size unnoticed
        return self._tensor.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        self.node.meta["sized"] = True
        return len(self._tensor)

    def __iter__(self) -> Iterator[Any]:
        return self.tracer.iter(self)
