"""Matrix products whose weights get their gradients straight in float32.

Under autocast the gradient of a weight is a product in the low dtype, rounded, and then cast. A GPU sums such a product
in float32 anyway; asked for ``out_dtype=torch.float32`` it writes that sum. So there is no cast and one rounding less,
and in float16 nothing that float32 can hold overflows.

Each function takes a call's operands, parameters in float32, and ``low``: for each operand its copy in the low dtype,
or None for one that is in the low dtype already. It computes what the plain call of the low operands does, bit by bit;
gradients reach the operands themselves, whether the low copies have a history or not. Where a product in float32 is not
to be had (another device, tensors of a class of their own, the transforms of ``torch.func``) or has no derivative (a
second one is wanted), the gradients are autocast's.

Nothing is added to a parameter's ``.grad`` here, though ``addmm`` could do that in the same kernel. A backward does not
know whether it runs for ``.backward()`` or for ``torch.autograd.grad``, which must leave ``.grad`` alone; and what
waits for the gradient of a parameter (tensor hooks, which may replace it, DDP, an optimizer in backward) hangs on the
node that adds it to ``.grad``, and is to see this gradient alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

__all__ = ["addmm", "baddbmm", "bmm", "float32_product", "has_float32_product", "linear", "matmul", "mm"]

Operands = tuple[Any, Any, Any]  # what is added or None, the left factor, the right one
Low = tuple[torch.Tensor | None, ...]


def linear(x: Any, weight: Any, bias: Any, low: Low) -> Any:
    """``F.linear`` of the operands in the low dtype."""
    return _product("linear", (bias, x, weight), (low[2], low[0], low[1]))


def matmul(left: Any, right: Any, low: Low) -> Any:
    """``torch.matmul`` of the operands in the low dtype."""
    return _product("matmul", (None, left, right), (None, *low))


def mm(left: Any, right: Any, low: Low) -> Any:
    """``torch.mm`` of the operands in the low dtype."""
    return _product("mm", (None, left, right), (None, *low))


def bmm(left: Any, right: Any, low: Low) -> Any:
    """``torch.bmm`` of the operands in the low dtype."""
    return _product("bmm", (None, left, right), (None, *low))


def addmm(added: Any, left: Any, right: Any, low: Low, beta: float = 1, alpha: float = 1) -> Any:
    """``torch.addmm`` of the operands in the low dtype."""
    return _product("addmm", (added, left, right), low, beta, alpha)


def baddbmm(added: Any, left: Any, right: Any, low: Low, beta: float = 1, alpha: float = 1) -> Any:
    """``torch.baddbmm`` of the operands in the low dtype."""
    return _product("baddbmm", (added, left, right), low, beta, alpha)


_CALLS: Final[Mapping[str, Callable[..., Any]]] = {
    "linear": lambda bias, x, weight, beta, alpha: F.linear(x, weight, bias),
    "matmul": lambda added, left, right, beta, alpha: torch.matmul(left, right),
    "mm": lambda added, left, right, beta, alpha: torch.mm(left, right),
    "bmm": lambda added, left, right, beta, alpha: torch.bmm(left, right),
    "addmm": lambda added, left, right, beta, alpha: torch.addmm(added, left, right, beta=beta, alpha=alpha),
    "baddbmm": lambda added, left, right, beta, alpha: torch.baddbmm(added, left, right, beta=beta, alpha=alpha),
}


# -- which way -------------------------------------------------------------------------------------------


def has_float32_product(tensor: torch.Tensor) -> bool:
    """Whether a product of tensors like this one can be had in float32, without float32 copies of them."""
    if not _is_on_gpu(tensor):
        return False
    return tensor.dtype is torch.bfloat16 or (tensor.dtype is torch.float16 and not _adds_in_float16())


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.version.hip is None  # ROCm refuses the product in some builds


def _adds_in_float16() -> bool:
    """Whether sums are kept in float16, which are refused as float32."""
    return bool(torch.backends.cuda.matmul.allow_fp16_accumulation)


# What torch.compiler.assume_constant_result does, without an import of Dynamo: it cannot trace the question.
_adds_in_float16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def float32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of two matrices, or of two batches of them, in float32. It has no derivative."""
    call = torch.mm if left.dim() == 2 else torch.bmm
    return call(left, right, out_dtype=torch.float32)


def _product(call: str, given: Operands, low: Low, beta: float = 1, alpha: float = 1) -> Any:
    # Nothing here is a loop: this runs at every call, and a loop over three operands takes longer than the rest.
    (a, b, c), (low_a, low_b, low_c) = given, low
    if not torch.compiler.is_compiling() and _is_transformed():
        return _CALLS[call](_recast(a, low_a), _recast(b, low_b), _recast(c, low_c), beta, alpha)
    wants_a = low_a is not None and a.requires_grad
    wants_b = low_b is not None and b.requires_grad
    wants_c = low_c is not None and c.requires_grad
    added, left, right = a if low_a is None else low_a, b if low_b is None else low_b, c if low_c is None else low_c
    if not (wants_a or wants_b or wants_c) or not torch.is_grad_enabled():
        return _CALLS[call](added, left, right, beta, alpha)
    if (
        (added is None or (_is_ordinary(added) and (not wants_a or _is_float32(a))))
        and (_is_ordinary(left) and (not wants_b or _is_float32(b)))
        and (_is_ordinary(right) and (not wants_c or _is_float32(c)))
        and left.dtype is right.dtype
        and has_float32_product(left)
        and has_float32_product(right)
        and (call != "linear" or right.dim() == 2)
    ):
        return _Product.apply(  # type: ignore[no-untyped-call]
            call, beta, alpha, a, b, c, _detached(low_a), _detached(low_b), _detached(low_c)
        )
    return _CALLS[call](_tied(a, added, wants_a), _tied(b, left, wants_b), _tied(c, right, wants_c), beta, alpha)


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which want each operation as it is."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_ordinary(tensor: Any) -> bool:
    """Whether it is of no class of sharded or quantised tensors."""
    return type(tensor) is torch.Tensor or type(tensor) is nn.Parameter


def _is_float32(weight: Any) -> bool:
    return _is_ordinary(weight) and weight.dtype is torch.float32


def _recast(given: Any, low: Any) -> Any:
    return given if low is None else given.to(low.dtype)


def _detached(low: Any) -> Any:
    return low.detach() if low is not None and low.requires_grad else low


def _tied(given: Any, used: Any, wanted: bool) -> Any:
    """The low copy of a weight, with a history."""
    return _Copy.apply(given, used) if wanted and not used.requires_grad else used  # type: ignore[no-untyped-call]


class _Copy(torch.autograd.Function):
    """A cast whose result is there already."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        ctx.dtype = given.dtype
        return low.view_as(low)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].to(ctx.dtype), None


# -- the gradients ---------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """A call whose operands with a low copy get float32 gradients.

    The weights themselves are not saved: autocast lets an optimizer change them before backward, so this does too. They
    are parameters, and leaves, so to hold them makes no cycle.
    """

    @staticmethod
    def forward(ctx: Any, call: str, beta: float, alpha: float, *operands: Any) -> Any:
        a, b, c, low_a, low_b, low_c = operands
        added, left, right = a if low_a is None else low_a, b if low_b is None else low_b, c if low_c is None else low_c
        needs = ctx.needs_input_grad
        ctx.save_for_backward(left if needs[5] else None, right if needs[4] else None)
        ctx.call, ctx.beta, ctx.alpha = call, beta, alpha
        ctx.shapes = None if added is None else added.shape, left.shape, right.shape
        ctx.wide = low_a is not None, low_b is not None, low_c is not None
        ctx.weights = None if low_b is None else b, None if low_c is None else c
        return _CALLS[call](added, left, right, beta, alpha)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (added, left, right) = gradients, ctx.needs_input_grad[3:6]
        operands = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, also by the weights
            pairs = zip(ctx.weights, operands, strict=True)
            operands = [low if w is None or low is None else _tied(w, low, w.requires_grad) for w, low in pairs]
        found = [
            _of_added(ctx, gradient) if added else None,
            _of_left(ctx, gradient, operands[1]) if left else None,
            _of_right(ctx, gradient, operands[0]) if right else None,
        ]
        return None, None, None, *found, None, None, None


def _of_added(ctx: Any, gradient: Any) -> Any:
    shape, wide = ctx.shapes[0], ctx.wide[0]
    if not wide:
        return _scaled(gradient, ctx.beta).sum_to_size(shape)
    ahead = gradient.dim() - len(shape)
    dims = [i for i in range(gradient.dim()) if i < ahead or shape[i - ahead] == 1]
    total = gradient.sum(dims, dtype=torch.float32) if dims else gradient.to(torch.float32)
    return _scaled(total.reshape(shape), ctx.beta)


def _of_left(ctx: Any, gradient: Any, right: Any) -> Any:
    _, shape, other = ctx.shapes
    gradient = _as_matrices(gradient, shape, other, ctx.call)
    transposed = right if ctx.call == "linear" else right.unsqueeze(0) if right.dim() == 1 else right.mT
    matrix = torch.Size((1, *shape)) if len(shape) == 1 else shape
    if ctx.wide[1]:
        return _scaled(_contracted(gradient.mT, transposed, matrix, wide=True), ctx.alpha).reshape(shape)
    return torch.matmul(_scaled(gradient, ctx.alpha), transposed).sum_to_size(matrix).reshape(shape)


def _of_right(ctx: Any, gradient: Any, left: Any) -> Any:
    _, other, shape = ctx.shapes
    gradient = _as_matrices(gradient, other, shape, ctx.call)
    left = left.unsqueeze(0) if left.dim() == 1 else left
    matrix = torch.Size((*shape, 1)) if len(shape) == 1 else shape
    wide = ctx.wide[2]
    if not wide:
        gradient = _scaled(gradient, ctx.alpha)
    if ctx.call == "linear":
        return _contracted(gradient, left, shape, wide=wide)
    if wide:
        return _scaled(_contracted(left, gradient, matrix, wide=True), ctx.alpha).reshape(shape)
    return torch.matmul(left.mT, gradient).sum_to_size(matrix).reshape(shape)


def _scaled(value: Any, by: float) -> Any:
    return value if by == 1 else value * by


def _as_matrices(gradient: Any, left: torch.Size, right: torch.Size, call: str) -> Any:
    """The gradient with the dimensions that a product of vectors does not have."""
    if call != "linear" and len(right) == 1:
        gradient = gradient.unsqueeze(-1)
    return gradient.unsqueeze(-2) if len(left) == 1 else gradient


def _contracted(left: Any, right: Any, shape: torch.Size, *, wide: bool) -> Any:
    """``left.mT @ right``, summed over the batches that ``shape`` has not, inside the product."""
    if left.dim() == 2 and right.dim() == 2:
        return _multiplied(left.t(), right, wide=wide)
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])  # type: ignore[no-untyped-call]
    own = (*[1] * (len(batch) - len(shape) + 2), *shape[:-2])
    kept = [i for i, size in enumerate(own) if size != 1]
    summed = [i for i, size in enumerate(own) if size == 1]
    left, right = (
        t.expand(*batch, *t.shape[-2:]).permute(*kept, *summed, -2, -1).flatten(len(kept), -2) for t in (left, right)
    )
    if kept:
        left, right = left.flatten(0, -3), right.flatten(0, -3)
    return _multiplied(left.mT, right, wide=wide).reshape(shape)


def _multiplied(left: Any, right: Any, *, wide: bool) -> Any:
    if wide and has_float32_product(left) and not torch.is_grad_enabled():
        return float32_product(left, right)
    found = torch.matmul(left, right)
    return found.to(torch.float32) if wide else found
