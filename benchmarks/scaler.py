"""What does a gradient scaler cost, beside torch's?

``python -m benchmarks.scaler`` prints two tables. The first has ``step`` and ``update`` with 40 small parameters, in
microseconds: the optimizer alone, with torch's scaler and with fxamp's, and what the scalers add, as a ratio; then, of
fxamp's, the passes over the gradients and how often the host waits. The second has a training step of a small converted
network with and without the notes that ``overflow()`` needs. All of a row are timed in turns; medians of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxamp
from benchmarks.timing import time_in_turns
from fxamp.scaling.trail import Trail

PARAMETERS = 40
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.0),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.0, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.0, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.0),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.0, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.0, fused=True),
}


class Counted(TorchDispatchMode):
    """Counts the calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def iteration(scaler: Any, make: Callable[..., torch.optim.Optimizer], device: str) -> Callable[[], None]:
    """One step and update; None as a scaler: the step alone."""
    parameters = [nn.Parameter(torch.ones(16, 16, device=device)) for _ in range(PARAMETERS)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make(parameters)
    if scaler is None:
        return lambda: optimizer.step()
    scaler.scale(torch.ones((), device=device))

    def run() -> None:
        scaler.step(optimizer)
        scaler.update()

    return run


def medians(ways: Mapping[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Microseconds of each."""
    timed = time_in_turns(ways, rounds, device)
    return {name: statistics.median(each.seconds) * 1e6 for name, each in timed.items()}


def waits(way: Callable[[], None], device: str) -> int:
    """How often the host reads a number of the device; on a GPU, how often torch says that it waits."""
    if device != "cuda":
        with Counted() as counted:
            way()
        return counted.calls["_local_scalar_dense"]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            way()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen)


def of_optimizer(name: str, device: str, rounds: int) -> list[Any]:
    """A row of the first table."""
    make = OPTIMIZERS[name]
    settings = {"init_scale": 1.0, "growth_interval": 10**9}
    ways = {
        "alone": iteration(None, make, device),
        "torch": iteration(torch.amp.GradScaler(device, **settings), make, device),
        "fxamp": iteration(fxamp.GradScaler(device, **settings), make, device),
    }
    found = medians(ways, rounds, device)
    alone = waits(ways["alone"], device)
    with Counted() as counted:
        ways["fxamp"]()
    added = [found[kind] - found["alone"] for kind in ("torch", "fxamp")]
    passes = counted.calls["_amp_foreach_non_finite_check_and_unscale_"]
    waited = [waits(ways[kind], device) - alone for kind in ("torch", "fxamp")]
    return [name, *found.values(), added[1] / added[0], passes, *waited]


def of_notes(device: str, rounds: int) -> list[Any]:
    """The row of the second table."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).to(device)
    amp = fxamp.convert(model, F.cross_entropy, dtype=torch.float16)
    x, y = torch.randn(8, 32, device=device), torch.zeros(8, dtype=torch.int64, device=device)
    optimizer = torch.optim.SGD(amp.parameters(), lr=0.0)

    def noted() -> None:
        amp.scaler.backward(amp(x, y)[0])
        amp.scaler.step(optimizer)
        amp.scaler.update()

    def bare() -> None:
        with mock.patch.object(Trail, "run", lambda trail, module, variant, values: module._run(variant, values)):
            noted()

    def patched() -> None:  # with what patching alone takes
        with mock.patch.object(Trail, "run", Trail.run):
            noted()

    found = medians({"without": bare, "with": patched}, rounds, device)
    return [*found.values(), found["with"] / found["without"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [of_optimizer(name, given.device, given.rounds) for name in OPTIMIZERS]
    headers = ("40 parameters", "alone", "torch", "fxamp", "added", "passes", "waits, torch", "waits, fxamp")
    print(tabulate(rows, headers, floatfmt=("", ".0f", ".0f", ".0f", ".2f", "", "", "")))
    print()
    headers = ("training step without notes", "with", "ratio")
    print(tabulate([of_notes(given.device, given.rounds)], headers, floatfmt=(".0f", ".0f", ".3f")))


if __name__ == "__main__":
    main()
