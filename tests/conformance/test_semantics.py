"""What autocast means, noun by noun: outputs and gradients are those of eager autocast, bit by bit.

Every case runs in train and in eval mode, in both low dtypes, with and without example inputs, and with inputs that
are leaves of autograd and inputs that are not. What eager torch refuses, the converted module refuses too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxamp
from tests.helpers import assert_same, has_low_lstm, quiet, run

LOW = (torch.bfloat16, torch.float16)
Function = Callable[..., Any]


class Net(nn.Module):
    """A module around a function of (module, inputs), with weights of every kind at hand."""

    def __init__(self, function: Function, **attributes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 8)
        self.w, self.v = (nn.Parameter(torch.randn(8, 8) / 2) for _ in range(2))
        self.frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("table", torch.randn(8, 8))
        self.register_buffer("index", torch.tensor([3, 0, 7, 1]))
        for name, value in attributes.items():
            setattr(self, name, value)
        self.function = function

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 8).to(dtype).requires_grad_(dtype.is_floating_point)


def outcome(call: Function, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any, seed: int) -> Any:
    """Outputs and gradients, or the kind of error."""
    with quiet():
        try:
            return run(call, args, kwargs, context, seed)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            return type(error)


def same(
    model: nn.Module,
    *args: Any,
    dtype: torch.dtype = torch.bfloat16,
    examples: bool = False,
    device: str = "cpu",
    refused: bool | None = False,
    policy: str = "autocast",
    **kwargs: Any,
) -> fxamp.AmpModule:
    """Asserts that the converted model does what eager autocast does, and gives it back.

    ``refused`` says whether eager torch raises an error; None for a case that has kernels in one low dtype only.
    """
    theirs = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    shown = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs)) if examples else None
    amp = fxamp.convert(model, dtype=dtype, example_inputs=shown, policy=policy)
    assert_same(dict(model.state_dict()), dict(before), "what was converted")
    constant = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
    for training in (True, False):
        amp.train(training)
        theirs.train(training)
        for seed, (inputs, named) in enumerate(((args, kwargs), constant)):
            what = f"training={training} call={seed}"
            context = torch.autocast(device, dtype) if policy == "autocast" else nullcontext()
            expected = outcome(theirs, inputs, named, context, seed)
            found = outcome(amp, inputs, named, nullcontext(), seed)
            assert refused is None or isinstance(expected, type) == refused, f"{what}: eager torch gives {expected}"
            if isinstance(expected, type):
                assert found == expected, f"{what}: eager torch gives {expected}"
                continue
            assert not isinstance(found, type), f"{what}: {found} where eager torch has a result"
            assert_same(found[0], expected[0], f"{what}: output")
            assert_gradients(found[1], expected[1], what)
            assert_same(dict(amp.named_buffers()), dict(theirs.named_buffers()), f"{what}: buffers")
            amp.zero_grad()
            theirs.zero_grad()
    return amp


def same_given_examples(model: nn.Module, *args: Any, examples: bool, **kwargs: Any) -> None:
    """As ``same``; without example inputs what asks for a size or a dtype is refused."""
    if examples:
        same(model, *args, examples=True, **kwargs)
        return
    with pytest.raises(fxamp.CaptureError, match=r"iterates over a tensor|the branch"):
        fxamp.convert(model)


def assert_gradients(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    assert found.keys() >= expected.keys(), what
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), f"{what}: gradient of {name}"
        if gradient is not None:
            assert_same(_dense(found[name]), _dense(gradient), f"{what}: gradient of {name}")


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def cases(group: dict[str, Any]) -> Any:
    """Parametrizes a test over the cases of a group, both low dtypes, and example inputs given or not."""

    def decorate(test: Any) -> Any:
        test = pytest.mark.parametrize("case", list(group.values()), ids=list(group))(test)
        test = pytest.mark.parametrize("dtype", LOW, ids=["bf16", "f16"])(test)
        return pytest.mark.parametrize("examples", [False, True], ids=["symbolic", "examples"])(test)

    return decorate


# -- which tensors are cast ---------------------------------------------------------------------------------

ELIGIBLE: dict[str, tuple[Function, torch.dtype]] = {
    "float64 input, float64 weight": (lambda m, x: torch.mm(x, m.w.double()), torch.float64),
    "float64 result into float32": (lambda m, x: m.fc(torch.mm(x, m.w.double()).float()), torch.float64),
    "float64 added to low": (lambda m, x: m.fc(x.float()) + x, torch.float64),
    "bfloat16 input": (lambda m, x: m.fc(x) @ m.w + x, torch.bfloat16),
    "float16 input": (lambda m, x: m.fc(x) @ m.w + x, torch.float16),
    "float16 times bfloat16": (lambda m, x: (x @ m.w).half() @ m.w.bfloat16(), torch.float16),
    "int64 into a lookup": (lambda m, x: m.fc(m.w[x.clamp(0, 7)]), torch.int64),
    "int64 made floating": (lambda m, x: m.fc(x.float()) + (x * 2).float() @ m.w, torch.int64),
    "int64 times low": (lambda m, x: (m.fc(x.float()) * x) @ m.w, torch.int64),
    "int32 matmul": (lambda m, x: torch.mm(x, x.t()).float() @ torch.ones(4, 8), torch.int32),
    "uint8 image": (lambda m, x: m.fc(x / 255), torch.uint8),
    "bool mask": (lambda m, x: m.fc(x * 1.0) * x, torch.bool),
    "bool as a weight": (lambda m, x: m.fc(torch.where(x, m.w[:4], 0.0)), torch.bool),
    "complex matmul": (lambda m, x: (x @ x.t()).real @ m.w[:4], torch.complex64),
    "complex parts": (lambda m, x: m.fc(torch.view_as_real(x)[..., 0]) + x.imag @ m.w, torch.complex64),
    "float8 made bfloat16": (lambda m, x: x.to(torch.bfloat16) @ m.w, torch.float8_e4m3fn),
    "float8 made float32": (lambda m, x: m.fc(x.float()), torch.float8_e5m2),
}


@cases(ELIGIBLE)
def test_what_is_eligible(case: Any, dtype: torch.dtype, examples: bool) -> None:
    function, kind = case
    x = rows()
    if kind.is_floating_point:
        x = x.detach().to(kind).requires_grad_(kind.itemsize > 1)
    else:
        x = (x * 3).detach().to(kind) if kind.is_complex else (x.detach() * 3).abs().to(kind)
    same(Net(function), x, dtype=dtype, examples=examples)


REFUSED: dict[str, tuple[Function, torch.dtype]] = {
    "float64 with float32": (lambda m, x: m.fc(x), torch.float64),
    "mm of float64 and a weight": (lambda m, x: torch.mm(x, m.w), torch.float64),
    "int64 into linear": (lambda m, x: m.fc(x), torch.int64),
    "complex into linear": (lambda m, x: m.fc(x), torch.complex64),
    "low and float32 in a disabled region": (
        lambda m, x: _disabled(lambda y: torch.mm(y, m.w), m.fc(x)),
        torch.float32,
    ),
    "out= of another dtype": (
        lambda m, x: torch.mm(m.fc(x).detach(), m.w.detach(), out=torch.empty(4, 8)),
        torch.float32,
    ),
    "in-place of another dtype": (lambda m, x: m.fc(x).addmm_(x, m.w), torch.float32),
}


def _disabled(function: Function, *args: Any) -> Any:
    with torch.autocast("cpu", enabled=False):
        return function(*args)


def _is_refused(convert: Callable[[], fxamp.AmpModule], x: Tensor) -> bool:
    try:
        amp = convert()
        amp(x)
    except (fxamp.FxampError, RuntimeError):
        return True
    return "autocast cannot run this model" in amp.report().note


@cases(REFUSED)
def test_what_eager_refuses_is_refused(case: Any, dtype: torch.dtype, examples: bool) -> None:
    function, kind = case
    x = rows().detach().to(kind)
    if examples:
        # What runs without autocast is converted as it is, and says so.
        assert _is_refused(lambda: fxamp.convert(Net(function), dtype=dtype, example_inputs=(x,)), x)
        return
    same(Net(function), x, dtype=dtype, refused=True)


# -- writes ---------------------------------------------------------------------------------------------------


def out_of_mm(m: Any, x: Tensor) -> Tensor:
    result = torch.empty(4, 8)
    with torch.no_grad():
        torch.mm(x, m.w, out=result)
        torch.add(result, 1, out=result)
    return result + m.fc(x)


def out_low(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        low = m.fc(x)
        torch.add(low, x, out=low)
        return torch.mul(low, low, out=torch.empty_like(low)) @ m.w


def inplace_sum(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    y += x
    y -= x * 0.5
    y *= m.scale
    y /= 3
    return y @ m.w


def inplace_into_float32(m: Any, x: Tensor) -> Tensor:
    y = x * 1
    y += m.fc(x)
    y.addcmul_(x, x, value=0.5)
    return m.fc(y)


def inplace_methods(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x).mul_(2).clamp_(max=3).relu_()
    z = x.clone().addmm_(x, m.w).sigmoid_()
    return y @ m.w + z @ m.v


def inplace_functional(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.fc(x), inplace=True)
    z = F.silu(x + 2, inplace=True)
    F.dropout(z, 0.5, m.training, True)
    return y @ m.w + z @ m.v


def copy_into_low(m: Any, x: Tensor) -> Tensor:
    y = torch.empty(4, 8, dtype=torch.bfloat16)
    y.copy_(x @ m.w)
    z = torch.zeros(4, 8)
    z.copy_(m.fc(x))
    return y @ m.w + z @ m.v


def source_written_after_cast(m: Any, x: Tensor) -> Tensor:
    y = x.detach() * 1
    first = y @ m.w
    y.mul_(2)
    second = y @ m.w
    y[0] = 0
    return first + second + y @ m.w


def written_through_a_view(m: Any, x: Tensor) -> Tensor:
    y = x.detach() * 1
    first = y @ m.table
    y[1:3].mul_(0.5)
    second = y @ m.table
    y.t()[2:4, :].fill_(1)
    third = y @ m.table
    y.view(2, 2, 8)[0].zero_()
    return first + second + third + y @ m.table


def view_read_after_the_base_is_written(m: Any, x: Tensor) -> Tensor:
    y = x.detach() * 1
    part = y[:, :8]
    first = part @ m.table
    y.add_(1)
    second = part @ m.table
    y.copy_(second)
    return first + second + part @ m.table


def augmented_view(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x).float()
    y[0] += 1
    y[:, 1:3] *= m.scale
    y[m.index % 4, m.index] -= 2.0
    return y @ m.w


def index_assignments(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(8, 8)
    y[m.index] = m.fc(x).float()
    y[y > 1] = 0.25
    y[-1, ...] = x[0]
    y[:, None, 0] = 1
    y.index_put_((m.index,), x, accumulate=True)
    y.index_add_(0, m.index, x)
    y.scatter_(0, m.index[None].expand(8, 4).t(), x)
    return y @ m.w


def assigned_another_dtype(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(4, 8)
    y[:2] = m.fc(x)[:2]
    z = m.fc(x)
    z[1] = x[1]
    return y @ m.w + z


def low_buffer(m: Any, x: Tensor) -> Tensor:
    m.table.mul_(0.9).add_(m.fc(x).detach().float().mean(), alpha=0.1)
    first = x @ m.table
    m.table[0].copy_(x.detach()[0])
    return first + x @ m.table


def weight_written_under_no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.frozen.mul_(0.5)
    first = x @ m.frozen
    with torch.no_grad():
        m.frozen[0] = 1.0
    return first + x @ m.frozen


def detached_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    y.detach_()
    return y @ m.w


def data_of_a_weight(m: Any, x: Tensor) -> Tensor:
    return x @ m.w.data + x @ m.w + m.fc(x.data) + m.fc(x)


def leaf_made_inside(m: Any, x: Tensor) -> Tensor:
    y = x.detach().requires_grad_()
    out = (y @ m.w) + (y @ m.v)
    return out + m.fc(y)


def set_slices_in_a_loop(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros(8)
    out = torch.empty(4, 8)
    for i in range(4):
        state = torch.tanh(m.fc(x[i]) + state @ m.w)
        out[i] = state
    return out


def chunk_written(m: Any, x: Tensor) -> Tensor:
    y = x.detach() * 1
    left, right = y.chunk(2, dim=1)
    first = y @ m.table
    left.mul_(2)
    second = y @ m.table
    right[0] = 1
    return first + second + y @ m.table + torch.cat([right, left], 1) @ m.table


WRITES: dict[str, Function] = {
    f.__name__: f
    for f in (
        out_of_mm,
        out_low,
        inplace_sum,
        inplace_into_float32,
        inplace_methods,
        inplace_functional,
        copy_into_low,
        source_written_after_cast,
        written_through_a_view,
        view_read_after_the_base_is_written,
        augmented_view,
        index_assignments,
        assigned_another_dtype,
        low_buffer,
        weight_written_under_no_grad,
        detached_in_place,
        data_of_a_weight,
        leaf_made_inside,
        set_slices_in_a_loop,
        chunk_written,
    )
}


@cases(WRITES)
def test_writes(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(Net(case), rows(), dtype=dtype, examples=examples)


# -- promotion and the user's own dtypes ------------------------------------------------------------------------

PROMOTION: dict[str, Function] = {
    "low plus float32": lambda m, x: (m.fc(x) + x) @ m.w,
    "low plus a scalar tensor": lambda m, x: (m.fc(x) + m.scale) @ m.w,
    "low times a float64 scalar tensor": lambda m, x: m.fc(x) * torch.tensor(2.0, dtype=torch.float64),
    "low plus a Python number": lambda m, x: m.fc(x) * 2 + 1.5,
    "low and integers": lambda m, x: m.fc(x) * m.index[:, None],
    "cat of low and float32": lambda m, x: torch.cat([m.fc(x), x], -1),
    "cat of low": lambda m, x: torch.cat([m.fc(x), m.fc(x) * 2], 1).sum(-1),
    "cat of float32 with integers": lambda m, x: torch.cat([x, m.index[:, None]], 1),
    "cat with axis": lambda m, x: torch.cat(tensors=(x, m.fc(x)), dim=0) @ m.w,
    "concat and hstack": lambda m, x: torch.hstack([torch.concat([m.fc(x), x]), torch.vstack([x, m.fc(x)])]),
    "stack of low and float32": lambda m, x: torch.stack([m.fc(x), x, m.fc(x).float()]).mean(0),
    "index_copy": lambda m, x: torch.index_copy(m.table, 0, m.index, m.fc(x).float()),
    "where of low and float32": lambda m, x: torch.where(x > 0, m.fc(x), x) @ m.w,
    "where with numbers": lambda m, x: torch.where(x > 0, m.fc(x), 0.0) + torch.where(x > 0, 1.0, -1.0) @ m.w,
    "maximum": lambda m, x: torch.maximum(m.fc(x), x) @ m.w,
    "lerp of low": lambda m, x: torch.lerp(m.fc(x), m.fc(x * 2), 0.3),
    "addcmul": lambda m, x: torch.addcmul(x, m.fc(x), x) @ m.w,
    "addcdiv": lambda m, x: torch.addcdiv(x, m.fc(x), x.abs() + 1) @ m.w,
    "atan2": lambda m, x: torch.atan2(m.fc(x), x) @ m.w,
    "cross": lambda m, x: torch.linalg.cross(x[:, :3], x[:, 3:6]) @ m.w[:3],
    "dot": lambda m, x: torch.dot(x[0], x[1]) + torch.vdot(m.fc(x)[0], m.fc(x)[1]) + x[0] @ m.w[1],
    "mv and vecmat": lambda m, x: torch.mv(m.w, x[0]) + m.w @ x[1] + x[2] @ m.w + m.fc(x)[0] @ m.fc(x)[1],
    "matmul of other ranks": lambda m, x: x[None, None] @ m.w + (x[:, None] @ m.w[None]).sum(0) + x.t()[None].mT @ m.w,
    "addmm": lambda m, x: torch.addmm(x, x, m.w, beta=0.5, alpha=2) + torch.addmm(m.fc(x), x, m.w),
    "baddbmm": lambda m, x: torch.baddbmm(x[None], x[None], m.w[None]) + torch.bmm(x[None], m.w[None]),
    "addmv and addr": lambda m, x: torch.addmv(x[0], m.w, x[1]) + torch.addr(m.w, x[0], x[1]).sum(0),
    "einsum": lambda m, x: torch.einsum("ij,jk,lk->il", x, m.w, m.v) + torch.einsum("i,j->ij", x[:, 0], x[0]),
    "tensordot": lambda m, x: torch.tensordot(x, m.w, ([1], [0])) + torch.tensordot(x, m.w, 1),
    "chain_matmul": lambda m, x: torch.linalg.multi_dot([x, m.w, m.v]),
    "scalar times matrix": lambda m, x: (m.scale * x) @ m.w + torch.mul(m.scale, m.fc(x)),
    "number over a tensor": lambda m, x: (1 / (m.fc(x).abs() + 1)) @ m.w + (2 - m.fc(x)) + 2 ** m.fc(x).clamp(max=2),
    "power": lambda m, x: (m.fc(x) ** 2).sum() + (x**2).mean() + m.fc(x).abs() ** 0.5,
    "floor division": lambda m, x: (m.fc(x).detach() // 0.5) + (m.fc(x) % 2),
    "builtin sum": lambda m, x: sum([m.fc(x), x @ m.w, x]) @ m.v,
    "comparisons": lambda m, x: (m.fc(x) > x) * x + (m.fc(x) == m.fc(x)).float() @ m.w,
    "logical": lambda m, x: ((x > 0) & (m.fc(x) > 0) | ~(x < 1)).to(x.dtype) @ m.w,
    "argmax into an index": lambda m, x: m.fc(x).gather(1, m.fc(x).argmax(1, keepdim=True)) @ m.w[:1],
    "sort and topk": lambda m, x: (
        m.fc(x).sort(-1).values @ m.w + x.topk(8, -1)[0] @ m.v + m.fc(x).kthvalue(2).values[:, None]
    ),
    "max of dim": lambda m, x: m.fc(x).max(0).values + x.max(1, keepdim=True).values @ m.w[:1] + m.fc(x).min(0)[0],
    "aminmax": lambda m, x: torch.aminmax(m.fc(x), dim=0).max @ m.w + x.aminmax(dim=0)[0] @ m.w,
    "var_mean": lambda m, x: torch.var_mean(m.fc(x), 0)[0] @ m.w + torch.std_mean(x, 0)[1] @ m.w,
    "norms": lambda m, x: (
        torch.norm(m.fc(x)) + x.norm(dim=-1).sum() + torch.linalg.norm(x @ m.w) + F.normalize(m.fc(x))
    ),
    "cumsum and prod": lambda m, x: m.fc(x).cumsum(-1) @ m.w + x.prod(-1, keepdim=True) + m.fc(x).prod(0),
    "softmax": lambda m, x: m.fc(x).softmax(-1) @ m.w + F.log_softmax(m.fc(x), -1) + F.softmin(x, -1),
    "layer norm without weights": lambda m, x: (
        F.layer_norm(m.fc(x), (8,)) @ m.w + F.layer_norm(x, [8], m.scale.expand(8))
    ),
    "losses": lambda m, x: (
        F.mse_loss(m.fc(x), x) + F.l1_loss(m.fc(x), x) + F.smooth_l1_loss(m.fc(x), x) + F.huber_loss(m.fc(x), x)
    ),
    "more losses": lambda m, x: (
        F.cross_entropy(m.fc(x), m.index)
        + F.nll_loss(F.log_softmax(m.fc(x), -1), m.index)
        + F.kl_div(F.log_softmax(m.fc(x), -1), x.softmax(-1), reduction="batchmean")
    ),
    "logits": lambda m, x: (
        F.binary_cross_entropy_with_logits(m.fc(x), x.sigmoid()) + F.cosine_embedding_loss(m.fc(x), x, m.index.sign())
    ),
    "cdist": lambda m, x: torch.cdist(m.fc(x), x) + torch.cdist(x, x).detach() + F.pairwise_distance(x, m.fc(x)),
    "inverse": lambda m, x: torch.linalg.inv(m.w @ m.w.t() + 8 * torch.eye(8)) @ x[0],
    "kron and outer": lambda m, x: torch.outer(m.fc(x)[0], x[0]) @ m.w + torch.kron(x[:1], x[1:2])[:, :8],
    "interpolate": lambda m, x: F.interpolate(m.fc(x)[None, None], scale_factor=2.0, mode="bilinear").sum(-2),
    "pad and roll": lambda m, x: F.pad(m.fc(x), (0, 0, 1, 1)).roll(1, 0) @ m.w,
    "grid_sample": lambda m, x: F.grid_sample(m.fc(x)[None, None], x.view(1, 4, 4, 2), align_corners=False),
    "fft": lambda m, x: torch.fft.irfft(torch.fft.rfft(m.fc(x).float()) * 2, n=8) @ m.w,
    "polar": lambda m, x: torch.polar(x.abs(), x).abs() @ m.w + torch.view_as_complex(x.view(4, 4, 2)).abs() @ m.w[:4],
}


@cases(PROMOTION)
def test_promotion(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(Net(case), rows(), dtype=dtype, examples=examples)


OWN_DTYPES: dict[str, Function] = {
    "float": lambda m, x: m.fc(x).float() @ m.w,
    "half and bfloat16": lambda m, x: m.fc(x).half() * 2 + m.fc(x).bfloat16().float() + x.half() @ m.w,
    "there and back rounds": lambda m, x: (
        x.half().float() + x.bfloat16().float() @ m.w + (m.fc(x).float() * 1.001).bfloat16()
    ),
    "to with a dtype": lambda m, x: m.fc(x).to(torch.float32) + m.fc(x).to(dtype=torch.float64),
    "to with a device and dtype": lambda m, x: (
        m.fc(x).to("cpu", torch.float32) + x.to(torch.device("cpu"), torch.bfloat16, False, True) @ m.w
    ),
    "to another tensor": lambda m, x: m.fc(x).to(x) + x.to(m.fc(x)) @ m.w + m.fc(x).to(m.w),
    "to the dtype of a tensor": lambda m, x: (
        m.fc(x).to(x.dtype) + x.to(m.fc(x).dtype) @ m.w + m.fc(x).to(dtype=m.w.dtype)
    ),
    "to without a change": lambda m, x: (
        x.to(torch.float32) @ m.w + x.to(x.dtype) @ m.v + x.to(torch.float32, copy=True) @ m.w
    ),
    "type": lambda m, x: m.fc(x).type(torch.float32) + m.fc(x).type(x.dtype) + x.type(torch.bfloat16) @ m.w,
    "type_as": lambda m, x: m.fc(x).type_as(x) + x.type_as(m.fc(x)) + m.index.type_as(x)[:, None],
    "double": lambda m, x: m.fc(x).double() * x.double() + (x.double() @ m.w.double()).float() @ m.w,
    "half of integers": lambda m, x: m.index.half()[:, None] @ x[:1] + m.index[:, None].bfloat16() * m.fc(x),
    "int and bool": lambda m, x: m.fc(x).int() + x.bool() + m.fc(x).long().float() @ m.w,
    "sum with dtype": lambda m, x: m.fc(x).sum(-1, dtype=torch.float32) + torch.sum(m.fc(x), 1, dtype=torch.float64),
    "softmax with dtype": lambda m, x: (
        F.softmax(m.fc(x), -1, dtype=torch.float32) @ m.w + torch.softmax(m.fc(x), 1, torch.float32)
    ),
    "softmax with a dtype that is read": lambda m, x: (
        F.softmax(m.fc(x), dim=-1, dtype=torch.float32).to(m.fc(x).dtype) @ m.w
    ),
    "softmax with a narrower dtype": lambda m, x: x.softmax(-1, dtype=torch.bfloat16) @ m.w,
    "log_softmax with dtype": lambda m, x: m.fc(x).log_softmax(-1, torch.float64).float() @ m.w,
    "mean with dtype": lambda m, x: m.fc(x).mean(dim=0, dtype=torch.float32) @ m.w + torch.mean(x, dtype=torch.float64),
    "cumsum with dtype": lambda m, x: (
        torch.cumsum(m.fc(x), 0, dtype=torch.float32) @ m.w + x.cumprod(0, dtype=torch.float64)
    ),
    "prod with dtype": lambda m, x: torch.prod(m.fc(x), 0, dtype=torch.float32) @ m.w + x.prod(dtype=torch.float64),
    "norm with dtype": lambda m, x: (
        torch.norm(m.fc(x), dim=1, p=2, dtype=torch.float32) + torch.linalg.vector_norm(m.fc(x), dtype=torch.float32)
    ),
    "nansum with dtype": lambda m, x: torch.nansum(m.fc(x), 0, dtype=torch.float32) @ m.w,
    "zeros_like": lambda m, x: (
        (torch.zeros_like(m.fc(x)) + m.fc(x)) @ m.w + torch.ones_like(m.fc(x), dtype=torch.float32) * m.fc(x)
    ),
    "full_like": lambda m, x: torch.full_like(m.fc(x), 2.5) * x + torch.full_like(m.fc(x), 3, dtype=torch.float64),
    "new_zeros": lambda m, x: (
        m.fc(x).new_zeros(4, 8) + m.fc(x).new_ones((4, 8), dtype=torch.float32) + m.fc(x).new_full((8,), 0.5)
    ),
    "new_tensor": lambda m, x: m.fc(x).new_tensor([1.0] * 8) + m.fc(x).new_empty(8).fill_(2) + x.new_tensor(2),
    "empty_like": lambda m, x: torch.empty_like(m.fc(x)).fill_(3) @ m.w,
    "arange": lambda m, x: (
        m.fc(x) + torch.arange(8, dtype=x.dtype) + torch.arange(8) + torch.arange(0, 4, 0.5, dtype=torch.bfloat16)
    ),
    "arange of the low dtype": lambda m, x: m.fc(x) * torch.arange(8, dtype=m.fc(x).dtype, device=x.device),
    "linspace and eye": lambda m, x: (
        m.fc(x) * torch.linspace(0, 1, 8) + torch.eye(4, 8, dtype=torch.bfloat16) + torch.eye(4, 8) @ m.w
    ),
    "ones and zeros": lambda m, x: (
        torch.ones(4, 8, dtype=torch.float16) + m.fc(x) + torch.zeros(8, dtype=x.dtype) + torch.ones(4, 8) @ m.w
    ),
    "a tensor constant": lambda m, x: (
        m.fc(x) * torch.tensor(1.0) + torch.tensor([1.0] * 8) + torch.tensor(3) + torch.as_tensor(2.5)
    ),
    "a tensor constant of a dtype": lambda m, x: m.fc(x) * torch.tensor([1.0] * 8, dtype=m.fc(x).dtype) @ m.w,
    "full": lambda m, x: (
        m.fc(x) + torch.full((4, 8), 0.1) + torch.full((8,), 1, dtype=torch.int64) + torch.full((), 0.3)
    ),
    "random in a dtype": lambda m, x: (
        torch.randn(4, 8, dtype=torch.bfloat16)
        + torch.rand_like(m.fc(x))
        + torch.randn_like(m.fc(x), dtype=torch.float32)
    ),
    "randint": lambda m, x: m.fc(x) * torch.randint(0, 5, (4, 8)) + torch.randint_like(m.fc(x), 3) + torch.randperm(8),
    "one_hot": lambda m, x: F.one_hot(m.index, 8).to(x.dtype) @ m.w + F.one_hot(m.index, 8) * m.fc(x),
    "finfo of a tensor": lambda m, x: m.fc(x).masked_fill(x > 0, torch.finfo(m.fc(x).dtype).min).softmax(-1) @ m.w,
    "finfo of float32": lambda m, x: (
        m.fc(x).float().masked_fill(x > 0, torch.finfo(torch.float32).min).softmax(-1) @ m.w
    ),
    "minus infinity": lambda m, x: (
        m.fc(x) + torch.full((8,), -1e4).masked_fill(m.table[0] > 0, float("-inf"))
    ).softmax(-1),
    "a huge number": lambda m, x: m.fc(x) * 1e-30 * 1e30 + (m.fc(x) + 1e30) + x * 1e38,
    "a huge scalar tensor": lambda m, x: (
        m.fc(x) * torch.tensor(1e30) + m.fc(x).clamp(-1e4, 1e4) + torch.where(x > 0, x, -1e30)
    ),
    "a huge mask": lambda m, x: (
        (m.fc(x) - 1e9 * (x > 0)).softmax(-1) @ m.w + (m.fc(x) + (1.0 - (x > 0).float()) * -1e9).softmax(-1)
    ),
    "overflow": lambda m, x: (m.fc(x) * 30000.0) @ m.w + torch.exp(m.fc(x) * 100) + (x * 1e6) @ m.w,
    "a tiny epsilon": lambda m, x: (
        m.fc(x) / (m.fc(x).abs().sum(-1, keepdim=True) + 1e-12) + (x + 1e-12).log().nan_to_num() @ m.w
    ),
    "numbers in linear": lambda m, x: F.linear(x, m.w * 1e5) + F.linear(x * 1e-8, m.w),
    "the default dtype": lambda m, x: m.fc(x).to(torch.get_default_dtype()) @ m.w,
    "indexed by a buffer": lambda m, x: m.fc(x)[:, m.index] @ m.w[:4] + x[m.index % 4] @ m.w,
}


@cases(OWN_DTYPES)
def test_the_users_own_dtypes(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(Net(case), rows(), dtype=dtype, examples=examples)


ASKED: dict[str, Function] = {
    "rows of a tensor": lambda m, x: sum((m.fc(row) for row in x), torch.zeros(8)) @ m.v,
    "parts of unbind": lambda m, x: [m.fc(row) for row in x.unbind()][1] + x.unbind(1)[0] @ m.w[:4],
    "is_floating_point": lambda m, x: (m.fc(x) if x.is_floating_point() else x) @ m.w,
    "writes to each row": lambda m, x: _halved_rows(x.detach() * 1) @ m.w,
}


def _halved_rows(y: Tensor) -> Tensor:
    first = y @ y.t()
    for row in y.unbind(0):
        row.mul_(0.5)
    return first @ y


@cases(ASKED)
def test_what_only_example_inputs_tell(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same_given_examples(Net(case), rows(), dtype=dtype, examples=examples)


# -- regions ------------------------------------------------------------------------------------------------------


def disabled_inside(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = torch.mm(x, m.w)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = torch.mm(y, m.w)
            with torch.autocast("cpu", enabled=False):
                return torch.mm(z.float(), m.w) + m.fc(x)


def other_dtype_inside(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x * 1)
    with torch.autocast("cpu", dtype=torch.float16):
        y = (y @ m.w.t()) + (y * 2) @ m.frozen
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = y @ m.v
    return m.fc(y) @ m.v.t()


def without_cache(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        y = m.fc(y) + m.fc(x)
    return y + m.fc(x)


def default_dtype_inside(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu"):
        return m.fc(m.fc(x)) @ m.w


def reentered_in_a_loop(m: Any, x: Tensor) -> Tensor:
    total = x * 0
    for i in range(3):
        with torch.autocast("cpu", enabled=i % 2 == 0, dtype=torch.bfloat16):
            total = total + m.fc(x * i).float()
    return total @ m.w


def one_context_entered_twice(m: Any, x: Tensor) -> Tensor:
    context = torch.autocast("cpu", enabled=False)
    with context:
        y = torch.mm(x, m.w)
    z = torch.mm(y, m.w).float()
    with context:
        return torch.mm(z, m.w)


@torch.autocast("cpu", enabled=False)
def decorated(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) * m.scale


def calls_a_decorated_function(m: Any, x: Tensor) -> Tensor:
    return decorated(m, x) + m.fc(decorated(m, x))


def returns_early(m: Any, x: Tensor) -> Tensor:
    def helper(y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            if m.fc.in_features == 8:
                return torch.mm(y, m.w)
        return y

    return m.fc(helper(x)) @ m.w


def raises_inside(m: Any, x: Tensor) -> Tensor:
    try:
        with torch.autocast("cpu", enabled=False):
            y = torch.mm(x, m.w)
            raise KeyError("the user's own")
    except KeyError:
        y = torch.mm(y, m.w)
    return m.fc(y)


def generator_with_a_region(m: Any, x: Tensor) -> Tensor:
    def parts() -> Any:
        with torch.autocast("cpu", enabled=False):
            yield torch.mm(x, m.w)
        yield torch.mm(x, m.w)

    return sum(part.float() for part in parts()) @ m.v


def grad_modes(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        a = m.fc(x)
        with torch.enable_grad():
            b = m.fc(x)
        with torch.set_grad_enabled(False):
            c = m.fc(x) @ m.w
    with torch.set_grad_enabled(m.training):
        d = m.fc(x)
    return a + b + c + d + m.fc(x)


@torch.no_grad()
def frozen_helper(m: Any, x: Tensor) -> Tensor:
    return m.fc(x)


@torch.inference_mode()
def inferred(m: Any, x: Tensor) -> Tensor:
    return m.fc(x).sum()


def decorated_grad_modes(m: Any, x: Tensor) -> Tensor:
    return frozen_helper(m, x) + m.fc(x) + inferred(m, x)


def cached_by_no_grad_first(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        first = x @ m.w
    return first + x @ m.w


def one_leaf_in_two_dtypes(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        a = (x * 1) @ m.w
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return a.sum() + (x * 1) @ m.w


def cuda_region_on_a_cpu(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return m.fc(x) @ m.w


def same_leaf_in_two_regions(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        a = x @ m.w
    with torch.autocast("cpu", dtype=torch.bfloat16):
        b = x @ m.w
    return a + b + x @ m.w


def region_around_a_loss(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    with torch.autocast("cpu", enabled=False):
        return F.cross_entropy(y.float(), m.index) + y.float().pow(2).mean() + F.mse_loss(y.float(), x)


REGIONS: dict[str, Function] = {
    f.__name__: f
    for f in (
        disabled_inside,
        other_dtype_inside,
        without_cache,
        default_dtype_inside,
        reentered_in_a_loop,
        one_context_entered_twice,
        calls_a_decorated_function,
        returns_early,
        raises_inside,
        generator_with_a_region,
        grad_modes,
        decorated_grad_modes,
        cached_by_no_grad_first,
        cuda_region_on_a_cpu,
        region_around_a_loss,
    )
}


@cases(REGIONS)
def test_regions(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(Net(case), rows(), dtype=dtype, examples=examples)


@cases({f.__name__: f for f in (one_leaf_in_two_dtypes, same_leaf_in_two_regions)})
def test_the_cache_of_autocast_does_not_look_at_the_dtype(case: Function, dtype: torch.dtype, examples: bool) -> None:
    """The second region meets the copy of the first, and eager torch fails unless all operands come from the cache."""
    refused = True if case is one_leaf_in_two_dtypes else None
    same(Net(case), rows(), dtype=dtype, examples=examples, refused=refused)


@cases({k: v for k, v in REGIONS.items() if k != "cuda_region_on_a_cpu"})
def test_regions_under_policy_full(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(Net(case), rows(), dtype=dtype, examples=examples, policy="full", refused=None)


class Protected(nn.Module):
    """A layer with a region of its own, as norms and routers have."""

    def __init__(self, enabled: bool, decorated: bool) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.enabled, self.decorated = enabled, decorated

    def forward(self, x: Tensor) -> Tensor:
        if self.decorated:
            return torch.autocast("cpu", enabled=self.enabled)(self.norm)(self.fc(x.float()).float())
        with torch.autocast("cpu", enabled=self.enabled):
            return self.norm(self.fc(x.float()).float())


@pytest.mark.parametrize("decorated", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", LOW)
def test_regions_inside_submodules(enabled: bool, decorated: bool, dtype: torch.dtype) -> None:
    part = Protected(enabled, decorated)
    for examples in (True, False):
        model = nn.Sequential(nn.Linear(8, 8), part, part, nn.Linear(8, 8))
        same(copy.deepcopy(model), rows(), dtype=dtype, examples=examples)


# -- functions and operators of the user's ------------------------------------------------------------------------


class Plain(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return (grad.to(w.dtype) @ w.t()).to(x.dtype), (x.t().to(grad.dtype) @ grad).to(w.dtype)


class Remembered(torch.autograd.Function):
    """Runs its backward as the forward ran."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return (grad @ w.t()).to(x.dtype), (x.t() @ grad).to(w.dtype)


class Float32(torch.autograd.Function):
    """Casts its inputs to float32 and runs without autocast."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w.t(), x.t() @ grad


class Lowered(torch.autograd.Function):
    """Casts its inputs to bfloat16; its context is set apart from its forward."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        return x @ w, x + 1

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor, other: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w.t().to(grad.dtype) + other, x.t() @ grad.to(x.dtype)


class WithSetup(torch.autograd.Function):
    """The newer spelling."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor * 3, None


@torch.library.custom_op("fxamp_semantics::plain", mutates_args=())
def plain_op(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.to(x.dtype)


@torch.library.custom_op("fxamp_semantics::listed", mutates_args=())
def listed_op(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x, w) + 1


@torch.library.custom_op("fxamp_semantics::writing", mutates_args={"x"})
def writing_op(x: Tensor, factor: float) -> None:
    x.mul_(factor)


for _op in (plain_op, listed_op):
    _op.register_fake(lambda x, w: x.new_empty(x.shape[0], w.shape[1]))
    _op.register_autograd(
        lambda ctx, grad: (
            (grad @ ctx.w.t().to(grad.dtype)).to(ctx.x.dtype),
            (ctx.x.t().to(grad.dtype) @ grad).to(ctx.w.dtype),
        ),
        setup_context=lambda ctx, inputs, output: (setattr(ctx, "x", inputs[0]), setattr(ctx, "w", inputs[1]), None)[2],
    )
torch.library.register_autocast("fxamp_semantics::listed", "cpu", torch.float32)


def writes_between(m: Any, x: Tensor) -> Tensor:
    y = x.detach() * 1
    first = y @ m.w
    writing_op(y, 0.5)
    torch.ops.fxamp_semantics.writing(y, 3.0)
    return first + y @ m.w


OWN_CODE: dict[str, Function] = {
    "a function of the user's": lambda m, x: Plain.apply(x, m.w) + Plain.apply(m.fc(x), m.w),
    "custom_fwd": lambda m, x: Remembered.apply(x, m.w) + Remembered.apply(m.fc(x), m.w) + m.fc(x),
    "custom_fwd in a disabled region": lambda m, x: _disabled(Remembered.apply, x, m.w) + Remembered.apply(x, m.w),
    "custom_fwd with float32": lambda m, x: Float32.apply(m.fc(x), m.w) @ m.w + Float32.apply(x, m.w),
    "custom_fwd with bfloat16": lambda m, x: Lowered.apply(m.fc(x), m.w)[0] @ m.w + Lowered.apply(x, m.w)[1],
    "setup_context": lambda m, x: WithSetup.apply(m.fc(x), 2.0) @ m.w,
    "a custom operator": lambda m, x: plain_op(x, m.w) + torch.ops.fxamp_semantics.plain(m.fc(x), m.w) + x @ m.w,
    "a registered custom operator": lambda m, x: (
        listed_op(m.fc(x), m.w) @ m.w + torch.ops.fxamp_semantics.listed(x, m.w)
    ),
    "a custom operator that writes": writes_between,
}


@cases(OWN_CODE)
def test_functions_and_operators_of_the_user(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(Net(case), rows(), dtype=dtype, examples=examples)


# -- the weight cache ---------------------------------------------------------------------------------------------


def _norm(kind: Function, **options: Any) -> nn.Module:
    torch.manual_seed(2)
    return kind(nn.Linear(8, 8), **options)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).t()


def parametrized(*parts: nn.Module) -> nn.Module:
    layer = nn.Linear(8, 8)
    for part in parts:
        nn.utils.parametrize.register_parametrization(layer, "weight", part)
    return layer


def cached_parametrization(m: Any, x: Tensor) -> Tensor:
    with nn.utils.parametrize.cached():
        return m.norm(m.norm(x).float())


class Tied(nn.Module):
    """One weight as a lookup, a layer and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.token(x.argmax(-1)) + x) @ self.token.weight + self.head(x)


CACHE: dict[str, Function] = {
    "a weight three times": lambda m, x: m.fc(m.fc(m.fc(x))) + x @ m.fc.weight,
    "a weight in several operators": lambda m, x: (
        x @ m.w + F.linear(x, m.w) + torch.mm(x, m.w) + torch.einsum("ij,jk->ik", x, m.w)
    ),
    "a frozen weight": lambda m, x: x @ m.frozen + F.linear(x @ m.w, m.frozen) + x @ m.frozen,
    "a transposed weight": lambda m, x: x @ m.w.t() + x @ m.w.T + x @ m.w.mT + x @ m.w,
    "slices of a weight": lambda m, x: torch.cat([x @ m.w[:, :4], x @ m.w[:, 4:]], -1) + x @ m.w,
    "chunks of a weight": lambda m, x: sum(F.linear(x, part).sum() for part in m.w.chunk(2)) + x @ m.w,
    "split and unflattened": lambda m, x: (
        x @ m.w.view(8, 8) + x @ m.w.reshape(8, 8) + x @ m.w.unsqueeze(0)[0] + x @ m.w.split(8)[0]
    ),
    "a contiguous weight": lambda m, x: x @ m.w.contiguous() + x @ m.w + x @ m.w.clone(),
    "a float weight": lambda m, x: x @ m.w.float() + x @ m.w + x @ m.w.to(torch.float32) + x @ m.w.to(x),
    "a low weight": lambda m, x: x @ m.w.bfloat16() + x @ m.w,
    "a product of weights": lambda m, x: x @ (m.w * m.v) + x @ m.w + x @ (m.w @ m.v),
    "a detached weight": lambda m, x: x @ m.w.detach() + x @ m.w.data + x @ m.w,
    "a weight and its sum": lambda m, x: x @ m.w + m.w.sum() + m.w.pow(2).mean() + m.w[0],
    "a buffer several times": lambda m, x: x @ m.table + F.linear(x, m.table) + x @ m.table.t(),
    "an input leaf several times": lambda m, x: x @ m.w + x @ m.v + m.fc(x) + x @ x.t() @ x,
    "stacked weights": lambda m, x: x @ torch.stack([m.w, m.v])[0] + (torch.cat([m.w, m.v]) @ x[1])[:8] + x @ m.w,
    "weights in a list": lambda m, x: sum(x @ p for p in [m.w, m.v, m.w]) + torch.linalg.multi_dot([x, m.w, m.w]),
    "weights in einsum": lambda m, x: torch.einsum("ij,jk,kl->il", x, m.w, m.w) + torch.einsum("ij,jk->ik", x, m.w),
    "prelu": lambda m, x: F.prelu(m.fc(x), m.scale[None]) + F.prelu(x, m.fc.bias),
    "bilinear": lambda m, x: F.bilinear(x, x * 2, m.w[None].expand(8, 8, 8), m.fc.bias),
}


@cases(CACHE)
def test_the_weight_cache(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(Net(case), rows(), dtype=dtype, examples=examples)


twice: Function = lambda m, x: m.norm(m.norm(x).float()) + m.fc(x)  # noqa: E731

MODELS_OF_WEIGHTS: dict[str, Function] = {
    "tied weights": Tied,
    "weight norm": lambda: Net(twice, norm=_norm(nn.utils.parametrizations.weight_norm)),
    "weight norm over everything": lambda: Net(twice, norm=_norm(nn.utils.parametrizations.weight_norm, dim=None)),
    "spectral norm": lambda: Net(twice, norm=_norm(nn.utils.parametrizations.spectral_norm)),
    "orthogonal": lambda: Net(twice, norm=_norm(nn.utils.parametrizations.orthogonal)),
    "old spectral norm": lambda: Net(twice, norm=_norm(nn.utils.spectral_norm)),
    "symmetric": lambda: Net(twice, norm=parametrized(Symmetric())),
    "two parametrizations": lambda: Net(twice, norm=parametrized(Symmetric(), nn.Tanh())),
    "cached parametrizations": lambda: Net(cached_parametrization, norm=parametrized(Symmetric())),
    "cached weight norm": lambda: Net(cached_parametrization, norm=_norm(nn.utils.parametrizations.weight_norm)),
    "frozen layer": lambda: Net(twice, norm=nn.Linear(8, 8).requires_grad_(False)),
    "frozen bias": lambda: Net(twice, norm=_frozen_bias()),
}


def _frozen_bias() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.bias.requires_grad_(False)
    return layer


@cases(MODELS_OF_WEIGHTS)
def test_parametrized_and_tied_weights(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(case(), rows(), dtype=dtype, examples=examples)


# -- modules of torch ---------------------------------------------------------------------------------------------


def sequence() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(2, 5, 8, requires_grad=True)


PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])
CAUSAL = torch.ones(5, 5).triu(1).bool()
FLOAT_MASK = torch.zeros(5, 5).masked_fill(CAUSAL, float("-inf"))
BIG_MASK = torch.zeros(5, 5).masked_fill(CAUSAL, torch.finfo(torch.float32).min)


def attention(**options: Any) -> Any:
    """Self-attention whose layers come from ``options`` and whose call takes the rest."""
    call = {
        k: options.pop(k)
        for k in ("need_weights", "key_padding_mask", "attn_mask", "is_causal", "average_attn_weights")
        if k in options
    }
    layer = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})

    def forward(m: Any, x: Tensor) -> Any:
        other = {"kdim": "key", "vdim": "key"}.keys() & options.keys()
        key = torch.cat([x, x], -1)[..., :12] if other else x
        found, weights = m.attention(m.fc(x).float(), key, key, **call)
        return found, weights

    return Net(forward, attention=layer)


ATTENTION: dict[str, Function] = {
    "without weights": lambda: attention(need_weights=False),
    "with weights": lambda: attention(need_weights=True),
    "weights of each head": lambda: attention(need_weights=True, average_attn_weights=False),
    "key_padding_mask": lambda: attention(key_padding_mask=PADDING, need_weights=False),
    "bool attn_mask": lambda: attention(attn_mask=CAUSAL, need_weights=False),
    "float attn_mask": lambda: attention(attn_mask=FLOAT_MASK, need_weights=True),
    "big float attn_mask": lambda: attention(attn_mask=BIG_MASK, need_weights=False),
    "is_causal": lambda: attention(attn_mask=CAUSAL, is_causal=True, need_weights=False),
    "both masks": lambda: attention(attn_mask=CAUSAL, key_padding_mask=PADDING, need_weights=True),
    "dropout": lambda: attention(dropout=0.3, need_weights=True),
    "no bias": lambda: attention(bias=False, need_weights=False),
    "bias_kv and zero_attn": lambda: attention(add_bias_kv=True, add_zero_attn=True),
    "other sizes": lambda: attention(kdim=12, vdim=12),
    "sequence first": lambda: attention(batch_first=False, need_weights=False),
}


def asks_for_none(m: Any, x: Tensor) -> Any:
    found, weights = m.attention(x, x, x, need_weights=False)
    return found if weights is None else (found, weights)


@cases({"asks_for_none": asks_for_none})
def test_attention_without_weights_gives_none(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(Net(case, attention=nn.MultiheadAttention(8, 2)), sequence(), dtype=dtype, examples=examples)


@cases(ATTENTION)
def test_multihead_attention(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(case(), sequence(), dtype=dtype, examples=examples)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_is_the_model_itself(batch: int, dtype: torch.dtype) -> None:
    x = sequence()[:batch].detach()
    same(nn.MultiheadAttention(8, 2, batch_first=True), x, x, x, dtype=dtype)


SDPA: dict[str, Function] = {
    "plain": lambda q: F.scaled_dot_product_attention(q, q, q),
    "float mask": lambda q: F.scaled_dot_product_attention(q, q, q, FLOAT_MASK),
    "big float mask": lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=BIG_MASK),
    "learned mask": lambda q: F.scaled_dot_product_attention(q, q, q, q @ q.transpose(-1, -2)),
    "bool mask": lambda q: F.scaled_dot_product_attention(q, q, q, ~CAUSAL),
    "is_causal": lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    "dropout": lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.3),
    "scale": lambda q: F.scaled_dot_product_attention(q, q, q, scale=0.7),
    "enable_gqa": lambda q: F.scaled_dot_product_attention(q, q[:, :1], q[:, :1], enable_gqa=True),
    "keywords": lambda q: F.scaled_dot_product_attention(query=q, key=q, value=q.float(), attn_mask=None),
    "by hand": lambda q: ((q @ q.transpose(-2, -1)) / 2 + FLOAT_MASK).softmax(-1) @ q,
    "in float32": lambda q: torch.softmax((q @ q.mT).float().masked_fill(CAUSAL, -1e30), -1).type_as(q) @ q,
}


@cases(SDPA)
def test_scaled_dot_product_attention(case: Function, dtype: torch.dtype, examples: bool) -> None:
    def heads(m: Any, x: Tensor) -> Tensor:
        q = m.fc(x).view(2, 5, 2, 4).transpose(1, 2)
        return case(q) + case(q.float())

    same(Net(heads), sequence(), dtype=dtype, examples=examples)


ENCODERS: dict[str, Function] = {
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "norm first": lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, activation="gelu", dropout=0.0),
    "activation of the user's": lambda: nn.TransformerEncoderLayer(8, 2, 16, activation=F.silu),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    "encoder with a norm": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16), 1, nn.LayerNorm(8), enable_nested_tensor=False
    ),
}


@cases(ENCODERS)
def test_transformer_encoders_as_eager_runs_them(case: Function, dtype: torch.dtype, examples: bool) -> None:
    """In eval mode eager may take a fast path that autocast on a CPU does not see; the converted model takes it too."""
    torch.manual_seed(0)
    same(case(), sequence(), dtype=dtype, examples=examples)
    same(nn.Sequential(nn.Linear(8, 8), case(), nn.Linear(8, 8)), sequence(), dtype=dtype, examples=examples)


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("dtype", LOW)
def test_transformer_masks(dtype: torch.dtype, examples: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    given = {"mask": lambda: CAUSAL, "pad": lambda: PADDING}
    same(
        Net(lambda m, x: m.layer(m.fc(x), src_mask=given["mask"]()), layer=layer),
        sequence(),
        dtype=dtype,
        examples=examples,
    )
    same(
        Net(lambda m, x: m.layer(x, src_key_padding_mask=given["pad"]()), layer=layer),
        sequence(),
        dtype=dtype,
        examples=examples,
    )
    decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    same(
        Net(lambda m, x: m.layer(x, m.fc(x).float(), tgt_mask=CAUSAL), layer=decoder),
        sequence(),
        dtype=dtype,
        examples=examples,
    )
    whole = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    same(whole, sequence(), sequence().detach() * 2, dtype=dtype, examples=examples)


def _recurrent(kind: type[nn.Module], **options: Any) -> Function:
    def forward(m: Any, x: Tensor) -> Any:
        output, state = m.rnn(m.fc(x).float())
        again, _ = m.rnn(x)
        return output @ torch.ones(output.shape[-1], 8) + again.sum(), state

    return lambda: Net(forward, rnn=kind(8, 8, batch_first=True, **options))


def _cells(kind: type[nn.Module]) -> Function:
    def forward(m: Any, x: Tensor) -> Any:
        state = None
        for step in range(3):
            state = m.cell(x[:, step], state)
        return m.fc(state)

    return lambda: Net(forward, cell=kind(8, 8))


def _lstm_cell_by_hand() -> Net:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden, memory = torch.zeros(2, 8), torch.zeros(2, 8)
        for step in range(3):
            hidden, memory = m.cell(x[:, step], (hidden, memory))
        return m.fc(hidden) + memory

    return Net(forward, cell=nn.LSTMCell(8, 8))


RECURRENT: dict[str, Function] = {
    "lstm": _recurrent(nn.LSTM),
    "deep lstm": _recurrent(nn.LSTM, num_layers=2, dropout=0.2, bidirectional=True),
    "lstm with a projection": _recurrent(nn.LSTM, proj_size=4),
    "lstm without bias": _recurrent(nn.LSTM, bias=False),
    "gru": _recurrent(nn.GRU, num_layers=2),
    "rnn": _recurrent(nn.RNN, nonlinearity="relu"),
    "lstm cell": _lstm_cell_by_hand,
    "gru cell": _cells(nn.GRUCell),
    "rnn cell": _cells(nn.RNNCell),
}


def _of_lstm(dtype: torch.dtype) -> bool | None:
    """What ``same`` is to expect of eager torch, which has no float16 LSTM, and on some CPUs no bfloat16 one."""
    return False if dtype == torch.bfloat16 and has_low_lstm() else None


@cases(RECURRENT)
def test_recurrent_modules(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(case(), sequence(), dtype=dtype, examples=examples, refused=_of_lstm(dtype))


def packed(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    sequences = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=m.sorted)
    output, _ = m.rnn(sequences)
    return nn.utils.rnn.pad_packed_sequence(output, batch_first=True)[0]


@cases({"gru": nn.GRU, "lstm": nn.LSTM})
def test_packed_sequences(case: Any, dtype: torch.dtype, examples: bool) -> None:
    refused = _of_lstm(dtype)
    for lengths, in_order in (([5, 3], True), ([3, 5], False)):
        model = Net(packed, rnn=case(8, 8, batch_first=True), sorted=in_order)
        same(model, sequence(), torch.tensor(lengths), dtype=dtype, examples=examples, refused=refused)


def tokens() -> Tensor:
    return torch.tensor([[1, 0, 3], [3, 3, 7]])


def _embedding(**options: Any) -> Function:
    return lambda: Net(lambda m, i: m.fc(m.table_(i)) + m.table_(i), table_=nn.Embedding(8, 8, **options))


def _bag(call: Function | None = None, **options: Any) -> Function:
    call = call or (lambda m, i: m.bag(i))
    return lambda: Net(lambda m, i: m.fc(call(m, i)), bag=nn.EmbeddingBag(8, 8, **options))


LOOKUPS: dict[str, Function] = {
    "embedding": _embedding(),
    "padding_idx": _embedding(padding_idx=3),
    "max_norm": lambda: Net(
        lambda m, i: m.fc(m.table_(i).clone()), table_=nn.Embedding(8, 8, max_norm=1.0).requires_grad_(False)
    ),
    "sparse": _embedding(sparse=True),
    "scale_grad_by_freq": _embedding(scale_grad_by_freq=True),
    "functional": lambda: Net(lambda m, i: F.embedding(i, m.w) @ m.w + F.embedding(input=i, weight=m.fc.weight)),
    "tied": lambda: Net(lambda m, i: F.linear(F.embedding(i, m.w), m.w)),
    "indexed": lambda: Net(lambda m, i: m.w[i] @ m.w + m.w.index_select(0, i.flatten()).sum(0)),
    "bag": _bag(),
    "bag of sums": _bag(mode="sum"),
    "bag of maxima": _bag(mode="max"),
    "bag with offsets": _bag(lambda m, i: m.bag(i.flatten(), torch.tensor([0, 2, 3])), mode="mean"),
    "bag with the last offset": _bag(
        lambda m, i: m.bag(i.flatten(), torch.tensor([0, 2, 6])), mode="sum", include_last_offset=True
    ),
    "bag with weights": _bag(lambda m, i: m.bag(i, per_sample_weights=torch.ones(2, 3) / 3), mode="sum"),
    "bag with padding": _bag(padding_idx=3, mode="mean"),
    "sparse bag": _bag(sparse=True),
}


@cases(LOOKUPS)
def test_embeddings(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(case(), tokens(), dtype=dtype, examples=examples)


def images() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(2, 4, 6, 6, requires_grad=True)


def _images(*layers: nn.Module) -> Function:
    return lambda: copy.deepcopy(nn.Sequential(nn.Conv2d(4, 4, 3), *layers, nn.Conv2d(4, 2, 1)))


IMAGES: dict[str, Function] = {
    "batch norm": _images(nn.BatchNorm2d(4)),
    "batch norm that counts": _images(nn.BatchNorm2d(4, momentum=None)),
    "batch norm without weights": _images(nn.BatchNorm2d(4, affine=False)),
    "batch norm without statistics": _images(nn.BatchNorm2d(4, track_running_stats=False)),
    "batch norm in eval": _images(nn.BatchNorm2d(4).eval()),
    "instance norm": _images(nn.InstanceNorm2d(4, affine=True)),
    "instance norm with statistics": _images(nn.InstanceNorm2d(4, track_running_stats=True)),
    "group norm": _images(nn.GroupNorm(2, 4)),
    "local response norm": _images(nn.LocalResponseNorm(2)),
    "layer norm": _images(nn.LayerNorm([4, 4, 4], elementwise_affine=False)),
    "rms norm": _images(nn.RMSNorm(4)),
    "dropout": _images(nn.Dropout(0.3), nn.Dropout2d(0.2), nn.AlphaDropout(0.1)),
    "pooling": _images(nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(2)),
    "transposed": _images(nn.ConvTranspose2d(4, 4, 2), nn.ReLU(inplace=True), nn.UpsamplingBilinear2d(scale_factor=2)),
    "same padding": _images(nn.Conv2d(4, 4, 3, padding="same", groups=2), nn.PReLU(4), nn.PixelShuffle(1)),
    "circular padding": _images(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Hardswish(), nn.Softplus()),
    "random activation": _images(nn.RReLU(), nn.GELU(), nn.ELU(inplace=True)),
}


@cases({k: v for k, v in IMAGES.items() if k != "batch norm in eval"})
def test_images(case: Function, dtype: torch.dtype, examples: bool) -> None:
    refused = None if dtype == torch.float16 else False
    same(case(), images(), dtype=dtype, examples=examples, refused=refused)
    same(case().to(memory_format=torch.channels_last), images().detach().contiguous(memory_format=torch.channels_last),
         dtype=dtype, examples=examples, refused=refused)  # fmt: skip


# -- how it is called ----------------------------------------------------------------------------------------------


def checkpointed(reentrant: bool) -> Function:
    from torch.utils.checkpoint import checkpoint

    return lambda m, x: checkpoint(lambda y: m.fc(y).relu() @ m.w, x, use_reentrant=reentrant) + m.fc(x)


@cases({"reentrant": checkpointed(True), "not reentrant": checkpointed(False)})
def test_checkpoint(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(nn.Sequential(nn.Linear(8, 8), Net(case)), rows(), dtype=dtype, examples=examples)


@pytest.mark.parametrize("dtype", LOW)
def test_checkpoint_in_the_models_own_forward(dtype: torch.dtype) -> None:
    same(Net(checkpointed(False)), rows(), dtype=dtype)
    with pytest.raises(fxamp.CaptureError, match="put that line into a submodule"):
        fxamp.convert(Net(checkpointed(True)), dtype=dtype)


def _double(call: Function, model: nn.Module, x: Tensor) -> Any:
    output = call(x)
    (slope,) = torch.autograd.grad(output.float().pow(2).sum(), x, create_graph=True)
    slope.pow(2).sum().backward()
    return output, slope, x.grad, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("dtype", LOW)
def test_double_backward(dtype: torch.dtype) -> None:
    found = []
    for converted in (True, False):
        model = Net(lambda m, x: torch.tanh(m.fc(torch.tanh(m.fc(x)) @ m.w)) @ m.w)
        amp = fxamp.convert(model, dtype=dtype) if converted else torch.autocast("cpu", dtype)(model)
        found.append(_double(amp, model, rows()))
    assert_same(*found)


@pytest.mark.parametrize("dtype", LOW)
def test_gradients_add_up_over_several_forwards(dtype: torch.dtype) -> None:
    found = []
    for converted in (True, False):
        model = Net(lambda m, x: m.fc(m.fc(x)) @ m.w + x @ m.w)
        amp = fxamp.convert(model, dtype=dtype) if converted else torch.autocast("cpu", dtype)(model)
        sum(amp(rows() * i).float().sum() for i in range(3)).backward()
        for i in range(2):
            amp(rows() + i).float().pow(2).sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert_same(*found)


@pytest.mark.parametrize("kept", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", LOW)
def test_models_that_are_in_another_dtype(kept: torch.dtype, dtype: torch.dtype) -> None:
    for examples in (False, True):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)).to(kept)
        x = rows().detach().to(kept).requires_grad_()
        refused = kept != torch.float64 and kept != dtype  # layer_norm of one low dtype with weights of the other
        if refused:
            with quiet(), pytest.raises((RuntimeError, fxamp.FxampError)):
                fxamp.convert(model, dtype=dtype, example_inputs=(x.detach(),) if examples else None)(x)
        else:
            same(model, x, dtype=dtype, examples=examples)
        linear = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).to(kept)
        same(linear, x, dtype=dtype, examples=examples)


@pytest.mark.parametrize("dtype", LOW)
def test_a_model_half_converted_by_hand(dtype: torch.dtype) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.full, self.wide = nn.Linear(8, 8).to(dtype), nn.Linear(8, 8), nn.Linear(8, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            y = self.low(x.to(self.low.weight.dtype)) + self.full(x)
            return self.wide(y.double()).float() @ self.full.weight + self.low(y)

    for examples in (False, True):
        same(Half(), rows(), dtype=dtype, examples=examples)


LAYOUTS: dict[str, Function] = {
    "transposed": lambda: torch.randn(8, 4).t().requires_grad_(),
    "expanded": lambda: torch.randn(1, 8).expand(4, 8),
    "strided": lambda: torch.randn(8, 16)[::2, ::2],
    "no rows": lambda: torch.randn(0, 8),
    "one row": lambda: torch.randn(1, 8, requires_grad=True),
    "a vector": lambda: torch.randn(8, requires_grad=True),
    "many dimensions": lambda: torch.randn(1, 2, 1, 3, 8, requires_grad=True),
    "infinite": lambda: torch.tensor([[float("inf"), -float("inf"), 1e30, 1e-40, 65504.0, 65520.0, 0.0, -0.0]]),
    "of a subclass": lambda: nn.Parameter(torch.randn(4, 8)),
}


@cases(LAYOUTS)
def test_inputs_of_any_layout(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(
        Net(lambda m, x: torch.relu(m.fc(x)) @ m.w + F.layer_norm(x @ m.w, (8,))),
        case(),
        dtype=dtype,
        examples=examples,
    )


ZERO_DIMENSIONS: dict[str, Function] = {
    "sum": lambda m, s: m.fc(m.w * s).sum() * s + s.exp(),
    "stack": lambda m, s: torch.stack([s, m.fc(m.w).sum()]) @ m.w[0, :2],
    "low scalar": lambda m, s: (m.fc(m.w).mean() * m.w) @ m.w + s,
    "promotes low": lambda m, s: m.fc(m.w) * s.double() + s,
    "item-like index": lambda m, s: m.w[0, 0] * s + m.fc(m.w)[1, 1],
    "clamp and where": lambda m, s: torch.where(s > 0, m.fc(m.w), s) + m.fc(m.w).clamp(min=s),
}


@cases(ZERO_DIMENSIONS)
def test_tensors_without_dimensions(case: Function, dtype: torch.dtype, examples: bool) -> None:
    same(Net(case), torch.tensor(0.7, requires_grad=True), dtype=dtype, examples=examples)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients(context: Any, dtype: torch.dtype) -> None:
    model = Net(lambda m, x: m.fc(m.fc(x)) @ m.w + x @ m.w)
    amp, x = fxamp.convert(model, dtype=dtype), rows()
    with context():
        with torch.autocast("cpu", dtype):
            expected = model(x)
        assert_same(amp(x), expected)
        assert amp(x).is_inference() == expected.is_inference()
    assert_same(*[_gradients(m, rows()) for m in (amp, torch.autocast("cpu", dtype)(model))])


def _gradients(call: Function, x: Tensor) -> Any:
    output = call(x)
    output.float().sum().backward()
    return output.detach(), x.grad


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("outer", [*LOW, None])
def test_the_callers_autocast_changes_nothing(outer: torch.dtype | None, dtype: torch.dtype) -> None:
    model = Net(lambda m, x: m.norm(m.fc(m.fc(x)) @ m.w), norm=nn.GRU(8, 8))
    amp = fxamp.convert(model, dtype=dtype)
    expected = amp(rows())
    with torch.autocast("cpu", outer, enabled=outer is not None):
        for _ in range(2):
            assert_same(amp(rows()), expected)
        assert torch.is_autocast_enabled("cpu") == (outer is not None)


class Scaled(nn.Parameter):
    """A parameter of a class of the user's."""


def test_parameters_of_a_class_of_the_users() -> None:
    for dtype in LOW:
        same(Net(lambda m, x: x @ m.own + m.fc(x) @ m.own, own=Scaled(torch.randn(8, 8))), rows(), dtype=dtype)


def test_modules_that_are_lazily_initialised() -> None:
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4))
    with pytest.raises(fxamp.CaptureError, match=r"'0\.weight' of Sequential is not initialised"):
        fxamp.convert(lazy)
    with torch.no_grad():
        lazy(rows())
    same(lazy, rows())


class Spectral(nn.Module):
    """Mixes in the frequency domain with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x) * self.weight
        return self.fc(torch.fft.irfft(spectrum, n=8)) + spectrum.abs().sum()


def test_complex_models() -> None:
    for dtype in LOW:
        for examples in (False, True):
            same(Spectral(), rows(), dtype=dtype, examples=examples)


@pytest.mark.parametrize("policy", ["autocast", "full"])
def test_hooks_fire_once_a_call(policy: str) -> None:
    seen: list[str] = []

    def hooked() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
        model[0].register_forward_pre_hook(lambda m, i: (seen.append("pre"), (i[0] * 2,))[1])
        model[2].register_forward_hook(lambda m, i, o: (seen.append(f"post {o.dtype}"), o + 1)[1])
        model[3].register_full_backward_hook(lambda m, i, o: seen.append(f"backward {o[0].dtype}"))
        model[0].weight.register_hook(lambda g: (seen.append(f"gradient {g.dtype}"), g * 2)[1])
        model[2].bias.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
        return model

    found = []
    for converted in (True, False):
        model, x = hooked(), rows()
        low = torch.autocast("cpu", torch.bfloat16, enabled=policy == "autocast")
        amp = fxamp.convert(model, dtype=torch.bfloat16, policy=policy) if converted else low(model)
        assert not seen
        output = amp(x)
        output.register_hook(lambda g: seen.append("output"))
        output.float().pow(2).sum().backward()
        found.append((output.detach(), x.grad, [p.grad for p in model.parameters()], list(seen)))
        seen.clear()
    assert_same(*found)


@pytest.mark.parametrize("dtype", LOW)
def test_copies_run_as_the_original(dtype: torch.dtype) -> None:
    import io

    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 8))
    amp = fxamp.convert(model, dtype=dtype)
    stream = io.BytesIO()
    torch.save(amp, stream)
    stream.seek(0)
    copies = [copy.deepcopy(amp), torch.load(stream, weights_only=False)]
    for training in (True, False):
        expected = run(amp.train(training), (rows(),), {}, nullcontext())
        amp.zero_grad()
        for other in copies:
            assert_same(run(other.train(training), (rows(),), {}, nullcontext()), expected)
            other.zero_grad()
