"""Graph networks of torch_geometric: as layers and models, and as its examples write them, with batches of graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.third_party.case import Call, Case, call, each, load

__all__ = ["GRAPHS"]

WIDTH = 8


def geometric() -> Any:
    return load("torch_geometric.nn")


class GraphNetwork(nn.Module):
    """Convolutions, a readout of each graph, a classifier."""

    def __init__(self, conv: Callable[[Any, int, int], nn.Module], pool: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(geometric(), WIDTH, 16), conv(geometric(), 16, 16)
        self.pool = getattr(geometric(), pool)
        self.lin = nn.Linear(16, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.conv1(x, edge_index).relu()
        x = self.conv2(x, edge_index)
        x = self.pool(x, batch)
        x = F.dropout(x, p=0.5, training=self.training)
        scores: Tensor = self.lin(x)
        return scores


def edges(nodes: int, links: int) -> Tensor:
    return torch.randint(0, nodes, (2, links))


def graph(nodes: int, links: int) -> Call:
    return call(torch.randn(nodes, WIDTH), edges(nodes, links))


def graphs(nodes: int, links: int) -> Call:
    return call(*graph(nodes, links).args, torch.arange(nodes) // 5)


def featured(make: Callable[[int], Tensor]) -> Callable[[int, int], Call]:
    return lambda nodes, links: call(*graph(nodes, links).args, make(links))


def points(nodes: int, links: int) -> Call:
    return call(torch.randn(nodes, WIDTH), torch.randn(nodes, 3), edges(nodes, links))


def signed(nodes: int, links: int) -> Call:
    return call(*graph(nodes, links).args, edges(nodes, links))


def molecules(nodes: int, links: int) -> Call:
    return call(*graph(nodes, links).args, torch.randn(links, 3), torch.arange(nodes) // 5)


def on(make: Callable[[Any], nn.Module], inputs: Callable[..., Call] = graph) -> Case:
    """A model of ``torch_geometric.nn``, on graphs of two sizes."""
    return Case(lambda: make(geometric()), each(inputs, (10, 30), (15, 40)))


def pooled(conv: Callable[[Any, int, int], nn.Module], pool: str = "global_mean_pool") -> Case:
    return Case(lambda: GraphNetwork(conv, pool), each(graphs, (10, 30), (15, 40)))


SIZES: dict[str, Any] = {"in_channels": WIDTH, "hidden_channels": 16, "num_layers": 2, "out_channels": 4}
distances = featured(lambda links: torch.randn(links, 3))
kinds = featured(lambda links: torch.randint(0, 3, (links,)))

GRAPHS: dict[str, Case] = {
    "GCN": on(lambda g: g.GCN(**SIZES, dropout=0.1)),
    "GraphSAGE": on(lambda g: g.GraphSAGE(**SIZES)),
    "GIN": on(lambda g: g.GIN(**SIZES, norm="batch_norm")),
    "GAT": on(lambda g: g.GAT(**SIZES, heads=2)),
    "GATv2": on(lambda g: g.GAT(**SIZES, v2=True, heads=2)),
    "PNA": on(lambda g: g.PNA(**SIZES, aggregators=["mean", "max", "std"], scalers=["identity", "amplification"],
                              deg=torch.tensor([1, 2, 3, 4]))),
    "EdgeCNN": on(lambda g: g.EdgeCNN(**SIZES)),
    "TransformerConv": on(lambda g: g.TransformerConv(WIDTH, 4, heads=2)),
    "ChebConv": on(lambda g: g.ChebConv(WIDTH, 4, K=3)),
    "GatedGraphConv": on(lambda g: g.GatedGraphConv(WIDTH, 2)),
    "GINEConv": on(lambda g: g.GINEConv(nn.Linear(WIDTH, 4), edge_dim=3), distances),
    "NNConv": on(lambda g: g.NNConv(WIDTH, 4, nn.Sequential(nn.Linear(3, WIDTH * 4))), distances),
    "RGCNConv": on(lambda g: g.RGCNConv(WIDTH, 4, 3), kinds),
    "DeepGCN": on(lambda g: g.DeepGCNLayer(g.GENConv(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU())),
    "PointTransformerConv": on(lambda g: g.PointTransformerConv(WIDTH, 4), points),
    "AttentiveFP": on(lambda g: g.AttentiveFP(WIDTH, 16, 4, edge_dim=3, num_layers=2, num_timesteps=2), molecules),
    "SignedGCN": on(lambda g: g.SignedGCN(WIDTH, 16, 2), signed),
    "LightGCN": on(lambda g: g.LightGCN(15, 8, 2), lambda nodes, links: call(edges(nodes, links))),
    "GCN on graphs": pooled(lambda g, i, o: g.GCNConv(i, o)),
    "GAT on graphs": pooled(lambda g, i, o: g.GATConv(i, o // 2, heads=2), "global_max_pool"),
    "SAGE on graphs": pooled(lambda g, i, o: g.SAGEConv(i, o), "global_add_pool"),
    "GIN on graphs": pooled(
        lambda g, i, o: g.GINConv(nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU(), nn.Linear(o, o))),
        "global_add_pool",
    ),
    "Transformer on graphs": pooled(lambda g, i, o: g.TransformerConv(i, o // 2, heads=2)),
}  # fmt: skip
