"""How long does one call take on this device?

A ``Probe`` answers by a short measurement when it is asked first, and from then on by what it found. What it may spend
is limited; after that, and for calls that would take too long, it scales what it knows of the same operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from fxamp.cost.calls import Call
from fxamp.cost.clock import Clock, clock_of, indexed
from fxamp.cost.curves import SIZES, at
from fxamp.cost.measuring import LONG, measure
from fxamp.cost.spec import Spec
from fxamp.cost.store import Row, open_store
from fxamp.cost.surroundings import undisturbed
from fxamp.dtypes import abbreviate

__all__ = ["Probe"]

LIMIT: Final = 20.0
_MOST_BYTES: Final = 1 << 31  # of the arguments of a call: a larger one is not made for the sake of a measurement
_SMALL: Final = 1e8  # of this work no call takes long
_TIMES: Final = 8  # how often a short call is made in a measurement, about


class Probe:
    """Seconds that calls take on one device, measured when asked for first and kept on disk.

    They are those of a call in steady state, with its inputs where the last call left them, in caches or not. With
    ``training`` they include the gradients of all inputs that want one, but not what it takes to start a backward,
    which a model does once.

    Args:
        device: where calls run; ``measurable`` tells whether they do.
        path: the file to keep them in. By default one for each device, build of torch and number of threads, in the
            folder ``FXAMP_CACHE_DIR``, else in the user's folder for caches.
        limit: how many seconds it may spend on measuring. The first call of an operator may take as many again.
        clock: tells time; by default that of the device.
    """

    def __init__(
        self, device: torch.device, *, path: Path | None = None, limit: float = LIMIT, clock: Clock | None = None
    ) -> None:
        self.device = device = indexed(device)
        self.spent = 0.0
        self._limit = limit
        self._clock = clock_of(device) if clock is None else clock
        self._store = open_store(path, device)
        self._curves: dict[Hashable, list[tuple[int, float]]] = {}

    def compare(
        self,
        key: str,
        function: Callable[..., Any] | str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        dtypes: Sequence[torch.dtype],
        *,
        training: bool,
    ) -> tuple[float | None, ...]:
        """Seconds of one call in each of some dtypes, measured in turns.

        Args:
            key: the ATen name of the operator.
            function: what to call, or the name of a method of the first argument. It must not write to its arguments.
            args: nested, with ``Spec`` in the place of tensors.
            kwargs: the same by name.
            dtypes: what to make the tensors in.
            training: whether gradients count.

        Returns:
            For each dtype the seconds, or None where the call does not run in it or nothing could be found out.
        """
        return self._compare(Call(key, function, tuple(args), dict(kwargs), training), dtypes)

    def call(
        self,
        key: str,
        function: Callable[..., Any] | str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        dtype: torch.dtype,
        *,
        training: bool,
    ) -> float | None:
        """Seconds of one call, as ``compare`` gives them for a single dtype."""
        return self.compare(key, function, args, kwargs, (dtype,), training=training)[0]

    def cast(self, numel: int, source: torch.dtype, target: torch.dtype, *, training: bool = False) -> float:
        """Seconds of a cast of so many elements; with ``training`` also of the cast of its gradient."""

        def one(size: int) -> Call:
            tensor = Spec((size,), source, grad=training, fixed=True)
            return Call("_to_copy", "to", (tensor, target), {}, training)

        return self._along(("cast", source, target, training), one, numel, (source,))

    def pointwise(self, numel: int, dtype: torch.dtype, *, training: bool = False) -> float:
        """Seconds of an operator that reads and writes so many elements; with ``training``, also their gradients."""

        def one(size: int) -> Call:
            return Call("mul", torch.mul, (Spec((size,), torch.float32, grad=training), 0.5), {}, training)

        return self._along(("pointwise", dtype, training), one, numel, tuple(dict.fromkeys((dtype, torch.float32))))

    def save(self) -> None:
        """Keep what was found on disk, where there is a place for it."""
        self._store.save()

    def _along(self, curve: Hashable, one: Callable[[int], Call], numel: int, dtypes: Sequence[torch.dtype]) -> float:
        """By interpolation, in the first of the dtypes. It is short, and measured whatever was spent."""
        if curve not in self._curves:
            sizes = SIZES.get(self.device.type, SIZES["cuda"])
            seconds = [self._compare(one(size), dtypes, always=True)[0] for size in sizes]
            self._curves[curve] = [(size, each) for size, each in zip(sizes, seconds, strict=True) if each is not None]
        known = self._curves[curve]
        return at(numel, *zip(*known, strict=True)) if known else 0.0

    def _compare(self, call: Call, dtypes: Sequence[torch.dtype], *, always: bool = False) -> tuple[float | None, ...]:
        text = call.text()
        if text is None:
            return (None,) * len(dtypes)
        names = [abbreviate(dtype) for dtype in dtypes]
        row = self._store.get(text)
        if row is None or any(name not in row for name in names):
            row = self._find(text, call, dict(zip(names, dtypes, strict=True)), always=always)
        return tuple(row.get(name) for name in names)

    def _find(self, text: str, call: Call, dtypes: dict[str, torch.dtype], *, always: bool) -> Row:
        idle = self._idle() if call.training and call.key != _STARTS else 0.0
        spent, start = self.spent, self._clock.now()
        with undisturbed(self.device, training=call.training):
            row = self._store.get(text) or Row(call.work())
            if always or self._affordable(call, row.work, list(dtypes)):
                self._measure(row, call, dtypes, idle)
            else:
                self._estimate(row, call, list(dtypes))
        self._store.put(text, row)
        self.spent = spent + self._clock.now() - start
        return row

    def _measure(self, row: Row, call: Call, dtypes: dict[str, torch.dtype], idle: float) -> None:
        """Measures all of the dtypes, also those that are known: by these it tells how fast the machine is now."""
        generator = torch.Generator(self.device).manual_seed(0)
        runs, first = {}, {}
        for name, dtype in dtypes.items():
            try:
                run = call.make(dtype, generator)
                first[name] = self._clock.seconds(run, 1)
            except torch.OutOfMemoryError:
                row.estimated.setdefault(name, None)
            except Exception:  # whatever a kernel says of a dtype that it does not have
                row.measured.setdefault(name, None)
            else:
                runs[name] = run
        found = dict(zip(runs, measure(self._clock, list(runs.values()), list(first.values()), idle), strict=True))
        known = [(row.measured.get(name), seconds) for name, seconds in found.items()]
        pace = next((before / now for before, now in known if before and now), 1.0)
        for name, seconds in found.items():
            if name not in row:
                row.measured[name] = seconds * pace

    def _idle(self) -> float:
        """Seconds that it takes to start a backward: those of one that does next to nothing, less what is done."""
        tensor = Spec((16,), torch.float32, grad=True)
        both, forward = (
            self._compare(Call(_STARTS, "view_as", (tensor, tensor), {}, training), (torch.float32,), always=True)[0]
            for training in (True, False)
        )
        return max((both or 0.0) - 2.0 * (forward or 0.0), 0.0)

    # -- what is not measured ----------------------------------------------------------------------------

    def _affordable(self, call: Call, work: float, names: list[str]) -> bool:
        if sum(spec.nbytes() for spec in call.specs()) > _MOST_BYTES:
            return False
        alike = self._alike(call, names)
        left = self._limit - self.spent + (0.0 if alike else self._limit)
        expected = [self._scaled(alike, work, name) if alike else self._guess(work) for name in names]
        return sum(each * (2 if each > LONG else _TIMES) for each in expected if each is not None) <= left

    def _alike(self, call: Call, names: Sequence[str]) -> list[Row]:
        """The measurements of other calls of the operator, in all of some dtypes."""
        return [row for row in self._store.alike(call.kind) if all(name in row.measured for name in names)]

    def _estimate(self, row: Row, call: Call, names: list[str]) -> None:
        alike = self._alike(call, names)
        for name in names:
            if name not in row:
                row.estimated[name] = self._scaled(alike, row.work, name) if alike else None

    def _scaled(self, alike: list[Row], work: float, name: str) -> Any:
        """What the call that does about as much takes, in proportion; never less than the shortest of them."""
        nearest = min(alike, key=lambda row: abs(math.log(max(row.work, 1.0) / max(work, 1.0))))
        seconds = nearest.measured[name]
        known = [found for row in alike if (found := row.measured[name]) is not None]
        return None if seconds is None else max(seconds * work / max(nearest.work, 1.0), min(known))

    def _guess(self, work: float) -> float:
        """Seconds of a call of an operator that nothing is known of, at the pace of a matrix product."""
        if work < _SMALL:
            return 0.0
        square = Spec((256, 256), torch.float32)
        call = Call("mm", torch.mm, (square, square), {}, training=False)
        seconds = self._compare(call, (torch.float32,), always=True)[0]
        return work * (seconds or 0.0) / call.work()


_STARTS: Final = "view_as"
