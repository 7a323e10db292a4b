"""Calls of the sizes that networks have, for the operators of the fast policy, and how exact these are in a low dtype.

The samples of torch's own ``op_db`` are small: they do not show what a sum over a thousand values would do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["OWN", "Roundings", "roundings"]

Call = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]


def n(*size: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return offset + scale * torch.randn(size)


def _many(beside: Tensor, count: int, rows: int = 8) -> Tensor:
    """Indices of which each one comes often."""
    return torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(2)).to(beside.device)


def _every(count: int, beside: Tensor) -> Tensor:
    """A mask."""
    return torch.arange(512, device=beside.device) % count == 0


def _spread(x: Tensor) -> Tensor:
    return _many(x, 4096).unsqueeze(1).expand(-1, 64)


def _norm(*sizes: tuple[int, ...], **of_input: float) -> Callable[[], tuple[Any, ...]]:
    return lambda: (n(*sizes[0], **of_input), *(n(*size, offset=1.0, scale=0.1) for size in sizes[1:]))


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor, training: bool = True) -> Tensor:
    count = x.shape[1]
    return F.batch_norm(
        x, torch.zeros(count, device=x.device), torch.ones(count, device=x.device), weight, bias, training
    )


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, 4, weight, bias)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight)


def _unary(function: Callable[..., Any], *size: int, **options: float) -> Call:
    return function, lambda: (n(*(size or (64, 512)), **{"scale": 2.0, **options}),)


def _binary(function: Callable[..., Any]) -> list[Call]:
    """One of equal sizes, and the three ways of a bias, a scale and a mask, whose gradient is a long sum."""
    return [
        (function, lambda: (n(64, 512), n(64, 512))),
        (function, lambda: (n(16, 64, 64), n(64))),
        (function, lambda: (n(8, 32, 16, 16), n(32, 1, 1))),
        (function, lambda: (n(64, 512), n(64, 1))),
    ]


def _scaled(scale: float | None, mode: str, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, scale_factor=scale, mode=mode, **options)


_ACTIVATIONS: Final = (
    "gelu silu mish elu selu celu leaky_relu hardswish hardsigmoid hardtanh relu relu6 softsign logsigmoid softplus "
    "tanhshrink"
).split()

OWN: Final[Mapping[str, list[Call]]] = {
    "layer_norm": [
        (_layer_norm, _norm((256, 512), (512,), (512,))),
        (_layer_norm, _norm((256, 512), (512,), (512,), offset=4.0)),
        (_layer_norm, _norm((8192, 64), (64,), (64,))),
    ],
    "rms_norm": [(_rms_norm, _norm((256, 512), (512,))), (_rms_norm, _norm((256, 512), (512,), offset=4.0))],
    "group_norm": [
        (_group_norm, _norm((8, 32, 16, 16), (32,), (32,))),
        (_group_norm, _norm((8, 32, 16, 16), (32,), (32,), offset=4.0)),
    ],
    "batch_norm": [
        (_batch_norm, _norm((16, 32, 16, 16), (32,), (32,))),
        (_batch_norm, _norm((16, 32, 16, 16), (32,), (32,), offset=4.0)),
        (lambda *a: _batch_norm(*a, training=False), _norm((16, 32, 16, 16), (32,), (32,))),
    ],
    "instance_norm": [(lambda x, w, b: F.instance_norm(x, None, None, w, b), _norm((8, 32, 16, 16), (32,), (32,)))],
    "softmax": [
        _unary(lambda x: x.softmax(-1), 64, 1024),
        _unary(lambda x: x.softmax(-1), 64, 1024, scale=8.0),
        _unary(lambda x: x.softmax(1), 8, 64, 64),
    ],
    "_safe_softmax": [_unary(lambda x: torch.ops.aten._safe_softmax(x, -1), 64, 1024)],
    "log_softmax": [_unary(lambda x: x.log_softmax(-1), 64, 1024)],
    "mean": [
        _unary(lambda x: x.mean(-1), 64, 4096, offset=1.0),
        _unary(lambda x: x.mean((2, 3)), 8, 16, 32, 32),
        _unary(lambda x: x.mean(0), 4096, 64),
        _unary(torch.mean, 64, 4096),
    ],
    "sum": [_unary(lambda x: x.sum(-1), 64, 4096, offset=1.0), _unary(lambda x: x.sum(0), 4096, 64, offset=1.0)],
    "nanmean": [_unary(lambda x: x.nanmean(-1), 64, 4096, offset=1.0)],
    "var": [_unary(lambda x: x.var(-1), 64, 4096, offset=1.0)],
    "std": [_unary(lambda x: x.std(-1), 64, 4096, offset=1.0)],
    "cumsum": [_unary(lambda x: x.cumsum(-1), 64, 4096, offset=1.0)],
    "logsumexp": [_unary(lambda x: x.logsumexp(-1), 64, 1024)],
    "linalg_vector_norm": [_unary(lambda x: torch.linalg.vector_norm(x, dim=-1), 64, 4096)],
    "avg_pool1d": [_unary(lambda x: F.avg_pool1d(x, 8, 2), 8, 16, 256)],
    "avg_pool2d": [
        _unary(lambda x: F.avg_pool2d(x, 3, 1, 1), 4, 16, 32, 32),
        _unary(lambda x: F.avg_pool2d(x, 16), 4, 16, 32, 32),
    ],
    "avg_pool3d": [_unary(lambda x: F.avg_pool3d(x, 2), 2, 8, 8, 8, 8)],
    "adaptive_avg_pool1d": [_unary(lambda x: F.adaptive_avg_pool1d(x, 3), 8, 16, 256)],
    "adaptive_avg_pool2d": [_unary(lambda x, k=k: F.adaptive_avg_pool2d(x, k), 4, 16, 32, 32) for k in (1, 7)],
    "adaptive_avg_pool3d": [_unary(lambda x, k=k: F.adaptive_avg_pool3d(x, k), 2, 8, 16, 16, 16) for k in (1, 3)],
    "max_pool1d": [_unary(lambda x: F.max_pool1d(x, 8, 2), 8, 16, 256)],
    "max_pool2d": [
        _unary(lambda x: F.max_pool2d(x, 3, 1, 1), 4, 16, 32, 32),
        _unary(lambda x: F.max_pool2d(x, 3, 2, 1), 4, 16, 32, 32),
    ],
    "max_pool3d": [_unary(lambda x: F.max_pool3d(x, 3, 1), 2, 8, 8, 8, 8)],
    "adaptive_max_pool2d": [_unary(lambda x: F.adaptive_max_pool2d(x, 5), 4, 16, 32, 32)],
    "adaptive_max_pool1d": [_unary(lambda x: F.adaptive_max_pool1d(x, 5), 4, 16, 32)],
    "upsample_nearest1d": [_unary(_scaled(8.0, "nearest"), 4, 16, 64)],
    "upsample_nearest2d": [_unary(_scaled(s, "nearest"), 2, 16, 16, 16) for s in (2.0, 8.0)],
    "upsample_nearest3d": [_unary(_scaled(4.0, "nearest"), 2, 4, 8, 8, 8)],
    "_upsample_nearest_exact1d": [_unary(_scaled(8.0, "nearest-exact"), 4, 16, 64)],
    "_upsample_nearest_exact2d": [_unary(_scaled(8.0, "nearest-exact"), 2, 16, 16, 16)],
    "_upsample_nearest_exact3d": [_unary(_scaled(4.0, "nearest-exact"), 2, 4, 8, 8, 8)],
    "upsample_linear1d": [_unary(_scaled(s, "linear"), 4, 16, 64) for s in (2.0, 8.0)],
    "upsample_bilinear2d": [
        _unary(_scaled(s, "bilinear", align_corners=c), 2, 16, 16, 16) for s in (2.0, 8.0) for c in (False, True)
    ],
    "upsample_trilinear3d": [_unary(_scaled(4.0, "trilinear"), 2, 4, 8, 8, 8)],
    "upsample_bicubic2d": [_unary(_scaled(4.0, "bicubic"), 2, 16, 16, 16)],
    "embedding": [
        (lambda w: F.embedding(_many(w, 16384), w), lambda: (n(8, 64),)),
        (lambda w: F.embedding(_many(w, 64, 256), w), lambda: (n(256, 64),)),
    ],
    "gather": [(lambda x: x.gather(0, _spread(x)), lambda: (n(8, 64),))],
    "index_select": [(lambda x: x.index_select(0, _many(x, 4096)), lambda: (n(8, 64),))],
    "index": [(lambda x: x[_many(x, 16384)], lambda: (n(8, 64),))],
    "take_along_dim": [(lambda x: x.take_along_dim(_spread(x), 0), lambda: (n(8, 64),))],
    "take": [(lambda x: x.take(_many(x, 4096, 512)), lambda: (n(8, 64),))],
    "index_add": [(lambda x, y: x.index_add(0, _many(x, 4096), y), lambda: (n(8, 64), n(4096, 64, offset=1.0)))],
    "scatter_add": [(lambda x, y: x.scatter_add(0, _spread(x), y), lambda: (n(8, 64), n(4096, 64, offset=1.0)))],
    "index_put": [
        (lambda x, y: x.index_put((_many(x, 4096),), y, accumulate=True), lambda: (n(8, 64), n(4096, 64, offset=1.0)))
    ],
    "repeat": [_unary(lambda x: x.repeat(256, 1), 8, 64)],
    "tile": [_unary(lambda x: x.tile(256, 1), 8, 64)],
    "expand": [_unary(lambda x: x.expand(4096, 64), 1, 64), _unary(lambda x: x.expand(64, 64, 64), 64, 1, 64)],
    "repeat_interleave": [_unary(lambda x: x.repeat_interleave(256, 0), 8, 64)],
    "unfold": [_unary(lambda x: x.unfold(-1, 16, 1), 8, 256)],
    "im2col": [_unary(lambda x: F.unfold(x, 7), 4, 8, 16, 16)],
    "col2im": [_unary(lambda x: F.fold(x, (16, 16), 7), 4, 8 * 49, 100)],
    "reflection_pad2d": [_unary(lambda x: F.pad(x, (7, 7, 7, 7), "reflect"), 2, 8, 16, 16)],
    "replication_pad1d": [_unary(lambda x: F.pad(x, (4096, 4096), "replicate"), 4, 8, 64)],
    "replication_pad2d": [_unary(lambda x: F.pad(x, (64,) * 4, "replicate"), 1, 8, 16, 16)],
    "replication_pad3d": [_unary(lambda x: F.pad(x, (16,) * 6, "replicate"), 1, 8, 8, 8, 8)],
    "amax": [_unary(lambda x: x.amax(-1))],
    "amin": [_unary(lambda x: x.amin(-1))],
    "prelu": [(F.prelu, lambda: (n(8, 32, 16, 16), n(32)))],
    "glu": [_unary(F.glu)],
    "dropout": [_unary(lambda x: F.dropout(x, 0.1))],
    "feature_dropout": [_unary(lambda x: F.dropout2d(x, 0.1), 16, 32, 8, 8)],
    "pad": [_unary(lambda x: F.pad(x, (3, 3)))],
    **{name: _binary(getattr(torch, name)) for name in "add sub mul maximum minimum".split()},
    "div": [
        (torch.div, lambda: (n(64, 512), n(64, 512).abs() + 0.1)),
        (torch.div, lambda: (n(64, 512), n(64, 1).abs() + 0.1)),
        (lambda x: x / 8.0, lambda: (n(64, 512),)),
    ],
    "addcmul": [(torch.addcmul, lambda: (n(64, 512), n(64, 512), n(64, 512)))],
    "lerp": [
        (torch.lerp, lambda: (n(64, 512), n(64, 512), 0.3)),
        (torch.lerp, lambda: (n(64, 512), n(64, 512), n(64, 512))),
    ],
    "where": [
        (lambda a, b: torch.where(_every(2, a), a, b), lambda: (n(64, 512), n(64, 512))),
        (lambda a, b: torch.where(_every(2, a), a, b), lambda: (n(64, 512), n(512))),
    ],
    "masked_fill": [_unary(lambda x: x.masked_fill(_every(3, x), -1e4))],
    **{name: [_unary(getattr(F, name)), _unary(getattr(F, name), scale=8.0)] for name in _ACTIVATIONS},
    **{
        name: [_unary(getattr(torch, name)), _unary(getattr(torch, name), scale=8.0)]
        for name in "sigmoid tanh erf abs neg square sin cos exp expm1".split()
    },
    **{
        name: [(getattr(torch, name), lambda: (n(64, 512).abs() + 0.01,))]
        for name in "sqrt rsqrt reciprocal log log1p".split()
    },
    "pow": [_unary(lambda x: x**2), _unary(lambda x: x**3)],
    "clamp": [_unary(lambda x: x.clamp(-1, 1))],
    "cat": [(lambda *x: torch.cat(x, 1), lambda: (n(64, 64), n(64, 64)))],
    "stack": [(lambda *x: torch.stack(x), lambda: (n(64, 64), n(64, 64)))],
}


class Roundings(NamedTuple):
    """How far a call in a low dtype is from the same call in float32 on the same values.

    ``value`` in units in the last place of the low dtype, elementwise; ``whole`` and ``gradient`` in roundings of the
    largest value of the tensor.
    """

    value: float
    whole: float
    gradient: float
    complaint: str = ""


def roundings(function: Callable[..., Any], call: Any, low: torch.dtype, *, weights: bool = True) -> Roundings:
    """The distance, for a call given as (args, kwargs).

    Args:
        weights: whether the floating tensors after the first are low too; else they stay float32 in both calls.
    """
    expected, expected_grads, seeds = _run(function, call, torch.float32, low, weights, None)
    found, grads, _ = _run(function, call, low, low, weights, seeds)
    complaint = ", ".join(sorted({str(x.dtype) for x in found if x.is_floating_point() and x.dtype != low}))
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a.is_floating_point()]
    grad_pairs = [(a, b) for a, b in zip(grads, expected_grads, strict=True) if a is not None and b is not None]
    return Roundings(
        max((_distance(a, b, low, whole=False) for a, b in pairs), default=0.0),
        max((_distance(a, b, low, whole=True) for a, b in pairs), default=0.0),
        max((_distance(a, b, low, whole=True) for a, b in grad_pairs), default=0.0),
        complaint,
    )


def _run(
    function: Callable[..., Any], call: Any, dtype: torch.dtype, low: torch.dtype, weights: bool, seeds: Any
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    flat, spec = pytree.tree_flatten(call)
    wanted = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.is_floating_point()]
    for i in wanted:
        lowered = weights or i == wanted[0]
        flat[i] = (flat[i].detach().to(low).to(dtype) if lowered else flat[i].detach()).clone().requires_grad_()
    args, kwargs = pytree.tree_unflatten(flat, spec)
    torch.manual_seed(0)
    out = [x for x in pytree.tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
    ends = [x for x in out if x.requires_grad and x.is_floating_point() and x.layout == torch.strided]
    if seeds is None:
        generator = torch.Generator().manual_seed(1)  # not what the arguments were drawn with
        seeds = [torch.randn(x.shape, generator=generator).to(x.device, low) for x in ends]
    cotangents = [seed.to(end.dtype) for seed, end in zip(seeds, ends, strict=True)]
    grads = torch.autograd.grad(ends, [flat[i] for i in wanted], cotangents, allow_unused=True) if ends else ()
    return [x.detach() for x in out], list(grads), seeds


def _distance(found: Tensor, expected: Tensor, low: torch.dtype, *, whole: bool) -> float:
    """Largest difference, in roundings of each value, or of the largest one; what overflows is not looked at."""
    info = torch.finfo(low)
    within = expected.isfinite() & (expected.abs() <= info.max)
    if not bool(within.any()):
        return 0.0
    found, expected = found.double()[within], expected.double()[within]
    # Samples are of order one: below a hundredth the largest value of a tensor is itself an error.
    size = expected.abs().max().clamp(min=0.01) if whole else expected.abs().clamp(min=info.tiny)
    unit = size * info.eps if whole else torch.exp2(size.log2().floor()) * info.eps
    return float(((found - expected).abs() / unit).nan_to_num(nan=torch.inf).max())
