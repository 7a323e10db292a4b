"""Plan to casts in a graph, and the laws that every rewritten graph keeps."""

from fxamp.rewrite.freeze import fold_weight_casts
from fxamp.rewrite.gradients import direct_weight_gradients
from fxamp.rewrite.grouping import group_weight_casts
from fxamp.rewrite.insert import insert_casts
from fxamp.rewrite.verify import verify

__all__ = ["direct_weight_gradients", "fold_weight_casts", "group_weight_casts", "insert_casts", "verify"]
