"""Which dtype comes out of an ATen operator, given the dtypes that go in?

Planning follows dtypes through a graph without running it. Views, in-place writes and pointwise operators
are told by torch itself (schemas and tags); the others have a name in a list below. An operator in neither is
unknown, which is always safe. The kinds hold for real tensors, and for calls that name no dtype themselves:

* ``first``: the dtype of the first tensor. The value may be that tensor, or share its memory.
* ``promote``: ``torch.result_type`` of all tensors and numbers, as a new tensor.
* ``float_promote``: the same, but integers become the default floating dtype.
* ``uniform``: the dtype that all floating tensors share; unknown when they differ or there is none.
* ``accumulate``: ``first`` for floating tensors, and int64 for integers.
* ``bool``, ``int32``, ``int64``: always that.

A tuple has a kind for each element of the result; a list of tensors has the one kind that all its elements
share.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F

from fxamp.policy.operators import is_aten

__all__ = ["ONE_DTYPE", "OutputKind", "is_view", "output_kind"]

OutputKind: TypeAlias = "str | tuple[str | None, ...]"

_NAMES: Final[Mapping[OutputKind, str]] = {
    "first": """
        _safe_softmax _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d
        _upsample_nearest_exact2d _upsample_nearest_exact3d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d addbmm addmm addmv alpha_dropout amax amin avg_pool1d avg_pool2d avg_pool3d
        baddbmm batch_norm bernoulli binary_cross_entropy bmm cdist chain_matmul channel_shuffle cholesky
        cholesky_inverse cholesky_solve chunk clone col2im constant_pad_nd conv1d conv2d conv3d conv_tbc
        conv_transpose1d conv_transpose2d conv_transpose3d convolution ctc_loss diag diag_embed diagflat
        diff dot dropout dsplit einsum embedding_renorm empty_like feature_alpha_dropout feature_dropout
        fft_fftshift fft_ifftshift fill flip fliplr flipud full_like gather glu grid_sampler grid_sampler_2d
        grid_sampler_3d group_norm hardswish hinge_embedding_loss histc hsplit huber_loss im2col index
        index_add index_copy index_fill index_put index_reduce index_select instance_norm layer_norm
        linalg_cholesky linalg_cond linalg_det linalg_eigvalsh linalg_householder_product linalg_inv
        linalg_ldl_solve linalg_lu_solve linalg_matrix_exp linalg_matrix_norm linalg_matrix_power
        linalg_multi_dot linalg_norm linalg_pinv linalg_solve linalg_solve_triangular linalg_svdvals
        linalg_tensorinv linalg_tensorsolve linalg_vecdot linalg_vector_norm linear log_sigmoid log_softmax
        logcumsumexp logdet lu_solve masked_fill masked_scatter masked_select matmul matrix_exp matrix_power
        max_pool1d max_pool2d max_pool3d max_unpool2d max_unpool3d mean meshgrid mm movedim msort
        multi_margin_loss multilabel_margin_loss mv nanmean nanquantile narrow_copy native_channel_shuffle
        new_empty new_empty_strided new_full new_ones new_zeros nll_loss nll_loss2d nll_loss_nd
        normal_functional ones_like orgqr ormqr pad pdist pinverse pixel_shuffle pixel_unshuffle positive
        put quantile rand_like randn_like ravel real reflection_pad1d reflection_pad2d reflection_pad3d
        renorm repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape
        reshape_as rms_norm roll rot90 rrelu scaled_dot_product_attention scatter scatter_add scatter_reduce
        select_scatter slice_scatter soft_margin_loss softmax special_log_softmax special_softmax split
        split_with_sizes std take take_along_dim tensor_split tensordot tile tril triu unbind unsafe_chunk
        unsafe_split upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
        upsample_nearest2d upsample_nearest3d upsample_trilinear3d var vdot vsplit zeros_like
        """,
    "promote": """
        absolute bilinear block_diag cartesian_prod cat clip concat concatenate cosine_similarity cross
        cross_entropy_loss dist embedding fix floor_divide ger inner kl_div kron l1_loss linalg_cross
        mse_loss multiply negative outer prelu relu6 rsub smooth_l1_loss special_round stack subtract where
        """,
    "float_promote": """
        acos acosh angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh
        copysign cos cosh deg2rad digamma div divide erf erfc erfinv exp exp2 expm1 i0 ldexp lgamma log
        log10 log1p log2 logit logsumexp mvlgamma pairwise_distance polygamma rad2deg reciprocal rsqrt
        sigmoid sin sinc sinh special_digamma special_erf special_erfc special_erfinv special_exp2
        special_expit special_expm1 special_gammainc special_gammaincc special_gammaln special_i0
        special_log1p special_logit special_logsumexp special_multigammaln special_ndtr special_polygamma
        special_psi special_sinc special_xlogy sqrt tan tanh true_divide xlogy
        """,
    "uniform": """
        addr binary_cross_entropy_with_logits column_stack cosine_embedding_loss dstack hstack
        margin_ranking_loss poisson_nll_loss row_stack triplet_margin_loss vstack
        """,
    "accumulate": "cumprod cumsum nansum prod sum trace",
    "bool": """
        all any eq ge greater greater_equal gt is_nonzero isclose isfinite isin isinf isnan isneginf
        isposinf isreal le less less_equal logical_and logical_not logical_or logical_xor lt ne not_equal
        signbit
        """,
    "int64": """
        argmax argmin argsort argwhere bucketize count_nonzero multinomial nonzero nonzero_numpy one_hot
        searchsorted
        """,
    ("first", "first"): "aminmax linalg_eigh linalg_qr linalg_slogdet qr std_mean var_mean",
    ("first", "first", "first"): "linalg_svd svd",
    ("first", "int32"): "frexp linalg_cholesky_ex linalg_inv_ex linalg_lu_factor",
    ("first", "int64"): "cummax cummin kthvalue max_pool1d_with_indices max_pool2d_with_indices "
    "max_pool3d_with_indices mode sort topk",
    ("first", "bool"): "native_dropout",
    ("first", None, None): "native_group_norm native_layer_norm",
}

# Tagged pointwise or made as views, but what comes out is not told by the tensors that go in.
_UNKNOWN: Final = frozenset(
    "_autocast_to_full_precision _autocast_to_reduced_precision _to_copy _conj complex equal float_power imag polar to "
    "type_as view_as_complex view_as_real".split()
)

# Operators that refuse operands of two floating dtypes: one that is known tells the others'.
ONE_DTYPE: Final = frozenset(
    "_addmm_activation addbmm addmm addmv baddbmm bmm chain_matmul conv1d conv2d conv3d conv_tbc conv_transpose1d "
    "conv_transpose2d conv_transpose3d convolution dot linalg_multi_dot linear matmul mm mv "
    "scaled_dot_product_attention vdot".split()
)

# One name for a single tensor, the other for a tuple: the number and kind of arguments tell.
_REDUCTION_OR_PAIR: Final = frozenset("max min median nanmedian".split())

# Operators with several results of which these Python functions hand out the first.
_FIRST_OF: Final = {
    F.adaptive_max_pool1d: "adaptive_max_pool1d",
    F.adaptive_max_pool2d: "adaptive_max_pool2d",
    F.adaptive_max_pool3d: "adaptive_max_pool3d",
    F.embedding_bag: "embedding_bag",
}

# Arguments that change the kind when they are given.
_ARGUMENT_CHANGES: Final[Mapping[str, tuple[str, str | None]]] = {
    "bucketize": ("out_int32", None),
    "diff": ("prepend append", None),
    "div": ("rounding_mode", "promote"),
    "divide": ("rounding_mode", "promote"),
    "searchsorted": ("out_int32", None),
}


def output_kind(
    aten: str, target: object = None, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> OutputKind | None:
    """How the dtype of an operator's result follows from its tensors.

    Args:
        aten: the operator, as ``fxamp.policy.spellings.aten_name`` says.
        target: the function that is called; some hand out only one of the operator's results.
        args: the call's positional arguments, without which a result that depends on them is unknown.
        kwargs: its keyword arguments.

    Returns:
        A kind as the module's docstring lists them, a tuple of kinds, or None when it cannot be told.

    Example::

        >>> output_kind("add"), output_kind("softmax"), output_kind("topk")
        ('promote', 'first', ('first', 'int64'))
    """
    kwargs = kwargs or {}
    if torch.dtype in map(type, args) or torch.dtype in map(type, kwargs.values()):
        return None
    if aten in _REDUCTION_OR_PAIR:
        return _reduction_or_pair(args, kwargs)
    if aten in _FIRST_OF.values():
        same = isinstance(target, type(F.embedding_bag)) and _FIRST_OF.get(target) == aten
        return ("promote" if aten == "embedding_bag" else "first") if same else None
    arguments, changed = _ARGUMENT_CHANGES.get(aten, ("", None))
    if arguments and any(kwargs.get(name) not in (None, False) for name in arguments.split()):
        return changed
    return _kind_of_operator(aten)


def _reduction_or_pair(args: Sequence[Any], kwargs: Mapping[str, Any]) -> OutputKind | None:
    if len(args) + len(kwargs) == 1:
        return "first"
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return ("first", "int64") if isinstance(dim, int) else None


@functools.cache
def _kind_of_operator(aten: str) -> OutputKind | None:
    if aten in _UNKNOWN or not is_aten(aten):
        return None
    if aten.endswith("_") and not aten.endswith("__"):
        return "first"
    if aten in _kinds():
        return _kinds()[aten]
    overloads = _overloads(aten)
    if overloads and all(map(_is_view, overloads)):
        return "first"
    if overloads and all(torch.Tag.pointwise in overload.tags for overload in overloads):
        return "float_promote" if aten.startswith("special_") else "promote"
    return None


@functools.cache
def is_view(aten: str) -> bool:
    """Whether what an operator gives shares memory with its input and has its dtype, as the schemas say."""
    overloads = _overloads(aten) if is_aten(aten) and aten not in _UNKNOWN else []
    return bool(overloads) and all(map(_is_view, overloads))


def _overloads(aten: str) -> list[torch._ops.OpOverload[..., Any]]:
    packet = getattr(torch.ops.aten, aten)
    return [found for name in packet.overloads() if _gives_tensors(found := getattr(packet, name))]


@functools.cache
def _kinds() -> Mapping[str, OutputKind]:
    return {name: kind for kind, names in _NAMES.items() for name in names.split()}


def _gives_tensors(overload: torch._ops.OpOverload[..., Any]) -> bool:
    returns = overload._schema.returns
    out = any(argument.is_out for argument in overload._schema.arguments)
    return not out and bool(returns) and all("Tensor" in str(value.type) for value in returns)


def _is_view(overload: torch._ops.OpOverload[..., Any]) -> bool:
    returns = overload._schema.returns
    return all(value.alias_info is not None and not value.alias_info.is_write for value in returns)
