"""Branches on data: the example inputs answer, and every call is asked before its graph runs."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxamp
from fxamp.runtime import conversion
from tests.helpers import assert_same, run
from tests.oracle import cuda_rules

BF16 = torch.bfloat16
X = torch.randn(2, 3, 4)
FULL, PADDED = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[False, True, True], [True, True, True]])


def variants(amp: fxamp.AmpModule) -> int:
    return len({id(variant.traced) for _, variant in amp._conversion.variants})


def asked(amp: fxamp.AmpModule) -> list[str]:
    """The calls that are made ahead of a call of the graph that is shown."""
    questions = amp._conversion.base.traced.questions
    parts = (questions.of_data, questions.of_shapes)
    return [node.name for part in parts for node in part.graph.nodes if node.op.startswith("call")]


def same(model: nn.Module, amp: fxamp.AmpModule, *args: Any) -> None:
    assert_same(run(amp, args, {}, nullcontext()), run(model, args, {}, torch.autocast("cpu", BF16)))


class Asking(nn.Module):
    """A layer around a function of (module, x, mask)."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc, self.norm, self.function = nn.Linear(4, 4), nn.BatchNorm1d(3), function
        self.register_buffer("on", torch.tensor(False))
        self.plain = torch.tensor(False)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.function(self, x, mask)


def of_a_mask(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return m.fc(x) if mask.all() else m.fc(x).masked_fill(~mask[..., None], 0.0)


def of_an_element(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return m.fc(x) * 2 if False in mask[:, [0, -1]] else m.fc(x)


def of_two_elements(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    ids = mask.long()
    return m.fc(x) if ids[0, 0] >= ids[0, 1] and int(ids.sum()) == 6 else -m.fc(x)


def of_a_range(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(mask.shape[1], device=x.device)
    return m.fc(x) if (places[1:] - places[:-1] == 1).all() and mask.all() else x


def of_a_length(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = m.fc(x).relu()
    return y if mask[:, : y.shape[1]].all() else y * 3  # of a layer only its shape is wanted


def of_a_count(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = m.fc(x)
    for i in range(int(mask[0].sum())):
        y = y + i
    return y


@pytest.mark.parametrize("function", [of_a_mask, of_an_element, of_two_elements, of_a_range, of_a_length, of_a_count])
@pytest.mark.parametrize("training", [True, False])
def test_each_way_has_a_graph_of_its_own(function: Any, training: bool) -> None:
    model = Asking(function).train(training)
    for first, second in ((FULL, PADDED), (PADDED, FULL)):
        amp = fxamp.convert(model, dtype=BF16, example_inputs=(X, first))
        same(model, amp, X, first)
        assert variants(amp) == 1
        for mask in (second, first, second):
            same(model, amp, X, mask)
        assert variants(amp) == 2
        amp.train(not training)
        model.train(not training)
        for mask in (first, second):
            same(model, amp, X, mask)
        model.train(training)


def of_floats(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return m.fc(x) if x.sum() > 0 and not torch.isnan(x).any() else m.fc(-x)


@pytest.mark.parametrize("rules", ["cpu", "cuda"])
def test_a_sum_of_float32_is_the_same_under_all_rules(rules: str) -> None:
    model, x = Asking(of_floats), X.abs()
    amp = fxamp.convert(model, dtype=BF16, device_type=rules, example_inputs=(x, FULL))
    with cuda_rules() if rules == "cuda" else nullcontext():
        for inputs in (x, -x, x * 2, -x):
            same(model, amp, inputs, FULL)
        assert variants(amp) == 2
    low = x.bfloat16()  # of which the sum is another one where autocast has it in float32
    with pytest.raises(fxamp.CaptureError, match="depends on a tensor") if rules == "cuda" else nullcontext():
        same(model, amp, low, FULL)


def test_what_autocast_casts_decides_nothing() -> None:
    def product(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.fc(x) if (x @ x.transpose(1, 2)).sum() > 0 else x

    for rules in ("cpu", "cuda"):
        with pytest.raises(fxamp.CaptureError, match="depends on a tensor value"):
            fxamp.convert(Asking(product), device_type=rules, example_inputs=(X, FULL))


def writes(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    seen = mask.clone()
    seen[0, 0] = False
    return m.fc(x) if seen.all() else x


def writes_to_an_input(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    mask.view(-1).logical_not_()
    return m.fc(x) if mask.all() else x


def writes_through_a_module(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = m.norm(x)
    return y if m.norm.num_batches_tracked > 1 else m.fc(y)


def draws(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return m.fc(x) if torch.rand(3).sum() > 0 else x


def leaves_memory_as_it_is(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return m.fc(x) if torch.empty(3).isnan().all() else x


def reads_what_may_be_set(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = m.fc(x) if m.plain else x
    m.plain = mask.all()
    return y


def looks_at_the_output(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = m.fc(x)
    return y if y.sum() > 0 else -y


@pytest.mark.parametrize(
    "function",
    [
        writes,
        writes_to_an_input,
        writes_through_a_module,
        draws,
        leaves_memory_as_it_is,
        reads_what_may_be_set,
        looks_at_the_output,
    ],
)
def test_what_does_not_follow_from_the_arguments_alone_is_refused(function: Any) -> None:
    with pytest.raises(fxamp.CaptureError, match=r"depends on a tensor value|for the next call"):
        fxamp.convert(Asking(function), example_inputs=(X, FULL.clone()))


def test_a_write_to_something_else_is_none_to_what_is_asked() -> None:
    def other(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        y = m.fc(x)
        y += 1
        y[0] = 0
        return m.norm(y) if mask.all() else y

    model = Asking(other)
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(X, FULL))
    for mask in (FULL, PADDED, FULL):
        same(model, amp, X, mask)


def switches_on(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = m.fc(x) * 2 if m.on else m.fc(x)
    m.on.fill_(True)
    return y


def test_a_buffer_is_asked_as_it_is_at_the_call() -> None:
    model = Asking(switches_on)
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(X, FULL))
    for _ in range(3):
        same(model, amp, X, FULL)
    assert variants(amp) == 2
    for made in (copy.deepcopy(amp), pickle.loads(pickle.dumps(fxamp.convert(nn.Linear(4, 4))))):
        assert made is not amp
    copied, theirs = copy.deepcopy(amp), copy.deepcopy(model)
    copied.on.fill_(False)
    theirs.on.fill_(False)
    same(theirs, copied, X, FULL)


class Noisy(nn.Module):
    """Draws and counts ahead of what depends on the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.norm = nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(self.drop(x))
        return self.fc(y) if mask.all() else self.drop(self.fc(y))


def test_nothing_has_happened_when_another_graph_is_needed() -> None:
    model = Noisy()
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(X, FULL))
    for mask in (PADDED, FULL, PADDED):
        same(model, amp, X, mask)  # from one seed
    assert_same(dict(amp.named_buffers()), dict(model.named_buffers()))


def test_only_what_decides_is_evaluated() -> None:
    model = Asking(of_a_mask)
    amp = fxamp.convert(model, dtype=BF16, example_inputs=(X, FULL))
    assert asked(amp) == ["all_1"]
    assert asked(fxamp.convert(Asking(of_a_length), dtype=BF16, example_inputs=(X, FULL))) == [
        *("stand_in", "stand_in_1", "stand_in_2", "linear", "relu", "getattr_1", "getitem", "getitem_1", "all_1")
    ]
    plain = fxamp.convert(Asking(lambda m, x, mask: m.fc(x)), dtype=BF16, example_inputs=(X, FULL))
    assert asked(plain) == []
    assert not plain._conversion.base.particular, "asked nothing at all"


class TestShapes:
    def test_another_size_or_dimension_takes_another_graph(self) -> None:
        def sized(m: Any, x: Tensor, mask: Tensor) -> Tensor:
            x = x[None] if x.dim() == 2 else x
            return m.fc(x) if x.shape[1] > 4 else -m.fc(x)

        model = Asking(sized)
        amp = fxamp.convert(model, dtype=BF16, example_inputs=(X, FULL))
        for shape in ((2, 3, 4), (2, 5, 4), (7, 4), (1, 2, 4), (3, 4)):
            same(model, amp, torch.randn(shape), FULL)
        assert variants(amp) == 4

    def test_compiled_code_goes_by_them(self) -> None:
        def sized(m: Any, x: Tensor, mask: Tensor) -> Tensor:
            return m.fc(x) if x.shape[0] > 3 else -m.fc(x)

        amp = fxamp.convert(Asking(sized), dtype=BF16, example_inputs=(X, FULL))
        torch.compiler.reset()
        compiled = torch.compile(amp, backend="aot_eager", fullgraph=True)
        assert_same(compiled(X, FULL), amp(X, FULL))
        more = torch.randn(5, 3, 4)
        with pytest.raises(Exception, match=r"super\(\)|graph of its own"):
            compiled(more, FULL)
        amp(more, FULL)
        for x in (more, X, torch.randn(6, 3, 4), torch.randn(3, 3, 4)):
            assert_same(compiled(x, FULL), amp(x, FULL))

    def test_compiled_code_cannot_go_by_data_in_one_graph(self) -> None:
        amp = fxamp.convert(Asking(of_a_mask), dtype=BF16, example_inputs=(X, FULL))
        expected = amp(X, FULL), amp(X, PADDED)
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(Exception, match="data-dependent"):
                torch.compile(amp, backend="aot_eager", fullgraph=True)(X, FULL)
            compiled = torch.compile(amp, backend="aot_eager")
            assert_same((compiled(X, FULL), compiled(X, PADDED)), expected)


class TestCopies:
    def test_of_a_module_that_branches_on_data(self) -> None:
        model = Asking(of_a_mask)
        amp = fxamp.convert(model, dtype=BF16, example_inputs=(X, FULL))
        amp(X, PADDED)
        for made in (copy.deepcopy(amp), amp.replan(fxamp.Policy.autocast("cpu", BF16)), copy.copy(amp)):
            for mask in (PADDED, FULL):
                same(model, made, X, mask)
                assert_same(made(X, mask), amp(X, mask))
        full = amp.replan(fxamp.Policy.full())
        for mask in (PADDED, FULL):
            assert_same(full(X, mask), model(X, mask))

    def test_a_frozen_one_has_each_way_that_was_called(self) -> None:
        amp = fxamp.convert(Asking(of_a_mask), dtype=BF16, example_inputs=(X, FULL))
        amp(X, PADDED)  # in training
        frozen = amp.freeze()
        amp.eval().requires_grad_(False)
        for mask in (PADDED, FULL):
            assert_same(frozen(X, mask), amp(X, mask))
        with pytest.raises(fxamp.CaptureError, match="was frozen before a call"):
            fxamp.convert(Asking(of_a_mask), example_inputs=(X, FULL)).freeze()(X, PADDED)

    def test_pickled(self) -> None:
        amp = fxamp.convert(Lengths(), dtype=BF16, example_inputs=(X, FULL))
        amp(X, PADDED)
        made = pickle.loads(pickle.dumps(amp))
        for mask in (PADDED, FULL, ~FULL):
            assert_same(made(X, mask), amp(X, mask))

    def test_in_another_dtype(self) -> None:
        model = Asking(of_floats)
        amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(X, FULL)).bfloat16()
        model.bfloat16()
        for x in (X.bfloat16(), -X.bfloat16(), X):
            same(model, amp, x, FULL)

    def test_followed_after_it_was_moved(self) -> None:
        model = Asking(of_a_mask)
        amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(X, FULL)).bfloat16()
        model.bfloat16()
        for owner in (amp.get_submodule("fc"), model.fc):
            owner.register_forward_hook(lambda module, args, output: output * 2)
        for mask in (PADDED, FULL):
            same(model, amp, X.bfloat16(), mask)

    def test_inside_a_region_of_the_callers(self) -> None:
        model = Asking(of_floats)
        amp = fxamp.convert(model, dtype=BF16, example_inputs=(X, FULL))
        with torch.autocast("cpu", BF16):
            for x in (X, -X):
                assert_same(amp(x, FULL), model(x, FULL))


class Lengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y[:, : int(mask[0].sum())]


class TestManyWays:
    def test_the_last_graph_is_for_all_that_come_after(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(conversion, "MAX_VARIANTS", 4)

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.fc = Asking(more_than), nn.Linear(4, 4)

            def forward(self, x: Tensor, mask: Tensor) -> Tensor:
                return self.fc(self.inner(x, mask))

        outer = Outer()
        amp = fxamp.convert(outer, dtype=BF16, example_inputs=(X, FULL))
        for count in (0, 1, 2, 3, 0, 2, 1):
            mask = torch.arange(3)[None] < torch.tensor([[count], [3]])
            same(outer, amp, X, mask)
        assert variants(amp) == 3

    def test_a_model_that_always_changes_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(conversion, "MAX_VARIANTS", 4)
        amp = fxamp.convert(Asking(more_than), dtype=BF16, example_inputs=(X, FULL))
        masks = [torch.arange(3)[None] < torch.tensor([[count], [3]]) for count in (0, 1, 2)]
        for mask in masks[:2]:
            amp(X, mask)
        with pytest.raises(fxamp.CaptureError) as raised:
            amp(X, masks[2])
        assert str(raised.value) == (
            "4 kinds of calls were traced already: a value that it branches on changes with every call\n\n"
            "hint: put what branches on it into a submodule of its own"
        )


def more_than(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = m.fc(x)
    for count in range(3):
        if mask[0].sum() > count:
            y = y + count
    return y


def test_a_slice_is_no_longer_than_a_decision() -> None:
    def long(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        for _ in range(300):
            mask = mask & mask
        return m.fc(x) if mask.all() else x

    with pytest.raises(fxamp.CaptureError, match="depends on a tensor value"):
        fxamp.convert(Asking(long), example_inputs=(X, FULL))


def test_the_questions_of_a_graph_are_a_graph() -> None:
    amp = fxamp.convert(Asking(of_an_element), dtype=BF16, example_inputs=(X, FULL))
    graph: fx.Graph = amp._conversion.base.traced.questions.of_data.graph
    graph.lint()
    assert [node.target for node in graph.nodes if node.op == "placeholder"] == ["input_0", "input_1"]


def test_a_loop_that_goes_by_its_values_is_refused() -> None:
    def loops(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        steps = 0
        while mask.sum() + 2000 > steps:
            steps += 1
        return m.fc(x)

    with pytest.raises(fxamp.CaptureError, match="depends on a tensor value"):
        fxamp.convert(Asking(loops), example_inputs=(X, FULL))


def test_the_rest_of_a_shape_is_followed() -> None:
    def projected(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        *batch, _ = x.shape[:-1], 0
        y = m.fc(x).view(*batch[0], 2, 2).transpose(1, 2)
        return y * 2 if y.shape[2] > 2 else y

    model = Asking(projected)
    amp = fxamp.convert(model, dtype=BF16, example_inputs=(X, FULL))
    for x in (X, X[:, :1], X[:1]):
        same(model, amp, x, FULL)
    assert variants(amp) == 2
