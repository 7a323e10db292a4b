"""What a trace makes of Python's objects: containers, parameters, callables, packed sequences, other modules."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import functools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)
from torch.utils import _pytree as pytree

import fxamp
from fxamp.capture import Program
from tests.helpers import assert_same, check_against_autocast


class Net(nn.Module):
    """A module around a function of (module, x), with a parameter, a buffer and a layer at hand."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.w = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("table", torch.randn(2, 4))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Color(enum.Enum):
    RED = 1


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Heads(collections.OrderedDict[str, Tensor]):
    """Has an attribute beside its items."""

    note = ""


class Items(list[Tensor]):
    """A list of a class of its own."""


@dataclasses.dataclass
class Doubling:
    """Its own construction computes."""

    value: Tensor
    extra: Tensor | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        self.value = self.value * 2


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """Neither a __dict__ nor a way to set a field."""

    value: Tensor


class Twice(NamedTuple("Twice", [("first", Tensor), ("second", Tensor)])):
    """Is made from fewer values than it has."""

    def __new__(cls, first: Tensor) -> Twice:
        return super().__new__(cls, first, first * 2)


class Result:
    """An object that holds a tensor."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def heads(m: Any, x: Tensor) -> Heads:
    found = Heads(first=m.fc(x))
    found.note = "two heads"
    found["second"] = x
    return found


def grouped(m: Any, x: Tensor) -> Any:
    found = collections.defaultdict(list)
    found["a"].append(m.fc(x))
    return found


def doubled_with_extra(m: Any, x: Tensor) -> Doubling:
    found = Doubling(m.fc(x))
    found.extra = x
    return found


OUTPUTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "OrderedDict": lambda m, x: collections.OrderedDict(out=m.fc(x), aux=[x, None]),
    "a subclass with attributes": heads,
    "defaultdict": grouped,
    "Counter": lambda m, x: (collections.Counter("abca"), m.fc(x)),
    "deque": lambda m, x: collections.deque([x, m.fc(x)], maxlen=2),
    "a subclass of list": lambda m, x: Items([m.fc(x)]),
    "a dataclass that computes": doubled_with_extra,
    "a frozen dataclass": lambda m, x: Frozen(m.fc(x)),
    "a named tuple of its own making": lambda m, x: Twice(m.fc(x)),
    "one in another": lambda m, x: {"a": collections.OrderedDict(b=Frozen(m.fc(x)))},
    "odd keys": lambda m, x: {Color.RED: m.fc(x), (1, None): x, None: x, frozenset("a"): x, 0.5: x},
    "flags as keys": lambda m, x: {Access.READ | Access.WRITE: m.fc(x)},
    "enums as values": lambda m, x: {"kind": Color.RED, "access": Access.READ | Access.WRITE, "y": m.fc(x)},
    "classes and functions": lambda m, x: (Color, len, torch.zeros, m.fc(x)),
}


def parts(value: Any) -> Any:
    """An object as nested tuples of its class and all that it holds."""
    if isinstance(value, Tensor) or not hasattr(value, "__reduce_ex__"):
        return value
    if isinstance(value, dict):
        return type(value), [(key, parts(item)) for key, item in value.items()], dict(getattr(value, "__dict__", {}))
    if isinstance(value, list | tuple | collections.deque):
        return type(value), [parts(item) for item in value], getattr(value, "maxlen", None)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), [parts(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return value


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("examples", [False, True])
def test_an_output_has_the_class_and_the_parts_that_eager_gives(name: str, examples: bool) -> None:
    model, x = Net(OUTPUTS[name]), torch.randn(2, 4)
    amp = fxamp.convert(model, dtype=torch.bfloat16, example_inputs=(x,) if examples else None)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
        assert type(amp(x)) is type(expected)
        assert_same(parts(amp(x)), parts(expected))
    if name != "classes and functions":
        assert_same(parts(copy.deepcopy(amp)(x)), parts(expected))


def test_an_output_of_any_class_leaves_the_casts_as_they_are() -> None:
    rows = []
    for function in (OUTPUTS["OrderedDict"], lambda m, x: {"out": m.fc(x), "aux": [x, None]}):
        amp = fxamp.convert(Net(function), dtype=torch.bfloat16)
        rows.append([(d.rule, d.how, d.casts) for d in amp.plan if d.rule])
        assert amp.report().totals["opaque"] == 0
    assert rows[0] == rows[1]


class Reading(nn.Module):
    """Stays one call; computes with what it finds in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, found: Any, w: Tensor) -> Any:
        self.calls += 1
        assert isinstance(found, collections.OrderedDict | Frozen)
        value = found["a"] if isinstance(found, dict) else found.value
        return value.mul_(2) @ w


@pytest.mark.parametrize("kind", [lambda y: collections.OrderedDict(a=y), Frozen])
@pytest.mark.parametrize("policy", ["autocast", "full"])
def test_an_object_is_handed_to_an_opaque_call_as_it_is(kind: Any, policy: str) -> None:
    def function(m: Any, x: Tensor) -> Any:
        y = m.fc(x).detach()
        first = y @ m.fc.weight.detach()
        return first + m.reading(kind(y), m.fc.weight.detach()) + y @ m.fc.weight.detach() + m.fc(x)

    model = Net(function)
    model.reading = Reading()
    check_against_autocast(model, torch.randn(2, 4), policy=policy)


def test_a_set_of_outputs_is_a_set() -> None:
    (y,) = fxamp.convert(Net(lambda m, x: {m.fc(x)}), dtype=torch.bfloat16)(torch.randn(2, 4))
    assert y.dtype == torch.bfloat16


def test_an_object_with_a_tensor_is_a_new_one_at_every_call() -> None:
    amp = fxamp.convert(Net(lambda m, x: Result(m.fc(x))), dtype=torch.bfloat16)
    first, second = amp(torch.randn(2, 4)), amp(torch.randn(2, 4))
    assert isinstance(first, Result)
    assert not torch.equal(first.value, second.value)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.fc(x) * np.float32(2),
        lambda m, x: np.float32(2) * m.fc(x),
        lambda m, x: m.fc(x) * np.float64(2.5),
        lambda m, x: m.fc(x).sum(np.int64(0)),
        lambda m, x: m.fc(x) + torch.from_numpy(np.ones(4, dtype=np.float32)),
        lambda m, x: m.fc(x) + torch.tensor(np.ones(4)),
        lambda m, x: torch.tensor(np.float64(2)) * torch.ones(1) + m.fc(x),
    ],
)
def test_numbers_and_arrays_of_numpy(function: Any) -> None:
    check_against_autocast(Net(function), torch.randn(2, 4))


def test_a_hook_of_a_traced_tensor_runs_in_the_backward() -> None:
    def hooked(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        y.register_hook(lambda gradient: gradient * 3)
        return y @ m.fc.weight

    check_against_autocast(Net(hooked), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: (y for y in [m.fc(x)]), "hands on a generator, which can"),
        (lambda m, x: {"a": m.fc(x)}.values(), "hands on a dict_values, which can"),
        (
            lambda m, x: m.fc(x).register_hook(lambda gradient: gradient * m.w.sum()),
            "hands on the function <lambda>, which uses a module in a way that a graph cannot",
        ),
        (
            lambda m, x: torch.utils.checkpoint.checkpoint(lambda y: y * x, m.fc(x), use_reentrant=True),
            "hands on the function <lambda>, which uses traced values in a way that a graph cannot",
        ),
    ],
)
def test_what_cannot_be_handed_on_is_named(function: Any, message: str) -> None:
    with pytest.raises(fxamp.CaptureError, match=message):
        fxamp.convert(Net(function))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.fc(x) if isinstance(m.w, nn.Parameter) else x,
        lambda m, x: m.fc(x) if isinstance(m.table, nn.Parameter) else x,
        lambda m, x: m.fc(x) if isinstance(m.w, (int, nn.Parameter)) and isinstance(m.table, Tensor) else x,
        lambda m, x: x @ m.get_parameter("w").t() + m.get_parameter("fc.bias")[:3],
        lambda m, x: m.fc(x) * m.get_buffer("table"),
        lambda m, x: x @ sum(row for row in m.w),
        lambda m, x: [x @ row for row in m.w.unbind(0)],
        lambda m, x: [x[:, :3] @ a * b for a, b in zip(m.w.t(), m.fc.bias[:4], strict=True)],
        lambda m, x: [x[:, 0] * a + d for a, _, _, d in zip(*m.w.t(), strict=True)],
        lambda m, x: x @ torch.stack(list(m.w)).t(),
        lambda m, x: [x.t() @ part for part in (m.table @ m.w.t()).float().split(1, dim=1)],
        lambda m, x: nn.utils.parameters_to_vector([m.w, m.fc.bias]).sum() * x,
        lambda m, x: x @ torch.stack([*m.w]).t() + len(m.w),
    ],
)
@pytest.mark.parametrize("policy", ["autocast", "full"])
def test_a_parameter_is_asked_and_iterated_as_what_it_is(function: Any, policy: str) -> None:
    check_against_autocast(Net(function), torch.randn(2, 4), policy=policy)


def test_a_parameter_unpacks_into_as_many_parts_as_it_has() -> None:
    def unpacked(m: Any, x: Tensor) -> Tensor:
        first, second = m.w
        return x @ first * second

    with pytest.raises(fxamp.CaptureError, match="too many values to unpack"):
        fxamp.convert(Net(unpacked))


def test_a_graph_that_iterates_a_parameter_checks_its_length() -> None:
    amp = fxamp.convert(Net(lambda m, x: sum(x @ row for row in m.w)), dtype=torch.bfloat16)
    amp.w.data = torch.randn(5, 4)
    with pytest.raises(fxamp.CaptureError, match="goes another way"):
        amp(torch.randn(2, 4))


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))


class Pipe:
    """An object that owns a module, a parameter and, by its class, another module."""

    shared = block()

    def __init__(self) -> None:
        self.net = block()
        self.gain = nn.Parameter(torch.full((4,), 2.0))

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x) * self.gain

    def both(self, x: Tensor) -> Tensor:
        return self.shared(self.net(x))


class Codec(nn.Module):
    """Has a method beside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.drop(self.fc(x)) * scale

    def encode(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.drop(self.fc(x)) * scale


class Holder:
    """A name space whose module is called as a global of this file is."""

    net = block()


def linear_of(module: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module[0].weight)  # type: ignore[index]


def through_a_helper(x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return Holder.net(y)

    return inner(x)


net = nn.Linear(3, 3)  # of no use to any of these
MODULES, TABLE, PIPE = [block()], {"a": block()}, Pipe()
CALLABLES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "an object": (Pipe(), ["gain", "net.0.weight"]),
    "a method of an object": (Pipe().both, ["net.0.weight", "shared.0.weight"]),
    "a module with arguments": (functools.partial(Codec(), scale=3.0), ["fc.weight"]),
    "a method with arguments": (functools.partial(Codec().encode, scale=3.0), ["fc.weight"]),
    "a function with a module": (functools.partial(linear_of, block()), ["0.0.weight"]),
    "a list": (lambda x: MODULES[0](x), ["MODULES.0.0.weight"]),
    "a dict": (lambda x: TABLE["a"](x), ["TABLE.a.0.weight"]),
    "an object of a variable": (lambda x: PIPE.net(x), ["PIPE.net.0.weight"]),
    "a class": (lambda x: Holder.net(x), ["Holder.net.0.weight"]),
    "a function inside": (through_a_helper, ["Holder.net.0.weight"]),
    "a function of a variable": (lambda x: through_a_helper(x), ["through_a_helper.Holder.net.0.weight"]),
    "a parameter alone": (lambda x: x @ PIPE.net[0].weight, ["PIPE.net.0.weight"]),
    "a mode alone": (lambda x: nn.functional.dropout(x, 0.5, PIPE.net.training), ["PIPE.net.0.weight"]),
    "a default": (lambda x, f=MODULES[0]: f(x), ["f.0.weight"]),
    "a module made by the call": (lambda x: nn.Sequential(nn.ReLU(), nn.Dropout(0.0))(x), []),
}


@pytest.mark.parametrize("name", CALLABLES)
def test_a_callable_owns_the_modules_it_reaches(name: str) -> None:
    function, expected = CALLABLES[name]
    amp, x = fxamp.convert(function, dtype=torch.bfloat16), torch.randn(2, 4)
    names = list(amp.state_dict())
    assert names[:1] == expected[:1]
    assert set(expected) <= set(names)
    for _ in range(2):
        torch.manual_seed(0)
        found = amp(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(0)
            assert_same(found, function(x))
    amp.eval()
    assert_same(amp(x), amp(x))
    assert [key for key in amp.__dict__ if key.startswith("_constant")] == []


def test_a_callable_over_a_module_in_eval_mode_is_in_eval_mode() -> None:
    pipe = Pipe()
    pipe.net.eval()
    amp, x = fxamp.convert(pipe, dtype=torch.bfloat16), torch.randn(2, 4)
    assert not amp.training
    assert_same(amp(x), amp(x))


def test_a_callable_is_not_changed_by_its_conversion() -> None:
    pipe = Pipe()
    pipe.net[1].eval()
    fxamp.convert(pipe).train()
    assert [module.training for module in pipe.net] == [True, False, True]


def test_a_module_that_only_another_call_reaches_is_an_error() -> None:
    def f(x: Tensor, other: bool = False) -> Tensor:
        return [MODULES, TABLE][other]["a" if other else 0](x)  # type: ignore[index]

    amp = fxamp.convert(f)
    message = "this call of .*f uses TABLE.a, which no call before did"
    with pytest.raises(fxamp.CaptureError, match=message):
        amp(torch.randn(2, 4), other=True)


class Calling(nn.Module):
    """Its class says what a call is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return self.fc(x) * gain

    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x, gain=2.0) + 1


class Passing(Calling):
    """Its call takes whatever its forward takes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super(Calling, self).__call__(*args, **kwargs).tanh()


class Distance(nn.Module):
    """A loss whose class says what a call is."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).pow(2)

    def __call__(self, output: Tensor, target: Tensor, scale: float = 2.0) -> Any:
        return super().__call__(output, target).mean() * scale


def test_a_class_may_say_what_a_call_is() -> None:
    x = torch.randn(2, 4)
    check_against_autocast(Calling(), x)
    check_against_autocast(Passing(), x, gain=3.0)
    check_against_autocast(nn.Sequential(Calling(), Passing()), x)
    check_against_autocast(Calling(), x, loss=Distance(), loss_args=(torch.zeros(2, 4),))


def test_hooks_stay_where_the_call_has_them() -> None:
    model = Calling()
    model.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(fxamp.CaptureError, match="Calling has hooks, which a graph of its own __call__ would not see"):
        fxamp.convert(model)
    codec = Codec().eval()
    codec.register_forward_hook(lambda module, args, output: output * 2)
    amp, x = fxamp.convert(codec.encode, dtype=torch.bfloat16), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(amp(x), codec.encode(x))


LENGTHS = torch.tensor([5, 3, 2])
UNSORTED = torch.tensor([2, 5, 3])


class Stateful(nn.Module):
    """A recurrent layer that stays one call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, sequence: PackedSequence) -> PackedSequence:
        self.calls += 1
        return self.layer(sequence)[0]  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A module around a function of (module, x), with recurrent layers at hand."""

    def __init__(self, function: Callable[[Any, Tensor], Any], layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.fc = layer(8, 8, batch_first=True), nn.Linear(8, 8)
        self.opaque = Stateful(layer(8, 8, batch_first=True))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def packed(x: Tensor, lengths: Any = LENGTHS) -> PackedSequence:
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=lengths is not UNSORTED)


def padded(sequence: Any) -> Tensor:
    return pad_packed_sequence(sequence, batch_first=True)[0]


def rebuilt(m: Any, sequence: Any) -> PackedSequence:
    return PackedSequence(m.fc(sequence.data), sequence.batch_sizes, sequence.sorted_indices, sequence.unsorted_indices)


SEQUENCES: dict[str, Callable[[Any, Tensor], Any]] = {
    "sorted": lambda m, x: m.fc(padded(m.rnn(packed(x))[0])),
    "unsorted": lambda m, x: m.fc(padded(m.rnn(packed(x, UNSORTED))[0])),
    "lengths in a list": lambda m, x: [m.fc(padded(m.rnn(packed(x, [5, 3, 2]))[0])), m.rnn(packed(x))[1]],
    "total length": lambda m, x: m.fc(
        torch.nn.utils.rnn.pad_packed_sequence(m.rnn(packed(x, UNSORTED))[0], total_length=7)[0]
    ),
    "through an opaque call": lambda m, x: m.fc(padded(m.opaque(packed(x)))),
    "unsorted, through an opaque call": lambda m, x: m.fc(padded(m.opaque(packed(x, UNSORTED)))),
    "a list of sequences": lambda m, x: m.fc(padded(m.rnn(pack_sequence([x[0], x[1, :3]]))[0])),
    "back to a list": lambda m, x: m.fc(unpack_sequence(m.rnn(packed(x))[0])[1]),
    "data alone": lambda m, x: m.fc(m.rnn(packed(x))[0].data),
    "made anew": lambda m, x: padded(m.rnn(rebuilt(m, m.rnn(packed(x, UNSORTED))[0]))[0]),
    "made anew of an opaque one": lambda m, x: m.fc(padded(m.rnn(rebuilt(m, m.opaque(packed(x))))[0])),
    "asked about": lambda m, x: m.fc(x) if m.rnn(packed(x))[0].unsorted_indices is None else x,
    "asked about, unsorted": lambda m, x: x if m.rnn(packed(x, UNSORTED))[0].unsorted_indices is None else m.fc(x),
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM])
def test_packed_sequences(name: str, layer: type[nn.RNNBase]) -> None:
    model, x = Recurrent(SEQUENCES[name], layer), torch.randn(3, 5, 8)
    amp = check_against_autocast(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = copy.deepcopy(model).eval()(x)
    found = amp.eval()(x)
    strides = [[t.stride() for t in pytree.tree_leaves(value)] for value in (found, expected)]
    assert strides[0] == strides[1]


def test_a_packed_sequence_is_given_out_as_one() -> None:
    amp = fxamp.convert(Recurrent(lambda m, x: m.rnn(packed(x)), nn.GRU), dtype=torch.bfloat16)
    output, _ = amp(torch.randn(3, 5, 8))
    assert isinstance(output, PackedSequence)
    assert output.unsorted_indices is None


def test_the_order_of_a_sequence_that_only_a_run_tells_is_not_guessed() -> None:
    def asked(m: Any, x: Tensor) -> Tensor:
        order = m.opaque(packed(x)).unsorted_indices
        return m.fc(x) if order is None else x

    def order_of(sequence: Any) -> Any:
        return sequence.unsorted_indices

    for function in (
        asked,
        lambda m, x: m.fc(x) if m.opaque(packed(x)).unsorted_indices is None else x,
        lambda m, x: m.fc(x) if order_of(m.opaque(packed(x))) is not None else x,
    ):
        with pytest.raises(fxamp.CaptureError, match="asks for the unsorted_indices of a packed sequence, which only"):
            fxamp.convert(Recurrent(function, nn.GRU))


def test_torch_is_as_it_was_after_a_trace() -> None:
    before = pad_packed_sequence.__code__
    fxamp.convert(Recurrent(SEQUENCES["sorted"], nn.GRU))
    assert pad_packed_sequence.__code__ is before
    assert padded(packed(torch.randn(3, 5, 8))).shape == (3, 5, 8)


def check_both_modes(amp: nn.Module, model: nn.Module, x: Tensor) -> None:
    """The same bits in train and eval mode, where each of them is switched on its own."""
    for training in (True, False):
        for owner in (amp, model):
            owner.train(training)
        torch.manual_seed(0)
        found = amp(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(0)
            assert_same(found, model(x))


def modes_of(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


class Counting(nn.Module):
    """Stays one call, around another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.inner(x)


PARTS: dict[str, Callable[[], Any]] = {
    "scripted": lambda: torch.jit.script(block()),
    "scripted, in an opaque module": lambda: Counting(torch.jit.script(block())),
    "scripted, with a part used twice": lambda: nn.Sequential(*[torch.jit.script(block())] * 2),
    "traced": lambda: torch.jit.trace(block().eval(), torch.randn(2, 4)),
    "compiled": lambda: torch.compile(block(), backend="eager"),
    "compiled, in an opaque module": lambda: Counting(torch.compile(block(), backend="eager")),
    "converted": lambda: fxamp.convert(block(), dtype=torch.bfloat16),
    "converted, in an opaque module": lambda: Counting(fxamp.convert(block(), dtype=torch.bfloat16)),
    "converted in a converted one": lambda: nn.Sequential(
        fxamp.convert(nn.Sequential(fxamp.convert(block(), dtype=torch.bfloat16), block()), dtype=torch.bfloat16)
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and Dynamo reads .grad of what is no leaf
@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_another_kind_keeps_its_modes_to_itself(name: str) -> None:
    part, x = PARTS[name](), torch.randn(2, 4)
    model = nn.Sequential(nn.Linear(4, 4), part)
    before = modes_of(model)
    amp = fxamp.convert(model, dtype=torch.bfloat16)
    assert modes_of(model) == before
    assert list(amp.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(amp.parameters(), model.parameters(), strict=True))
    model.train()
    amp.eval()
    assert all(modes_of(model)) or name == "traced"
    assert_same(amp(x), amp(x))
    model.eval()
    assert not any(modes_of(model))
    check_both_modes(amp, model, x)
    check_both_modes(fxamp.convert(model, dtype=torch.bfloat16, example_inputs=(x,)), model, x)


def test_a_model_with_a_converted_part_is_pickled() -> None:
    part = fxamp.convert(nn.Linear(4, 4), dtype=torch.bfloat16)
    amp, x = fxamp.convert(nn.Sequential(part, nn.Linear(4, 4)), dtype=torch.bfloat16), torch.randn(2, 4)
    assert torch.equal(pickle.loads(pickle.dumps(amp))(x), amp(x))


def test_a_converted_part_still_runs_the_graph_of_its_mode() -> None:
    inner, x = fxamp.convert(block(), dtype=torch.bfloat16), torch.ones(8, 4)
    fxamp.convert(nn.Sequential(nn.Linear(4, 4), inner)).eval()
    assert not torch.equal(inner(x), inner(x))
    assert_same(inner.eval()(x), inner(x))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and Dynamo reads .grad of what is no leaf
def test_a_frozen_scripted_part_has_no_mode() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), torch.jit.freeze(torch.jit.script(block().eval()))), torch.randn(2, 4)
    check_both_modes(fxamp.convert(model, dtype=torch.bfloat16), model, x)


def test_an_exported_model_has_one_mode() -> None:
    x = torch.randn(2, 4)
    exported = torch.export.export(block().eval(), (x,)).module()
    for model in (exported, nn.Sequential(nn.Linear(4, 4), exported)):
        amp = fxamp.convert(model, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(amp(x), model(x))
        with pytest.raises(NotImplementedError, match="not supported yet"):
            amp.eval()


@pytest.mark.filterwarnings("ignore")
def test_a_nested_tensor_may_be_an_example() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    model = nn.Linear(4, 4)
    amp = fxamp.convert(model, dtype=torch.bfloat16, example_inputs=(nested,))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(amp(nested).values(), model(nested).values())


@torch.compile(backend="eager")
def compiled(x: Tensor) -> Tensor:
    return x @ x


COMPILED = (
    "the model is compiled already: expected one that can be traced\n\n"
    "hint: convert it first: torch.compile(fxamp.convert(model))"
)
SCRIPTED = (
    "the model is scripted: its calls cannot be seen\n\n"
    "hint: convert the model before torch.jit.script, or put it into a module: nn.Sequential(model)"
)
NOT_MODELS: list[tuple[Callable[[], Any], str]] = [
    (lambda: nn.Linear, "found the class Linear: expected a module\n\nhint: fxamp.convert(Linear(...))"),
    (lambda: torch.compile(block()), COMPILED),
    (lambda: compiled, COMPILED),
    (lambda: torch.jit.script(block()), SCRIPTED),
]


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and Dynamo reads .grad of what is no leaf
@pytest.mark.parametrize(("make", "message"), NOT_MODELS)
def test_what_is_no_model_is_told_what_to_do(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(fxamp.CaptureError) as caught:
        fxamp.convert(make())
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.MSELoss, "the loss is the class MSELoss\n\nhint: write loss=MSELoss()"),
        (3, "the loss is 3: expected a callable\n\nhint: write loss=torch.nn.functional.mse_loss"),
    ],
)
def test_what_is_no_loss_is_told_what_to_write(loss: Any, message: str) -> None:
    with pytest.raises(fxamp.CaptureError) as caught:
        fxamp.convert(block(), loss)
    assert str(caught.value) == message


class Dropping(nn.Module):
    """A layer and a dropout, to be patched."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.gru = nn.Linear(4, 4), nn.Dropout(0.5), nn.GRU(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.gru(self.drop(self.fc(x)))[0]


class Doubled:
    """A function in the place of another."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Any:
        return self.function(x) * 2


KEPT: dict[str, Any] = {}


def patch_by_closure(model: Dropping) -> None:
    old = model.drop.forward
    model.drop.forward = lambda x: old(x) * 2


def patch_the_model(model: Dropping) -> None:
    old = model.forward
    model.forward = lambda x: old(x) * 2


def patch_by_global(model: Dropping) -> None:
    KEPT["old"] = model.drop.forward
    model.drop.forward = lambda x: KEPT["old"](x) * 2


def patch_by_object(model: Dropping) -> None:
    model.drop.forward = Doubled(model.drop.forward)


def patch_by_partial(model: Dropping) -> None:
    model.drop.forward = functools.partial(lambda old, x: old(x) * 2, model.drop.forward)


def patch_with_another_module(model: Dropping) -> None:
    old, adapter = model.fc.forward, nn.Linear(4, 4)
    model.fc.forward = lambda x: old(x) + model.drop(adapter(x))


def patch_an_attribute(model: Dropping) -> None:
    drop = model.drop
    model.act = lambda x: drop(x)
    model.__class__ = type("Acting", (Dropping,), {"forward": lambda self, x: self.act(self.fc(x))})


@pytest.mark.parametrize(
    "patch",
    [
        patch_by_closure,
        patch_the_model,
        patch_by_global,
        patch_by_object,
        patch_by_partial,
        patch_with_another_module,
        patch_an_attribute,
    ],
)
def test_a_patched_forward_follows_the_mode_of_the_result(patch: Callable[[Any], None]) -> None:
    model, x = Dropping(), torch.randn(2, 4)
    patch(model)
    amp = fxamp.convert(model, dtype=torch.bfloat16)
    assert all(modes_of(model))
    amp.eval()
    assert_same(amp(x), amp(x))
    model.eval()
    amp.train()
    assert not torch.equal(amp(x), amp(x))
    check_both_modes(amp, model, x)


def test_a_patched_forward_that_cannot_be_traced_does_not_run_the_users_module() -> None:
    model = Dropping()
    old = model.drop.forward
    model.drop.forward = lambda x: old(x) if x.sum() > 0 else x
    message = (
        "calls the forward that was set on Dropout 'drop', which uses the model that was converted and not the result"
    )
    with pytest.raises(fxamp.CaptureError, match=message):
        fxamp.convert(nn.Sequential(model))


class Drawing(nn.Module):
    """A module around a function of (module, x), with a generator at hand."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.generator = nn.Linear(4, 4), torch.Generator()
        self.generator.manual_seed(5)
        self.generators = [self.generator]
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.fc(x) + torch.randn(4, generator=m.generator),
        lambda m, x: m.fc(x) * torch.empty(4).normal_(generator=m.generators[0]),
        lambda m, x: m.fc(x) * torch.bernoulli(torch.full((4,), 0.5), generator=m.generator),
        lambda m, x: m.fc(x).float().softmax(-1).multinomial(2, generator=m.generator),
        lambda m, x: m.fc(x) * torch.rand(4, generator=torch.Generator().manual_seed(1)),
        lambda m, x: m.fc(x) if isinstance(m.generator, torch.Generator) else x,
    ],
)
@pytest.mark.parametrize("examples", [False, True])
def test_a_generator_goes_on_from_call_to_call(function: Any, examples: bool) -> None:
    model, x = Drawing(function), torch.randn(2, 4)
    expected, before = copy.deepcopy(model), model.generator.get_state()
    amp = fxamp.convert(model, dtype=torch.bfloat16, example_inputs=(x,) if examples else None)
    assert torch.equal(model.generator.get_state(), before)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(amp(x), expected(x))
    assert torch.equal(model.generator.get_state(), expected.generator.get_state())


def test_a_generator_that_is_seeded_at_every_call() -> None:
    def seeded(m: Any, x: Tensor) -> Tensor:
        m.generator.manual_seed(5)  # the state that it is in already, before the first call
        return m.fc(x) * torch.rand(4, generator=m.generator)

    with pytest.raises(fxamp.CaptureError, match=r"sets the state of a torch\.Generator, which a graph would forget"):
        fxamp.convert(Drawing(seeded))
    check_against_autocast(nn.Sequential(Drawing(seeded), nn.Linear(4, 4)), torch.randn(2, 4))


def gain_of(x: Tensor) -> Tensor:
    return (x @ x.t()).relu() * 2


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_function_is_one_call() -> None:
    gain: Any = torch.jit.script(gain_of)
    model, x = Net(lambda m, x: gain(m.fc(x)) @ x), torch.randn(2, 4)
    check_both_modes(fxamp.convert(model, dtype=torch.bfloat16), model, x)
    assert_same(copy.deepcopy(fxamp.convert(model, policy="full"))(x), model(x))


REFUSALS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "an unknown generator": (
        lambda m, x: torch.rand(4, generator=type(m.generator)()),
        "uses a torch.Generator that is no attribute of a module",
    ),
    "a parameter": (lambda m, x: nn.Parameter(torch.ones(4)) * x, "makes a parameter, which would be a new one at"),
    "a layer": (lambda m, x: nn.Linear(4, 4)(x), "makes a parameter, which would be a new one at every call"),
    "a mode": (lambda m, x: m.fc.eval()(x), "switches the mode of Linear, which a graph would forget"),
    "vmap": (lambda m, x: torch.vmap(lambda row: row @ x)(x), "calls a function transform of torch's, which cannot"),
    "grad": (lambda m, x: torch.func.grad(lambda y: y.sum())(x), "calls a function transform of torch's, which can"),
    "functional_call": (
        lambda m, x: torch.func.functional_call(m.fc, {"weight": m.fc.weight * 2}, (x,)),
        "calls a function transform of torch's, which cannot be traced into",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("examples", [False, True])
def test_a_refusal_names_the_users_line_and_thing(name: str, examples: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    function, message = REFUSALS[name]
    monkeypatch.setattr(Program, "frontends", ("torch.fx",))  # Dynamo takes some of these
    with pytest.raises(fxamp.CaptureError) as caught:
        fxamp.convert(Drawing(function), example_inputs=(torch.randn(4, 4),) if examples else None)
    assert message in str(caught.value)
    assert f"({__file__.rpartition('/')[2]}:" in str(caught.value)
    assert "Proxy" not in str(caught.value)


def test_a_builtin_is_named_as_users_write_it() -> None:
    with pytest.raises(fxamp.CaptureError) as caught:
        fxamp.convert(torch.relu)
    assert str(caught.value) == (
        "the signature of torch.relu is not known to Python\n\n"
        "hint: wrap it in a function of your own: lambda x: torch.relu(x)"
    )


@dataclasses.dataclass
class Seen:
    """What a module gives back, for others to add to."""

    hidden: Tensor
    pooled: Any = None


class Sees(nn.Module):
    """Stays a call: what a graph of it would forget."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(4, 4), Seen

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.kind(self.fc(x), self.fc(x).mean(-1))


class AddsTo(nn.Module):
    def __init__(self, use: Any) -> None:
        super().__init__()
        self.sees, self.fc, self.use = Sees(), nn.Linear(4, 4), use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, self.sees(x))


def sets_one(m: Any, seen: Any) -> Any:
    before = seen.pooled
    seen.pooled = m.fc(seen.hidden)
    return seen.pooled + before[..., None], seen.hidden


def sets_one_of_another_dtype(m: Any, seen: Any) -> Any:
    seen.hidden = seen.hidden.float() * 2
    return m.fc(seen.hidden).float() @ seen.hidden.t(), seen.hidden.dtype == torch.float32


def sets_a_weight(m: Any, seen: Any) -> Any:
    seen.pooled = m.fc.weight
    return seen.hidden @ seen.pooled + seen.hidden @ m.fc.weight


def writes_to_what_it_set(m: Any, seen: Any) -> Any:
    y = m.fc(seen.hidden).float()
    low = y @ m.fc.weight
    seen.pooled = y
    seen.pooled.mul_(2)
    return low + y @ m.fc.weight


@pytest.mark.parametrize("use", [sets_one, sets_one_of_another_dtype, sets_a_weight, writes_to_what_it_set])
@pytest.mark.parametrize("examples", [False, True])
def test_an_attribute_of_what_a_call_gave_back_is_set_at_run_time(use: Any, examples: bool) -> None:
    model = AddsTo(use)
    if examples and use is sets_one_of_another_dtype:
        with pytest.raises(fxamp.CaptureError, match="may be None"):
            fxamp.convert(AddsTo(lambda m, seen: seen.hidden.grad), example_inputs=(torch.randn(3, 4),))
    check_against_autocast(model, torch.randn(3, 4, requires_grad=True), examples=examples)


def test_an_object_that_was_added_to_is_handed_out_with_it() -> None:
    def adds(m: Any, seen: Any) -> Any:
        seen.pooled = m.fc(seen.hidden)
        return seen

    model, x = AddsTo(adds), torch.randn(3, 4)
    amp = fxamp.convert(model, dtype=torch.bfloat16, example_inputs=(x,))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    found = amp(x)
    assert type(found) is Seen
    assert_same((found.hidden, found.pooled), (expected.hidden, expected.pooled))
    assert amp(x).pooled is not found.pooled


@pytest.mark.parametrize("name", ["data", "requires_grad"])
def test_what_a_tensor_has_is_not_set(name: str) -> None:
    def sets(m: Any, seen: Any) -> Any:
        setattr(seen.hidden, name, seen.hidden)
        return seen.hidden

    with pytest.raises(fxamp.CaptureError, match=f"sets the attribute '{name}' of a tensor"):
        fxamp.convert(AddsTo(sets))


class Layer:
    """What a decoder keeps of one layer: a plain object, filled at the first use."""

    def __init__(self) -> None:
        self.keys: Any = None
        self.values: Any = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 1)
        self.values = values if self.values is None else torch.cat([self.values, values], 1)
        return self.keys, self.values


class Cache:
    def __init__(self, count: int) -> None:
        self.layers = [Layer() for _ in range(count)]
        self.seen = 0


class Decoder(nn.Module):
    """Makes a cache when it is given none, and hands it out."""

    def __init__(self, *, stays_a_call: bool) -> None:
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(4, 12) for _ in range(2)])
        self.calls, self.stays_a_call = 0, stays_a_call

    def forward(self, x: Tensor, cache: Cache | None = None) -> dict[str, Any]:
        self.calls += self.stays_a_call
        cache = Cache(len(self.projections)) if cache is None else cache
        for layer, projection in zip(cache.layers, self.projections, strict=True):
            query, key, value = projection(x).chunk(3, -1)
            keys, values = layer.update(key, value)
            x = x + (query @ keys.transpose(1, 2)).softmax(-1) @ values
        cache.seen += 1
        return {"x": x, "cache": cache}


def of_a_cache(cache: Any) -> list[Tensor]:
    assert type(cache) is Cache
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("stays_a_call", [False, True])
@pytest.mark.parametrize("examples", [False, True])
def test_a_cache_that_a_forward_makes_is_one_of_each_call(stays_a_call: bool, examples: bool) -> None:
    model: nn.Module = Decoder(stays_a_call=stays_a_call)
    if stays_a_call:

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.decoder, self.fc = Decoder(stays_a_call=True), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> dict[str, Any]:
                found = self.decoder(x)
                return {"x": self.fc(found["x"]), "cache": found["cache"]}

        model = Outer()
    x = torch.randn(2, 3, 4)
    amp = fxamp.convert(model, dtype=torch.bfloat16, **({"example_inputs": (x,)} if examples else {}))
    earlier: list[Any] = []
    for inputs in (x, x * 2, torch.randn(1, 5, 4)):
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(inputs)
        found = amp(inputs)
        assert_same((found["x"], *of_a_cache(found["cache"])), (expected["x"], *of_a_cache(expected["cache"])))
        assert found["cache"].seen == 1
        for other in earlier:
            assert other is not found["cache"]
            assert other.layers[0] is not found["cache"].layers[0]
        earlier.append(found["cache"])
    assert len({id(tensor) for cache in earlier for tensor in of_a_cache(cache)}) == 12
