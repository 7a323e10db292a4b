"""Everything a converted module was made from: program, policy, and per mode and layout a graph.

It lives in the ``AmpModule`` and makes new graphs when a new kind of call, policy or device asks for
one. The later stages (rewriting, reporting) are handed in as functions, so that imports go one way.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxamp.capture import Layout, Program, Setting, Traced, grad_mode, values_of
from fxamp.capture.caches import forgetting_fakes
from fxamp.errors import CaptureError, PolicyError, nearest
from fxamp.plan import PrecisionPlan
from fxamp.plan.rules import check_overridable
from fxamp.policy import Policy
from fxamp.runtime.asked import Asked, Stages, ambient_of, base_layout, dtypes_of, mode_of
from fxamp.runtime.checks import changed_after_freezing, not_before_freezing, not_while_compiling, too_many
from fxamp.runtime.variant import Variant
from fxamp.scaling import GradScaler

__all__ = ["Conversion"]

MAX_VARIANTS = 32


@dataclass
class Conversion:
    """The state of an ``AmpModule``.

    Attributes:
        program: what is traced.
        asked, stages: what to make of it, and how.
        policy: resolved.
        mode: "train", "eval", or "as_is" for a model whose modules were in different modes.
        variants: (mode, layout) to graph, in the order they came.
        layout: of the call that ``graph`` and the report show.
        examples: the values of its placeholders, when example inputs were given.
        by_example: whether any were given, so that other values may need another graph.
        dtypes: those of the parameters and buffers when the graphs were planned.
        refused: layouts whose numbers have to be baked in.
        written: how often the parameters had been written to at the last call that looked.
        note: what the report has to say beside the decisions.
        frozen: None, or what ``freeze`` told when the weights were stored in the low dtype.
    """

    program: Program
    asked: Asked
    stages: Stages
    policy: Policy
    mode: str
    layout: Layout
    examples: list[Any] | None = None
    by_example: bool = False
    traced: list[tuple[str, Traced]] = field(default_factory=list)
    variants: list[tuple[str, Variant]] = field(default_factory=list)
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    held: dict[Any, Any] | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    refused: list[Layout] = field(default_factory=list)
    written: int = -1
    frozen: dict[str, tuple[str, torch.dtype]] | None = None
    note: str = ""

    @staticmethod
    def start(
        program: Program, asked: Asked, stages: Stages, layout: Layout | None, examples: list[Any] | None
    ) -> Conversion:
        """Traces and plans both modes of the call that ``layout`` describes.

        Raises:
            CaptureError, PlanError, PolicyError: as the stages do.
        """
        policy, adopted = asked.resolve(program.whole), program.adopted
        mode = mode_of(program.whole)
        base = layout if layout is not None else base_layout(program, mode, policy)
        new = Conversion(program, asked, stages, policy, mode, base, examples, examples is not None)
        for name in dict.fromkeys((mode, "train", "eval")):
            new._trace(name, base)
        new._finish()
        if program.adopted != adopted:  # it has modules now whose mode and device count
            return Conversion.start(program, asked, stages, layout, examples)
        program.settle()
        return new

    def _finish(self) -> None:
        """Plans everything traced, and pairs the scaler."""
        self.dtypes = dtypes_of(self.program.whole)
        known, self.traced = self.traced, []
        for mode, traced in known:
            setting = Setting(traced.modes, ambient_of(self.policy), traced.grad[0] if traced.grad else grad_mode())
            if traced.serves(setting, self.program.attribute):
                self.traced.append((mode, traced))
            elif traced.layout == self.layout:
                self._trace(mode, traced.layout, self._here(traced.given))
        made: list[tuple[str, Variant]] = []
        for mode, traced in self.traced:
            made.append((mode, self._build(mode, traced, made)))
        self.variants = made
        self._check_op_overrides()
        device_type = self.policy.device_type or "cpu"
        scales = self.policy.dtype == torch.float16 and self.policy.name != "full"
        if self.scaler.is_enabled() != scales or not self.scaler.is_enabled():
            device = device_type if device_type != "cuda" or torch.cuda.is_available() else "cpu"
            self.scaler = GradScaler(device, enabled=scales)

    @functools.cached_property
    def positional(self) -> int:
        """How many plain positional arguments go straight into the base graph; -1: calls must be bound."""
        values = tuple(slot.name for slot in self.layout if slot.kind == "value")
        trees = any(slot.kind == "tree" for slot in self.layout)
        return len(values) if values == self.program.signature.required and not trees else -1

    def _trace(self, mode: str, layout: Layout, values: Sequence[Any] | None = None, *, data: bool = True) -> Traced:
        """A graph for calls of this layout, with values like these, in this mode and the current grad mode."""
        setting = self._setting(mode)
        if layout == self.layout and (values is None or not self.by_example):
            values = self.examples
        for _, known in self.traced:
            fits = known.layout == layout and known.serves(setting, self.program.attribute)
            if fits and (values is None or known.goes_this_way(values, self.program.attribute)):
                break
        else:
            with torch.inference_mode(False):  # of what is made in it, fake tensors can be no views
                known = self.program.trace(layout, setting, None if values is None else list(values), data=data)
        self.traced.append((mode, known))
        return known

    def _here(self, values: Sequence[Any] | None) -> Sequence[Any] | None:
        """Arguments of a call, on the device that the parameters are on now."""
        device = next((tensor.device for tensor in self.program.whole.parameters()), None)
        if values is None or device is None:
            return values
        return [value.to(device) if isinstance(value, torch.Tensor) else value for value in values]

    def trace_for(self, mode: str, known: Traced) -> Traced:
        """A graph for such calls as a known one is for, in this mode and the current grad mode."""
        return (
            known
            if known.serves(self._setting(mode), self.program.attribute)
            else self._trace(mode, known.layout, known.given)
        )

    def _setting(self, mode: str) -> Setting:
        return Setting(self.program.flags(mode), ambient_of(self.policy), grad_mode())

    def _build(self, mode: str, traced: Traced, known: Sequence[tuple[str, Variant]]) -> Variant:
        measures = self.policy.name == "fast" and self.examples is not None  # with gradients, or without
        for other, variant in known:
            if variant.traced is traced and (other == mode or not measures):
                return variant if other == mode else variant.in_mode(mode, self._rewritten)
        examples = self.examples if traced.layout == self.layout else None
        if examples is not None and traced.given is not None:
            examples = list(traced.given)
        return self._planned(mode, traced, examples)

    def _planned(self, mode: str, traced: Traced, examples: list[Any] | None) -> Variant:
        with torch.inference_mode(False), self.program.in_mode(self.program.flags(mode)), forgetting_fakes():
            plan = self.stages.plan(self.program, traced, self.policy, mode, examples)
            observed = examples if traced.fits is None else None
            return Variant.of(self.program, traced, plan, self._rewritten(traced, plan), observed)

    def _rewritten(self, traced: Traced, plan: PrecisionPlan) -> fx.Graph:
        return self.stages.rewrite(self.program, traced, plan, to_freeze=self.frozen is not None)

    def by_rule(self, variant: Variant) -> Variant:
        """The same graph planned for inputs of any dtype."""
        if variant.by_rule is None:
            variant.by_rule = self._planned(self.mode, variant.traced, None)
        return variant.by_rule

    @property
    def base(self) -> Variant:
        """The graph of the current mode for the call that was converted."""
        found = self.find(self.layout)
        assert found is not None
        return found

    def variant_for(self, values: Mapping[str, Any], *, bake_numbers: bool = False) -> tuple[Variant, Sequence[Any]]:
        """The graph for a call, and the values of its placeholders; numbers are baked in when code branches on them."""
        signature = self.program.signature
        layout, given = signature.laid_out(values, bake_numbers=bake_numbers)
        if layout not in self.refused:
            try:
                return self.variant(layout, values), given
            except CaptureError:
                if layout == signature.laid_out(values, bake_numbers=True)[0]:
                    raise
                self.refused.append(layout)
        layout, given = signature.laid_out(values, bake_numbers=True)
        return self.variant(layout, values), given

    def variant(self, layout: Layout, values: Mapping[str, Any]) -> Variant:
        """The graph for a call of this layout in the current mode; traced now when it is the first such call."""
        if (found := self.find(layout, values)) is not None:
            return found
        if self.frozen is not None:
            given = [slot.name for slot in layout if slot not in self.layout]
            raise not_before_freezing(self.program.name, given, self._misfit(layout, values))
        if torch.compiler.is_compiling():
            raise not_while_compiling()
        left = MAX_VARIANTS - len(self.variants)
        if left <= 0:
            raise too_many(MAX_VARIANTS, any(known.traced.layout == layout for _, known in self.variants))
        traced = self._trace_last(layout, values) if left == 1 else None
        traced = traced or self._trace(self.mode, layout, values_of(layout, values))
        self.variants.append((self.mode, self._build(self.mode, traced, self.variants)))
        return self.variants[-1][1]

    def _trace_last(self, layout: Layout, values: Mapping[str, Any]) -> Traced | None:
        """A graph for calls with any data, if there can be one: with what asks for it left as calls of submodules."""
        with suppress(CaptureError):
            return self._trace(self.mode, layout, values_of(layout, values), data=False)
        return None

    def find(self, layout: Layout, values: Mapping[str, Any] | None = None) -> Variant | None:
        """The graph for a call of this layout, and with these values, in the current mode, when there is one."""
        for mode, variant in self.variants:
            fits = mode == self.mode and variant.traced.layout == layout
            if fits and (values is None or not variant.particular or variant.serves(values_of(layout, values))):
                return variant
        return None

    def _misfit(self, layout: Layout, values: Mapping[str, Any]) -> str | None:
        """What a graph for such calls does not fit in these values."""
        known = (variant.traced for mode, variant in self.variants if mode == self.mode)
        fits = (traced.fits for traced in known if traced.layout == layout and traced.fits is not None)
        return next((found for each in fits if (found := each.problem(values_of(layout, values)))), None)

    def follow_tensors(self) -> bool:
        """Plans anew when the tensors are on a device with other rules, or of other dtypes; whether they are."""
        policy, dtypes = self.asked.resolve(self.program.whole), dtypes_of(self.program.whole)
        if (policy, dtypes) == (self.policy, self.dtypes):
            return False
        self.policy, self.variants = policy, []
        self.examples = None  # they were for the tensors as they had been
        self._finish()
        return True

    def follow_modules(self) -> None:
        """Traces anew: modules that were traced into have hooks now, other parameters, or other values in Python.

        Raises:
            CaptureError: when the weights are rounded for the graphs as they are.
        """
        if self.frozen is not None:
            raise changed_after_freezing(self.program.name)
        given = next((known.given for _, known in self.traced if known.layout == self.layout and known.given), None)
        self.traced, self.variants = [], []
        for mode in dict.fromkeys((self.mode, "train", "eval")):
            self._trace(mode, self.layout, None if self.examples is not None else self._here(given))
        self._finish()

    def forget_stale_copies(self) -> None:
        """Empties the cache of autocast when a parameter was written to since the last time."""
        tensors = (parameter for parameter in self.program.whole.parameters() if not parameter.is_inference())
        versions = sum(tensor._version for tensor in tensors)
        if versions != self.written:
            torch.clear_autocast_cache()
        self.written = versions

    def replanned(self, policy: Policy, program: Program | None = None, *, freezing: bool = False) -> Conversion:
        """A conversion of the same traces under another policy, with a module tree of its own."""
        asked = replace(self.asked, policy=policy)
        if policy.device_type is not None:
            asked = replace(asked, device_type=None)
        if policy.dtype is not None:
            asked = replace(asked, dtype=None)
        program = program if program is not None else self.program.shared()
        new = replace(
            self,
            program=program,
            asked=asked,
            policy=asked.resolve(program.whole),
            variants=[],
            traced=list(self.traced),
            scaler=GradScaler(enabled=False),
            held=None,
            frozen={} if freezing else None,
        )
        new._finish()
        if new.scaler.is_enabled() and self.scaler.is_enabled():
            new.scaler = self.scaler._twin()
        return new

    def cloned(self, clone: Callable[[Any], Any]) -> Conversion:
        """The same graphs, over what ``clone`` makes of each module."""
        program = copy.copy(self.program)
        program.become(clone)
        variants = [(mode, variant.over(program, clone)) for mode, variant in self.variants]
        return replace(self, program=program, variants=variants)

    def _check_op_overrides(self) -> None:
        decisions = (decision for _, variant in self.variants for decision in variant.plan)
        seen = {decision.aten for decision in decisions if decision.aten and decision.reason != "in-place"}
        for aten, _ in self.policy.ops:
            check_overridable(aten)
            if aten not in seen:
                close = nearest(aten, seen)
                hint = f"write 'aten::{close}'" if close else "print(amp.report()) lists the operators of the model"
                raise PolicyError(f"the override 'aten::{aten}' matches no operator of the model", hint=hint)

    def packed(self, pack: Callable[[fx.Graph], Any]) -> dict[str, Any]:
        """The state as picklable data."""
        variants = [
            (mode, replace(v.traced, graph=pack(v.traced.graph), given=None), v.plan, pack(v.graph), v.observed)
            for mode, v in self.variants
        ]
        names = "program asked stages policy mode layout by_example scaler dtypes frozen note".split()
        return {"variants": variants, **{name: getattr(self, name) for name in names}}

    @staticmethod
    def unpacked(packed: Mapping[str, Any], unpack: Callable[[Any], fx.Graph]) -> Conversion:
        """The state that was packed."""
        fields = {name: value for name, value in packed.items() if name != "variants"}
        new = Conversion(**fields)
        for mode, traced, plan, graph, observed in packed["variants"]:
            whole = replace(traced, graph=unpack(traced.graph))
            new.traced.append((mode, whole))
            variant = Variant.of(new.program, whole, plan, unpack(graph))
            new.variants.append((mode, replace(variant, observed=observed)))
        return new
