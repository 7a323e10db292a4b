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
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from fxamp.capture.bodies import body_of, gives_no_weights
from fxamp.capture.builtins import shadowed_builtins, shadowed_numbers
from fxamp.capture.calls import assign, has_hooks
from fxamp.capture.composed import COMPOSED
from fxamp.capture.deciding import DecidingTracer
from fxamp.capture.facts import Facts
from fxamp.capture.members import owns
from fxamp.capture.patches import (
    autograd_functions,
    check_random_state,
    modules_watched,
    random_calls,
    random_state,
    refusals,
    tensor_calls,
)
from fxamp.capture.proxy import AmpParameterProxy, AmpProxy, SettlingProxy
from fxamp.capture.regions import RegionRecorder
from fxamp.capture.source import user_line
from fxamp.policy.operators import explicit
from fxamp.policy.spellings import aten_name

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


class AmpTracer(DecidingTracer):
    """Traces one entry point of one module tree, once.

    After ``run``: ``untraceable`` has the reason for each module that stayed a call because it had to,
    ``mode_readers`` the modules whose ``training`` flag was read, with its value, and ``composed`` says whether an
    operator was taken apart for the device type.

    Args:
        root: the model, or what holds the modules of a function; its own state may be changed.
        modules: path to every module that the entry point may use, root included.
        entry: called with the proxies of the placeholders; what it returns is the graph's output.
        extras: tensors that no module owns, by the name they are read under; new ones are added.
        untraceable: modules known to have to stay calls, with the reason.
        facts: what example inputs tell.
        device_type: whose rules the graph is for.
    """

    def __init__(
        self,
        root: nn.Module,
        modules: Mapping[str, nn.Module],
        entry: Callable[..., Any],
        extras: dict[str, torch.Tensor],
        untraceable: Mapping[str, str] | None = None,
        facts: Facts | None = None,
        device_type: str | None = None,
    ) -> None:
        super().__init__(facts)
        self.untraceable: dict[str, str] = dict(untraceable or {})
        self.extras = extras
        self.mode_readers: dict[str, bool] = {}
        self.composed = False
        self._device_type = device_type
        self._entry = entry
        self._regions = RegionRecorder(self._emit)
        self._names: list[str] = []
        self._proxies: dict[str, fx.Proxy] = {}
        self._written: list[tuple[nn.Module, str, bool, Any]] = []
        self._modules = {id(module): path for path, module in modules.items()}
        self._tensors: dict[int, str] = {}
        for path, module in modules.items():
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in own:
                self._tensors.setdefault(id(tensor), f"{path}.{name}".lstrip("."))
        self.root = root

    def run(self, names: list[str], *, numbers: bool = False) -> fx.Graph:
        """The graph of the entry point, with a placeholder for each of ``names``.

        Args:
            names: of the placeholders.
            numbers: record ``int`` and ``float`` of traced values too.
        """
        self._names = names
        grad_mode = torch.is_grad_enabled()
        try:
            with ExitStack() as stack:
                stack.enter_context(self._regions.recording())
                stack.enter_context(modules_watched(self._modules, self._read_training, self._set_attribute))
                stack.enter_context(autograd_functions(self._record))
                stack.enter_context(random_calls(self._record))
                stack.enter_context(refusals())
                stack.enter_context(tensor_calls(self._record, self._record_method))
                stack.enter_context(shadowed_builtins(numbers=numbers))
                return super().trace(self.root)
        finally:
            torch.set_grad_enabled(grad_mode)
            self._undo_writes(0)

    # -- hooks of torch.fx.Tracer ------------------------------------------------------------------

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        del root_fn, is_module, concrete_args
        self.graph._graph_namespace.create_name(
            "self", None
        )  # the generated code needs it; a submodule may be called so
        return self._call_entry, [self.create_proxy("placeholder", name, (), {}) for name in self._names]

    def _call_entry(self, *proxies: fx.Proxy) -> Any:
        drawn = random_state()
        result = self._entry(*proxies)
        check_random_state(drawn)
        if self._refused:
            raise TraceError(self._refused[-1])  # the model's own code caught it
        return result

    def proxy(self, node: fx.Node) -> AmpProxy:
        return AmpProxy(node, self) if self.facts is None else SettlingProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if self.facts is not None and self.facts.running:
            return None
        body = self._body(kind, target, args, kwargs)
        if body is None:
            return super().create_proxy(kind, target, args, kwargs, *rest, **more)
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
        found = aten_name(kind, target, *_nodes_of((args, kwargs)))
        if found is None:
            return body_of(kind, target)
        if found not in COMPOSED or self._device_type is None or explicit(found, self._device_type):
            return None
        self.composed = True
        return COMPOSED[found]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["module"] = self.scope.module_path
        node.meta["regions"] = self._regions.open
        node.meta["source"] = user_line(sys._getframe(1))
        return node

    def path_of_module(self, mod: nn.Module) -> str:
        path = self._modules.get(id(mod))
        if path is None:
            raise NameError(f"calls a {type(mod).__name__} that is no submodule of the model")
        return path

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or has_hooks(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if id(m) not in self._modules:
            return forward(*args, **kwargs)  # made in the forward: it is what it is made of
        path = self.path_of_module(m)
        if path in self.untraceable:
            return self._call_leaf(m, path, args, kwargs)
        mark, drawn = self._mark(), random_state()
        try:
            result = super().call_module(m, forward, args, kwargs)
            check_random_state(drawn)
            if len(self._refused) > mark.refused:
                raise TraceError(self._refused[-1])  # the model's own code caught it
        except Exception as error:
            if m is self.root:
                raise
            self._go_back(mark)
            self.untraceable[path] = _reason(error)
            return self._call_leaf(m, path, args, kwargs)
        return (result[0], None) if gives_no_weights(m, args, kwargs) else result

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
        outer = (self.scope.module_path, self.scope.module_type)
        self.scope.module_path, self.scope.module_type = path, type(m)
        try:
            proxy = self.create_proxy("call_module", path, args, kwargs)
            proxy.node.meta["untraceable"] = self.untraceable.get(path, "")
            return proxy
        finally:
            self.scope.module_path, self.scope.module_type = outer

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        asked_for_facts = self.facts is not None and self.facts.running
        if isinstance(attr_val, torch.Tensor) and id(attr_val) in self._tensors and not asked_for_facts:
            return self._tensor_proxy(attr_val)
        return attr_val

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return self._tensor_proxy(a).node
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        return super().create_arg(a)

    # -- our own -----------------------------------------------------------------------------------

    def _tensor_proxy(self, tensor: torch.Tensor) -> fx.Proxy:
        name = self._tensors.get(id(tensor)) or self._plain_attribute(tensor)
        if name not in self._proxies:
            node = self.create_node("get_attr", name, (), {})
            self._proxies[name] = AmpParameterProxy(node, self, tensor)
        return self._proxies[name]

    def _plain_attribute(self, tensor: torch.Tensor) -> str:
        """The name of a tensor that is no parameter or buffer: a plain attribute, or one from outside."""
        name = self.tensor_attrs.get(tensor)
        if name is None:
            name = next((key for key, known in self.extras.items() if known is tensor), None)
        if name is None:
            name = f"_constant_{len(self.extras)}"
            while owns(self.root, name):
                name += "_"
            self.extras[name] = tensor
        self._tensors[id(tensor)] = name
        return name

    def _mark(self) -> _Mark:
        last = next(iter(reversed(self.graph.nodes)), self.graph._root)
        scope = (self.scope.module_path, self.scope.module_type)
        return _Mark(last, len(self._proxies), scope, dict(self.module_stack), len(self._written), len(self._refused))

    def _go_back(self, mark: _Mark) -> None:
        for node in reversed(self.graph.nodes):
            if node is mark.last:
                break
            self.graph.erase_node(node)
        for name in list(self._proxies)[mark.proxies :]:
            del self._proxies[name]
        self.scope.module_path, self.scope.module_type = mark.scope
        self.module_stack.clear()
        self.module_stack.update(mark.stack)
        self._undo_writes(mark.written)
        del self._refused[mark.refused :]

    def _undo_writes(self, start: int) -> None:
        while len(self._written) > start:
            module, name, existed, value = self._written.pop()
            if existed:
                module.__dict__[name] = value
            else:
                module.__dict__.pop(name, None)

    def _read_training(self, path: str, training: bool) -> None:
        self.mode_readers[path] = training

    def _set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        existed = name in module.__dict__
        before = module.__dict__.get(name)
        if isinstance(value, fx.Proxy) and existed and before is None:
            raise TraceError(f"keeps self.{name} for the next call, which may go another way then")
        if isinstance(value, fx.Proxy):
            owner = self.create_node("get_attr", self._modules[id(module)] or THIS, (), {})
            self.create_node("call_function", assign, (owner, name, value.node), {})
        elif not (existed and (value is before or (type(value) is type(before) and value == before))):
            raise TraceError(f"sets self.{name}, which a graph cannot carry to the next call")
        self._written.append((module, name, existed, before))
        module.__dict__[name] = value


def _nodes_of(arguments: Any) -> Any:
    return fx.node.map_aggregate(arguments, lambda value: value.node if isinstance(value, fx.Proxy) else value)


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
