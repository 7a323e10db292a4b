"""Runs with an infinity or a NaN put into them: no step is lost or taken wrongly, and what made it is named."""

import pytest

from tests.faults import EVERY_DAY, cases, study, table


@pytest.mark.parametrize("share", [slice(EVERY_DAY), pytest.param(slice(EVERY_DAY, None), marks=pytest.mark.slow)])
def test_faults(share, ranks):
    """The laws hold in every run; what is named is right in 95 of 100, and what is proposed helps."""
    results = study(cases(200)[share], ranks)
    shown = "\n".join(map(str, results)) + "\n" + table(results)
    assert not any(result.problems for result in results), shown
    assert all(None not in result.mended for result in results), shown
    assert any(result.mended for result in results), shown
    assert sum(bool(result.verdicts) for result in results) >= 0.9 * len(results), shown
    assert sum(result.named for result in results) >= 0.95 * len(results), shown
