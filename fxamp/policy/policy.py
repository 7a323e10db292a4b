"""Which rule does an operator get, and who may change it?

A ``Policy`` is a frozen value: a name, a device type and a low dtype, and the user's overrides for
operators and modules. Copies are made with ``with_ops`` and ``with_modules``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

import torch

from fxamp.dtypes import abbreviate, check_low_dtype
from fxamp.errors import PolicyError, describe, nearest
from fxamp.policy.operators import operator_rules
from fxamp.policy.spellings import resolve_operator

__all__ = ["DEVICE_TYPES", "POLICY_NAMES", "RULES", "Policy", "Ruling"]

RULES: Final = ("lower", "fp32", "promote", "follow")
POLICY_NAMES: Final = ("autocast", "fast", "full")
DEVICE_TYPES: Final = ("cuda", "cpu")


class Ruling(NamedTuple):
    """A rule and the reason for it, in the words of the report."""

    rule: str
    reason: str


@dataclass(frozen=True)
class Policy:
    """What precision each operator runs in.

    Attributes:
        name: "autocast", "fast" or "full".
        device_type: whose operator table, "cuda" or "cpu"; None: where the model is.
        dtype: the low dtype; None: what ``torch.get_autocast_dtype(device_type)`` says.
        ops: overrides as (ATen name, rule).
        modules: overrides as (module path or glob pattern, rule).

    Example::

        >>> policy = Policy.autocast("cpu", torch.bfloat16).with_modules({"head": "fp32"})
        >>> print(policy)
        autocast/cpu bf16, modules: head=fp32
    """

    name: str
    device_type: str | None = None
    dtype: torch.dtype | None = None
    ops: tuple[tuple[str, str], ...] = ()
    modules: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _check("policy", self.name, POLICY_NAMES)
        if self.device_type is not None:
            _check("device_type", self.device_type, DEVICE_TYPES)
        if self.dtype is not None:
            check_low_dtype(self.dtype)

    @staticmethod
    def autocast(device_type: str | None = None, dtype: torch.dtype | None = None) -> Policy:
        """Bitwise what ``torch.autocast(device_type, dtype)`` does, outputs and gradients."""
        return Policy("autocast", device_type, dtype)

    @staticmethod
    def fast(device_type: str | None = None, dtype: torch.dtype | None = None) -> Policy:
        """Fewer bytes and less time than ``autocast``; close to its numbers, and not the same bits.

        Operators that compute in float32 inside keep low inputs, a value is cast once for all its uses, and what could
        run in either dtype runs where the fewest bytes move. With example inputs, and on the device that the policy is
        for, operators are measured in both dtypes (once; ``FXAMP_CACHE_DIR`` says where that is kept), and run in
        float32 where that takes less time. Dangerous operators (exp, log, sum, losses) run in float32, and what comes
        from outside, or may be too large for float16 where autocast has float32, stays in it.
        """
        return Policy("fast", device_type, dtype)

    @staticmethod
    def full() -> Policy:
        """No casts: bitwise the original model."""
        return Policy("full")

    @staticmethod
    def of(policy: str | Policy) -> Policy:
        """The policy itself, or the one of this name.

        Raises:
            PolicyError: when there is none of this name.
        """
        if isinstance(policy, Policy):
            return policy
        if not isinstance(policy, str):
            raise PolicyError(
                f"policy is {describe(policy)}: expected a name or a Policy",
                hint="write policy='autocast' or policy=fxamp.Policy.autocast(...)",
            )
        return Policy(policy)

    def resolved(self, device_type: str, dtype: torch.dtype | None = None) -> Policy:
        """A copy for one device type and dtype; what the policy itself says must agree.

        Raises:
            PolicyError: when ``dtype`` or ``device_type`` contradicts the policy's own.
        """
        for word, ours, asked in (
            ("device_type", self.device_type, device_type),
            ("dtype", self.dtype, dtype),
        ):
            if ours is not None and asked is not None and ours != asked:
                raise PolicyError(f"{word} is {asked}, but the policy says {ours}", hint=f"give {word} only once")
        found = self.dtype or dtype or torch.get_autocast_dtype(device_type)
        return replace(self, device_type=device_type, dtype=check_low_dtype(found))

    def with_ops(self, overrides: Mapping[Any, str]) -> Policy:
        """A copy in which these operators follow these rules.

        Args:
            overrides: operator to rule; an operator is written as ``torch.softmax``, ``"aten::softmax"``,
                ``torch.ops.aten.softmax`` or ``torch.nn.functional.softmax``.

        Raises:
            PolicyError: for an unknown operator or rule.
        """
        ops = dict(self.ops)
        for key, rule in overrides.items():
            _check_rule(rule, _spelling(key))
            ops[resolve_operator(key)] = rule
        return replace(self, ops=tuple(sorted(ops.items())))

    def with_modules(self, overrides: Mapping[str, str]) -> Policy:
        """A copy in which everything computed inside these modules follows these rules.

        Args:
            overrides: module path (``"blocks.0.norm"``) or glob pattern (``"blocks.*.norm"``) to rule.
                A rule holds for the module and all below it, unless one of these has its own.

        Raises:
            PolicyError: for an unknown rule. Paths are checked at conversion.
        """
        modules = dict(self.modules)
        for pattern, rule in overrides.items():
            if not isinstance(pattern, str):
                raise PolicyError(
                    f"the module override {describe(pattern)} is no name: expected a module path or a glob pattern",
                    hint="write 'head' or 'blocks.*.norm'; with_ops takes operators",
                )
            _check_rule(rule, repr(pattern))
            modules[pattern] = rule
        return replace(self, modules=tuple(sorted(modules.items())))

    def operator_ruling(self, aten: str) -> Ruling | None:
        """The rule for an ATen operator: the user's, else the table's; None when it is in neither.

        Args:
            aten: the operator's name without overload.
        """
        overridden = dict(self.ops).get(aten)
        if overridden is not None:
            return Ruling(overridden, f"override 'aten::{aten}'")
        assert self.device_type is not None
        rule = operator_rules(self.device_type).get(aten)
        return Ruling(rule, "op table") if rule is not None else None

    def module_rulings(self, paths: Iterable[str], *, every: bool = True) -> dict[str, Ruling]:
        """Module path to the override that decides for it; modules without one are left out.

        Args:
            paths: the names of the modules.
            every: whether these are all, so that each override has to match one.

        Raises:
            PolicyError: when an override matches no module, or two patterns match one with different rules.
        """
        known = sorted(path for path in paths if path)
        for pattern, _ in self.modules if every else ():
            if not any(fnmatchcase(path, pattern) for path in known):
                raise _matches_nothing(pattern, known)
        found: dict[str, Ruling] = {}
        for path in known:  # sorted: a module comes after the one it is in
            ruling = self._direct_ruling(path) or found.get(path.rpartition(".")[0])
            if ruling is not None:
                found[path] = ruling
        return found

    def _direct_ruling(self, path: str) -> Ruling | None:
        modules = dict(self.modules)
        if path in modules:
            return Ruling(modules[path], f"override '{path}'")
        matching = [(pattern, rule) for pattern, rule in self.modules if fnmatchcase(path, pattern)]
        if len({rule for _, rule in matching}) > 1:
            (first, one), (second, other) = matching[0], next(m for m in matching if m[1] != matching[0][1])
            raise PolicyError(
                f"'{path}' matches two overrides: '{first}' ({one}) and '{second}' ({other})",
                hint=f"give the exact name '{path}'; an exact name wins over a pattern",
            )
        return Ruling(matching[0][1], f"override '{matching[0][0]}'") if matching else None

    def __str__(self) -> str:
        text = self.name
        if self.device_type is not None:
            text += f"/{self.device_type}"
        if self.dtype is not None:
            text += f" {abbreviate(self.dtype)}"
        for word, overrides in (("ops", self.ops), ("modules", self.modules)):
            if overrides:
                text += f", {word}: " + " ".join(f"{key}={rule}" for key, rule in overrides)
        return text


def _check(word: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise PolicyError(
            f"unknown {word} {value!r}: expected one of {', '.join(known)}",
            hint=f"write {(nearest(str(value), known) or known[0])!r}",
        )


def _check_rule(rule: str, subject: str) -> None:
    if rule not in RULES:
        raise PolicyError(
            f"unknown rule {rule!r} for {subject}: expected one of {', '.join(RULES)}",
            hint=f"write {(nearest(str(rule), RULES) or RULES[0])!r}",
        )


def _matches_nothing(pattern: str, known: list[str]) -> PolicyError:
    close = nearest(pattern, known)
    hint = f"write '{close}'" if close else f"the model has {', '.join(known[:8]) or 'no submodules'}"
    return PolicyError(f"the override '{pattern}' matches no module of the model", hint=hint)


def _spelling(key: str | Callable[..., Any]) -> str:
    if isinstance(key, str):
        return key
    name = getattr(key, "__name__", "")
    for prefix, namespace in (("torch", torch), ("F", torch.nn.functional), ("Tensor", torch.Tensor)):
        if name and getattr(namespace, name, None) is key:
            return f"{prefix}.{name}"
    return str(key)
