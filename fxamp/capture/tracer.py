"""What calls does a model make?

``AmpTracer`` is a ``torch.fx.Tracer`` that traces into every module that is plain arithmetic, so that
each parameter read is visible, and leaves the rest as calls: modules that behave by mode, that have
hooks, or that cannot be traced. Each node is stamped with the module it was made in, the user's
source line and the autocast regions that were open.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from fxamp.capture.absent import may_be_none
from fxamp.capture.arguments import map_leaves
from fxamp.capture.attributes import Attributes
from fxamp.capture.bodies import body_of, gives_no_weights
from fxamp.capture.builtins import shadowed_builtins, shadowed_numbers
from fxamp.capture.calls import assign, has_hooks
from fxamp.capture.clone import is_compiled
from fxamp.capture.composed import composed
from fxamp.capture.containers import Contents
from fxamp.capture.drawing import RandomState, may_draw
from fxamp.capture.facts import Facts
from fxamp.capture.holder import modules_made
from fxamp.capture.packed import packed_like_its_input, packed_sequences
from fxamp.capture.patches import (
    autograd_functions,
    compiled_functions,
    mode_of,
    random_calls,
    refusals,
    tensor_calls,
)
from fxamp.capture.proxy import AmpProxy, SettlingProxy
from fxamp.capture.reading import ReadingTracer
from fxamp.capture.regions import Switched
from fxamp.capture.setting import Ambient, Setting, Traced, kept
from fxamp.capture.signature import Layout
from fxamp.capture.source import user_line
from fxamp.policy.operators import explicit
from fxamp.policy.spellings import aten_name, name_of_target

__all__ = ["THIS", "WHOLE", "AmpTracer"]

THIS, WHOLE = "_fxamp_this", "_fxamp_whole"  # what a graph calls the converted module, and the model as one call

# Modules whose behaviour depends on their own mode (which users switch one by one), or whose forward
# is known not to trace.
_LEAVES = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.RNNBase,
    nn.MultiheadAttention,
    torch.jit.ScriptModule,
)


class _Mark(NamedTuple):
    """Where a trace stood, to go back to when a module turns out not to be traceable."""

    last: fx.Node
    proxies: int
    scope: tuple[str, Any]
    stack: dict[str, Any]
    written: int
    refused: int


class AmpTracer(ReadingTracer):
    """Traces one entry point of one module tree, once.

    After ``run``: ``untraceable`` has the reason for each module that stayed a call because it had to, and
    ``composed`` says whether an operator was taken apart for the device type.

    Args:
        root: the model, or what holds the modules of a function; its own state may be changed.
        modules: path to every module that the entry point may use, root included.
        originals: the user's own modules by path.
        entry: called with the proxies of the placeholders; what it returns is the graph's output.
        extras: tensors and objects that no module owns, by the name they are read under; new ones are added.
        untraceable: modules known to have to stay calls, with the reason.
        facts: what example inputs tell.
        setting: what surrounds the trace, and with its autocast, whose rules the graph is for.
        of_parameters: makes the facts that the parameters tell alone.
    """

    def __init__(
        self,
        root: nn.Module,
        modules: Mapping[str, nn.Module],
        originals: Mapping[str, nn.Module],
        entry: Callable[..., Any],
        extras: dict[str, Any],
        untraceable: Mapping[str, str],
        facts: Facts | None,
        setting: Setting,
        of_parameters: Callable[[], Facts],
    ) -> None:
        super().__init__(modules, originals, extras, facts, setting, of_parameters, getattr(entry, "model", None))
        self.untraceable: dict[str, str] = dict(untraceable)
        self.composed = False
        self._device_type = setting.ambient[0] if setting.ambient is not None else None
        self._entry = entry
        self._names: list[str] = []
        self._attributes = Attributes(self._modules, modules, self._assign, self._was_sized, self._meet, self._calls)
        self.root = root

    def run(self, names: list[str], *, numbers: bool = False, reads: bool = False) -> fx.Graph:
        """The graph of the entry point, with a placeholder for each of ``names``.

        Args:
            names: of the placeholders.
            numbers: record ``int`` and ``float`` of traced values too.
            reads: see which attributes are read, which counts when one is set to a traced value.
        """
        self._names = names
        try:
            with ExitStack() as stack:
                stack.enter_context(self._regions.recording())
                stack.enter_context(self._attributes.watched(reads=reads))
                self._made = stack.enter_context(modules_made())
                stack.enter_context(compiled_functions(self._record))
                stack.enter_context(autograd_functions(self._record))
                stack.enter_context(packed_sequences(self._record))
                stack.enter_context(random_calls(self._record))
                stack.enter_context(refusals())
                stack.enter_context(self._generators.watched())
                stack.enter_context(tensor_calls(self._record, self._record_method, self.answer))
                stack.enter_context(shadowed_builtins(numbers=numbers))
                return super().trace(self.root)
        finally:
            self._attributes.undo()

    def traced(
        self, graph: fx.Graph, layout: Layout, ambient: tuple[()] | tuple[Ambient], given: list[Any] | None
    ) -> Traced:
        """The graph that ``run`` gave, with what it is good for."""
        readers = self._attributes.mode_readers
        traced = Traced(graph, layout, self.untraceable, readers, ambient, self.grad, self.asked, guessed=self.guessed)
        return traced if given is None or not traced.questions else replace(traced, given=tuple(map(kept, given)))

    @property
    def keeps_traced(self) -> bool:
        """Whether an attribute was set to a traced value."""
        return self._attributes.keeps_traced

    # -- hooks of torch.fx.Tracer ------------------------------------------------------------------

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        del root_fn, is_module, concrete_args
        # The generated code needs the name; a submodule may have it.
        self.graph._graph_namespace.create_name("self", None)
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self._names]
        self._note_kinds(proxies)
        return self._call_entry, proxies

    def _call_entry(self, *proxies: fx.Proxy) -> Any:
        drawn = RandomState()
        with self._generators.kept():
            result = self._entry(*proxies)
        drawn.check()
        self._regions.check()
        if self._refused:
            raise TraceError(self._refused[-1])  # the model's own code caught it
        self._attributes.check()
        self._returned = True
        return result

    def proxy(self, node: fx.Node) -> AmpProxy:
        return AmpProxy(node, self) if self.facts is None else SettlingProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if self._facts_run():
            return None
        self._regions.check()
        body = self._body(kind, target, args, kwargs)
        if body is None:
            proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
            return self._handed_out(proxy) if may_be_none(proxy.node, self._module_of) else proxy
        mark = self._mark()
        self._bodies += 1
        try:
            with shadowed_numbers():
                return body(*args, **kwargs)
        except Exception:
            self._go_back(mark)  # it depends on what is not known: it stays one call
            return super().create_proxy(kind, target, args, kwargs, *rest, **more)
        finally:
            self._bodies -= 1

    def _body(self, kind: str, target: Any, args: Any, kwargs: Any) -> Callable[..., Any] | None:
        """What to trace in place of a call that autocast decides inside."""
        if kind not in ("call_function", "call_method"):
            return None
        found = None if "out_dtype" in kwargs else name_of_target(kind, target)
        if found is None:
            found = aten_name(kind, target, *_nodes_of((args, kwargs)))
        if not found:
            return body_of(kind, target)
        if self._device_type is None or explicit(found, self._device_type):
            return None
        parts = composed(found, target)
        self.composed |= parts is not None
        return parts

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        node = super().create_node(kind, target, (), {}, *rest, **more)
        if args:  # now, for torch.fx searches what it is given at first for symbolic sizes
            node.args = args
        if kwargs:
            node.kwargs = kwargs
        node.meta["module"] = self.scope.module_path
        node.meta["regions"] = self._regions.open
        node.meta["source"] = user_line(sys._getframe(1))
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A subclass with a forward of its own is the user's to look into, and so is a forward that was set.
        kind = next((kind for kind in type(m).__mro__ if "forward" in vars(kind)), nn.Module)
        replaced = "forward" in m.__dict__ and not isinstance(m, torch.jit.ScriptModule)
        own = replaced or not kind.__module__.startswith("torch.")
        return (isinstance(m, _LEAVES) and not own) or has_hooks(m) or hasattr(type(m), "__fxamp_clone__")

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if id(m) not in self._modules:
            self._meet(m)
            return forward(*args, **kwargs)  # made in the forward: it is what it is made of
        if is_compiled(m):
            return m.get_submodule("_orig_mod")(*args, **kwargs)  # how it is run does not change what it computes
        path = self.path_of_module(m)
        if path in self.untraceable:
            return self._call_leaf(m, path, args, kwargs)
        mark, held = self._mark(), Contents(args, kwargs)
        drawn = RandomState() if may_draw(m) else None
        if self.is_leaf_module(m, path):
            self._check_forwards(m)
        try:
            with self._generators.kept():
                result = super().call_module(m, forward, args, kwargs)
            if drawn is not None:
                drawn.check()
            if len(self._refused) > mark.refused:
                raise TraceError(self._refused[-1])  # the model's own code caught it
            self._attributes.check(mark.written)
        except Exception as error:
            if not path or isinstance(error, Switched):
                raise
            self._go_back(mark)
            held.restore()
            self.untraceable[path] = _reason(error)
            return self._call_leaf(m, path, args, kwargs)
        if gives_no_weights(m, args, kwargs):
            return result[0], None
        return packed_like_its_input(m, args, kwargs, result)

    def call_whole(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself as one call, for a model that is a module of torch."""
        mark = self._mark()
        try:
            if not self.is_leaf_module(self.root, ""):
                return self.root.forward(*args, **kwargs)
        except TraceError as error:
            self._go_back(mark)
            self.untraceable[WHOLE] = _reason(error)
        return self._call_leaf(self.root, WHOLE, args, kwargs)

    def _call_leaf(self, m: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        self._check_forwards(m)
        outer = (self.scope.module_path, self.scope.module_type)
        self.scope.module_path, self.scope.module_type = path, type(m)
        try:
            proxy = super().create_proxy("call_module", path, args, kwargs)
            proxy.node.meta["untraceable"] = self.untraceable.get(path, "")
            if not may_be_none(proxy.node, self._module_of):
                return proxy
            self._attributes.mode_readers[path] = mode_of(m)  # what it gives may follow from its mode
            return self._handed_out(proxy)
        finally:
            self.scope.module_path, self.scope.module_type = outer

    # -- our own -----------------------------------------------------------------------------------

    def _module_of(self, target: str) -> nn.Module:
        return self.root if target == WHOLE else self._by_path[target]

    def _mark(self) -> _Mark:
        last = next(iter(reversed(self.graph.nodes)), self.graph._root)
        scope = (self.scope.module_path, self.scope.module_type)
        written, refused = self._attributes.mark(), len(self._refused)
        return _Mark(last, len(self._proxies), scope, dict(self.module_stack), written, refused)

    def _go_back(self, mark: _Mark) -> None:
        for node in reversed(self.graph.nodes):
            if node is mark.last:
                break
            self.graph.erase_node(node)
            self.graph._graph_namespace._used_names.discard(node.name)
        for name in list(self._proxies)[mark.proxies :]:
            del self._proxies[name]
        self.scope.module_path, self.scope.module_type = mark.scope
        self.module_stack.clear()
        self.module_stack.update(mark.stack)
        self._attributes.undo(mark.written)
        del self._refused[mark.refused :]

    def _calls(self) -> int:
        calls = (self._module_of(str(node.target)) for node in self.graph.find_nodes(op="call_module"))
        return sum(not type(module).__module__.startswith("torch.nn.") for module in calls)

    def _assign(self, module: nn.Module, name: str, value: Any) -> None:
        owner = self.create_node("get_attr", self._modules[id(module)] or THIS, (), {})
        self.create_node("call_function", assign, (owner, name, self.create_arg(value)), {})


def _nodes_of(arguments: Any) -> Any:
    return map_leaves(arguments, fx.Proxy, lambda proxy: proxy.node)


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
