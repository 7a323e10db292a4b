"""What was a graph traced for, that the arguments of a call tell before it runs?

The questions are a graph of their own: the part of a traced one that leads from its arguments to what decided about the
way. It is run ahead of a call, and where its answers are others, the call needs another graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fxamp.capture.calls import expect, is_as_expected
from fxamp.capture.steps import Step, given, made, slice_of

__all__ = ["Questions"]


class Questions:
    """The questions of one traced graph.

    Attributes:
        graph: what is run ahead of a call: it gives the answers.
        tensors: paths of the parameters, buffers and constants that they need.

    Args:
        graph: as traced.
    """

    def __init__(self, graph: fx.Graph) -> None:
        checks = [node for node in graph.nodes if node.target is expect and node.meta.get("told")]
        asked = [Step(check.args[0], "data") for check in checks]
        steps = sorted({each for step in asked for each in slice_of(step)})
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.tensors = tuple(dict.fromkeys(str(step.node.target) for step in steps if step.node.op == "get_attr"))
        self._dtypes = tuple((i, dtype) for i, n in enumerate(placeholders) if (dtype := n.meta.get("told_dtype")))
        self._expected = tuple(check.args[1] for check in checks)
        self.graph = _graph_of(placeholders, self.tensors, steps, asked)
        self._ask: Any = type(fx.GraphModule(nn.Module(), self.graph)).forward if checks else None

    def __bool__(self) -> bool:
        return self._ask is not None

    def are_answered_so(self, values: Sequence[Any], tensors: Sequence[Any]) -> bool:
        """Whether the answers are those that the graph is for.

        Args:
            values: of the placeholders.
            tensors: those of ``self.tensors`` as they are now.
        """
        if self._ask is None:
            return True
        for i, dtype in self._dtypes:
            if not isinstance(values[i], torch.Tensor) or values[i].dtype != dtype:
                return False
        try:
            with torch.no_grad():
                found = self._ask(None, *values, *tensors)
        except Exception:  # it is another kind of argument, of which not even this can be asked
            return False
        return all(map(is_as_expected, found, self._expected))


def _graph_of(
    placeholders: Sequence[fx.Node], tensors: Sequence[str], steps: Sequence[Step], asked: Sequence[Step]
) -> fx.Graph:
    graph = fx.Graph()
    found = {Step(node, "given"): graph.placeholder(f"input_{i}") for i, node in enumerate(placeholders)}
    read = {path: graph.placeholder(f"tensor_{i}") for i, path in enumerate(tensors)}
    for step in steps:
        if step.node.op == "get_attr":
            found[given(step)] = read[str(step.node.target)]
        found[step] = made(step, found.__getitem__, graph.create_node)
    graph.output(tuple(found[step] for step in asked))
    return graph
