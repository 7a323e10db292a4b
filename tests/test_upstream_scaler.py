"""The command that runs torch's own tests of its scaler does run them, on ours."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.upstream_scaler import main

ROOT = Path(__file__).parent.parent
WHICH = """
import unittest
import fxamp
import torch
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

class TestWhich(unittest.TestCase):
    def test_grad_scaling_names(self):
        for scaler in (torch.amp.GradScaler, torch.GradScaler, GradScaler):
            self.assertIs(scaler, fxamp.GradScaler)

    def test_grad_scaling_bases(self):
        with self.assertWarns(FutureWarning):
            self.assertEqual(torch.cpu.amp.GradScaler(init_scale=4.0).min_scale, 2.0**-14)
        self.assertEqual(ShardedGradScaler("cpu", 4.0, 0.5, 2.0, process_group=None).min_scale, 2.0**-14)

    def test_something_else(self):
        self.fail("is about no scaler")
"""


def test_a_checkouts_tests_run_on_our_scaler(tmp_path):
    (tmp_path / "distributed" / "fsdp").mkdir(parents=True)
    for name in ("test_torch.py", "distributed/fsdp/test_fsdp_sharded_grad_scaler.py"):
        (tmp_path / name).write_text(WHICH)
    command = [sys.executable, "-m", "tests.upstream_scaler", str(tmp_path), "-q"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # All of the second file's, whose name says what it is about.
    assert "1 failed, 4 passed, 1 deselected" in found.stdout, found.stdout + found.stderr
    assert found.returncode == 1


def test_a_folder_without_them_is_named(tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(str(tmp_path))
    assert stop.value.code == f"no tests of torch in {tmp_path}: name the folder test of a checkout of PyTorch"
