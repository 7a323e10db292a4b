"""On a GPU: the same promises under the CUDA rules. Skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fxamp
from tests.helpers import assert_same, check_against_autocast
from tests.zoo import BASIC as ZOO
from tests.zoo.basic import GPT

pytestmark = pytest.mark.cuda

# Autocast refuses binary_cross_entropy on CUDA; the others are written for CPU regions or make CPU tensors.
LEFT_OUT = {"autoencoder", "regions"}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=False)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(values: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cuda().requires_grad_(t.requires_grad), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("name", sorted(set(ZOO) - LEFT_OUT))
def test_autocast_is_bitwise_eager_autocast(name: str, dtype: torch.dtype) -> None:
    case = ZOO[name]
    check_against_autocast(
        case.make().cuda(),
        *on_gpu(case.inputs()),
        dtype=dtype,
        loss=case.loss,
        loss_args=on_gpu(case.loss_args()),
        device="cuda",
        **on_gpu(dict(case.kwargs)),
    )


def test_the_rules_follow_the_module_to_the_gpu() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1))
    amp = fxamp.convert(model, dtype=torch.bfloat16)
    assert amp.report().device_type == "cpu"
    amp.cuda()
    assert amp.report().device_type == "cuda"
    x = torch.randn(2, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert_same(amp(x), model(x))


def test_training_in_float16_with_the_scaler() -> None:
    torch.use_deterministic_algorithms(False)
    tokens = torch.randint(0, 23, (16, 8), device="cuda")
    amp = fxamp.convert(GPT().cuda(), lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()), dtype=torch.float16)
    optimizer = torch.optim.AdamW(amp.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(40):
        loss, _ = amp(tokens, tokens)
        amp.scaler.backward(loss)
        amp.scaler.step(optimizer)
        amp.scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
