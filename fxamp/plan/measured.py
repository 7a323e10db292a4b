"""What do the calls of a graph cost on this device, as it was measured?

Nanoseconds, for the minimum cut. Operators of rule ``lower`` are measured one by one, with the shapes and layouts that
they get here; everything else by how many elements it moves. In training the gradients count too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx

from fxamp.capture.arguments import map_leaves
from fxamp.cost import Probe, Spec
from fxamp.plan.calls import argument_nodes
from fxamp.plan.computing import stay_float32
from fxamp.plan.decision import Decision
from fxamp.plan.observer import FakeObserver
from fxamp.policy import Policy

__all__ = ["Measured"]

_NANO: Final = 1e9
_LARGE: Final = 1 << 24  # elements, of which a cast has to go to memory


class Measured:
    """Costs by measurement.

    Args:
        probe: measures on the device.
        graph: the traced graph.
        observer: has the fake values of the graph's nodes.
        attribute: path to the parameter, buffer, tensor or module of that name.
        policy: with its dtype resolved.
        training: whether gradients count.

    Attributes:
        seconds: what calls were found to take in float32 and in the low dtype, by the names of their nodes.
    """

    def __init__(
        self,
        probe: Probe,
        graph: fx.Graph,
        observer: FakeObserver,
        attribute: Callable[[str], Any],
        policy: Policy,
        *,
        training: bool,
    ) -> None:
        self._probe = probe
        self._observer = observer
        assert policy.dtype is not None
        assert policy.device_type is not None
        self._device_type = policy.device_type
        self._dtypes = (torch.float32, policy.dtype)
        self._training = training
        self.seconds: dict[str, tuple[float, float]] = {}
        self._known: dict[Any, tuple[float | None, ...]] = {}
        self._casts: dict[int, float] = {}
        self._moves: dict[tuple[int, int], int] = {}
        self._trained = _trained(graph, attribute, through=training)

    def cast(self, size: int, *, weight: bool) -> int:
        """That of a value, or what a weight adds to a cast of many.

        At the pace of large tensors: in a model what is cast is in a cache less often than in a measurement.
        """
        if not self._casts:
            high, low = self._dtypes
            self._casts = {n: self._probe.cast(n, high, low, training=self._training) for n in (1, _LARGE)}
        call, large = self._casts.values()
        alone = not weight or self._device_type == "cpu"  # a call for many is one kernel on a GPU
        return round((large * size / _LARGE + (call if alone else 0.0)) * _NANO)

    def moved(self, size: int, width: int) -> int:
        """Of an elementwise operator; a half of what it moves is what it gives."""
        if (size, width) not in self._moves:
            dtype = self._dtypes[0] if width == 4 else self._dtypes[1]
            seconds = self._probe.pointwise(max(size // 2, 1), dtype, training=self._training)
            self._moves[size, width] = round(seconds * _NANO)
        return self._moves[size, width]

    def call(self, node: fx.Node, decision: Decision) -> tuple[int, int] | None:
        """An operator in float32 and in the low dtype, or None when it cannot be measured."""
        if node.op == "call_module" or node.target in (operator.getitem, getattr):
            return None
        try:
            found = self._found(node, decision)
        except TypeError:  # something that has no shape
            return None
        high, low = found
        if high is None or low is None:
            return None
        self.seconds[node.name] = high, low
        return round(high * _NANO), round(low * _NANO)

    def _found(self, node: fx.Node, decision: Decision) -> tuple[float | None, ...]:
        """Seconds in either dtype; the observer gives calls that are alike the same values, which are asked once."""
        values = map_leaves(
            (node.args, node.kwargs), fx.Node, lambda n: (id(self._observer.value(n)), n in self._trained)
        )
        key = repr((node.target, values))
        if key not in self._known:
            self._known[key] = self._compared(node, decision)
        return self._known[key]

    def _compared(self, node: fx.Node, decision: Decision) -> tuple[float | None, ...]:
        fixed = stay_float32(node, decision.aten, self._device_type)
        kept = {source for source, stays in zip(argument_nodes(node), fixed, strict=True) if stays}
        args, kwargs = map_leaves((node.args, node.kwargs), fx.Node, lambda each: self._spec(each, each in kept))
        target: Any = node.target
        return self._probe.compare(decision.aten, target, args, kwargs, self._dtypes, training=self._training)

    def _spec(self, node: fx.Node, fixed: bool) -> Any:
        value = self._observer.value(node)
        if not isinstance(value, torch.Tensor):
            if isinstance(value, bool | int | float | None):
                return value
            raise TypeError(f"'{node.name}' is no tensor")
        spec = Spec.of(value)
        trained = node in self._trained and value.is_floating_point()
        return Spec(spec.shape, spec.dtype, trained, spec.strides, fixed)


def _trained(graph: fx.Graph, attribute: Callable[[str], Any], *, through: bool) -> set[fx.Node]:
    """The weights that want a gradient; ``through``: and what has one because of them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            value = attribute(str(node.target))
            trained = isinstance(value, torch.Tensor) and value.requires_grad
        elif node.op == "call_module":
            trained = through and any(p.requires_grad for p in attribute(str(node.target)).parameters())
        else:
            trained = through and not found.isdisjoint(node.all_input_nodes)
        if trained:
            found.add(node)
    return found
