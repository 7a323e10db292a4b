"""Which values must not be rounded to the low dtype, but where the operator table says so?

What comes in from outside, what was an integer (a position, a time), what is out of the low dtype's range, and what a
dangerous operator gives: nobody knows how much of their precision counts. Nor does anybody know whether float16 holds
the sums and products that autocast has in float32. What is computed from them is no better, until an operator gives
values in a range of their own, or the table brings them down as autocast would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import fx, nn

from fxamp.plan.calls import Call, argument_nodes
from fxamp.plan.decision import Decision
from fxamp.plan.flow import UNKNOWN, Flow, tensors_in
from fxamp.policy.fast import BOUNDED, NO_LARGER, fast_kinds, fits, tensor_fits

__all__ = ["Precise"]

# Factories of values that any dtype holds.
_PLAIN: Final = frozenset(
    "zeros ones empty rand randn zeros_like ones_like empty_like rand_like randn_like new_zeros new_ones new_empty "
    "eye bernoulli".split()
)
_LOOKUPS: Final = frozenset({"embedding", "embedding_bag"})
_WIDE: Final = 1e38
# Their numbers are epsilons and the like, for which the kernel has float32.
_INSIDE: Final = "inside"


class Precise:
    """Follows the values of a graph from its start.

    Args:
        attribute: path to the parameter, buffer, tensor or module of that name.
        dtype: the low dtype.
        device_type: whose kernels run.
    """

    def __init__(self, attribute: Callable[[str], Any], dtype: torch.dtype, device_type: str) -> None:
        self._attribute = attribute
        self._all_kinds = fast_kinds(device_type, gradients=False)
        self._dtype = dtype
        self._found: set[fx.Node] = set()

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._found

    def read(self, node: fx.Node, call: Call | None, decision: Decision, kind: str | None) -> None:
        """A value comes to be, by an operator of this kind of the fast table."""
        if _is_floating(decision.output) and self._is_precise(node, call, decision, kind):
            self._found.add(node)

    def comes_in(self, node: fx.Node, decision: Decision) -> bool:
        """Whether a call is given such a value; where one is not known in a lookup, it is the index."""
        flows = zip(argument_nodes(node), decision.inputs, strict=True)
        lookup = decision.aten in _LOOKUPS
        return any(source in self._found and not (lookup and flow == UNKNOWN) for source, flow in flows)

    def has_number_out_of_range(self, node: fx.Node, kind: str | None) -> bool:
        """Whether a call is given a number that the low dtype does not hold."""
        numbers = () if kind == _INSIDE else _numbers((node.args, node.kwargs))
        return not all(fits(number, self._dtype) for number in numbers)

    def _is_precise(self, node: fx.Node, call: Call | None, decision: Decision, kind: str | None) -> bool:
        if call is None:
            return self._comes_from_outside(node)
        if decision.rule == "lower" or call.aten in BOUNDED:
            return False
        if kind == "fp32" or self.comes_in(node, decision) or self.has_number_out_of_range(node, kind):
            return True
        tensors = [value for flow in decision.inputs for value in tensors_in(flow)]
        if not tensors:
            return call.aten not in _PLAIN
        if all(value.dtype != torch.float32 for value in tensors_in(decision.output)):
            return False  # as autocast has it
        indexes = self._all_kinds.get(call.aten) == "moves" or call.aten == "getitem"
        integers = not indexes and any(_is_integer(value.dtype) for value in tensors)
        return integers or self._may_outgrow(call.aten, kind)

    def _may_outgrow(self, aten: str, kind: str | None) -> bool:
        """Whether an operator may give more than it is given, and the low dtype holds less than float32."""
        narrow = torch.finfo(self._dtype).max < _WIDE
        return narrow and kind in ("inside", "pointwise") and aten not in NO_LARGER

    def _comes_from_outside(self, node: fx.Node) -> bool:
        if node.op != "get_attr":
            return node.op == "placeholder"
        value = self._attribute(str(node.target))
        return not isinstance(value, nn.Parameter) and not tensor_fits(value, self._dtype)


def _is_floating(flow: Flow) -> bool:
    return any(value.dtype is None or value.dtype.is_floating_point for value in tensors_in(flow))


def _is_integer(dtype: torch.dtype | None) -> bool:
    return dtype is not None and dtype != torch.bool and not dtype.is_floating_point and not dtype.is_complex


def _numbers(argument: Any) -> Iterator[complex]:
    if isinstance(argument, int | float | complex) and not isinstance(argument, bool):
        yield argument
    elif isinstance(argument, tuple | list):
        for item in argument:
            yield from _numbers(item)
    elif isinstance(argument, dict):
        yield from _numbers(tuple(argument.values()))
