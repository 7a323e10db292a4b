"""Each law of rewriting catches the graph that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxamp
from fxamp.plan import Cast, Decision, PrecisionPlan
from fxamp.policy import POLICY_NAMES
from fxamp.rewrite import insert_casts, verify
from tests.zoo import BASIC as ZOO


class Model(nn.Module):
    """A linear, a write, a matrix product, a loss, and integers beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x)
        y += 1
        y = torch.mm(y, x)
        return F.mse_loss(y, x), i + 1


class Rewritten(NamedTuple):
    """A rewritten graph, and what it is checked against."""

    graph: fx.Graph
    traced: fx.Graph
    plan: PrecisionPlan

    def node(self, name: str) -> fx.Node:
        return next(node for node in self.graph.nodes if node.name == name)

    def check(self) -> None:
        verify(self.graph, self.traced, self.plan)


def rewritten(policy: str = "autocast") -> Rewritten:
    inputs = torch.zeros(4, 4), torch.zeros(2, dtype=torch.int64)
    amp = fxamp.convert(Model(), example_inputs=inputs, dtype=torch.bfloat16, device_type="cpu", policy=policy)
    variant = amp._conversion.base
    return Rewritten(insert_casts(variant.traced.graph, variant.plan), variant.traced.graph, variant.plan)


def broken_law(found: Rewritten) -> str:
    with pytest.raises(fxamp.VerifyError) as raised:
        found.check()
    assert raised.value.hint == "this is a fault of fxamp; please report it with print(amp.graph)"
    start, law, what = raised.value.message.partition(" breaks a law of rewriting: ")
    assert law, raised.value.message
    return f"{start}: {what}"


def cast(found: Rewritten, before: str, value: str, *, marked: bool = True) -> fx.Node:
    """A new cast of a value to bfloat16, marked as one of the pass's own or not."""
    with found.graph.inserting_before(found.node(before)):
        node = found.graph.call_method("to", (found.node(value), torch.bfloat16))
    node.meta = {"cast": Cast(0, value, torch.bfloat16)} if marked else {}
    return node


def with_decision(found: Rewritten, name: str, change: Callable[[Decision], Decision]) -> Rewritten:
    """The same graph traced, rewritten by a plan in which one decision is another."""
    decisions = tuple(change(d) if d.name == name else d for d in found.plan)
    plan = replace(found.plan, decisions=decisions)
    return Rewritten(insert_casts(found.traced, plan), found.traced, plan)


def with_cast(name: str, value: str, slot: int = 0) -> Callable[[Decision], Decision]:
    def change(decision: Decision) -> Decision:
        return replace(decision, casts=(Cast(slot, value, torch.bfloat16),))

    return change


# -- good graphs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_good_graph_passes(policy: str) -> None:
    rewritten(policy).check()


@pytest.mark.parametrize("name", ZOO)
def test_every_model_passes_in_both_modes(name: str) -> None:
    case = ZOO[name]
    amp = fxamp.convert(case.make(), case.loss, dtype=torch.float16)
    for policy in POLICY_NAMES:
        for mode in (True, False):
            variant = amp.replan(policy).train(mode)._conversion.base
            verify(variant.graph, variant.traced.graph, variant.plan)


def test_the_graph_of_another_policy_does_not_pass() -> None:
    full, low = rewritten("full"), rewritten()
    assert broken_law(Rewritten(full.graph, low.traced, low.plan)).startswith("node 'linear'")
    assert broken_law(Rewritten(low.graph, low.traced, full.plan)).startswith("node 'linear'")


# -- the model's own calls -------------------------------------------------------------------------------


class TestOwnCallsStay:
    def test_swapped(self) -> None:
        found = rewritten()
        found.node("iadd").prepend(found.node("add"))
        assert broken_law(found) == "node 'iadd': found 'add' in its place"

    def test_dropped(self) -> None:
        found = rewritten()
        found.node("iadd").replace_all_uses_with(found.node("linear"))
        found.graph.erase_node(found.node("iadd"))
        assert broken_law(found) == "node 'iadd': found 'mm' in its place"

    def test_repeated(self) -> None:
        found = rewritten()
        with found.graph.inserting_after(found.node("iadd")):
            found.graph.call_function(torch.relu, (found.node("iadd"),))
        assert broken_law(found) == "node 'mm': found 'relu' in its place"

    def test_a_call_too_many_at_the_end(self) -> None:
        found = rewritten()
        (output,) = (node for node in found.graph.nodes if node.op == "output")
        found.graph.erase_node(output)
        assert broken_law(found) == "node 'add': 12 calls were traced and 11 are left".replace(
            "12", str(len(found.traced.nodes))
        ).replace("11", str(len(found.traced.nodes) - 1))

    def test_a_cast_that_does_not_say_so(self) -> None:
        found = rewritten()
        found.node("add").args = (cast(found, "add", "i", marked=False), 1)
        assert broken_law(found) == "node 'add': found 'to' in its place"


# -- casts as planned ------------------------------------------------------------------------------------


class TestCastsAsPlanned:
    def test_a_dropped_cast(self) -> None:
        found = rewritten()
        node = found.node("mm_f32")
        node.replace_all_uses_with(found.node("mm"))
        found.graph.erase_node(node)
        assert broken_law(found) == "node 'mse_loss': 'mm' is not the planned cast of 'mm' to torch.float32"

    @pytest.mark.parametrize("name", ["x_bf16", "fc_weight_bf16", "fc_bias_bf16"])
    def test_one_dropped_of_several(self, name: str) -> None:
        found = rewritten()
        node = found.node(name)
        found.node("linear").replace_input_with(node, node.all_input_nodes[0])
        assert broken_law(found).startswith("node 'linear'")

    def test_an_integer_that_is_cast(self) -> None:
        found = rewritten()
        found.node("add").args = (cast(found, "add", "i"), 1)
        assert broken_law(found) == "node 'add': found 'to' in place of 'i'"

    def test_a_write_that_is_cast(self) -> None:
        found = rewritten()
        found.node("iadd").args = (cast(found, "iadd", "linear"), 1)
        assert broken_law(found) == "node 'iadd': found 'to' in place of 'linear'"

    def test_a_cast_nobody_uses(self) -> None:
        found = rewritten()
        node = cast(found, "add", "x")
        assert broken_law(found) == f"node '{node.name}': a cast that no planned call uses"

    def test_a_cast_to_another_dtype(self) -> None:
        found = rewritten()
        node = found.node("mm_f32")
        node.args = (node.args[0], torch.float16)
        node.meta["cast"] = replace(node.meta["cast"], dtype=torch.float16)
        assert broken_law(found) == "node 'mse_loss': 'mm_f32' is not the planned cast of 'mm' to torch.float32"

    @pytest.mark.parametrize("arguments", [("mm", torch.float16), ("x", torch.float32)], ids=["dtype", "value"])
    def test_a_cast_that_does_something_else_than_it_says(self, arguments: tuple[str, torch.dtype]) -> None:
        found = rewritten()
        found.node("mm_f32").args = (found.node(arguments[0]), arguments[1])
        broken_law(found)

    def test_arguments_in_another_order(self) -> None:
        found = rewritten()
        node = found.node("mm")
        node.args = tuple(reversed(node.args))
        broken_law(found)


# -- plans that break a law --------------------------------------------------------------------------------


class TestPlans:
    def test_an_integer_is_never_cast(self) -> None:
        found = with_decision(rewritten(), "add", with_cast("add", "i"))
        assert broken_law(found) == "node 'add': 'i' of dtype torch.int64 is cast to torch.bfloat16"

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.complex64, torch.bfloat16])
    def test_neither_is_what_autocast_leaves_alone(self, dtype: torch.dtype) -> None:
        found = rewritten()
        decisions = tuple(
            replace(with_cast("add", "i")(d), inputs=(replace(d.inputs[0], dtype=dtype),)) if d.name == "add" else d
            for d in found.plan
        )  # fmt: skip
        plan = replace(found.plan, decisions=decisions)
        broken = Rewritten(insert_casts(found.traced, plan), found.traced, plan)
        assert broken_law(broken) == f"node 'add': 'i' of dtype {dtype} is cast to torch.bfloat16"

    def test_an_unknown_dtype_needs_a_soft_cast(self) -> None:
        def unknown(decision: Decision) -> Decision:
            inputs: Any = (replace(decision.inputs[0], dtype=None),)
            return replace(with_cast("add", "i")(decision), inputs=inputs)

        found = with_decision(rewritten(), "add", unknown)
        assert broken_law(found) == "node 'add': 'i' of dtype None is cast to torch.bfloat16"
        soft = with_decision(
            rewritten(),
            "add",
            lambda d: replace(unknown(d), casts=(Cast(0, "i", torch.bfloat16, soft=True),)),
        )
        soft.check()

    def test_a_write_is_never_cast(self) -> None:
        def change(decision: Decision) -> Decision:
            return replace(decision, casts=(Cast(0, "linear", torch.float32),))

        assert broken_law(with_decision(rewritten(), "iadd", change)) == "node 'iadd': an in-place call is cast"

    def test_a_write_is_never_called_in_another_way(self) -> None:
        found = with_decision(rewritten(), "iadd", lambda d: replace(d, how="promote"))
        assert broken_law(found) == "node 'iadd': an in-place call is cast"

    def test_full_is_free_of_casts(self) -> None:
        def change(decision: Decision) -> Decision:
            return replace(decision, casts=(Cast(1, "x", torch.bfloat16),))

        found = with_decision(rewritten("full"), "mm", change)
        assert broken_law(found) == "node 'mm': policy full has a cast"
