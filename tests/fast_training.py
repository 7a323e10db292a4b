"""Where does training end in float32, under torch.autocast and under "fast"? ``python -m tests.fast_training`` shows.

Two tasks: handwritten digits, and the next character of the texts that ``help()`` has of Python. A run is told by its
seed, which makes the weights and the order of the data; the spread over seeds in float32 is the noise that a policy has
to stay within.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fxamp
from tests.fast_numerics import all_low_of

__all__ = ["POLICIES", "TASKS", "Task", "ends", "main", "train"]

POLICIES = ("float32", "autocast", "fast", "fast, all low", "wholly low")
LOW = torch.bfloat16
LENGTH = 32


class Block(nn.Module):
    """Attention and a small network, before each a norm, after each a sum."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (m(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(mask, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Characters(nn.Module):
    """The next one of 96 characters, from those before it."""

    def __init__(self, width: int = 48, length: int = LENGTH) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(96, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 96)
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x)).flatten(0, 1)


def convnet() -> nn.Module:
    """Three convolutions with batch norm, for 8x8 images."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()]

    layers = [*stage(1, 16), nn.MaxPool2d(2), *stage(16, 32), *stage(32, 32), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


class Rows(nn.Module):
    """A transformer that reads an 8x8 image as 8 rows."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)
        self.register_buffer("mask", torch.zeros(8, 8, dtype=torch.bool))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.squeeze(1)) + self.position
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x).mean(1))


Batch = tuple[Tensor, Tensor]


class Task(NamedTuple):
    """A model, batches for training by seed and step, and one to judge it by."""

    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    validation: Callable[[], Batch]
    steps: int
    rate: float


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(images).float().reshape(-1, 1, 8, 8)[order] / 16, torch.from_numpy(labels)[order]


def _digits_batch(generator: torch.Generator) -> Batch:
    chosen = torch.randint(0, 1200, (64,), generator=generator)
    images, labels = (part[chosen] for part in _digits())
    return images + 0.3 * torch.randn(images.shape, generator=generator), labels


@functools.cache
def _text() -> Tensor:
    text = "".join(topics[name] for name in sorted(topics))
    return torch.tensor([min(max(ord(character) - 31, 0), 95) for character in text])


def _windows(starts: Tensor) -> Batch:
    windows = _text()[starts.unsqueeze(1) + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:].flatten()


def _characters_batch(generator: torch.Generator) -> Batch:
    return _windows(torch.randint(0, len(_text()) * 9 // 10, (12,), generator=generator))


def _digits_left() -> Batch:
    images, labels = _digits()
    return images[1200:], labels[1200:]


def _characters_left() -> Batch:
    return _windows(torch.arange(len(_text()) * 9 // 10, len(_text()) - LENGTH, 10 * LENGTH))


TASKS = {
    "digits, convolutions": Task(convnet, _digits_batch, _digits_left, 120, 3e-3),
    "digits, attention": Task(Rows, _digits_batch, _digits_left, 150, 3e-3),
    "characters": Task(Characters, _characters_batch, _characters_left, 200, 5e-3),
}


def _run(task: Task, policy: str) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """What is trained, and the loss of a batch."""
    model = task.make()
    if policy.startswith("fast"):
        shown = task.batch(torch.Generator().manual_seed(0))
        amp = fxamp.convert(model, F.cross_entropy, policy="fast", dtype=LOW, example_inputs=shown)
        amp = amp if policy == "fast" else all_low_of(amp, "cpu")
        return amp, lambda batch: amp(*batch)[0]
    if policy == "wholly low":
        model.to(LOW)

    def loss(batch: Batch) -> Tensor:
        inputs, labels = batch
        given: Any = inputs.to(LOW) if policy == "wholly low" and inputs.is_floating_point() else inputs
        with torch.autocast("cpu", LOW) if policy == "autocast" else nullcontext():
            return F.cross_entropy(model(given), labels)

    return model, loss


def train(task: Task, policy: str, seed: int) -> float:
    """The validation loss after training.

    Args:
        task: what to learn.
        policy: "float32", "autocast" or "fast"; "fast, all low", in which every operator that may choose is low; or
            "wholly low", with weights in bfloat16, which is known to be worse.
        seed: of the weights and of the order of the data.
    """
    torch.manual_seed(seed)
    model, loss_of = _run(task, policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / task.steps))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        optimizer.zero_grad()
        loss_of(task.batch(generator)).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return loss_of(task.validation()).item()


@functools.cache
def ends(name: str, policy: str, seeds: int) -> tuple[float, ...]:
    """The validation losses of a task, one a seed."""
    return tuple(train(TASKS[name], policy, seed) for seed in range(seeds))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints where training ends, by task and policy."""
    parser = argparse.ArgumentParser(prog="python -m tests.fast_training", description=main.__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=", ".join(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args(arguments)
    rows = []
    for name in given.tasks:
        noise = statistics.stdev(ends(name, "float32", given.seeds))
        for policy in POLICIES:
            found = ends(name, policy, given.seeds)
            away = statistics.fmean(found) - statistics.fmean(ends(name, "float32", given.seeds))
            rows.append([name, policy, statistics.fmean(found), statistics.stdev(found), away / noise])
    headers = ["task", "policy", "validation loss", "over seeds", "away from float32, in its deviations"]
    print(tabulate(rows, headers, floatfmt=("", "", ".4f", ".4f", "+.2f")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
