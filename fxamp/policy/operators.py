"""Which rule does torch.autocast have for each ATen operator?

One row an operator, a column a device; adding an operator is one line. A row counts only where the running torch
registers that operator for the device's autocast key, so that parity follows the installed version. The cells:

* ``lower``: floating-point arguments are cast to the low dtype.
* ``fp32``: they are cast to float32.
* ``fp32_dtype``: nothing is cast; ``dtype=torch.float32`` is passed when the call gives no dtype of its own.
* ``promote``: they are cast to the widest floating dtype among them, the low dtype at least.
* ``banned``: autocast raises.
* ``follow``: not listed on that device; the operator runs in the dtypes that come in.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

from fxamp.errors import PolicyError, nearest
from fxamp.policy.composites import FORWARDS_TO, SAME, UNDER_AUTOCAST

__all__ = ["FORWARDS_TO", "OPERATORS", "operator_rules", "packet_of", "transparent"]

_TABLE: Final = """
operator                                cuda        cpu
_addmm_activation                       follow      lower
_convolution                            lower       follow
_convolution.deprecated                 lower       lower
_grid_sampler_2d_cpu_fallback           follow      fp32
_lu_with_info                           follow      fp32
_native_multi_head_attention            follow      lower
_scaled_dot_product_flash_attention     lower       follow
_thnn_fused_gru_cell                    lower       follow
_thnn_fused_lstm_cell                   lower       follow
_upsample_bicubic2d_aa                  fp32        follow
_upsample_bilinear2d_aa                 fp32        follow
_upsample_nearest_exact1d               fp32        follow
_upsample_nearest_exact2d               fp32        follow
_upsample_nearest_exact3d               fp32        follow
acos                                    fp32        follow
adaptive_avg_pool3d                     follow      fp32
adaptive_max_pool3d                     follow      fp32
addbmm                                  lower       lower
addcdiv                                 promote     follow
addcmul                                 promote     follow
addmm                                   lower       lower
addmv                                   lower       follow
addr                                    lower       follow
asin                                    fp32        follow
atan2                                   promote     follow
avg_pool3d                              follow      fp32
baddbmm                                 lower       lower
bilinear                                promote     follow
binary_cross_entropy                    banned      fp32
binary_cross_entropy_with_logits        fp32        fp32
bmm                                     lower       lower
cat                                     follow      promote
cdist                                   fp32        fp32
chain_matmul                            lower       follow
cholesky                                follow      fp32
cholesky_inverse                        follow      fp32
cholesky_solve                          follow      fp32
conv1d                                  lower       lower
conv1d.padding                          follow      lower
conv2d                                  lower       lower
conv2d.padding                          follow      lower
conv3d                                  lower       lower
conv3d.padding                          follow      lower
conv_tbc                                lower       lower
conv_transpose1d                        lower       lower
conv_transpose2d.input                  lower       lower
conv_transpose3d.input                  lower       lower
convolution                             lower       follow
cosh                                    fp32        follow
cosine_embedding_loss                   fp32        fp32
cosine_similarity                       fp32        follow
cross                                   promote     follow
cross_entropy_loss                      follow      fp32
ctc_loss.IntList                        follow      fp32
ctc_loss.Tensor                         follow      fp32
cudnn_convolution                       lower       follow
cudnn_convolution_transpose             lower       follow
cumprod                                 fp32_dtype  follow
cumsum                                  fp32_dtype  follow
dist                                    fp32        follow
dot                                     promote     follow
einsum                                  lower       follow
erfinv                                  fp32        follow
exp                                     fp32        follow
expm1                                   fp32        follow
fake_quantize_per_tensor_affine         follow      fp32
fft_fft                                 follow      fp32
fft_fft2                                follow      fp32
fft_fftn                                follow      fp32
fft_hfft                                follow      fp32
fft_ifft                                follow      fp32
fft_ifft2                               follow      fp32
fft_ifftn                               follow      fp32
fft_ihfft                               follow      fp32
fft_irfft                               follow      fp32
fft_irfft2                              follow      fp32
fft_irfftn                              follow      fp32
fft_rfft                                follow      fp32
fft_rfft2                               follow      fp32
fft_rfftn                               follow      fp32
fractional_max_pool2d                   follow      fp32
fractional_max_pool3d                   follow      fp32
frobenius_norm.dim                      fp32        follow
geqrf                                   follow      fp32
grid_sampler                            promote     fp32
grid_sampler_2d                         follow      fp32
grid_sampler_3d                         follow      fp32
group_norm                              fp32        follow
gru_cell                                lower       follow
hinge_embedding_loss                    fp32        fp32
huber_loss                              fp32        fp32
index_copy                              follow      promote
index_put                               promote     follow
inverse                                 follow      fp32
kl_div                                  fp32        fp32
l1_loss                                 fp32        fp32
layer_norm                              fp32        follow
linalg_cholesky                         follow      fp32
linalg_cholesky_ex                      follow      fp32
linalg_cond                             follow      fp32
linalg_cond.p_str                       follow      fp32
linalg_eig                              follow      fp32
linalg_eigh                             follow      fp32
linalg_eigvals                          follow      fp32
linalg_eigvalsh                         follow      fp32
linalg_householder_product              follow      fp32
linalg_inv                              follow      fp32
linalg_inv_ex                           follow      fp32
linalg_lstsq                            follow      fp32
linalg_matrix_norm                      fp32_dtype  follow
linalg_matrix_norm.str_ord              fp32_dtype  follow
linalg_matrix_rank                      follow      fp32
linalg_matrix_rank.atol_rtol_float      follow      fp32
linalg_matrix_rank.atol_rtol_tensor     follow      fp32
linalg_matrix_rank.tol_tensor           follow      fp32
linalg_multi_dot                        lower       follow
linalg_qr                               follow      fp32
linalg_solve                            follow      fp32
linalg_svd                              follow      fp32
linalg_svdvals                          follow      fp32
linalg_tensorinv                        follow      fp32
linalg_tensorsolve                      follow      fp32
linalg_vecdot                           lower       lower
linalg_vector_norm                      fp32_dtype  follow
linear                                  lower       lower
log                                     fp32        follow
log10                                   fp32        follow
log1p                                   fp32        follow
log2                                    fp32        follow
log_softmax.int                         fp32_dtype  follow
logsumexp                               fp32        follow
lstm_cell                               lower       follow
lu_solve                                follow      fp32
margin_ranking_loss                     fp32        fp32
matmul                                  lower       lower
max_pool3d                              follow      fp32
max_unpool2d                            follow      fp32
max_unpool3d                            follow      fp32
mkldnn_rnn_layer                        follow      lower
mm                                      lower       lower
mse_loss                                fp32        fp32
multi_margin_loss                       fp32        fp32
multilabel_margin_loss                  fp32        fp32
multilabel_margin_loss_forward          follow      fp32
mv                                      lower       follow
nanquantile                             follow      fp32
nanquantile.scalar                      follow      fp32
native_layer_norm                       fp32        follow
nll_loss                                fp32        fp32
nll_loss2d                              fp32        fp32
norm.Scalar                             fp32_dtype  follow
norm.ScalarOpt_dim                      fp32_dtype  follow
nuclear_norm                            fp32        follow
nuclear_norm.dim                        fp32        follow
orgqr                                   follow      fp32
ormqr                                   follow      fp32
pdist                                   fp32        follow
pinverse                                follow      fp32
poisson_nll_loss                        fp32        fp32
polar                                   follow      fp32
pow.Scalar                              fp32        follow
pow.Tensor_Scalar                       fp32        follow
pow.Tensor_Tensor                       fp32        follow
prelu                                   lower       lower
prod                                    fp32_dtype  fp32
prod.dim_int                            fp32_dtype  fp32
qr                                      follow      fp32
quantile                                follow      fp32
quantile.scalar                         follow      fp32
reciprocal                              fp32        follow
reflection_pad1d                        follow      fp32
reflection_pad2d                        follow      fp32
renorm                                  fp32        follow
replication_pad1d                       follow      fp32
replication_pad2d                       follow      fp32
replication_pad3d                       follow      fp32
rms_norm                                fp32        follow
rnn_relu_cell                           lower       follow
rnn_tanh_cell                           lower       follow
rsqrt                                   fp32        follow
scaled_dot_product_attention            lower       lower
scatter_add                             promote     follow
sinh                                    fp32        follow
smooth_l1_loss                          fp32        fp32
soft_margin_loss                        fp32        fp32
softmax.int                             fp32_dtype  follow
softplus                                fp32        follow
stack                                   follow      promote
stft                                    follow      fp32
stft.center                             follow      fp32
sum                                     fp32_dtype  follow
sum.dim_IntList                         fp32_dtype  follow
svd                                     follow      fp32
tan                                     fp32        follow
tensordot                               promote     follow
trace                                   follow      fp32
triangular_solve                        follow      fp32
triplet_margin_loss                     fp32        fp32
upsample_bicubic2d                      fp32        follow
upsample_bilinear2d                     fp32        follow
upsample_linear1d                       fp32        follow
upsample_nearest1d                      fp32        follow
upsample_nearest2d                      fp32        follow
upsample_nearest3d                      fp32        follow
upsample_trilinear3d                    fp32        follow
vdot                                    promote     follow
view_as_complex                         follow      fp32
"""

_AUTOCAST_KEYS: Final = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}

# One overload of these is listed and another one that Python reaches as easily is not, so the packet has no one rule.
_SPLIT_PACKETS: Final = {
    "cpu": frozenset({"_convolution", "fake_quantize_per_tensor_affine"}),
    "cuda": frozenset[str](),
}


def _parse(table: str) -> Mapping[str, Mapping[str, str]]:
    header, *rows = (line.split() for line in table.strip().splitlines())
    return MappingProxyType({row[0]: MappingProxyType(dict(zip(header[1:], row[1:], strict=True))) for row in rows})


OPERATORS: Final[Mapping[str, Mapping[str, str]]] = _parse(_TABLE)


def packet_of(operator: str) -> str:
    """The name without its overload: ``softmax`` for ``softmax.int``."""
    return operator.partition(".")[0]


def listed_packets(device_type: str) -> frozenset[str]:
    """Every packet with an overload that autocast may intercept on this device, on some torch version.

    Raises:
        PolicyError: when there is no column for ``device_type``.
    """
    check_device_type(device_type)
    return frozenset(packet_of(name) for name, row in OPERATORS.items() if row[device_type] != "follow")


def check_device_type(device_type: str) -> str:
    """The device type itself, when the tables have a column for it.

    Raises:
        PolicyError: when they have none.
    """
    if device_type not in _AUTOCAST_KEYS:
        raise PolicyError(
            f"unknown device type {device_type!r}: expected one of {', '.join(map(repr, _AUTOCAST_KEYS))}",
            hint=f"write device_type={nearest(device_type, _AUTOCAST_KEYS) or 'cuda'!r}",
        )
    return device_type


@functools.cache
def registered_operators(device_type: str) -> frozenset[str]:
    """The ATen operators, with overload, that the running torch registers for the device's autocast key."""
    key = _AUTOCAST_KEYS[check_device_type(device_type)]
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return frozenset(name.removeprefix("aten::") for name in names if name.startswith("aten::"))


@functools.cache
def operator_rules(device_type: str) -> Mapping[str, str]:
    """The rule of every listed ATen packet on a device, for the running torch.

    Composite operators that only forward to a listed one have that one's rule. An operator that is missing here is
    either ``transparent`` for autocast or has to run under it.

    Args:
        device_type: ``"cuda"`` or ``"cpu"``.

    Returns:
        A read-only mapping from packet name (no overload) to rule, never ``"follow"``.

    Raises:
        PolicyError: when ``device_type`` has no column, or two overloads of one packet have different rules.

    Example::

        >>> operator_rules("cuda")["softmax"], "softmax" in operator_rules("cpu")
        ('fp32_dtype', False)
    """
    rules: dict[str, str] = {}
    for operator in sorted(OPERATORS.keys() & registered_operators(device_type)):
        packet, rule = packet_of(operator), OPERATORS[operator][device_type]
        if rule == "follow" or packet in _SPLIT_PACKETS[device_type]:
            continue
        if rules.setdefault(packet, rule) != rule:
            raise PolicyError(
                f"the overloads of {packet!r} have different rules on {device_type}: {rules[packet]} and {rule}",
                hint="give every overload of the packet the same rule in fxamp.policy.operators",
            )
    forwarded = {name: rules[target] for name, target in FORWARDS_TO[device_type].items() if target in rules}
    return MappingProxyType(forwarded | rules)


@functools.cache
def transparent(aten: str, device_type: str) -> bool:
    """Whether an unlisted operator does under autocast exactly what it does without.

    That holds for operators with kernels of their own, except the few that call listed ones, and for the composite
    ones that are vetted. A listed operator, an unknown one and an unvetted composite are not transparent.

    Args:
        aten: a packet name, ``"reshape"`` or ``"add_"``.
        device_type: ``"cuda"`` or ``"cpu"``.

    Raises:
        PolicyError: when the tables have no column for ``device_type``.

    Example::

        >>> transparent("softmax", "cpu"), transparent("softmax", "cuda"), transparent("einsum", "cpu")
        (True, False, False)
    """
    forwarded = FORWARDS_TO[check_device_type(device_type)].get(aten)
    if forwarded is not None:
        return transparent(forwarded, device_type)
    overloads = _overloads().get(aten, frozenset())
    if not overloads or overloads & registered_operators(device_type) or aten in UNDER_AUTOCAST[device_type]:
        return False
    return aten in SAME[device_type] or not any(map(_is_composite, overloads))


def is_aten(packet: str) -> bool:
    """Whether the running torch has an ATen operator of this name."""
    return packet in _overloads()


def aten_packets() -> frozenset[str]:
    """The names of all ATen operators of the running torch, without overloads."""
    return frozenset(_overloads())


@functools.cache
def _overloads() -> Mapping[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::"):
            operator = name.removeprefix("aten::")
            found.setdefault(packet_of(operator), set()).add(operator)
    return MappingProxyType({packet: frozenset(operators) for packet, operators in found.items()})


def _is_composite(operator: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "CompositeImplicitAutograd")
