"""Tables, recommendation, mixers, and weights that networks make."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, images, labels, randn

__all__ = ["TABULAR"]


class DLRM(nn.Module):
    """Bags of embeddings, a bottom network, all pairs of dot products."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.emb = nn.ModuleList(nn.EmbeddingBag(10, width, mode="sum") for _ in range(3))
        self.bot = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 6, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense: Tensor, indices: list[Tensor], offsets: list[Tensor]) -> Tensor:
        x = self.bot(dense)
        ly = [emb(indices[k], offsets[k]) for k, emb in enumerate(self.emb)]
        batch_size, d = x.shape
        T = torch.cat([x, *ly], dim=1).view((batch_size, -1, d))
        Z = torch.bmm(T, torch.transpose(T, 1, 2))
        _, ni, _ = Z.shape
        li = torch.tensor([i for i in range(ni) for j in range(i)])
        lj = torch.tensor([j for i in range(ni) for j in range(i)])
        R = torch.cat([x, Z[:, li, lj]], dim=1)
        return torch.clamp(torch.sigmoid(self.top(R)), min=1e-3, max=1 - 1e-3).view(-1)


class DeepFM(nn.Module):
    """Linear terms, a factorisation machine and a network over one embedding."""

    def __init__(self, fields: tuple[int, ...] = (5, 7, 3), width: int = 4) -> None:
        super().__init__()
        starts = [sum(fields[:i]) for i in range(len(fields))]
        self.register_buffer("offsets", torch.tensor(starts, dtype=torch.long))
        self.linear, self.embedding = nn.Embedding(sum(fields), 1), nn.Embedding(sum(fields), width)
        self.bias = nn.Parameter(torch.zeros((1,)))
        self.mlp = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(p=0.2), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offsets.unsqueeze(0)
        embed = self.embedding(x)
        square_of_sum = torch.sum(embed, dim=1) ** 2
        sum_of_square = torch.sum(embed**2, dim=1)
        fm = 0.5 * torch.sum(square_of_sum - sum_of_square, dim=1, keepdim=True)
        y = torch.sum(self.linear(x), dim=1) + self.bias + fm + self.mlp(embed.view(-1, 12))
        return y.squeeze(1)


class CrossNet(nn.Module):
    """Low-rank crosses of features with a gate of experts."""

    def __init__(self, width: int = 6, rank: int = 2, experts: int = 2) -> None:
        super().__init__()
        self.U, self.V = (nn.Parameter(torch.randn(experts, width, rank) / 2) for _ in range(2))
        self.C, self.bias = nn.Parameter(torch.randn(experts, rank, rank)), nn.Parameter(torch.zeros(width, 1))
        self.gating = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(experts))
        self.out = nn.Linear(width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        x_0 = inputs.unsqueeze(2)
        x_l = x_0
        for _ in range(2):
            outputs, scores = [], []
            for e, gate in enumerate(self.gating):
                scores.append(gate(x_l.squeeze(2)))
                v_x = torch.tanh(torch.matmul(self.V[e].t(), x_l))
                v_x = torch.tanh(torch.matmul(self.C[e], v_x))
                outputs.append((x_0 * (torch.matmul(self.U[e], v_x) + self.bias)).squeeze(2))
            mixed = torch.matmul(torch.stack(outputs, 2), torch.stack(scores, 1).softmax(1))
            x_l = mixed + x_l
        return self.out(x_l.squeeze()).squeeze(-1)


class TabTransformer(nn.Module):
    """Columns as tokens, next to normalised numbers."""

    def __init__(self, categories: tuple[int, ...] = (4, 3), width: int = 8) -> None:
        super().__init__()
        self.embeds = nn.Embedding(sum(categories), width)
        self.register_buffer("categories_offset", torch.tensor([0, 4]))
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.1, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(3)
        self.numbers = nn.Parameter(torch.randn(3, width))
        self.mlp = nn.Sequential(nn.Linear(2 * width + 3 * width, 8), nn.SELU(), nn.Linear(8, 2))

    def forward(self, x_categ: Tensor, x_cont: Tensor) -> Tensor:
        assert x_categ.shape[-1] == 2, "two columns"
        x = self.transformer(self.embeds(x_categ + self.categories_offset))
        numbers = torch.einsum("bi,id->bid", self.norm(x_cont), self.numbers)
        return self.mlp(torch.cat((x.flatten(1), numbers.flatten(1)), dim=-1))


class MixerBlock(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 12), nn.GELU(), nn.Linear(12, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.ln1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.ln2(x))


class Mixer(nn.Module):
    """Patches by unfold."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.proj = nn.Linear(48, width)
        self.blocks = nn.Sequential(*[MixerBlock(4, width) for _ in range(2)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 5))

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, kernel_size=4, stride=4).mT
        return self.head[1](self.head[0](self.blocks(self.proj(patches))).mean(1))


class GatedMLP(nn.Module):
    """A spatial gate initialised near one."""

    def __init__(self, width: int = 8, length: int = 5) -> None:
        super().__init__()
        self.norm, self.gate_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.proj_in, self.proj_out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.spatial = nn.Conv1d(length, length, kernel_size=1)
        nn.init.constant_(self.spatial.bias, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        u, v = F.gelu(self.proj_in(self.norm(x))).chunk(2, dim=-1)
        x = u * self.spatial(self.gate_norm(v))
        return self.proj_out(x) + residual


class HyperNetwork(nn.Module):
    """The weights of a convolution and of a layer come from a network."""

    def __init__(self, code: int = 4) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.randn(2, code))
        self.w1, self.b1 = nn.Parameter(torch.randn(code, 54) / 4), nn.Parameter(torch.zeros(54))
        self.head = nn.Linear(code, 3 * 2 + 3)

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.z[0] @ self.w1 + self.b1).view(2, 3, 3, 3)
        x = F.conv2d(x, kernel, padding=1)
        pooled = F.relu(x).mean((-2, -1))
        parameters = self.head(self.z[1])
        weight, bias = parameters[:6].view(3, 2), parameters[6:]
        return F.linear(pooled, weight, bias)


class DynamicConv(nn.Module):
    """A mixture of kernels for each sample, run as one grouped convolution."""

    def __init__(self, kernels: int = 3) -> None:
        super().__init__()
        self.attention = nn.Linear(3, kernels)
        self.weight = nn.Parameter(torch.randn(kernels, 4, 3, 3, 3) / 5)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        batch_size, in_planes, height, width = x.size()
        scores = F.softmax(self.attention(F.adaptive_avg_pool2d(x, 1).flatten(1)) / 2.0, dim=1)
        weight = torch.mm(scores, self.weight.view(self.kernels, -1).to(scores.dtype)).view(-1, in_planes, 3, 3)
        out = F.conv2d(x.reshape(1, -1, height, width), weight=weight, padding=1, groups=batch_size)
        return out.view(batch_size, 4, out.size(-2), out.size(-1))


class LoRA(nn.Module):
    """A frozen layer with a low-rank update, and one merged into the weight."""

    def __init__(self, width: int = 8, r: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(r, width)), nn.Parameter(torch.randn(width, r) / 4)
        self.magnitude = nn.Parameter(torch.ones(width))
        self.dropout, self.scaling = nn.Dropout(0.1), 2.0

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        update = (self.dropout(x) @ self.lora_A.transpose(0, 1) @ self.lora_B.transpose(0, 1)) * self.scaling
        merged = self.base.weight + self.lora_B @ self.lora_A * self.scaling
        norm = merged.norm(p=2, dim=1, keepdim=True).detach()
        dora = F.linear(x, self.magnitude.view(-1, 1) * merged / norm)
        return result + update.to(result.dtype) + dora


class Deferred(nn.Module):
    """Quantile outputs from a tree of soft decisions."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 2**depth - 1)
        self.leaves = nn.Parameter(torch.randn(2**depth, 3))
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.inner(x)).unsqueeze(-1)
        p = torch.cat((p, 1 - p), dim=-1)
        mu = x.new_ones(x.shape[0], 1, 1)
        begin = 0
        for layer in range(self.depth):
            end = begin + 2**layer
            mu = mu.reshape(x.shape[0], -1, 1).repeat(1, 1, 2) * p[:, begin:end]
            begin = end
        return mu.reshape(x.shape[0], -1) @ self.leaves


def pinball_loss(predicted: Tensor, target: Tensor) -> Tensor:
    levels = torch.tensor([0.1, 0.5, 0.9], device=target.device)
    error = target.unsqueeze(-1) - predicted
    return torch.max(levels * error, (levels - 1) * error).mean()


def _dlrm() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    bags = [torch.randint(0, 10, (6,)) for _ in range(3)]
    return torch.randn(2, 5), bags, [torch.tensor([0, 2]), torch.tensor([0, 4]), torch.tensor([0, 0])]


TABULAR: dict[str, Case] = {
    "dlrm": Case(
        DLRM, _dlrm, loss=nn.BCELoss(), loss_args=lambda: (torch.tensor([0.0, 1.0]),), gpu=False, symbolic=False
    ),
    "deepfm": Case(
        DeepFM,
        lambda: (torch.randint(0, 3, (4, 3)),),
        loss=F.binary_cross_entropy_with_logits,
        loss_args=lambda: (torch.tensor([0.0, 1.0, 1.0, 0.0]),),
    ),
    "crossnet": Case(CrossNet, randn((4, 6)), loss=nn.MSELoss(), loss_args=randn((4,))),
    "tab_transformer": Case(
        TabTransformer,
        lambda: (torch.randint(0, 3, (4, 2)), torch.randn(4, 3)),
        loss=F.cross_entropy,
        loss_args=labels(2, 4),
        opaque=2,
    ),
    "mixer": Case(Mixer, images(), loss=F.cross_entropy, loss_args=labels(5)),
    "gated_mlp": Case(GatedMLP, randn((2, 5, 8)), loss=F.mse_loss, loss_args=randn((2, 5, 8))),
    "hypernetwork": Case(HyperNetwork, images(), loss=F.cross_entropy, loss_args=labels(3)),
    "dynamic_conv": Case(DynamicConv, images(), loss=F.mse_loss, loss_args=images(4)),
    "lora": Case(LoRA, randn((4, 8)), loss=F.mse_loss, loss_args=randn((4, 8))),
    "soft_tree": Case(Deferred, randn((4, 6)), loss=pinball_loss, loss_args=randn((4,))),
}
