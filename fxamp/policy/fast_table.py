"""Which operators may run in the low dtype where autocast has float32, and what does that cost in exactness?

One row an operator, a column a device. The policy "fast" chooses the dtype of the operators that have a row, where
torch.autocast lets them follow their inputs or has float32; one without a row stays as autocast has it. The cells:

* ``inside``: the kernel computes in float32 and keeps the dtype of its input: the result is rounded once.
* ``pointwise``: elementwise; the result is rounded once, and an error of the input does not grow.
* ``moves``: moves, copies or chooses values: exact. Views have no row: ``fast.moves_only`` tells them by their schema.
* ``inside_forward``, ``pointwise_forward``, ``moves_forward``: the same, but the gradient is added up in the low dtype,
  so that its error grows with the number of terms: a choice only where no gradient is asked for.
* ``inside_rows``: as ``inside``, but the gradients of the weights, not that of the input, are added up in the low
  dtype over the rows: off by 3% at 512 rows, by 7% at 4096. A choice up to ``fast.MOST_ROWS``, where these are known.
* ``fp32``: float32, whatever comes in: the range is too small or an error of the input grows.
* ``-``: no row on this device.

What decides by its inputs (argmax, sort, topk, floor, a comparison) has no row: a rounding may change the decision.

The column ``cpu`` is measured by tests/test_fast_table.py. The column ``cuda`` is what the kernels of ATen/native/cuda
do: ``acc_type<T, true>`` and ``opmath_type`` are float32 there; gradients made with atomic additions (of gather,
index_select, repeat_interleave and the linear upsamplings) add up in the low dtype, those of index and embedding are
sorted first and do not. The same test measures it where there is a GPU.
"""

from __future__ import annotations

from typing import Final

__all__ = ["FAST_TABLE"]

FAST_TABLE: Final = """
operator                          cuda            cpu
_safe_softmax                     inside          inside
_upsample_nearest_exact1d         moves           moves
_upsample_nearest_exact2d         moves           moves
_upsample_nearest_exact3d         moves           moves
abs                               moves           moves
absolute                          moves           moves
acos                              fp32            fp32
acosh                             fp32            fp32
adaptive_avg_pool1d               inside          inside
adaptive_avg_pool2d               inside          inside
adaptive_avg_pool3d               inside          -
adaptive_max_pool1d               moves           moves
adaptive_max_pool2d               moves           moves
adaptive_max_pool3d               moves           moves
add                               pointwise       pointwise
addcdiv                           fp32            fp32
addcmul                           pointwise       pointwise
amax                              moves           moves
amin                              moves           moves
arccos                            fp32            fp32
arccosh                           fp32            fp32
arcsin                            fp32            fp32
arctanh                           fp32            fp32
asin                              fp32            fp32
atanh                             fp32            fp32
avg_pool1d                        inside          inside
avg_pool2d                        inside          inside
avg_pool3d                        inside          -
batch_norm                        inside          inside
binary_cross_entropy              fp32            fp32
binary_cross_entropy_with_logits  fp32            fp32
cat                               moves           moves
cdist                             fp32            fp32
celu                              pointwise       pointwise
channel_shuffle                   moves           moves
clamp                             moves           moves
clamp_max                         moves           moves
clamp_min                         moves           moves
clip                              moves           moves
clone                             moves           moves
column_stack                      moves           moves
concat                            moves           moves
concatenate                       moves           moves
constant_pad_nd                   moves           moves
corrcoef                          fp32            fp32
cos                               fp32            fp32
cosh                              fp32            fp32
cosine_embedding_loss             fp32            fp32
cosine_similarity                 fp32            fp32
cov                               fp32            fp32
cross_entropy_loss                fp32            fp32
ctc_loss                          fp32            fp32
cumprod                           fp32            fp32
cumsum                            fp32            fp32
digamma                           fp32            fp32
dist                              fp32            fp32
div                               pointwise       pointwise
divide                            pointwise       pointwise
dropout                           pointwise       pointwise
dstack                            moves           moves
elu                               pointwise       pointwise
embedding                         moves           moves_forward
erf                               pointwise       pointwise
erfc                              fp32            fp32
erfinv                            fp32            fp32
exp                               fp32            fp32
exp2                              fp32            fp32
expm1                             fp32            fp32
feature_dropout                   pointwise       pointwise
flip                              moves           moves
fliplr                            moves           moves
flipud                            moves           moves
float_power                       fp32            fp32
frobenius_norm                    fp32            fp32
gather                            moves_forward   moves
gelu                              inside          inside
glu                               inside          inside
grid_sampler                      fp32            fp32
grid_sampler_2d                   fp32            fp32
grid_sampler_3d                   fp32            fp32
group_norm                        inside          inside
hardshrink                        moves           moves
hardsigmoid                       pointwise       pointwise
hardswish                         pointwise       pointwise
hardtanh                          moves           moves
hinge_embedding_loss              fp32            fp32
hstack                            moves           moves
huber_loss                        fp32            fp32
i0                                fp32            fp32
im2col                            moves           moves
index                             moves           moves_forward
index_select                      moves_forward   moves
instance_norm                     inside          inside
kl_div                            fp32            fp32
l1_loss                           fp32            fp32
layer_norm                        inside          inside_rows
leaky_relu                        pointwise       pointwise
lerp                              pointwise       pointwise
lgamma                            fp32            fp32
linalg_cross                      fp32            fp32
linalg_matrix_norm                fp32            fp32
linalg_norm                       fp32            fp32
linalg_vector_norm                fp32            fp32
log                               fp32            fp32
log10                             fp32            fp32
log1p                             fp32            fp32
log2                              fp32            fp32
log_sigmoid                       fp32            fp32
log_softmax                       fp32            fp32
logaddexp                         fp32            fp32
logaddexp2                        fp32            fp32
logcumsumexp                      fp32            fp32
logit                             fp32            fp32
logsumexp                         fp32            fp32
margin_ranking_loss               fp32            fp32
masked_fill                       moves           moves
masked_scatter                    moves           moves
masked_select                     moves           moves
max_pool1d                        moves           moves
max_pool2d                        moves           moves
max_pool3d                        moves           moves
maximum                           moves           moves
mean                              inside          inside
minimum                           moves           moves
mish                              inside          inside
mse_loss                          fp32            fp32
mul                               pointwise       pointwise
multi_margin_loss                 fp32            fp32
multilabel_margin_loss            fp32            fp32
multiply                          pointwise       pointwise
mvlgamma                          fp32            fp32
native_dropout                    pointwise       pointwise
neg                               moves           moves
negative                          moves           moves
nll_loss                          fp32            fp32
nll_loss2d                        fp32            fp32
nll_loss_nd                       fp32            fp32
norm                              fp32            fp32
nuclear_norm                      fp32            fp32
pad                               moves           moves
pairwise_distance                 fp32            fp32
pdist                             fp32            fp32
pixel_shuffle                     moves           moves
pixel_unshuffle                   moves           moves
poisson_nll_loss                  fp32            fp32
polygamma                         fp32            fp32
pow                               fp32            fp32
prod                              fp32            fp32
reciprocal                        fp32            fp32
reflection_pad1d                  moves           moves
reflection_pad2d                  moves           moves
reflection_pad3d                  moves           moves
relu                              moves           moves
relu6                             moves           moves
renorm                            fp32            fp32
repeat                            moves           moves
repeat_interleave                 moves_forward   moves
replication_pad1d                 moves_forward   moves_forward
replication_pad2d                 moves_forward   moves_forward
replication_pad3d                 moves_forward   moves_forward
rms_norm                          inside          inside
roll                              moves           moves
rot90                             moves           moves
row_stack                         moves           moves
rsqrt                             fp32            fp32
rsub                              pointwise       pointwise
select_scatter                    moves           moves
selu                              pointwise       pointwise
sigmoid                           pointwise       pointwise
silu                              inside          inside
sin                               fp32            fp32
sinc                              fp32            fp32
sinh                              fp32            fp32
slice_scatter                     moves           moves
smooth_l1_loss                    fp32            fp32
soft_margin_loss                  fp32            fp32
softmax                           inside          inside
softplus                          fp32            fp32
softshrink                        pointwise       pointwise
special_erfinv                    fp32            fp32
special_exp2                      fp32            fp32
special_expit                     pointwise       pointwise
special_expm1                     fp32            fp32
special_log1p                     fp32            fp32
special_log_softmax               fp32            fp32
special_logit                     fp32            fp32
special_logsumexp                 fp32            fp32
special_softmax                   inside          inside
special_xlogy                     fp32            fp32
sqrt                              fp32            fp32
square                            fp32            fp32
stack                             moves           moves
std                               fp32            fp32
std_mean                          fp32            fp32
sub                               pointwise       pointwise
subtract                          pointwise       pointwise
sum                               fp32            fp32
take_along_dim                    moves_forward   moves
tan                               fp32            fp32
tanh                              pointwise       pointwise
threshold                         moves           moves
tile                              moves           moves
trace                             fp32            fp32
tril                              moves           moves
triplet_margin_loss               fp32            fp32
triu                              moves           moves
true_divide                       pointwise       pointwise
unfold_copy                       moves           moves
upsample_bilinear2d               inside_forward  inside
upsample_linear1d                 inside_forward  inside
upsample_nearest1d                moves           moves
upsample_nearest2d                moves           moves
upsample_nearest3d                moves           moves
upsample_trilinear3d              inside_forward  inside
var                               fp32            fp32
var_mean                          fp32            fp32
vstack                            moves           moves
where                             moves           moves
xlogy                             fp32            fp32
"""
