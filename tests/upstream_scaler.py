"""Runs torch's own tests of its gradient scaler with ours in its place.

    python -m tests.upstream_scaler ~/pytorch/test

The checkout's version has to be that of the torch that is installed; more arguments go to pytest, for example ``-x``.
Every name of torch's scaler stands for ours then, and its deprecated and sharded scalers are built on it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import sharded_grad_scaler

import fxamp

FILES = [
    "test_torch.py",
    "test_cuda.py",
    "test_cuda_multigpu.py",
    "distributed/fsdp/test_fsdp_sharded_grad_scaler.py",
    "distributed/_composable/fsdp/test_fully_shard_grad_scaler.py",
]
TESTS = "grad_scal or gradscaler or gradient_scaler or scaling_fused or grads_invalidated"


def put_in_place() -> None:
    """Give torch's names to our scaler, and make it the base of the scalers that torch builds on its own."""
    for module in (torch, torch.amp, torch.amp.grad_scaler):
        module.GradScaler = fxamp.GradScaler
    for scaler in (torch.cuda.amp.GradScaler, torch.cpu.amp.GradScaler, sharded_grad_scaler.ShardedGradScaler):
        scaler.__bases__ = (fxamp.GradScaler,)


def main(folder: str, *options: str) -> int:
    """Run what of torch's tests is there, and return pytest's exit status."""
    files = [str(path) for name in FILES if (path := Path(folder, name)).exists()]
    if not files:
        sys.exit(f"no tests of torch in {folder}: name the folder test of a checkout of PyTorch")
    return pytest.main(
        ["-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", folder, "-k", TESTS, *options, *files]
    )


if __name__ in ("__main__", "__mp_main__"):  # the processes that a test starts import this file as the second
    put_in_place()
if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if sys.argv[1:] else __doc__)
