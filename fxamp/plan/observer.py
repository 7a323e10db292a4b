"""Which dtypes do the calls of a graph really give back, for these inputs?

Runs each planned call on fake tensors: shapes and dtypes are those of a real run, nothing is computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree

from fxamp.capture.arguments import map_leaves
from fxamp.capture.calls import MODE_CALLS, set_objects
from fxamp.capture.facts import gpu_is_away, has_nested, moved, run_on_fakes, without_log
from fxamp.capture.objects import Rebuilt
from fxamp.capture.regions import autocast_as
from fxamp.capture.unknown import GuardOnDataDependentSymNode, fake_mode, has_unknown
from fxamp.dtypes import is_castable
from fxamp.plan.alike import Unlike, call_key, keeps_shapes, tensor_key
from fxamp.plan.decision import Decision
from fxamp.plan.flow import NOT_A_TENSOR, UNKNOWN, Flow, of_object
from fxamp.plan.trials import AutocastFailsError, called, check_numbers
from fxamp.policy.composites import UNDER_AUTOCAST

__all__ = ["FakeObserver"]

_MISSING = object()
_NOT_FAKEABLE = (
    GuardOnDataDependentSymNode,
    NotImplementedError,
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)


class FakeObserver:
    """Keeps the fake value of each node; a call that cannot run on fake tensors has none.

    Args:
        attribute: path to the parameter, buffer, tensor or module of that name.
        graph: the traced graph.
        examples: the values of its placeholders, in order.
        device_type: whose rules are planned with.
    """

    def __init__(
        self, attribute: Callable[[str], Any], graph: fx.Graph, examples: list[Any], device_type: str = "cpu"
    ) -> None:
        self._device_type = device_type
        self._attribute = attribute
        self._mode = fake_mode()
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self._values: dict[fx.Node, Any] = {}
        self._known: dict[Hashable, Any] | None = {} if keeps_shapes(graph, attribute) else None
        for node, example in zip(placeholders, examples, strict=True):
            self._values[node] = self._fake(example)

    def flow(self, node: fx.Node, decision: Decision) -> Flow | None:
        """The flow of the node's value, or None when it could not be told."""
        if node.op == "output":
            return None
        if node.op not in ("placeholder", "get_attr"):
            self._values[node] = self._found(node, decision)
        elif node.op == "get_attr":
            self._values[node] = self._attribute_of(str(node.target))
        value = self._values[node]
        if value is _MISSING or isinstance(value, torch.nn.Module) or isinstance(node.target, Rebuilt):
            return None
        flow = of_object(value)
        return None if flow == UNKNOWN or (flow == NOT_A_TENSOR and isinstance(value, dict)) else flow

    def forget(self, node: fx.Node) -> None:
        """The value of a node is not to be told, nor what follows from it."""
        self._values[node] = _MISSING

    def value(self, node: fx.Node) -> Any:
        """The fake value of a node; what is no tensor as it is, and something of a class of its own for nothing."""
        return self._values.get(node, _MISSING)

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape of a node's value, when it is one tensor and known."""
        value = self._values.get(node)
        return tuple(value.shape) if isinstance(value, torch.Tensor) and not has_unknown(value) else None

    def _attribute_of(self, path: str) -> Any:
        value = self._attribute(path)
        alike = isinstance(value, torch.Tensor) and not value._is_view()
        return self._once(lambda: tensor_key(value), lambda: self._fake(value)) if alike else self._fake(value)

    def _found(self, node: fx.Node, decision: Decision) -> Any:
        """What a call gives, if there is something to tell."""
        for each in set_objects(node):
            self.forget(each)
        if node.target in MODE_CALLS:
            self._check_assert(node, decision)
            return None
        if any(self._values.get(source, _MISSING) is _MISSING for source in node.all_input_nodes):
            return _MISSING
        if decision.how == "ambient" and decision.aten in UNDER_AUTOCAST[self._device_type]:
            return _MISSING  # its fake kernel is another one, in which autocast has nothing to do
        return self._once(
            lambda: call_key(node, decision, self._values, self._attribute), lambda: self._run(node, decision)
        )

    def _check_assert(self, node: fx.Node, decision: Decision) -> None:
        """What the model requires of dtypes does not hold for those of autocast, as it does not in eager torch."""
        asked: Any = node.args[0] if node.target is torch._assert else None
        if isinstance(asked, fx.Node) and self._values.get(asked) is False:
            raise AutocastFailsError(
                f"{decision.source}: {node.args[1]}, which autocast makes false",
                hint="give inputs with which the model itself runs",
            )

    def _once(self, key: Callable[[], Hashable], make: Callable[[], Any]) -> Any:
        """What is made, or what was made for the same key."""
        if self._known is None:
            return make()
        try:
            known = key()
        except Unlike:
            return make()
        if known in self._known:
            return self._known[known]
        made = make()
        if not any(map(has_unknown, pytree.tree_leaves(made))):
            self._known[known] = made
        return made

    def _fake(self, value: Any) -> Any:
        if has_nested(value):
            return _MISSING
        return pytree.tree_map_only(torch.Tensor, self._mode.from_tensor, value)

    def _run(self, node: fx.Node, decision: Decision) -> Any:
        casts = {cast.slot: cast.dtype for cast in decision.casts}
        slot = -1

        def argument(source: fx.Node) -> Any:
            nonlocal slot
            slot += 1
            value = self._values[source]
            return _cast(value, casts[slot]) if slot in casts else value

        try:
            args, kwargs = map_leaves((node.args, node.kwargs), fx.Node, argument)
            if node.op != "call_module" and decision.how == "call":
                check_numbers(node, decision, args, kwargs)
            # Without a GPU the autocast of one is asked all the same, by fake tensors that are said to be there.
            away = decision.how == "ambient" and gpu_is_away(self._device_type)
            with self._mode, torch.no_grad(), _autocast(decision, self._device_type), _quietly():
                if away:
                    args, kwargs = moved((args, kwargs), "cuda")
                result = self._called(node, decision, args, kwargs, "cuda" if away else "")
                return moved(result, "cpu") if away else result
        except AutocastFailsError:
            raise
        except _NOT_FAKEABLE:
            return _MISSING  # the rules tell what they can
        except Exception as error:
            unknown = any(map(has_unknown, pytree.tree_leaves([self._values[n] for n in node.all_input_nodes])))
            if unknown or decision.how == "ambient" or not decision.aten or "data is not allocated" in str(error):
                return _MISSING
            raise _does_not_fit(decision, error) from error

    def _called(self, node: fx.Node, decision: Decision, args: Any, kwargs: Any, device: str) -> Any:
        if node.op != "call_module":
            return called(node, decision, args, kwargs)

        def fake(value: Any) -> Any:
            return moved(self._fake(value), device) if device else self._fake(value)

        return run_on_fakes(self._attribute(str(node.target)), args, kwargs, fake)


def _does_not_fit(decision: Decision, error: Exception) -> AutocastFailsError:
    where = f" in module '{decision.module}'" if decision.module else ""
    reason = str(error).strip().splitlines()
    return AutocastFailsError(
        f"example_inputs do not fit the model: {decision.op} (node '{decision.name}'{where}, {decision.source}) "
        f"fails with: {reason[0] if reason else type(error).__name__}",
        hint="give inputs with which the model itself runs",
    )


@contextmanager
def _autocast(decision: Decision, device_type: str) -> Iterator[None]:
    """The autocast state a call runs under: off, but for what is left to autocast."""
    state = decision.state
    enabled = state is not None and decision.how in ("ambient", "promote") and state.enabled
    dtype = torch.get_autocast_dtype(device_type) if state is None else state.dtype
    try:
        with autocast_as(device_type, dtype, enabled=enabled):
            yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def _quietly() -> Iterator[None]:
    with without_log(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that cuDNN is not there, for one
        yield


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if is_castable(tensor.dtype) else tensor

    return pytree.tree_map_only(torch.Tensor, cast, value)
