"""How many parts a call gives is known without example inputs where the call alone tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxamp
from tests.helpers import assert_same, check_against_autocast


class Net(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.gru, self.function = nn.Linear(8, 8), nn.GRU(8, 8), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.fc(x))


def summed_chunks(m: Any, x: Tensor) -> Any:
    total = 0
    for part in x.chunk(4):
        total = total + part.sum(0)
    return total


TOLD: dict[str, Callable[[Any, Tensor], Any]] = {
    "topk": lambda m, x: sum(part.double() for part in x.topk(2)),
    "topk, by keyword": lambda m, x: tuple(torch.topk(x, k=2, dim=-1)),
    "max of a dimension": lambda m, x: tuple(x.max(1)),
    "max of a dimension, by keyword": lambda m, x: list(x.max(dim=1, keepdim=True)),
    "a star": lambda m, x: [*x.max(1), x],
    "len": lambda m, x: [x.max(1)[i] for i in range(len(x.max(1)))],
    "sort": lambda m, x: list(x.sort(-1, descending=True)),
    "var_mean": lambda m, x: list(torch.var_mean(x, 1)),
    "meshgrid": lambda m, x: [t * 2 for t in torch.meshgrid(x[0], x[1], indexing="ij")],
    "meshgrid of a list": lambda m, x: [t * 2 for t in torch.meshgrid([x[0], x[1]], indexing="ij")],
    "broadcast_tensors": lambda m, x: [t * 2 for t in torch.broadcast_tensors(x[0], x)],
    "split by sizes": lambda m, x: list(x.split([2, 6], -1)),
    "torch.split": lambda m, x: list(torch.split(x, [2, 6], dim=-1)),
    "tensor_split": lambda m, x: list(x.tensor_split(3)),
    "tensor_split at places": lambda m, x: list(torch.tensor_split(x, (1, 2), dim=1)),
    "chunk": lambda m, x: list(x.chunk(2)),
    "chunk, into a call": lambda m, x: torch.addcmul(x[:2], *x.chunk(2)),
    "chunk, zipped": lambda m, x: torch.cat([a * b for a, b in zip(x.chunk(2, -1), (1.0, 2.0), strict=True)]),
    "GRU": lambda m, x: [*m.gru(x), x],
}


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("name", TOLD)
def test_the_call_alone_tells(name: str, examples: bool) -> None:
    check_against_autocast(Net(TOLD[name]), torch.randn(4, 8), examples=examples)


NOT_TOLD: dict[str, Callable[[Any, Tensor], Any]] = {
    "split by one size": lambda m, x: list(x.split(2)),
    "unbind": lambda m, x: list(x.unbind(0)),
    "max of two": lambda m, x: list(x.max(x * 2)),
    "max": lambda m, x: list(x.max()),
}


@pytest.mark.parametrize("name", NOT_TOLD)
def test_what_follows_from_sizes_is_not_told(name: str) -> None:
    with pytest.raises(fxamp.CaptureError, match="whose length is not known"):
        fxamp.convert(Net(NOT_TOLD[name]))


def test_a_tensor_that_is_too_short_for_its_chunks_is_an_error() -> None:
    model, x = Net(summed_chunks), torch.randn(8, 8)
    amp = fxamp.convert(model, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(amp(x), model(x))
    with pytest.raises(fxamp.CaptureError, match="the graph was made for 4, found 3"):
        amp(torch.randn(6, 8))


def test_example_inputs_that_are_too_short_for_their_chunks_have_fewer() -> None:
    check_against_autocast(Net(summed_chunks), torch.randn(6, 8), examples=True)
