"""Random programs with views, writes, mixed dtypes, shared weights and regions keep the laws."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fxamp
from fxamp.dtypes import is_castable
from fxamp.plan import tensors_in
from tests.helpers import assert_same, graph_text, quiet, run

SIZE = 4
SEEDS = int(os.environ.get("FXAMP_SEEDS", "200"))  # thousands were run; these are for every day
REFUSALS = (RuntimeError, TypeError, IndexError)


class Choice(NamedTuple):
    """What a step works on: values with gradients, tensors that may be written to, a weight, and a number."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    w: Tensor
    k: int


class Step(NamedTuple):
    """A step of a program and which values it takes, as places in the two lists of values."""

    call: Callable[[Any, Choice], Any]
    places: tuple[float, float, float, float]
    weight: int
    k: int


class Program(nn.Module):
    """Runs random steps over two lists: values with gradients, and tensors that share memory and are written to."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(SIZE, SIZE) / 2) for _ in range(3))
        self.weights[2].requires_grad_(draw.random() < 0.7)
        self.other = nn.Parameter(torch.randn(SIZE, SIZE).to(draw.choice([torch.bfloat16, torch.float32])))
        self.norm, self.fc = nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE)
        self.recurrent, self.batch_norm = nn.GRU(SIZE, SIZE), nn.BatchNorm1d(SIZE)
        self.attention = nn.MultiheadAttention(SIZE, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(SIZE, SIZE))
        self.counting = Counting()
        self.register_buffer("table", torch.randn(SIZE, SIZE))
        self.register_buffer("index", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("mask", torch.eye(SIZE).bool())
        self.segments = [(draw.choice(REGIONS), _steps(draw)) for _ in range(draw.randint(1, 4))]

    def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> tuple[Any, ...]:
        values, plain = [x, y * scale], [y + 0, torch.arange(SIZE * SIZE).view(SIZE, SIZE)]
        for regions, steps in self.segments:
            with ExitStack() as stack:
                for region in regions:
                    stack.enter_context(region())
                for step in steps:
                    self._note(steps, step)
                    a, b, c, d = map(_pick, (values, values, plain, plain), step.places)
                    result = step.call(self, Choice(a, b, c, d, self.weights[step.weight], step.k))
                    if result is not None:
                        (plain if step.call in VIEWS else values).append(result)
        return tuple(values[2:]), {"plain": plain}

    def _note(self, steps: list[Step], step: Step) -> None:
        """Remembers what runs, so that a step that eager torch refuses can be left out."""
        if NOTED:
            NOTED[-1] = (steps, step)


NOTED: list[Any] = []


class Counting(nn.Module):
    """Python state that no graph can carry: it stays a call."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.fc = 0, nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.fc(x) * self.count


def _pick(pool: list[Tensor], place: float) -> Tensor:
    return pool[int(place * len(pool))]


def _steps(draw: random.Random) -> list[Step]:
    steps: list[Step] = []
    for _ in range(draw.randint(1, 5)):
        kind = draw.choice((VALUES, VALUES, VIEWS, WRITES))
        step = _step(draw, draw.choice(kind))
        if kind is WRITES and draw.random() < 0.7:  # what is cast before a write is cast again after it
            use = _step(draw, draw.choice(CASTS))
            steps += [use, step, use._replace(weight=draw.randrange(3))]
        else:
            steps.append(step)
    return steps


def _step(draw: random.Random, call: Callable[[Any, Choice], Any]) -> Step:
    places = draw.random(), draw.random(), draw.random(), draw.random()
    return Step(call, places, draw.randrange(3), draw.randrange(4))


def _autocast(**options: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: torch.autocast("cpu", **options)


REGIONS: list[tuple[Callable[[], AbstractContextManager[Any]], ...]] = [
    (),
    (),
    (),
    (_autocast(enabled=False),),
    (_autocast(dtype=torch.bfloat16),),
    (_autocast(dtype=torch.bfloat16, cache_enabled=False),),
    (_autocast(enabled=False), _autocast(dtype=torch.bfloat16)),
    (_autocast(dtype=torch.bfloat16), _autocast(enabled=False)),
    (torch.no_grad,),
    (torch.no_grad, torch.enable_grad),
    (torch.no_grad, _autocast(enabled=False)),
]

# -- steps that give a new value, with gradients --------------------------------------------------------

VALUES: list[Callable[[Any, Choice], Any]] = [
    lambda m, o: torch.matmul(o.a, o.b),
    lambda m, o: torch.mm(o.a.float(), o.c.float()),
    lambda m, o: o.c @ o.w + o.d @ o.w.t(),
    lambda m, o: F.linear(o.a, o.w),
    lambda m, o: F.linear(F.linear(o.b, o.w).float(), o.w, m.norm.bias),
    lambda m, o: torch.mm(o.a.float(), m.other.float()) + o.a * m.other,
    lambda m, o: o.a.float() @ o.w.t() + o.b.float() @ o.w[:, :SIZE],
    lambda m, o: o.a.float() @ m.table + o.c.float() @ m.table,
    lambda m, o: o.a + o.b * 0.5,
    lambda m, o: (o.a - o.c).softmax(-1),
    lambda m, o: F.log_softmax(o.a, o.k % 2),
    lambda m, o: m.norm(o.a.float()).to(o.a.dtype),
    lambda m, o: m.recurrent(o.a.float().unsqueeze(0))[0].squeeze(0),
    lambda m, o: torch.einsum("ij,jk->ik", o.a.float(), o.w),
    lambda m, o: torch.cat([o.a[:2], o.b[2:]]),
    lambda m, o: torch.cat((o.a, o.c), dim=1)[:, o.k : o.k + SIZE],
    lambda m, o: torch.stack([o.a, o.b]).sum(0),
    lambda m, o: torch.stack([o.c, o.a, o.w], -1).mean(dim=-1),
    lambda m, o: torch.cat((o.a * 1).chunk(2, dim=1)[::-1], 1),
    lambda m, o: o.a.float().sort(-1).values + o.a.float().sort(-1)[1],
    lambda m, o: o.a.max(0).values + o.a.topk(SIZE).values @ o.w,
    lambda m, o: o.a - F.mse_loss(o.a.float(), o.b.float()) + F.cross_entropy(o.a, m.index),
    lambda m, o: (o.a.double() @ o.b.double()).float(),
    lambda m, o: (o.a.double() * o.c).to(o.b.dtype),
    lambda m, o: o.a.half() + o.b.bfloat16(),
    lambda m, o: o.a * o.k + o.c,
    lambda m, o: torch.where(o.c > 0, o.a, o.b),
    lambda m, o: torch.where(m.mask, o.a, -1e30).softmax(-1) @ o.c,
    lambda m, o: o.a.masked_fill(m.mask, torch.finfo(o.a.dtype).min).exp(),
    lambda m, o: m.fc(input=o.a) + m.fc(o.c.float()),
    lambda m, o: m.normed(m.normed(o.a).float()),
    lambda m, o: m.batch_norm(o.a.float()) @ o.w,
    lambda m, o: m.attention(o.a.float(), o.b.float(), o.b.float(), need_weights=False)[0],
    lambda m, o: m.counting(o.a) + o.a @ m.counting.fc.weight,
    lambda m, o: m.counting(x=o.c),
    lambda m, o: checkpoint(lambda t: torch.tanh(t @ o.w) @ o.w, o.a, use_reentrant=False),
    lambda m, o: F.dropout(o.a, 0.5, m.training) @ o.w,
    lambda m, o: o.a[m.index] + o.c[m.index, m.index],
    lambda m, o: o.a.gather(1, o.a.argsort(1)) + o.w[m.index],
    lambda m, o: F.embedding(m.index, o.w) @ o.a,
    lambda m, o: torch.addmm(o.a, o.c, o.w) + torch.baddbmm(o.a[None], o.b[None], o.w[None])[0],
    lambda m, o: F.scaled_dot_product_attention(o.a[None], o.b[None], o.c[None])[0],
    lambda m, o: (
        torch.fft.fft(o.a.float()).real + torch.view_as_complex(o.a.float().view(SIZE, 2, 2)).abs().repeat(1, 2)
    ),
    lambda m, o: sum([o.a, o.b, o.c]),
    lambda m, o: o.a.detach().requires_grad_() @ o.w,
    lambda m, o: o.a.clone().detach().float().requires_grad_() @ o.a,
    lambda m, o: (o.a @ o.w).new_zeros(SIZE, SIZE) + torch.zeros_like(o.a) + o.c.new_ones(SIZE),
    lambda m, o: torch.full_like(o.a, 0.5) * torch.arange(SIZE, dtype=o.b.dtype) + torch.tensor(2.0),
    lambda m, o: _written(o.a, lambda t: t.add_(o.c).mul_(0.5)),
    lambda m, o: _written(o.a @ o.w, lambda t: t[1].copy_(o.b[0])),
    lambda m, o: _written(o.a, lambda t: t.view(-1)[o.k :].zero_()),
    lambda m, o: _written(o.a.float(), lambda t: t.index_add_(0, m.index, o.b.float())),
    lambda m, o: o.a.pow(2).mean() + o.a.norm() * o.b,
    lambda m, o: o.a @ o.w[:, 0] + torch.mv(o.w, o.a[0].float()) + o.a,
    lambda m, o: (o.a > o.b).float() @ o.w,
    lambda m, o: m.other @ o.w + o.a,
]


def _written(t: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    result = t + 0  # writes must not reach what autograd saved, nor the inputs
    write(result)
    return result


# What casts a tensor that may be written to.
CASTS: list[Callable[[Any, Choice], Any]] = [
    lambda m, o: o.c @ o.w,
    lambda m, o: torch.mm(o.c, m.table) + o.d @ m.table,
    lambda m, o: F.linear(o.c.float(), o.w, m.norm.bias),
    lambda m, o: torch.stack([o.c, o.a @ o.w]).sum(0),
    lambda m, o: F.mse_loss(o.c, o.d) + o.a @ o.c.t(),
    lambda m, o: m.counting.fc(o.c) @ o.d.to(o.c.dtype),
]


# -- steps that give a tensor which may be written to: a new one, or a view of another -----------------------

VIEWS: list[Callable[[Any, Choice], Any]] = [
    lambda m, o: o.a.detach() + 0,
    lambda m, o: o.c.clone(),
    lambda m, o: o.c,
    lambda m, o: o.c.float(),
    lambda m, o: o.c.to(o.d.dtype),
    lambda m, o: o.c.type_as(m.table),
    lambda m, o: o.c.bfloat16(),
    lambda m, o: o.c.half(),
    lambda m, o: o.c.double(),
    lambda m, o: o.c.long(),
    lambda m, o: o.c > 0,
    lambda m, o: o.c.t(),
    lambda m, o: o.c.transpose(0, 1),
    lambda m, o: o.c.permute(1, 0),
    lambda m, o: o.c.view(2, 8).view(SIZE, SIZE),
    lambda m, o: o.c.reshape(-1).reshape(SIZE, SIZE),
    lambda m, o: o.c.contiguous(),
    lambda m, o: o.c.unflatten(0, (2, 2)).flatten(0, 1),
    lambda m, o: o.c[None].squeeze(0),
    lambda m, o: o.c[o.k].expand(SIZE, SIZE),
    lambda m, o: o.c[:, o.k : o.k + 1].expand(SIZE, SIZE),
    lambda m, o: o.c.diagonal().expand(SIZE, SIZE),
    lambda m, o: o.c.unsqueeze(0).expand(2, SIZE, SIZE)[1],
    lambda m, o: o.c.chunk(2)[0].repeat(2, 1),
    lambda m, o: o.c.split(SIZE)[0],
    lambda m, o: torch.stack(o.c.unbind(1)),
    lambda m, o: o.c.flip(0),
    lambda m, o: o.c[m.index],
    lambda m, o: o.c[...],
    lambda m, o: o.c.detach(),
    lambda m, o: o.c.data,
    lambda m, o: o.c.view_as(o.d),
    lambda m, o: torch.atleast_2d(o.c),
    lambda m, o: torch.as_tensor(o.c),
    lambda m, o: o.c.narrow(0, 0, SIZE),
    lambda m, o: o.c.movedim(0, 1).mT,
    lambda m, o: m.table,
    lambda m, o: m.table.view(-1).view(SIZE, SIZE),
    lambda m, o: torch.broadcast_tensors(o.c, o.d)[0],
    lambda m, o: o.c @ o.d,
    lambda m, o: (o.c.detach() @ m.table).detach(),
]

# -- steps that write -------------------------------------------------------------------------------------------

WRITES: list[Callable[[Any, Choice], Any]] = [
    lambda m, o: _done(o.c.mul_(0.5)),
    lambda m, o: _done(o.c.add_(o.d)),
    lambda m, o: _done(o.c.sub_(1).clamp_(-3, 3)),
    lambda m, o: _done(o.c.copy_(o.a.detach())),
    lambda m, o: _done(o.c.copy_(o.d)),
    lambda m, o: _done(o.c[o.k].fill_(1)),
    lambda m, o: _done(o.c.t()[o.k].zero_()),
    lambda m, o: _done(o.c.diagonal().fill_(2)),
    lambda m, o: _done(o.c.view(-1)[::2].mul_(2)),
    lambda m, o: _done(o.c.chunk(2)[1].add_(1)),
    lambda m, o: _done(o.c.unbind(1)[o.k].neg_()),
    lambda m, o: _done(o.c.transpose(0, 1).narrow(0, 0, 2).mul_(3)),
    lambda m, o: _done(F.relu(o.c, inplace=True)),
    lambda m, o: _done(torch.relu_(o.c)),
    lambda m, o: _done(o.c.masked_fill_(m.mask, 0)),
    lambda m, o: _done(o.c.index_fill_(0, m.index[:2], 0.5)),
    lambda m, o: _done(o.c.index_copy_(0, m.index, o.d)),
    lambda m, o: _done(o.c.index_put_((m.index,), o.d)),
    lambda m, o: _done(o.c.scatter_(0, m.index[None], 0.25)),
    lambda m, o: _done(torch.mul(o.c, o.c, out=o.c)),
    lambda m, o: _done(torch.mm(o.d, m.table, out=o.c)),
    lambda m, o: _done(torch.add(o.c, o.d, out=o.c)),
    lambda m, o: _done(o.c.addmm_(o.d, m.table)),
    lambda m, o: _done(m.table.mul_(0.9).add_(o.d, alpha=0.1)),
    lambda m, o: _done(m.table[o.k].copy_(o.d[0])),
    lambda m, o: _set(o.c, o.k, o.d[0]),
    lambda m, o: _set(o.c, (slice(None), o.k), 0.25),
    lambda m, o: _set(o.c, m.mask, 0.0),
    lambda m, o: _set(o.c, m.index[:2], o.d[:2]),
    lambda m, o: _set(o.c, ..., o.a.detach()),
    lambda m, o: _augment(o.c, o.d),
    lambda m, o: _augment(o.c[1:], 1),
    lambda m, o: _augment_item(o.c, o.k),
]


def _done(result: Any) -> None:
    del result


def _set(target: Tensor, index: Any, value: Any) -> None:
    target[index] = value


def _augment(target: Tensor, value: Any) -> None:
    target += value
    target *= 0.5


def _augment_item(target: Tensor, k: int) -> None:
    target[k] += 1
    target[:, k] *= 0.5


# -- running them -------------------------------------------------------------------------------------------------


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(SIZE, SIZE, requires_grad=True), torch.randn(SIZE, SIZE)


def eager(policy: str) -> AbstractContextManager[Any]:
    return nullcontext() if policy == "full" else torch.autocast("cpu", torch.bfloat16)


def runnable(seed: int, policy: str, *, training: bool = True) -> tuple[Callable[[], Program], Any]:
    """Makes the program of a seed without the steps that eager torch refuses, and what eager torch gives for it."""
    left_out: list[tuple[int, int]] = []

    def make() -> Program:
        program = Program(seed).train(training)
        for segment, step in left_out:
            del program.segments[segment][1][step]
        return program

    while True:
        program = make()
        NOTED.append(None)
        try:
            with quiet():
                expected = run(program, inputs(), {}, eager(policy))
            return make, (*expected, dict(program.named_buffers()))
        except REFUSALS:
            steps, step = NOTED[-1]
            segment = next(i for i, (_, each) in enumerate(program.segments) if each is steps)
            left_out.append((segment, steps.index(step)))
        finally:
            NOTED.pop()


def check(seed: int, policy: str) -> None:
    """The converted program of a seed is what eager torch does, and converting keeps the laws."""
    make, expected = runnable(seed, policy, training=seed % 3 > 0)
    model = make()
    examples = ((inputs()[0].detach(), inputs()[1]), {}) if seed % 2 else None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    amp = fxamp.convert(model, dtype=torch.bfloat16, policy=policy, example_inputs=examples)
    again = fxamp.convert(model, dtype=torch.bfloat16, policy=policy, example_inputs=examples)
    assert graph_text(amp.graph) == graph_text(again.graph), f"seed {seed}: converted twice"
    assert_same(dict(model.state_dict()), before, f"seed {seed}: what was converted")
    keeps_the_laws(amp, seed)
    with quiet():
        output, gradients = run(amp, inputs(), {}, nullcontext())
    found, buffers = {n: gradients[n] for n in expected[1]}, dict(amp.named_buffers())
    if policy == "fast":
        assert_close((output, buffers), (expected[0], expected[2]), seed)
        return
    assert_same(output, expected[0], f"seed {seed}: output")
    assert_same(found, expected[1], f"seed {seed}: gradient")
    assert_same(buffers, expected[2], f"seed {seed}: buffer")


def assert_close(found: Any, expected: Any, seed: int) -> None:
    """The same but for roundings, of which these programs make many, and magnify some."""
    for ours, theirs in zip(*map(pytree.tree_leaves, (found, expected)), strict=True):
        if isinstance(theirs, Tensor) and theirs.is_floating_point():
            assert ours.shape == theirs.shape
            a, b = (torch.nan_to_num(t.detach().double(), posinf=0, neginf=0) for t in (ours, theirs))
            assert (a - b).norm() <= 0.05 * b.norm() + 0.02, f"seed {seed}: {(a - b).norm()} off, of {b.norm()}"


def keeps_the_laws(amp: fxamp.AmpModule, seed: int) -> None:
    report = amp.report().to_dict()
    casts = [node for node in amp.graph.nodes if "cast" in node.meta]
    assert sum(row["casts"] for row in report["nodes"]) == report["totals"]["casts"] == len(casts), seed
    assert report["totals"]["casts"] == report["totals"]["weight_casts"] + report["totals"]["activation_casts"], seed
    for decision in amp.plan:
        assert not (decision.casts and decision.reason == "in-place"), f"seed {seed}: {decision.name}"
        for cast in decision.casts:
            known = {value.dtype for value in tensors_in(decision.inputs[cast.slot])} - {None}
            assert cast.soft or all(map(is_castable, known)), f"seed {seed}: {decision.name}"


POLICIES = ["autocast", "fast", "full"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("start", range(0, SEEDS, 20))
def test_random_programs_are_eager_ones(policy: str, start: int) -> None:
    """Bit by bit, but for "fast"."""
    for seed in range(start, start + 20):
        check(seed, policy)
