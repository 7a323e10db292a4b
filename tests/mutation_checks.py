"""What tests one row of an operator table, quickest first; ``tests.mutations`` runs it with a changed table."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from tests import test_op_table as table
from tests.conformance.extra import EXTRA
from tests.conformance.opaque import not_seen_into
from tests.conformance.test_operators import FEW, RULES, name_of, outcomes, seen_wrongly, unseen
from tests.helpers import quiet
from tests.samples import op_db

__all__ = ["check"]

# Tests that take no argument, and those that take each of the values they are parametrized with.
PLAIN = (
    table.test_every_row_is_an_operator_with_known_rules,
    table.test_rules_are_by_packet_and_forwarded,
    table.test_common_operators_are_transparent_where_autocast_leaves_them_alone,
    table.test_the_rows_of_composites_name_operators,
    table.test_every_python_function_of_torch_is_decided,
    table.test_every_row_of_functions_names_a_function_and_an_operator,
    table.test_a_function_stands_for_the_operator_of_its_name,
    table.test_every_function_of_the_operator_module_is_decided,
    table.test_the_cuda_rows_are_the_lists_of_the_installed_header,
)
EACH = (
    table.test_the_rows_are_what_torch_registers,
    table.test_a_function_reaches_an_operator,
    table.test_a_method_reaches_an_operator,
    table.test_arguments_choose_the_operator,
    table.test_a_key_in_words_names_an_operator,
    table.test_a_function_of_the_operator_module_runs_the_operator_of_its_row,
    table.test_an_argument_that_makes_another_operator_of_it_is_looked_at,
)


def check(row: str) -> None:
    """Raises AssertionError, or what else a test raises, when a test of this row fails."""
    warnings.simplefilter("ignore")
    for test in PLAIN:
        test()
    for test in EACH:
        for values in test.pytestmark[0].args[1]:  # type: ignore[attr-defined]
            test(*values) if "," in str(test.pytestmark[0].args[0]) else test(values)  # type: ignore[attr-defined]
    for device_type in RULES:
        if row in table.OPERATORS:
            table.check_row(row, device_type)
    infos = [info for info in op_db() if _base(row) in _names_of(info)]
    for device_type, rules in RULES.items():
        with rules(), quiet():
            found = list(outcomes(infos, device_type, FEW))
        assert [outcome for outcome in found if outcome.outcome == "different"] == []
        for way in ("symbolic", "examples"):
            assert unseen(found, way) == {name_of(info) for info in infos} & not_seen_into(device_type, way)

    for device_type, rules in RULES.items():
        with rules(), quiet():
            assert not seen_wrongly(device_type, [name for name in EXTRA if name in (row, _base(row))])


def _base(row: str) -> str:
    name = row.partition(".")[2] if row.partition(".")[0] in ("F", "torch", "Tensor") else row.partition(".")[0]
    return name.strip("_")


def _names_of(info: Any) -> set[str]:
    names = {info.name, info.aten_name or "", info.name.rpartition(".")[2], *(alias.name for alias in info.aliases)}
    methods = (getattr(variant, "__name__", "") for variant in (info.method_variant, info.inplace_variant))
    return {name.replace(".", "_").strip("_") for name in (*names, *methods) if isinstance(name, str)}


torch.set_num_threads(1)
