"""The pipeline: capture, plan, rewrite, verify."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from fxamp.capture import Layout, Program, Traced
from fxamp.capture.clone import is_compiled
from fxamp.capture.facts import gpu_is_away
from fxamp.cost import Probe, measurable
from fxamp.errors import CaptureError, FxampError, describe
from fxamp.insight import report_of
from fxamp.plan import PrecisionPlan, make_plan
from fxamp.plan.measured import Measured
from fxamp.plan.observer import FakeObserver
from fxamp.plan.recorded import RecordedObserver
from fxamp.plan.trials import AutocastFailsError
from fxamp.policy import Policy, Ruling
from fxamp.rewrite import (
    direct_weight_gradients,
    fold_weight_casts,
    group_weight_casts,
    insert_casts,
    verify,
)
from fxamp.runtime import AmpModule, Asked, Conversion, Stages
from fxamp.runtime.checks import not_a_scalar

__all__ = ["convert"]


def convert(
    model: Callable[..., Any],
    loss: Callable[..., Any] | None = None,
    *,
    example_inputs: Any = None,
    dtype: torch.dtype | None = None,
    device_type: str | None = None,
    policy: str | Policy = "autocast",
) -> AmpModule:
    """A mixed-precision ``GraphModule`` of a model, and of its loss when one is given.

    The model is left as it is. The result shares its parameters and buffers under the same names.

    Args:
        model: an ``nn.Module``, a method of one, or any callable of tensors; so it works as a decorator.
        loss: a callable or module ``(output, *loss_args) -> Tensor``, traced together with the model. Then
            ``amp(*inputs, *loss_args)`` returns ``(loss, output)``: the required arguments of the model come
            first, then the loss's, and everything optional goes by keyword.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``, of the combined signature. Not
            needed for what ``torch.fx`` can trace; with it dtypes are known and not derived, branches may go by what is
            given, and Dynamo captures the rest. Only where a part goes by data that it computes is the model run
            once, on copies.
        dtype: ``torch.float16`` or ``torch.bfloat16``; default ``torch.get_autocast_dtype(device_type)``.
        device_type: whose rules to follow, "cuda" or "cpu"; default: where the model is, also after ``.to()``.
            A graph for the GPU can be made and read without one.
        policy: "autocast" (bitwise ``torch.autocast``), "fast", "full" (no casts), or a ``Policy``.

    Raises:
        CaptureError: when the model or the loss cannot be traced; it names the line.
        PolicyError: for an unknown policy, device type or dtype, or an override that matches nothing.
        PlanError: when the graph has an operator that autocast refuses to run.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Softmax(dim=-1))
        >>> amp = convert(model, dtype=torch.bfloat16)
        >>> amp(torch.zeros(2, 8)).dtype
        torch.bfloat16
    """
    asked = Asked.of(policy, device_type, dtype)
    refused = _not_a_model(model) or _not_a_loss(loss)
    if refused is not None:
        raise refused
    _check_initialised(model)
    program = Program(model, loss)
    layout, examples = _example_layout(program, example_inputs)
    try:
        return AmpModule(Conversion.start(program, asked, _STAGES, layout, examples))
    except AutocastFailsError as error:
        if not _is_in_float32(program, examples):
            raise CaptureError(error.message, hint=error.hint) from error.__cause__
        return AmpModule(_without_casts(Program(model, loss), asked, layout, examples, error))


def _is_in_float32(program: Program, examples: list[Any] | None) -> bool:
    """Whether no other 16-bit dtype can be the reason for what autocast makes of a model."""
    tensors = [*(examples or ()), *program.whole.parameters(), *program.whole.buffers()]
    return not any(isinstance(t, torch.Tensor) and t.dtype in (torch.float16, torch.bfloat16) for t in tensors)


def _without_casts(
    program: Program, asked: Asked, layout: Layout | None, examples: list[Any] | None, error: AutocastFailsError
) -> Conversion:
    """A model that runs as it is, and fails under autocast: it is converted as it is, and the report says why."""
    full = Policy("full", asked.policy.device_type, asked.policy.dtype)
    try:
        conversion = Conversion.start(program, replace(asked, policy=full), _STAGES, layout, examples)
    except FxampError:
        raise CaptureError(error.message, hint=error.hint) from error.__cause__
    conversion.note = f"no casts, as autocast cannot run this model: {error.message}"
    return conversion


def _plan(program: Program, traced: Traced, policy: Policy, mode: str, examples: list[Any] | None) -> PrecisionPlan:
    """What to do about each call."""
    rulings = _rulings(program, policy)
    observer: FakeObserver | RecordedObserver | None = None
    if traced.fits is not None:
        observer = RecordedObserver(policy, under_autocast=not gpu_is_away(policy.device_type or "cpu"))
    elif examples is not None:
        observer = FakeObserver(program.attribute, traced.graph, examples, policy.device_type or "cpu")
    arguments = traced.graph, program.attribute, policy, rulings
    probe = _probe(program, policy) if isinstance(observer, FakeObserver) else None
    if probe is not None and isinstance(observer, FakeObserver):
        costs = Measured(probe, traced.graph, observer, program.attribute, policy, training=mode != "eval")
        plan = make_plan(*arguments, mode=mode, observer=observer, costs=costs).timed(costs.seconds)
        probe.save()
    else:
        plan = make_plan(*arguments, mode=mode, observer=observer)
    if isinstance(observer, FakeObserver) and program.has_loss:
        _check_loss(traced.graph, observer)
    return plan


def _probe(program: Program, policy: Policy) -> Probe | None:
    """What measures the calls of a model where it runs, when that is where it is planned for."""
    device = next((tensor.device for tensor in program.whole.parameters()), torch.device("cpu"))
    wanted = policy.name == "fast" and device.type == policy.device_type
    return Probe(device) if wanted and measurable(device) else None


def _rewrite(program: Program, traced: Traced, plan: PrecisionPlan, *, to_freeze: bool) -> fx.Graph:
    """The graph in which it is done, verified; few calls cast all weights, but for those that are to be frozen."""
    graph = insert_casts(traced.graph, plan)
    verify(graph, traced.graph, plan)
    if not to_freeze:
        direct_weight_gradients(graph, plan)
        group_weight_casts(graph, program.attribute)
    return graph


def _check_initialised(model: Callable[..., Any]) -> None:
    tensors = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else {}
    lazy = next((name for name, tensor in tensors.items() if is_lazy(tensor)), None)
    if lazy is not None:
        raise CaptureError(
            f"'{lazy}' of {type(model).__name__} is not initialised: its shape comes with the first call",
            hint="call the model once before fxamp.convert(model)",
        )


def _rulings(program: Program, policy: Policy) -> dict[str, Ruling]:
    """Module path to override; a module that has several names is overridden by any of them."""
    modules = dict(program.whole.named_modules(remove_duplicate=False))
    first = {id(module): path for path, module in reversed(modules.items())}
    found = policy.module_rulings(modules)
    return {first[id(modules[path])]: ruling for path, ruling in reversed(found.items())}


def _check_loss(graph: fx.Graph, observer: FakeObserver) -> None:
    output = next(iter(reversed(graph.nodes)))
    loss: Any = output.args[0]
    shape = observer.shape(loss[0])
    if shape is not None and math.prod(shape) != 1:
        raise not_a_scalar(f"shape {shape}")


def _freeze(conversion: Conversion) -> dict[str, tuple[str, torch.dtype]]:
    return fold_weight_casts(conversion.program, [variant.graph for _, variant in conversion.variants])


_STAGES = Stages(_plan, _rewrite, report_of, _freeze)


def _not_a_model(model: Any) -> CaptureError | None:
    if isinstance(model, AmpModule):
        return CaptureError("the model is converted already", hint="amp.replan(policy) changes its policy")
    if isinstance(model, type):
        name = model.__name__
        return CaptureError(f"found the class {name}: expected a module", hint=f"fxamp.convert({name}(...))")
    if not callable(model):
        return CaptureError(f"found {describe(model)}: expected a module or a callable", hint="fxamp.convert(model)")
    if hasattr(model, "_torchdynamo_orig_callable") or is_compiled(model):
        compile_after = "convert it first: torch.compile(fxamp.convert(model))"
        return CaptureError("the model is compiled already: expected one that can be traced", hint=compile_after)
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        in_a_module = "convert the model before torch.jit.script, or put it into a module: nn.Sequential(model)"
        return CaptureError("the model is scripted: its calls cannot be seen", hint=in_a_module)
    return None


def _not_a_loss(loss: Any) -> CaptureError | None:
    if isinstance(loss, type):
        return CaptureError(f"the loss is the class {loss.__name__}", hint=f"write loss={loss.__name__}()")
    if loss is None or callable(loss):
        return None
    return CaptureError(
        f"the loss is {describe(loss)}: expected a callable", hint="write loss=torch.nn.functional.mse_loss"
    )


def _example_layout(program: Program, example_inputs: Any) -> tuple[Layout | None, list[Any] | None]:
    if example_inputs is None:
        return None, None
    args, kwargs = _split_examples(example_inputs)
    try:
        values = program.signature.bind(args, kwargs)
    except TypeError as error:
        raise CaptureError(
            f"example_inputs do not fit the signature {program.signature.signature}: {error}",
            hint="give a tuple of positional inputs, or (args_tuple, kwargs_dict)",
        ) from error
    return program.signature.laid_out(values)


def _split_examples(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if (
        isinstance(example_inputs, tuple | list)
        and len(example_inputs) == 2
        and isinstance(example_inputs[0], tuple)
        and isinstance(example_inputs[1], dict)
    ):
        return example_inputs[0], example_inputs[1]
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise CaptureError(
        f"example_inputs is {describe(example_inputs)}: expected a tuple",
        hint="give a tuple of positional inputs, or (args_tuple, kwargs_dict)",
    )
