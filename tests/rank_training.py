"""The training script that two ranks run in the tests of the scaler, and what they compare of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

SETTINGS = {"init_scale": 1024.0, "growth_interval": 3}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


class Script(NamedTuple):
    """What a script does beside the usual.

    Args:
        optimizers: one for all parameters, or two that share them.
        fault: added to a gradient of rank 1 after the reduction.
        bad_loss: rank 1 multiplies its loss by it.
        bad_parameter: whose gradient gets the fault, among those with one on the rank.
        fault_step: when.
        clip: "by hand", after unscale_, or "clip_norm".
        accumulate: calls of the model for one step.
        autocast: whether the model is called under ``torch.autocast``.
    """

    optimizers: tuple[str, ...] = ("momentum",)
    fault: float = 0.0
    bad_loss: float = 1.0
    bad_parameter: int = -1
    fault_step: int = 1
    clip: str = ""
    accumulate: int = 1
    autocast: bool = False


class Trace(NamedTuple):
    """What happened on a rank.

    Args:
        scales: after each step.
        trackers: the good steps since the last change of the scale, after each step.
        skipped: for each step of each optimizer; empty with a scaler that does not tell.
        moved: whether the parameters changed, for each step of each optimizer.
        losses: of each call.
        parameters: at the end, whole ones.
    """

    scales: list[float]
    trackers: list[int]
    skipped: list[bool]
    moved: list[bool]
    losses: list[float]
    parameters: list[torch.Tensor]

    @property
    def common(self) -> tuple[Any, ...]:
        """What is the same on all ranks when they agree."""
        return self.scales, self.trackers, self.skipped, self.parameters


class Training:
    """A model, its optimizers and its scaler on one rank; ``run`` may be called again."""

    def __init__(self, rank: int, model: nn.Module, scaler: torch.amp.GradScaler, script: Script) -> None:
        self.rank, self.model, self.scaler, self.script = rank, model, scaler, script
        parameters = list(model.parameters())
        shares = [parameters] if len(script.optimizers) == 1 else [parameters[:2], parameters[2:]]
        self.optimizers = [OPTIMIZERS[name](share) for name, share in zip(script.optimizers, shares, strict=True)]
        self.data = torch.Generator().manual_seed(rank)
        self.trace = Trace([], [], [], [], [], [])
        self.steps = 0

    def run(self, calls: int, reduce: Callable[[], Any] = lambda: None) -> Training:
        """Calls the model so often, and makes a step wherever enough gradients were accumulated."""
        for call in range(1, calls + 1):
            self._backward()
            if call % self.script.accumulate == 0:
                self._step(reduce)
        self._zero_grad()
        return self

    def result(self) -> Trace:
        return self.trace._replace(parameters=whole_parameters(self.model))

    @property
    def at_fault(self) -> bool:
        return self.rank == 1 and self.steps == self.script.fault_step

    def _backward(self) -> None:
        batch = torch.randn(8, 3, generator=self.data)
        with torch.autocast("cpu", torch.float16) if self.script.autocast else nullcontext():
            loss = self.model(batch).float().square().mean()
        self.trace.losses.append(loss.item())
        self.scaler.scale(loss * self.script.bad_loss if self.at_fault else loss).backward()

    def _step(self, reduce: Callable[[], Any]) -> None:
        reduce()
        if self.at_fault and self.script.fault:
            add_fault(self.model, self.script.bad_parameter, self.script.fault)
        for optimizer in self.optimizers:
            owned = [p for group in optimizer.param_groups for p in group["params"]]
            before = [p.detach().clone() for p in owned]
            self._step_with(optimizer, owned)
            self.trace.moved.append(any(not same(p, old) for p, old in zip(owned, before, strict=True)))
            if hasattr(self.scaler, "skipped"):
                self.trace.skipped.append(self.scaler.skipped)
        self.scaler.update()
        self.trace.scales.append(self.scaler.get_scale())
        self.trace.trackers.append(self.scaler._get_growth_tracker())
        self._zero_grad()
        self.steps += 1

    def _step_with(self, optimizer: torch.optim.Optimizer, owned: list[torch.Tensor]) -> None:
        kwargs: dict[str, Any] = {"clip_norm": 0.1} if self.script.clip == "clip_norm" else {}
        if self.script.clip == "by hand":
            self.scaler.unscale_(optimizer)
            whole = self.model if isinstance(self.model, FullyShardedDataParallel) else None
            whole.clip_grad_norm_(0.1) if whole is not None else nn.utils.clip_grad_norm_(owned, 0.1)
        self.scaler.step(optimizer, **kwargs)

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def average(parameters: Sequence[torch.Tensor]) -> None:
    """The gradients averaged over the ranks, by hand."""
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def add_fault(model: nn.Module, index: int, fault: float) -> None:
    """Adds a number to one number of a gradient, of the part on this rank."""
    local = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    values = [gradient._values() if gradient.is_sparse else gradient for gradient in local]
    [gradient for gradient in values if gradient.numel()][index].view(-1)[0] += fault


def local_part(tensor: Any) -> torch.Tensor:
    """What this rank has of a ``DTensor``."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bitwise, of a ``DTensor`` the part on this rank."""
    return torch.equal(local_part(found), local_part(expected))


def whole_parameters(model: nn.Module) -> list[torch.Tensor]:
    """Copies, put together from all ranks where each has a part."""
    flat = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model) if flat else nullcontext():
        parameters: Iterator[Any] = model.parameters()
        return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in parameters]


class Collectives(TorchDispatchMode):
    """A context that notes the collectives started in it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Counting(Training):
    """Notes the collectives of each step and update."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.collectives: list[list[str]] = []

    def _step(self, reduce: Callable[[], Any]) -> None:
        with Collectives() as seen:
            super()._step(reduce)
        self.collectives.append(seen.names)
