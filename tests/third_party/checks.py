"""What a case has to give, and whether a converted model gives it: for every frontend the same."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.helpers import quiet, run
from tests.third_party.case import Call, Case

__all__ = ["Expected", "Result", "check", "convert", "expected", "first_difference", "frontends", "outcome"]

# A model that would be downloaded is a mistake in its row; and transformers warns about sizes that are meant.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
LOW = torch.bfloat16
MODES = (True, False)


class Result(NamedTuple):
    """What a call gave; ``buffers`` are those after it."""

    output: Any
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


class Expected(NamedTuple):
    """A model as it was made, its calls by name, and the results of eager autocast by mode and name of the call."""

    model: nn.Module
    calls: dict[str, Call]
    results: dict[tuple[bool, str], Result]

    @property
    def example(self) -> Call:
        """What the conversion sees."""
        return next(iter(self.calls.values()))


def expected(case: Case) -> Expected:
    """The answers; those of float32 where eager autocast cannot run the model."""
    torch.manual_seed(0)
    with quiet():
        model = _stirred(case.make())
    calls = {}
    for seed, (name, make) in enumerate(case.calls.items()):
        torch.manual_seed(seed)
        calls[name] = _wanting(make(), case.gradients)
    answering = copy.deepcopy(model)
    try:
        results = dict(_results(answering, answering, calls, lambda: torch.autocast("cpu", LOW)))
    except RuntimeError:
        answering = copy.deepcopy(model)
        results = dict(_results(answering, answering, calls, nullcontext))
    return Expected(model, calls, results)


def check(answers: Expected, converted: Callable[..., Any], owner: nn.Module) -> str | None:
    """The first difference of a converted model from the expected results, in every mode and call; None without one.

    Args:
        converted: what is called.
        owner: has the parameters, the buffers and the mode: the converted model itself, or the one that was compiled.
    """
    for (training, name), result in _results(owner, converted, answers.calls, nullcontext):
        wanted = answers.results[training, name]
        buffers = {key: buffer for key, buffer in result.buffers.items() if key in wanted.buffers}
        difference = first_difference(result._replace(buffers=buffers)._asdict(), wanted._asdict())
        if difference is not None:
            return f"{'train' if training else 'eval'}, {name}: {difference}"
    return None


def outcome(answers: Expected, frontend: str) -> str | None:
    """None where everything is equal; else the first difference, or the first line of the error."""
    try:
        return check(answers, *frontends[frontend](answers))
    except Exception as error:  # whatever a model raises is what became of it
        return f"{type(error).__name__}: {error}".partition("\n")[0]


def convert(answers: Expected) -> tuple[Callable[..., Any], nn.Module]:
    """``fxamp.convert`` with the first call as example inputs."""
    import fxamp

    amp = fxamp.convert(copy.deepcopy(answers.model), dtype=LOW, example_inputs=tuple(answers.example))
    return amp, amp


def backend(answers: Expected) -> tuple[Callable[..., Any], nn.Module]:
    """``torch.compile(model, backend="fxamp")``: converted when it is called."""
    torch._dynamo.reset()
    model = copy.deepcopy(answers.model)
    return torch.compile(model, backend="fxamp"), model


frontends = {"convert": convert, "backend": backend}


def first_difference(found: Any, wanted: Any, path: str = "") -> str | None:
    """Where two values differ, and how: their types, what they hold, and of tensors the dtype, the shape, the bits."""
    if type(found) is not type(wanted):
        return f"{path}: {type(found).__name__}, expected {type(wanted).__name__}"
    if isinstance(wanted, Tensor):
        return _tensors(found, wanted, path)
    ours, theirs = _members(found), _members(wanted)
    if theirs is None or ours is None:
        return None if found == wanted else f"{path}: {found!r}, expected {wanted!r}"
    if ours.keys() != theirs.keys():
        return f"{path}: has {sorted(map(str, ours))}, expected {sorted(map(str, theirs))}"
    differences = (first_difference(ours[key], theirs[key], f"{path}.{key}".lstrip(".")) for key in theirs)
    return next((difference for difference in differences if difference is not None), None)


def _tensors(found: Tensor, wanted: Tensor, path: str) -> str | None:
    for what in ("dtype", "shape", "requires_grad"):
        ours, theirs = getattr(found, what), getattr(wanted, what)
        if ours != theirs:
            return f"{path}: {what} {ours}, expected {theirs}"
    found, wanted = found.detach(), wanted.detach()
    if torch.equal(torch.isnan(found), torch.isnan(wanted)) and torch.equal(found.nan_to_num(), wanted.nan_to_num()):
        return None
    distance = (found.double() - wanted.double()).abs().max() if not wanted.is_complex() else "?"
    return f"{path}: bits differ by up to {float(distance):.2g} of {wanted.dtype}"


def _members(value: Any) -> Mapping[Any, Any] | None:
    """What a value holds: items of containers, attributes of other objects; None of what has neither."""
    if isinstance(value, Mapping):
        return {**dict(value), **_members_of_object(value)}
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, type) or callable(value) or not hasattr(value, "__dict__"):
        return None
    return _members_of_object(value)


def _members_of_object(value: Any) -> dict[Any, Any]:
    """A ``ModelOutput`` is a dict with attributes, a cache an object with tensors."""
    return dict(getattr(value, "__dict__", {}))


def _results(
    owner: nn.Module, model: Callable[..., Any], calls: Mapping[str, Call], context: Callable[[], Any]
) -> Iterator[tuple[tuple[bool, str], Result]]:
    """A seeded forward and backward of each call in both modes."""
    for training in MODES:
        for seed, (name, given) in enumerate(calls.items()):
            owner.train(training)
            owner.zero_grad()
            np.random.seed(seed)  # transformers draws the masks of speech from it
            with quiet():
                output, gradients = run(model, given.args, given.kwargs, context(), seed)
            gradients = {key.removeprefix("_orig_mod."): gradient for key, gradient in gradients.items()}
            gradients |= {key: parameter.grad for key, parameter in owner.named_parameters()}
            buffers = {key: buffer.clone() for key, buffer in owner.named_buffers()}
            yield (training, name), Result(output, gradients, buffers)


def _stirred(model: nn.Module) -> nn.Module:
    """A model none of whose parameters is all zeros: a gradient that a zero swallows would hide a difference."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and not parameter.any():
                parameter.normal_(0, 0.02)
    return model


def _wanting(given: Call, gradients: bool) -> Call:
    def wants(tensor: Tensor) -> Tensor:
        return tensor.requires_grad_(gradients and tensor.is_floating_point())

    return Call(*pytree.tree_map_only(Tensor, wants, tuple(given)))
