"""Compare one training step with torch.autocast: bit for bit, and by the number of casts."""

from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxamp

Run = tuple[int, Tensor, list[Tensor]]


class Attention(nn.Module):
    """One head of attention between two layers."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(width, width), nn.Linear(width, classes)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.embed(x)
        return self.head(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(dim=1))


class CastCount(TorchDispatchMode):
    """Counts the tensors that are copied to another dtype, in the forward and in the backward."""

    casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.casts += func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype
        return result


def main() -> None:
    torch.manual_seed(0)
    model, x, y = Attention(), torch.randn(16, 8, 32), torch.randint(10, (16,))

    def autocast(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
            return F.cross_entropy(output, y), output

    def step(forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Run:
        with CastCount() as count:
            loss, output = forward(x, y)
            gradients = torch.autograd.grad(loss, tuple(model.parameters()))
        return count.casts, output, gradients

    casts, output, gradients = step(autocast)
    rows = [["torch.autocast", casts]]
    for policy in ("autocast", "fast"):
        amp = fxamp.convert(model, loss=F.cross_entropy, dtype=torch.bfloat16, policy=policy)
        casts, ours, found = step(amp)
        rows.append([f"fxamp {policy}", casts, torch.equal(ours, output), all(map(torch.equal, found, gradients))])
    print(tabulate(rows, ("one training step", "casts", "output is equal", "gradients are equal")))


if __name__ == "__main__":
    main()
