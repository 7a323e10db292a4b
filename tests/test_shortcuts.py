"""What is cheaper than the plain way, and has to tell the same."""

from __future__ import annotations

import inspect
import itertools
import operator
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxamp
from fxamp.capture import builtins as shadows
from fxamp.capture.patches import mode_of
from fxamp.capture.program import Program
from fxamp.capture.signature import CallSignature
from fxamp.capture.source import is_library
from fxamp.plan import calls, observer
from fxamp.policy import spellings
from tests.helpers import assert_same, check_against_autocast, graph_text
from tests.zoo import BASIC, ZOO


def both(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives, or the type of what it raises."""
    try:
        return function(*args)
    except Exception as error:
        return type(error)


# -- operators -------------------------------------------------------------------------------------------


def targets() -> list[tuple[str, Any]]:
    spaces = (torch, F, torch._C._nn, torch.linalg, torch.fft, torch.special, operator, torch.Tensor)
    found = [("call_function", getattr(space, name, None)) for space in spaces for name in dir(space)]
    found += [("call_function", overload) for overload in (torch.ops.aten.add.Tensor, torch.ops.aten.mm.dtype)]
    return [each for each in found if callable(each[1])] + [("call_method", name) for name in dir(torch.Tensor)]


def arguments() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    x = fx.Graph().placeholder("x")
    return [
        ((), {}),
        ((x,), {}),
        ((1.0, x), {}),
        ((x, 2, True), {"inplace": True}),
        ((x, x), {"p": "nuc", "mode": "reflect"}),
        ((x,), {"out_dtype": torch.float32}),
        ((x,), {"return_indices": True, "max_norm": 1.0}),
        ((x,), {"out": x}),
    ]


@pytest.mark.filterwarnings("ignore")
def test_names_that_are_kept_are_those_that_are_found() -> None:
    for (opcode, target), (args, kwargs) in itertools.product(targets(), arguments()):
        if "out_dtype" not in kwargs:
            found = both(spellings.aten_name, opcode, target, args, kwargs)
            assert found == both(spellings._name, opcode, target, args, kwargs), (opcode, target, args, kwargs)


@pytest.mark.filterwarnings("ignore")
def test_calls_that_are_kept_are_those_that_are_read() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for (opcode, target), (args, kwargs) in itertools.product(targets(), arguments()):
        args, kwargs = fx.map_arg((args, kwargs), lambda _: x)
        node = graph.create_node(opcode, target, args, dict(kwargs))
        assert both(calls.read_call, node, str) == both(calls._read, node), (opcode, target, args, kwargs)


def test_two_spellings_of_one_builtin_are_told_apart() -> None:
    assert torch.mm == torch.dsmm  # type: ignore[attr-defined]  # to Python, these are equal
    for target in (torch.mm, torch.dsmm, torch.hspmm, torch.hsmm):  # type: ignore[attr-defined]
        found = spellings.aten_name("call_function", target)
        assert found == spellings._name("call_function", target, (), {})


# -- tracing ---------------------------------------------------------------------------------------------


def test_only_code_that_gets_plain_answers_is_spared_the_question() -> None:
    spaces = shadows._tracing_spaces()
    assert {"torch.fx.proxy", "fxamp.capture.tracer"} <= {space["__name__"] for space in spaces}
    for space in spaces:
        file = space["__file__"]
        assert is_library(file)
        assert not file.startswith(shadows._TRACED)
        assert "is_tensor" not in space
        assert "isinstance" not in space  # it was taken out again


class Doubling(nn.Module):
    """Uses each value twice, so that its arithmetic is a tree of 2 ** times leaves."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = (x + x) * 0.5
        return x.view(x.shape[0], -1)


@pytest.mark.parametrize("examples", [False, True])
def test_a_long_program_of_values_that_are_used_twice(examples: bool) -> None:
    check_against_autocast(Doubling(600), torch.randn(2, 3), calls=1, examples=examples)


class Drawing(nn.Module):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.draw()


DRAWS: dict[str, Callable[[], float]] = {"Python": random.random, "numpy": lambda: float(np.random.rand())}


@pytest.mark.parametrize("whose", DRAWS)
@pytest.mark.parametrize("around", [lambda m: m, nn.Sequential], ids=["in a module of the user's", "in one of torch's"])
def test_a_module_that_draws_stays_a_call_and_nothing_around_it(whose: str, around: Any) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = around(Drawing(DRAWS[whose])), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.inner(x))

    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    amp = fxamp.convert(Around(), dtype=torch.bfloat16)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]
    assert list(amp._conversion.base.traced.untraceable) == ["inner" if around is not nn.Sequential else "inner.0"]


def test_a_module_of_torchs_with_a_function_that_draws_stays_a_call() -> None:
    loss = nn.TripletMarginWithDistanceLoss(distance_function=lambda a, b: (a - b).norm(dim=-1) * random.random())
    amp = fxamp.convert(lambda x, y, z: loss(x, y, z), dtype=torch.bfloat16)
    assert "draws from Python's random" in amp._conversion.base.traced.untraceable["loss"]


class Remembering(nn.Module):
    """Goes by what the last call left."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.last is not None:
            y = y + self.last
        self.last = y
        return y


def test_what_was_read_before_it_is_set_is_seen() -> None:
    with pytest.raises(fxamp.CaptureError, match=r"self\.last"):
        fxamp.convert(Remembering(), dtype=torch.bfloat16)


class OwnModes(nn.Module):
    """Keeps its normalisation in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout()

    def train(self, mode: bool = True) -> OwnModes:
        super().train(mode)
        self.norm.eval()
        return self


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(), nn.ReLU())),
    "its own train()": lambda: nn.Sequential(OwnModes(), nn.Dropout()),
    "mixed": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout().eval()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["train", "eval", "as_is"])
def test_flags_are_what_train_makes_of_them(name: str, mode: str) -> None:
    model = MODELS[name]()
    found = Program(model).flags(mode)
    if mode != "as_is":
        model.train(mode == "train")
    assert found == {path: mode_of(module) for path, module in model.named_modules()}


# -- planning and rewriting ------------------------------------------------------------------------------


def test_the_graph_of_the_other_mode_is_one_of_its_own() -> None:
    amp = fxamp.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), dtype=torch.bfloat16)
    trained, text = amp.graph, graph_text(amp.graph)
    next(node for node in amp.graph.nodes if node.name == "relu").target = torch.sigmoid
    amp.recompile()
    amp.eval()
    assert amp.graph is not trained
    assert graph_text(amp.graph) == text
    assert (amp.plan.mode, amp.train().plan.mode) == ("eval", "train")
    assert amp.graph is trained


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if name in BASIC or not case.symbolic])
def test_calls_that_are_alike_are_told_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ZOO[name]
    torch.manual_seed(0)
    model, inputs = case.make(), (*case.inputs(), *case.loss_args())
    options: dict[str, Any] = {"dtype": torch.bfloat16, "example_inputs": (inputs, dict(case.kwargs))}
    found = []
    for keeps in (observer.keeps_shapes, lambda graph, attribute: False):
        monkeypatch.setattr(observer, "keeps_shapes", keeps)
        found.append(fxamp.convert(model, case.loss, **options))
    assert found[0].plan == found[1].plan
    assert graph_text(found[0].graph) == graph_text(found[1].graph)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "unsqueeze_": lambda x: (torch.relu(x).unsqueeze_(0).squeeze(0), torch.relu(x)),
    "resize_": lambda x: (torch.relu(x).resize_(1, 2).sum(), torch.relu(x)),
    "t_": lambda x: (torch.relu(x).t_() @ x, torch.relu(x)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_value_that_is_given_another_shape_serves_no_other_call(name: str) -> None:
    function, x = CHANGES[name], torch.randn(2, 3)
    amp = fxamp.convert(function, dtype=torch.bfloat16, example_inputs=(x,))
    relus = [decision for decision in amp.plan if decision.aten == "relu"]
    assert [relu.output.rank for relu in relus] == [2, 2]  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        expected = function(x)
    assert_same(amp(x), expected)


def test_sizes_that_only_data_tells_are_not_alike() -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        some = torch.relu(x)[x > 0], torch.relu(y)[y > 0]
        return torch.relu(some[0]) * 2, torch.relu(some[1]) * 2, torch.nonzero(x), torch.nonzero(y)

    inputs = torch.randn(3, 4), torch.randn(3, 4)
    amp = fxamp.convert(function, dtype=torch.bfloat16, example_inputs=inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected = function(*inputs)
    assert_same(amp(*inputs), expected)


# -- calls -----------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "plain": lambda a, b: None,
    "defaults": lambda a, b=2, c=3: None,
    "keyword only": lambda a, *, b, c=3: None,
    "stars": lambda a, *b, c=3, **d: None,
}


def positional_only(a: Any, b: Any = 2, /, c: Any = 3) -> None: ...


@pytest.mark.parametrize("name", [*FUNCTIONS, "positional only"])
def test_arguments_are_bound_as_python_binds_them(name: str) -> None:
    function = FUNCTIONS.get(name, positional_only)
    signature = CallSignature.of(function, None)
    names = [kwargs for n in range(4) for kwargs in itertools.combinations("abcd", n)]
    for count, keys in itertools.product(range(5), names):
        args, kwargs = tuple(range(count)), {key: f"{key} given" for key in keys}
        found = both(signature.bind, args, kwargs)
        expected = both(bound, function, args, kwargs)
        assert found == expected, (args, kwargs)
        if isinstance(found, dict):
            assert list(found) == list(expected)


def bound(function: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return spread(inspect.signature(function).bind(*args, **kwargs))


def spread(arguments: inspect.BoundArguments) -> dict[str, Any]:
    arguments.apply_defaults()
    values = dict(arguments.arguments)
    values.update(values.pop("d", {}) if arguments.signature.parameters.get("d") is not None else {})
    return values
