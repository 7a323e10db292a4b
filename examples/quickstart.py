"""Convert a model, call it, and read the table of what was decided."""

import torch
from torch import Tensor, nn

import fxamp


class Attention(nn.Module):
    """One head of attention, added to what came in, and a classifier."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.mT * self.scale, dim=-1)
        return self.head((x + weights @ v).mean(dim=1))


def main() -> None:
    torch.manual_seed(0)
    model = Attention()
    images = torch.randn(4, 8, 32)

    # The example inputs are optional: without them the table has a "?" where a dtype depends on the input.
    amp = fxamp.convert(model, example_inputs=(images,), dtype=torch.bfloat16)

    output = amp(images)
    print(f"output: {output.dtype}, parameters: {next(amp.parameters()).dtype}\n")
    print(amp.report())

    # The converted model shares its parameters with the original, under the same names.
    assert amp.head.weight is model.head.weight
    assert amp.state_dict().keys() == model.state_dict().keys()


if __name__ == "__main__":
    main()
