"""On a GPU: the same promises under the CUDA rules. Skipped without one."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxamp
from fxamp.runtime import gemm
from tests.helpers import assert_same, check_against_autocast, quiet
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


# -- weight gradients straight in float32 ------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """The operators that run, each with the dtype of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, Any, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.ops.append((str(func), result.dtype, tuple(result.shape)))
        return result


class Products(nn.Module):
    """Weights of every shape that a product can have, no two of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 56, bias=False)
        self.right, self.added = nn.Parameter(torch.randn(56, 40) / 8), nn.Parameter(torch.randn(40))
        self.batched = nn.Parameter(torch.randn(8, 40, 24) / 8)
        self.left = nn.Parameter(torch.randn(72, 16) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # of 8 x 16 x 48
        x = torch.tanh(self.second(F.gelu(self.first(x))))
        x = torch.addmm(self.added, x.flatten(0, 1), self.right).unflatten(0, (8, 16))
        return self.left @ torch.bmm(x, self.batched)


def gradients_of(model: nn.Module, x: torch.Tensor, context: Any) -> tuple[dict[str, Any], Seen]:
    model.zero_grad()
    with context:
        output = model(x)
    with Seen() as seen:
        output.double().pow(2).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_weight_gradients_come_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Products().cuda(), torch.randn(8, 16, 48, device="cuda")
    amp = fxamp.convert(copy.deepcopy(model), policy="fast", dtype=dtype)
    shapes = {tuple(parameter.shape) for parameter in amp.parameters()}
    found, seen = gradients_of(amp, x, nullcontext())
    cast = [op for op in seen.ops if op[0] == "aten._to_copy.default" and op[1] == torch.float32 and op[2] in shapes]
    assert not cast
    assert {op[0] for op in seen.ops} >= {"aten.mm.dtype", "aten.bmm.dtype"}
    expected, by_autocast = gradients_of(copy.deepcopy(model), x, torch.autocast("cuda", dtype))
    assert [op for op in by_autocast.ops if op[0] == "aten._to_copy.default" and op[2] in shapes], "it would be seen"
    right, _ = gradients_of(copy.deepcopy(model).double(), x.double(), nullcontext())

    def error(gradients: dict[str, Any]) -> float:
        parts = [(gradients[n].double() - right[n]).norm() / right[n].norm() for n in right]
        return float(torch.stack(parts).norm())

    assert error(found) < error(expected)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("sizes", [(64, 48, 80), (1, 8, 8), (7, 5, 3), (0, 8, 8), (4096, 256, 1)], ids=str)
def test_the_product_against_float64(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, n, k = sizes
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(n, k, device="cuda"))
    bias = nn.Parameter(torch.randn(n, device="cuda"))
    x = torch.randn(rows, k, device="cuda", dtype=dtype)
    output = gemm.linear(x, weight, bias, (None, weight.detach().to(dtype), bias.detach().to(dtype)))
    assert_same(output, F.linear(x, weight.to(dtype), bias.to(dtype)))
    seed = torch.randn(rows, n, device="cuda").to(dtype)
    found = torch.autograd.grad(output, (weight, bias), seed)
    exact = seed.double().t() @ x.double(), seed.double().sum(0)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * max(rows, 1) ** 0.5)


def test_float16_sums_are_left_to_autocast() -> None:
    amp = fxamp.convert(Products().cuda(), policy="fast", dtype=torch.float16)
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        found, seen = gradients_of(amp, torch.randn(8, 16, 48, device="cuda"), nullcontext())
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert "aten.mm.dtype" not in {op[0] for op in seen.ops}
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_compiled_it_keeps_the_product() -> None:
    torch.manual_seed(0)
    model, x = Products().cuda(), torch.randn(8, 16, 48, device="cuda")
    amp = fxamp.convert(model, policy="fast", dtype=torch.bfloat16)
    expected, _ = gradients_of(amp, x, nullcontext())
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    for backend, near in (("aot_eager", 0.0), ("inductor", 3e-2)):
        torch._dynamo.reset()
        compiled = torch.compile(amp, fullgraph=True, backend=backend)
        amp.zero_grad()
        with quiet():
            compiled(x).double().pow(2).sum().backward()
        for name, parameter in amp.named_parameters():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=near * scale)
