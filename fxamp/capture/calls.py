"""Calls that a graph makes and that no function of torch stands for.

Each is a small value that pickles and that torch.fx can print by name.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn

from fxamp.errors import CaptureError, describe

__all__ = [
    "CALL_HOOKS",
    "MODE_CALLS",
    "AutogradFunctionCall",
    "ScriptedCall",
    "assign",
    "calls_itself",
    "enter_inference_mode",
    "exit_inference_mode",
    "expect",
    "expect_none",
    "forked_states",
    "get_rng_state",
    "has_hooks",
    "is_as_expected",
    "leave_inference_modes",
    "manual_seed",
    "restore_states",
    "set_objects",
    "set_rng_state",
]


CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks of the user's."""
    return any(getattr(module, name, None) for name in CALL_HOOKS)


def calls_itself(module: nn.Module) -> bool:
    """Whether the class of a module has a ``__call__`` of its own, which may do more than ``forward``."""
    return type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule)


@dataclass(frozen=True)
class AutogradFunctionCall:
    """Applies a ``torch.autograd.Function``, so that its own backward is kept."""

    function: type[torch.autograd.Function]

    @property
    def __name__(self) -> str:
        return f"{self.function.__name__}_apply"

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ScriptedCall:
    """Calls a function that ``torch.jit.script`` made."""

    function: Any

    @property
    def __name__(self) -> str:
        return str(self.function.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> ScriptedCall:
        return self  # there is no copy of the function


@fx.node.has_side_effect
def assign(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute of a module, or of an object, as the user's forward did while it was traced."""
    setattr(owner, name, value)


def set_objects(node: fx.Node) -> list[fx.Node]:
    """The value whose attribute a call sets, when it is no module, and those that it was a part of."""
    found: list[fx.Node] = []
    owner: Any = node.args[0] if node.target is assign else None
    while isinstance(owner, fx.Node) and owner.op != "get_attr":
        found.append(owner)
        owner = owner.args[0] if owner.target in (getattr, operator.getitem) else None
    return found


# Calls of their own, for Dynamo puts wrappers in the place of torch's when it is imported.


def get_rng_state() -> torch.Tensor:
    """``torch.get_rng_state``."""
    return torch.get_rng_state()


@fx.node.has_side_effect
def manual_seed(seed: int) -> torch.Generator:
    """``torch.manual_seed``."""
    return torch.manual_seed(seed)


@fx.node.has_side_effect
def set_rng_state(new_state: torch.Tensor) -> None:
    """``torch.set_rng_state``."""
    torch.set_rng_state(new_state)


def forked_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The states of torch's random numbers, on the CPU and on every GPU, for ``torch.random.fork_rng``."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), gpus


@fx.node.has_side_effect
def restore_states(states: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    """Goes back to the states that ``forked_states`` gave."""
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])


_inference_modes: list[Any] = []


@fx.node.has_side_effect
def enter_inference_mode(mode: bool) -> None:
    """Enters ``torch.inference_mode(mode)``, as the user's forward did while it was traced."""
    context = torch.inference_mode(mode)
    context.__enter__()
    _inference_modes.append(context)


@fx.node.has_side_effect
def exit_inference_mode() -> None:
    """Leaves the inference mode that was entered last."""
    _inference_modes.pop().__exit__(None, None, None)


def leave_inference_modes(depth: int | None = None) -> int:
    """Leaves the inference modes that an exception left open beyond ``depth``; how many are open now."""
    while depth is not None and len(_inference_modes) > depth:
        exit_inference_mode()
    return len(_inference_modes)


def is_as_expected(value: Any, expected: Any) -> bool:
    """Whether a value is the one, or as true as it when that is a bool."""
    if isinstance(expected, bool):
        return bool(value) if expected else not value
    return bool(value == expected)


@fx.node.has_side_effect
def expect(value: Any, expected: Any, where: str) -> None:
    """Checks what the graph was traced for: the value itself, or whether it is true when a bool is expected.

    Raises:
        CaptureError: when the value is another one, so that this call would have gone another way.
    """
    if not is_as_expected(value, expected):
        raise CaptureError(
            f"this call goes another way through the model: at {where} the graph was made for {expected}, "
            f"found {value}",
            hint="convert with example_inputs of this kind",
        )


@fx.node.has_side_effect
def expect_none(value: Any, expected: bool, where: str) -> None:
    """Checks that a value is None or is not, as it was while tracing.

    Raises:
        CaptureError: when it is the other, so that this call may have gone another way.
    """
    if (value is None) is not expected:
        raise CaptureError(
            f"this call goes another way through the model: at {where} the graph was made for "
            f"{'None' if expected else 'a value'}, found {describe(value)}",
            hint="convert with example_inputs of this kind, or put what asks for it into that submodule",
        )


MODE_CALLS: Final = frozenset(
    {
        assign,
        enter_inference_mode,
        exit_inference_mode,
        expect,
        expect_none,
        forked_states,
        restore_states,
        torch._assert,
        torch._C._set_grad_enabled,
        get_rng_state,
        manual_seed,
        set_rng_state,
        torch.is_grad_enabled,
    }
)
"""Calls that only steer what runs. They are made in the order of the program."""
