"""Train two small networks on handwritten digits in two or three precisions, and compare them.

Run it with ``make demo``. It takes about a minute on two CPU cores.
"""

import sys
import time
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxamp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 64

# How to convert a model for each precision: this is all that differs between the runs.
PRECISIONS = {
    "f32": {"policy": "full"},
    "bf16": {"dtype": torch.bfloat16},
    "f16": {"dtype": torch.float16},
}


class Block(nn.Module):
    """One layer of a transformer: attention, then a small network, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Reads an 8x8 image as a sequence of 8 rows."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(8, width) / 8)
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.embed(images.squeeze(1)) + self.position)
        return self.head(self.norm(x).mean(1))


def convnet() -> nn.Module:
    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*stage(1, 16), *stage(16, 32), nn.Flatten(), nn.Linear(32 * 4, 10))


class CastCount(TorchDispatchMode):
    """Counts every conversion of a floating-point tensor to another floating-point dtype."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            before, after = args[0].dtype, result.dtype
            self.total += before != after and before.is_floating_point and after.is_floating_point
        return result


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images, then training and test labels."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype("float32") / 16
    parts = train_test_split(images, labels, test_size=0.3, stratify=labels, random_state=0)
    return tuple(torch.from_numpy(part).to(DEVICE) for part in parts)


def batches(x: Tensor, y: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training data with some noise, in an order that depends on the epoch alone."""
    generator = torch.Generator().manual_seed(epoch)
    noise = 0.2 * torch.randn(x.shape, generator=generator)
    for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
        yield x[chosen] + noise[chosen].to(DEVICE), y[chosen]


def show(line: str, done: bool) -> None:
    """One line that is written over on a terminal, a line each elsewhere."""
    terminal = sys.stdout.isatty()
    print(f"\r{line}" if terminal else line, end="" if terminal and not done else "\n", flush=True)


def train(label: str, amp: fxamp.AmpModule, data: tuple[Tensor, ...], epochs: int) -> list[object]:
    """Train one network in one precision; its numbers for the summary."""
    x, test_x, y, test_y = data
    with CastCount() as casts:  # one forward and one backward, only to count
        amp.scaler.backward(amp(x[:BATCH], y[:BATCH])[0])
    amp.zero_grad()
    skipped, start = 0, time.perf_counter()
    optimizer = torch.optim.AdamW(amp.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for inputs, labels in batches(x, y, epoch):
            loss, _ = amp(inputs, labels)  # the forward and the loss, in one graph
            amp.scaler.backward(loss)  # scales first, in float16
            amp.scaler.step(optimizer)  # skips the step if a gradient overflowed
            amp.scaler.update()
            optimizer.zero_grad()
            skipped += amp.scaler.skipped
        schedule.step()
        show(f"{label}: epoch {epoch + 1}/{epochs}, loss {loss.item():.4f}", epoch + 1 == epochs)
    seconds = time.perf_counter() - start
    amp.eval()
    with torch.no_grad():
        _, output = amp(test_x, test_y)
    accuracy = 100 * (output.argmax(1) == test_y).double().mean().item()
    scale = amp.scaler.get_scale() if amp.scaler.is_enabled() else None
    return [accuracy, casts.total, skipped, scale, seconds]


def main() -> None:
    data, rows = digits(), []
    for name, build, epochs in (("transformer", Transformer, 30), ("convnet", convnet, 12)):
        for precision, options in PRECISIONS.items():
            if (name, precision, DEVICE) == ("convnet", "f16", "cpu"):
                continue  # the backward of a float16 convolution takes seconds a step on a CPU
            torch.manual_seed(0)  # every run starts from the same weights
            amp = fxamp.convert(build().to(DEVICE), loss=F.cross_entropy, **options)
            if (name, precision) == ("convnet", "bf16"):
                print(f"\n{amp.report()}\n")
            rows.append([name, precision, *train(f"{name} {precision}", amp, data, epochs)])
    headers = "network, precision, accuracy %, casts a step, skipped steps, final scale, seconds".split(", ")
    print("\n" + tabulate(rows, headers, floatfmt=("", "", ".1f", "", "", ".0f", ".1f")))


if __name__ == "__main__":
    main()
