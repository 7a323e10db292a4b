"""Which operators are not seen into: they run under autocast as a whole, or cannot be traced without example inputs.

The lists are exact, so that an operator that is seen into today stays so.
"""

from __future__ import annotations

__all__ = ["not_seen_into"]

_LISTS: dict[tuple[str, str], str] = {
    ("cpu", "symbolic"): """
        bernoulli combinations corrcoef cov gradient inner isin istft item linalg.multi_dot masked.amax
        masked.amin masked.argmax masked.argmin masked.cumprod masked.cumsum masked.log_softmax masked.logaddexp
        masked.logsumexp masked.mean masked.median masked.norm masked.normalize masked.prod masked.softmax
        masked.softmin masked.std masked.sum masked.var matrix_exp multinomial nn.functional.bilinear
        nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d nn.functional.gaussian_nll_loss
        nn.functional.interpolate.area nn.functional.linear_cross_entropy
        nn.functional.linear_cross_entropy.chunked nn.functional.linear_cross_entropy.chunked_none
        nn.functional.local_response_norm nn.functional.multi_head_attention_forward pca_lowrank svd_lowrank
        tensordot unravel_index
        """,
    ("cpu", "examples"): """
        addbmm bernoulli combinations corrcoef cov gradient isin istft item linalg.multi_dot matrix_exp
        multinomial nn.functional.bilinear tensordot unravel_index
        """,
    ("cuda", "symbolic"): """
        _unsafe_masked_index_put_accumulate bernoulli corrcoef cov cumulative_trapezoid inner istft item ldexp
        masked.amax masked.amin masked.argmax masked.argmin masked.cumprod masked.cumsum masked.log_softmax
        masked.logaddexp masked.logsumexp masked.mean masked.median masked.norm masked.normalize masked.prod
        masked.softmax masked.softmin masked.std masked.sum masked.var matrix_exp multinomial
        mvlgamma.mvlgamma_p_1 mvlgamma.mvlgamma_p_3 mvlgamma.mvlgamma_p_5 nn.functional.cross_entropy
        nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d nn.functional.gaussian_nll_loss
        nn.functional.interpolate.area nn.functional.linear_cross_entropy
        nn.functional.linear_cross_entropy.chunked nn.functional.linear_cross_entropy.chunked_none
        nn.functional.local_response_norm nn.functional.multi_head_attention_forward trace trapezoid trapz
        unravel_index
        """,
    ("cuda", "examples"): """
        _unsafe_masked_index_put_accumulate addbmm bernoulli corrcoef cov istft item ldexp matrix_exp
        multinomial nn.functional.embedding mvlgamma.mvlgamma_p_1 mvlgamma.mvlgamma_p_3 mvlgamma.mvlgamma_p_5 trace
        unravel_index
        """,
}


def not_seen_into(device_type: str, way: str) -> set[str]:
    """The operators that are opaque or not traceable, under the rules of a device, "symbolic" or with "examples"."""
    return set(_LISTS[device_type, way].split())
