"""What does a function of torch's do that is written in Python?

``F.normalize`` and its like first ask whether an argument wants to handle the call itself, which a traced value
does, so torch.fx records one call that autocast alone could see into. Their bodies are plain torch: tracing
into them makes every call inside visible.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final

import torch
from torch import nn
from torch._jit_internal import boolean_dispatched

from fxamp.capture.calls import has_hooks

__all__ = ["body_of", "gives_no_weights"]

_QUESTIONS: Final = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def body_of(kind: str, target: Any) -> Callable[..., Any] | None:
    """The function or method without its question, or None when it is not written in Python or asks none.

    Args:
        kind: "call_function" or "call_method".
        target: the function, or the name of the method.

    Example::

        >>> body_of("call_function", torch.nn.functional.normalize).__name__, body_of("call_method", "relu")
        ('normalize', None)
    """
    function = getattr(torch.Tensor, target, None) if kind == "call_method" else target
    if not isinstance(function, FunctionType):
        return None
    branches = boolean_dispatched.get(function)
    if branches is None:
        return _without_question(function)
    chosen = {flag: _without_question(branches[key]) for flag, key in ((True, "if_true"), (False, "if_false"))}
    return functools.partial(_dispatch, branches, chosen)


def _dispatch(branches: dict[str, Any], chosen: dict[bool, Any], *args: Any, **kwargs: Any) -> Any:
    """One of two functions by an argument of theirs, as ``torch.lu`` and the pools with indices are made."""
    index, name = branches["index"], branches["arg_name"]
    flag = args[index] if index < len(args) else kwargs.get(name, branches["default"])
    return chosen[bool(flag)](*args, **kwargs)


@functools.cache
def _without_question(function: FunctionType) -> Callable[..., Any] | None:
    if not function.__module__.startswith("torch.") or not set(_QUESTIONS) & set(function.__code__.co_names):
        return None
    if any(instruction.opname == "STORE_ATTR" for instruction in dis.get_instructions(function)):
        return None  # it sets something up, as register_hook does, and is no arithmetic
    space = {**function.__globals__, **dict.fromkeys(_QUESTIONS, _handles_nothing)}
    body = FunctionType(function.__code__, space, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _handles_nothing(*args: Any) -> bool:
    return False


def gives_no_weights(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether attention is called so that it gives None beside its output; code may ask whether it does."""
    attends = isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    if not attends or has_hooks(module):
        return False
    asked = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return asked.get("need_weights", True) is False
