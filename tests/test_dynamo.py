"""``fxamp.convert`` with example inputs captures by Dynamo what torch.fx cannot trace, with the same promises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxamp
from fxamp.capture import Program
from tests.helpers import assert_same, check_against_autocast, quiet, run
from tests.zoo import ZOO

BF16 = torch.bfloat16

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]


@pytest.fixture
def by_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Dynamo captures."""
    monkeypatch.setattr(Program, "frontends", ("Dynamo",))


def captured(amp: fxamp.AmpModule) -> str:
    return str(amp.report().to_dict()["frontend"])


def kinds(amp: fxamp.AmpModule) -> int:
    """How many graphs were made."""
    return len(amp._conversion.variants)


class Net(nn.Module):
    """A model around one function of a layer and an input."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


# -- what torch.fx cannot trace ------------------------------------------------------------------------------

TAKEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "vmap": lambda m, x: torch.vmap(lambda row: m.fc(row) @ x)(x),
    "grad": lambda m, x: torch.func.grad(lambda y: m.fc(y).float().sum())(x) + m.fc(x),
    "functional_call": lambda m, x: torch.func.functional_call(m.fc, {"weight": m.fc.weight * 2}, (x,)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_function_transforms_are_taken_with_example_inputs(name: str) -> None:
    model = Net(TAKEN[name])
    with pytest.raises(fxamp.CaptureError, match="function transform"):
        fxamp.convert(model)
    amp = check_against_autocast(model, torch.randn(4, 4), examples=True)
    report = amp.report().to_dict()
    assert report["frontend"] == "Dynamo"
    assert "function transform" in report["failed_frontends"]["torch.fx"]
    assert "captured by Dynamo, as torch.fx could not: cannot trace" in str(amp.report())


def test_what_torch_fx_traces_is_not_captured_by_dynamo() -> None:
    amp = fxamp.convert(nn.Linear(4, 4), example_inputs=(torch.randn(2, 4),))
    assert captured(amp) == "torch.fx"
    assert "Dynamo" not in str(amp.report())


def test_what_no_frontend_takes_says_why_of_each_and_what_would_work() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        return y if y.sum() > 0 else -y

    with pytest.raises(fxamp.CaptureError) as caught:
        fxamp.convert(Net(forward), example_inputs=(torch.randn(2, 4),))
    text = str(caught.value)
    assert "no frontend can make one graph of the model" in text
    assert "- torch.fx: cannot trace" in text
    assert "- Dynamo: cannot capture Net (test_dynamo.py:" in text
    assert text.count("return y if y.sum() > 0 else -y") == 2
    assert text.endswith('hint: torch.compile(model, backend="fxamp") runs what cannot be one graph in several')


# -- the captured module -------------------------------------------------------------------------------------


@dataclass
class Out:
    first: Tensor
    rest: Any


class Tied(nn.Module):
    """Tied and unused weights, buffers that change, dropout, a class of its own as output, nested inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(4))
        self.kept = [torch.ones(4)]

    def forward(self, x: Tensor, more: dict[str, Any], scale: float = 1.0) -> Out:
        y = self.drop(self.norm(self.two(self.one(x)))) + self.kept[0]
        with torch.no_grad():
            self.seen = self.seen * 0.9 + y.float().mean(0)
        for each in more["list"]:
            y = y + each
        return Out(y * scale, {"seen": self.seen, "in": (x, more["list"][0]), "none": None, "name": "y"})


def more(size: int) -> dict[str, Any]:
    return {"list": [torch.randn(size, 4), torch.randn(4)], "flag": True}


def tied(example: int = 3) -> tuple[Tied, fxamp.AmpModule]:
    model = Tied()
    return model, fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(torch.randn(example, 4), more(3)))


def same(model: Any, amp: Any, *args: Any, **kwargs: Any) -> None:
    with quiet():
        expected, wanted = run(model, args, kwargs, torch.autocast("cpu", BF16))
        found, given = run(amp, args, kwargs, nullcontext())
    assert type(found) is type(expected)
    if isinstance(found, Out):
        found, expected = vars(found), vars(expected)
    assert_same(found, expected)
    assert given.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_same([given[name]], [gradient], f"gradient of {name}")
    for owner in (model, amp):
        owner.zero_grad()


def test_names_tensors_modes_and_classes_are_kept(by_dynamo: None) -> None:
    model, amp = tied()
    assert captured(amp) == "Dynamo"
    assert list(amp.state_dict()) == list(model.state_dict())
    assert amp.one.weight is amp.two.weight
    for training in (True, False, True):
        model.train(training)
        amp.train(training)
        for size in (3, 5, 2):
            same(model, amp, torch.randn(size, 4), more(size))
    assert_same(dict(amp.named_buffers()), dict(model.named_buffers()))


def test_the_model_itself_stays_as_it_is(by_dynamo: None) -> None:
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    ids = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    x = torch.randn(3, 4)
    amp = fxamp.convert(model, dtype=BF16, example_inputs=(x, more(3)))
    assert_same(dict(model.state_dict()), dict(before))
    assert dict(amp.named_parameters())["one.weight"] is model.one.weight
    assert not [name for name in vars(x) if "dynamo" in name]
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == ids


def test_sizes_of_batches_are_free_and_other_shapes_have_graphs_of_their_own(by_dynamo: None) -> None:
    model, amp = tied()
    assert kinds(amp) == 2
    for size in (3, 7, 5):
        same(model, amp, torch.randn(size, 4), more(size))
    assert kinds(amp) == 2
    same(model, amp, torch.randn(3, 4), more(3), scale=2.0)
    assert kinds(amp) == 3


def test_copies_and_pickles(by_dynamo: None) -> None:
    model, amp = tied()
    for other in (copy.deepcopy(amp), pickle.loads(pickle.dumps(amp))):
        assert captured(other) == "Dynamo"
        same(model, other, torch.randn(5, 4), more(5))
        model.load_state_dict(amp.state_dict())


def test_dtypes_and_grad_modes_have_graphs_of_their_own(by_dynamo: None) -> None:
    model, amp = tied()
    model.eval()
    amp.eval()
    with torch.no_grad():
        same(model, amp, torch.randn(3, 4), more(3))
    with torch.inference_mode():
        x, rest = torch.randn(3, 4), more(3)
        with torch.autocast("cpu", BF16):
            expected = model(x, rest)
        assert_same(amp(x, rest).first, expected.first)
    same(model, amp, torch.randn(3, 4).bfloat16(), more(3))
    same(model, amp, torch.randn(3, 4, requires_grad=True), more(3))
    amp.double()
    model.double()
    same(model, amp, torch.randn(3, 4).double(), more(3))


def test_it_can_be_replanned_and_frozen(by_dynamo: None) -> None:
    model, amp = tied()
    x, rest = torch.randn(3, 4), more(3)
    assert_same(amp.replan("full").eval()(x, rest).first, model.eval()(x, rest).first)
    frozen = amp.freeze()
    assert_same(frozen(x, rest).first, amp.eval().requires_grad_(False)(x, rest).first)
    with pytest.raises(fxamp.CaptureError, match=r"frozen before .*: x has the sizes \(3, 9\), expected \(s\d+, 4\)"):
        frozen(torch.randn(3, 9), rest)


def test_a_loss_is_captured_with_the_model(by_dynamo: None) -> None:
    model, x, y = (
        nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)),
        torch.randn(5, 4),
        torch.tensor([0, 1, 2, 0, 1]),
    )
    amp = fxamp.convert(copy.deepcopy(model), F.cross_entropy, dtype=BF16, example_inputs=(x, y))
    with torch.autocast("cpu", BF16):
        output = model(x)
        loss = F.cross_entropy(output, y)
    assert_same(amp(x, y), (loss, output))
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    assert_same(torch.autograd.grad(amp(x, y)[0], list(amp.parameters())), wanted)


def test_hooks_of_submodules_run_once(by_dynamo: None) -> None:
    model = Net(lambda m, x: m.fc(x))
    model.fc.register_forward_hook(lambda m, args, out: out * 3)
    model.fc.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(torch.randn(3, 4),))
    for _ in range(2):
        same(model, amp, torch.randn(3, 4))
    assert kinds(amp) == 2


def test_the_same_tensor_twice_is_two_inputs(by_dynamo: None) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x) - self.fc(y) * 2

    model, x = Two(), torch.randn(3, 4)
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(x, x))
    same(model, amp, x, torch.randn(3, 4))


def test_sizes_in_what_is_returned_are_those_of_the_call(by_dynamo: None) -> None:
    model = Net(lambda m, x: {"y": m.fc(x), "size": x.shape[0], "half": x.shape[0] / 2})
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(torch.randn(3, 4),))
    for size in (3, 6, 1):
        same(model, amp, torch.randn(size, 4))


def test_conditions_on_sizes_are_checked_at_every_call(by_dynamo: None) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc(x) if x.shape[0] % 4 == 0 or x.shape[0] > 9 else m.fc(m.fc(x))

    model = Net(forward)
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(torch.randn(3, 4),))
    for size in (3, 5, 4, 8, 10, 12, 1):
        same(model, amp, torch.randn(size, 4))


def test_a_number_is_not_a_size_of_the_same_value(by_dynamo: None) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, times: int) -> Tensor:
            return self.fc(x).expand(times, x.shape[0], 4) * x.shape[0]

    model = Scaled()
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(torch.randn(3, 4), 3))
    for size, times in ((3, 3), (5, 3), (3, 2), (5, 2)):
        same(model, amp, torch.randn(size, 4), times)


def test_an_object_that_is_given_is_not_frozen(by_dynamo: None) -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, given: Any) -> Tensor:
            return self.fc(given.x)

    with pytest.raises(fxamp.CaptureError, match="is given an object of type SimpleNamespace"):
        fxamp.convert(Given(), example_inputs=(SimpleNamespace(x=torch.randn(3, 4)),))


def test_a_model_that_asks_for_dtypes_finds_those_of_autocast(by_dynamo: None) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        return y * torch.full((1,), 0.3, dtype=y.dtype) * (2 if torch.is_autocast_enabled("cpu") else 3)

    model = Net(forward)
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(torch.randn(3, 4),))
    same(model, amp, torch.randn(3, 4))
    assert_same(amp.replan("full")(x := torch.randn(3, 4)), model(x))


KEEPS: dict[str, Callable[[Any, Tensor], Any]] = {
    "switches the mode of Linear": lambda m, x: m.fc.eval()(x),
    "self.count": lambda m, x: setattr(m, "count", getattr(m, "count", 0) + 1) or m.fc(x),
    "self.cache": lambda m, x: setattr(m, "cache", m.fc(x)) or m.fc(x),
}


@pytest.mark.parametrize("text", KEEPS)
def test_state_that_a_graph_cannot_carry_is_refused(by_dynamo: None, text: str) -> None:
    model = Net(KEEPS[text])
    before = set(vars(model))
    with pytest.raises(fxamp.CaptureError, match=text):
        fxamp.convert(model, example_inputs=(torch.randn(3, 4),))
    assert set(vars(model)) == before
    assert model.fc.training


@pytest.mark.parametrize("name", ["vit", "gpt", "resnet", "unet"])
def test_models(by_dynamo: None, name: str) -> None:
    _check_case(name)


# Dynamo cannot make one graph of these.
NOT_WHOLE: dict[str, str] = {
    "attention_numpy": "data-dependent expression",
    "translator": "data-dependent expression",
    "tagger": "marked as skipped",
    "spectrogram": "Dynamic shape operator",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ZOO)[::2])  # a capture takes a second or two
def test_the_zoo(by_dynamo: None, name: str) -> None:
    if name in NOT_WHOLE:
        with pytest.raises(fxamp.CaptureError, match=NOT_WHOLE[name]):
            _check_case(name)
    else:
        _check_case(name)


def _check_case(name: str) -> None:
    case = ZOO[name]
    with quiet():
        model = case.make()
    inputs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (case.inputs(), case.loss_args()))
    amp = check_against_autocast(
        model, *inputs[0], loss=case.loss, loss_args=inputs[1], examples=True, calls=1, **case.kwargs
    )
    assert captured(amp) == "Dynamo"
