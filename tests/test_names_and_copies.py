"""Names of a model that Python, torch.fx or fxamp use too, and copies that are copies."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
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
        model = nn.Sequential(OrderedDict(graph=nn.Dropout(), fc=nn.Linear(8, 8)))
        amp, x = fxamp.convert(model, dtype=BF16), torch.randn(3, 8)
        amp.graph = nn.ReLU()
        with torch.autocast("cpu", BF16):
            expected = amp.fc(torch.relu(x))
        assert_same(amp(x), expected)
        amp.fc = nn.Linear(8, 8)
        assert amp.fc is amp._modules["fc"]
        with pytest.raises(fxamp.CaptureError, match="submodule 'fc' was replaced after"):
            amp(x)

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


class Alike(nn.Module):
    """Two weights whose paths are one when dots become underscores, both also read in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a_b = nn.Linear(8, 8)
        self.a = nn.Module()
        self.a.b = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a_b(x) + self.a.b(x) + self.a_b.weight.sum() + self.a.b.weight.sum()


class Mixed(nn.Module):
    """What freezing folds, and all that it has to leave in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.embedding = nn.Embedding(11, 8)
        self.register_buffer("table", torch.randn(8, 8))
        self.plain = torch.randn(8)
        self.listed = [torch.randn(8)]
        self.index = torch.arange(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x.mT)).mT
        x = self.attention(x, x, x)[0] + self.gru(x)[0]
        x = self.norm(x) * self.scale + self.plain + self.listed[0]
        return (x @ self.table + self.embedding(self.index)) @ self.embedding.weight.t()


class Whole(nn.Module):
    """Reads the weights of modules that also run as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.bn = nn.BatchNorm1d(8)
        self.bn.weight.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.attention.in_proj_weight)[..., :8]
        y = y * F.linear(x, self.bn.weight[None]) + F.linear(x, torch.eye(8), self.bn.weight)
        return self.bn(self.attention(y, y, y)[0].mT)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, times: int = 1) -> Tensor:
        y = self.fc(x)
        return y if mask is None else (y * mask + self.fc.weight.sum()) * times


def changed(model: nn.Module) -> None:
    """All of its tensors, in place, as a step of training changes them."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(2)


class TestFreeze:
    def test_weights_with_like_paths_stay_apart(self) -> None:
        amp, x = fxamp.convert(Alike(), dtype=BF16).eval(), torch.randn(3, 8)
        assert_same(amp.freeze()(x), amp(x).detach())

    def test_a_low_copy_does_not_take_a_name_of_the_models(self) -> None:
        model = Masked()
        model.register_buffer("_frozen_fc_weight_bfloat16", torch.randn(8, 8))
        model._modules["_frozen_fc_weight_bfloat16_"] = nn.Linear(3, 3)
        amp, x = fxamp.convert(model, dtype=BF16).eval(), torch.randn(3, 8)
        expected = amp(x, x)
        assert_same(amp.freeze()(x, x), expected.detach())

    @pytest.mark.parametrize("policy", ["autocast", "fast", "full"])
    def test_nothing_of_a_frozen_module_changes_with_the_one_that_goes_on_training(self, policy: str) -> None:
        model, x = Mixed(), torch.randn(2, 5, 8)
        amp = fxamp.convert(model, dtype=BF16, policy=policy).eval()
        frozen = amp.freeze()
        grads = [p.requires_grad for p in model.parameters()]
        expected = copy.deepcopy(amp).requires_grad_(False)(x)  # torch has other kernels for these
        assert_same(frozen(x), expected)
        changed(model)
        model.plain.mul_(2)
        model.listed[0].mul_(2)
        assert_same(frozen(x), expected)
        assert not torch.equal(amp(x), expected)
        assert [p.requires_grad for p in model.parameters()] == grads == [True] * len(grads)
        changed(frozen)
        assert_same(list(amp.parameters()), list(model.parameters()))

    def test_a_frozen_loss_and_what_a_function_closes_over_are_copies_too(self) -> None:
        net, weight, loss = nn.Linear(8, 8), torch.randn(8, 8), nn.CrossEntropyLoss(weight=torch.rand(8))
        amp = fxamp.convert(lambda x: net(x) @ weight, loss, dtype=BF16).eval()
        x, y = torch.randn(3, 8), torch.randint(8, (3,))
        frozen, expected = amp.freeze(), [part.detach() for part in amp(x, y)]
        changed(net)
        weight.mul_(2)
        loss.weight.mul_(2)
        assert_same(list(frozen(x, y)), expected)

    def test_tied_weights_are_one_in_the_copy(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        model[1].weight = model[0].weight
        frozen = fxamp.convert(model, dtype=BF16).freeze()
        weights = [frozen.get_parameter(f"{i}.weight") for i in (0, 1)]
        assert weights[0] is weights[1]
        assert weights[0].dtype is BF16

    def test_weights_of_modules_that_run_as_a_whole_keep_their_dtype(self) -> None:
        amp, x = fxamp.convert(Whole(), dtype=BF16).eval(), torch.randn(2, 8, 8)
        frozen = amp.freeze()
        assert_same(frozen(x), amp(x).detach())
        assert frozen.bn.weight.dtype is torch.float32

    def test_a_checkpoint_reaches_the_low_copies(self) -> None:
        amp, other, x = fxamp.convert(Mixed(), dtype=BF16).eval(), Mixed().eval(), torch.randn(2, 5, 8)
        frozen = amp.freeze()
        frozen.load_state_dict(other.state_dict())
        amp.load_state_dict(other.state_dict())
        assert_same(frozen(x), amp(x).detach())

    def test_a_checkpoint_reaches_the_low_copies_below_another_module(self) -> None:
        frozen, other = fxamp.convert(Alike(), dtype=BF16).freeze(), Alike()
        outer, x = nn.Sequential(frozen), torch.randn(3, 8)
        outer.load_state_dict(nn.Sequential(other).state_dict())
        assert_same(outer(x), fxamp.convert(other, dtype=BF16).eval()(x).detach())
        for made in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), frozen.freeze()):
            made.load_state_dict(Alike().state_dict())
            assert not torch.equal(made(x), frozen(x))
            made.load_state_dict(other.state_dict())
            assert_same(made(x), frozen(x))

    def test_another_kind_of_call_is_an_error_after_freezing(self) -> None:
        amp, x = fxamp.convert(Masked(), dtype=BF16), torch.randn(3, 8)
        frozen = amp.freeze()
        assert_same(frozen(x), amp.eval()(x).detach())
        with pytest.raises(fxamp.CaptureError, match="Masked was frozen before a call that gives mask, times") as found:
            frozen(x, mask=x, times=3)
        assert "hint: call amp that way once, then amp.freeze()" in str(found.value)
        for made in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), copy.copy(frozen), frozen.freeze()):
            with pytest.raises(fxamp.CaptureError, match="was frozen before"):
                made(x, mask=x)

    @pytest.mark.parametrize("training", [True, False])
    def test_calls_that_came_before_freezing_work_after_it(self, training: bool) -> None:
        amp, x = fxamp.convert(Masked(), dtype=BF16).train(training), torch.randn(3, 8)
        expected = amp(x).detach(), amp(x, x).detach(), amp(x, mask=x, times=3).detach()
        frozen = amp.freeze()
        changed(amp)
        assert_same((frozen(x), frozen(x, x), frozen(x, mask=x, times=3)), expected)
        assert frozen.fc.weight.dtype is torch.float32

    def test_other_dtypes_of_the_inputs_are_right_after_freezing(self) -> None:
        model, x = Alike(), torch.randn(3, 8)
        amp = fxamp.convert(model, dtype=BF16, example_inputs=(x,)).eval()
        frozen = amp.freeze()
        for dtype in (torch.float32, BF16, torch.float16):
            assert_same(frozen(x.to(dtype)), amp(x.to(dtype)).detach())

    @pytest.mark.parametrize("policy", ["full", "fast", "autocast"])
    def test_a_frozen_module_has_no_other_policy(self, policy: str) -> None:
        frozen = fxamp.convert(Masked(), dtype=BF16).freeze()
        with pytest.raises(fxamp.PolicyError, match="frozen for policy autocast/cpu bf16") as found:
            frozen.replan(policy)
        assert "hint: amp.replan(policy).freeze()" in str(found.value)

    def test_freezing_again_and_copies_give_the_same(self) -> None:
        frozen, x = fxamp.convert(Mixed(), dtype=BF16).freeze(), torch.randn(2, 5, 8)
        for made in (frozen.freeze(), copy.copy(frozen), copy.deepcopy(frozen)):
            assert_same(made(x), frozen(x))
            assert str(made.report()) == str(frozen.report())
            assert made.code == frozen.code
        shared, own = copy.copy(frozen), frozen.freeze()
        assert [id(p) for p in shared.parameters()] == [id(p) for p in frozen.parameters()]
        assert not {id(p) for p in own.parameters()} & {id(p) for p in frozen.parameters()}

    def test_a_frozen_module_can_be_given_another_dtype(self) -> None:
        amp, x = fxamp.convert(Alike(), dtype=BF16).eval(), torch.randn(3, 8)
        frozen = amp.freeze()
        assert_same(frozen.float()(x), amp(x).detach())
        amp = fxamp.convert(nn.Sequential(nn.Linear(8, 8)), dtype=BF16).eval()
        assert_same(amp.freeze().float()(x), amp(x).detach())

    @pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
    def test_a_scripted_submodule_is_copied_too(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Sequential(nn.Linear(8, 8))))
        amp, x = fxamp.convert(model, dtype=BF16).eval(), torch.randn(3, 8)
        frozen, expected = amp.freeze(), amp(x).detach()
        changed(model)
        assert_same(frozen(x), expected)

    def test_freezing_takes_what_a_submodule_kept_of_a_forward(self) -> None:
        amp, x = fxamp.convert(Keeping(), dtype=BF16), torch.randn(3, 8)
        amp(x)
        frozen = amp.freeze()
        assert_same(frozen(x), amp.eval()(x).detach())


class Keeping(nn.Module):
    """Has a submodule that is a call, and keeps its last output with its history."""

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.count, self.lasts = nn.Linear(8, 8), 0, []

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            y: Tensor = self.fc(x)
            self.last = y
            self.lasts.append(y)
            return y

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.head = self.Kept(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.kept(x))


class Extra(nn.Module):
    """Has extra state that its forward reads."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(8, 8), scale

    def get_extra_state(self) -> Any:
        return {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class Renamed(Extra):
    """Saves its weights under other names."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "version"] = torch.tensor(3)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "version")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Wrapped(Extra):
    """Saves its weights below a key of its own."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {f"model.{name}": value for name, value in state.items()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        state = {name.removeprefix("model."): value for name, value in state_dict.items()}
        return super().load_state_dict(state, *args, **kwargs)


class Hooked(nn.Module):
    """A model whose checkpoint hooks rename a key, and that has a submodule with extra state."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.inner = Extra(scale)
        self.register_state_dict_post_hook(rename)
        self.register_load_state_dict_pre_hook(rename_back)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def rename(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    state[prefix + "weight"] = state.pop(prefix + "inner.fc.weight")


def rename_back(module: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
    if prefix + "weight" in state:
        state[prefix + "inner.fc.weight"] = state.pop(prefix + "weight")


KINDS = [Extra, Renamed, Wrapped, Hooked]


class TestCheckpoints:
    @pytest.mark.parametrize("loss", [None, nn.MSELoss()])
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_the_class_does_with_its_checkpoints_is_done(self, kind: Callable[..., nn.Module], loss: Any) -> None:
        model, other = kind(), kind(3.0)
        amp, other_amp = fxamp.convert(model, loss, dtype=BF16), fxamp.convert(other, loss, dtype=BF16)
        assert_same(dict(amp.state_dict()), dict(model.state_dict()))
        assert list(amp.state_dict()) == list(model.state_dict())
        given = (torch.randn(3, 8), torch.randn(3, 8))[: 1 if loss is None else 2]
        expected = other_amp(*given)
        amp.load_state_dict(other.state_dict())
        assert_same(amp(*given), expected)
        model.load_state_dict(other_amp.state_dict())
        assert_same(dict(model.state_dict()), dict(other.state_dict()))
        assert_same(dict(copy.deepcopy(amp).state_dict()), dict(other.state_dict()))

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_done_below_another_module_too(self, kind: Callable[..., nn.Module]) -> None:
        if kind is Wrapped:
            pytest.skip("its own keys have no place for a prefix")
        model, other, x = kind(), kind(3.0), torch.randn(3, 8)
        outer, other_outer = nn.Sequential(fxamp.convert(model, dtype=BF16)), nn.Sequential(other)
        assert list(outer.state_dict()) == list(nn.Sequential(model).state_dict())
        outer.load_state_dict(other_outer.state_dict())
        assert_same(outer(x), fxamp.convert(other, dtype=BF16)(x))

    def test_a_loss_with_parameters_is_saved_and_loaded_beside_it(self) -> None:
        class Loss(Extra):
            def forward(self, y: Tensor) -> Tensor:
                return (self.fc(y) * self.scale).sum()

        for kind in (Extra, Wrapped):
            amp, other, x = fxamp.convert(kind(), Loss()), fxamp.convert(kind(5.0), Loss(7.0)), torch.randn(3, 8)
            amp.load_state_dict(other.state_dict())
            assert_same(amp(x), other(x))
            assert "loss.fc.weight" in amp.state_dict()

    @pytest.mark.parametrize("kind", [Extra, Renamed])
    def test_a_wrong_key_is_an_error_still(self, kind: Callable[..., nn.Module]) -> None:
        amp = fxamp.convert(kind())
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"more"'):
            amp.load_state_dict({**amp.state_dict(), "more": torch.zeros(1)})
        state = amp.state_dict()
        del state["fc.weight"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"fc\.weight"'):
            amp.load_state_dict(state)

    def test_a_python_value_that_graphs_cannot_follow_is_an_error(self) -> None:
        frozen, net = fxamp.convert(Hooked(), dtype=BF16).freeze(), Extra()
        with pytest.raises(fxamp.CaptureError, match="load_state_dict changed what 'inner' keeps in Python") as found:
            frozen.load_state_dict(Hooked(3.0).state_dict())
        assert "hint: load it into the module and convert that again" in str(found.value)
        with pytest.raises(fxamp.CaptureError, match="'inner'"):
            frozen.load_state_dict(Hooked(3.0).state_dict())
        frozen.load_state_dict(Hooked().state_dict())
        function = fxamp.convert(lambda x: net(x), dtype=BF16)
        with pytest.raises(fxamp.CaptureError, match="load_state_dict changed what 'net' keeps in Python"):
            function.load_state_dict({**function.state_dict(), "net._extra_state": {"scale": 3.0}})

    def test_no_keys_are_added_to_those_of_a_frozen_module(self) -> None:
        amp = fxamp.convert(Alike(), dtype=BF16)
        assert list(amp.freeze().state_dict()) == list(amp.state_dict())

    def test_a_submodule_that_was_replaced_is_saved_and_copied(self) -> None:
        model = nn.Sequential(OrderedDict(drop=nn.Dropout(), fc=nn.Linear(8, 8)))
        amp, x = fxamp.convert(model, dtype=BF16), torch.randn(3, 8)
        amp.drop = nn.PReLU()
        assert_same(amp.state_dict()["drop.weight"], amp.drop.weight.detach())
        for made in (copy.deepcopy(amp), pickle.loads(pickle.dumps(amp)), copy.copy(amp), amp.replan("autocast")):
            assert_same(made(x), amp(x))


class Counts(nn.Module):
    """Stays a call, and gives on what it got, in part or in a container, or what it has."""

    def __init__(self, what: str = "itself") -> None:
        super().__init__()
        self.calls, self.what, self.last = 0, what, torch.zeros(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, *rest: Tensor) -> Any:
        self.calls += 1
        if self.what == "weight":
            return x @ self.weight, self.weight
        if self.what == "last":
            self.last, last = x, self.last if self.calls % 2 == 0 else x * 2
            return last
        if self.what == "given":
            return x @ rest[0], rest[0]
        return {"itself": x, "list": [x, x * 2], "dict": {"x": x}, "view": x.view_as(x), "used": x}[self.what]


class HandsOn(nn.Module):
    def __init__(self, what: str, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.counts, self.use = Counts(what), use
        for name in "vw":
            setattr(self, name, nn.Parameter(torch.randn(8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


class TestLeavesThroughCalls:
    @pytest.mark.parametrize("examples", [False, True])
    @pytest.mark.parametrize(
        ("what", "use"),
        [
            ("itself", lambda m, x: m.counts(x) @ m.w * 1.3 + m.counts(x) @ m.v + x @ m.w),
            ("itself", lambda m, x: m.counts(m.w) @ x.t() + (x @ m.w).t() + (m.v @ x.t())),
            ("itself", lambda m, x: m.counts(m.counts(x)) @ m.w + torch.einsum("ij,jk->ik", x, m.v) + x @ m.v),
            ("list", lambda m, x: m.counts(x)[0] @ m.w * 1.3 + x @ m.v + m.counts(x)[0] @ m.v),
            ("dict", lambda m, x: m.counts(x)["x"] @ m.w * 1.3 + x @ m.v + m.counts(x)["x"] @ m.v),
            ("view", lambda m, x: m.counts(x) @ m.w * 1.3 + x @ m.v + m.counts(x) @ m.v),
            ("last", lambda m, x: m.counts(x) + m.counts(x * 3) @ m.w * 1.3 + x @ m.v + x @ m.w),
            ("weight", lambda m, x: m.counts(x)[0] + x @ m.counts(x)[1] + x @ m.counts.weight),
            ("given", lambda m, x: m.counts(x, m.w)[0] + x @ m.counts(x, m.w)[1] * 1.3 + x @ m.w + x @ m.v),
        ],
    )
    def test_what_a_call_gives_back_may_be_any_leaf_that_it_got(self, what: str, use: Any, examples: bool) -> None:
        model, x = HandsOn(what, use), torch.randn(8, 8, requires_grad=True)
        check_against_autocast(model, x, examples=examples, modes=(True,))

    def test_a_hook_may_give_back_the_input(self) -> None:
        model = HandsOn("itself", lambda m, x: m.fc(x) @ m.w + m.fc(x) @ m.v * 1.3 + x @ m.w)
        model.fc = nn.Linear(8, 8)
        model.fc.register_forward_hook(lambda module, args, output: args[0])
        check_against_autocast(model, torch.randn(8, 8, requires_grad=True))

    def test_a_module_of_torch_makes_new_tensors(self) -> None:
        model = nn.Sequential(nn.LSTM(8, 8))
        amp = fxamp.convert(Headed(model), dtype=BF16)
        assert amp.plan["linear"].how == "call"


class Headed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x)[0])
        return y


@pytest.mark.parametrize("op", ["aten::to", torch.Tensor.to, "aten::type_as", "aten::alias"])
@pytest.mark.parametrize("rule", ["fp32", "lower", "follow"])
def test_the_models_own_casts_cannot_be_overridden(op: Any, rule: str) -> None:
    def casts(x: Tensor, y: Tensor) -> Tensor:
        return x.to(y).type_as(y).half().float()[0] + x

    policy = fxamp.Policy.autocast("cpu", BF16).with_ops({op: rule})
    with pytest.raises(fxamp.PolicyError, match="is for a cast of the model's own or a part of a value") as found:
        fxamp.convert(casts, policy=policy)
    assert "hint: override the operator that takes its result" in str(found.value)
    with pytest.raises(fxamp.PolicyError, match="is for a cast of the model's own"):
        fxamp.convert(casts, dtype=BF16).replan(policy)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: m.fc(x) + x @ m.w,
        lambda m, x: m.fc(x * 2) + (x * 2) @ m.w + x.view(4, 8) @ m.w,
        lambda m, x: m.fc(torch.flatten(x, 1)) + x @ m.w * 1.7,
        lambda m, x: first_without_gradients(m, x) + x @ m.w + m.fc(x),
    ],
)
@pytest.mark.parametrize("leaf", [True, False])
def test_a_compiled_module_has_the_same_gradients(use: Any, leaf: bool) -> None:
    model = HandsOn("itself", use)
    model.fc = nn.Linear(8, 8)
    amp, x = fxamp.convert(model, dtype=BF16), torch.randn(4, 8, requires_grad=leaf)
    expected, expected_grads = run(amp, (x,), {}, nullcontext())
    amp.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(amp, backend="aot_eager", fullgraph=True)
    found, grads = run(lambda *inputs: compiled(*inputs), (x,), {}, nullcontext())
    assert_same(found, expected)
    assert_same([grads["input 0"]], [expected_grads["input 0"]])
    assert_same([p.grad for p in amp.parameters()], [expected_grads[name] for name, _ in amp.named_parameters()])
    with torch.no_grad():
        assert_same(compiled(x), amp(x))


def first_without_gradients(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model.fc(x)
    return y


def freezes(m: Any, x: Tensor) -> Tensor:
    for p in m.fc.parameters():
        p.requires_grad = False
    y: Tensor = m.fc(x)
    return y


def clears(m: Any, x: Tensor) -> Tensor:
    m.zero_grad()
    y: Tensor = m.fc(x)
    return y


def forgets(m: Any, x: Tensor) -> Tensor:
    m.fc.weight.grad = None
    y: Tensor = m.fc(x)
    return y


def replaces(m: Any, x: Tensor) -> Tensor:
    for p in m.fc.parameters():
        p.data = p.data * 2
    y: Tensor = m.fc(x)
    return y


def deletes(m: Any, x: Tensor) -> Tensor:
    for p in m.fc.parameters():
        del p.grad
    y: Tensor = m.fc(x)
    return y


class Sets(nn.Module):
    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fc, self.use = nn.Linear(8, 8), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


class TestAttributesOfTensors:
    @pytest.mark.parametrize(
        ("use", "name"),
        [(freezes, "requires_grad"), (forgets, "grad"), (replaces, "data"), (deletes, "grad")],
    )
    @pytest.mark.parametrize("examples", [False, True])
    def test_setting_one_in_the_models_own_forward_is_an_error(self, use: Any, name: str, examples: bool) -> None:
        shown = (torch.randn(3, 8),) if examples else None
        with pytest.raises(fxamp.CaptureError, match=rf"cannot trace {use.__name__} .*sets the attribute '{name}'"):
            fxamp.convert(Sets(use), example_inputs=shown)

    def test_clearing_gradients_there_is_one_too(self) -> None:
        with pytest.raises(fxamp.CaptureError, match=r"cannot trace Sets.forward|cannot trace clears"):
            fxamp.convert(Sets(clears))

    @pytest.mark.parametrize("use", [freezes, forgets, replaces, deletes, clears])
    def test_a_submodule_that_sets_one_stays_a_call(self, use: Any) -> None:
        model, x = nn.Sequential(nn.Linear(8, 8), Sets(use)), torch.randn(3, 8)
        before = [p.clone() for p in model.parameters()]
        with torch.autocast("cpu", BF16):
            expected = copy.deepcopy(model)(x)
        amp = fxamp.convert(model, dtype=BF16)
        assert_same([p.detach() for p in model.parameters()], [p.detach() for p in before])
        assert all(p.requires_grad for p in model.parameters())
        assert_same(amp(x), expected)


class Asks(nn.Module):
    """Goes another way in each grad mode, and by what its weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.fc.weight.dtype == torch.float32:
            x = x + 1
        return self.fc(x) if torch.is_grad_enabled() else self.fc(x) * 3


class TestFrozenAndAsked:
    def test_a_frozen_module_goes_its_way_in_each_grad_mode(self) -> None:
        amp, x = fxamp.convert(Asks(), dtype=BF16).eval(), torch.randn(3, 8)
        frozen = amp.freeze()
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                for made in (frozen, pickle.loads(pickle.dumps(frozen)), frozen.freeze()):
                    assert torch.equal(made(x), amp(x))

    def test_a_hook_on_a_submodule_of_a_frozen_module_is_an_error(self) -> None:
        amp, x = fxamp.convert(Asks(), dtype=BF16), torch.randn(3, 8)
        frozen = amp.freeze()
        handle = frozen.get_submodule("fc").register_forward_hook(lambda module, args, output: output * 2)
        with pytest.raises(fxamp.CaptureError, match="changed after it was frozen") as found:
            frozen(x)
        assert str(found.value).endswith("hint: change the module that it was frozen from, then amp.freeze()")
        handle.remove()
        assert_same(frozen(x), amp.requires_grad_(False).eval()(x))

    def test_weights_of_another_dtype_that_are_assigned_to_a_frozen_module(self) -> None:
        model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(3, 8)
        frozen = fxamp.convert(model, dtype=BF16).freeze()
        frozen.load_state_dict(model.state_dict(), assign=True)
        with torch.autocast("cpu", BF16):
            assert_same(frozen(x), model(x).detach())

    def test_a_converted_module_inside_another_is_copied_with_its_tensors(self) -> None:
        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc, self.plain = nn.Linear(8, 8), torch.ones(8)
                self.hidden = [nn.Linear(8, 8)]

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x) + self.plain + self.hidden[0].weight.sum()

        inner, x = Inner(), torch.randn(3, 8)
        amp = fxamp.convert(nn.Sequential(fxamp.convert(inner, dtype=BF16), nn.Linear(8, 8)), dtype=BF16).eval()
        frozen = amp.freeze()
        before = frozen(x)
        assert_same(before, amp(x).detach())
        with torch.no_grad():
            for tensor in (inner.plain, inner.fc.weight, inner.hidden[0].weight):
                tensor.mul_(2)
        assert_same(frozen(x), before)
        frozen.load_state_dict(frozen.state_dict())
        assert_same(frozen(x), before)

    def test_a_buffer_may_be_called_as_constants_are(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)
                self.register_buffer("_constant_0", torch.ones(8))

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x) + self._constant_0 + outside

        model, x, outside = Named(), torch.randn(3, 8), torch.full((8,), 2.0)
        with torch.autocast("cpu", BF16):
            expected = model(x)
        assert_same(fxamp.convert(model, dtype=BF16)(x), expected)

    def test_a_value_that_came_with_a_hook_is_followed_back(self) -> None:
        amp, x = fxamp.convert(nn.Sequential(Extra(), nn.Linear(8, 8)), dtype=BF16), torch.randn(3, 8)
        before, state = amp(x), copy.deepcopy(amp.state_dict())
        amp.get_submodule("0").scale = 5.0
        amp.get_submodule("1").register_forward_hook(lambda module, args, output: output * 1)
        assert not torch.equal(amp(x), before), "traced anew"
        amp.load_state_dict(state)
        assert_same(amp(x), before)
