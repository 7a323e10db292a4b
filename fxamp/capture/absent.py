"""Which values may be None?

``x is None`` cannot be seen by a trace, and a traced value never is. What comes from code that is not torch's may be,
so it is checked in the graph where the program gets hold of it.
"""

from __future__ import annotations

import dis
import operator
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import torch
from torch import fx, nn

from fxamp.capture.calls import AutogradFunctionCall, ScriptedCall, has_hooks
from fxamp.capture.packed import ORDERS

__all__ = ["is_dropped", "may_be_none"]

_TORCHS: Final = ("torch", "fxamp", "_operator", "builtins", "math", "numpy")
_PARTS: Final = (operator.getitem, getattr)


def may_be_none(node: fx.Node, module: Callable[[str], Any]) -> bool:
    """Whether a value, or a part of it, may be None for all that is known.

    Args:
        node: the value.
        module: finds a submodule by the target of a call.
    """
    if node.op == "call_module":
        return _is_users(module(str(node.target)))
    if node.op == "call_function" and node.target not in _PARTS:
        target: Any = node.target
        kind = getattr(target, "__module__", None) or "torch"
        return isinstance(target, AutogradFunctionCall | ScriptedCall) or kind.partition(".")[0] not in _TORCHS
    if node.op == "call_function" or node.op == "call_method":
        whole = node.args[0]
        name = node.args[1] if node.target is getattr else node.target
        if name in ORDERS or (isinstance(name, str) and hasattr(torch.Tensor, name)) or not isinstance(whole, fx.Node):
            return False  # whoever may go by the order of a packed sequence is refused it
        return bool(whole.meta.get("object")) or may_be_none(whole, module)
    return False


def _is_users(root: nn.Module) -> bool:
    return any(
        has_hooks(module)
        or isinstance(module, torch.jit.ScriptModule)
        or not type(module).__module__.startswith("torch.nn.")
        for module in root.modules()
    )


def is_dropped(frame: FrameType | None) -> bool:
    """Whether the statement that runs in a frame does nothing with the result of its call."""
    if frame is None:
        return False
    following = (found for found in dis.get_instructions(frame.f_code) if found.offset > frame.f_lasti)
    found = next(following, None)
    return found is not None and found.opname == "POP_TOP"
