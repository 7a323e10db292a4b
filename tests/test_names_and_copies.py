"""Names of a model that Python, torch.fx or fxamp use too, and copies that are copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxamp
from tests.helpers import assert_same, check_against_autocast, run

BF16 = torch.bfloat16
PUBLIC = "graph code meta shape_env recompile print_readable to_folder add_submodule delete_submodule".split()
OURS = "policy plan scaler report replan freeze hold_weights".split()
PRIVATE = (
    "_graph _code _lineno_map _tracer_cls _tracer_extras _conversion _this _whole _run _own _root _activate _compiled "
    "_wrapped_call _replace_hooks _constant_0 _frozen_fc_weight_bfloat16"
).split()
KEYWORDS = "class lambda None import".split()
MODULES_OWN = "forward type half float train eval to T children state_dict __call__".split()
ODD = ["0", "with space", 'quo"te', "umläut", "new\nline"]


class Chain(nn.Module):
    """Runs the modules that it has under some names; ``x`` meets their weights too."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self._modules[name] = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for module in self._modules.values():
            x = torch.relu(module(x)) + module.weight.sum()
        return x


class Nested(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.inner = Chain(names)
        self.drop = Chain([])
        self.drop._modules["class"] = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop._modules["class"](self.inner(x))


class Reads(nn.Module):
    """Reads one tensor that it has under a name, as a parameter, a buffer or a plain attribute."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        tensor = torch.randn(8, 8)
        if kind == "parameter":
            self._parameters[name] = nn.Parameter(tensor)
        elif kind == "buffer":
            self._buffers[name] = tensor
        else:
            self.__dict__[name] = tensor
        self.read = {"parameter": "_parameters", "buffer": "_buffers"}.get(kind, "__dict__"), name

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) @ getattr(self, self.read[0])[self.read[1]]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.h = torch.zeros(3, 8, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x + self.h)
        self.h = y.detach()
        return y


class TestNames:
    @pytest.mark.parametrize("names", [PUBLIC, OURS, PRIVATE, KEYWORDS, MODULES_OWN, ODD], ids=lambda names: names[0])
    def test_submodules_may_have_any_name(self, names: list[str]) -> None:
        model = Chain(names)
        amp = check_against_autocast(model, torch.randn(3, 8))
        assert list(amp.state_dict()) == list(model.state_dict())
        assert fxamp.inspect(amp).graph.find_nodes(op="call_function", target=F.linear)
        assert "linear" in fxamp.inspect(amp).code

    @pytest.mark.parametrize("names", [PUBLIC, OURS, PRIVATE, KEYWORDS, MODULES_OWN, ODD], ids=lambda names: names[0])
    def test_submodules_below_the_root_may_have_any_name(self, names: list[str]) -> None:
        check_against_autocast(Nested(names), torch.randn(3, 8))

    @pytest.mark.parametrize("kind", ["parameter", "buffer", "plain"])
    @pytest.mark.parametrize("name", [*PUBLIC, *OURS, *PRIVATE, *KEYWORDS, "type", "T", "0"])
    def test_tensors_may_have_any_name(self, name: str, kind: str) -> None:
        amp = check_against_autocast(Reads(name, kind), torch.randn(3, 8), modes=(False,))
        assert fxamp.inspect(amp).plan["matmul"].rule == "lower"

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "freeze", "replan", "copy"])
    @pytest.mark.parametrize("names", [PUBLIC, OURS, PRIVATE, KEYWORDS, MODULES_OWN], ids=lambda names: names[0])
    def test_copies_work_under_any_name(self, names: list[str], how: str) -> None:
        amp, x = fxamp.convert(Chain(names), dtype=BF16).eval(), torch.randn(3, 8)
        view = fxamp.inspect(amp)
        made: dict[str, Callable[[], Any]] = {
            "deepcopy": lambda: copy.deepcopy(amp),
            "pickle": lambda: pickle.loads(pickle.dumps(amp)),
            "freeze": view.freeze,
            "replan": lambda: view.replan("autocast"),
            "copy": lambda: copy.copy(amp),
        }
        assert_same(made[how]()(x), amp(x).detach() if how == "freeze" else amp(x))

    def test_what_the_model_has_is_what_its_name_gives(self) -> None:
        amp = fxamp.convert(Chain(PUBLIC + OURS), dtype=BF16)
        assert all(getattr(amp, name) is amp._modules[name] for name in PUBLIC + OURS)
        code = fxamp.inspect(amp).code
        fxamp.AmpModule.recompile(amp)
        assert fxamp.inspect(amp).code == code

    def test_a_submodule_may_be_replaced_under_any_name(self) -> None:
        amp, x = fxamp.convert(Chain(["graph", "fc"]), dtype=BF16), torch.randn(3, 8)
        other = nn.Linear(8, 8)
        amp.graph = other
        with torch.autocast("cpu", BF16):
            expected = torch.relu(other(x)) + other.weight.sum()
            expected = torch.relu(amp.fc(expected)) + amp.fc.weight.sum()
        assert_same(amp(x), expected)

    @pytest.mark.parametrize("name", ["code", "graph", "meta", "scaler", "_code", "h", "_conversion"])
    def test_a_forward_may_keep_a_tensor_under_any_name(self, name: str) -> None:
        class Keeps(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                y = self.fc(x)
                setattr(self, name, y)
                return y

        amp = fxamp.convert(Keeps(), dtype=BF16)
        y = amp(torch.randn(3, 8))
        if not name.startswith("_"):
            assert getattr(amp, name) is y
        assert "linear" in fxamp.inspect(amp).code

    def test_a_plain_tensor_can_be_set_from_outside(self) -> None:
        amp, x = fxamp.convert(Reads("table", "plain"), dtype=BF16), torch.randn(3, 8)
        amp.table = torch.zeros(8, 8)
        assert (amp(x) == 0).all()
        assert (copy.deepcopy(amp)(x) == 0).all()
        assert (amp.replan("full")(x) == 0).all()

    def test_a_copy_has_the_plain_tensors_as_they_are_now(self) -> None:
        x = torch.randn(3, 8)
        amp = check_against_autocast(Recurrent(), x)
        for made in (copy.deepcopy(amp), pickle.loads(pickle.dumps(amp)), copy.copy(amp), amp.freeze()):
            made.eval()
            assert_same(made.h, amp.h)
            expected, amp.h = amp(x), made.h
            assert_same(made(x), expected.detach() if not made.fc.weight.requires_grad else expected)

    def test_the_code_of_an_ordinary_model_reads_attributes(self) -> None:
        amp = fxamp.convert(nn.Sequential(nn.Linear(8, 8)), dtype=BF16)
        assert 'getattr(self, "0").weight' in amp.code
        amp = fxamp.convert(Nested(["fc"]), dtype=BF16)
        assert "self.inner.fc.weight" in amp.code
        assert "_modules['class']" in amp.code


def with_torch(x: Tensor, torch: Tensor) -> Tensor:
    return F.linear(x, torch).softmax(-1)[:, :2] + torch[0, 0]


def with_slice(x: Tensor, slice: Tensor) -> Tensor:
    return x[:, 1:3] @ slice[:2]


def with_device(inf: Tensor, nan: Tensor, device: Tensor, getattr: Tensor) -> Tensor:
    return inf @ nan.masked_fill(nan > 0, float("inf")).clamp(max=9) @ getattr.mT + device


def with_self(x: Tensor, self: Tensor) -> Tensor:
    return x @ self


def with_globals(x: Tensor, fxamp_runtime_casts_cast_weight: Tensor, linear: Tensor) -> Tensor:
    return F.linear(x, linear) @ fxamp_runtime_casts_cast_weight


class TestArguments:
    @pytest.mark.parametrize("function", [with_torch, with_slice, with_device, with_self, with_globals])
    def test_an_argument_may_have_any_name(self, function: Callable[..., Tensor]) -> None:
        inputs = [torch.randn(8, 8) for _ in range(function.__code__.co_argcount)]
        amp = fxamp.convert(function, dtype=BF16)
        expected, expected_grads = run(function, tuple(inputs), {}, torch.autocast("cpu", BF16))
        found, grads = run(amp, tuple(inputs), {}, torch.autocast("cpu", BF16))
        assert_same((found, grads), (expected, expected_grads))
        named = dict(zip(function.__code__.co_varnames, inputs, strict=False))
        if "self" not in named:  # torch's own call takes that
            assert_same(amp(**named), expected)

    def test_a_keyword_argument_may_be_called_by_a_keyword(self) -> None:
        amp = fxamp.convert(Keywords(), dtype=BF16)
        x, y = torch.randn(3, 8), torch.randn(3, 8)
        with torch.autocast("cpu", BF16):
            expected = Keywords()(x, **{"class": y})
        assert_same(amp(x, **{"class": y}), expected)

    def test_the_parts_of_one_argument_do_not_meet_another(self) -> None:
        def parts(x: Any, x_0: Tensor, x_1: Tensor) -> Tensor:
            return x[0] @ x_0 + x[1] @ x_1

        inputs = ([torch.randn(8, 8), torch.randn(8, 8)], torch.randn(8, 8), torch.randn(8, 8))
        with torch.autocast("cpu", BF16):
            expected = parts(*inputs)
        assert_same(fxamp.convert(parts, dtype=BF16)(*inputs), expected)
        assert_same(fxamp.convert(parts, dtype=BF16, example_inputs=inputs)(*inputs), expected)


class Keywords(nn.Module):
    def forward(self, x: Tensor, **rest: Tensor) -> Tensor:
        return x @ rest["class"].t() if "class" in rest else x
