"""How is a program traced, once it is known for which call?

Each trace runs on a throw-away clone, so nothing a forward does to ``self`` stays.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx.proxy import TraceError

from fxamp.capture.calls import has_hooks
from fxamp.capture.clone import clone_trees, stop_iterators, tensor_copies
from fxamp.capture.drawing import RandomState
from fxamp.capture.entry import Entry
from fxamp.capture.facts import Facts
from fxamp.capture.failures import Tried, capture_error, dynamo_error
from fxamp.capture.holder import adopt, bound_to, unowned
from fxamp.capture.outside import Outside
from fxamp.capture.paths import is_torchs, paths_of
from fxamp.capture.regions import autocast_as
from fxamp.capture.setting import Setting, Traced, grad_mode_as, kept
from fxamp.capture.signature import CallSignature, Layout
from fxamp.capture.state import kept_objects, python_state
from fxamp.capture.surroundings import (
    autocast_answers,
    changed_modules,
    check_root,
    modes,
    put_back,
)
from fxamp.capture.tracer import AmpTracer
from fxamp.errors import CaptureError

__all__ = ["Traces"]

_NUMBER = re.compile(r"(int|float)\(\) argument must be|a traced value cannot be")


class _Prepared(NamedTuple):
    root: nn.Module
    entry: Entry
    modules: dict[str, nn.Module]
    originals: dict[str, nn.Module]


class _ReadsCount(Exception):
    """A trace that did not see what is read turned out to need it."""


def _note(given: dict[str, list[Any]], path: str, module: nn.Module, args: Any, result: Any) -> None:
    given.setdefault(path, []).append(result)


class Traces:
    """The traces of a program, which has these attributes."""

    name: str
    signature: CallSignature
    tree: nn.Module
    loss_tree: nn.Module | None
    loss_path: str
    extras: dict[str, Any]
    has_loss: bool
    adopted: int
    _method: str
    _bound: Any
    _function: Any
    _loss: Any
    _holder: nn.Module
    _loss_module: nn.Module | None
    _settled: bool
    _strangers: list[Any]

    def attribute(self, path: str) -> Any:
        """What a graph reads under this name."""
        raise NotImplementedError

    def _make_trees(self) -> None:
        raise NotImplementedError

    def _trace(
        self,
        layout: Layout,
        setting: Setting,
        facts: Callable[[], Facts | None],
    ) -> Traced:
        untraceable: dict[str, str] = {}
        numbers = False
        while True:
            try:
                traced, changed = self._trace_seeing(layout, setting, facts, untraceable, numbers)
            except CaptureError as error:
                if self._adopts():
                    continue
                if numbers or not _NUMBER.match(str(error.__cause__)):
                    raise
                numbers = True
                continue
            if self._adopts():
                continue
            if not changed:
                return traced
            for path, reason in changed.items():
                while path in untraceable:  # not the module itself but who calls it writes to it
                    path = path.rpartition(".")[0]
                if not path:
                    raise capture_error(self.name, TraceError(reason), self._tried(facts()))
                untraceable[path] = reason

    def _adopts(self) -> bool:
        """Whether a callable turned out to reach modules that were not known to be its own: they are now."""
        met, self._strangers = self._strangers, []
        found = unowned(self._holder, self._function, met) if self._function is not None else {}
        if not found:
            return False
        if self._settled:
            raise CaptureError(
                f"this call of {self.name} uses {', '.join(found)}, which no call before did",
                hint="convert with example_inputs of such a call",
            )
        adopt(self._holder, found)
        self.adopted += 1
        self.extras.clear()
        self._make_trees()
        return True

    def _trace_whole(self, layout: Layout, setting: Setting, values: Sequence[Any], *, dynamic: bool) -> Traced:
        """A graph by Dynamo."""
        while True:
            try:
                traced = self._trace_whole_once(layout, setting, values, dynamic=dynamic)
            except CaptureError:
                if self._adopts():
                    continue
                raise
            if not self._adopts():
                return traced

    def _trace_whole_once(self, layout: Layout, setting: Setting, values: Sequence[Any], *, dynamic: bool) -> Traced:
        _, entry, modules, originals = self._prepared(layout)
        from fxamp.capture.dynamo import DynamoTracer  # it is imported when it is needed: that takes a second

        tracer = DynamoTracer(modules, originals, self.extras, setting, entry.model, dynamic=dynamic)
        self._strangers = tracer.strangers
        outside = Outside(modules.values(), self._function)
        drawn = torch.get_rng_state()
        with ExitStack() as stack:
            stack.enter_context(put_back(originals))
            stack.enter_context(modes(modules, setting.training))
            stack.enter_context(grad_mode_as(setting.grad))
            try:
                graph, fits = tracer.run(entry, values)
                if left := outside.restore():
                    raise TraceError(left)
            except Exception as error:
                raise dynamo_error(self.name, error) from error
            finally:
                outside.restore()
                torch.set_rng_state(drawn)
        return replace(tracer.traced(graph, layout, fits), given=tuple(map(kept, values)))

    def _witnessed(self, layout: Layout, setting: Setting, values: Sequence[Any]) -> dict[str, Any]:
        """What the modules give that a run of the model calls once, by path.

        Only a run tells what a part gives that goes by its data. It is made on clones, and leaves nothing behind.
        """
        owned = paths_of(self.tree, self.loss_tree, self.loss_path).values()
        if self._function is not None or any(map(has_hooks, owned)):
            return {}  # hooks are the user's, and so are the modules of a function: not to be run for this
        _, entry, modules, originals = self._prepared(layout, tensor_copies(owned))
        given: dict[str, list[Any]] = {}
        ambient = setting.ambient
        with ExitStack() as stack:
            stack.enter_context(put_back(originals))
            stack.enter_context(modes(modules, setting.training))
            stack.enter_context(grad_mode_as(setting.grad))
            stack.enter_context(torch.random.fork_rng())
            stack.callback(RandomState().put_back)
            stack.enter_context(kept_objects(owned))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for path, module in modules.items():
                if not isinstance(module, torch.jit.ScriptModule):
                    stack.callback(module.register_forward_hook(partial(_note, given, path)).remove)
            if ambient is not None:
                stack.enter_context(autocast_as(*ambient, enabled=ambient[0] == "cpu" or torch.cuda.is_available()))
                stack.callback(torch.clear_autocast_cache)
            with suppress(Exception):
                entry.plainly(*entry.arguments(*map(kept, values)))
        return {path: results[0] for path, results in given.items() if len(results) == 1}

    def _tried(self, facts: Facts | None) -> Tried:
        models = "model, loss" if self.has_loss else "model"
        call = f"fxamp.convert({models}, example_inputs={self.signature.spelled_examples()})"
        return Tried(call, facts is not None, not self.signature.required and not self.signature.starred)

    def _prepared(self, layout: Layout, copies: Mapping[int, Any] | None = None) -> _Prepared:
        """What one trace runs on: clones, over the same tensors or over copies of these."""
        root, loss_tree = clone_trees(self.tree, self.loss_tree, copies)
        stop_iterators(root.modules())
        if self._function is not None:
            root = self._holder  # a function calls the modules it closes over, so these cannot be clones
        model = self._function or bound_to(getattr(root, self._method), self._bound)
        entry = Entry(self.signature, layout, model, loss_tree or self._loss)
        modules = paths_of(root, loss_tree, self.loss_path)
        return _Prepared(root, entry, modules, paths_of(self._holder, self._loss_module, self.loss_path))

    def _trace_seeing(
        self,
        layout: Layout,
        setting: Setting,
        facts: Callable[[], Facts | None],
        untraceable: Mapping[str, str],
        numbers: bool,
    ) -> tuple[Traced, dict[str, str]]:
        """As ``_trace_once``, which sees what is read only when it turns out that this counts: that takes its time."""
        extras = dict(self.extras)
        with suppress(_ReadsCount):
            return self._trace_once(layout, setting, facts(), untraceable, numbers, reads=False)
        self.extras.clear()
        self.extras.update(extras)
        return self._trace_once(layout, setting, facts(), untraceable, numbers, reads=True)

    def _trace_once(
        self,
        layout: Layout,
        setting: Setting,
        facts: Facts | None,
        untraceable: Mapping[str, str],
        numbers: bool,
        *,
        reads: bool,
    ) -> tuple[Traced, dict[str, str]]:
        """A graph, and the modules whose Python state the trace changed: these have to stay calls.

        Raises:
            _ReadsCount: when an attribute was set to a traced value, and ``reads`` were not to be seen.
        """
        root, entry, modules, originals = self._prepared(layout)
        of_parameters = partial(Facts, [], self.attribute, sizes=True, ambient=setting.ambient)
        tracer = AmpTracer(root, modules, originals, entry, self.extras, untraceable, facts, setting, of_parameters)
        self._strangers = tracer.strangers
        if is_torchs(root) and self._method == "forward" and self._bound is None:
            entry.model = tracer.call_whole
        state = [{path: python_state(module) for path, module in owner.items()} for owner in (modules, originals)]
        drawn = torch.get_rng_state()
        outside = Outside(modules.values(), self._function)
        with ExitStack() as stack:
            stack.enter_context(put_back(originals))
            stack.enter_context(modes(modules, setting.training))
            stack.enter_context(grad_mode_as(setting.grad))
            asked = stack.enter_context(autocast_answers(setting.ambient, outside))
            stack.enter_context(outside.answering(tracer.answers()))
            try:
                graph = tracer.run(entry.names(), numbers=numbers, reads=reads)
                if tracer.keeps_traced and not reads:
                    raise _ReadsCount
                if left := outside.restore():
                    raise TraceError(left)
                changed = changed_modules(originals, state[1]) | changed_modules(modules, state[0])
                check_root(changed, drawn, graph)
            except Exception as error:
                blind = tracer.keeps_traced and not reads
                raise (_ReadsCount() if blind else capture_error(self.name, error, self._tried(facts))) from error
            finally:
                outside.restore()
                torch.set_rng_state(drawn)
        matters = tracer.composed or bool(asked) or tracer.of_one_autocast
        given = facts.real if facts is not None else None
        return tracer.traced(graph, layout, (setting.ambient,) if matters else (), given), changed
