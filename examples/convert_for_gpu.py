"""Convert for a GPU on a machine without one, and see where its rules differ from the CPU's."""

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxamp


class Attention(nn.Module):
    """One head of attention, added to what came in, and normalised."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.mT * self.scale, dim=-1)
        return x + self.norm(weights @ v)


def main() -> None:
    model = Attention()
    x = torch.zeros(4, 8, 32)  # only its shape and dtype count: nothing is computed

    cpu, cuda = (
        fxamp.convert(model, example_inputs=(x,), dtype=torch.bfloat16, device_type=device).report().to_dict()
        for device in ("cpu", "cuda")
    )
    rows = []
    for here, there in zip(cpu["nodes"], cuda["nodes"], strict=True):
        sides = [[node["rule"], node["output"], node["casts"]] for node in (here, there)]
        mark = "differs" if sides[0] != sides[1] else ""
        rows.append([here["name"], here["op"], *sides[0], *sides[1], mark])

    print(tabulate(rows, ("name", "op", "cpu", "output", "casts", "cuda", "output", "casts", "")))
    print(f"\ncasts: {cpu['totals']['casts']} on cpu, {cuda['totals']['casts']} on cuda")


if __name__ == "__main__":
    main()
