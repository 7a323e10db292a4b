"""What symbolic tracing silently gets wrong in other tools: kept right, or refused, never frozen."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxamp
from tests.helpers import assert_same, check_against_autocast


def widen(x: Any) -> Any:
    """A helper in which a type is asked for."""
    return x if isinstance(x, torch.Tensor) else x[0]


class Net(nn.Module):
    """A module around a function of (module, inputs), with a linear layer and a weight at hand."""

    def __init__(self, function: Any, **attributes: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def rows() -> Tensor:
    return torch.randn(4, 8, requires_grad=True)


# -- dtypes that are known only through something else ---------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.mm(x.max(0, keepdim=True).values, m.w),
        lambda m, x: x.topk(8).values @ m.w,
        lambda m, x: ((x > 0) * 0.5) @ m.w,
        lambda m, x: torch.where(x > 0, 1.0, 0.0) @ m.w,
        lambda m, x: torch.mm(torch.mm(x, m.w) * m.scale.expand_as(x), m.w),
        lambda m, x: torch.mm(torch.mm(x, m.w) * m.scale.repeat(4, 8), m.w),
        lambda m, x: torch.mm(m.fc(x) * F.mse_loss(m.fc(x), x), m.w),
        lambda m, x: torch.inner(x, m.w),
        lambda m, x: torch.fft.fft(x).real @ m.w,
    ],
)
def test_a_dtype_that_takes_thought(function: Any) -> None:
    check_against_autocast(Net(function, scale=nn.Parameter(torch.tensor(1.5))), rows())


# -- leaves of autograd that reach several casts ---------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.fc(torch.flatten(x, 1)) + torch.mm(x, m.w),
        lambda m, x: x @ m.w.float() + x @ m.w + (x * 2) @ m.w.conj(),
        lambda m, x: (x * 2) @ torch.atleast_2d(m.w) + x @ m.w,
        lambda m, x: torch.einsum("ij,jk->ik", x, m.w) + x @ m.w + m.fc(x),
        lambda m, x: m.fc(x.clone().detach().requires_grad_()) @ m.w + x @ m.w,
    ],
)
def test_a_leaf_on_several_ways(function: Any) -> None:
    check_against_autocast(Net(function), rows())


def test_a_leaf_in_a_container_and_twice_as_an_argument() -> None:
    check_against_autocast(Net(lambda m, b: m.fc(b["x"]) + torch.mm(b["x"], m.w)), {"x": rows()})
    check_against_autocast(Net(lambda m, p: p[0] @ m.w + p[0] @ p[1].t() @ p[0]), (rows(), rows()))
    model = Net(lambda m, a, b: a @ m.w + b @ m.w.t())
    gradients = []
    for run in (fxamp.convert(model, dtype=torch.bfloat16), torch.autocast("cpu", torch.bfloat16)(model)):
        torch.manual_seed(0)
        x = rows()
        run(x, x).sum().backward()
        gradients.append(x.grad)
    assert_same(gradients[0], gradients[1])


# -- work on real tensors while tracing ------------------------------------------------------------------


def momentum(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        for ours, theirs in zip(m.slow.parameters(), m.fc.parameters(), strict=True):
            ours.mul_(0.9).add_(theirs, alpha=0.1)
    return m.slow(x) + m.fc(x)


def test_parameters_that_the_forward_updates() -> None:
    check_against_autocast(Net(momentum, slow=nn.Linear(8, 8).requires_grad_(False)), rows())


def test_a_weight_written_between_two_uses_is_cast_again() -> None:
    def decayed(m: Any, x: Tensor) -> Tensor:
        first = x @ m.frozen
        with torch.no_grad():
            m.frozen.mul_(0.5)
        return first + x @ m.frozen

    check_against_autocast(Net(decayed, frozen=nn.Parameter(torch.randn(8, 8), requires_grad=False)), rows())


def test_a_penalty_on_all_parameters() -> None:
    check_against_autocast(
        Net(lambda m, x: m.fc(x).float().sum() + sum(p.pow(2).sum() for p in m.parameters())), rows()
    )


@pytest.mark.parametrize(
    "draw",
    [
        lambda m: torch.multinomial(m.chances, 2),
        lambda m: torch.bernoulli(m.chances),
        lambda m: torch.normal(0.0, 1.0, size=(8,)),
        lambda m: F.dropout(m.chances),
        lambda m: m.distribution.sample(),
    ],
)
def test_random_numbers_are_drawn_at_every_call(draw: Any) -> None:
    model = Net(
        lambda m, x: m.fc(x).sum() + draw(m).float().sum(),
        chances=torch.full((8,), 0.5),
        distribution=torch.distributions.Normal(torch.zeros(8), 1.0),
    )
    torch.manual_seed(3)
    state = torch.get_rng_state()
    amp = fxamp.convert(model)
    assert torch.equal(torch.get_rng_state(), state)
    x = rows()
    assert len({amp(x).item() for _ in range(12)}) > 1


# -- Python state ----------------------------------------------------------------------------------------


def counting(m: Any, x: Tensor) -> Tensor:
    m.state["n"] += 1
    return m.fc(x) * m.state["n"]


def counting_in_a_config(m: Any, x: Tensor) -> Tensor:
    m.config.n += 1
    return m.fc(x) * m.config.n


def collecting(m: Any, x: Tensor) -> Tensor:
    m._kept.append(x.detach())
    return m.fc(x) * len(m._kept)


def remembering(m: Any, x: Tensor) -> Tensor:
    if m.hidden is None:
        m.hidden = torch.zeros_like(x)
    m.hidden = torch.tanh(m.fc(x) + m.hidden).detach()
    return m.hidden * 2 + m.fc(x)


STATEFUL = {
    "dict": (counting, lambda: {"state": {"n": 0}}),
    "config": (counting_in_a_config, lambda: {"config": types.SimpleNamespace(n=0)}),
    "list": (collecting, lambda: {"_kept": []}),
    "None at first": (remembering, lambda: {"hidden": None}),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_python_state_in_a_submodule_is_kept_by_a_call(name: str) -> None:
    function, attributes = STATEFUL[name]
    check_against_autocast(
        nn.Sequential(nn.Linear(8, 8), Net(function, **attributes())), rows(), calls=3, modes=(True,)
    )


@pytest.mark.parametrize("name", STATEFUL)
def test_python_state_of_the_model_is_refused(name: str) -> None:
    function, attributes = STATEFUL[name]
    model = Net(function, **attributes())
    with pytest.raises(fxamp.CaptureError, match="cannot trace"):
        fxamp.convert(model)
    assert vars(model).items() >= attributes().items()


@functools.lru_cache
def causal(size: int) -> Tensor:
    return torch.ones(size, size).tril()


TABLES: dict[str, Tensor] = {}


def test_caches_of_the_user_hold_no_traced_values() -> None:
    fxamp.convert(Net(lambda m, x: m.fc(x) @ causal(8)))
    assert isinstance(causal(8), Tensor)

    class Caching(Net):
        def forward(self, x: Tensor) -> Tensor:
            TABLES["arange"] = torch.arange(8.0)
            return self.fc(x) * TABLES["arange"]

    with pytest.raises(fxamp.CaptureError, match="keeps a traced value in a global or class variable"):
        fxamp.convert(Caching(None))
    assert not TABLES


# -- modules -----------------------------------------------------------------------------------------------


def test_a_train_of_the_models_own() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.bn.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.fc(x))

    amp = check_against_autocast(Frozen(), rows())
    assert not amp.train().bn.training


def test_a_method_kept_as_an_attribute_reads_the_converted_module() -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.run = self.once

        def once(self, x: Tensor) -> Tensor:
            return F.dropout(self.fc(x), 0.5, self.training)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    amp = fxamp.convert(Bound()).eval()
    x = rows()
    assert_same(amp(x), amp(x))


def test_modules_made_in_the_forward() -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    check_against_autocast(Net(lambda m, x: nn.Softmax(dim=1)(m.layers[0:2](x)), layers=layers), rows())
    check_against_autocast(
        nn.Linear(8, 8), rows(), loss=lambda o, t: nn.CrossEntropyLoss()(o, t), loss_args=(torch.tensor([1, 2, 0, 3]),)
    )


def test_a_scripted_submodule_stays_a_call() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    model = nn.Sequential(nn.Linear(8, 8), scripted)
    amp = fxamp.convert(model, dtype=torch.bfloat16)
    x = rows()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    assert_same(amp(x), expected)


def test_hooks_of_the_model_with_a_loss_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_forward_hook(lambda m, i, o: o * 2)
    with pytest.raises(fxamp.CaptureError, match="has hooks, which a loss converted with it would not see"):
        fxamp.convert(model, F.mse_loss)


# -- questions -----------------------------------------------------------------------------------------------


def test_type_questions_in_any_file() -> None:
    check_against_autocast(Net(lambda m, x: m.fc(widen(x))), rows())


def test_a_type_asked_of_an_input_that_is_another() -> None:
    model = Net(None)

    def either(x: Any) -> Tensor:
        return model.fc(x[0] if isinstance(x, tuple) else x)

    amp = fxamp.convert(either, dtype=torch.bfloat16)
    x = rows()
    assert_same(amp((x,)), amp(x))
    scaled = fxamp.convert(lambda x, a: x * (2 if isinstance(a, float) else a))
    assert_same((scaled(x, torch.tensor(3.0)), scaled(x, 3.0)), (x * 3, x * 2))


def test_a_refusal_that_the_model_catches_is_still_a_refusal() -> None:
    def guarded(x: Tensor) -> Tensor:
        try:
            return x if x.sum() > 0 else -x
        except Exception:
            return x * 0

    with pytest.raises(fxamp.CaptureError):
        fxamp.convert(guarded)


def test_numbers_that_the_code_loops_over() -> None:
    def repeated(x: Tensor, n: int = 2) -> Tensor:
        for _ in range(n):
            x = x @ x.t() @ x
        return x

    amp = fxamp.convert(repeated, dtype=torch.bfloat16)
    x = rows().detach() / 4
    with torch.autocast("cpu", torch.bfloat16):
        expected = repeated(x), repeated(x, 3)
    assert_same((amp(x), amp(x, 3)), expected)
    assert_same(amp(x, n=3), expected[1])


def test_changes_to_torch_itself_are_refused() -> None:
    def changed(x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        return x + torch.randn(8)

    with pytest.raises(fxamp.CaptureError, match="changes the default dtype, which a graph would forget"):
        fxamp.convert(changed)
    assert torch.set_default_dtype.__module__ == "torch"


def test_a_forward_seeds_torch_and_puts_its_random_numbers_back() -> None:
    def seeded(x: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            noise = torch.rand(8)
        state = torch.get_rng_state()
        other = torch.rand(8)
        torch.set_rng_state(state)
        return x * noise + other * torch.rand(8)

    amp = fxamp.convert(seeded, dtype=torch.bfloat16)
    for seed in range(2):
        torch.manual_seed(seed)
        expected, after = seeded(torch.ones(8)), torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(amp(torch.ones(8)), expected)
        assert torch.equal(torch.rand(1), after)
    assert torch.manual_seed.__module__ == "torch.random"
