"""Calls of operators that torch has no samples of, by the operator's name; those in place write to a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EXTRA"]

aten = torch.ops.aten


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _index(*values: int) -> Tensor:
    return torch.tensor(values)


def _spd() -> Tensor:
    x = _x(3, 3)
    return x @ x.mT + 3 * torch.eye(3)


# Name to the call and its arguments.
EXTRA: Final[Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "_lu_with_info": (lambda x: torch._lu_with_info(x)[0], (_spd(),)),
    "_pad_circular": (lambda x: F.pad(x, (1, 1), mode="circular"), (_x(1, 2, 4),)),
    "_safe_softmax": (lambda x: torch._safe_softmax(x, -1), (_x(2, 4),)),
    "_upsample_bicubic2d_aa": (lambda x: F.interpolate(x, 3, mode="bicubic", antialias=True), (_x(1, 2, 5, 5),)),
    "_upsample_bilinear2d_aa": (lambda x: F.interpolate(x, 3, mode="bilinear", antialias=True), (_x(1, 2, 5, 5),)),
    "_upsample_nearest_exact1d": (lambda x: torch._C._nn._upsample_nearest_exact1d(x, [3], None), (_x(1, 2, 5),)),
    "_upsample_nearest_exact2d": (lambda x: F.interpolate(x, 3, mode="nearest-exact"), (_x(1, 2, 5, 5),)),
    "_upsample_nearest_exact3d": (
        lambda x: torch._C._nn._upsample_nearest_exact3d(x, [3] * 3, None),
        (_x(1, 2, 5, 5, 5),),
    ),
    "fake_quantize_per_channel_affine": (
        lambda x: torch.fake_quantize_per_channel_affine(
            x, torch.ones(3), torch.zeros(3, dtype=torch.int32), 0, 0, 255
        ),
        (_x(3, 4),),
    ),
    "feature_dropout": (lambda x: torch.feature_dropout(x, 0.5, True), (_x(2, 3, 4),)),
    "feature_dropout_": (lambda x: torch.feature_dropout_(x * 1, 0.5, True), (_x(2, 3, 4),)),
    "fill_diagonal_": (lambda x: (x * 1).fill_diagonal_(2.0), (_x(3, 4),)),
    "float_power_": (lambda x: x.double().float_power_(2.0), (_x(3, 4),)),
    "histogramdd": (lambda x: torch.histogramdd(x.detach().float(), [3, 3]).hist, (_x(5, 2),)),
    "inner": (torch.inner, (_x(2, 4), _x(3, 4))),
    "linalg_ldl_factor": (lambda x: torch.linalg.ldl_factor(x.detach().float())[0], (_spd(),)),
    "max_pool1d_with_indices": (lambda x: torch.max_pool1d_with_indices(x, 2)[0], (_x(1, 2, 6),)),
    "max_pool3d": (lambda x: torch.max_pool3d(x, 2), (_x(1, 2, 4, 4, 4),)),
    "mvlgamma_": (lambda x: (x.abs() + 3).mvlgamma_(2), (_x(3, 4),)),
    "native_channel_shuffle": (lambda x: torch.native_channel_shuffle(x.detach(), 2), (_x(1, 4, 2, 2),)),
    "nll_loss_nd": (lambda x, y: torch._C._nn.nll_loss_nd(x, y, None, 1, -100), (_x(3, 4), _index(1, 0, 2))),
    "nuclear_norm": (lambda x: torch.nuclear_norm(x.float()), (_x(3, 4),)),
    "pad_sequence": (lambda x: torch.nn.utils.rnn.pad_sequence([x, x[:2]]), (_x(3, 4),)),
    "pairwise_distance": (torch.pairwise_distance, (_x(3, 4), _x(3, 4) + 1)),
    "relu6_": (lambda x: torch._C._nn.relu6_(x * 1), (_x(3, 4),)),
    "roll": (lambda x: x.roll(1, 0), (_x(3, 4),)),
    "rrelu_": (lambda x: torch.rrelu_(x * 1, 0.1, 0.3, True), (_x(3, 4),)),
    "selu_": (lambda x: torch.selu_(x * 1), (_x(3, 4),)),
    "slogdet": (lambda x: torch.slogdet(x.float())[1], (_spd(),)),
    "special_gammainc": (
        lambda x, y: torch.special.gammainc(x.detach().abs(), y.detach().abs()),
        (_x(3, 4), _x(3, 4) + 1),
    ),
    "special_gammaincc": (
        lambda x, y: torch.special.gammaincc(x.detach().abs(), y.detach().abs()),
        (_x(3, 4), _x(3, 4) + 1),
    ),
    "coalesce": (lambda x: x.to_sparse().coalesce().to_dense(), (_x(3, 4),)),
    "requires_grad_": (lambda x: x.detach().requires_grad_() @ x.mT, (_x(3, 4),)),
    "sparse_coo_tensor": (
        lambda x: torch.sparse_coo_tensor(torch.tensor([[0, 1, 1], [2, 0, 2]]), x[0], (2, 3)).to_dense(),
        (_x(2, 3),),
    ),
    "to_dense": (lambda x: x.to_sparse().to_dense() @ x.mT, (_x(3, 4),)),
    "_euclidean_dist": (
        lambda x, y: torch._euclidean_dist(x.detach().float(), y.detach().float()),
        (_x(3, 4), _x(2, 4)),
    ),
    "_linalg_det": (lambda x: torch._linalg_det(x.float())[0], (_spd(),)),
    "_linalg_slogdet": (lambda x: torch._linalg_slogdet(x.float())[1], (_spd(),)),
    "_weight_norm_interface": (lambda x, y: torch._weight_norm_interface(x, y.abs(), 0)[0], (_x(3, 4), _x(3, 1))),
    "arccosh_": (lambda x: (x.abs() + 2).detach().arccosh_(), (_x(3, 4),)),
    "arcsinh_": (lambda x: (x * 1).detach().arcsinh_(), (_x(3, 4),)),
    "arctanh_": (lambda x: (x * 0.1).detach().arctanh_(), (_x(3, 4),)),
    "convolution": (
        lambda x, y: torch.convolution(x, y, None, [1], [0], [1], False, [0], 1),
        (_x(2, 3, 5), _x(4, 3, 2)),
    ),
    "embedding_renorm_": (lambda x: F.embedding(_index(0, 2), x.detach() * 1, max_norm=0.5), (_x(3, 4),)),
    "upsample_bicubic2d": (lambda x: F.interpolate(x, 3, mode="bicubic"), (_x(1, 2, 5, 5),)),
    "upsample_bilinear2d": (lambda x: F.interpolate(x, 3, mode="bilinear"), (_x(1, 2, 5, 5),)),
    "upsample_linear1d": (lambda x: F.interpolate(x, 3, mode="linear"), (_x(1, 2, 5),)),
    "upsample_nearest1d": (lambda x: torch._C._nn.upsample_nearest1d(x, [3], None), (_x(1, 2, 5),)),
    "upsample_nearest3d": (lambda x: torch._C._nn.upsample_nearest3d(x, [3] * 3, None), (_x(1, 2, 5, 5, 5),)),
    "upsample_trilinear3d": (lambda x: F.interpolate(x, 3, mode="trilinear"), (_x(1, 2, 5, 5, 5),)),
}
