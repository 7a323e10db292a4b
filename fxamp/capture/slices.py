"""What follows from the arguments of a call alone?

The number of dimensions of an input, a test of a mask, what a buffer holds: such a value is known before the graph
runs, so that a branch on it can be decided then. Between the arguments and the value there is nothing that draws
random numbers, writes, runs a module or is cast by autocast on any device: it is the same value wherever it is
computed. Of a tensor that is asked for no more than its shape or its device, only that is followed back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxamp.capture.memory import Memory
from fxamp.capture.steps import Step, given, made, needs, slice_of
from fxamp.dtypes import is_castable
from fxamp.policy import DEVICE_TYPES
from fxamp.policy.operators import operator_rules, transparent
from fxamp.policy.spellings import CAST_METHODS, aten_name

__all__ = ["UNTOLD", "Slices"]

UNTOLD: Final = object()
_length = len  # while a model is traced, the builtin is another one
# Steps; a longer way is not one that only decides. Shapes are found out once.
_LIMITS: Final = {"data": 256, "shape": 4096, "device": 4096}
_MOST: Final = 512  # questions; more of them are a loop that goes by its values
_NEUTRAL: Final = frozenset({"fp32", "fp32_dtype", "promote"})  # rules that change nothing when all is float32


class Slices:
    """The real values of what follows from the arguments alone, while a graph is traced.

    Args:
        examples: the values of its placeholders, in order.
        tensor: path to a parameter, buffer or constant, or to None when a forward may put another there.
        module: path to a module.
        device_type: whose autocast is around the model, or None.

    Attributes:
        of_one_autocast: whether a value was told that may be another one under the rules of another device.
    """

    def __init__(
        self,
        examples: Iterable[Any],
        tensor: Callable[[str], Any],
        module: Callable[[str], nn.Module],
        device_type: str | None,
    ) -> None:
        self._device_type, self.of_one_autocast = device_type, False
        self._examples, self._tensor, self._module = iter(examples), tensor, module
        self._memory = Memory(tensor, module)
        self._asked: set[fx.Node] = set()
        self._values: dict[Step, Any] = {}
        self._shapes: set[Step] = set()  # and devices, that were told: these stay
        self._strict: set[Step] = set()  # what is the same value for these dtypes only

    def told(self, node: fx.Node, *, shapes: bool = True) -> Any:
        """The value of a node, or ``UNTOLD``; ``shapes``: also when shapes of computed tensors have to be followed."""
        self._asked.add(node)
        if _length(self._asked) > _MOST:
            return UNTOLD
        self._memory.read(node.graph)
        steps = slice_of(Step(node, "data"), () if self._memory.resizes() else self._shapes)
        if not self._is_short(steps, shapes) or self._was_changed(steps):
            return UNTOLD
        for step in steps:
            if step not in self._values:
                self._values[step] = self._found(step)
            if self._values[step] is UNTOLD:
                return UNTOLD
            if step.what != "data":
                self._shapes.add(step)
        return self._values[steps[-1]]

    def note(self, node: fx.Node) -> None:
        """Stamps the placeholders that a value follows from and whose dtypes it was told for."""
        steps = slice_of(Step(node, "data"))
        for step in steps if not self._strict.isdisjoint(steps) else ():
            if step.node.op == "placeholder" and isinstance(self._values[given(step)], torch.Tensor):
                step.node.meta["told_dtype"] = self._values[given(step)].dtype

    def _is_short(self, steps: list[Step], shapes: bool) -> bool:
        if not shapes and any(step.what == "shape" and step.node.op.startswith("call") for step in steps):
            return False
        many = _length(self._shapes) > _LIMITS["shape"]
        return not many and all(sum(s.what == what for s in steps) <= limit for what, limit in _LIMITS.items())

    def _was_changed(self, steps: list[Step]) -> bool:
        data = [step.node for step in steps if step.what == "data" and all(need.what == "data" for need in needs(step))]
        return self._memory.was_written(data) or self._memory.was_resized(step.node for step in steps)

    def _found(self, step: Step) -> Any:
        node = step.node
        if node.op == "placeholder" and given(step) not in self._values:
            self._read_examples(node.graph)
        if node.op == "get_attr":
            value = self._tensor(str(node.target))
            self._values[given(step)] = UNTOLD if value is None else value
        if node.op in ("placeholder", "get_attr") and self._values[given(step)] is UNTOLD:
            return UNTOLD
        try:
            with torch.no_grad():
                return self._checked(step, made(step, self._values.__getitem__, _call, self._module))
        except Exception:
            return UNTOLD

    def _read_examples(self, graph: fx.Graph) -> None:
        for each in graph.find_nodes(op="placeholder"):
            step = given(Step(each, "data"))
            if step not in self._values:
                value = next(self._examples, UNTOLD)
                self._values[step] = UNTOLD if each.meta.get("object") else value

    def _checked(self, step: Step, value: Any) -> Any:
        """The value, when autocast has no part in it."""
        node = step.node
        if step.what != "data" or not node.op.startswith("call") or any(need.what != "data" for need in needs(step)):
            return value
        name = aten_name(node.op, node.target, node.args, node.kwargs)
        sources, results = _castable([self._values[need] for need in needs(step)]), _castable(value)
        if name is None or name in CAST_METHODS or not (sources or results):
            return value
        rules = {device: _rule_of(name, device) for device in DEVICE_TYPES}
        self.of_one_autocast |= any(rules.values())
        rule = rules[self._device_type] if self._device_type is not None else ""
        if rule:
            self._strict.add(step)
        return value if not rule or (rule in _NEUTRAL and sources <= {torch.float32}) else UNTOLD


def _rule_of(name: str, device_type: str) -> str:
    """The rule that is more than leaving an operator alone; "?" when it is not known what autocast does in it."""
    return operator_rules(device_type).get(name, "" if transparent(name, device_type) else "?")


def _call(op: str, target: Any, args: Any, kwargs: Any) -> Any:
    if op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def _castable(value: Any) -> set[torch.dtype]:
    leaves = pytree.tree_leaves(value)
    return {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor) and is_castable(leaf.dtype)}
