"""What is frozen, and what can still be asked of it?

A frozen conversion is a copy: it shares no tensor with the module that goes on training. Its weights are in the low
dtype, so nothing can be traced or planned on them that the model in float32 would have to answer.
"""

from __future__ import annotations

import torch

from fxamp.capture import Layout, Program
from fxamp.capture.clone import tensor_copies
from fxamp.dtypes import abbreviate
from fxamp.errors import FxampError, PolicyError
from fxamp.runtime.conversion import Conversion, dtypes_of

__all__ = ["check_thawed", "frozen", "own_tensors", "refresh"]


def frozen(conversion: Conversion) -> Conversion:
    """The conversion in eval mode, over tensors of its own, with its weights in the low dtype."""
    new = conversion.replanned(conversion.policy, own_tensors(conversion.program))
    new.mode = "eval"
    for _, traced in list(new.traced):
        _prepare(new, traced.layout)
    new.frozen = new.stages.freeze(new)
    new.dtypes = dtypes_of(new.program.whole)
    for parameter in new.program.whole.parameters():
        parameter.requires_grad_(False)
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


def _prepare(conversion: Conversion, layout: Layout) -> None:
    """Traces a kind of call in eval mode that was made in train mode only."""
    if conversion.find(layout) is not None:
        return
    try:
        traced = conversion._trace("eval", layout)
    except FxampError:
        return  # it is refused when it comes
    conversion.variants.append(("eval", conversion._build("eval", traced)))
