"""One training run with a fault, on one rank, with one scaler or the other; and what is seen on the way."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fxamp
from tests.fault_kinds import KINDS, parameter_of
from tests.fault_models import SAMPLES
from tests.fault_oracle import Culprit, culprit
from tests.helpers import quiet

__all__ = ["OPTIMIZERS", "STEPS", "Run", "Skip", "play"]

STEPS = 8
PROPOSALS = 24
CLIP_NORM = 0.5
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@dataclass
class Skip:
    """What is known of a skipped step.

    Attributes:
        step: which one.
        found: what the scaler says of it.
        opaque: whether that is of a module that is not traced into.
        names: of the parameter that a fault outside of the graphs is of.
        expected: what the oracle says of the calls of this rank in which something is not finite.
        mendable: whether it was an overflow of float16 in the forward, that float32 would have held.
        mended: how many proposals of the report it took until the step was finite; None: it was not.
    """

    step: int
    found: Any
    opaque: bool
    names: frozenset[str]
    expected: list[Culprit]
    mendable: bool = False
    mended: int | None = None


@dataclass
class Run:
    """What became of a run on one rank, step by step."""

    moved: list[tuple[bool, ...]] = field(default_factory=list)
    scales: list[tuple[float, int]] = field(default_factory=list)
    parameters: list[list[torch.Tensor]] = field(default_factory=list)
    buffers: list[torch.Tensor] = field(default_factory=list)
    random_state: torch.Tensor | None = None
    skips: list[Skip] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def play(rank: int, case: Any) -> tuple[Run, Run]:
    """The run of a case with the scaler of fxamp, and with torch's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # of the first layer
        player = _Player(rank, case)
        return player.play(torchs=False), player.play(torchs=True)


class _Player:
    def __init__(self, rank: int, case: Any) -> None:
        self.case, self.rank = case, rank
        self.sample, self.fault = SAMPLES[case.model], KINDS[case.kind](case.value)
        torch.manual_seed(case.seed)
        model = self.sample.make()
        self.fault.put(model, case.layer)
        self.model, self.twin = model, copy.deepcopy(model)
        loss = None if case.outside else self.sample.loss
        self.amp: Any = fxamp.convert(model, loss, dtype=torch.float16, device_type="cpu")
        self.net: Any = self.amp
        if case.world > 1:
            with quiet():  # torch 2.13 has another name for that
                views = case.seed % 2 == 0 and not self.sample.sparse
                self.net = DistributedDataParallel(self.amp, broadcast_buffers=False, gradient_as_bucket_view=views)
        self.start = copy.deepcopy(self.amp.state_dict())

    def _begin(self, torchs: bool) -> None:
        case, self.torchs = self.case, torchs
        self.amp.load_state_dict(self.start)
        self.amp.zero_grad()
        self.scaler = self._scaler()
        parameters = list(self.amp.parameters())
        half = len(parameters) // 2
        groups = [parameters[:half], parameters[half:]] if case.two else [parameters]
        self.optimizers = [OPTIMIZERS[case.optimizer](group) for group in groups[:: 1 if case.seed % 2 else -1]]
        self.generator = torch.Generator().manual_seed(2 * case.seed + self.rank)
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]] = []
        self.run = Run()
        torch.manual_seed(7 + self.rank)

    def _scaler(self) -> Any:
        settings: Any = {"init_scale": 2.0 ** (21 if self.case.kind == "scale too large" else 10), "growth_interval": 3}
        if self.torchs:
            return torch.amp.GradScaler("cpu", **settings)
        scaler = fxamp.GradScaler("cpu", **settings)
        if not self.case.own:
            self.amp.scaler = scaler
        return scaler

    def play(self, torchs: bool) -> Run:
        case = self.case
        self._begin(torchs)
        for step in range(STEPS):
            faulty = step == case.step
            here = faulty and self.rank == case.rank
            before = [parameter.detach().clone() for parameter in self.amp.parameters()]
            if here:
                self.fault.switch(self.model, case.layer, True)
            self._step(step, here, faulty)
            if here:
                self.fault.switch(self.model, case.layer, False)
            if faulty and case.world > 1 and self.fault.place == "parameter":
                for parameter in self.amp.parameters():
                    distributed.broadcast(parameter.detach(), 0)
            self._note(before)
        self.run.buffers = [buffer.clone() for buffer in self.amp.buffers()]
        self.run.random_state = torch.get_rng_state()
        return self.run

    def _step(self, step: int, here: bool, faulty: bool) -> None:
        case, scaler = self.case, self.scaler
        self.calls = []
        self.twin.load_state_dict(self.model.state_dict())
        for batch in range(case.batches):
            x, y = self.sample.batch(self.generator)
            if here and batch == 0:
                x, y = self.fault.given(x, y)
            self.calls.append((torch.get_rng_state(), x, y, scaler.get_scale()))
            joint = contextlib.nullcontext() if case.world == 1 or batch == case.batches - 1 else self.net.no_sync()
            with joint:
                loss = self.sample.loss(self.net(x).float(), y) if case.outside else self.net(x, y)[0]
                scaler.scale(loss).backward()
        if here or (faulty and self.torchs):  # torch's scaler asks no other rank
            self.fault.written(self.model, case.layer)
        for optimizer in self.optimizers:
            self._step_optimizer(optimizer)
            if not case.late:
                self._look(step)
        scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if case.late:
            self._look(step)

    def _step_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self.case.clip == "step" and not self.torchs:
            self.scaler.step(optimizer, clip_norm=CLIP_NORM)
            return
        if self.case.clip:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP_NORM)
        self.scaler.step(optimizer)

    def _note(self, before: list[torch.Tensor]) -> None:
        parameters = list(self.amp.parameters())
        moved = {id(p) for p, kept in zip(parameters, before, strict=True) if not torch.equal(p, kept)}
        groups = [optimizer.param_groups[0]["params"] for optimizer in self.optimizers]
        self.run.moved.append(tuple(any(id(p) in moved for p in group) for group in groups))
        self.run.parameters.append([parameter.detach().clone() for parameter in parameters])
        self.run.scales.append((self.scaler.get_scale(), int(self.scaler._growth_tracker)))

    # -- at a skipped step -----------------------------------------------------------------------------

    def _look(self, step: int) -> None:
        if self.torchs or not self.scaler.skipped or (self.case.lone and self.rank != self.case.rank):
            return
        before = self._state()
        found = self.scaler.overflow()
        if not all(map(torch.equal, before, self._state())):
            self.run.problems.append(f"rank {self.rank}: overflow() at step {step} leaves a trace")
        if not self.run.skips and self.scaler.overflow() != found:
            self.run.problems.append(f"rank {self.rank}: overflow() at step {step} says another thing the second time")
        kept, random_state = self.amp.state_dict(), torch.get_rng_state()
        kept = {name: tensor.clone() for name, tensor in kept.items()}
        opaque = any(decision.rule == "opaque" for decision in self.amp.plan if decision.name == found.node)
        skip = Skip(step, found, opaque, self._names(), self._expected())
        again = [other for other in self.run.skips if other.step == step]
        if self.fault.overflows and not again and any(e.phase == "forward" for e in skip.expected):
            skip.mendable = self._fits_float32()
            skip.mended = self._mended(found) if skip.mendable else None
        self.amp.load_state_dict(kept)
        torch.set_rng_state(random_state)
        self.run.skips.append(skip)

    def _names(self) -> frozenset[str]:
        if not self.fault.outside:
            return frozenset()
        parameter = parameter_of(self.model, self.case.layer)
        named = self.amp.named_parameters(remove_duplicate=False)
        return frozenset(name for name, other in named if other is parameter)

    def _state(self) -> list[torch.Tensor]:
        gradients = [p.grad.to_dense() for p in self.amp.parameters() if p.grad is not None]
        states = [value for o in self.optimizers for state in o.state.values() for value in state.values()]
        tensors = [*self.amp.parameters(), *self.amp.buffers(), self.scaler._scale, self.scaler._growth_tracker]
        tensors += [value for value in states if isinstance(value, torch.Tensor)]
        return [_bits(tensor) for tensor in (*gradients, *tensors)] + [torch.get_rng_state()]

    def _expected(self) -> list[Culprit]:
        """What the oracle says of the calls of this step."""
        found = []
        for state, x, y, scale in self.calls:
            torch.set_rng_state(state)
            found.append(culprit(self.twin, self.sample.loss, x, y, scale))
        return [one for one in found if one is not None]

    def _fits_float32(self) -> bool:
        state, x, y, _ = self.calls[0]
        torch.set_rng_state(state)
        loss = self.sample.loss(self.twin(x), y)
        gradients = torch.autograd.grad(loss, list(self.twin.parameters()))
        return all(bool(gradient.to_dense().isfinite().all()) for gradient in gradients)

    def _mended(self, found: Any) -> int | None:
        """How many proposals, each of a report of its own, it takes until the step is finite."""
        amp, count, parameters = self.amp, 0, list(self.amp.parameters())
        kept = [parameter.grad for parameter in parameters]
        scaler = fxamp.GradScaler("cpu", init_scale=1.0, process_group=False)
        scaler.scale(torch.ones(()))
        scaler.update(1.0)  # the iteration of the call that failed is over
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        while found is not None and found.overrides and count < PROPOSALS:
            policy = amp.policy
            amp = amp.replan((policy.with_modules if found.module else policy.with_ops)(found.overrides))
            found, count = self._tried(amp, scaler, optimizer), count + 1
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
        return count if found is None else None

    def _tried(self, amp: Any, scaler: fxamp.GradScaler, optimizer: torch.optim.Optimizer) -> Any:
        """What is said of the same step with other casts."""
        state, x, y, _ = self.calls[0]
        torch.set_rng_state(state)
        optimizer.zero_grad()
        scaler.backward(self.sample.loss(amp(x).float(), y) if self.case.outside else amp(x, y)[0])
        scaler.step(optimizer)
        scaler.update()
        return scaler.overflow()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().reshape(-1).view(torch.uint8)
