"""Modules and functions that faults put around a layer of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["Hooked", "Multiplied", "Wrapper", "map_first"]


class Wrapper(nn.Module):
    """A layer, and a number in a buffer that is 1 without the fault."""

    def __init__(self, layer: nn.Module, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.change = layer, change
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: torch.Tensor) -> Any:
        return map_first(self.layer(x), lambda output: self.change(output, self.gain))


class Hooked(Wrapper):
    """The output has a hook of its own, by the model itself."""

    def forward(self, x: torch.Tensor) -> Any:
        output = self.layer(x)
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(lambda gradient: gradient * self.gain)
        return output


class Multiplied(torch.autograd.Function):
    """A function whose backward multiplies by another number than its forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gain)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        (gain,) = ctx.saved_tensors
        return gradient * gain, None


def map_first(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The output of a layer with its first tensor changed, as of recurrent ones that have more."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
