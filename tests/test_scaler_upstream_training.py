"""A run that is scaled ends where one that never was ends: torch's class and ours, with every kind of optimizer.

The scale is a power of two throughout, so both runs are bitwise equal where no gradient leaves the normal range.
"""

import itertools
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_scaler_upstream import KINDS

INF, NAN = float("inf"), float("nan")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SETTINGS = {"init_scale": 128.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 1}
ITERATIONS, SKIPPED, RATE = 4, 2, 0.1
pytestmark = pytest.mark.parametrize("kind", KINDS)

RULES = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True, "maximize": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {}),
}
WAYS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
OPTIMIZERS = [f"{way} {rule}" for way, rule in itertools.product(WAYS, RULES)]


def make_optimizer(name, parameters):
    way, rule = name.split()
    optimizer, options = RULES[rule]
    return optimizer(parameters, lr=RATE, **options, **WAYS[way])


class Unscaled:
    """The control run: a scaler's methods without a scale, which skips the iterations it is told to."""

    def __init__(self, skipped):
        self.iteration, self.skipped = 0, skipped
        self.spared = None  # an optimizer that skips none

    def scale(self, output):
        return output

    def unscale_(self, optimizer):
        pass

    def step(self, optimizer):
        if self.iteration not in self.skipped or optimizer is self.spared:
            optimizer.step()

    def update(self):
        self.iteration += 1

    def get_scale(self):
        return 1.0


@dataclass
class Run:
    """One iteration's things; ``poison`` is what becomes of a gradient, None for nothing."""

    scaler: Any
    model: nn.Module
    optimizer: torch.optim.Optimizer
    x: torch.Tensor
    y: torch.Tensor
    poison: float | None = None

    def loss(self, part=slice(None)):
        return nn.functional.mse_loss(self.model(self.x[part]), self.y[part])

    def spoil(self):
        if self.poison is not None:
            self.model[1].weight.grad[1, 1] = self.poison


def plain(run):
    run.scaler.scale(run.loss()).backward()
    run.spoil()
    run.scaler.step(run.optimizer)


def clipped(run):
    run.scaler.scale(run.loss()).backward()
    run.spoil()
    run.scaler.unscale_(run.optimizer)
    nn.utils.clip_grad_norm_(run.model.parameters(), 0.2)
    run.scaler.step(run.optimizer)


def clipped_while_scaled(run):
    run.scaler.scale(run.loss()).backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 0.2 * run.scaler.get_scale())
    run.spoil()
    run.scaler.step(run.optimizer)


def penalized(run):
    loss, parameters = run.loss(), list(run.model.parameters())
    gradients = torch.autograd.grad(run.scaler.scale(loss), parameters, create_graph=True)
    squares = sum((g * (1.0 / run.scaler.get_scale())).square().sum() for g in gradients)
    run.scaler.scale(loss + squares.sqrt()).backward()
    run.spoil()
    run.scaler.step(run.optimizer)


def accumulated(run):
    for half in (slice(0, 4), slice(4, 8)):
        run.scaler.scale(run.loss(half) / 2).backward()
    run.spoil()
    run.scaler.step(run.optimizer)


def two_losses(run):
    first, (second,) = run.scaler.scale((run.loss(), [run.model(run.x).abs().mean()]))
    first.backward(retain_graph=True)
    second.backward()
    run.spoil()
    run.scaler.step(run.optimizer)


RECIPES = [plain, clipped, clipped_while_scaled, penalized, accumulated, two_losses]


def network(device="cpu"):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(device)


def batches(device="cpu"):
    numbers = torch.Generator().manual_seed(2)
    return [tuple(torch.randn(2, 8, 8, generator=numbers).to(device)) for _ in range(ITERATIONS)]


def train(scaler, recipe, name, *, device="cpu", after=lambda scaler: scaler):
    """Train with this recipe, and return what is left of it."""
    model = network(device)
    optimizer = make_optimizer(name, model.parameters())
    for i, (x, y) in enumerate(batches(device)):
        optimizer.zero_grad()
        bad = INF if i == SKIPPED and not isinstance(scaler, Unscaled) and scaler.is_enabled() else None
        recipe(Run(scaler, model, optimizer, x, y, bad))
        scaler.update()
        scaler = after(scaler)
    parameters = list(model.parameters())
    return scaler.get_scale(), [p.detach() for p in parameters], [p.grad for p in parameters], states(optimizer)


def states(optimizer):
    return optimizer.state_dict()["state"]


def check(ours, control, *, rtol=0.0, atol=0.0):
    torch.testing.assert_close(ours[1:], control[1:], rtol=rtol, atol=atol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_is_as_never_scaled(kind, name, recipe, device):
    scaled = train(kind(device, **SETTINGS), recipe, name, device=device)
    assert scaled[0] == 128.0 * 2**3 / 2
    # The norm that is clipped has a 1e-6 added to it, which is less beside a scaled one.
    close = {"rtol": 1e-4, "atol": 1e-4} if recipe is clipped_while_scaled else {}
    check(scaled, train(Unscaled({SKIPPED}), recipe, name, device=device), **close)


@pytest.mark.parametrize("recipe", RECIPES)
def test_disabled_is_as_never_scaled(kind, recipe):
    ours = train(kind("cpu", enabled=False), recipe, "fused adam")
    assert ours[0] == 1.0
    check(ours, train(Unscaled({}), recipe, "fused adam"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pickled_after_every_iteration(kind, name):
    def again(scaler):
        return pickle.loads(pickle.dumps(scaler))

    ours = train(kind("cpu", **SETTINGS), plain, name, after=again)
    assert ours[0] == 128.0 * 2**3 / 2
    check(ours, train(Unscaled({SKIPPED}), plain, name))


@pytest.mark.parametrize("way", WAYS)
def test_autocast_and_scaled_is_close_to_float32(kind, way):
    def autocast(run):
        with torch.autocast("cpu", torch.float16):
            loss = run.loss()
        run.scaler.scale(loss).backward()
        run.spoil()
        run.scaler.step(run.optimizer)

    ours = train(kind("cpu", **SETTINGS), autocast, f"{way} sgd")
    check(ours, train(Unscaled({SKIPPED}), plain, f"{way} sgd"), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_grad_scale_of_the_user_counts_too(kind, rule, first):
    """A fused optimizer divides by the scale that its user set, beside the scaler's."""

    def preset(run):
        run.optimizer.grad_scale = torch.tensor(4.0)
        run.scaler.scale(run.loss() * 4).backward()
        run.spoil()
        if first:
            run.scaler.unscale_(run.optimizer)
        run.scaler.step(run.optimizer)

    name = f"fused {rule}"
    check(train(kind("cpu", **SETTINGS), preset, name), train(Unscaled({SKIPPED}), plain, name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_after_unscale_is_taken_whatever_becomes_of_the_gradients(kind, name):
    scaler, model, (x, y) = kind("cpu", **SETTINGS), network(), batches()[0]
    optimizer = make_optimizer(name, model.parameters())
    scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
    scaler.unscale_(optimizer)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad.fill_(INF if i % 2 else NAN)
    scaler.step(optimizer)
    scaler.update()
    assert not any(p.isfinite().any() for p in model.parameters())
    assert scaler.get_scale() == 256.0


def train_two(scaler, way, bad):
    """Train two models on two losses of both; at one iteration the gradients of model ``bad`` overflow."""
    models = [network(), nn.Linear(8, 8)]
    optimizers = [
        make_optimizer(f"{way} {rule}", m.parameters()) for m, rule in zip(models, ("sgd", "adam"), strict=True)
    ]
    control = isinstance(scaler, Unscaled)
    if control:
        scaler.spared = optimizers[1 - bad]
    for i, (x, y) in enumerate(batches()):
        outputs = [model(x) for model in models]
        losses = [(a * outputs[0] + b * outputs[1] - y).square().mean() for a, b in ((0.25, 0.75), (0.5, -0.5))]
        for optimizer in optimizers:
            optimizer.zero_grad()
        for loss in scaler.scale(losses):
            loss.backward(retain_graph=True)
        if i == SKIPPED and not control:
            next(models[bad].parameters()).grad[0, 0] = NAN
        scaler.unscale_(optimizers[0])
        for optimizer in optimizers:
            scaler.step(optimizer)
        if not control:
            flags = [[flag.item() for flag in scaler._found_inf_per_device(o).values()] for o in optimizers]
            assert flags == [[float(i == SKIPPED and model == bad)] for model in range(2)]
        scaler.update()
    return scaler.get_scale(), [p.detach() for m in models for p in m.parameters()], [states(o) for o in optimizers]


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_only_the_optimizer_with_the_overflow_skips(kind, way, bad):
    ours = train_two(kind("cpu", **SETTINGS), way, bad)
    assert ours[0] == 128.0 * 2**3 / 2
    check(ours, train_two(Unscaled({SKIPPED}), way, bad))
