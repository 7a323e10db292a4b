"""Converted models equal eager autocast bit by bit: outputs, gradients, buffers, both modes."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import check_against_autocast
from tests.models import ZOO


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, case in ZOO.items() for dtype in case.dtypes])
def test_autocast_is_bitwise_eager_autocast(name: str, dtype: torch.dtype) -> None:
    case = ZOO[name]
    model = case.make()
    check_against_autocast(
        model, *case.inputs(), dtype=dtype, loss=case.loss, loss_args=case.loss_args(), **case.kwargs
    )


@pytest.mark.parametrize("name", ZOO)
def test_full_is_bitwise_the_model(name: str) -> None:
    case = ZOO[name]
    check_against_autocast(
        case.make(), *case.inputs(), policy="full", loss=case.loss, loss_args=case.loss_args(), **case.kwargs
    )
