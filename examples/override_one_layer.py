"""Keep one layer and one operator in float32, and see which decisions that changes."""

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxamp

COLUMNS = ("rule", "runs_in", "output", "casts", "reason")


class Attention(nn.Module):
    """One head of attention, and a classifier."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.mT * self.scale, dim=-1)
        return self.head((weights @ v).mean(dim=1))


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 32)
    before = fxamp.Policy.autocast("cpu", torch.bfloat16)
    after = before.with_modules({"head": "fp32"}).with_ops({torch.softmax: "fp32"})

    amp = fxamp.convert(Attention(), example_inputs=(x,), policy=before)
    changed = amp.replan(after)  # the same graph and parameters, nothing is traced again

    rows = []
    pairs = zip(amp.report().to_dict()["nodes"], changed.report().to_dict()["nodes"], strict=True)
    for old, new in pairs:
        if any(old[column] != new[column] for column in COLUMNS):
            rows.append(["before", old["name"], *(old[column] for column in COLUMNS)])
            rows.append(["after", new["name"], *(new[column] for column in COLUMNS)])

    print(f"before: {before}\nafter:  {after}\n")
    print(tabulate(rows, ("", "name", *COLUMNS)))
    print(f"\noutput before: {amp(x).dtype}, after: {changed(x).dtype}")


if __name__ == "__main__":
    main()
