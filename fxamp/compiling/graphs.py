"""How is a graph of Dynamo's converted?"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fxamp.capture.dynamo_graph import told, translate
from fxamp.plan import PrecisionPlan, make_plan
from fxamp.plan.recorded import RecordedObserver
from fxamp.policy import Policy, Ruling
from fxamp.rewrite import insert_casts, verify

__all__ = ["converted", "device_type_of", "module_of", "title_of"]


def converted(
    gm: fx.GraphModule, example_inputs: Sequence[Any], policy: Policy, *, eager: bool
) -> tuple[PrecisionPlan, fx.Graph]:
    """The plan of a graph of Dynamo's, and the graph with its casts."""
    assert policy.device_type is not None
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    weights = {
        node.name: value
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, nn.Parameter)
    }
    graph, made = fx.Graph(), {}
    for node in placeholders:
        op, target = ("get_attr", node.name) if node.name in weights else ("placeholder", node.target)
        made[node] = graph.create_node(op, target, (), {}, node.name)
        made[node].meta = {"module": "", "source": "", "regions": (), "told": told(node.meta.get("example_value"))}
    translate(gm.graph, graph, made, eager=eager)
    output = gm.graph.output_node()
    made[output] = graph.node_copy(output, made.__getitem__)
    made[output].meta = {"module": "", "source": "", "regions": ()}

    def attribute(path: str) -> Any:
        return weights[path] if path in weights else operator.attrgetter(path)(gm)

    observer = RecordedObserver(policy, under_autocast=_is_on(policy))
    plan = make_plan(graph, attribute, policy, _rulings(graph, policy), mode="compiled", observer=observer)
    result = insert_casts(graph, plan)
    verify(result, graph, plan)
    return plan, _with_inputs(result, placeholders)


def _is_on(policy: Policy) -> bool:
    """Whether the graph was captured under the autocast of the policy."""
    device_type = str(policy.device_type)
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == policy.dtype


def _rulings(graph: fx.Graph, policy: Policy) -> dict[str, Ruling]:
    """The overrides of the modules that the graph has calls of; another graph may have those of the rest."""
    paths = dict.fromkeys(
        ".".join(parts)
        for node in graph.nodes
        for parts in itertools.accumulate(([part] for part in node.meta["module"].split(".")), list.__add__)
    )
    return policy.module_rulings(paths, every=False)


def _with_inputs(graph: fx.Graph, placeholders: Sequence[fx.Node]) -> fx.Graph:
    """The graph with the weights that it reads as the inputs that Dynamo gives them as."""
    new = fx.Graph()
    read = {node.name: node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    made: dict[fx.Node, fx.Node] = {}
    for node in placeholders:
        made[read[node.name]] = new.node_copy(node)
    for node in graph.nodes:
        if node not in made:
            made[node] = new.node_copy(node, made.__getitem__)
    return new


def module_of(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """The converted graph on what that of Dynamo's is on."""
    made = fx.GraphModule(gm, graph, class_name="FxampGraph")
    made.meta.update(gm.meta)
    return made


def title_of(gm: fx.GraphModule) -> str:
    """The class of the module that a graph begins in."""
    stacks = (node.meta.get("nn_module_stack") for node in gm.graph.nodes)
    first = next(filter(None, stacks), None)
    kind = next(iter(first.values()))[1] if first else None
    return getattr(kind, "__name__", None) or "compiled"


def device_type_of(example_inputs: Sequence[Any]) -> str:
    """Where the tensors of a graph are: on a GPU when one of them is."""
    found = {value.device.type for value in example_inputs if isinstance(value, torch.Tensor)}
    return "cuda" if "cuda" in found else "cpu"
