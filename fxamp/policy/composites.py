"""Which unlisted ATen operators does autocast leave alone, and which hand over to a listed one?

Autocast sees an operator that is made of others (no kernel of its own) only through these: ``hstack`` is
not listed, but the ``cat`` inside is. A composite without a row has not been vetted and runs under
autocast. The cells:

* ``same``: no listed operator is reached, or only in a way that changes nothing, such as the sum of a mask.
* an operator: all that autocast does is what it would do to that operator with the same arguments. (``roll`` has a
  kernel of its own, which on a CPU is made with ``cat``.)
* ``listed``: has a row of its own in ``fxamp.policy.autocast_table``.
* ``-``: listed operators are reached from the inside; the call has to run under autocast.

Found by running the samples of ``torch.testing``'s ``op_db`` with a recorder in place of every autocast
kernel, and proved by comparing the bits of values and gradients with autocast on and off.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["FORWARDS_TO", "SAME", "UNDER_AUTOCAST"]

_COMPOSITES: Final = """
composite                        cuda                cpu
_lu_with_info                    same                listed
_pad_circular                    same                same
_safe_softmax                    softmax             same
_upsample_bicubic2d_aa           listed              same
_upsample_bilinear2d_aa          listed              same
_upsample_nearest_exact1d        listed              same
_upsample_nearest_exact2d        listed              same
_upsample_nearest_exact3d        listed              same
absolute                         same                same
absolute_                        same                same
adaptive_avg_pool1d              same                same
adaptive_avg_pool2d              same                same
adaptive_avg_pool3d              same                listed
adaptive_max_pool1d              same                same
adjoint                          same                same
alpha_dropout                    same                same
alpha_dropout_                   same                same
arccos                           acos                same
arccos_                          same                same
arccosh                          same                same
arccosh_                         same                same
arcsin                           asin                same
arcsin_                          same                same
arcsinh                          same                same
arcsinh_                         same                same
arctan                           same                same
arctan2                          atan2               same
arctan2_                         same                same
arctan_                          same                same
arctanh                          same                same
arctanh_                         same                same
argsort                          same                same
argwhere                         same                same
atleast_1d                       same                same
atleast_2d                       same                same
atleast_3d                       same                same
avg_pool1d                       same                same
batch_norm                       same                same
broadcast_tensors                same                same
broadcast_to                     same                same
cartesian_prod                   same                same
chunk                            same                same
clip                             same                same
clip_                            same                same
coalesce                         same                same
column_stack                     same                cat
combinations                     same                -
concat                           same                cat
concatenate                      same                cat
conj                             same                same
conj_physical                    same                same
contiguous                       same                same
cosine_similarity                listed              same
cross                            listed              same
ctc_loss                         same                listed
cumulative_trapezoid             -                   same
det                              same                same
diag                             same                same
diagflat                         same                same
diff                             same                same
divide                           same                same
divide_                          same                same
dropout                          same                same
dropout_                         same                same
dsplit                           same                same
dstack                           same                cat
embedding_bag                    same                same
expand_as                        same                same
fake_quantize_per_channel_affine same                same
feature_alpha_dropout            same                same
feature_alpha_dropout_           same                same
feature_dropout                  same                same
feature_dropout_                 same                same
fft_fft                          same                listed
fft_fft2                         same                listed
fft_fftn                         same                listed
fft_fftshift                     same                cat
fft_hfft                         same                listed
fft_hfft2                        same                same
fft_hfftn                        same                same
fft_ifft                         same                listed
fft_ifft2                        same                listed
fft_ifftn                        same                listed
fft_ifftshift                    same                cat
fft_ihfft                        same                listed
fft_ihfft2                       same                same
fft_ihfftn                       same                same
fft_irfft                        same                listed
fft_irfft2                       same                listed
fft_irfftn                       same                listed
fft_rfft                         same                listed
fft_rfft2                        same                listed
fft_rfftn                        same                listed
fill_diagonal_                   same                same
fix                              same                same
fix_                             same                same
flatten                          same                same
fliplr                           same                same
flipud                           same                same
float_power                      same                same
float_power_                     same                same
ger                              same                same
gradient                         same                -
greater                          same                same
greater_                         same                same
greater_equal                    same                same
greater_equal_                   same                same
group_norm                       listed              same
histogramdd                      same                same
hsplit                           same                same
hstack                           same                cat
imag                             same                same
instance_norm                    same                same
inverse                          same                listed
isclose                          same                same
isfinite                         same                same
isreal                           same                same
kron                             same                same
layer_norm                       listed              same
less                             same                same
less_                            same                same
less_equal                       same                same
less_equal_                      same                same
linalg_cholesky                  same                listed
linalg_cond                      same                listed
linalg_det                       same                same
linalg_diagonal                  same                same
linalg_eigh                      same                listed
linalg_eigvals                   same                listed
linalg_eigvalsh                  same                listed
linalg_inv                       same                listed
linalg_ldl_factor                same                same
linalg_lu_factor                 same                same
linalg_matmul                    matmul              matmul
linalg_matrix_norm               listed              same
linalg_matrix_rank               same                listed
linalg_norm                      linalg_vector_norm  same
linalg_slogdet                   same                same
linalg_solve                     same                listed
linalg_solve_ex                  same                same
linalg_svd                       same                listed
linalg_svdvals                   same                listed
linalg_tensorinv                 same                listed
linalg_tensorsolve               same                listed
linalg_vander                    same                same
log_sigmoid                      same                same
log_softmax                      listed              same
logdet                           same                same
lu_solve                         same                listed
max                              same                same
max_pool1d                       same                same
max_pool1d_with_indices          same                same
max_pool2d                       same                same
max_pool3d                       same                listed
meshgrid                         same                same
min                              same                same
moveaxis                         same                same
movedim                          same                same
msort                            same                same
multiply                         same                same
multiply_                        same                same
nanmean                          same                same
nanquantile                      same                listed
narrow                           same                same
native_channel_shuffle           same                same
negative                         same                same
negative_                        same                same
nll_loss_nd                      nll_loss            nll_loss
not_equal                        same                same
not_equal_                       same                same
nuclear_norm                     listed              same
one_hot                          same                same
orgqr                            same                listed
outer                            same                same
pad                              same                -
pad_sequence                     same                same
pairwise_distance                -                   same
pdist                            listed              same
pin_memory                       same                same
positive                         same                same
qr                               same                listed
quantile                         same                listed
ravel                            same                same
real                             same                same
relu6                            same                same
relu6_                           same                same
repeat_interleave                same                same
requires_grad_                   same                same
reshape                          same                same
reshape_as                       same                same
resolve_conj                     same                same
resolve_neg                      same                same
rms_norm                         listed              same
roll                             same                cat
row_stack                        same                cat
rrelu                            same                same
rrelu_                           same                same
selu                             same                same
selu_                            same                same
slogdet                          same                same
softmax                          listed              same
sparse_coo_tensor                same                same
special_digamma                  same                same
special_erf                      same                same
special_erfc                     same                same
special_erfinv                   erfinv              same
special_exp2                     same                same
special_expit                    same                same
special_expm1                    expm1               same
special_gammainc                 same                same
special_gammaincc                same                same
special_gammaln                  same                same
special_i0                       same                same
special_log1p                    log1p               same
special_log_softmax              log_softmax         same
special_logit                    same                same
special_logsumexp                logsumexp           same
special_multigammaln             -                   same
special_ndtr                     same                same
special_polygamma                same                same
special_psi                      same                same
special_round                    same                same
special_sinc                     same                same
special_softmax                  softmax             same
special_xlogy                    same                same
split                            same                same
square                           pow                 same
square_                          same                same
std                              same                same
std_mean                         same                same
stft                             same                listed
subtract                         same                same
subtract_                        same                same
sum_to_size                      -                   same
svd                              same                listed
swapaxes                         same                same
swapaxes_                        same                same
swapdims                         same                same
swapdims_                        same                same
take_along_dim                   same                same
tensor_split                     same                same
tile                             same                same
to                               same                same
to_dense                         same                same
to_sparse                        same                same
trapezoid                        -                   same
trapz                            -                   same
true_divide                      same                same
true_divide_                     same                same
type_as                          same                same
unflatten                        same                same
unsafe_chunk                     same                same
upsample_bicubic2d               listed              same
upsample_bilinear2d              listed              same
upsample_linear1d                listed              same
upsample_nearest1d               listed              same
upsample_nearest2d               listed              same
upsample_nearest3d               listed              same
upsample_trilinear3d             listed              same
var                              same                same
var_mean                         same                same
view_as                          same                same
vsplit                           same                same
vstack                           same                cat
where                            same                same
"""

# Operators with kernels of their own that nevertheless call listed operators, on floating-point data.
_KERNELS: Final = """
operator                            cuda    cpu
_euclidean_dist                     -       -
_grouped_mm                         -       -
_linalg_det                         -       -
_linalg_slogdet                     -       -
_native_multi_head_attention        -       listed
_scaled_grouped_mm                  -       -
_scaled_grouped_mm_v2               -       -
_scaled_mm                          -       -
_scaled_mm_v2                       -       -
_transform_bias_rescale_qkv         -       -
_transformer_encoder_layer_fwd      -       -
_trilinear                          -       -
_unsafe_index_put                   -       same
_unsafe_masked_index_put_accumulate -       same
_weight_norm_interface              -       -
affine_grid_generator               -       -
convolution                         listed  -
embedding_renorm_                   -       same
isin                                same    -
ldexp                               -       same
ldexp_                              -       same
linalg_lstsq                        -       listed
linalg_matrix_exp                   -       -
mvlgamma                            -       same
mvlgamma_                           -       same
trace                               -       listed
"""


def _column(table: str, column: int) -> Mapping[str, str]:
    rows = (line.split() for line in table.strip().splitlines()[1:])
    return MappingProxyType({row[0]: row[column] for row in rows})


_CELLS: Final = {"cuda": _column(_COMPOSITES, 1), "cpu": _column(_COMPOSITES, 2)}

FORWARDS_TO: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        device_type: MappingProxyType({k: v for k, v in cells.items() if v not in ("same", "listed", "-")})
        for device_type, cells in _CELLS.items()
    }
)

SAME: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {device_type: frozenset(k for k, v in cells.items() if v == "same") for device_type, cells in _CELLS.items()}
)

UNDER_AUTOCAST: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        device_type: frozenset(k for k, v in _column(_KERNELS, column).items() if v == "-")
        for column, device_type in enumerate(_CELLS, start=1)
    }
)
