"""What is refused of a call of a converted module?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxamp.errors import CaptureError, FxampError, describe

__all__ = ["check_loss", "not_a_scalar", "other_mode"]


def other_mode(amp: nn.Module, module: nn.Module, traced: bool) -> CaptureError:
    """The error for a submodule that is in another mode than the graph was traced with."""
    path = next((name for name, found in amp.named_modules() if found is module), "")
    return CaptureError(
        f"submodule '{path}' has training={module.training}, but the graph was traced with training={traced}",
        hint=f"put model.{path} into that mode before fxamp.convert(model), or switch the whole module",
    )


def check_loss(loss: Any) -> None:
    """Refuses a loss that is not a scalar.

    Raises:
        FxampError: when it is not.
    """
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return
    found = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else describe(loss)
    raise not_a_scalar(found)


def not_a_scalar(found: str) -> FxampError:
    """The error for a loss that gives something else."""
    return FxampError(f"the loss returns {found}: expected one scalar", hint="reduce it, for example with .mean()")
