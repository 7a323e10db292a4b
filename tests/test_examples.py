"""Every example runs without a warning, prints a table, and is short enough to read."""

import ast
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
DEMO = FOLDER / "demo.py"
EXAMPLES = sorted(set(FOLDER.glob("*.py")) - {DEMO})
TABLE = re.compile(r"^(-+(  -+)+|\|(:?-+:?\|)+)$", re.MULTILINE)


def run(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_prints_a_table(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert TABLE.search(run(path, capsys))


@pytest.mark.slow
def test_demo_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert TABLE.search(run(DEMO, capsys))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    assert docstring is not None
    assert len(docstring.splitlines()) == 1
    assert len(text.splitlines()) < 60


def test_policy_autocast_gives_the_same_with_fewer_casts(capsys: pytest.CaptureFixture[str]) -> None:
    table = run(FOLDER / "compare_with_autocast.py", capsys)
    theirs, ours, fast = (re.split(r"  +", line) for line in table.splitlines()[2:])
    assert ours[2:] == ["0", "0"]
    assert int(ours[1]) < int(theirs[1])
    assert int(fast[1]) < int(ours[1])


def test_the_gpu_keeps_more_in_float32(capsys: pytest.CaptureFixture[str]) -> None:
    table = run(FOLDER / "convert_for_gpu.py", capsys)
    marked = [line.split()[0] for line in table.splitlines() if line.endswith("differs")]
    assert marked == ["softmax", "matmul_1", "layer_norm"]


def test_an_override_changes_what_it_names_and_casts_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    table = run(FOLDER / "override_one_layer.py", capsys)
    changed = [line.split()[1] for line in table.splitlines() if line.startswith("after ")]
    assert changed == ["softmax", "matmul_1", "linear_1"]
