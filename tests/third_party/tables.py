"""Recommenders of deepctr-torch, and tabular networks of pytorch-tabnet and tab-transformer-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.third_party.case import Case, call, each, load, randn

__all__ = ["RECOMMENDERS", "TABNET", "TAB_TRANSFORMERS"]

FIELDS: dict[str, Any] = {"user": 10, "item": 12, "day": 6}


def recommender(architecture: str, only_sparse: bool = False, lists: int = 2, **config: Any) -> Case:
    """Three categories and two numbers in one matrix, as deepctr feeds its models."""

    def make() -> nn.Module:
        inputs, models = load("deepctr_torch.inputs"), load("deepctr_torch.models")
        sparse = [inputs.SparseFeat(name, size, embedding_dim=4) for name, size in FIELDS.items()]
        dense = [inputs.DenseFeat(name, 1) for name in ("price", "age")]
        columns = [[*sparse, *dense], sparse if only_sparse else [*sparse, *dense]][:lists]
        model: nn.Module = getattr(models, architecture)(*columns, task="binary", device="cpu", **config)
        return model

    def rows(batch: int) -> Tensor:
        return torch.cat([torch.randint(0, 6, (batch, 3)).float(), torch.randn(batch, 2)], 1)

    return Case(make, each(lambda batch: call(rows(batch)), (5,), (7,)))


def tabnet() -> nn.Module:
    kind: Any = load("pytorch_tabnet.tab_network").TabNet
    model: nn.Module = kind(6, 3, n_d=4, n_a=4, n_steps=2, virtual_batch_size=4, group_attention_matrix=torch.eye(6))
    return model


def tab_transformer(architecture: str, **config: Any) -> Case:
    """Two categories and five numbers."""

    def make() -> nn.Module:
        kind = getattr(load("tab_transformer_pytorch"), architecture)
        model: nn.Module = kind(categories=(3, 4), num_continuous=5, dim=16, dim_out=1, depth=2, heads=2, **config)
        return model

    return Case(make, each(lambda batch: call(torch.randint(0, 3, (batch, 2)), torch.randn(batch, 5)), (4,), (6,)))


TOWER: dict[str, Any] = {"dnn_hidden_units": (16, 8)}

RECOMMENDERS: dict[str, Case] = {
    "DeepFM": recommender("DeepFM", **TOWER),
    "WDL": recommender("WDL", **TOWER),
    "DCN": recommender("DCN", **TOWER),
    "DCNMix": recommender("DCNMix", **TOWER),
    "xDeepFM": recommender("xDeepFM", cin_layer_size=(8, 4), **TOWER),
    "AutoInt": recommender("AutoInt", **TOWER),
    "FiBiNET": recommender("FiBiNET", **TOWER),
    "NFM": recommender("NFM", **TOWER),
    "AFM": recommender("AFM", only_sparse=True),
    "PNN": recommender("PNN", lists=1, **TOWER),
}
TABNET: dict[str, Case] = {"TabNet": Case(tabnet, randn((8, 6)))}
TAB_TRANSFORMERS: dict[str, Case] = {
    "TabTransformer": tab_transformer("TabTransformer", mlp_act=nn.ReLU()),
    "FTTransformer": tab_transformer("FTTransformer"),
}
