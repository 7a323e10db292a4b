"""Operator tables as data, and the policies made of them."""

from fxamp.policy.policy import DEVICE_TYPES, POLICY_NAMES, RULES, Policy, Ruling

__all__ = ["DEVICE_TYPES", "POLICY_NAMES", "RULES", "Policy", "Ruling"]
