"""Which way does the program go where Python asks a traced value?

A test that only guards against bad input is recorded, and the good way taken. Otherwise the facts that example inputs
tell decide, and a check of them is recorded. Where neither knows, the trace is refused.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from fxamp.capture.absent import is_dropped, may_be_none
from fxamp.capture.builtins import known_kind
from fxamp.capture.calls import expect, expect_none, is_as_expected
from fxamp.capture.facts import UNTOLD, Facts
from fxamp.capture.guards import guard_at
from fxamp.capture.lengths import chunks_of, length_of
from fxamp.capture.proxy import MAY_BE_NONE
from fxamp.capture.regions import RegionRecorder
from fxamp.capture.setting import GradMode, Setting
from fxamp.capture.slices import Slices
from fxamp.capture.source import calling_frame, spelled_line, user_frame

__all__ = ["DecidingTracer"]

_length = len  # while a model is traced, the builtin is another one


class DecidingTracer(fx.Tracer):
    """A tracer that answers what Python asks of traced values.

    Attributes:
        asked: what was asked of the model's own tensors: path and attribute, to the answer.
        guessed: what example inputs should have told and did not.

    Args:
        facts: what example inputs tell.
        setting: what surrounds the trace.
        of_parameters: makes what is known without any, from the parameters alone.
    """

    def __init__(self, facts: Facts | None, setting: Setting, of_parameters: Callable[[], Facts] | None = None) -> None:
        super().__init__(autowrap_modules=(math,))
        self.facts = facts
        self.asked: dict[tuple[str, str], Any] = {}
        self.guessed = ""
        self._make_of_parameters = of_parameters
        self._of_parameters: Facts | None = None
        self._setting = setting
        device_type = setting.ambient[0] if setting.ambient is not None else "cpu"
        self._regions = RegionRecorder(device_type, self._emit, setting.grad.inference, self._runs_the_model)
        self._bodies = 0  # of torch's functions, that are being traced into
        self._expected: dict[tuple[fx.Node, Any], fx.Node] = {}
        rules = setting.ambient[0] if setting.ambient is not None else None
        self._slices = Slices(facts.real, self._tensor_of, self._module_of, rules) if facts is not None else None
        self._refused: list[str] = []

    @property
    def grad(self) -> tuple[()] | tuple[GradMode]:
        """The grad mode of the trace, if that was asked for."""
        told = self.facts is not None and self.facts.told_grads
        return (self._setting.grad,) if self._regions.asked or told else ()

    def answers(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """What the model gets that asks torch for the grad mode, or switches autocast past its regions."""
        return {
            torch.clear_autocast_cache: self._regions.clear_autocast_cache,
            torch.is_grad_enabled: self._regions.is_grad_enabled,
            torch.is_inference_mode_enabled: self._regions.is_inference_mode_enabled,
        }

    def answer(self, tensor: torch.Tensor, attribute: str) -> Any:
        """What the model asks of a parameter or buffer of its own; the graph is for this answer only."""
        if attribute in MAY_BE_NONE:
            raise self._refusal(f"reads .{attribute} of a tensor, which may be None at another call")
        value = getattr(tensor, attribute)
        path = self._path_of(tensor)
        if path is not None:
            self.asked[path, attribute] = value
        return value

    def _path_of(self, tensor: torch.Tensor) -> str | None:
        raise NotImplementedError

    def _tensor_of(self, path: str) -> torch.Tensor | None:
        raise NotImplementedError

    def _runs_the_model(self) -> bool:
        return not self._facts_run()

    def _note_kinds(self, placeholders: Iterable[fx.Proxy]) -> None:
        """Which placeholders are numbers, and which are objects that nothing is known of, if example inputs tell."""
        for proxy in placeholders:
            kind = self.facts.kind(proxy.node) if self.facts is not None else torch.Tensor
            proxy.node.meta["number"] = kind in (int, float)
            proxy.node.meta["object"] = kind not in (int, float, torch.Tensor)

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame = calling_frame(sys._getframe(1))
        guard = guard_at(frame) if frame is not None else None
        if guard is None:
            # torch's own functions compare sizes to tell apart what one model does in the same way every time.
            value = self._told(obj, sizes=self._bodies > 0)
            if computed := value is UNTOLD and self.facts is not None and self.facts.tells_data:
                value = self._computed(obj)
            if value is UNTOLD:
                raise self._refusal("branches on a tensor value")
            return bool(self._expect(obj, bool(value), computed=computed))
        if guard.whole:
            condition = obj if guard.value else self._emit(operator.not_, obj)
            self._emit(torch._assert, condition, f"the model requires: {guard.text} is {guard.value}")
        return guard.value

    def iter(self, obj: fx.Proxy) -> Any:
        try:
            length = self.settled_length(obj)
        except TypeError as error:
            raise self._refusal("iterates over a tensor, or over a tuple whose length is not known") from error
        of_tensor = any(facts.kind(obj.node) is torch.Tensor for facts in self._all_facts())
        parts = self._record_method("unbind", (obj,), {}) if of_tensor else obj
        return (parts[i] for i in range(length))  # type: ignore[index]

    def shape_of(self, value: Any) -> tuple[int, ...] | None:
        """The shape that a tensor has with the example inputs; whoever asks has to see to it that it counts later."""
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
        return self.facts.shape(value.node) if self.facts is not None else None

    def settled_length(self, proxy: fx.Proxy) -> int:
        """How many parts a traced value has; the graph checks that it stays so.

        Raises:
            TypeError: when that is not told.
        """
        length = self.fixed_length(proxy)
        if length is not None:
            return length
        lengths = (facts.length(proxy.node) for facts in self._all_facts())
        length = next((found for found in lengths if found is not None), self._chunks(proxy.node))
        if length is None:
            raise TypeError("the length of a traced value is not known")
        self._expect(self._emit(_length, proxy), length)
        return length

    def fixed_length(self, proxy: fx.Proxy) -> int | None:
        """How many parts a traced value has, if that is the same at every call."""
        return length_of(proxy.node, self._module_of)

    def _chunks(self, node: fx.Node) -> int | None:
        """How many parts a tensor is cut into, if it is as long as it has to be; this is to be checked."""
        real = self.facts.length_here(node) if self.facts is not None else None
        asked = chunks_of(node)
        return asked if real in (None, asked) else None

    def _module_of(self, target: str) -> Any:
        raise NotImplementedError

    def is_users(self, proxy: fx.Proxy) -> bool:
        """Whether a value comes from code that is not torch's and is, for all that is known, no tensor."""
        known = self.facts.kind(proxy.node) if self.facts is not None else None
        tensor = torch.Tensor in (known, known_kind(proxy.node))
        return not tensor and may_be_none(proxy.node, self._module_of)

    def settled(self, proxy: fx.Proxy) -> Any:
        """What Python gets where it needs the value of a traced number now; the graph checks that it stays so.

        Raises:
            TypeError: when the value is not told.
        """
        value = self._told(proxy)
        if computed := value is UNTOLD and self.facts is not None and self.facts.tells_data and self.facts.tells_sizes:
            value = self._computed(proxy)
        if value is UNTOLD:
            raise TypeError("a traced value cannot be interpreted as an integer")
        return self._expect(proxy, value, computed=computed)

    def _all_facts(self) -> Iterator[Facts]:
        if self.facts is not None:
            yield self.facts
        if self._of_parameters is None and self._make_of_parameters is not None:
            self._of_parameters = self._make_of_parameters()
        if self._of_parameters is not None:
            yield self._of_parameters

    @property
    def of_one_autocast(self) -> bool:
        """Whether the trace went by the dtype of a value, which autocast may change, or by the device of the rules."""
        told = any(facts.told_dtypes for facts in (self.facts, self._of_parameters) if facts is not None)
        computed = self._slices is not None and self._slices.of_one_autocast
        return told or computed or self._regions.asked_device

    def _facts_run(self) -> bool:
        """Whether what is called right now only finds out a fact."""
        return any(facts is not None and facts.running for facts in (self.facts, self._of_parameters))

    def _told(self, proxy: fx.Proxy, *, sizes: bool = False) -> Any:
        values = (facts.told(proxy.node, sizes=sizes) for facts in self._all_facts())
        return next((value for value in values if value is not UNTOLD), UNTOLD)

    def _computed(self, proxy: fx.Proxy, *, shapes: bool = True) -> Any:
        """What a value is for the example inputs, when it is no tensor of several and follows from arguments alone."""
        if self._slices is None or self.facts is None:
            return UNTOLD
        with self.facts.alone():
            value = self._slices.told(proxy.node, shapes=shapes)
            if isinstance(value, torch.Tensor):
                return value.item() if value.numel() == 1 else UNTOLD
            return UNTOLD if _has_tensors(value) else value

    def _expect(self, proxy: fx.Proxy, value: Any, *, computed: bool = False) -> Any:
        check = self._expected.get((proxy.node, value))
        if check is None or check._erased:
            # In a function of torch's it is the user's call that tells where.
            frame = (user_frame if self._bodies else calling_frame)(sys._getframe(1))
            made = self._emit(expect, proxy, value, spelled_line(frame))
            self._expected[proxy.node, value] = made.node
            # A number of dimensions that facts have told is not worth many steps.
            found = self._computed(proxy, shapes=computed or (self.facts is not None and self.facts.tells_sizes))
            if found is not UNTOLD and is_as_expected(found, value):
                made.node.meta["told"] = True  # so that it is asked before a call
                self._slices.note(proxy.node)  # type: ignore[union-attr]
        return value

    def _handed_out(self, proxy: fx.Proxy) -> Any:
        """A value that may be None, as the program gets it; the graph checks that it stays so."""
        frame = calling_frame(sys._getframe(1))
        if is_dropped(frame):
            return proxy
        kind = self.facts.kind(proxy.node) if self.facts is not None else None
        if self.facts is not None and kind is None:
            self.guessed = self.guessed or f"{spelled_line(frame)} gets what may be None, which nothing tells"
        is_none = kind is type(None)
        self._emit(expect_none, proxy, is_none, spelled_line(frame))
        return None if is_none else proxy

    def _refusal(self, what: str) -> TraceError:
        self._refused.append(what)
        return TraceError(what)

    def _emit(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._record(function, args, {})

    def _record_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.create_proxy("call_method", name, args, kwargs)

    def _record(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.create_proxy("call_function", function, args, kwargs)


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
