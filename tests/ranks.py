"""Runs a function in several processes at once, one a rank, joined by gloo on the CPU."""

from __future__ import annotations

import datetime
import faulthandler
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO
from unittest import mock

import torch
import torch.distributed as dist

_START = 120.0  # seconds until a process must have imported torch and found the others
_GRACE = 1.0  # seconds the other ranks get to answer after one has failed: they may wait for it in a collective


class RankError(Exception):
    """A rank raised, died or did not answer; the message holds its traceback."""


class Ranks:
    """Live processes that each run a function and send back what it returned.

    They start with the first call and stay, since importing torch takes longer than most tests. After a failure they
    are killed and the next call starts new ones: who was left in the middle of a collective cannot be used again.

    Args:
        world_size: how many processes.
        timeout: the seconds that one call may take, once the processes have started.
    """

    def __init__(self, world_size: int = 2, timeout: float = 60.0) -> None:
        self._world_size, self._timeout = world_size, timeout
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(rank, *args)`` returned on each rank, in order.

        Args:
            function: a function of a module; in it warnings are errors and the seed is 0.
            args: values that can be pickled, as must be what the function returns.

        Raises:
            RankError: when a rank raised, died, or took longer than the timeout.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((self._timeout, function, args)))
        answers = self._answers(self._timeout)
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in answers.items() if not ok]
        if failures:
            self.close()
            raise RankError("\n".join(failures))
        return [answers[rank][1] for rank in range(self._world_size)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()
            process.kill()
            process.join()
        self._processes, self._connections = [], []
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _start(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        for rank in range(self._world_size):
            ours, theirs = context.Pipe()
            args = (rank, self._world_size, self._directory.name, theirs)
            process = context.Process(target=_work, args=args, daemon=True)
            with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
                process.start()
            theirs.close()  # so that the end of the process ends the connection
            self._processes.append(process)
            self._connections.append(ours)
        for rank, (ok, text) in self._answers(_START).items():
            if not ok:
                self.close()
                raise RankError(f"rank {rank} did not start: {text}")

    def _answers(self, timeout: float) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + timeout
        while waiting := [c for rank, c in enumerate(self._connections) if rank not in answers]:
            ready = wait(waiting, max(0.0, end - time.monotonic()))
            for connection in ready:
                rank = self._connections.index(connection)
                answers[rank] = self._answer(rank)
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + _GRACE)
            if not ready:
                break
        if all(ok for ok, _ in answers.values()):  # else they wait for the one that failed
            late = [rank for rank in range(self._world_size) if rank not in answers]
            answers |= {rank: (False, f"no answer after {timeout} s\n{self._stack(rank)}") for rank in late}
        return answers

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self._processes[rank].join()
            return False, f"the process ended with exit code {self._processes[rank].exitcode}"
        return answer

    def _stack(self, rank: int) -> str:
        assert self._directory is not None
        time.sleep(_GRACE)  # the rank writes it when its own clock says so
        path = _stack_file(self._directory.name, rank)
        return path.read_text() if path.exists() else "no stack"


def run_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 60.0) -> list[Any]:
    """What ``function(rank, *args)`` returned on each rank of processes that end with this call."""
    with Ranks(world_size, timeout) as ranks:
        return ranks(function, *args)


def _work(rank: int, world_size: int, directory: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    # It is the caller who reports a hang; this ends a process whose caller was killed.
    limit = datetime.timedelta(minutes=10)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=limit)
    connection.send_bytes(pickle.dumps((True, None)))
    with _stack_file(directory, rank).open("w") as stack:
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:  # the caller is gone
                return
            connection.send_bytes(_run(rank, request, stack))


def _run(rank: int, request: bytes, stack: TextIO) -> bytes:
    try:
        timeout, function, args = pickle.loads(request)
        if gc.get_freeze_count() == 0:
            gc.freeze()  # what was imported is no garbage: no collection, and no search, looks through it again
        faulthandler.dump_traceback_later(timeout, file=stack)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return pickle.dumps((True, function(rank, *args)))
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))
    finally:
        faulthandler.cancel_dump_traceback_later()


def _stack_file(directory: str, rank: int) -> Path:
    return Path(directory, f"stack of rank {rank}")
