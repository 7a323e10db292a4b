"""Which frontend takes a model, in which order, and what a conversion leaves behind."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxamp
from fxamp.capture import Program
from tests.helpers import assert_same, check_against_autocast

BF16 = torch.bfloat16


class Config:
    """As the config of a model of transformers: an object that every module has."""

    def __init__(self) -> None:
        self.kind: str | None = None
        self.count = 0


class WithConfig(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.config = nn.Linear(4, 4), Config()

    def forward(self, x: Tensor) -> Tensor:
        if self.config.kind is None:
            self.config.kind = "regression"
        return self.fc(x) * (2 if self.config.kind == "regression" else 3)


class ByDtype(WithConfig):
    """As transformers does: only the first call looks at the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if self.config.kind is None:
            self.config.kind = "regression" if x.dtype == torch.float32 else "classes"
        return self.fc(x) * (2 if self.config.kind == "regression" else 3)


def test_what_is_settled_by_what_it_is_given() -> None:
    model, x = ByDtype(), torch.randn(2, 4)
    amp = fxamp.convert(model, dtype=BF16, example_inputs=(x,))
    assert model.config.kind is None
    with torch.autocast("cpu", BF16):
        assert_same(amp(x), model(x))


@pytest.mark.parametrize("examples", [False, True])
def test_what_a_forward_settles_at_its_first_call_is_settled(examples: bool) -> None:
    model = WithConfig()
    amp = fxamp.convert(model, dtype=BF16, example_inputs=(torch.randn(2, 4),) if examples else None)
    assert model.config.kind is None  # a conversion leaves nothing behind
    x = torch.randn(2, 4)
    with torch.autocast("cpu", BF16):
        assert_same(amp(x), model(x))


class Hurries(WithConfig):
    """The first call goes another way than the second."""

    def forward(self, x: Tensor) -> Tensor:
        first, self.config.kind = self.config.kind is None, "seen"
        return self.fc(x) * 2 if first else self.fc(self.fc(x))


class Counts(WithConfig):
    def forward(self, x: Tensor) -> Tensor:
        self.config.count += 1
        return self.fc(x)


@pytest.mark.parametrize("kind", [Hurries, Counts])
@pytest.mark.parametrize("examples", [False, True])
def test_state_that_does_not_settle_is_refused(kind: type[WithConfig], examples: bool) -> None:
    model = kind()
    with pytest.raises(fxamp.CaptureError, match=r"changes self\.config"):
        fxamp.convert(model, example_inputs=(torch.randn(2, 4),) if examples else None)
    assert (model.config.kind, model.config.count) == (None, 0)


class Part(nn.Module):
    """Goes by what it computes, so that it is one call; what it gives back may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        y = self.fc(x)
        if (y * 0).sum() == 1:
            y = -y
        return SimpleNamespace(hidden=y, more=None if self.training else y.float())


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = Part(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.part(x)
        y = self.head(out.hidden)
        return y if out.more is None else y + out.more.sum(-1, keepdim=True)


def test_what_only_a_run_tells_is_told_by_one_run_that_leaves_nothing_behind() -> None:
    model, state = Whole(), torch.get_rng_state()
    check_against_autocast(copy.deepcopy(model), torch.randn(3, 4), examples=True)
    torch.set_rng_state(state)
    amp = fxamp.convert(model, dtype=BF16, example_inputs=(torch.randn(3, 4),))
    assert float(model.part.calls) == 0
    assert amp.report().frontend == "torch.fx"
    assert amp.report().totals["opaque"] == 1


def test_a_module_with_hooks_is_not_run_for_that() -> None:
    model, seen = Whole(), []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    fxamp.convert(model, dtype=BF16, example_inputs=(torch.randn(3, 4),))
    assert not seen


TABLES: dict[int, Tensor] = {}


def from_a_dict(size: int) -> Tensor:
    if size not in TABLES:
        TABLES[size] = torch.arange(size).float()
    return TABLES[size]


@functools.lru_cache
def from_a_cache(size: int) -> Tensor:
    return torch.arange(size).float()


class Tabled(nn.Module):
    """One call, as it unpacks what it is given."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = table

    def forward(self, shape: Any) -> Any:
        _, size = shape
        return self.table(size)


class Added(nn.Module):
    def __init__(self, table: Any) -> None:
        super().__init__()
        self.fc, self.part = nn.Linear(4, 4), Tabled(table)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) + self.part(x.shape)


@pytest.mark.parametrize("table", [from_a_dict, from_a_cache])
def test_caches_of_the_users_code_keep_no_fake_tensor(table: Any) -> None:
    model, x = Added(table), torch.randn(2, 4)
    amp = fxamp.convert(model, dtype=BF16, example_inputs=(x,))
    for call in (amp, model):
        assert type(call(x)) is Tensor


class Masked(nn.Module):
    """Fails under autocast, as a mask with the least number of float32 does in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.fc(x)
        return scores.masked_fill(x > 0, torch.finfo(torch.float32).min).softmax(-1)


class Meets(nn.Module):
    """Fails under autocast: two dtypes meet in an operator that takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.dot(self.fc(x)[0], x[0])


@pytest.mark.parametrize("kind", [Masked, Meets])
@pytest.mark.parametrize("frontend", ["torch.fx", "Dynamo"])
def test_a_model_that_autocast_cannot_run_is_converted_as_it_is(
    kind: type[nn.Module], frontend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Program, "frontends", (frontend,))
    model, x = kind(), torch.randn(3, 4)
    with torch.autocast("cpu", BF16), pytest.raises(RuntimeError):
        model(x)
    if (kind, frontend) == (Meets, "Dynamo"):
        pytest.skip("Dynamo runs the model on fake tensors under autocast itself")
    amp = fxamp.convert(model, dtype=BF16, example_inputs=(x,))
    assert_same(amp(x), model(x))
    report = amp.report()
    assert report.policy == "full"
    assert "no casts, as autocast cannot run this model: " in str(report)
    assert f"{__file__}:" in report.note
    assert report.to_dict()["note"] == report.note
    assert copy.deepcopy(amp).report().note == report.note


def test_a_graph_that_autocast_cannot_run_is_compiled_as_it_is() -> None:
    torch._dynamo.reset()
    model, x = Masked(), torch.randn(3, 4)
    assert_same(torch.compile(model, backend="fxamp", options={"dtype": BF16})(x), model(x))


@pytest.mark.parametrize("number", [-3e4, float("-inf"), torch.finfo(BF16).min])
def test_numbers_that_the_low_dtype_holds_are_no_hindrance(number: float) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).masked_fill(x > 0.5, number).softmax(-1)

    assert check_against_autocast(Model(), torch.randn(3, 4), examples=True).report().policy == "autocast"


def test_inputs_that_do_not_fit_are_an_error_still() -> None:
    with pytest.raises(fxamp.CaptureError, match="example_inputs do not fit the model"):
        fxamp.convert(nn.Sequential(nn.Linear(4, 4)), example_inputs=(torch.randn(2, 3),))
