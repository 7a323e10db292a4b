"""What is frozen, and what can still be asked of it?

A frozen conversion is a copy: it shares no tensor with the module that goes on training. Its weights are in the low
dtype, so nothing can be traced or planned on them that the model in float32 would have to answer.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

import torch

from fxamp.capture import Program, Traced
from fxamp.capture.clone import tensor_copies
from fxamp.dtypes import abbreviate
from fxamp.errors import FxampError, PolicyError
from fxamp.runtime.asked import dtypes_of
from fxamp.runtime.conversion import Conversion

__all__ = ["check_thawed", "frozen", "own_tensors", "refresh"]


def frozen(conversion: Conversion) -> Conversion:
    """The conversion in eval mode, over tensors of its own, with its weights in the low dtype."""
    new = conversion.replanned(conversion.policy, own_tensors(conversion.program), freezing=True)
    new.mode = "eval"
    for _, traced in list(new.traced):
        _prepare(new, traced)
    new.frozen = new.stages.freeze(new)
    new.dtypes = dtypes_of(new.program.whole)
    new.variants = [(mode, variant.of_frozen(new.program)) for mode, variant in new.variants]
    new.traced = [(mode, variant.traced) for mode, variant in new.variants]
    for parameter in new.program.whole.parameters():
        parameter.requires_grad_(False)
    new.program.let_go()
    return new


def own_tensors(program: Program) -> Program:
    """A copy of the program down to its tensors; they may have a history, which a copy does not take."""
    others = vars(program.tree).values(), program.extras.values()
    with torch.no_grad():
        return program.shared(tensor_copies(program.whole.modules(), *others))


def refresh(conversion: Conversion) -> None:
    """Makes the low copies of weights anew, after the weights were loaded."""
    with torch.no_grad():
        for name, (path, _) in (conversion.frozen or {}).items():
            conversion.program.attribute(name).copy_(conversion.program.attribute(path))


def check_thawed(conversion: Conversion) -> None:
    """Refuses another policy for weights that were rounded for one.

    Raises:
        PolicyError: when the conversion is frozen.
    """
    if conversion.frozen is None:
        return
    policy = conversion.policy
    known = f"{policy.name}/{policy.device_type} {abbreviate(policy.dtype)}" if policy.dtype else policy.name
    raise PolicyError(
        f"{conversion.program.name} was frozen for policy {known}: found weights that are rounded for it, expected "
        f"them as they were trained",
        hint="amp.replan(policy).freeze() of the module that it was frozen from",
    )


def _prepare(conversion: Conversion, known: Traced) -> None:
    """Has a kind of call in eval mode too, and in each grad mode when that makes a difference."""
    modes: tuple[Any, ...] = (torch.enable_grad, torch.no_grad, torch.inference_mode) if known.grad else (nullcontext,)
    for mode in modes:
        with suppress(FxampError):  # what cannot be traced is refused when it comes
            with mode():
                traced = conversion.trace_for("eval", known)
            if not any(variant.traced is traced and name == "eval" for name, variant in conversion.variants):
                conversion.variants.append(("eval", conversion._build("eval", traced, conversion.variants)))
