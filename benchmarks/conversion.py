"""How long does a conversion take, beside tracing alone?

``python -m benchmarks.conversion`` prints a table, in seconds: ``torch.fx.symbolic_trace``; a plain ``torch.fx.Tracer``
into the modules that a conversion sees into, once in each mode; and ``fxamp.convert``, without and with example inputs.
All of a row are timed in turns, and the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxamp

HEADERS = ("model", "nodes", "symbolic_trace", "two traces", "convert", "ratio", "with examples", "ratio")


class Residual(nn.Module):
    """A block of a ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        changes = stride != 1 or inputs != outputs
        short = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.short = nn.Sequential(*short) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.short(x))


def resnet() -> nn.Module:
    widths = ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2))
    blocks = (Residual(*each) for i, o, s in widths for each in ((i, o, s), (o, o, 1)))
    stem = (nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def mlp(depth: int = 64) -> nn.Module:
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU())))


class Block(nn.Module):
    """A layer of a transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(attended)
        return x + self.mlp(self.norm2(x))


def transformer(depth: int) -> nn.Module:
    return nn.Sequential(*(Block(32, 4) for _ in range(depth)), nn.LayerNorm(32), nn.Linear(32, 10))


class Chain(nn.Module):
    """Many small operators and few modules."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.length // 5):
            x = torch.tanh(x @ self.weight + x) * 0.5 - x
        return x


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "ResNet-18, narrow": lambda: (resnet(), torch.randn(2, 3, 64, 64)),
    "MLP, 64 layers": lambda: (mlp(), torch.randn(2, 32)),
    "transformer, 12 blocks": lambda: (transformer(12), torch.randn(2, 8, 32)),
    "transformer, 48 blocks": lambda: (transformer(48), torch.randn(2, 8, 32)),
    "5,000 nodes": lambda: (Chain(5_000), torch.randn(2, 8)),
    "20,000 nodes": lambda: (Chain(20_000), torch.randn(2, 8)),
}


class Plain(fx.Tracer):
    """Traces into what a conversion sees into, and does nothing else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d | nn.Dropout)


def two_traces(model: nn.Module) -> None:
    for mode in (True, False):
        Plain().trace(model.train(mode))
    model.train()


def measure(make: Callable[[], tuple[nn.Module, Tensor]], policy: str, rounds: int) -> list[Any]:
    """The nodes of a model, and its row of the table."""
    model, x = make()
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_type": "cpu", "policy": policy}
    ways: tuple[Callable[[], Any], ...] = (
        lambda: fx.symbolic_trace(model),
        lambda: two_traces(model),
        lambda: fxamp.convert(model, **options),
        lambda: fxamp.convert(model, example_inputs=(x,), **options),
    )
    taken: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way()  # what is made once in a process is no cost of a conversion
    for _ in range(rounds):
        for way, times in zip(ways, taken, strict=True):
            gc.collect()
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
    symbolic, traces, convert, examples = map(statistics.median, taken)
    nodes = len(fxamp.convert(model, **options).plan)
    return [nodes, symbolic, traces, convert, convert / traces, examples, examples / traces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policy", default="autocast")
    parser.add_argument("models", nargs="*", help=f"parts of the names: {', '.join(MODELS)}")
    given = parser.parse_args()
    wanted = [name for name in MODELS if not given.models or any(part in name for part in given.models)]
    torch.manual_seed(0)
    rows = [[name, *measure(MODELS[name], given.policy, given.rounds)] for name in wanted]
    print(tabulate(rows, headers=HEADERS, floatfmt=("", "", *[".3f"] * 3, ".1f", ".3f", ".1f")))


if __name__ == "__main__":
    main()
