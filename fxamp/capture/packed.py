"""What is known of a packed sequence while a model is traced?

Code asks of a packed sequence whether it has an order to undo, which is None where it was sorted. What ``nn.GRU`` gives
for one has the parts of the one it was given; of any other the order is found out at run time.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, FunctionType
from typing import Any, Final
from unittest import mock

from torch import fx, nn
from torch.nn.utils import rnn

from fxamp.capture.calls import has_hooks

__all__ = ["ORDERS", "hands_on_at_once", "packed_like_its_input", "packed_sequences"]

ORDERS: Final = frozenset({"sorted_indices", "unsorted_indices"})


def packed_like_its_input(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
    """The result of a recurrent layer, with the parts of a packed sequence that the layer hands on."""
    if not isinstance(module, nn.RNNBase) or has_hooks(module):
        return result
    if not type(module).forward.__module__.startswith("torch."):
        return result
    given = args[0] if args else kwargs.get("input")
    if not isinstance(given, rnn.PackedSequence):
        return result
    return tuple.__new__(rnn.PackedSequence, (result[0].data, *given[1:])), result[1]


def hands_on_at_once(frame: FrameType | None) -> bool:
    """Whether the attribute that is being read in ``frame`` goes into a call, and is not asked about."""
    if frame is None:
        return True
    following = (i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti and i.opname != "CACHE")
    first, second = (getattr(next(following, None), "opname", "") for _ in range(2))
    kept = first.startswith(("STORE", "RETURN", "DUP", "COPY")) or "NONE" in first
    return not (kept or second in ("IS_OP", "COMPARE_OP"))


@contextmanager
def packed_sequences(record: Callable[..., Any]) -> Iterator[None]:
    """Records as one call what takes a sequence apart of which only a run tells how."""
    with ExitStack() as stack:
        stack.enter_context(_recorded(rnn.pad_packed_sequence, record, _is_traced))
        stack.enter_context(_recorded(rnn.unpad_sequence, record, lambda padded: isinstance(padded, fx.Proxy)))
        yield


def _is_traced(sequence: Any) -> bool:
    return isinstance(sequence, fx.Proxy) or isinstance(sequence.unsorted_indices, fx.Proxy)


@contextmanager
def _recorded(function: Any, record: Callable[..., Any], when: Callable[[Any], bool]) -> Iterator[None]:
    """Exchanges the code of a function: whoever imported it by its name has it too."""
    plain = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)

    def call(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        return record(function, args, kwargs) if when(first) else plain(*args, **kwargs)

    name = f"_fxamp_{function.__name__}"
    space: dict[str, Any] = {}
    exec(compile(f"def {function.__name__}(*args, **kwargs): return {name}(*args, **kwargs)", __file__, "exec"), space)
    with mock.patch.dict(function.__globals__, {name: call}):
        function.__code__, function.__defaults__ = space[function.__name__].__code__, None
        try:
            yield
        finally:
            function.__code__, function.__defaults__ = plain.__code__, plain.__defaults__
