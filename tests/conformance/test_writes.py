"""A cast of a tensor is never used after that tensor was written to, whatever wrote to it and whoever else sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxamp
from tests.conformance.test_semantics import Net, cases, rows, same
from tests.helpers import quiet, run

Write = Callable[[Any, Tensor], Any]


class Dirty(torch.autograd.Function):
    """Writes to its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(0.5)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 0.5


class Halving(nn.Module):
    """Python state keeps it a call; it writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x.mul_(0.5)


@torch.library.custom_op("fxamp_tests::halve", mutates_args={"x"})
def halve(x: Tensor) -> None:
    x.mul_(0.5)


def make(function: Any) -> Net:
    return Net(
        function,
        drop=nn.Dropout(0.5, inplace=True),
        bn=nn.BatchNorm1d(8),
        halving=Halving(),
        numbers=nn.Parameter(torch.zeros(8, 8, dtype=torch.int64), requires_grad=False),
        view=nn.Parameter(torch.randn(8, 8), requires_grad=False),
    )


# What writes to a tensor, which is a buffer or an activation.
SILENT: dict[str, Write] = {
    "dropout in place, as a module": lambda m, t: m.drop(t),
    "foreach": lambda m, t: torch._foreach_mul_([m.view, t], 0.5),
    "out= of two": lambda m, t: torch.sort(t * 1, out=(t, m.numbers)),
    "embedding with max_norm": lambda m, t: F.embedding(m.index, t, max_norm=0.5),
    "embedding_bag with max_norm": lambda m, t: F.embedding_bag(m.index[None], t, max_norm=0.5),
    "batch_norm": lambda m, t: F.batch_norm(m.view, t[0], t[1] ** 2, training=True),
    "instance_norm": lambda m, t: F.instance_norm(m.view[None], t[0], t[1] ** 2, use_input_stats=True),
    "init": lambda m, t: nn.init.constant_(t, 0.25),
    "a custom operator": lambda m, t: halve(t),
    "its overload": lambda m, t: torch.ops.fxamp_tests.halve.default(t),
    "an autograd function": lambda m, t: Dirty.apply(t),
    "an opaque module": lambda m, t: m.halving(t),
    "data": lambda m, t: t.data.mul_(0.5),
    "detach": lambda m, t: t.detach()[1:].zero_(),
}


def between_uses_of_a_buffer(write: Write) -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        first = x.detach() @ m.table
        with torch.no_grad():
            write(m, m.table)
        return first + x @ m.table

    return forward


def between_uses_of_an_activation(write: Write) -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.fc(x), m.fc(x * 2)]).float().detach()
        first = y @ m.w
        with torch.no_grad():
            write(m, y)
        return first.sum() + y @ m.v

    return forward


@cases(SILENT)
def test_a_buffer_is_cast_again(case: Write, dtype: torch.dtype, examples: bool) -> None:
    same(make(between_uses_of_a_buffer(case)), rows(), dtype=dtype, examples=examples, refused=None)


@cases(SILENT)
def test_an_activation_is_cast_again(case: Write, dtype: torch.dtype, examples: bool) -> None:
    same(make(between_uses_of_an_activation(case)), rows(), dtype=dtype, examples=examples, refused=None)


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.parametrize("between", [between_uses_of_a_buffer, between_uses_of_an_activation])
def test_fast_shares_no_cast_across_a_write(name: str, between: Any) -> None:
    model = make(between(SILENT[name]))
    exact, fast = (fxamp.convert(make(model.function), dtype=torch.bfloat16, policy=p) for p in ("autocast", "fast"))
    with quiet():
        expected, _ = run(exact, (rows(),), {}, torch.enable_grad())
        found, _ = run(fast, (rows(),), {}, torch.enable_grad())
    # A stale cast is far off; a sum that stays in float32 is off by a rounding.
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-2, equal_nan=True)


def statistics_of_a_norm(m: Any, x: Tensor) -> Tensor:
    first = F.linear(x, m.w, m.bn.running_mean)
    return first + m.bn(x) + F.linear(x, m.w, m.bn.running_mean)


def frozen_through_data(m: Any, x: Tensor) -> Tensor:
    first = x @ m.frozen
    m.frozen.data.mul_(0.5)
    return first + x @ m.frozen + x @ m.w


def two_names_of_one_memory(m: Any, x: Tensor) -> Tensor:
    first = x.detach() @ m.table
    m.alias.mul_(0.5)
    return first + x.detach() @ m.table


def set_to_another_dtype(m: Any, x: Tensor) -> Tensor:
    result = torch.cat([m.state, m.fc(x) * 2], 1)
    m.state = m.fc(x).detach()
    return result


def set_to_the_same_dtype(m: Any, x: Tensor) -> Tensor:
    result = torch.cat([m.state, m.fc(x) * 2], 1)
    m.state = m.state * 0.5 + m.fc(x).detach().float()
    return result


OTHERS = {
    f.__name__: f
    for f in (
        statistics_of_a_norm,
        frozen_through_data,
        two_names_of_one_memory,
        set_to_another_dtype,
        set_to_the_same_dtype,
    )
}


@cases(OTHERS)
def test_what_the_model_writes_to_itself(case: Any, dtype: torch.dtype, examples: bool) -> None:
    model = make(case)
    model.register_buffer("state", torch.zeros(4, 8))
    model.register_buffer("alias", model.table[:4])
    same(model, rows(), dtype=dtype, examples=examples)


def test_an_attribute_that_keeps_its_dtype_is_known() -> None:
    for function, soft in ((set_to_the_same_dtype, 0), (set_to_another_dtype, 1)):
        model = make(function)
        model.register_buffer("state", torch.zeros(4, 8))
        totals = fxamp.convert(model, dtype=torch.bfloat16, example_inputs=(rows().detach(),)).report().totals
        assert totals["soft_casts"] == soft


def without_gradients_first(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x).float()
    with torch.no_grad():
        first = x @ m.w + h @ m.v
    return first + x @ m.w + h @ m.v


def test_fast_shares_no_cast_without_gradients_with_a_use_that_has_them() -> None:
    expected, fast = (
        fxamp.convert(make(without_gradients_first), dtype=torch.bfloat16, policy=p) for p in ("full", "fast")
    )
    _, wanted = run(expected, (rows(),), {}, torch.enable_grad())
    _, found = run(fast, (rows(),), {}, torch.enable_grad())
    assert [name for name, g in found.items() if g is None] == [name for name, g in wanted.items() if g is None]
    torch.testing.assert_close(found["input 0"], wanted["input 0"], rtol=0.1, atol=0.1)


def recurrent_and_plain(m: Any, x: Tensor) -> Tensor:
    return m.gru(torch.einsum("ij,jk->ik", m.fc(x), m.w)[None])[0] + x @ m.w


def hold(amp: fxamp.AmpModule) -> Any:
    return amp.hold_weights()


def outer_region(amp: fxamp.AmpModule) -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("context", [hold, outer_region])
def test_an_optimizer_step_is_seen_where_copies_outlive_a_call(context: Any) -> None:
    amp = fxamp.convert(Net(recurrent_and_plain, gru=nn.GRU(8, 8)), dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(amp.parameters(), 0.1)
    with context(amp):
        amp(rows()).sum().backward()
        optimizer.step()
        inside = amp(rows())
    assert torch.equal(inside, amp(rows()))
