"""What is known not to work, and why: a part of the error's first line. A test fails when that changes."""

from __future__ import annotations

__all__ = ["DIFFERENT", "REFUSED"]

# Frontend, then case.
REFUSED: dict[str, dict[str, str]] = {
    "convert": {},
    "backend": {},
}

# Wrong results that are known, and the first difference.
DIFFERENT: dict[str, dict[str, str]] = {
    "convert": {},
    "backend": {},
}
