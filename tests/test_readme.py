"""The README says what is so: its code runs, its tables are what the code prints, its names exist."""

import contextlib
import io
import json
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from fxamp.policy.operators import operator_rules, transparent

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


class Block(NamedTuple):
    """A code block: its language, its text and the line its text starts on."""

    language: str
    text: str
    line: int


def blocks() -> list[Block]:
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], README.count("\n", 0, match.start(2)) + 1) for match in found]


def run(block: Block, namespace: dict[str, object]) -> str:
    """What the block prints; errors and the report's sources show its lines in the README."""
    code = compile("\n" * (block.line - 1) + block.text, "README.md", "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def test_code_runs_from_top_to_bottom_and_prints_what_is_shown() -> None:
    namespace: dict[str, object] = {}
    pending = ""
    for block in blocks():
        if block.language == "python":
            assert not pending, f"the code above line {block.line} prints what no text block shows"
            pending = run(block, namespace)
        elif block.language == "text":
            assert block.text == pending, f"line {block.line}: the code above prints\n{pending}"
            pending = ""
    assert not pending


def test_the_first_screen_has_code_and_its_table() -> None:
    first, second, *_ = blocks()
    assert (first.language, second.language) == ("python", "text")
    assert first.line <= 12
    assert second.line + second.text.count("\n") < 40
    assert max(map(len, second.text.splitlines())) < 100


def rule_examples() -> list[tuple[str, str, str]]:
    rows = re.findall(r"^\| `(\w+)` *\|[^|]*\|([^|]*)\|([^|]*)\|$", README, re.MULTILINE)
    return [
        (operator, device, rule)
        for rule, *cells in rows
        for device, cell in zip(("cpu", "cuda"), cells, strict=True)
        for operator in re.findall(r"`(\w+)`", cell)
    ]


def test_every_rule_has_examples() -> None:
    assert {(rule, device) for _, device, rule in rule_examples()} == {
        (rule, device) for rule in ("lower", "fp32", "promote", "follow") for device in ("cpu", "cuda")
    }


@pytest.mark.parametrize(("operator", "device", "rule"), rule_examples())
def test_rule_of_an_example(operator: str, device: str, rule: str) -> None:
    if rule == "follow":
        assert transparent(operator, device)
    else:
        assert operator_rules(device)[operator].removesuffix("_dtype") == rule


def test_every_part_of_the_package_is_described() -> None:
    described = set(re.findall(r"^- `fxamp/(\w+)(?:/|\.py)`: ", README, re.MULTILINE))
    folders = {path.parent.name for path in (ROOT / "fxamp").glob("*/__init__.py")}
    assert described == folders | {"convert", "backend"}


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Python {project['requires-python']}".replace(">=", ">= ") in README
    torch = next(entry for entry in project["dependencies"] if entry.startswith("torch>="))
    assert torch.replace(">=", " >= ") in README
    assert project["description"] in README.replace("`", "")


def test_times_and_casts_are_those_of_the_newest_results() -> None:
    """For thirteen models on a CPU: geometric means of ratios to autocast, and counts."""
    newest = max((ROOT / "benchmarks" / "results").glob("*cpu*.json"))
    results = json.loads(newest.read_text())
    means = {(row["phase"], row["variant"]): f"{row['all']:.2f}" for row in results["means"] if not row["compiled"]}
    casts = {
        (row["case"], row["variant"]): str(row["casts"]["casts"])
        for row in results["cases"]
        if row["phase"] == "training" and not row["compiled"]
    }
    rows = re.findall(
        r"^\| (.*?) +\| +([\d.]+) +\| ([\d.]+) +\| ([\d.]*) +\| (\d+) +\| (\d+) +\|$", README, re.MULTILINE
    )
    assert len(rows) == len(VARIANTS)
    for (name, training, inference, frozen, gpt, resnet), variant in zip(rows, VARIANTS, strict=True):
        assert training == means["training", variant], name
        assert inference == means["inference", variant], name
        assert frozen == means.get(("inference", f"{variant}, frozen"), ""), name
        assert (gpt, resnet) == (casts["gpt-d384", variant], casts["resnet-18", variant]), name


VARIANTS = ("float32", "autocast", "fxamp autocast", "fxamp fast", "fxamp fast, shapes", "wholly low")
