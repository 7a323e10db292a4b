"""Which calls is an operator made of that autocast decides about inside?

ATen makes some operators of others, and autocast sees the others. Where it treats these unlike the whole, the whole
would have to run under autocast; here it is written as its calls, so that each can be decided about. Each body
computes what ATen does, to the last bit of values and gradients (as its LinearAlgebra, Distance,
Integration and LossNLL have it). One that asks for a dimension or a size can be traced with example inputs only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, Final

import torch
from torch import fx
from torch.nn import _reduction as _Reduction

from fxamp.policy.einsum import einsum_call

__all__ = ["composed"]


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if size_average is not None or reduce is not None or input.numel() == 0:
        raise NotImplementedError("the old way to say how to reduce, or nothing to reduce")
    dim = 0 if input.dim() == 1 else 1
    # The one way of saying "as it comes" that autocast leaves alone.
    logs = torch.log_softmax(input, dim, dtype=input.dtype)
    shaped = weight if weight is None or dim == 0 else weight.view([1, -1] + [1] * (input.dim() - 2))
    share = label_smoothing / input.shape[dim] if label_smoothing else 0.0
    if input.shape == target.shape:
        return _of_probabilities(logs, target, shaped, dim, reduction, label_smoothing, share)
    how: Any = _Reduction.get_enum(reduction)
    loss = torch._C._nn.nll_loss_nd(logs, target, weight, how, ignore_index)
    if not label_smoothing:
        return loss
    smooth = -(logs if shaped is None else logs * shaped).sum(dim)
    ignored = target == ignore_index
    smooth.masked_fill_(ignored, 0.0)
    if reduction == "mean" and weight is None:
        smooth = smooth.sum() / (~ignored).sum()
    elif reduction == "mean":
        weights = weight.gather(0, target.masked_fill(ignored, 0).flatten())
        smooth = smooth.sum() / weights.masked_fill_(ignored.flatten(), 0).sum()
    elif reduction == "sum":
        smooth = smooth.sum()
    return (1 - label_smoothing) * loss + smooth * share


def _cross_entropy_loss(
    input: Any,
    target: Any,
    weight: Any = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """As the operator itself takes it."""
    how = {_Reduction.get_enum(word): word for word in ("none", "mean", "sum")}[reduction]
    return _cross_entropy(input, target, weight, None, ignore_index, None, how, label_smoothing)


def _of_probabilities(
    logs: Any, target: Any, weight: Any, dim: int, reduction: str, label_smoothing: float, share: Any
) -> Any:
    if label_smoothing:
        target = target * (1 - label_smoothing) + share
    products = logs * target if weight is None else logs * target * weight
    if reduction == "none":
        return -products.sum(dim)
    total = -products.sum()
    return total / (logs.numel() // logs.shape[dim]) if reduction == "mean" else total


def _cumulative_trapezoid(y: Any, x: Any = None, *, dx: float = 1, dim: int = -1) -> Any:
    left, right = _sides(y, dim)
    if x is None:
        return (dx / 2.0 * (left + right)).cumsum(dim)
    return ((left + right) * _steps(x, y, dim)).cumsum(dim) / 2.0


def _einsum(equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str):
        raise NotImplementedError("labels as numbers")
    tracer: Any = next(operand.tracer for operand in operands if isinstance(operand, fx.Proxy))
    shapes = [tracer.shape_of(operand) for operand in operands] if len(operands) > 1 else [()]
    found = None if None in shapes else einsum_call(equation, shapes)
    if found is None:
        raise NotImplementedError("more than one product, or sizes that are not known")
    call, rest = found
    return tracer.create_proxy("call_function", call, (equation, *operands, *rest), {})


def _inner(input: Any, other: Any) -> Any:
    if input.dim() == 0 or other.dim() == 0:
        return input * other
    return torch.tensordot(input, other, ([-1], [-1]))


def _matrix_power(input: Any, n: int, *, out: None = None) -> Any:
    if out is not None or not isinstance(n, int):
        raise NotImplementedError("writes to a given tensor, or a power that is not known")
    if n in (0, 1):
        copy = input.clone(memory_format=torch.contiguous_format)
        return copy if n else copy.copy_(torch.eye(input.shape[-2], dtype=input.dtype, device=input.device))
    power, n = (input if n > 0 else torch.linalg.inv(input)), abs(n)
    if n == 3:
        return torch.matmul(torch.matmul(power, power), power)
    result = None
    while n > 1:
        if n % 2:
            result = power if result is None else torch.matmul(result, power)
        power, n = torch.matmul(power, power), n // 2
    return power if result is None else torch.matmul(result, power)


def _pairwise_distance(x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return torch.ops.aten.norm(x1 - x2 + eps, p, [-1], keepdim)


def _sum_to_size(input: Any, *size: Any) -> Any:
    wanted = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
    if not wanted:
        return input.sum()
    leading = input.dim() - len(wanted)
    summed = [i for i in range(leading, input.dim()) if wanted[i - leading] == 1 and input.shape[i] != 1]
    if leading or summed:
        input = input.sum([*range(leading), *summed], keepdim=True)
    return input.view(wanted) if leading else input


def _tensordot(a: Any, b: Any, dims: Any = 2, out: None = None) -> Any:
    if out is not None:
        raise NotImplementedError("writes to a given tensor")
    torch._assert(a.dtype == b.dtype, "tensordot: both inputs must have the same dtype")  # type: ignore[no-untyped-call]
    if isinstance(dims, int):
        dims = list(range(-dims, 0)), list(range(dims))
    ranks = range(a.dim()), range(b.dim())
    summed = [[dim % len(rank) for dim in given] for given, rank in zip(dims, ranks, strict=True)]
    count = 1
    for left, right in zip(*summed, strict=True):
        if b.shape[right] == 1:
            a = a.sum(left, keepdim=True, dtype=a.dtype)
        elif a.shape[left] == 1:
            b = b.sum(right, keepdim=True, dtype=b.dtype)
        else:
            count = count * a.shape[left]
    kept = [[dim for dim in rank if dim not in used] for rank, used in zip(ranks, summed, strict=True)]
    rows, columns = [a.shape[dim] for dim in kept[0]], [b.shape[dim] for dim in kept[1]]
    if all(size == 1 for size in (*rows, *columns)):
        raise NotImplementedError("a single number, which is computed by strides")
    left = a.permute(kept[0] + summed[0]).reshape(_product(rows), count)
    right = b.permute(summed[1] + kept[1]).reshape(count, _product(columns))
    return torch.mm(left, right).reshape([*rows, *columns])


def _trapezoid(y: Any, x: Any = None, *, dx: float = 1, dim: int = -1) -> Any:
    if y.shape[dim] == 0:
        raise NotImplementedError("nothing to sum")
    if x is None:
        return (y.sum(dim) - (y.select(dim, 0) + y.select(dim, -1)) * 0.5) * dx
    left, right = _sides(y, dim)
    return ((left + right) * _steps(x, y, dim)).sum(dim) / 2.0


def _steps(x: Any, y: Any, dim: int) -> Any:
    rank = y.dim()
    if x.dim() == 1:
        sizes: list[Any] = [1] * rank
        sizes[dim] = -1
        x = x.view(sizes)
    elif x.dim() < rank:
        x = x.view([1] * (rank - x.dim()) + [x.shape[i] for i in range(x.dim())])
    left, right = _sides(x, dim)
    return right - left


def _sides(y: Any, dim: int) -> tuple[Any, Any]:
    part = torch.ops.aten.slice.Tensor
    return part(y, dim, 0, -1), part(y, dim, 1)


def _product(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def composed(aten: str, target: Any) -> Callable[..., Any] | None:
    """What to trace in place of a call of this operator, made through ``target``; None when it is not taken apart."""
    if aten == "cross_entropy_loss" and not isinstance(target, FunctionType):
        return _cross_entropy_loss
    return _COMPOSED.get(aten)


_COMPOSED: Final[Mapping[str, Callable[..., Any]]] = {
    "cross_entropy_loss": _cross_entropy,
    "cumulative_trapezoid": _cumulative_trapezoid,
    "einsum": _einsum,
    "inner": _inner,
    "linalg_matrix_power": _matrix_power,
    "matrix_power": _matrix_power,
    "pairwise_distance": _pairwise_distance,
    "sum_to_size": _sum_to_size,
    "tensordot": _tensordot,
    "trapezoid": _trapezoid,
    "trapz": _trapezoid,
}
