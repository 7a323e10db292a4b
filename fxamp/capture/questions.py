"""What was a graph traced for, that the arguments of a call tell before it runs?

The questions are a graph of their own: the part of a traced one that leads from its arguments to what decided about the
way. It is run ahead of a call, and where its answers are others, the call needs another graph. What follows from the
shapes of the arguments alone is found out once for these shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import fx, nn

from fxamp.capture.calls import expect, is_as_expected
from fxamp.capture.steps import Step, given, made, slice_of

__all__ = ["Questions"]

_KEPT: Final = 256  # shapes, of which the answers are kept


class Questions:
    """The questions of one traced graph.

    Attributes:
        of_data, of_shapes: those that follow from the data of arguments, and from their shapes alone.
        tensors: paths of the parameters, buffers and constants that they need.

    Args:
        graph: as traced.
    """

    def __init__(self, graph: fx.Graph) -> None:
        checks = [node for node in graph.nodes if node.target is expect and node.meta.get("told")]
        slices = {check: slice_of(Step(check.args[0], "data")) for check in checks}
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        shapes = [check for check in checks if not any(map(_is_data, slices[check]))]
        data = [check for check in checks if check not in set(shapes)]
        self.of_data, self.of_shapes = (_Part(placeholders, part, slices) for part in (data, shapes))
        self.tensors = (*self.of_data.tensors, *self.of_shapes.tensors)
        self._dtypes = tuple((i, dtype) for i, n in enumerate(placeholders) if (dtype := n.meta.get("told_dtype")))
        self._known: dict[Any, bool] = {}

    def __bool__(self) -> bool:
        return bool(self.of_data.expected or self.of_shapes.expected)

    def are_answered_so(self, values: Sequence[Any], readers: Sequence[Callable[[], Any]]) -> bool:
        """Whether the answers are those that the graph is for.

        Args:
            values: of the placeholders.
            readers: give those of ``self.tensors`` as they are now.
        """
        for i, dtype in self._dtypes:
            if not isinstance(values[i], torch.Tensor) or values[i].dtype != dtype:
                return False
        count = len(self.of_data.tensors)
        return self._fits_shapes(values, readers[count:]) and self.of_data.fits(values, readers[:count])

    def _fits_shapes(self, values: Sequence[Any], readers: Sequence[Callable[[], Any]]) -> bool:
        if not self.of_shapes.expected or torch.compiler.is_compiling():
            return self.of_shapes.fits(values, readers)
        key = tuple(map(_key, values))
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            found = self._known[key] = self.of_shapes.fits(values, readers)
        return found


class _Part:
    def __init__(
        self, placeholders: Sequence[fx.Node], checks: Sequence[fx.Node], slices: dict[fx.Node, list[Step]]
    ) -> None:
        steps = sorted({step for check in checks for step in slices[check]})
        self.tensors = tuple(dict.fromkeys(str(step.node.target) for step in steps if step.node.op == "get_attr"))
        self.expected = tuple(check.args[1] for check in checks)
        self.graph = _graph_of(placeholders, self.tensors, steps, [slices[check][-1] for check in checks])
        self._ask: Any = type(fx.GraphModule(nn.Module(), self.graph)).forward if checks else None

    def fits(self, values: Sequence[Any], readers: Sequence[Callable[[], Any]]) -> bool:
        if self._ask is None:
            return True
        # As in the graph, no autocast of the caller's has a part in it; compiled code is asked of shapes only.
        compiling = torch.compiler.is_compiling()
        context: AbstractContextManager[Any] = nullcontext() if compiling else torch._C._DisableAutocast()
        try:
            with torch.no_grad(), context:
                found = self._ask(None, *values, *[read() for read in readers])
        except Exception:  # it is another kind of argument, of which not even this can be asked
            return False
        return all(map(is_as_expected, found, self.expected))


def _is_data(step: Step) -> bool:
    return step.what == "data" and step.node.op in ("placeholder", "get_attr")


def _key(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_nested:
        strides = value.stride() if value.layout == torch.strided else ()
        return value.shape, strides, value.dtype, value.device, value.layout
    return type(value)


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
