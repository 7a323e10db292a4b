"""What belongs to a converted module beside its graph: policy, plan, report, scaler, and its copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxamp.plan import PrecisionPlan
from fxamp.policy import Policy
from fxamp.runtime.frozen import check_thawed, frozen, own_tensors
from fxamp.runtime.timing import seconds_of_calls
from fxamp.scaling import GradScaler

if TYPE_CHECKING:
    from fxamp.runtime.amp_module import AmpModule

__all__ = ["Inspection"]


class Inspection:
    """What the attributes of an ``AmpModule`` stand for, also where the model's own names hide them."""

    def __init__(self, amp: AmpModule) -> None:
        self._amp = amp
        self._conversion = amp._conversion

    @property
    def policy(self) -> Policy:
        """The policy, with its device type and dtype resolved."""
        return self._conversion.policy

    @property
    def plan(self) -> PrecisionPlan:
        """The decisions of the graph of the current mode."""
        return self._conversion.base.plan

    @property
    def graph(self) -> fx.Graph:
        """The graph of the current mode."""
        return self._conversion.base.graph

    @property
    def code(self) -> str:
        """The code that was generated of it."""
        return self._conversion.base.code

    @property
    def scaler(self) -> GradScaler:
        """The paired gradient scaler."""
        return self._conversion.scaler

    def report(self, measure: tuple[Any, ...] | None = None) -> Any:
        """The decisions as a ``fxamp.Report``; with what each call takes for the inputs ``measure``."""
        conversion = self._conversion
        variant, seconds = conversion.base, {}
        if measure is not None:
            variant, values = self._amp._variant_for(measure, {})
            seconds = seconds_of_calls(self._amp._root, variant.graph, values)
        traced, report = variant.traced, conversion.stages.report
        plan, graph, name = variant.plan, variant.graph, conversion.program.name
        return report(name, plan, graph, traced.frontend, traced.failed, conversion.note, seconds)

    def replan(self, policy: str | Policy) -> AmpModule:
        """A new module under another policy."""
        check_thawed(self._conversion)
        self._amp._settle(self._conversion.program)
        amp = self._amp._remade(self._conversion.replanned(Policy.of(policy)))
        return amp.train(self._amp.training)

    def freeze(self) -> AmpModule:
        """A new module for inference with low weights, and with tensors of its own."""
        self._amp._settle(self._conversion.program)
        with torch.inference_mode(False):  # the weights are to serve inputs that want a gradient, too
            if self._conversion.frozen is not None:
                return self._amp._copied(own_tensors(self._conversion.program)).eval()
            return self._amp._remade(frozen(self._conversion)).eval()

    @contextmanager
    def hold_weights(self) -> Iterator[None]:
        """A context in which no weight is cast twice."""
        conversion = self._conversion
        outer, conversion.held = conversion.held, {}
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            conversion.held = outer
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
