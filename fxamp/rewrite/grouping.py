"""Which casts of weights are one call?

All of a kind, in the order of their use, in groups that are bounded by bytes. A group stands where its first cast was.
In backward the gradients of a group become ready together, and until then they are kept in the low dtype; so a large
model has several groups, and the first of them, whose gradients come last, is small.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import fx, nn

from fxamp.capture import assign
from fxamp.plan.sharing import SWITCHES
from fxamp.runtime.weights import WeightCasts, cast_weight

__all__ = ["FIRST_BYTES", "GROUP_BYTES", "group_weight_casts"]

# Of the weights as they are stored. DistributedDataParallel waits for 1 MiB at first and for 25 MiB then.
FIRST_BYTES: Final = 1 << 20
GROUP_BYTES: Final = 64 << 20
_GROUPS: Final = 8  # of a large model, for which more would be more calls
_UNWRITTEN: Final = 3  # arguments of a cast; the fourth says that the graph has written to the weight before


def group_weight_casts(graph: fx.Graph, attribute: Callable[[str], Any]) -> None:
    """Puts calls of ``WeightCasts`` in the place of single weight casts, in place.

    Each cast becomes the part of a group's result; it keeps its name, its ``meta`` and its uses.

    Args:
        graph: after casts were inserted.
        attribute: path to the parameter of that name.
    """
    for casts in _kinds(graph, attribute):
        sizes = [_bytes(cast, attribute) for cast in casts]
        for group in _bounded(casts, sizes):
            if len(group) > 1:
                _replace(graph, group)
    graph.lint()


def _kinds(graph: fx.Graph, attribute: Callable[[str], Any]) -> Iterator[list[fx.Node]]:
    """The casts that could be one: to one dtype, in one epoch, and with no change of the grad mode between them."""
    assigned = {node.args[1] for node in graph.nodes if node.target is assign}
    uses = _uses(graph, attribute)
    kinds: dict[tuple[Any, ...], list[fx.Node]] = {}
    part = 0
    for node in graph.nodes:
        part += node.target in SWITCHES
        if node.target is not cast_weight or len(node.args) > _UNWRITTEN:
            continue
        path = str(node.args[0].target)
        weight = attribute(path)
        # Three gradients of one weight add up in the order in which they come; two do not mind when that is.
        if path.rpartition(".")[2] not in assigned and uses[id(weight)] <= 2:
            kind = (part, weight.device, bool(node.meta.get("detached")), *node.args[1:])
            kinds.setdefault(kind, []).append(node)
    yield from kinds.values()


def _uses(graph: fx.Graph, attribute: Callable[[str], Any]) -> Counter[int]:
    """By the identity of a tensor, how many gradients it may get; a module's tensors may get any number."""
    found: Counter[int] = Counter()
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value = attribute(str(node.target))
            if isinstance(value, torch.Tensor):
                found[id(value)] += len(node.users)
            elif isinstance(value, nn.Module):
                found.update({id(parameter): 3 for parameter in value.parameters()})
    return found


def _bytes(cast: fx.Node, attribute: Callable[[str], Any]) -> int:
    weight: torch.Tensor = attribute(str(cast.args[0].target))  # type: ignore[union-attr]
    return weight.numel() * weight.element_size()


def _bounded(casts: list[fx.Node], sizes: list[int]) -> Iterator[list[fx.Node]]:
    """The casts in groups: each is closed by the cast that would not fit."""
    total = sum(sizes)
    most = max(GROUP_BYTES, total // _GROUPS)
    bound = FIRST_BYTES if total > most else most
    group: list[fx.Node] = []
    filled = 0
    for cast, size in zip(casts, sizes, strict=True):
        if group and filled + size > bound:
            yield group
            group, filled, bound = [], 0, most
        group.append(cast)
        filled += size
    yield group


def _replace(graph: fx.Graph, group: list[fx.Node]) -> None:
    first = group[0]
    weights = [cast.all_input_nodes[0] for cast in group]
    for weight in weights:
        if first < weight:
            first.prepend(weight)
    with graph.inserting_before(first):
        dtype, epoch = (*first.args[1:], -1)[:2]
        casts = WeightCasts(dtype, epoch, bool(first.meta.get("detached")))  # type: ignore[arg-type]
        together = graph.call_function(casts, tuple(weights))
        together.meta = {"module_of": "weights", "module": "", "source": "", "regions": ()}
        parts = [graph.call_function(operator.getitem, (together, i)) for i in range(len(group))]
    for cast, part in zip(group, parts, strict=True):
        part.meta = dict(cast.meta)
        cast.replace_all_uses_with(part)
        graph.erase_node(cast)
        part.name = cast.name
