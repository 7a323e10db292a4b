"""What the tests share: comparing with eager torch bit by bit, and writing graphs as text."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import fxamp
from fxamp.dtypes import abbreviate


@functools.cache
def has_low_lstm() -> bool:
    """Whether torch has a bfloat16 LSTM for this CPU, as it has for those with instructions for that dtype."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(2, 2)(torch.ones(2, 1, 2))
    except RuntimeError:
        return False
    return True


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what eager torch itself warns about, such as nested tensors in transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def assert_same(found: Any, expected: Any, what: str = "output") -> None:
    """Same structure, dtypes and bits; NaN equals NaN."""
    ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(ours) == len(theirs), f"{what}: {len(ours)} values, expected {len(theirs)}"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not isinstance(b, torch.Tensor):
            assert a == b, f"{what}[{i}]"
            continue
        assert a.dtype == b.dtype, f"{what}[{i}]: {a.dtype}, expected {b.dtype}"
        assert a.shape == b.shape, f"{what}[{i}]: {a.shape}, expected {b.shape}"
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), f"{what}[{i}]: bits differ"


def run(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any, seed: int = 0
) -> tuple[Any, dict[str, Any]]:
    """Output and gradients of a seeded forward (in ``context``) and backward."""
    torch.manual_seed(seed)
    args, kwargs = pytree.tree_map_only(torch.Tensor, _leaf, (args, kwargs))
    with context:
        output = model(*args, **kwargs)
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    floating = [
        t.double().sum() if t.dim() == 0 else (t.double() * _weights(t)).sum() for t in leaves if t.requires_grad
    ]
    grads: dict[str, Any] = {}
    if floating:
        torch.stack(floating).sum().backward()
        inputs = pytree.tree_leaves((args, kwargs))
        grads = {f"input {i}": t.grad for i, t in enumerate(inputs) if isinstance(t, torch.Tensor)}
    if isinstance(model, nn.Module):
        grads |= {name: p.grad for name, p in model.named_parameters()}
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, output), grads


def check_against_autocast(
    model: nn.Module,
    *args: Any,
    dtype: torch.dtype = torch.bfloat16,
    loss: Callable[..., Any] | None = None,
    loss_args: tuple[Any, ...] = (),
    policy: str = "autocast",
    modes: tuple[bool, ...] = (True, False),
    calls: int = 2,
    device: str = "cpu",
    examples: bool = False,
    constant: bool = False,
    rules: str | None = None,
    **kwargs: Any,
) -> fxamp.AmpModule:
    """Outputs, gradients and buffers equal eager ``torch.autocast(device)`` bitwise, in both modes.

    Policy "full" is compared with the model as it is.

    Args:
        examples: convert with the inputs as example inputs.
        constant: the inputs of the last call are no leaves of autograd.
        rules: the device type whose rules to convert for, when the context of the eager model is another's.
    """
    expected_model = copy.deepcopy(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shown = _constants(((*args, *loss_args), kwargs)) if examples else None
    amp = fxamp.convert(copy.deepcopy(model), loss, dtype=dtype, device_type=rules, policy=policy, example_inputs=shown)

    def reference(*inputs: Any, **given: Any) -> Any:
        count = len(inputs) - len(loss_args)
        output = expected_model(*inputs[:count], **given)
        return output if loss is None else (loss(output, *inputs[count:]), output)

    for training in modes:
        expected_model.train(training)
        amp.train(training)
        for call in range(calls):
            context = torch.autocast(device, dtype) if policy == "autocast" else nullcontext()
            given = ((*args, *loss_args), kwargs)
            inputs, named = _constants(given) if constant and call == calls - 1 else given
            with quiet():
                expected, expected_grads = run(reference, inputs, named, context, seed=call)
                found, grads = run(amp, inputs, named, nullcontext(), seed=call)
            assert_same(found, expected, f"training={training} call={call} output")
            for name, gradient in expected_grads.items():
                assert_same([grads[name]], [gradient], f"training={training} gradient of {name}")
            for name, parameter in expected_model.named_parameters():
                assert (grads[name] is None) == (parameter.grad is None), f"gradient of {name}"
                assert_same(grads[name], parameter.grad, f"training={training} gradient of {name}")
            for owner in (amp, expected_model):
                owner.zero_grad()
    buffers = dict(expected_model.named_buffers())
    assert_same({n: b for n, b in amp.named_buffers() if n in buffers}, buffers, "buffers")
    assert_same(dict(model.state_dict()), before, "the model itself")
    return amp


def graph_text(graph: fx.Graph) -> str:
    """One line a node: stable names, short dtypes, no addresses."""
    lines = []
    for node in graph.nodes:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
        arguments = [_shown(a) for a in node.args] + [f"{k}={_shown(v)}" for k, v in node.kwargs.items()]
        lines.append(f"{node.name} = {node.op} {target}({', '.join(arguments)})")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return abbreviate(value)
    if isinstance(value, tuple | list):
        return f"({', '.join(_shown(item) for item in value)})"
    return str(value)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _constants(values: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, values)


def _weights(tensor: torch.Tensor) -> torch.Tensor:
    count = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    return torch.cos(count)
