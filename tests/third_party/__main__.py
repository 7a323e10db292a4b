"""Converts every third-party model and prints what became of it.

python -m tests.third_party [--frontend convert|backend] [a regular expression that names match]
"""

from __future__ import annotations

import argparse
import re
import sys

from tests.third_party import CASES
from tests.third_party.checks import frontends
from tests.third_party.sweep import measure, report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.third_party", description=__doc__.partition("\n")[0])
    parser.add_argument("--frontend", choices=list(frontends), default="convert")
    parser.add_argument("filter", nargs="?", default="", help="a regular expression: models whose names have it")
    asked = parser.parse_args()
    rows = []
    for row in measure((name for name in CASES if re.search(asked.filter, name)), asked.frontend):
        print(*row, sep=" | ", file=sys.stderr, flush=True)  # the whole text of an error, and at once
        rows.append(row)
    print(report(rows))


if __name__ == "__main__":
    main()
