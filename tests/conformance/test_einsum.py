"""An einsum is cast as autocast casts the one operator that it comes down to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxamp
from tests.helpers import assert_same, run

EQUATIONS: dict[str, tuple[list[tuple[int, ...]], str]] = {
    "ij,jk->ik": ([(3, 4), (4, 5)], "lower"),
    "ij, kj": ([(3, 4), (5, 4)], "lower"),
    "i,i": ([(4,), (4,)], "lower"),
    "i,i->": ([(4,), (4,)], "lower"),
    "bhid,bhjd->bhij": ([(2, 2, 3, 4), (2, 2, 5, 4)], "lower"),
    "...ij,...jk->...ik": ([(2, 3, 4), (4, 5)], "lower"),
    "b...d,de->b...e": ([(2, 3, 4), (4, 5)], "lower"),
    "bij,ij->b": ([(2, 3, 4), (3, 4)], "lower"),
    "iij,jk->ik": ([(3, 3, 4), (4, 5)], "lower"),
    "i,j->ij": ([(3,), (4,)], "follow"),
    "bi,bi->bi": ([(2, 3), (2, 3)], "follow"),
    "aj,jk->ak": ([(3, 1), (1, 5)], "follow"),
    "ii->i": ([(3, 3)], "follow"),
    "ij->": ([(3, 4)], "follow"),
    "ab,bc->ac": ([(3, 1), (4, 5)], "opaque"),  # summed before the product
    "ij,k->ik": ([(3, 4), (5,)], "opaque"),
    "ij,jk,kl->il": ([(3, 4), (4, 5), (5, 6)], "opaque"),
}


class Einsum(nn.Module):
    """An einsum with weights, which are used directly too: of what it takes, autocast keeps no copy."""

    def __init__(self, equation: str, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.equation = equation
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes[1:])

    def forward(self, x: Tensor) -> Any:
        squares = [weight @ weight.mT @ weight for weight in self.weights if weight.dim() == 2]
        return torch.einsum(self.equation, x, *self.weights), squares, torch.einsum(self.equation, [x, *self.weights])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_an_einsum_is_that_of_autocast(equation: str, examples: bool, dtype: torch.dtype) -> None:
    shapes, rule = EQUATIONS[equation]
    model, x = Einsum(equation, shapes), torch.randn(shapes[0], requires_grad=True)
    given = (x.detach(),) if examples else None
    amp = fxamp.convert(copy.deepcopy(model), dtype=dtype, example_inputs=given, device_type="cpu")
    expected, expected_gradients = run(model, (x,), {}, torch.autocast("cpu", dtype))
    found, gradients = run(amp, (x,), {}, torch.enable_grad())
    assert_same(found, expected)
    assert_same({name: gradients[name] for name in expected_gradients}, expected_gradients)
    rules = {decision.rule for decision in amp.plan if decision.op == "torch.einsum"}
    assert rules == ({rule} if examples else {"follow" if len(shapes) == 1 else "opaque"})


@pytest.mark.parametrize(("shown", "called"), [((4, 5), (4, 1)), ((4, 1), (4, 5))])
def test_a_size_of_one_where_there_was_none_is_an_error_that_says_so(shown: Any, called: Any) -> None:
    amp = fxamp.convert(lambda x, y: torch.einsum("ij,kj->ik", x, y), example_inputs=(torch.ones(shown),) * 2)
    assert amp(torch.ones(shown), torch.ones(shown)).shape == (4, 4)
    with pytest.raises(
        fxamp.CaptureError, match=r"einsum 'ij,kj->ik' of shapes \(4, \d\) and \(4, \d\) is computed in"
    ):
        amp(torch.ones(called), torch.ones(called))
