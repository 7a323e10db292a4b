"""What was planned for example inputs is used for inputs of their dtypes only; others are planned by rule."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxamp
from tests.helpers import assert_same


class Around(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc, x)


FUNCTIONS = {
    "cat": lambda fc, x: torch.cat([x, fc(x.float())]),
    "prod": lambda fc, x: torch.prod(x, 1),
    "matmul": lambda fc, x: x @ x,
    "sum with a layer": lambda fc, x: fc(x.float()) + x,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("shown", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_another_dtype_is_planned_for(name: str, shown: torch.dtype) -> None:
    model = Around(FUNCTIONS[name])
    x = torch.randn(4, 4)
    try:
        amp = fxamp.convert(model, dtype=torch.bfloat16, example_inputs=(x.to(shown),))
    except fxamp.PlanError:
        assert (name, shown) == ("cat", torch.float16)  # autocast refuses these as well
        return
    for dtype in DTYPES:
        with torch.autocast("cpu", torch.bfloat16):
            try:
                expected = model(x.to(dtype))
            except RuntimeError:
                expected = None
        if expected is None:
            with pytest.raises(RuntimeError):
                amp(x.to(dtype))
        else:
            assert_same(amp(x.to(dtype)), expected, f"shown {shown}, called with {dtype}")


def test_a_scalar_where_the_example_was_none_is_planned_for() -> None:
    model = Around(lambda fc, x: fc(torch.ones(2, 4)) + x)
    amp = fxamp.convert(model, dtype=torch.bfloat16, example_inputs=(torch.randn(4),))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(torch.tensor(2.0)), model(torch.ones(4))
    assert_same((amp(torch.tensor(2.0)), amp(torch.ones(4))), expected)


def test_copies_keep_what_was_shown() -> None:
    amp = fxamp.convert(
        Around(lambda fc, x: x @ x), dtype=torch.bfloat16, example_inputs=(torch.randn(4, 4).bfloat16(),)
    )
    again = copy.deepcopy(amp)
    assert again(torch.ones(4, 4)).dtype == torch.bfloat16


def test_a_submodule_called_self() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self = nn.Linear(4, 4)
            self.out = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(getattr(self, "self")(x))  # noqa: B009

    model, x = Attention(), torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(fxamp.convert(model, dtype=torch.bfloat16)(x), model(x))
