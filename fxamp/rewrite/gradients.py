"""Which weights can have their gradients straight in float32?

Under policy "fast" on a GPU, a matrix product with a parameter becomes a function of ``fxamp.runtime.gemm``, which is
given the parameter beside its low copy. The cast stays, for its value; nobody asks for its gradient any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from torch import fx

from fxamp.plan import PrecisionPlan
from fxamp.runtime import gemm
from fxamp.runtime.weights import cast_weight

__all__ = ["direct_weight_gradients"]


class _Row(NamedTuple):
    """What stands for an operator, and how Python names its operands and its numbers."""

    function: Callable[..., Any]
    operands: tuple[str, ...]
    numbers: tuple[str, ...] = ()


_ROWS: Final[Mapping[str, _Row]] = {
    "linear": _Row(gemm.linear, ("input", "weight", "bias")),
    "matmul": _Row(gemm.matmul, ("input", "other")),
    "mm": _Row(gemm.mm, ("input", "mat2")),
    "bmm": _Row(gemm.bmm, ("input", "mat2")),
    "addmm": _Row(gemm.addmm, ("input", "mat1", "mat2"), ("beta", "alpha")),
    "baddbmm": _Row(gemm.baddbmm, ("input", "batch1", "batch2"), ("beta", "alpha")),
}


def direct_weight_gradients(graph: fx.Graph, plan: PrecisionPlan) -> None:
    """Replaces matrix products with weights by functions that give these float32 gradients, in place.

    It has no effect but under policy "fast" on a GPU. The calls keep their names and metadata, and so do the casts,
    which get ``meta["detached"]``. A cast that anything else uses too is left alone.

    Args:
        graph: a rewritten graph, whose casts are those of the plan.
        plan: what was done.
    """
    if plan.policy.name != "fast" or plan.policy.device_type != "cuda":
        return
    calls = {node: operands for node in graph.nodes if (operands := _operands(node, plan)) is not None}
    casts = {node for node in graph.nodes if _is_weight_cast(node) and all(user in calls for user in node.users)}
    for node, operands in calls.items():
        if any(operand in casts for operand in operands):
            _replace(node, operands, casts, _ROWS[plan[node.name].aten])
    for cast in casts:
        cast.meta["detached"] = True


def _is_weight_cast(node: fx.Node) -> bool:
    return node.target is cast_weight and "cast" in node.meta


def _operands(node: fx.Node, plan: PrecisionPlan) -> tuple[Any, ...] | None:
    """The operands of a call that has a row here, in its order; None for any other."""
    if node.op not in ("call_function", "call_method") or "cast" in node.meta:
        return None
    decision = plan[node.name] if not node.meta.get("module_of") else None
    row = _ROWS.get(decision.aten) if decision is not None and decision.how == "call" else None
    if decision is None or row is None or not _is_called(node, decision.aten) or len(node.args) > len(row.operands):
        return None
    given = dict(zip(row.operands, node.args, strict=False))
    named = {"input" if name == "self" else name: value for name, value in node.kwargs.items()}
    if given.keys() & named.keys() or named.keys() - {*row.operands, *row.numbers}:
        return None
    given |= named
    operands = tuple(given.get(name) for name in row.operands)
    tensors = [operand for operand in operands if operand is not None]
    return operands if all(isinstance(operand, fx.Node) for operand in tensors) else None


def _is_called(node: fx.Node, aten: str) -> bool:
    """Whether a call is the operator as it is spelled, and takes what that takes."""
    spelled = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return spelled.partition(".")[0] in (aten, f"__{aten}__")


def _replace(node: fx.Node, operands: tuple[Any, ...], casts: set[fx.Node], row: _Row) -> None:
    given = tuple(operand.args[0] if operand in casts else operand for operand in operands)
    low = tuple(operand if operand in casts else None for operand in operands)
    node.op, node.target = "call_function", row.function
    node.args, node.kwargs = (*given, low), {name: node.kwargs[name] for name in row.numbers if name in node.kwargs}
