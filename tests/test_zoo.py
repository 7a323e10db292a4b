"""Converted models equal eager autocast bit by bit: outputs, gradients, buffers, both modes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import fxamp
from fxamp.dtypes import abbreviate
from tests.helpers import check_against_autocast, quiet
from tests.oracle import cuda_rules
from tests.zoo import ZOO, Case

# On a GPU an LSTM is one kernel, and example inputs tell its dtypes; on a CPU it is made of others.
OTHER_KERNELS = {"recurrent", "sentiment"}


def leaves(values: Any) -> Any:
    """Floating-point tensors as leaves that want a gradient."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.requires_grad_(t.is_floating_point()), values)


def made(case: Case) -> torch.nn.Module:
    with quiet():
        return case.make()


def variants(names: Iterable[str], *kinds: tuple[torch.dtype, bool]) -> Any:
    """Parametrizes a test over cases, low dtypes, and example inputs given or not; some cases need them."""
    found = {
        (name, dtype, examples or not ZOO[name].symbolic): None
        for name in names
        for dtype, examples in kinds
        if dtype in ZOO[name].dtypes
    }
    ids = [f"{name}-{abbreviate(dtype)}-{'examples' if examples else 'symbolic'}" for name, dtype, examples in found]
    return pytest.mark.parametrize(("name", "dtype", "examples"), list(found), ids=ids)


@variants(ZOO, (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False))
def test_autocast_is_bitwise_eager_autocast(name: str, dtype: torch.dtype, examples: bool) -> None:
    case = ZOO[name]
    amp = check_against_autocast(
        made(case), *leaves(case.inputs()), dtype=dtype, loss=case.loss, loss_args=case.loss_args(),
        examples=examples, constant=True, **case.kwargs,
    )  # fmt: skip
    assert amp.report().totals["opaque"] <= case.opaque


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.loss is not None])
def test_without_the_loss(name: str) -> None:
    case = ZOO[name]
    check_against_autocast(made(case), *leaves(case.inputs()), examples=not case.symbolic, constant=True, **case.kwargs)


@variants((name for name, case in ZOO.items() if case.gpu), (torch.bfloat16, True), (torch.float16, False))
def test_the_rules_of_a_gpu(name: str, dtype: torch.dtype, examples: bool) -> None:
    case = ZOO[name]
    with cuda_rules():
        check_against_autocast(
            made(case), *leaves(case.inputs()), dtype=dtype, loss=case.loss, loss_args=case.loss_args(), rules="cuda",
            examples=examples and name not in OTHER_KERNELS, calls=1, **case.kwargs,
        )  # fmt: skip


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if not case.symbolic])
def test_what_only_example_inputs_tell_is_refused_without(name: str) -> None:
    with pytest.raises(fxamp.CaptureError):
        fxamp.convert(made(ZOO[name]), ZOO[name].loss)


@pytest.mark.parametrize("name", ZOO)
def test_full_is_bitwise_the_model(name: str) -> None:
    case = ZOO[name]
    check_against_autocast(
        made(case), *case.inputs(), policy="full", loss=case.loss, loss_args=case.loss_args(),
        examples=not case.symbolic, calls=1, **case.kwargs,
    )  # fmt: skip
