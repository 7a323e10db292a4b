"""Compare one training step with torch.autocast: bit for bit, and by the number of casts."""

import copy

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxamp


class CastCount(TorchDispatchMode):
    """Counts the tensors that are copied to another dtype, in the forward and in the backward."""

    casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.casts += func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype
        return result


def step(model: nn.Module, forward) -> tuple[int, Tensor, list[Tensor]]:
    """The casts of one training step, the output, and the gradients."""
    with CastCount() as count:
        loss, output = forward()
        loss.backward()
    return count.casts, output.detach(), [parameter.grad for parameter in model.parameters()]


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(8 * 32, 10))
    x, y = torch.randn(16, 8, 32), torch.randint(10, (16,))

    def autocast(model: nn.Module) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
            return F.cross_entropy(output, y), output

    casts, output, gradients = step(model, lambda: autocast(model))
    rows = [["torch.autocast", casts, "", ""]]
    for policy in ("autocast", "fast"):
        amp = fxamp.convert(copy.deepcopy(model), loss=F.cross_entropy, dtype=torch.bfloat16, policy=policy)
        amp.zero_grad()
        casts, ours, ours_grad = step(amp, lambda amp=amp: amp(x, y))
        same = all(map(torch.equal, gradients, ours_grad))
        rows.append([f"fxamp {policy}", casts, torch.equal(output, ours), same])
    print(tabulate(rows, ("one training step", "casts", "output is equal", "gradients are equal")))


if __name__ == "__main__":
    main()
