"""Which models, how large, on what? One row a case.

A case is "launch-bound" where the calls cost more than what they compute, and "large" where they do not. The model is
the same on every device, and only the batch is larger on a GPU: there one training step shall fill it. On a CPU a step
takes between a millisecond and about a second on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import BERT, GPT, MLP, ConvNeXt, LanguageLSTM, ResNet, UNet

__all__ = ["KINDS", "SUITE", "Batch", "Case"]

KINDS = ("launch-bound", "large")

Batch = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A model, the sizes of its batch on each type of device, and the loss of ``(output, *targets)``."""

    name: str
    kind: str
    make: Callable[[], nn.Module]
    draw: Callable[..., Batch]
    cpu: tuple[int, ...]
    cuda: tuple[int, ...]
    loss: Callable[..., Tensor] = F.cross_entropy

    def inputs(self, device: str) -> Batch:
        """The inputs of the model and the targets of the loss, always the same ones."""
        torch.manual_seed(0)
        inputs, targets = self.draw(*(self.cuda if device == "cuda" else self.cpu))
        return tuple(x.to(device) for x in inputs), tuple(y.to(device) for y in targets)


def _of_tokens(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def _vectors(batch: int, width: int) -> Batch:
    return (torch.randn(batch, width),), (torch.randint(10, (batch,)),)


def _images(batch: int, size: int) -> Batch:
    return (torch.randn(batch, 3, size, size),), (torch.randint(1000, (batch,)),)


def _pixels(batch: int, size: int) -> Batch:
    return (torch.randn(batch, 3, size, size),), (torch.randint(8, (batch, size, size)),)


def _text(vocabulary: int) -> Callable[..., Batch]:
    def draw(batch: int, length: int) -> Batch:
        tokens = torch.randint(vocabulary, (batch, length + 1))
        return (tokens[:, :-1].contiguous(),), (tokens[:, 1:].contiguous(),)

    return draw


def _padded(vocabulary: int) -> Callable[..., Batch]:
    def draw(batch: int, length: int) -> Batch:
        ends = torch.randint(length // 2, length + 1, (batch, 1))
        tokens = torch.randint(vocabulary, (batch, length))
        return (tokens, torch.arange(length) < ends), (torch.randint(8, (batch,)),)

    return draw


def _gpt(kind: str, shape: tuple[int, int, int, int], cpu: tuple[int, int], cuda: tuple[int, int]) -> list[Case]:
    """Of width, depth, heads and vocabulary: once with one projection to q, k and v, once with three."""

    def make(fused: bool) -> Callable[[], nn.Module]:
        return lambda: GPT(*shape, length=cuda[1], fused=fused)

    names = {f"gpt-d{shape[0]}": True, f"gpt-d{shape[0]}-separate": False}
    draw = _text(shape[3])
    return [Case(name, kind, make(fused), draw, cpu, cuda, _of_tokens) for name, fused in names.items()]


SUITE: tuple[Case, ...] = (
    Case("mlp-48x64", "launch-bound", lambda: MLP(48, 64), _vectors, (32, 64), (128, 64)),
    *_gpt("launch-bound", (128, 4, 4, 512), (2, 32), (4, 128)),
    *_gpt("large", (384, 4, 6, 4096), (2, 128), (64, 512)),
    *_gpt("large", (768, 3, 12, 8192), (2, 128), (32, 1024)),
    Case("bert-d384", "large", lambda: BERT(384, 4, 6, 8192, 512, 8), _padded(8192), (2, 128), (128, 256)),
    Case("resnet-18", "large", lambda: ResNet((2, 2, 2, 2)), _images, (4, 128), (128, 224)),
    Case("resnet-50", "large", lambda: ResNet((3, 4, 6, 3), 4), _images, (4, 112), (128, 224)),
    Case("convnext", "large", lambda: ConvNeXt((2, 2, 4, 2), (64, 128, 256, 512)), _images, (2, 128), (128, 224)),
    Case("u-net", "large", lambda: UNet((32, 64, 128, 256), 8), _pixels, (2, 96), (32, 256)),
    Case("lstm", "large", lambda: LanguageLSTM(512, 2, 4096), _text(4096), (8, 32), (128, 128), _of_tokens),
)
