"""The rows of the fast policy against the kernels: what a low dtype costs, measured on the device at hand.

A call on low inputs is compared with the same call in float32 on the same values. That is one rounding away for a
kernel that computes in float32, and many for one that adds up in the low dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from fxamp.dtypes import LOW_DTYPES, abbreviate
from fxamp.errors import PolicyError
from fxamp.policy.fast import (
    BOUNDED,
    FAST_KINDS,
    NO_LARGER,
    fast_kinds,
    fits,
    float32_arguments,
    is_choice,
    moves_only,
    rows,
    tensor_fits,
)
from fxamp.policy.operators import aten_packets, operator_rules
from fxamp.policy.spellings import aten_name
from tests.fast_samples import OWN, Roundings, roundings
from tests.samples import ERRORS, op_db, samples

pytestmark = pytest.mark.filterwarnings("ignore")
DEVICES = ("cuda", "cpu")
FORWARD = {name for name, row in rows().items() if any("_" in cell for cell in row.values())}
GROUPS = 6

# How many roundings of the largest value of a tensor its gradient may be away: pooling and padding add a few gradients
# up in the low dtype, and a norm, a softmax and a sigmoid read their own rounded result.
GRADIENT = 4.0
# Their results can be near zero though their inputs are not, and erf is less exact there: the roundings of the largest
# value count. The others are exact to one unit in the last place, each value.
NEAR_ZERO = frozenset(
    "add addcmul batch_norm erf group_norm instance_norm layer_norm lerp mean rsub sub subtract upsample_bilinear2d "
    "upsample_linear1d upsample_trilinear3d".split()
)
# The scalar that they fill in is rounded; it may round twice in a quotient by a scalar or a dropout.
FILLS = frozenset("clamp clamp_max clamp_min clip constant_pad_nd masked_fill pad threshold".split())
TWICE = frozenset("_safe_softmax div divide dropout feature_dropout native_dropout softmax true_divide".split())
# Torch has samples of groups of one value and of saturated values: there the gradient is a small difference.
OWN_ONLY = frozenset(
    "_safe_softmax batch_norm group_norm instance_norm layer_norm rms_norm sigmoid softmax tanh".split()
)
# Another name for the same operator.
ALIASES = {
    "absolute": "abs", "arccos": "acos", "arccosh": "acosh", "arcsin": "asin", "arctanh": "atanh", "clip": "clamp",
    "concat": "cat", "concatenate": "cat", "divide": "div", "multiply": "mul", "native_dropout": "dropout",
    "negative": "neg", "row_stack": "vstack", "special_expit": "sigmoid", "special_log_softmax": "log_softmax",
    "special_softmax": "softmax", "subtract": "sub", "true_divide": "div",
}  # fmt: skip


# -- the table ---------------------------------------------------------------------------------------------------


def test_every_row_is_an_operator_with_known_cells() -> None:
    cells = {
        "-",
        "fp32",
        "inside_rows",
        *(kind + end for kind in ("inside", "pointwise", "moves") for end in ("", "_forward")),
    }
    assert list(rows()) == sorted(rows())
    assert set(rows()) <= aten_packets()
    assert {cell for row in rows().values() for cell in row.values()} <= cells
    assert not [name for name in rows() if moves_only(name)], "a view has no row"


@pytest.mark.parametrize("device_type", DEVICES)
@pytest.mark.parametrize("gradients", [True, False])
def test_the_kinds(device_type: str, gradients: bool) -> None:
    kinds = fast_kinds(device_type, gradients=gradients)
    assert set(kinds.values()) == set(FAST_KINDS)
    assert kinds is fast_kinds(device_type, gradients=gradients)
    with pytest.raises(TypeError):
        kinds["relu"] = "fp32"  # type: ignore[index]
    absent = {name for name, row in rows().items() if row[device_type].endswith("_forward")}
    assert absent
    assert absent.isdisjoint(kinds) if gradients else absent <= set(kinds)


def test_a_device_without_a_column_is_refused() -> None:
    with pytest.raises(PolicyError, match="unknown device type 'tpu'"):
        fast_kinds("tpu")


@pytest.mark.parametrize("device_type", DEVICES)
def test_an_operator_that_autocast_lowers_is_no_choice(device_type: str) -> None:
    rules = operator_rules(device_type)
    assert not [
        name for name in fast_kinds(device_type, gradients=False) if rules.get(name) in ("lower", "banned")
    ] or (device_type == "cuda")


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases_have_the_row_of_their_operator(alias: str, name: str) -> None:
    assert rows()[alias] == rows()[name]


@pytest.mark.parametrize("name", "transpose reshape view expand chunk unbind flatten squeeze contiguous".split())
def test_views_are_told_by_their_schema(name: str) -> None:
    assert moves_only(name)


@pytest.mark.parametrize("name", "add relu clone to type_as view_as_complex transpose_ no_such_operator cat".split())
def test_what_is_no_view(name: str) -> None:
    assert not moves_only(name)


# -- measured ----------------------------------------------------------------------------------------------------


def rows_to_measure(device_type: str) -> list[str]:
    """The rows that claim something in this column, but for second names."""
    return [name for name, row in rows().items() if row[device_type] not in ("fp32", "-") and name not in ALIASES]


def own(name: str, device: str) -> Iterator[tuple[Callable[..., Any], Any]]:
    for function, make in OWN.get(name, ()):
        torch.manual_seed(0)
        args = make()
        yield function, (pytree.tree_map_only(Tensor, lambda t: t.to(device), args), {})


def measured(name: str, function: Callable[..., Any], call: Any, low: torch.dtype, device: str) -> Roundings:
    return roundings(function, call, low, weights=not float32_arguments(name, device))


def within(name: str, cell: str, found: Roundings) -> bool:
    """Whether a call is as exact as its row claims."""
    kind, _, lowered = cell.partition("_")
    if kind == "moves":
        value = found.value <= (0.5 if name in FILLS else 0.0)
    else:
        value = found.whole <= 1.0 and (found.value <= (1.5 if name in TWICE else 1.0) or name in NEAR_ZERO)
    return value and not found.complaint and (bool(lowered) or found.gradient <= GRADIENT)


def refuted(name: str, device: str) -> list[Any]:
    """The calls that are less exact than the row of this operator claims."""
    cell = rows()[name][device]
    return [
        (name, cell, abbreviate(low), found)
        for low in LOW_DTYPES
        for function, call in own(name, device)
        if not within(name, cell, found := measured(name, function, call, low, device))
    ]


@pytest.mark.parametrize("name", [name for name in rows_to_measure("cpu") if name in OWN])
def test_the_rows_of_a_cpu_on_large_tensors(name: str) -> None:
    assert refuted(name, "cpu") == []


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name in rows_to_measure("cuda") if name in OWN])
def test_the_rows_of_a_gpu_on_large_tensors(name: str) -> None:
    assert refuted(name, "cuda") == []


def of_op_db(group: int, device: str) -> Iterator[tuple[str, Callable[..., Any], Any]]:
    """Calls of every operator with a row, from torch's own samples."""
    wanted = set(rows_to_measure(device)) - OWN_ONLY
    for info in op_db()[group::GROUPS]:
        if torch.float32 in info.dtypes and info.supports_autograd:
            torch.manual_seed(0)
            for args, kwargs in samples(info, 24):
                name = aten_name("call_function", info.op, args, kwargs)
                if name in wanted and is_choice(args, kwargs):
                    yield name, info.op, pytree.tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))


def refuted_by_op_db(group: int, device: str) -> list[Any]:
    found = []
    for name, function, call in of_op_db(group, device):
        for low in LOW_DTYPES:
            try:
                result = measured(name, function, call, low, device)
            except ERRORS as error:
                found.append((name, str(error)))
                continue
            if not within(name, rows()[name][device], result):
                found.append((name, rows()[name][device], abbreviate(low), result))
    return found


@pytest.mark.parametrize("group", range(GROUPS))
def test_the_rows_of_a_cpu_on_torchs_samples(group: int) -> None:
    assert refuted_by_op_db(group, "cpu") == []


@pytest.mark.cuda
@pytest.mark.parametrize("group", range(GROUPS))
def test_the_rows_of_a_gpu_on_torchs_samples(group: int) -> None:
    assert refuted_by_op_db(group, "cuda") == []


def test_every_row_is_measured() -> None:
    sampled = {name for group in range(GROUPS) for name, _, _ in of_op_db(group, "cpu")}
    assert set(rows_to_measure("cpu")) - sampled - set(OWN) == set()
    assert set(OWN) >= FORWARD, "what adds up in the low dtype shows on large tensors only"


@pytest.mark.parametrize("name", [name for name, row in rows().items() if "_" in row["cpu"]])
def test_a_gradient_said_to_add_up_in_the_low_dtype_does(name: str) -> None:
    found = [measured(name, f, call, low, "cpu").gradient for low in LOW_DTYPES for f, call in own(name, "cpu")]
    assert max(found) > GRADIENT


@pytest.mark.parametrize("low", LOW_DTYPES, ids=abbreviate)
def test_a_sum_in_the_low_dtype_would_be_seen(low: torch.dtype) -> None:
    """The check can fail: a mean that adds up in the low dtype is many roundings away."""

    def mean(x: Tensor) -> Tensor:
        total = x[:, 0]
        for column in x.unbind(1)[1:]:
            total = total + column
        return total / x.shape[1]

    function, call = next(own("mean", "cpu"))
    assert within("mean", "inside", roundings(function, call, low))
    assert not within("mean", "inside", roundings(mean, call, low))


@pytest.mark.parametrize("low", LOW_DTYPES, ids=abbreviate)
@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "batch_norm", "instance_norm"])
def test_weights_may_stay_float32(name: str, low: torch.dtype) -> None:
    assert float32_arguments(name, "cpu")
    assert not float32_arguments("rms_norm", "cpu"), "it warns"
    function, ((x, *weights), _) = next(own(name, "cpu"))
    weights = [weight.requires_grad_() for weight in weights]
    out = function(x.to(low).requires_grad_(), *weights)
    out.sum().backward()
    assert out.dtype == low
    assert {weight.grad.dtype for weight in weights} == {torch.float32}  # type: ignore[union-attr]


# -- ranges ------------------------------------------------------------------------------------------------------

HUGE = torch.tensor([3e38, -3e38, 1e30, -7e4, 0.0, 1.0, 1e-30, -1e-30])


def called(name: str, x: Tensor) -> Tensor:
    ones, zeros = torch.ones(x.shape[-1]), torch.zeros(x.shape[-1])
    special: dict[str, Callable[[], Tensor]] = {
        "_safe_softmax": lambda: torch.ops.aten._safe_softmax(x, -1),
        "arctan2": lambda: torch.atan2(x, x.flip(-1)),
        "atan2": lambda: torch.atan2(x, x.flip(-1)),
        "batch_norm": lambda: F.batch_norm(x, None, None, training=True),
        "cosine_similarity": lambda: F.cosine_similarity(x, x.flip(-1)),
        "group_norm": lambda: F.group_norm(x, 2),
        "hardsigmoid": lambda: F.hardsigmoid(x),
        "instance_norm": lambda: F.instance_norm(x[None]),
        "layer_norm": lambda: F.layer_norm(x, x.shape[-1:], ones, zeros),
        "relu6": lambda: F.relu6(x),
        "rms_norm": lambda: F.rms_norm(x, x.shape[-1:]),
        "softmax": lambda: x.softmax(-1),
        "special_softmax": lambda: torch.special.softmax(x, -1),
    }
    function = getattr(torch, name, None) or getattr(torch.special, name.removeprefix("special_"), None)
    return special[name]() if name in special else function(x)  # type: ignore[misc]


@pytest.mark.parametrize("name", sorted(BOUNDED))
def test_bounded_results_are_in_the_range_of_float16(name: str) -> None:
    for scale in (1.0, 1e-20, 1e-35):
        out = called(name, torch.stack([HUGE * scale, HUGE.roll(3) * scale]))
        assert bool((out.nan_to_num(0.0).abs() <= torch.finfo(torch.float16).max).all())


@pytest.mark.parametrize("name", sorted(NO_LARGER & set(OWN)))
def test_results_are_no_larger_than_the_inputs(name: str) -> None:
    for function, (args, _) in own(name, "cpu"):
        scaled = [arg * 1e4 if isinstance(arg, Tensor) else arg for arg in args]
        largest = max([1e4, *(float(arg.abs().max()) for arg in scaled if isinstance(arg, Tensor))])  # 1e4: fills
        assert float(function(*scaled).abs().max()) <= largest * (1 + 1e-6)


def test_the_facts_about_ranges_are_of_operators() -> None:
    assert aten_packets() >= BOUNDED | NO_LARGER
    assert len(NO_LARGER & set(OWN)) >= 30


@pytest.mark.parametrize(
    ("number", "in_half", "in_bfloat"),
    [
        (0, True, True), (1, True, True), (True, True, True), (-0.5, True, True), (65504, True, True),
        (65519.9, True, True), (65520, False, True), (-1e9, False, True), (1e-12, False, True), (6.2e-5, True, True),
        (1e-6, False, True), (torch.finfo(torch.float32).min, False, False),
        (torch.finfo(torch.float16).min, True, True),

        (3.38e38, False, True), (1e-38, False, False), (float("-inf"), True, True), (float("nan"), True, True),
        (10**400, False, False), (1e300, False, False), (1j, True, True), (1 + 1e9j, False, True),
    ],
)  # fmt: skip
def test_numbers_that_keep_their_meaning(number: complex, in_half: bool, in_bfloat: bool) -> None:
    assert fits(number, torch.float16) is in_half
    assert fits(number, torch.bfloat16) is in_bfloat


@pytest.mark.parametrize(
    ("tensor", "in_half", "in_bfloat"),
    [
        (torch.zeros(3), True, True),
        (torch.tensor([]), True, True),
        (torch.tensor([True, False]), True, True),
        (torch.tensor([0, 70000]), False, True),
        (torch.tensor([0.0, -torch.inf]), True, True),
        (torch.tensor([0.0, torch.finfo(torch.float32).min]), False, False),
        (torch.tensor([0.0, -1e9]), False, True),
        (torch.tensor([1.0, 1e-9, torch.nan]), True, True),
        (torch.tensor(1e-9), False, True),
        (torch.full((2, 2), torch.inf), True, True),
        (torch.tensor([1e9 + 1j]), False, True),
        (torch.empty(2, device="meta"), False, False),
    ],
)
def test_constants_that_keep_their_meaning(tensor: Tensor, in_half: bool, in_bfloat: bool) -> None:
    assert tensor_fits(tensor, torch.float16) is in_half
    assert tensor_fits(tensor, torch.bfloat16) is in_bfloat


def test_of_a_fake_tensor_nothing_is_known() -> None:
    with FakeTensorMode():
        assert not tensor_fits(torch.zeros(2), torch.bfloat16)
