"""Training that stops at any step and goes on in a new process has the same losses, bit for bit."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxamp

STEPS, BAD = 9, (2, 3, 6)
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


class Training:
    """A model with dropout and batch norm, an optimizer, a scaler whose scale moves, a learning rate that follows."""

    def __init__(self, name):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
        self.amp = fxamp.convert(model, F.cross_entropy, dtype=torch.float16, device_type="cpu")
        self.amp.scaler = fxamp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        self.optimizer = OPTIMIZERS[name](self.amp.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)

    def step(self, number):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)
        if number in BAD:
            x[3, 3] = float("inf")
        loss, _ = self.amp(x, y)
        scaler = self.amp.scaler
        scaler.backward(loss)
        scaler.step(self.optimizer, clip_norm=1.0)
        scaler.update()
        if not scaler.skipped:
            self.scheduler.step()
        else:  # the statistics of the batch would stay infinite
            self.amp.get_submodule("1").reset_running_stats()
        self.optimizer.zero_grad()
        return loss.item(), scaler.get_scale(), scaler.skipped

    def parts(self):
        return {name: getattr(self, name) for name in ("amp", "optimizer", "scheduler")} | {"scaler": self.amp.scaler}

    def save(self):
        states = {name: part.state_dict() for name, part in self.parts().items()}
        return copy.deepcopy(states) | {"random": torch.get_rng_state()}

    def load(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])


def go_on(path, threads):
    """Continues every training of the file from where it stopped, and writes what came then."""
    torch.set_num_threads(threads)  # sums depend on how they are split
    found = {}
    for (name, stop), state in torch.load(path).items():
        training = Training(name)
        training.load(state)
        found[name, stop] = [training.step(number) for number in range(stop, STEPS)], training.save()
    torch.save(found, path)


def test_a_run_goes_on_in_a_new_process(tmp_path):
    path, whole, states = tmp_path / "states.pt", {}, {}
    for name in OPTIMIZERS:
        training, seen = Training(name), []
        for number in range(STEPS):
            states[name, number] = training.save()
            seen.append(training.step(number))
        whole[name] = seen, training.save()
        assert [skipped for *_, skipped in seen] == [number in BAD for number in range(STEPS)]
        assert len({scale for _, scale, _ in seen}) > 2
    torch.save(states, path)
    code = f"from tests.test_scaler_resume import go_on; go_on({str(path)!r}, {torch.get_num_threads()})"
    subprocess.run([sys.executable, "-c", code], check=True)
    for (name, stop), (seen, state) in torch.load(path).items():
        curve, end = whole[name]
        torch.testing.assert_close((seen, state), (curve[stop:], end), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kinds", [(fxamp.GradScaler, torch.amp.GradScaler), (torch.amp.GradScaler, fxamp.GradScaler)])
def test_a_run_goes_on_with_the_other_scaler(kinds):
    settings = {"device": "cpu", "init_scale": 2.0**10, "growth_interval": 2}
    curves = []
    for switches in (False, True):
        training, seen = Training("adamw"), []
        scaler = kinds[0](**settings)
        for number in range(STEPS):
            if switches and number == 4:
                state, scaler = scaler.state_dict(), kinds[1](device="cpu")
                scaler.load_state_dict(state)
            generator = torch.Generator().manual_seed(number)
            x, y = torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)
            loss, _ = training.amp(x, y)
            scaler.scale(loss).backward()
            if number in BAD:
                next(training.amp.parameters()).grad[0, 0] = float("nan")
            scaler.step(training.optimizer)
            scaler.update()
            training.optimizer.zero_grad()
            seen.append((loss.item(), scaler.get_scale()))
        curves.append(seen)
    assert curves[0] == curves[1]
