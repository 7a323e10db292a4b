"""Training scripts for gradient scalers, and their faults."""

import pytest
import torch
from torch import nn

from fxamp.scaling import GradScaler

INF, NAN = float("inf"), float("nan")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    # No momentum: torch 2.13 reads an uninitialized buffer where the very first step is skipped.
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}
SETTINGS = {"init_scale": 1024.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3}


def small_model(device="cpu"):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(device)


def poison(model, step, bad):
    """Put a non-finite value into one gradient at the steps that ``bad`` names."""
    if step in bad:
        model[2].weight.grad[0, 1] = bad[step]


def drive(scaler, make, bad, *, steps=12, unscale=False, device="cpu"):
    """One training script; what it did, as plain values to compare bitwise."""
    model = small_model(device)
    optimizer = make(model.parameters())
    scales, moved = [], []
    data = torch.randn(steps, 5, 3, generator=torch.Generator().manual_seed(2)).to(device)
    for step in range(steps):
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model(data[step]).square().mean()).backward()
        poison(model, step, bad)
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
    return scales, moved, [p.detach().clone() for p in model.parameters()], optimizer.state_dict()["state"]


def overflowed(device="cpu", make=OPTIMIZERS["sgd"], **settings):
    """A scaler right after a skipped step, with its model and optimizer."""
    model = small_model(device)
    optimizer, scaler = make(model.parameters()), GradScaler(device, **settings)
    scaler.backward(model(torch.ones(2, 3, device=device)).sum())
    poison(model, 0, {0: INF})
    scaler.step(optimizer)
    return scaler, model, optimizer
