"""Small models of many families, each with inputs; written as repositories write them."""

from __future__ import annotations

from tests.zoo.attention import ATTENTION
from tests.zoo.basic import BASIC
from tests.zoo.case import Case
from tests.zoo.convnets import CONVNETS
from tests.zoo.detection import DETECTION
from tests.zoo.diffusion import DIFFUSION
from tests.zoo.generative import GENERATIVE
from tests.zoo.graphs import GRAPHS
from tests.zoo.mixtures import MIXTURES
from tests.zoo.physics import PHYSICS
from tests.zoo.recurrent import RECURRENT
from tests.zoo.sequences import SEQUENCES
from tests.zoo.tabular import TABULAR
from tests.zoo.transformers import TRANSFORMERS

__all__ = ["BASIC", "ZOO", "Case"]

ZOO: dict[str, Case] = {
    **BASIC, **CONVNETS, **ATTENTION, **TRANSFORMERS, **SEQUENCES, **RECURRENT, **GRAPHS, **MIXTURES, **DIFFUSION,
    **DETECTION, **GENERATIVE, **TABULAR, **PHYSICS,
}  # fmt: skip
