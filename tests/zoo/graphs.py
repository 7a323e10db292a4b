"""Networks on graphs, point sets and sets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, labels, randn

__all__ = ["GRAPHS"]


def scatter_softmax(scores: Tensor, index: Tensor, count: int) -> Tensor:
    """Softmax over the edges that end in the same node."""
    where = index.unsqueeze(-1).expand_as(scores)
    top = torch.full((count, scores.size(1)), -1e4, dtype=scores.dtype, device=scores.device)
    top = top.scatter_reduce(0, where, scores.detach(), reduce="amax", include_self=True)
    weights = (scores - top[index]).exp()
    total = torch.zeros_like(top, dtype=weights.dtype).scatter_add_(0, where, weights)
    return weights / (total.index_select(0, index) + 1e-16)


class GATLayer(nn.Module):
    """Attention over edges."""

    def __init__(self, size: int, width: int, heads: int) -> None:
        super().__init__()
        self.lin = nn.Linear(size, heads * width, bias=False)
        self.att_src, self.att_dst = (nn.Parameter(torch.randn(1, heads, width)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(heads * width))
        self.heads, self.width = heads, width

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        count = x.size(0)
        x = self.lin(x).view(-1, self.heads, self.width)
        source, target = edge_index[0], edge_index[1]
        alpha = (x * self.att_src).sum(-1)[source] + (x * self.att_dst).sum(dim=-1)[target]
        alpha = scatter_softmax(F.leaky_relu(alpha, 0.2), target, count)
        alpha = F.dropout(alpha, p=0.2, training=self.training)
        messages = x[source] * alpha.unsqueeze(-1)
        out = messages.new_zeros(count, self.heads, self.width)
        out.index_add_(0, target, messages)
        return out.flatten(1) + self.bias


class GAT(nn.Module):
    """Two layers, the last with one head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = GATLayer(6, 4, 2), GATLayer(8, 3, 1)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = F.dropout(x, p=0.1, training=self.training)
        return F.log_softmax(self.last(F.elu(self.first(x, edge_index)), edge_index), dim=1)


class GIN(nn.Module):
    """Sums of neighbours, learned epsilons, a readout by graph."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.eps = nn.Parameter(torch.zeros(2))
        self.readouts = nn.ModuleList(nn.Linear(width, 3) for _ in range(3))

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.embed(x)
        hidden = [x]
        for layer, mlp in enumerate(self.mlps):
            pooled = torch.zeros_like(x).index_add_(0, edge_index[1], x.index_select(0, edge_index[0]))
            x = F.relu(mlp((1 + self.eps[layer]) * x + pooled))
            hidden.append(x)
        score = 0
        for h, readout in zip(hidden, self.readouts, strict=True):
            graphs = h.new_zeros((2, h.size(-1))).scatter_add(0, batch[:, None].expand(-1, h.size(-1)), h)
            score = score + F.dropout(readout(graphs), 0.5, training=self.training)
        return score


class PNA(nn.Module):
    """Mean, maximum, minimum and deviation, scaled by degree."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.pre, self.post = nn.Linear(3 * width, width), nn.Linear(13 * width, width)
        self.edge = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("avg_log_degree", torch.tensor(1.2))

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        row, col = edge_index
        n, d = x.shape[0], x.shape[1]
        h = self.pre(torch.cat([x[row], x[col], self.edge(edge_attr)], dim=-1))
        index = col.view(-1, 1).expand(-1, d)
        zeros = h.new_zeros(n, d)
        degree = torch.bincount(col, minlength=9).clamp(min=1).to(h.dtype).unsqueeze(-1)
        mean = zeros.scatter_add(0, index, h) / degree
        squares = zeros.scatter_reduce(0, index, h * h, reduce="mean", include_self=False)
        std = torch.sqrt(F.relu(squares - mean * mean) + 1e-5)
        largest = zeros.scatter_reduce(0, index, h, reduce="amax", include_self=False)
        smallest = zeros.scatter_reduce(0, index, h, reduce="amin", include_self=False)
        out = torch.cat([mean, largest, smallest, std], dim=-1)
        log_degree = torch.log(degree + 1)
        scaled = [out, out * (log_degree / self.avg_log_degree), out * (self.avg_log_degree / log_degree)]
        return x + self.norm(self.post(torch.cat([x, *scaled], dim=-1)))


class EdgeConditioned(nn.Module):
    """A network makes a matrix for each edge; a GRU cell updates the nodes."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, width * width))
        self.root = nn.Parameter(torch.eye(width))
        self.gru, self.width = nn.GRUCell(width, width), width
        self.gate, self.out = nn.Linear(width, 1), nn.Linear(width, 2)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        weight = self.network(edge_attr).view(-1, self.width, self.width)
        h = x
        for _ in range(2):
            message = torch.bmm(h[edge_index[0]].unsqueeze(1), weight.to(h.dtype)).squeeze(1)
            total = torch.zeros(9, self.width, dtype=message.dtype, device=x.device)
            total = total.index_add(0, edge_index[1], message)
            h = self.gru(F.relu(total + h @ self.root), h)
        attention = torch.sigmoid(self.gate(h))
        return self.out((attention * h).sum(0, keepdim=True))


class EGNN(nn.Module):
    """Features and coordinates that move together."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.edge_mlp = nn.Sequential(nn.Linear(2 * width + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.coord_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1, bias=False))
        self.node_mlp = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, coord: Tensor) -> tuple[Tensor, Tensor]:
        n = h.size(0)
        difference = coord.unsqueeze(1) - coord.unsqueeze(0)
        radial = difference.pow(2).sum(-1, keepdim=True)
        pairs = torch.cat([h.unsqueeze(1).expand(-1, n, -1), h.unsqueeze(0).expand(n, -1, -1), radial], dim=-1)
        m_ij = self.edge_mlp(pairs) * (1 - torch.eye(n, device=h.device)).unsqueeze(-1)
        difference = difference / (radial.sqrt() + 1)
        coord = coord + torch.clamp(difference * self.coord_mlp(m_ij), -100, 100).mean(dim=1)
        return h + self.node_mlp(torch.cat([h, m_ij.sum(1)], dim=-1)), coord


class PointNet(nn.Module):
    """Neighbours by distance, shared networks, a maximum; and a learned transform."""

    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.k = k
        self.transform = nn.Linear(3, 9)
        self.conv1 = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2))
        self.conv2 = nn.Conv1d(8, 8, 1)
        self.fc = nn.Linear(16, 4)

    def neighbours(self, x: Tensor) -> Tensor:
        inner = -2 * torch.matmul(x.transpose(2, 1), x)
        xx = torch.sum(x**2, dim=1, keepdim=True)
        return (-xx - inner - xx.transpose(2, 1)).topk(k=self.k, dim=-1)[1]

    def forward(self, points: Tensor) -> Tensor:
        matrix = self.transform(points.mean(-1)).view(-1, 3, 3) + torch.eye(3, device=points.device).unsqueeze(0)
        x = torch.bmm(points.transpose(2, 1), matrix).transpose(2, 1)
        batch_size, dims, count = x.size()
        index = self.neighbours(x) + torch.arange(0, batch_size, device=x.device).view(-1, 1, 1) * count
        flat = x.transpose(2, 1).contiguous()
        near = flat.view(batch_size * count, -1)[index.view(-1), :].view(batch_size, count, self.k, dims)
        centre = flat.view(batch_size, count, 1, dims).repeat(1, 1, self.k, 1)
        feature = torch.cat((near - centre, centre), dim=3).permute(0, 3, 1, 2).contiguous()
        x = self.conv2(self.conv1(feature).max(dim=-1, keepdim=False)[0])
        pooled = (F.adaptive_max_pool1d(x, 1).view(batch_size, -1), F.adaptive_avg_pool1d(x, 1).view(batch_size, -1))
        return self.fc(torch.cat(pooled, 1))


class GCN(nn.Module):
    """A dense normalised adjacency, and a sparse one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight1, self.weight2 = (nn.Parameter(torch.randn(a, b) / 3) for a, b in ((6, width), (width, 3)))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        a = adjacency + torch.eye(adjacency.size(0), device=x.device)
        d = a.sum(1).pow(-0.5)
        d = torch.where(torch.isinf(d), torch.zeros_like(d), d)
        a = d.view(-1, 1) * a * d.view(1, -1)
        x = F.relu(torch.spmm(a, torch.mm(x, self.weight1)))
        return torch.addmm(self.bias, a, torch.mm(x, self.weight2)).log_softmax(1)


def _graph() -> tuple[Tensor, ...]:
    return torch.randn(9, 6), torch.randint(0, 9, (2, 20))


def _edges(width: int) -> tuple[Tensor, ...]:
    return torch.randn(9, width), torch.randint(0, 9, (2, 20)), torch.randn(20, 2)


GRAPHS: dict[str, Case] = {
    "gat": Case(GAT, _graph, loss=F.nll_loss, loss_args=labels(3, 9)),
    "gin": Case(GIN, lambda: (*_graph(), torch.arange(9) // 5), loss=F.cross_entropy, loss_args=labels(3)),
    "pna": Case(PNA, lambda: _edges(6), loss=F.mse_loss, loss_args=randn((9, 6))),
    "edge_conditioned": Case(EdgeConditioned, lambda: _edges(4), loss=F.mse_loss, loss_args=randn((1, 2)), opaque=2),
    "egnn": Case(EGNN, randn((5, 6), (5, 3)), loss=lambda out, t: F.mse_loss(out[1], t), loss_args=randn((5, 3))),
    "pointnet": Case(PointNet, randn((2, 3, 7)), loss=F.cross_entropy, loss_args=labels(4)),
    "gcn": Case(
        GCN, lambda: (torch.randn(7, 6), (torch.rand(7, 7) > 0.6).float()), loss=F.nll_loss, loss_args=labels(3, 7)
    ),
}
