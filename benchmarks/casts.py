"""How many casts does one step dispatch, and how many bytes do they move?

Counted at dispatch, so exactly what runs: forward and backward, whoever asked for it. A cast is a call that turns
floating-point numbers into those of another dtype and does nothing else: ``_to_copy``, ``copy_``, and
``_foreach_copy_``, which is one cast however many tensors it is given. A product that is asked for an ``out_dtype`` is
none. The bytes of a cast are those that it reads and those that it writes.

What an operator casts within itself is not dispatched, and no cast here: on a CPU the sum of a bfloat16 and a float32
tensor makes a float32 copy of the first. Such copies are in the time and in the memory of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.variants import Step

__all__ = ["Casts", "count_casts"]

aten = torch.ops.aten

_VIEWS = {
    f"{name}Backward0"
    for name in "AsStrided Expand Permute ReshapeAlias Select Slice Split Squeeze T Transpose Unsqueeze View".split()
}


@dataclass
class Casts:
    """What one step dispatched. ``not_seen_into`` names operators that are not torch's own: they may cast inside."""

    forward: int = 0
    backward: int = 0
    bytes: int = 0
    weight_bytes: int = 0
    dispatched: int = 0
    not_seen_into: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; ``casts`` are those of both directions."""
        return {"casts": self.forward + self.backward, **vars(self)}


def count_casts(step: Step, weights: Iterable[nn.Parameter]) -> Casts:
    """The casts of one step; ``weights`` are the parameters whose casts are the weights' share."""
    counter = _Counter(weights)
    # One thread: a mode belongs to the thread that entered it, and on a GPU backward has its own.
    with counter, torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(step.training):
        value = step.forward()
        if step.training:
            value.backward()
    counter.close(step.parameters)
    step.clear()
    return counter.found


class _Counter(TorchDispatchMode):
    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.weights = {_storage(weight) for weight in weights}
        self.found = Casts()
        self.written: dict[int, int] = {}  # by casts in backward into memory that was there: address to bytes moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found.dispatched += 1
        if func.namespace not in ("aten", "prim", "prims") and func.name() not in self.found.not_seen_into:
            self.found.not_seen_into.append(func.name())
        pairs = [pair for pair in _copied(func, args, result) if _is_cast(*pair)]
        if pairs:
            self.count(pairs, in_place=func is not aten._to_copy.default)
        return result

    def count(self, pairs: list[tuple[Tensor, Tensor]], in_place: bool) -> None:
        node = torch._C._current_autograd_node()  # None in forward
        if node is None:
            self.found.forward += 1
        else:
            self.found.backward += 1
        for source, target in pairs:
            moved = source.numel() * (source.element_size() + target.element_size())
            self.found.bytes += moved
            if _storage(source) in self.weights or self.is_gradient(target, node):
                self.found.weight_bytes += moved
            elif in_place and node is not None:
                self.written[_storage(target)] = moved

    def is_gradient(self, cast: Tensor, node: Any) -> bool:
        """Whether what a node of backward casts is the gradient of a weight: it, or a view of it, comes next."""
        following = [] if node is None else [_leaf(after) for after, _ in node.next_functions]
        leaves = [leaf for leaf in following if leaf is not None and _storage(leaf) in self.weights]
        return bool(leaves) and (len(following) == 1 or any(leaf.numel() == cast.numel() for leaf in leaves))

    def close(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients that were cast straight into what is now ``.grad`` are the weights' too."""
        grads = {_storage(parameter.grad) for parameter in parameters if parameter.grad is not None}
        self.found.weight_bytes += sum(moved for address, moved in self.written.items() if address in grads)


def _copied(func: Any, args: Any, result: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """What a call copies, and to where."""
    if func is aten._to_copy.default:
        yield args[0], result
    elif func is aten.copy_.default:
        yield args[1], args[0]
    elif func is aten._foreach_copy_.default:
        yield from zip(args[1], args[0], strict=True)


def _is_cast(source: Tensor, target: Tensor) -> bool:
    return source.is_floating_point() and target.is_floating_point() and source.dtype != target.dtype


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _leaf(node: Any) -> Tensor | None:
    """The leaf whose gradient a node takes in, where nothing but views is between."""
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)
