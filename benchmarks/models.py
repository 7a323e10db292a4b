"""What is measured? Models as people write them, in plain torch, with random weights.

Nothing is downloaded. Their shapes are those of the papers where a name says so; the transformers have few layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BERT", "GPT", "MLP", "ConvNeXt", "LanguageLSTM", "ResNet", "UNet"]


class MLP(nn.Sequential):
    """Deep and narrow: next to nothing to compute in each of its calls."""

    def __init__(self, depth: int, width: int, classes: int = 10) -> None:
        hidden = (part for _ in range(depth) for part in (nn.Linear(width, width), nn.GELU()))
        super().__init__(*hidden, nn.Linear(width, classes))


# -- convolutions ----------------------------------------------------------------------------------------


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """A block of a ResNet: two convolutions, or three of which the outer ones are 1 x 1."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        outputs = width * expansion
        plain = ((inputs, width, 3, stride), (width, outputs, 3, 1))
        bottleneck = ((inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1))
        self.layers = nn.ModuleList(_convolution(*each) for each in (plain if expansion == 1 else bottleneck))
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        y = x
        for layer in inner:
            y = F.relu(layer(y))
        return F.relu(last(y) + self.short(x))


class ResNet(nn.Module):
    """A ResNet-18 with ``(2, 2, 2, 2)`` blocks, a ResNet-50 with ``(3, 4, 6, 3)`` and the expansion 4."""

    def __init__(self, blocks: tuple[int, ...], expansion: int = 1, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(_convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        stages, inputs = [], 64
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                stages.append(Residual(inputs, 64 << stage, stride, expansion))
                inputs = (64 << stage) * expansion
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, then an MLP over the channels, scaled and added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))) * self.scale
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A ConvNeXt, by its blocks and widths."""

    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...], classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0], eps=1e-6)]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            if stage:
                layers += [ChannelNorm(widths[stage - 1], eps=1e-6), nn.Conv2d(widths[stage - 1], width, 2, 2)]
            layers += [ConvNeXtBlock(width) for _ in range(count)]
        self.layers = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(x).mean((-2, -1))))


def _double(inputs: int, outputs: int) -> nn.Sequential:
    first, second = _convolution(inputs, outputs, 3), _convolution(outputs, outputs, 3)
    return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Down, and up again with what each level had: a class for every pixel."""

    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        pairs = list(zip((3, *widths), widths, strict=False))
        self.down = nn.ModuleList(_double(*pair) for pair in pairs)
        back = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.wider = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in back)
        self.up = nn.ModuleList(_double(2 * o, o) for _, o in back)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level, layer in enumerate(self.down):
            x = layer(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for wider, layer, beside in zip(self.wider, self.up, kept[-2::-1], strict=True):
            x = layer(torch.cat((beside, wider(x)), dim=1))
        return self.head(x)


# -- sequences -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Several heads, with one projection to q, k and v or with three."""

    def __init__(self, width: int, heads: int, *, fused: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.fused = fused
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width)] if fused else [nn.Linear(width, width) for _ in "qkv"])
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = [layer(x) for layer in self.qkv]
        parts = parts[0].chunk(3, dim=-1) if self.fused else parts
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class GPTBlock(nn.Module):
    """Attention and an MLP, each after a layer norm."""

    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, fused=fused, causal=True)
        self.mlp = _feed_forward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """As GPT-2: learned positions, norms first, and the embedding is the head's weight too."""

    def __init__(self, width: int, depth: int, heads: int, vocabulary: int, length: int, *, fused: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads, fused=fused) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class BERTLayer(nn.Module):
    """Attention and an MLP, each before a layer norm, with dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads, fused=False, causal=False)
        self.mlp, self.dropout = _feed_forward(width), nn.Dropout(0.1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class BERT(nn.Module):
    """An encoder with a padding mask, that classifies by its first token."""

    def __init__(self, width: int, depth: int, heads: int, vocabulary: int, length: int, classes: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.1)
        self.layers = nn.ModuleList(BERTLayer(width, heads) for _ in range(depth))
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]))
        seen = mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, seen)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class LanguageLSTM(nn.Module):
    """Predicts the next token by an LSTM."""

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        output, _ = self.lstm(self.tokens(tokens))
        return self.head(output)
