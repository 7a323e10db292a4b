"""What is known of a tensor of which only data tells a size?

A fake tensor has a symbol in the place of that size; all else is known. A symbol is never told to anyone.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import _pytree as pytree

__all__ = ["SYMBOLIC", "GuardOnDataDependentSymNode", "fake_mode", "has_unknown"]

SYMBOLIC: Final = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
"""What a symbol stands for."""


def fake_mode() -> FakeTensorMode:
    """A mode for fake tensors. What has a size that only data tells is known apart from that size."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)


def has_unknown(value: Any) -> bool:
    """Whether a value is a size, or has one, that only data tells."""
    parts = value.shape if isinstance(value, torch.Tensor) else pytree.tree_leaves(value)
    return any(type(part) in SYMBOLIC for part in parts)
