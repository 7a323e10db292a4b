"""What does Dynamo make of a model that torch.fx cannot trace?

The model is compiled in one graph by a backend of ours that runs nothing: it gives stand-ins back, around which the
bytecode of Dynamo puts what the model returns and keeps. So parameters are known by what they are, and output classes
are the model's. torch.compile is the public way to this. The capture for torch.export tells no guards and gives a
module that can be neither copied nor pickled, and torch.export gives ATen calls, which autocast has decided about.
"""

from __future__ import annotations

import operator
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.fx.proxy import TraceError

from fxamp.capture.calls import assign
from fxamp.capture.containers import Contents
from fxamp.capture.dynamo_graph import modules_named, told, translate
from fxamp.capture.entry import Entry
from fxamp.capture.facts import without_log
from fxamp.capture.fits import Fits, Kind
from fxamp.capture.owned import OwnTensors, put_back, set_to_stand_ins
from fxamp.capture.patches import mode_of
from fxamp.capture.reading import ReadingTracer
from fxamp.capture.regions import autocast_as
from fxamp.capture.setting import Ambient, Setting, Traced
from fxamp.capture.signature import Layout
from fxamp.capture.sizes import condition, kind_of, may_change
from fxamp.capture.state import python_state
from fxamp.capture.surroundings import changed_modules
from fxamp.errors import describe

__all__ = ["DynamoTracer", "SizesCountError"]

THIS: Final = "_fxamp_this"
_OPTIONS: Final = {
    "allow_rnn": True,
    "automatic_dynamic_shapes": False,
    "capture_dynamic_output_shape_ops": True,
    "capture_scalar_outputs": True,
    "specialize_float": True,
    "specialize_int": True,
    "trace_autograd_ops": True,
}


class SizesCountError(Exception):
    """The graph would be right for these sizes only, without a check that shows it."""


class DynamoTracer(ReadingTracer):
    """Makes one of our graphs of what Dynamo captures.

    Args:
        modules, originals, extras, setting, function: as for ``ReadingTracer``.
        dynamic: whether sizes are symbols where the program does not look at them.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        originals: Mapping[str, nn.Module],
        extras: dict[str, Any],
        setting: Setting,
        function: Any = None,
        *,
        dynamic: bool,
    ) -> None:
        super().__init__(modules, originals, extras, None, setting, None, function)
        self.root, self.graph = modules[""], fx.Graph()
        self.tensor_attrs = {
            value: f"{path}.{name}".lstrip(".")
            for path, module in modules.items()
            for name, value in module.__dict__.items()
            if isinstance(value, torch.Tensor)
        }
        self._dynamic, self._ambient = dynamic, setting.ambient
        self._sources: list[fx.Node] = []  # the inputs of Dynamo's graph
        self._outputs: dict[int, tuple[Any, fx.Node]] = {}  # its outputs, by what stands for them
        self._given: Sequence[Any] = ()
        self._ours: dict[fx.Node, fx.Node] = {}
        self._inputs: dict[int, fx.Node] = {}

    def run(self, entry: Entry, values: Sequence[Any]) -> tuple[fx.Graph, Fits]:
        """The graph of one call, and the inputs that it is for.

        Args:
            entry: makes the call.
            values: of the placeholders.

        Raises:
            TraceError: when the model does what a graph cannot.
            SizesCountError: when it has to be captured with ``dynamic=False``.
            Exception: of Dynamo's, when it cannot make one graph of it.
        """
        self.graph._graph_namespace.create_name("self", None)
        placeholders = [self.create_node("placeholder", name, (), {}) for name in entry.names()]
        given = [_alias(value, dynamic=self._dynamic) for value in values]
        arguments = entry.arguments(*given)
        for node, value in zip(placeholders, given, strict=True):
            if not isinstance(value, torch.Tensor | int | float | complex | str):
                raise TraceError(f"is given {describe(value)}, and what a graph reads in it would be frozen")
            node.meta["told"] = told(value)
            if isinstance(value, torch.Tensor):
                self._inputs[id(value)] = node
        before = {path: python_state(module) for path, module in self._by_path.items()}
        held, tensors = Contents(*arguments), OwnTensors(self._by_path.values())
        try:
            result, graph = self._compiled(entry.plainly, arguments)
        finally:
            tensors.check()
        if (written := held.changed()) is not None:
            raise TraceError(f"puts something into the {type(written).__name__} it is given, which a graph would not")
        fits = self._fits([node.name for node in placeholders], given)
        if graph is not None:
            self._translate(graph)
        self._carry(before)
        self._returned = True
        self.create_node("output", "output", (self.create_arg(result),), {})
        return self.graph, fits

    def traced(self, graph: fx.Graph, layout: Layout, fits: Fits) -> Traced:
        """What ``run`` gave, with what it is good for: Dynamo does not tell what it asked for."""
        read = {str(node.target): self._proxied(node) for node in graph.nodes if node.op == "get_attr"}
        places = {path: (value.dtype, value.device) for path, value in read.items() if value is not None}
        setting = self._setting
        return Traced(
            graph,
            layout,
            modes=dict(setting.training),
            ambient=(setting.ambient,),
            grad=(setting.grad,),
            frontend="Dynamo",
            fits=fits,
            stands_on=places,
        )

    def _proxied(self, node: fx.Node) -> torch.Tensor | None:
        proxy = self._proxies.get(str(node.target))
        return proxy._tensor if proxy is not None else None

    # -- Dynamo ----------------------------------------------------------------------------------------

    def _compiled(self, call: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, fx.Graph | None]:
        """What the call gives back, in stand-ins, and Dynamo's graph."""
        graphs: list[fx.GraphModule] = []

        def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            graphs.append(gm)
            self._sources = [node for node in gm.graph.nodes if node.op == "placeholder"]
            outputs: Any = gm.graph.output_node().args[0]
            stand_ins = [_stand_in(node.meta.get("example_value")) for node in outputs]
            self._outputs = {id(value): (value, node) for value, node in zip(stand_ins, outputs, strict=True)}

            def run(*values: Any) -> list[Any]:
                self._given = values
                return stand_ins

            return run

        # Dynamo keeps what it compiled with the code that it compiled: here each time another one.
        alone = types.FunctionType(_called.__code__.replace(co_name="called"), _called.__globals__)
        compiled = torch.compile(alone, backend=backend, fullgraph=True, dynamic=None if self._dynamic else False)
        options: dict[str, Any] = {
            name: value for name, value in _OPTIONS.items() if hasattr(torch._dynamo.config, name)
        }
        with torch._dynamo.config.patch(options), _autocast(self._ambient), without_log(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a capture warns about is no news of the model's
            result = compiled(call, *arguments)
        self._kept = graphs  # what is in it lives as long as it
        return result, graphs[0].graph if graphs else None

    def _translate(self, graph: fx.Graph) -> None:
        for node, value in zip(self._sources, self._given, strict=True):
            self._ours[node] = self._source(node, value)
        for node in graph.nodes:
            if node.op == "get_attr":  # a graph of its own, for a call that takes one
                part = operator.attrgetter(str(node.target))(graph.owning_module)
                self._ours[node] = self.create_node("get_attr", self._extra(part), (), {})
        translate(graph, self.graph, self._ours, self._path_of_call)

    def _source(self, node: fx.Node, value: Any) -> fx.Node:
        """What an input of Dynamo's graph stands for."""
        example = node.meta.get("example_value")
        if id(value) in self._inputs:
            return self._inputs[id(value)]
        if isinstance(value, torch.Tensor):
            return self._tensor_proxy(value).node
        if isinstance(example, torch.SymInt):
            for source, shape in self._shapes():
                for dim, size in enumerate(shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == example.node.expr:
                        found = self.create_node("call_method", "size", (source, dim), {})
                        found.meta["told"] = ()
                        return found
        raise TraceError(f"reads {describe(value)}, which a graph would freeze")

    def _shapes(self) -> Iterator[tuple[fx.Node, Sequence[Any]]]:
        """The inputs that are tensors, with their sizes."""
        for node, value in zip(self._sources, self._given, strict=True):
            if id(value) in self._inputs and isinstance(value, torch.Tensor):
                yield self._inputs[id(value)], node.meta["example_value"].shape

    def _path_of_call(self, stack: Mapping[str, Any]) -> str:
        for key in reversed(list(stack)):
            number = str(key).partition("@")[0]
            if number.isdecimal() and int(number) in self._modules:
                return self._modules[int(number)]
        return modules_named(stack)

    # -- what the graph is for ---------------------------------------------------------------------------

    def _fits(self, names: Sequence[str], given: Sequence[Any]) -> Fits:
        shapes: dict[fx.Node | None, Sequence[Any]] = dict(self._shapes())
        kinds = [kind_of(value, shapes.get(self._inputs.get(id(value)))) for value in given]
        symbols = {size for kind in kinds if isinstance(kind, Kind) for size in kind.sizes if isinstance(size, str)}
        examples = (node.meta.get("example_value") for node in self._sources)
        mode = next((value.fake_mode for value in examples if isinstance(value, FakeTensor)), None)
        asked = condition(mode, {size for size in symbols if size.isidentifier()})
        if asked is None:
            raise SizesCountError
        return Fits(tuple(names), tuple(kinds), asked)

    # -- what the model keeps and returns ----------------------------------------------------------------

    def _carry(self, before: Mapping[str, Mapping[str, Any]]) -> None:
        """Puts into the graph what the call set attributes to."""
        for path, module in self._by_path.items():
            for name, new in set_to_stand_ins(module):
                old = getattr(before[path].get(name), "value", None)
                if not isinstance(old, torch.Tensor) or old.shape != new.shape or old.dtype != new.dtype:
                    raise TraceError(f"keeps self.{name} for the next call, which may go another way then")
                owner = self.create_node("get_attr", path or THIS, (), {})
                self.create_node("call_function", assign, (owner, name, self.create_arg(new)), {})
                put_back(module, name, old)
        for path, module in self._by_path.items():
            if mode_of(module) is not self._setting.training.get(path, mode_of(module)):
                raise TraceError(f"switches the mode of {type(module).__name__}, which a graph would forget")
        for path, what in changed_modules(self._by_path, before).items():
            raise TraceError(f"{what} (in module '{path}')" if path else what)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
            if id(a) in self._outputs:
                return self._ours[self._outputs[id(a)][1]]
            if id(a) in self._inputs:
                return self._inputs[id(a)]
            if not isinstance(a, torch.Tensor):
                raise SizesCountError
            if isinstance(a, FakeTensor):
                raise TraceError("keeps a value of the call that Dynamo does not show")
        if self._dynamic and type(a) in (int, float):
            raise SizesCountError  # it may be a size
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta.update(module="", source="", regions=(), number=False, object=False)
        return node


def _called(call: Callable[..., Any], args: Any, kwargs: Any, loss_kwargs: Any) -> Any:
    return call(args, kwargs, loss_kwargs)


@contextmanager
def _autocast(ambient: Ambient) -> Iterator[None]:
    if ambient is None:
        yield
        return
    try:
        with autocast_as(*ambient, enabled=True):
            yield
    finally:
        torch.clear_autocast_cache()


def _alias(value: Any, *, dynamic: bool) -> Any:
    """The same data as another tensor: two inputs may be one, and what Dynamo notes on a tensor is not for the user."""
    if type(value) not in (torch.Tensor, nn.Parameter):
        return value
    alias = value.detach().requires_grad_(value.requires_grad)
    for dim in may_change(alias) if dynamic else ():
        torch._dynamo.maybe_mark_dynamic(alias, dim)
    return alias


def _stand_in(value: Any) -> Any:
    """Another object for each output, however many of them are one value."""
    return value.detach() if isinstance(value, torch.Tensor) else value
