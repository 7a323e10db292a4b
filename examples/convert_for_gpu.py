"""Convert for a GPU on a machine without one, and see where its rules differ from the CPU's."""

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxamp


class Attention(nn.Module):
    """One head of attention, added to what came in, and normalised."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.mT / x.shape[-1] ** 0.5, dim=-1)
        return self.norm(weights @ v)


def main() -> None:
    model = Attention()
    x = torch.zeros(4, 8, 32)  # only its shape and dtype count: nothing is computed

    reports = [
        fxamp.convert(model, example_inputs=(x,), dtype=torch.bfloat16, device_type=device).report().to_dict()
        for device in ("cpu", "cuda")
    ]
    rows = []
    for cpu, cuda in zip(*(report["nodes"] for report in reports), strict=True):
        sides = [[node["rule"], node["runs_in"], node["casts"]] for node in (cpu, cuda)]
        rows.append([cpu["name"], cpu["op"], *sides[0], *sides[1], "" if sides[0] == sides[1] else "<-"])
    print(tabulate(rows, ("name", "op", "cpu", "runs in", "casts", "cuda", "runs in", "casts", "")))
    print("\ncasts:", ", ".join(f"{report['totals']['casts']} on {report['device_type']}" for report in reports))


if __name__ == "__main__":
    main()
