"""What is refused of a call of a converted module?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxamp.errors import CaptureError, FxampError, describe

__all__ = [
    "changed_after_freezing",
    "check_loss",
    "not_a_scalar",
    "not_before_freezing",
    "not_while_compiling",
    "other_mode",
    "too_many",
]


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


def not_before_freezing(name: str, given: list[str], misfit: str | None = None) -> CaptureError:
    """The error for a call that a frozen module has no graph for; ``misfit`` is what does not fit one that it has."""
    reason = f": {misfit}" if misfit else ""
    return CaptureError(
        f"{name} was frozen before a call that gives {', '.join(given) or 'such arguments'}{reason}",
        hint="call amp that way once, then amp.freeze()",
    )


def not_while_compiling() -> CaptureError:
    """The error for a call that has no graph yet and comes from compiled code."""
    return CaptureError(
        "this call needs a graph of its own, which cannot be made while torch.compile traces",
        hint="call the converted module this way once before torch.compile(amp) comes to it",
    )


def too_many(limit: int, of_one_kind: bool) -> CaptureError:
    """The error for one kind of call more; ``of_one_kind``: with the arguments of a known one, but other values."""
    changes = "a value that it branches on" if of_one_kind else "an optional argument"
    hint = "put what branches on it into a submodule of its own" if of_one_kind else "pass what changes as a tensor"
    return CaptureError(f"{limit} kinds of calls were traced already: {changes} changes with every call", hint=hint)


def changed_after_freezing(name: str) -> CaptureError:
    """The error for modules that are others than those that were frozen."""
    return CaptureError(
        f"the modules of {name} were changed after it was frozen: found other hooks, parameters or values than "
        f"its graphs were made for",
        hint="change the module that it was frozen from, then amp.freeze()",
    )
