"""A plan to casts in a graph. The only module that inserts casts.

The traced graph is copied, so one capture serves many plans. Every decision was made by planning; here each is
carried out as written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxamp.capture.objects import Rebuilt
from fxamp.dtypes import abbreviate
from fxamp.plan import Cast, Decision, PrecisionPlan, argument_keys, argument_nodes
from fxamp.policy.operators import argument_places, optional_tensors
from fxamp.policy.order import casts_last_argument_first
from fxamp.runtime.casts import AmbientCall, DtypeCall, ModuleCall, PromoteCall, soft_cast
from fxamp.runtime.weights import cast_weight, leaf_cast

__all__ = ["insert_casts"]


def insert_casts(graph: fx.Graph, plan: PrecisionPlan) -> fx.Graph:
    """A copy of the graph in which every decision of the plan is carried out.

    The given graph is left as it is. Each cast node has ``meta["cast"]``; every other node keeps the name
    and the metadata it was traced with.
    """
    copy = fx.Graph(tracer_cls=graph._tracer_cls)
    for node in graph.nodes:
        copy._graph_namespace._used_names.add(node.name)  # casts must not take the names of later calls
    inserter = _Inserter(copy, plan)
    new: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        new[node] = inserter.copy(node, new)
    copy.lint()
    return copy


class _Inserter:
    def __init__(self, graph: fx.Graph, plan: PrecisionPlan) -> None:
        self._graph = graph
        self._decisions = {decision.name: decision for decision in plan}
        self._device_type = plan.policy.device_type or "cpu"
        self._shared: dict[str, fx.Node] = {}

    def copy(self, node: fx.Node, new: dict[fx.Node, fx.Node]) -> fx.Node:
        decision = self._decisions[node.name]
        args, kwargs = self._arguments(node, decision, new) if decision.casts else _mapped(node, new.__getitem__)
        op, target, args, kwargs = _called(node, decision, args, kwargs, self._device_type, self._module)
        result = self._graph.create_node(op, target)
        if args:  # now, for torch.fx searches what it is given at first for symbolic sizes
            result.args = args
        if kwargs:
            result.kwargs = kwargs
        result.name = node.name
        result.meta = dict(node.meta)
        return result

    def _arguments(self, node: fx.Node, decision: Decision, new: Mapping[fx.Node, fx.Node]) -> tuple[Any, Any]:
        casts = {cast.slot: cast for cast in decision.casts}
        sources = argument_nodes(node)
        low = {
            slot: self._cast(new[sources[slot]], casts[slot], decision)
            for slot in _cast_order(node, decision.aten, casts)
        }
        slots = itertools.count()
        return _mapped(node, lambda source: low.get(next(slots), new[source]))

    def _module(self, path: str) -> fx.Node:
        node = self._graph.create_node("get_attr", path)
        node.meta = {"module_of": path, "module": path, "source": "", "regions": ()}
        return node

    def _cast(self, value: fx.Node, cast: Cast, decision: Decision) -> fx.Node:
        first = self._shared.get(cast.share) if cast.share else None
        if first is not None:
            return first
        name = f"{value.name}_{abbreviate(cast.dtype)}"
        told_apart = (cast.epoch, cast.version) if cast.version else (cast.epoch,) if cast.epoch >= 0 else ()
        if cast.leaf_only:
            node = self._graph.create_node("call_function", leaf_cast, (value, cast.dtype, *told_apart), {}, name)
        elif cast.weight and cast.share and value.op == "get_attr":
            node = self._graph.create_node("call_function", cast_weight, (value, cast.dtype, *told_apart), {}, name)
        elif cast.soft:
            node = self._graph.create_node("call_function", soft_cast, (value, cast.dtype), {}, name)
        else:
            node = self._graph.create_node("call_method", "to", (value, cast.dtype), {}, name)
        node.meta = {
            "cast": cast,
            "module": decision.module,
            "source": decision.source,
            "regions": (),
            "for": decision.name,
        }
        if cast.share:
            self._shared.setdefault(cast.share, node)
        return node


def _mapped(node: fx.Node, argument: Callable[[fx.Node], fx.Node]) -> tuple[Any, Any]:
    """The arguments of a call for other nodes, in the order of its slots."""
    args = fx.map_arg(node.args, argument)
    kwargs: Any = fx.map_arg(node.kwargs, argument) if node.kwargs else {}
    return args, dict(kwargs)


def _cast_order(node: fx.Node, aten: str, casts: Mapping[int, Cast]) -> list[int]:
    """The slots to cast in autocast's order: arguments as the torch build evaluates them, lists from the front."""
    places = argument_places(aten)
    keys = [places.get(key, len(places)) if isinstance(key, str) else key for key in argument_keys(node)]
    turn = -1 if casts_last_argument_first() else 1
    return sorted(casts, key=lambda slot: (turn * keys[slot], slot))


def _called(
    node: fx.Node,
    decision: Decision,
    args: Any,
    kwargs: Any,
    device_type: str,
    module: Callable[[str], fx.Node],
) -> tuple[str, Any, Any, Any]:
    """The call as its decision wants it made: opcode, target, args, kwargs."""
    call: Any = node.target
    if decision.how == "dtype":
        return node.op, call, args, {**kwargs, "dtype": torch.float32}
    if decision.how == "dtype if castable":
        return "call_function", DtypeCall(call), args, kwargs
    if decision.how == "promote":
        assert decision.state is not None
        refused = AmbientCall(call, device_type, decision.state) if decision.reason == "op table" else None
        promoting = PromoteCall(call, decision.state.dtype, optional_tensors(decision.aten), refused)
        return "call_function", promoting, args, kwargs
    if decision.how == "ambient":
        assert decision.state is not None
        if node.op == "call_module":
            return (
                "call_function",
                AmbientCall(None, device_type, decision.state),
                (module(call), *args),
                kwargs,
            )
        return "call_function", AmbientCall(call, device_type, decision.state), args, kwargs
    if node.op == "call_module" and _gives_containers(node):
        return "call_function", ModuleCall(), (module(call), *args), kwargs
    return node.op, call, args, kwargs


def _gives_containers(node: fx.Node) -> bool:
    """Whether a call is given a list or the like, which it could write to."""
    made = any(isinstance(source.target, Rebuilt) for source in node.all_input_nodes)
    return made or any(map(_is_container, (*node.args, *node.kwargs.values())))


def _is_container(value: Any) -> bool:
    return isinstance(value, list | dict) or (isinstance(value, tuple) and any(map(_is_container, value)))
