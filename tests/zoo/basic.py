"""The models that other tests use by name."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import BF16, Case

__all__ = ["BASIC"]


class Attention(nn.Module):
    """Explicit attention with separate projections, used causally."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            m(x).view(b, t, self.heads, c // self.heads).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(c // self.heads)
        if mask is not None:
            scores = scores.masked_fill(mask, -3e4)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Decoder with tied embeddings."""

    def __init__(self, vocab: int = 23, width: int = 16) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(12, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ResNet(nn.Module):
    """Two residual blocks with batch norm and in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(F.relu(y), 1), 1))


class UNet(nn.Module):
    """Down, up, and a skip connection through ``cat``."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 12, 3, padding=1, stride=2)
        self.norm = nn.GroupNorm(3, 12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        skip = F.silu(self.down1(x))
        deep = F.silu(self.norm(self.down2(skip)))
        up = F.interpolate(self.up(deep), scale_factor=1.0, mode="nearest")
        return {"mask": self.out(torch.cat([skip, up], dim=1)), "deep": deep}


class Recurrent(nn.Module):
    """LSTM and GRU as whole modules, a cell unrolled."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(6, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.cell = nn.GRUCell(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, _) = self.lstm(x)
        y, _ = self.gru(y)
        state = h[0]
        for t in range(3):
            state = self.cell(y[:, t], state)
        return self.out(state)


class Experts(nn.Module):
    """Dense mixture of experts, with shared weights used twice and a mutated buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.shared = nn.Linear(8, 3), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))
        self.register_buffer("load", torch.zeros(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.shared(torch.tanh(self.shared(x)))
        weight = self.gate(x).softmax(-1)
        with torch.no_grad():
            self.load.mul_(0.9).add_(weight.float().mean(0))
        parts = torch.stack([expert(x) for expert in self.experts], dim=1)
        mixed = torch.einsum("be,bed->bd", weight, parts)
        return mixed, (weight * weight.log()).sum(-1).mean()


class Scan(nn.Module):
    """A small state space recurrence with float32 parameters as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.linspace(-1, 1, 8))
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        u = self.project(x)
        state = torch.zeros_like(u[:, 0])
        outputs = []
        for t in range(4):
            state = state * torch.exp(-torch.exp(self.log_decay)) + u[:, t]
            outputs.append(state)
        return torch.stack(outputs, 1).cumsum(1)


class MessagePassing(nn.Module):
    """Gather, message, scatter over an edge list."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(8, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        sent = self.message(x)[edges[0]]
        gathered = torch.zeros_like(x, dtype=sent.dtype).index_add(0, edges[1], sent)
        return self.update(torch.cat([x.to(gathered.dtype), gathered], -1)).log_softmax(-1)


class Regions(nn.Module):
    """Autocast and grad-mode regions of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    @torch.autocast("cpu", enabled=False)
    def protected(self, x: Tensor) -> Tensor:
        return self.b(x.float())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        low = self.a(x)
        full = self.protected(low)
        with torch.autocast("cpu", enabled=False):
            product = torch.mm(full.float(), low.float())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                again = torch.mm(product, self.c.weight)
        with torch.no_grad():
            target = self.a(full)
            with torch.enable_grad():
                live = self.a(product)
        with torch.inference_mode():
            statistic = self.c(x).mean()
        return low, full, product, again, target, live, statistic + 1


class Autoencoder(nn.Module):
    """Several outputs for a loss of several parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mean, self.scale, self.decode = (nn.Linear(a, b) for a, b in ((8, 8), (8, 2), (8, 2), (2, 8)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = F.elu(self.encode(x))
        mean, log_scale = self.mean(hidden), self.scale(hidden)
        sample = mean + torch.randn_like(mean) * log_scale.exp()
        return {"image": torch.sigmoid(self.decode(sample)), "mean": mean, "log_scale": log_scale}


def autoencoder_loss(output: dict[str, Tensor], x: Tensor) -> Tensor:
    image, mean, log_scale = output["image"], output["mean"], output["log_scale"]
    divergence = -0.5 * (1 + 2 * log_scale - mean.pow(2) - (2 * log_scale).exp()).sum(-1).mean()
    return F.binary_cross_entropy(image, x) + F.mse_loss(image, x) + 0.1 * divergence


class WeightTricks(nn.Module):
    """Weights that autocast's cache does not hold: views, products, normalised ones; and frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.left, self.right = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = self.base.chunk(2)
        x = F.linear(x, torch.cat([lower, upper]))
        x = x @ (self.left @ self.right)
        x = F.linear(x, self.left[:, :8]) + F.linear(x, self.left)
        return self.frozen(self.norm(x)) + self.frozen(x) + self.norm(x)


class Stack(nn.Module):
    """Modules of torch that are made of several operators."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.bilinear, self.prelu = nn.Bilinear(8, 8, 4), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        z = self.layer(y).float()
        return self.prelu(self.bilinear(z, x))


class MixedArguments(nn.Module):
    """Dict and tuple inputs, defaults, keyword-only flags."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(
        self, batch: dict[str, Tensor], pair: tuple[Tensor, Tensor], scale: float = 2.0, *, flip: bool = False
    ) -> Any:
        a, b = pair
        y = self.fc(batch["x"]) * scale + a
        return (y, [b, {"neg": -y if flip else y}])


def _image() -> tuple[Any, ...]:
    return (torch.randn(2, 3, 8, 8),)


def _rows() -> tuple[Any, ...]:
    return (torch.randn(4, 8),)


def _tokens() -> tuple[Any, ...]:
    return (torch.randint(0, 23, (2, 7)),)


BASIC: dict[str, Case] = {
    "mlp": Case(lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), _rows),
    "mlp_loss": Case(
        lambda: nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4)),
        _rows,
        loss=F.cross_entropy,
        loss_args=lambda: (torch.tensor([0, 1, 2, 3]),),
    ),
    "attention": Case(Attention, lambda: (torch.randn(2, 5, 16, requires_grad=True),)),
    "attention_masked": Case(
        Attention, lambda: (torch.randn(2, 5, 16),), {"mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}
    ),
    "gpt": Case(GPT, _tokens),
    "gpt_loss": Case(
        GPT,
        _tokens,
        loss=lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()),
        loss_args=lambda: (torch.randint(0, 23, (2, 7)),),
    ),
    "resnet": Case(ResNet, _image),
    "unet": Case(UNet, _image),
    # oneDNN has no float16 LSTM on the CPU.
    "recurrent": Case(Recurrent, lambda: (torch.randn(2, 3, 6),), dtypes=BF16, opaque=5),
    "experts": Case(Experts, _rows, opaque=1),
    "scan": Case(Scan, lambda: (torch.randn(2, 4, 8),)),
    "messages": Case(MessagePassing, lambda: (torch.randn(5, 8), torch.randint(0, 5, (2, 9)))),
    "regions": Case(Regions, lambda: (torch.randn(8, 8, requires_grad=True),), gpu=False),
    "autoencoder": Case(
        Autoencoder,
        lambda: (torch.rand(4, 8),),
        loss=autoencoder_loss,
        loss_args=lambda: (torch.rand(4, 8),),
        gpu=False,
    ),
    "weights": Case(WeightTricks, _rows, opaque=2),
    "stack": Case(Stack, lambda: (torch.randn(2, 4, 8),), opaque=3),
    "arguments": Case(MixedArguments, lambda: ({"x": torch.randn(4, 8)}, (torch.randn(4, 8), torch.randn(4, 8)))),
    "arguments_given": Case(
        MixedArguments,
        lambda: ({"x": torch.randn(4, 8)}, (torch.randn(4, 8), torch.randn(4, 8))),
        {"scale": 3.0, "flip": True},
    ),
}
