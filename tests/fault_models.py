"""The models that faults are put into: small, of many kinds, each with what it takes to train it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["SAMPLES", "Sample", "layers_of"]

WIDTH, TOKENS, CLASSES, WORDS = 8, 4, 3, 11


class Residual(nn.Module):
    """Blocks that add to what comes in, with or without dropout, and recomputed in the backward pass or not."""

    def __init__(self, dropout: float = 0.0, recomputed: bool = False) -> None:
        super().__init__()
        self.recomputed = recomputed
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.GELU(), nn.Dropout(dropout), nn.Linear(12, WIDTH)
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x))
        return self.head(x)


class Attention(nn.Module):
    """Causal attention; the mask is filled in, added, or given to the fused operator."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        later = torch.ones(TOKENS, TOKENS).triu(1).bool()
        self.register_buffer("later", later)
        self.register_buffer("mask", torch.zeros(TOKENS, TOKENS).masked_fill(later, float("-inf")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.how == "fused":
            return self.out(F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask.to(query.dtype)))
        scores = query @ key.transpose(-1, -2) / WIDTH**0.5
        scores = scores.masked_fill(self.later, float("-inf")) if self.how == "filled" else scores + self.mask
        return self.out(scores.softmax(-1) @ value)


class Transformer(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.attention = nn.LayerNorm(WIDTH), Attention(how)
        self.second, self.mix = (
            nn.LayerNorm(WIDTH),
            nn.Sequential(nn.Linear(WIDTH, 12), nn.SiLU(), nn.Linear(12, WIDTH)),
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first(x))
        x = x + self.mix(self.second(x))
        return self.head(x.mean(1))


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.LeakyReLU(0.1, inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, CLASSES),
        )


class Words(nn.Module):
    """An embedding, summed up, classified; or a table that is the weight of the head, too."""

    def __init__(self, sparse: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH, sparse=sparse)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.act = nn.Tanh()
        self.head = nn.Linear(WIDTH, WORDS if tied else CLASSES)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.mix(self.table(x).mean(1))))


class Recurrent(nn.Module):
    """A GRU, which no pass looks into; an LSTM has no float16 kernel on many CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.cells(x)[0][:, -1]))


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Square(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Square.apply(x)


class Twice(nn.Module):
    """One layer that is called twice, between square activations of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.act, self.head = nn.Linear(WIDTH, WIDTH), Square(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.shared(torch.tanh(self.shared(x)))))


class Sample(NamedTuple):
    """A model, the shape of its input (of words, when it has a number of them), its loss, its number of classes."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    words: int = 0
    classes: int = CLASSES
    loss: Callable[..., torch.Tensor] = F.cross_entropy
    sparse: bool = False

    def batch(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets."""
        if self.words:
            x = torch.randint(self.words, self.shape, generator=generator)
        else:
            x = torch.randn(self.shape, generator=generator)
        if self.loss is F.cross_entropy:
            return x, torch.randint(self.classes, self.shape[:1], generator=generator)
        return x, torch.randn(self.shape[0], self.classes, generator=generator)


SAMPLES = {
    "residual": Sample(Residual, (5, WIDTH)),
    "dropout": Sample(lambda: Residual(0.3), (5, WIDTH), loss=F.mse_loss),
    "recomputed": Sample(lambda: Residual(0.3, recomputed=True), (5, WIDTH)),
    "filled mask": Sample(lambda: Transformer("filled"), (3, TOKENS, WIDTH)),
    "added mask": Sample(lambda: Transformer("added"), (3, TOKENS, WIDTH), loss=F.mse_loss),
    "fused attention": Sample(lambda: Transformer("fused"), (3, TOKENS, WIDTH)),
    "batch norm": Sample(Convolutions, (4, 2, 5, 5)),
    "embedding": Sample(Words, (4, TOKENS), WORDS),
    "sparse": Sample(lambda: Words(sparse=True), (4, TOKENS), WORDS, sparse=True),
    "tied": Sample(lambda: Words(tied=True), (4, TOKENS), WORDS, WORDS),
    "recurrent": Sample(Recurrent, (3, TOKENS, WIDTH)),
    "twice": Sample(Twice, (5, WIDTH), loss=F.mse_loss),
}


def layers_of(model: nn.Module) -> list[str]:
    """The paths of the modules without children: those that are called with one tensor."""
    return [path for path, module in model.named_modules() if path and not list(module.children())]
