"""The processes that other tests run on: what they return, and that no failure is lost or blocks."""

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, Ranks, run_ranks


def describe(rank, *args):
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return rank, args, total, torch.get_num_threads(), torch.rand(1), os.getpid()


def warn(rank):
    if rank == 1:
        warnings.warn("careful", stacklevel=1)
    dist.barrier()


def hang(rank):
    if rank == 1:
        dist.all_reduce(torch.ones(1))
    time.sleep(1000)


def die(rank):
    os._exit(3)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_rank_answers_and_a_failure_is_shown_with_its_traceback():
    with Ranks() as ranks:
        first, second = ranks(describe, "x", 2)
        torch.manual_seed(0)
        expected = ("x", 2), torch.tensor([3.0]), 1, torch.rand(1)
        assert first[:5] == (0, *expected)
        assert second[:5] == (1, *expected)
        assert [answer[5] for answer in ranks(describe)] == [first[5], second[5]]
        with pytest.raises(RankError, match=r"(?s)^rank 1: Traceback.*in warn.*UserWarning: careful$") as error:
            ranks(warn)
        assert "rank 0" not in str(error.value)  # it waited for rank 1
        assert not alive(first[5])
        assert not alive(second[5])
        third = ranks(describe)[0]
    assert third[:3] == (0, (), torch.tensor([3.0]))
    assert not alive(third[5])


def test_a_hang_is_reported_with_the_stacks():
    with pytest.raises(RankError, match=r"(?s)^rank 0: no answer after 1.0 s.*in hang.*rank 1: .*all_reduce.*in hang"):
        run_ranks(hang, timeout=1.0)


def test_a_process_that_ends_is_reported():
    with pytest.raises(RankError, match="rank 0: the process ended with exit code 3"):
        run_ranks(die, world_size=1)
