"""What does an einsum come down to, where autocast decides about the operators inside it?

CPU autocast does not list einsum. Of one or two operands it is a sum, an elementwise product or one ``bmm``; which of
these follows from the equation and from which sizes are 1 (``einsum`` and ``sumproduct_pair`` of ATen's Linear.cpp).
Each has a function here, all of which are ``torch.einsum``, so that a graph says which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from fxamp.errors import CaptureError

__all__ = ["REACHES", "contraction", "einsum_call", "product", "summation"]


def contraction(equation: str, left: Any, right: Any, summed: Sequence[tuple[int, int]]) -> Any:
    """An einsum of two operands that is computed by ``bmm``; ``summed`` has the dimensions of each summed label.

    Raises:
        CaptureError: when such a dimension is 1 in one of them: that is computed in another way.
    """
    for i, j in summed:
        if left.shape[i] == 1 or right.shape[j] == 1:
            raise _other_way(equation, left, right)
    return torch.einsum(equation, left, right)


def product(equation: str, left: Any, right: Any, ones: Sequence[tuple[int, int]]) -> Any:
    """An einsum of two operands that are multiplied element by element; ``ones`` has what is summed, of size 1.

    Raises:
        CaptureError: when such a dimension is not 1: that is computed in another way.
    """
    for i, j in ones:
        if left.shape[i] != 1 or right.shape[j] != 1:
            raise _other_way(equation, left, right)
    return torch.einsum(equation, left, right)


def _other_way(equation: str, left: Any, right: Any) -> CaptureError:
    return CaptureError(
        f"einsum '{equation}' of shapes {tuple(left.shape)} and {tuple(right.shape)} is computed in another way than "
        "the one it was converted for: whether a summed dimension is 1 makes a difference",
        hint="convert with example_inputs of this kind",
    )


def summation(equation: str, *operands: Any) -> Any:
    """An einsum of one operand, whose axes are moved and summed."""
    return torch.einsum(equation, *operands)


REACHES: Final[Mapping[Callable[..., Any], str]] = {contraction: "bmm", product: "mul", summation: "sum"}


def einsum_call(equation: str, shapes: Sequence[Sequence[int]]) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """The function that stands for this einsum and what it takes after the operands.

    None when the einsum is more than one operator that autocast knows.

    Example::

        >>> call, rest = einsum_call("ij,jk->ik", [(2, 3), (3, 4)])
        >>> call.__name__, rest, einsum_call("i,j->ij", [(2,), (3,)])[0].__name__
        ('contraction', (((1, 0),),), 'product')
    """
    if len(shapes) == 1:
        return summation, ()
    terms, output = _terms(equation)
    if len(shapes) != 2 or len(terms) != 2 or output is None:
        return None
    sides = [_places(term) for term in terms]
    summed: list[tuple[int, int]] = []
    ones: list[tuple[int, int]] = []
    for label in sorted((sides[0].keys() | sides[1].keys()) - set(output)):
        if any(label not in side for side in sides):
            return None  # summed out of one operand alone, before the product
        places = sides[0][label], sides[1][label]
        single = {shape[place] == 1 for shape, place in zip(shapes, places, strict=True)}
        if len(single) == 2:
            return None
        (ones if True in single else summed).append(places)
    return (contraction, (tuple(summed),)) if summed else (product, (tuple(ones),))


def _terms(equation: str) -> tuple[list[str], str | None]:
    """The labels of each operand and of the output; None for an ellipsis that is summed over."""
    given, arrow, output = equation.replace(" ", "").partition("->")
    letters = given.replace(",", "").replace(".", "")
    if not arrow:
        return given.split(","), "".join(label for label in set(letters) if letters.count(label) == 1)
    return given.split(","), None if "..." in given and "..." not in output else output.replace(".", "")


def _places(term: str) -> dict[str, int]:
    """Label to dimension, counted from the end behind an ellipsis."""
    before, _, after = term.partition("...")
    return dict(zip(before, range(len(before)), strict=True)) | dict(zip(after, range(-len(after), 0), strict=True))
