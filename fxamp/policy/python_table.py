"""Which Python functions and operators stand for one ATen operator under another name?

Builtins of torch and methods of a tensor have the operator's own name and need no row here.
"""

from __future__ import annotations

from typing import Final

__all__ = ["CAST_METHODS", "FUNCTIONS", "METHODS", "OPERATOR_MODULE"]

CAST_METHODS: Final = frozenset(
    "float double half bfloat16 cfloat cdouble chalf byte char short int long bool type".split()
)
"""Methods that are a cast, kept under their own names: the name says to which dtype."""

# Functions written in Python. Third column: an argument that, when it is given and not None or False, makes
# the function reach another operator, the fourth column, or none of its own. ``inplace=True`` reaches the
# operator's ``_`` twin. A function without a row reaches several operators that autocast treats differently.
FUNCTIONS: Final = """
F.adaptive_avg_pool2d               adaptive_avg_pool2d
F.adaptive_avg_pool3d               adaptive_avg_pool3d
F.adaptive_max_pool1d               adaptive_max_pool1d     return_indices
F.adaptive_max_pool1d_with_indices  adaptive_max_pool1d
F.adaptive_max_pool2d               adaptive_max_pool2d     return_indices
F.adaptive_max_pool2d_with_indices  adaptive_max_pool2d
F.adaptive_max_pool3d               adaptive_max_pool3d     return_indices
F.adaptive_max_pool3d_with_indices  adaptive_max_pool3d
F.affine_grid                       affine_grid_generator
F.alpha_dropout                     alpha_dropout
F.batch_norm                        batch_norm
F.binary_cross_entropy              binary_cross_entropy
F.binary_cross_entropy_with_logits  binary_cross_entropy_with_logits
F.celu                              celu
F.cosine_embedding_loss             cosine_embedding_loss
F.cross_entropy                     cross_entropy_loss
F.ctc_loss                          ctc_loss
F.dropout                           dropout
F.dropout1d                         feature_dropout
F.dropout2d                         feature_dropout
F.dropout3d                         feature_dropout
F.elu                               elu
F.embedding                         embedding               max_norm
F.embedding_bag                     embedding_bag           max_norm
F.feature_alpha_dropout             feature_alpha_dropout
F.fold                              col2im
F.glu                               glu
F.grid_sample                       grid_sampler
F.group_norm                        group_norm
F.hardsigmoid                       hardsigmoid
F.hardswish                         hardswish
F.hardtanh                          hardtanh
F.hinge_embedding_loss              hinge_embedding_loss
F.huber_loss                        huber_loss              weight
F.instance_norm                     instance_norm
F.kl_div                            kl_div
F.l1_loss                           l1_loss                 weight
F.layer_norm                        layer_norm
F.leaky_relu                        leaky_relu
F.log_softmax                       log_softmax
F.margin_ranking_loss               margin_ranking_loss
F.max_pool1d                        max_pool1d              return_indices    max_pool1d_with_indices
F.max_pool1d_with_indices           max_pool1d_with_indices
F.max_pool2d                        max_pool2d              return_indices    max_pool2d_with_indices
F.max_pool2d_with_indices           max_pool2d_with_indices
F.max_pool3d                        max_pool3d              return_indices    max_pool3d_with_indices
F.max_pool3d_with_indices           max_pool3d_with_indices
F.max_unpool1d                      max_unpool2d
F.max_unpool2d                      max_unpool2d
F.max_unpool3d                      max_unpool3d
F.mish                              mish
F.mse_loss                          mse_loss                weight
F.multi_margin_loss                 multi_margin_loss
F.multilabel_margin_loss            multilabel_margin_loss
F.nll_loss                          nll_loss
F.poisson_nll_loss                  poisson_nll_loss
F.relu                              relu
F.relu6                             relu6
F.rms_norm                          rms_norm
F.rrelu                             rrelu
F.selu                              selu
F.sigmoid                           sigmoid
F.silu                              silu
F.smooth_l1_loss                    smooth_l1_loss
F.soft_margin_loss                  soft_margin_loss
F.softmax                           softmax
F.softmin                           softmax
F.softsign                          div
F.tanh                              tanh
F.tanhshrink                        sub
F.threshold                         threshold
F.triplet_margin_loss               triplet_margin_loss
F.unfold                            im2col
torch.atleast_1d                    atleast_1d
torch.atleast_2d                    atleast_2d
torch.atleast_3d                    atleast_3d
torch.block_diag                    block_diag
torch.broadcast_tensors             broadcast_tensors
torch.cartesian_prod                cartesian_prod
torch.cdist                         cdist
torch.chain_matmul                  chain_matmul
torch.einsum                        einsum
torch.meshgrid                      meshgrid
torch.split                         split
torch.stft                          stft
torch.tensordot                     tensordot
Tensor.split                        split
Tensor.stft                         stft
Tensor.unflatten                    unflatten
"""

# Functions of the operator module; ``__add__``, ``__radd__`` and ``__iadd__`` are found here as well.
OPERATOR_MODULE: Final = """
abs         abs
add         add
and_        bitwise_and
eq          eq
floordiv    floor_divide
ge          ge
gt          gt
iadd        add_
iand        bitwise_and_
ifloordiv   floor_divide_
imatmul     matmul
imod        remainder_
imul        mul_
inv         bitwise_not
invert      bitwise_not
ior         bitwise_or_
ipow        pow_
isub        sub_
itruediv    div_
ixor        bitwise_xor_
le          le
lshift      __lshift__
lt          lt
matmul      matmul
mod         remainder
mul         mul
ne          ne
neg         neg
or_         bitwise_or
pos         positive
pow         pow
rshift      __rshift__
sub         sub
truediv     div
xor         bitwise_xor
"""

# The other methods whose name is not the operator's. A number divided by a tensor is its reciprocal times
# the number.
METHODS: Final = {
    "cpu": "to",
    "cuda": "to",
    "__div__": "div",
    "__idiv__": "div_",
    "__rdiv__": "reciprocal",
    "__rtruediv__": "reciprocal",
    "__rsub__": "rsub",
    **{name: name for name in CAST_METHODS},
}
