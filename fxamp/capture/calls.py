"""Calls that a graph makes and that no function of torch stands for.

Each is a small value that pickles and that torch.fx can print by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

__all__ = ["AutogradFunctionCall", "assign"]


@dataclass(frozen=True)
class AutogradFunctionCall:
    """Applies a ``torch.autograd.Function``, so that its own backward is kept."""

    function: type[torch.autograd.Function]

    @property
    def __name__(self) -> str:
        return f"{self.function.__name__}_apply"

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)


@fx.node.has_side_effect
def assign(module: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute of a module, as the user's forward did while it was traced."""
    setattr(module, name, value)
