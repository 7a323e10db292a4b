"""Models that branch on shapes: example inputs decide, and the graph checks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn

import fxamp
from fxamp.capture.facts import UNTOLD, Facts
from fxamp.plan.flow import tensors_in
from tests.helpers import assert_same, check_against_autocast, run
from tests.oracle import cuda_rules

BF16 = torch.bfloat16


def rules(amp: fxamp.AmpModule) -> list[tuple[str, str]]:
    return [(decision.op, decision.rule) for decision in amp.plan if decision.rule]


def same_as_autocast(model: Callable[..., Any], *args: Any, device_type: str = "cpu") -> fxamp.AmpModule:
    amp = fxamp.convert(model, dtype=BF16, device_type=device_type, example_inputs=args)
    assert_same(run(amp, args, {}, torch.enable_grad()), run(model, args, {}, torch.autocast("cpu", BF16)))
    return amp


class Shapes(nn.Module):
    """Asks for dimensions in every way: none fixes a size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = x.unsqueeze(0)
        *batch, width = x.shape
        y = self.linear(x).reshape(*batch, 2, width // 2)
        y = y.reshape(*y.shape[:-2], width)
        if y.ndim in {3, 4} and len(y.shape) < 5:
            y = y.permute(*reversed(range(y.ndim)))
        match y.layout:
            case torch.strided:
                y = y * 2
        kinds = {torch.float64: 2.0, torch.float32: 3.0}
        return y * kinds[x.dtype] if x.is_floating_point() else y


def test_a_branch_on_dimensions_leaves_sizes_free() -> None:
    model = Shapes()
    amp = same_as_autocast(model, torch.randn(2, 5, 4))
    for shape in ((2, 5, 4), (7, 3, 4), (1, 1, 4)):
        x = torch.randn(shape)
        with torch.autocast("cpu", BF16):
            expected = model(x)
        assert_same(amp(x), expected)


def test_a_call_of_other_dimensions_has_another_graph() -> None:
    model = Shapes()
    amp = fxamp.convert(model, dtype=BF16, example_inputs=(torch.randn(2, 5, 4),))
    for shape in ((5, 4), (2, 5, 4), (3, 4)):
        x = torch.randn(shape)
        with torch.autocast("cpu", BF16):
            expected = model(x)
        assert_same(amp(x), expected)


class Counting(nn.Module):
    """Stays a call: what a graph of it would forget."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + 1


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counting, self.fc = Counting(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.counting(x)
        return y * 2 if self.fc(y).dim() == 3 else y


def test_a_shape_that_only_the_graph_knows_is_an_error_with_the_line() -> None:
    amp = fxamp.convert(Counted(), dtype=BF16, example_inputs=(torch.randn(5, 2, 4),))
    with pytest.raises(fxamp.CaptureError) as raised:
        amp(torch.randn(5, 4))
    text = str(raised.value)
    assert "at `return y * 2 if self.fc(y).dim() == 3 else y` (test_example_inputs.py:" in text
    assert text.endswith("the graph was made for True, found False\n\nhint: convert with example_inputs of this kind")


def test_without_example_inputs_the_same_model_is_refused() -> None:
    with pytest.raises(fxamp.CaptureError, match=r"the branch `if x.dim\(\) == 2` depends on a tensor value"):
        fxamp.convert(Shapes())


def loops(x: Tensor) -> Tensor:
    y = x @ x.transpose(-1, -2)
    for i in range(x.shape[1]):
        y = y + y[:, i : i + 1]
    for row in y:
        y = y + row.exp().mean()
    if y.shape[0] > 1:
        y = y[: int(y.shape[0] * 0.5)]
    return y.reshape(int(np.prod(y.shape))) * x.new_ones(()).expand(y.numel())


def test_sizes_are_fixed_only_where_the_model_cannot_be_traced_without() -> None:
    amp = same_as_autocast(loops, torch.randn(2, 3, 4))
    x = torch.randn(2, 3, 9)  # a size that the program does not ask for
    with torch.autocast("cpu", BF16):
        expected = loops(x)
    assert_same(amp(x), expected)
    for x in (torch.randn(2, 5, 4), torch.randn(2, 3, 4), torch.randn(1, 5, 4)):
        with torch.autocast("cpu", BF16):
            expected = loops(x)
        assert_same(amp(x), expected)


def on_dtype(x: Tensor) -> Tensor:
    y = x @ x
    with torch.autocast("cpu", enabled=False):
        z = y.float() @ x
    return (y if y.dtype == torch.float32 else y * 2) + (z if z.dtype == torch.float32 else z * 2)


def test_a_dtype_under_the_rules_of_a_gpu_is_told() -> None:
    def on_dtypes(x: Tensor, index: Tensor) -> Tensor:
        values = (x @ x, (x @ x).softmax(-1), (x @ x)[index].pow(2), torch.einsum("ij,jk->ik", x, x), x.cumsum(0) + x)
        values = (*values, torch.addcmul(x @ x, x, x), F.layer_norm(x @ x, (3,)), F.embedding(index, x) @ x)
        return sum(value * (2 if value.dtype == BF16 else 3) for value in values)

    inputs = torch.randn(3, 3), torch.tensor([2, 0, 1])
    amp = fxamp.convert(on_dtypes, dtype=BF16, device_type="cuda", example_inputs=inputs)
    with cuda_rules(), torch.autocast("cpu", BF16):
        expected = on_dtypes(*inputs)
    with cuda_rules():
        assert_same(amp(*inputs), expected)


class OnDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        z = y[:, None].transpose(0, 1).contiguous().softmax(-1)
        return (y if y.dtype == torch.float32 else y * 2) + (z if z.dtype == torch.float32 else z * 2)


def test_dtypes_under_the_rules_of_a_gpu_are_told() -> None:
    check_against_autocast(OnDtypes(), torch.randn(3, 4), examples=True)
    with cuda_rules():
        amp = check_against_autocast(OnDtypes(), torch.randn(3, 4), examples=True, rules="cuda")
    assert [d.op for d in amp.plan].count("operator.mul") == 1


def test_facts_are_found_by_plain_builtins() -> None:
    def complex_numbers(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy((x + 1j * x.t()).abs(), target)  # its body is traced with another int and float

    torch._subclasses.FakeTensorMode.cache_clear()
    amp = fxamp.convert(
        complex_numbers, dtype=BF16, device_type="cuda", example_inputs=(torch.randn(3, 3), torch.tensor([0, 1, 2]))
    )
    assert amp.report().totals["opaque"] == 0


def test_data_of_what_is_computed_is_not_told() -> None:
    def on_data(x: Tensor) -> Tensor:
        return x if (x @ x).sum() > 0 else -x

    for device_type in ("cpu", "cuda"):
        with pytest.raises(fxamp.CaptureError, match="depends on a tensor value"):
            fxamp.convert(on_data, device_type=device_type, example_inputs=(torch.randn(3, 3),))


# Of what these give back only data tells one size.
PICKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda x, mask: x[mask],
    "columns": lambda x, mask: x[:, mask],
    "nonzero": lambda x, mask: x[mask.nonzero()[:, 0]],
    "where": lambda x, mask: x[torch.where(mask)[0]],
    "unique": lambda x, mask: x[torch.unique(mask.long())],
    "repeat": lambda x, mask: x.repeat_interleave(mask.long() + 1, 0),
    "select": lambda x, mask: torch.masked_select(x, mask).view(-1, 1) * x[:1],
}


class Picks(nn.Module):
    def __init__(self, pick: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.pick = nn.Linear(4, 4), pick

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.pick(self.fc(x), mask)
        z = torch.cat([y, y]) * 2
        z = z.exp() if z.layout == torch.strided and isinstance(z, Tensor) and z.dim() == 2 else z
        z = z + 1 if z.dtype == BF16 else z - 1
        return (z.t() @ z).relu() if x.dtype == torch.float32 else z


MASK = torch.tensor([True, False, True, True])


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("rules", ["cpu", "cuda"])
def test_all_but_a_size_is_known_of_what_data_cuts_out(pick: str, rules: str) -> None:
    model, x = Picks(PICKS[pick]), torch.randn(4, 4)
    amp = fxamp.convert(model, dtype=BF16, device_type=rules, example_inputs=(x, MASK))
    assert amp.report().totals["opaque"] == (pick == "unique")  # itself
    assert all(value.dtype is not None for decision in amp.plan for value in tensors_in(decision.output))
    with cuda_rules() if rules == "cuda" else nullcontext():
        for mask in (MASK, torch.tensor([True, True, True, True]), torch.tensor([False, True, False, False])):
            expected = run(model, (x, mask), {}, torch.autocast("cpu", BF16))
            assert_same(run(amp, (x, mask), {}, nullcontext()), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y * 2 if y.shape[0] > 2 else y,
        lambda y: y * 2 if len(y) > 2 else y,
        lambda y: sum(row for row in y),
        lambda y: y * len(range(y.shape[0])),
        lambda y: y.reshape(int(y.shape[0]) // 1, -1) if y.shape == (3, 4) else y,
    ],
)
def test_a_size_that_only_data_tells_is_told_nobody(use: Any) -> None:
    class Uses(Picks):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return use(self.fc(x)[mask])

    with pytest.raises(
        fxamp.CaptureError, match=r"depends on a tensor|iterates over a tensor|interpreted as an integer"
    ):
        fxamp.convert(Uses(PICKS["index"]), example_inputs=(torch.randn(4, 4), MASK))


def test_the_dtype_of_an_input_is_told_for_every_device() -> None:
    def summed(x: Tensor) -> Tensor:
        return torch.masked.sum(x, -1, mask=x > 0)

    for x in (torch.randn(3, 3), torch.randn(3, 3).bfloat16()):
        amp = fxamp.convert(summed, dtype=BF16, device_type="cuda", example_inputs=(x,))
        assert amp(x).dtype == x.dtype


def test_a_dtype_that_is_read_is_the_one_it_has_under_autocast() -> None:
    amp = same_as_autocast(on_dtype, torch.randn(3, 3))
    assert [d.op for d in amp.plan].count("operator.mul") == 1


def test_a_set_or_a_dict_finds_a_traced_dtype_by_its_value() -> None:
    def scaled(x: Tensor) -> Tensor:
        return x * 2 if x.dtype in {torch.float32, torch.float64} else x

    assert torch.equal(fxamp.convert(scaled, example_inputs=(torch.ones(2),))(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(fxamp.CaptureError, match="cannot be interpreted"):
        fxamp.convert(scaled)


def test_an_optional_argument_is_traced_with_the_values_of_its_first_call() -> None:
    def masked(x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and mask.dim() == 1:
            mask = mask[:, None]
        return x @ x if mask is None else (x @ x) * mask

    amp = fxamp.convert(masked, dtype=BF16)
    x, mask = torch.randn(3, 3), torch.tensor([1.0, 0.0, 2.0])
    with torch.autocast("cpu", BF16):
        expected = masked(x), masked(x, mask)
    assert_same((amp(x), amp(x, mask)), expected)


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "masked": (lambda x, m: torch.masked.softmax(x @ x, -1, mask=m), (torch.randn(4, 4), torch.eye(4).bool())),
    "area": (lambda x: F.interpolate(x, scale_factor=0.5, mode="area"), (torch.randn(2, 3, 8, 8),)),
    "response norm": (lambda x: F.local_response_norm(x, 3), (torch.randn(2, 5, 8),)),
    "gaussian": (lambda x, v: F.gaussian_nll_loss(x, x * 0.5, v), (torch.randn(4, 3), torch.rand(4, 3) + 0.1)),
    "inner": (lambda x, y: torch.inner(x, y), (torch.randn(3, 4), torch.randn(5, 4))),
    "tensordot": (lambda x, y: torch.tensordot(x, y, 2), (torch.randn(2, 3, 4), torch.randn(3, 4, 2))),
    "attention": (
        lambda x, w: F.multi_head_attention_forward(x, x, x, 4, 2, w, None, None, None, False, 0.0, w[:4], None),
        (torch.randn(5, 2, 4), torch.randn(12, 4)),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_torch_that_ask_for_shapes_are_seen_into(name: str) -> None:
    function, args = FUNCTIONS[name]
    args = tuple(arg.requires_grad_() if arg.is_floating_point() else arg for arg in args)
    amp = same_as_autocast(lambda *inputs: function(*inputs), *args)
    assert "opaque" not in dict(rules(amp)).values()


def test_cross_entropy_on_the_gpu_is_its_two_parts_with_the_target_known() -> None:
    model, args = nn.Linear(4, 3), (torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    amp = fxamp.convert(model, F.cross_entropy, dtype=BF16, device_type="cuda", example_inputs=args)
    assert rules(amp) == [("F.linear", "lower"), ("torch.log_softmax", "follow"), ("F.nll_loss_nd", "fp32")]
    assert amp.plan["log_softmax"].runs_in == BF16
    with pytest.raises(fxamp.CaptureError, match="goes another way"):
        amp(torch.randn(5, 4), torch.rand(5, 3))  # probabilities are weighted, not looked up
    on_cpu = amp.replan(fxamp.Policy.autocast("cpu", BF16))
    assert rules(on_cpu) == [("F.linear", "lower"), ("F.cross_entropy", "fp32")]
    without = fxamp.convert(model, F.cross_entropy, dtype=BF16, device_type="cuda")
    assert rules(without)[1] == ("F.cross_entropy", "opaque")


def test_what_runs_for_a_fact_leaves_no_trace() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = nn.BatchNorm1d(4), 0

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                seeded = self.norm(x)
            return seeded if seeded.dim() == 2 else x

    model = Writes()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(3, 4)
    state, grad_mode = torch.get_rng_state(), torch.is_grad_enabled()
    fxamp.convert(model, example_inputs=(x,))
    assert_same(dict(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() is grad_mode


def test_facts_are_those_of_the_examples() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    nodes = {
        "dim": graph.call_method("dim", (x,)),
        "size": graph.call_method("size", (x, 0)),
        "dtype": graph.call_function(getattr, (x, "dtype")),
        "sum": graph.call_method("sum", (x,)),
        "parts": graph.call_method("split", (x, 2)),
    }
    ranks = Facts([torch.zeros(4, 3)], lambda path: None, sizes=False)
    assert [ranks.told(nodes[name]) for name in ("dim", "dtype")] == [2, torch.float32]
    assert [ranks.told(nodes[name]) for name in ("size", "sum")] == [UNTOLD, UNTOLD]
    assert (ranks.kind(nodes["sum"]), ranks.length(nodes["parts"])) == (Tensor, None)
    sizes = Facts([torch.zeros(4, 3)], lambda path: None, sizes=True)
    assert (sizes.told(nodes["size"]), sizes.length(nodes["parts"]), sizes.length(x)) == (4, 2, 4)


class Gaussian(nn.Module):
    """A variational layer, as torch.distributions spells it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.scale = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        posterior = D.Normal(self.mean(x), F.softplus(self.scale(x)))
        z = posterior.rsample()
        prior = D.Normal(torch.zeros_like(z), torch.ones_like(z))
        return z, posterior.log_prob(z).sum(-1), D.kl_divergence(posterior, prior), posterior.entropy()


class Choices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        choice = D.Categorical(logits=self.fc(x))
        action = choice.sample()
        coin = D.Independent(D.Bernoulli(logits=self.fc(x)), 1)
        squashed = D.TransformedDistribution(D.Normal(self.fc(x), 1.0), [D.TanhTransform(cache_size=1)])
        return action, choice.log_prob(action), choice.entropy(), coin.log_prob(torch.ones(3, 4)), squashed.rsample()


@pytest.mark.parametrize("model", [Gaussian, Choices])
def test_distributions_are_traced_into(model: Any) -> None:
    check_against_autocast(model(), torch.randn(3, 8), examples=True)


def test_a_distribution_checks_its_arguments_at_every_call() -> None:
    def scored(x: Tensor, scale: Tensor) -> Tensor:
        return D.Normal(x, scale, validate_args=True).log_prob(x)  # torch.compile switches off the default

    amp = fxamp.convert(scored, example_inputs=(torch.zeros(3), torch.ones(3)))
    with pytest.raises(AssertionError, match="the model requires"):
        amp(torch.zeros(3), -torch.ones(3))


class Graded(nn.Module):
    """Goes by what has gradients."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.use = nn.Linear(4, 4), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def computed(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.fc(x)
    return y * 2 if y.requires_grad or x.requires_grad else y * 3


def without(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.fc(x)
    z: Tensor = m.fc(y)
    return (z + 1 if z.requires_grad else z) * (3 if y.requires_grad else 2)


def detached(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.fc(x).detach()
    return y * 2 if y.requires_grad else m.fc(y)


@pytest.mark.parametrize("use", [computed, without, detached])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_what_has_gradients_is_told_for_the_grad_mode(use: Any, mode: Any) -> None:
    model, x = Graded(use), torch.randn(3, 4, requires_grad=True)
    with mode():
        amp = fxamp.convert(model, dtype=BF16, example_inputs=(x,))
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            found = amp(x)
            with torch.autocast("cpu", BF16):
                assert_same(found, model(x))
    assert_same(run(amp, (x,), {}, nullcontext()), run(model, (x,), {}, torch.autocast("cpu", BF16)))


def test_weights_that_lose_their_gradients_are_an_error_with_the_line() -> None:
    x = torch.ones(2, 4)
    amp = fxamp.convert(Graded(computed), example_inputs=(x,))
    amp.requires_grad_(False)
    with pytest.raises(fxamp.CaptureError, match="the graph was made for True, found False"):
        amp(x)


def test_an_input_with_gradients_takes_another_graph() -> None:
    model, x = Graded(lambda m, x: m.fc(x) * (2 if x.requires_grad else 3)), torch.randn(3, 4)
    amp = fxamp.convert(model, dtype=BF16, example_inputs=(x,))
    for inputs in (x, x.clone().requires_grad_(), x):
        assert_same(run(amp, (inputs,), {}, nullcontext()), run(model, (inputs,), {}, torch.autocast("cpu", BF16)))
