"""Compare one training step with torch.autocast: what comes out, and how often it casts."""

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxamp


class Attention(nn.Module):
    """One head of attention between two layers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.q, self.k, self.v, self.head = (nn.Linear(width, width) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.embed(x)
        return self.head(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(dim=1))


class CastCount(TorchDispatchMode):
    """Counts the calls that copy tensors to another dtype, forward and backward."""

    casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        other = func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype
        self.casts += other or func is torch.ops.aten._foreach_copy_.default
        return result


def main() -> None:
    torch.manual_seed(0)
    model, x, y = Attention(), torch.randn(16, 8, 32), torch.randint(32, (16,))

    def autocast(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
            return F.cross_entropy(output, y), output

    low, loss = torch.bfloat16, F.cross_entropy
    ours = {f"fxamp {name}": fxamp.convert(model, loss, dtype=low, policy=name) for name in ("autocast", "fast")}
    rows, expected = [], None
    for name, step in {"torch.autocast": autocast, **ours}.items():
        with CastCount() as count:
            loss, output = step(x, y)
            found = output, *torch.autograd.grad(loss, tuple(model.parameters()))
        expected = expected or found
        first, *others = [(a - b).abs().max().item() for a, b in zip(found, expected, strict=True)]
        rows.append([name, count.casts, first, max(others)])
    print(tabulate(rows, ("one training step", "casts", "output differs by", "gradients differ by")))


if __name__ == "__main__":
    main()
