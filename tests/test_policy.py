"""A policy is a value, and which of its rules wins where."""

from __future__ import annotations

import dataclasses
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxamp
from fxamp import Policy
from fxamp.policy import POLICY_NAMES, RULES
from tests.helpers import assert_same

AUTOCAST = Policy.autocast("cpu", torch.bfloat16)


def rulings(model: Callable[..., Any], policy: Policy = AUTOCAST) -> dict[str, tuple[str, str]]:
    """Node name to rule and reason, for the nodes that have a rule."""
    plan = fxamp.convert(model, policy=policy).plan
    return {d.name: (d.rule, d.reason) for d in plan if d.rule}


# -- a value -------------------------------------------------------------------------------------------


class TestValue:
    def test_it_is_frozen(self) -> None:
        for field in dataclasses.fields(Policy):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(AUTOCAST, field.name, "fast")

    def test_equal_by_content_and_hashable(self) -> None:
        one = AUTOCAST.with_ops({torch.exp: "lower"}).with_modules({"head": "fp32"})
        other = Policy.autocast("cpu", torch.bfloat16).with_modules({"head": "fp32"}).with_ops({"exp": "lower"})
        assert one == other
        assert hash(one) == hash(other)
        assert len({one, other, AUTOCAST, Policy.full(), Policy.fast(), Policy.fast()}) == 4

    @pytest.mark.parametrize(
        "changed",
        [
            Policy.fast("cpu", torch.bfloat16),
            Policy.autocast("cuda", torch.bfloat16),
            Policy.autocast("cpu", torch.float16),
            Policy.autocast("cpu"),
            AUTOCAST.with_ops({"exp": "follow"}),
            AUTOCAST.with_modules({"exp": "follow"}),
        ],
    )
    def test_every_field_counts(self, changed: Policy) -> None:
        assert changed != AUTOCAST

    def test_the_order_of_overrides_does_not_matter(self) -> None:
        ops = {"exp": "lower", "log": "fp32", "add": "promote"}
        modules = {"b": "lower", "a": "fp32"}
        backwards = dict(reversed(ops.items())), dict(reversed(modules.items()))
        assert AUTOCAST.with_ops(ops).with_modules(modules) == AUTOCAST.with_ops(backwards[0]).with_modules(
            backwards[1]
        )

    def test_overrides_give_copies_and_add_up(self) -> None:
        one = AUTOCAST.with_ops({"exp": "lower"})
        two = one.with_ops({"log": "fp32"}).with_modules({"head": "follow"})
        three = two.with_ops({"exp": "fp32"}).with_modules({"head": "fp32", "tail": "lower"})
        assert (AUTOCAST.ops, AUTOCAST.modules) == ((), ())
        assert (one.ops, one.modules) == ((("exp", "lower"),), ())
        assert (two.ops, two.modules) == ((("exp", "lower"), ("log", "fp32")), (("head", "follow"),))
        assert three.ops == (("exp", "fp32"), ("log", "fp32"))
        assert three.modules == (("head", "fp32"), ("tail", "lower"))

    def test_nothing_to_override_is_the_same_policy(self) -> None:
        assert AUTOCAST.with_ops({}).with_modules({}) == AUTOCAST

    def test_it_pickles(self) -> None:
        policy = AUTOCAST.with_ops({torch.exp: "lower"}).with_modules({"head": "fp32"})
        assert pickle.loads(pickle.dumps(policy)) == policy

    @pytest.mark.parametrize(
        ("policy", "text"),
        [
            (Policy.full(), "full"),
            (Policy.autocast(), "autocast"),
            (Policy.fast("cuda"), "fast/cuda"),
            (Policy.autocast(dtype=torch.float16), "autocast f16"),
            (AUTOCAST, "autocast/cpu bf16"),
            (
                AUTOCAST.with_ops({torch.softmax: "fp32", "aten::exp": "follow"}),
                "autocast/cpu bf16, ops: exp=follow softmax=fp32",
            ),
            (
                Policy.fast("cuda", torch.float16).with_ops({"mm": "fp32"}).with_modules({"b.*.norm": "follow"}),
                "fast/cuda f16, ops: mm=fp32, modules: b.*.norm=follow",
            ),
        ],
    )
    def test_it_prints_what_it_says(self, policy: Policy, text: str) -> None:
        assert str(policy) == text

    def test_the_three_names_are_the_three_constructors(self) -> None:
        made = (Policy.autocast(), Policy.fast(), Policy.full())
        assert tuple(policy.name for policy in made) == POLICY_NAMES
        assert tuple(map(Policy.of, POLICY_NAMES)) == made
        assert Policy.of(AUTOCAST) is AUTOCAST


# -- device type and dtype -----------------------------------------------------------------------------


class TestResolving:
    @pytest.mark.parametrize("device_type", ["cuda", "cpu"])
    def test_the_default_dtype_is_what_torch_says(self, device_type: str) -> None:
        policy = fxamp.convert(nn.Linear(2, 2), device_type=device_type).policy
        assert policy.dtype == torch.get_autocast_dtype(device_type)
        assert policy.device_type == device_type

    def test_the_default_dtype_is_read_at_conversion(self) -> None:
        before = torch.get_autocast_dtype("cpu")
        try:
            torch.set_autocast_dtype("cpu", torch.float16)
            assert fxamp.convert(nn.Linear(2, 2)).policy.dtype == torch.float16
        finally:
            torch.set_autocast_dtype("cpu", before)

    def test_the_default_device_type_is_where_the_model_is(self) -> None:
        assert fxamp.convert(nn.Linear(2, 2)).policy.device_type == "cpu"
        assert fxamp.convert(lambda x: x + x).policy.device_type == "cpu"

    @pytest.mark.parametrize("name", POLICY_NAMES)
    def test_what_is_given_beside_a_name_fills_it_in(self, name: str) -> None:
        policy = fxamp.convert(nn.Linear(2, 2), policy=name, device_type="cuda", dtype=torch.float16).policy
        assert policy == Policy(name, "cuda", torch.float16)

    def test_the_policy_alone_says_it_all(self) -> None:
        policy = Policy.autocast("cuda", torch.float16)
        assert fxamp.convert(nn.Linear(2, 2), policy=policy).policy == policy

    def test_saying_it_twice_is_no_contradiction(self) -> None:
        policy = Policy.autocast("cuda", torch.float16)
        amp = fxamp.convert(nn.Linear(2, 2), policy=policy, device_type="cuda", dtype=torch.float16)
        assert amp.policy == policy

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"device_type": "cpu"},
                "device_type is cpu, but the policy says cuda\n\nhint: give device_type only once",
            ),
            (
                {"dtype": torch.bfloat16},
                "dtype is torch.bfloat16, but the policy says torch.float16\n\nhint: give dtype only once",
            ),
        ],
    )
    def test_a_contradiction_is_an_error(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(fxamp.PolicyError) as raised:
            fxamp.convert(nn.Linear(2, 2), policy=Policy.autocast("cuda", torch.float16), **options)
        assert str(raised.value) == message

    def test_replanning_takes_device_type_and_dtype_of_the_new_policy(self) -> None:
        amp = fxamp.convert(nn.Linear(2, 2), device_type="cpu", dtype=torch.bfloat16)
        assert amp.replan("fast").policy == Policy.fast("cpu", torch.bfloat16)
        assert amp.replan(Policy.autocast("cuda", torch.float16)).policy == Policy.autocast("cuda", torch.float16)
        assert amp.replan(Policy.autocast(dtype=torch.float16)).policy == Policy.autocast("cpu", torch.float16)


# -- spellings -----------------------------------------------------------------------------------------


def applied(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


SOFTMAX = [
    torch.softmax,
    torch.Tensor.softmax,
    F.softmax,
    torch.ops.aten.softmax,
    torch.ops.aten.softmax.int,
    "torch.softmax",
    "Tensor.softmax",
    "torch.Tensor.softmax",
    "F.softmax",
    "torch.nn.functional.softmax",
    "torch.ops.aten.softmax",
    "torch.ops.aten.softmax.int",
    "aten::softmax",
    "aten::softmax.int",
    "softmax",
    "softmax.int",
]


@pytest.mark.parametrize("key", SOFTMAX, ids=lambda key: getattr(key, "__name__", key))
def test_every_spelling_of_an_operator_is_one_override(key: Any) -> None:
    policy = AUTOCAST.with_ops({key: "fp32"})
    assert policy == AUTOCAST.with_ops({"aten::softmax": "fp32"})
    assert rulings(applied, policy) == {"softmax": ("fp32", "override 'aten::softmax'")}


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.softmax(x, -1),
        lambda x: x.softmax(-1),
        lambda x: F.softmax(x, dim=-1),
        lambda x: torch.ops.aten.softmax.int(x, -1),
        nn.Softmax(-1),
    ],
)
def test_an_override_meets_every_spelling_in_the_model(call: Callable[..., Any]) -> None:
    assert list(rulings(call, AUTOCAST.with_ops({torch.softmax: "fp32"})).values()) == [
        ("fp32", "override 'aten::softmax'")
    ]


@pytest.mark.parametrize(
    ("key", "call"),
    [
        (operator.add, lambda x: x + x),
        ("operator.add", lambda x: x.add(x)),
        (torch.Tensor.__add__, lambda x: torch.add(x, x)),
        (torch.add, lambda x: x + 1),
        (operator.matmul, lambda x, y: x.matmul(y)),
        (torch.Tensor.__matmul__, lambda x, y: x @ y),
        (F.linear, nn.Linear(2, 2)),
        (torch.conv2d, nn.Conv2d(2, 2, 1)),
        (F.conv2d, nn.Conv2d(2, 2, 1)),
        (F.scaled_dot_product_attention, lambda q: F.scaled_dot_product_attention(q, q, q)),
        (torch.special.exp2, lambda x: torch.special.exp2(x)),
        (F.max_pool2d, nn.MaxPool2d(2)),
        (operator.truediv, lambda x: x / 2),
        (torch.rsub, lambda x: 1 - x),
        (F.cross_entropy, lambda x, y: F.cross_entropy(x, y)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_keys_of_all_kinds_reach_their_operator(key: Any, call: Callable[..., Any]) -> None:
    found = rulings(call, AUTOCAST.with_ops({key: "follow"}))
    assert [reason.partition(" ")[0] for _, reason in found.values()] == ["override"]


# -- precedence ----------------------------------------------------------------------------------------


class Tree(nn.Module):
    """Modules three levels deep: ``blocks.0.inner.fc``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential() for _ in range(2))
        for block in self.blocks:
            block.inner = nn.Sequential()
            block.inner.fc = nn.Linear(4, 4)
            block.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


MODULES = {
    "linear": "blocks.0.inner.fc",
    "layer_norm": "blocks.0.norm",
    "linear_1": "blocks.1.inner.fc",
    "layer_norm_1": "blocks.1.norm",
    "linear_2": "head",
}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"head": "fp32"}, {"head": ("fp32", "head")}),
        # Everything below a module has its rule.
        (
            {"blocks.0": "fp32"},
            {"blocks.0.inner.fc": ("fp32", "blocks.0"), "blocks.0.norm": ("fp32", "blocks.0")},
        ),
        # The nearest module up the path wins.
        (
            {"blocks": "follow", "blocks.1": "fp32", "blocks.1.inner": "promote"},
            {
                "blocks.0.inner.fc": ("follow", "blocks"),
                "blocks.0.norm": ("follow", "blocks"),
                "blocks.1.inner.fc": ("promote", "blocks.1.inner"),
                "blocks.1.norm": ("fp32", "blocks.1"),
            },
        ),
        # A pattern matches across dots, and its own match is nearer than a module above.
        (
            {"blocks.*.norm": "fp32", "blocks": "follow"},
            {
                "blocks.0.inner.fc": ("follow", "blocks"),
                "blocks.0.norm": ("fp32", "blocks.*.norm"),
                "blocks.1.inner.fc": ("follow", "blocks"),
                "blocks.1.norm": ("fp32", "blocks.*.norm"),
            },
        ),
        # An exact name beats a pattern, and two patterns that agree are no contradiction.
        (
            {"*.norm": "fp32", "blocks.*.norm": "fp32", "blocks.1.norm": "follow"},
            {"blocks.0.norm": ("fp32", "*.norm"), "blocks.1.norm": ("follow", "blocks.1.norm")},
        ),
        # An exact name above does not beat a pattern below.
        ({"blocks.0": "follow", "*0.norm": "fp32"},
         {"blocks.0.inner.fc": ("follow", "blocks.0"), "blocks.0.norm": ("fp32", "*0.norm")}),
        ({"blocks.[1-9]*.fc": "fp32"}, {"blocks.1.inner.fc": ("fp32", "blocks.[1-9]*.fc")}),
        ({"bloc?s.1.norm": "lower"}, {"blocks.1.norm": ("lower", "bloc?s.1.norm")}),
    ],
    ids=str,
)  # fmt: skip
def test_which_module_override_wins(overrides: dict[str, str], expected: dict[str, tuple[str, str]]) -> None:
    found = rulings(Tree(), AUTOCAST.with_modules(overrides))
    without = rulings(Tree())
    for node, module in MODULES.items():
        rule, pattern = expected.get(module, (None, None))
        assert found[node] == ((rule, f"override '{pattern}'") if rule else without[node]), module


def test_an_exact_name_settles_what_two_patterns_disagree_about() -> None:
    patterns = {"*.norm": "fp32", "blocks.*": "lower"}
    policy = AUTOCAST.with_modules({**patterns, "blocks.0.norm": "follow", "blocks.1.norm": "fp32"})
    found = rulings(Tree(), policy)
    assert found["layer_norm"] == ("follow", "override 'blocks.0.norm'")
    assert found["layer_norm_1"] == ("fp32", "override 'blocks.1.norm'")
    with pytest.raises(fxamp.PolicyError, match=r"'blocks\.1\.norm' matches two overrides"):
        fxamp.convert(Tree(), policy=AUTOCAST.with_modules({**patterns, "blocks.0.norm": "follow"}))


class TestPrecedence:
    def test_a_module_beats_an_operator(self) -> None:
        policy = AUTOCAST.with_ops({F.linear: "follow"}).with_modules({"head": "fp32"})
        found = rulings(Tree(), policy)
        assert found["linear"] == ("follow", "override 'aten::linear'")
        assert found["linear_2"] == ("fp32", "override 'head'")

    def test_an_operator_beats_the_table(self) -> None:
        found = rulings(Tree(), AUTOCAST.with_ops({F.layer_norm: "fp32"}))
        assert found["layer_norm"] == ("fp32", "override 'aten::layer_norm'")
        assert rulings(Tree())["layer_norm"] == ("follow", "input dtype")

    def test_a_region_that_is_off_beats_an_operator(self) -> None:
        found = rulings(Protected(), AUTOCAST.with_ops({F.linear: "lower"}))
        assert found["linear"] == ("follow", "region enabled=False")
        assert found["linear_1"] == ("lower", "override 'aten::linear'")

    def test_a_module_beats_a_region_that_is_off(self) -> None:
        found = rulings(Protected(), AUTOCAST.with_modules({"inside": "lower"}))
        assert found["linear"] == ("lower", "override 'inside'")
        amp = fxamp.convert(Protected(), policy=AUTOCAST.with_modules({"inside": "lower"}))
        assert amp.plan["linear"].runs_in == torch.bfloat16

    def test_a_rule_of_an_operator_holds_also_with_policy_full(self) -> None:
        policy = Policy("full", "cpu", torch.bfloat16).with_ops({F.linear: "lower"})
        found = rulings(Tree(), policy)
        assert found["linear"] == ("lower", "override 'aten::linear'")
        assert found["layer_norm"] == ("follow", "policy full")

    def test_writes_and_the_users_casts_are_nobodys_to_override(self) -> None:
        class Writes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Inner()

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x)

        found = rulings(Writes(), AUTOCAST.with_modules({"inner": "fp32"}))
        assert found["mul_"] == ("follow", "in-place")
        assert found["half"] == ("follow", "input dtype")
        assert found["add"] == ("fp32", "override 'inner'")


class Inner(nn.Module):
    """A write, a cast and a sum."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone().mul_(2).half() + 1


class Protected(nn.Module):
    """One linear in a region that is off, one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.inside(x.float())
        return self.outside(x)


# -- shared and opaque modules ---------------------------------------------------------------------------


class Shared(nn.Module):
    """One linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = self.encoder
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.decoder(torch.relu(self.encoder(x))))


def test_an_override_of_a_shared_module_holds_for_every_call_of_it() -> None:
    found = rulings(Shared(), AUTOCAST.with_modules({"encoder": "fp32"}))
    assert found["linear"] == found["linear_1"] == ("fp32", "override 'encoder'")
    assert found["linear_2"] == ("lower", "op table")


@pytest.mark.parametrize("name", ["decoder", "dec*"])
def test_a_shared_module_has_its_other_name_too(name: str) -> None:
    found = rulings(Shared(), AUTOCAST.with_modules({name: "fp32"}))
    assert found["linear"] == found["linear_1"] == ("fp32", f"override '{name}'")


class Recurrent(nn.Module):
    """A module that stays one call, and a linear after it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0])


class TestOpaque:
    @pytest.mark.parametrize("rule", RULES)
    def test_the_override_is_the_decision(self, rule: str) -> None:
        found = rulings(Recurrent(), AUTOCAST.with_modules({"lstm": rule}))
        assert found["lstm"] == (rule, "override 'lstm'")
        assert found["linear"] == ("lower", "op table")
        assert rulings(Recurrent())["lstm"] == ("opaque", "module runs as a whole")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_fp32_runs_it_in_float32_whatever_comes_in(self, dtype: torch.dtype) -> None:
        model = Recurrent()
        amp = fxamp.convert(model, policy=AUTOCAST.with_modules({"lstm": "fp32"}))
        x = torch.randn(2, 3, 4).to(dtype)
        hidden = model.lstm(x.float())[0]
        with torch.autocast("cpu", torch.bfloat16):
            expected = model.out(hidden)
        assert_same(amp(x), expected)
        assert amp.lstm.weight_hh_l0.dtype == torch.float32

    def test_lower_runs_it_under_autocast(self) -> None:
        model = Recurrent()
        x = torch.randn(2, 3, 4)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
        assert_same(fxamp.convert(model, policy=AUTOCAST.with_modules({"lstm": "lower"}))(x), expected)

    def test_lower_holds_also_with_policy_full(self) -> None:
        model = Recurrent()
        x = torch.randn(2, 3, 4)
        policy = Policy("full", "cpu", torch.bfloat16).with_modules({"lstm": "lower", "out": "lower"})
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
        assert_same(fxamp.convert(model, policy=policy)(x), expected)

    def test_follow_runs_it_in_what_comes_in(self) -> None:
        model = Recurrent()
        x = torch.randn(2, 3, 4)
        amp = fxamp.convert(model, policy=AUTOCAST.with_modules({"lstm": "follow"}))
        hidden = model.lstm(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            expected = model.out(hidden)
        assert_same(amp(x), expected)
        assert amp.plan["lstm"].casts == ()
        with pytest.raises(ValueError, match="does not match weight dtype"):
            amp(x.bfloat16())


def test_an_override_that_only_meets_writes_matches_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with pytest.raises(fxamp.PolicyError, match="the override 'aten::relu' matches no operator of the model"):
        fxamp.convert(model, policy=Policy.autocast("cpu").with_ops({torch.relu: "fp32"}))
