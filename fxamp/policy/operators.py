"""Which rule has an operator on a device, and is an unlisted one left alone by autocast?

A row of the table counts only where the running torch registers that operator for the device's autocast
key, so that parity follows the installed version. Adding an operator changes one line of
``fxamp.policy.autocast_table``, or of ``fxamp.policy.composites`` for one that is made of others.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch

from fxamp.errors import PolicyError, nearest
from fxamp.policy.autocast_table import TABLE
from fxamp.policy.composites import FORWARDS_TO, SAME, UNDER_AUTOCAST

__all__ = ["FORWARDS_TO", "OPERATORS", "explicit", "operator_rules", "packet_of", "transparent"]

_AUTOCAST_KEYS: Final = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}

# One overload is listed and another one, which Python reaches as easily, is not: the packet has no one rule.
_SPLIT_PACKETS: Final = {
    "cpu": frozenset({"_convolution", "fake_quantize_per_tensor_affine"}),
    "cuda": frozenset[str](),
}


def _parse(table: str) -> Mapping[str, Mapping[str, str]]:
    header, *rows = (line.split() for line in table.strip().splitlines())
    return MappingProxyType({row[0]: MappingProxyType(dict(zip(header[1:], row[1:], strict=True))) for row in rows})


OPERATORS: Final[Mapping[str, Mapping[str, str]]] = _parse(TABLE)


def packet_of(operator: str) -> str:
    """The name without its overload: ``softmax`` for ``softmax.int``."""
    return operator.partition(".")[0]


def listed_packets(device_type: str) -> frozenset[str]:
    """Every packet with an overload that autocast may intercept on this device, on some torch version.

    Raises:
        PolicyError: when there is no column for ``device_type``.
    """
    check_device_type(device_type)
    return frozenset(packet_of(name) for name, row in OPERATORS.items() if row[device_type] != "follow")


def check_device_type(device_type: str) -> str:
    """The device type itself, when the tables have a column for it.

    Raises:
        PolicyError: when they have none.
    """
    if device_type not in _AUTOCAST_KEYS:
        raise PolicyError(
            f"unknown device type {device_type!r}: expected one of {', '.join(map(repr, _AUTOCAST_KEYS))}",
            hint=f"write device_type={nearest(device_type, _AUTOCAST_KEYS) or 'cuda'!r}",
        )
    return device_type


@functools.cache
def registered_operators(device_type: str) -> frozenset[str]:
    """The ATen operators, with overload, that the running torch registers for the device's autocast key."""
    key = _AUTOCAST_KEYS[check_device_type(device_type)]
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return frozenset(name.removeprefix("aten::") for name in names if name.startswith("aten::"))


@functools.cache
def operator_rules(device_type: str) -> Mapping[str, str]:
    """The rule of every listed ATen packet on a device, for the running torch.

    Composite operators that only forward to a listed one have that one's rule. An operator that is missing
    here is either ``transparent`` for autocast or has to run under it.

    Args:
        device_type: ``"cuda"`` or ``"cpu"``.

    Returns:
        A read-only mapping from packet name (no overload) to rule, never ``"follow"``.

    Raises:
        PolicyError: when ``device_type`` has no column, or two overloads of one packet have different rules.

    Example::

        >>> operator_rules("cuda")["softmax"], "softmax" in operator_rules("cpu")
        ('fp32_dtype', False)
    """
    rules: dict[str, str] = {}
    for operator in sorted(OPERATORS.keys() & registered_operators(device_type)):
        packet, rule = packet_of(operator), OPERATORS[operator][device_type]
        if rule == "follow" or packet in _SPLIT_PACKETS[device_type]:
            continue
        if rules.setdefault(packet, rule) != rule:
            raise PolicyError(
                f"the overloads of {packet!r} have two rules on {device_type}: {rules[packet]} and {rule}",
                hint="give every overload of the packet the same rule in fxamp.policy.autocast_table",
            )
    forwarded = {name: rules[target] for name, target in FORWARDS_TO[device_type].items() if target in rules}
    return MappingProxyType(forwarded | rules)


@functools.cache
def transparent(aten: str, device_type: str) -> bool:
    """Whether an unlisted operator does under autocast exactly what it does without.

    That holds for operators with kernels of their own, except the few that call listed ones, and for the
    composite ones that are vetted. A listed operator, an unknown one and an unvetted composite are not.

    Args:
        aten: a packet name, ``"reshape"``; calls in place are not asked about, for autocast casts none.
        device_type: ``"cuda"`` or ``"cpu"``.

    Raises:
        PolicyError: when the tables have no column for ``device_type``.

    Example::

        >>> transparent("softmax", "cpu"), transparent("softmax", "cuda"), transparent("einsum", "cpu")
        (True, False, False)
    """
    forwarded = FORWARDS_TO[check_device_type(device_type)].get(aten)
    if forwarded is not None:
        return transparent(forwarded, device_type)
    overloads = _overloads().get(aten, frozenset())
    if not overloads or overloads & registered_operators(device_type) or aten in UNDER_AUTOCAST[device_type]:
        return False
    return aten in SAME[device_type] or not any(map(_is_composite, overloads))


def explicit(aten: str, device_type: str) -> bool:
    """Whether what autocast does with an operator is known: by a rule of its own, or because it does nothing."""
    return aten in operator_rules(device_type) or transparent(aten, device_type)


@functools.cache
def argument_places(aten: str) -> Mapping[str, int]:
    """The place of each argument of an operator, by name; the first of its overloads that has the name decides."""
    places: dict[str, int] = {}
    for schema in _schemas(aten):
        for place, argument in enumerate(schema.arguments):
            places.setdefault(argument.name, place)
    return MappingProxyType(places)


@functools.cache
def optional_tensors(aten: str) -> frozenset[int | str]:
    """The places and names of arguments that may be a tensor or None; autocast's ``promote`` does not look at these."""
    found: set[int | str] = set()
    for schema in _schemas(aten):
        optional = [i for i, argument in enumerate(schema.arguments) if str(argument.type) == "Optional[Tensor]"]
        found.update(optional, (schema.arguments[i].name for i in optional))
    return frozenset(found)


def _schemas(aten: str) -> list[Any]:
    packet = getattr(torch.ops.aten, aten, None) if aten else None
    return [] if packet is None else [getattr(packet, name)._schema for name in packet.overloads()]


def is_aten(packet: str) -> bool:
    """Whether the running torch has an ATen operator of this name."""
    return packet in _overloads()


def aten_packets() -> frozenset[str]:
    """The names of all ATen operators of the running torch, without overloads."""
    return frozenset(_overloads())


@functools.cache
def _overloads() -> Mapping[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::"):
            operator = name.removeprefix("aten::")
            found.setdefault(packet_of(operator), set()).add(operator)
    return MappingProxyType({packet: frozenset(operators) for packet, operators in found.items()})


def _is_composite(operator: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "CompositeImplicitAutograd")
