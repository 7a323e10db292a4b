"""The house: what is public, what is documented, who imports whom, and how big things are."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fxamp
import fxamp.cost

PACKAGE = Path(fxamp.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
MAX_LINES, MAX_FUNCTION = 330, 50


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


# -- names -----------------------------------------------------------------------------------------------


def test_the_public_names() -> None:
    assert fxamp.__all__ == [
        "AmpModule",
        "CaptureError",
        "FxampError",
        "GradScaler",
        "PlanError",
        "Policy",
        "PolicyError",
        "Report",
        "VerifyError",
        "backend",
        "convert",
        "inspect",
        "reports",
    ]
    assert all(hasattr(fxamp, name) for name in fxamp.__all__)


def test_nothing_else_looks_public() -> None:
    parts = {
        "capture",
        "compiling",
        "cost",
        "dtypes",
        "errors",
        "insight",
        "plan",
        "policy",
        "rewrite",
        "runtime",
        "scaling",
    }
    found = {name for name in vars(fxamp) if not name.startswith("_")} - {"registered"}  # torch.compile imports it
    assert found == {*fxamp.__all__} | parts


def test_the_promised_signatures() -> None:
    assert str(inspect.signature(fxamp.convert)).replace("'", "") == (
        "(model: Callable[..., Any], loss: Callable[..., Any] | None = None, *, example_inputs: Any = None, "
        "dtype: torch.dtype | None = None, device_type: str | None = None, policy: str | Policy = autocast) "
        "-> AmpModule"
    )
    for name in ("policy", "plan", "report", "scaler", "replan", "freeze", "hold_weights"):
        assert hasattr(fxamp.AmpModule, name), name
    for name in ("autocast", "fast", "full", "with_ops", "with_modules"):
        assert hasattr(fxamp.Policy, name), name
    for name in ("table", "to_dict"):
        assert hasattr(fxamp.Report, name), name
    for name in ("backward", "skipped", "overflow", "min_scale"):
        assert hasattr(fxamp.GradScaler, name), name
    assert issubclass(fxamp.AmpModule, torch.fx.GraphModule)
    assert issubclass(fxamp.GradScaler, torch.amp.GradScaler)


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_what_it_gives_away(name: str) -> None:
    """``__all__`` is there, sorted, and has no private name; a package only hands on."""
    module = __import__(f"fxamp.{name.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__"), fromlist=["x"])
    assert list(module.__all__) == sorted(module.__all__, key=_ruff_order)
    assert not [public for public in module.__all__ if public.startswith("_")]
    assert ast.get_docstring(tree(name)), "a module docstring"


def _ruff_order(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


# -- documentation ---------------------------------------------------------------------------------------


class Documented(NamedTuple):
    """A public function or class, with the class that it is in."""

    value: Any
    owner: Any = None


def public() -> Iterator[tuple[str, Documented]]:
    for name in fxamp.__all__:
        value = getattr(fxamp, name)
        yield name, Documented(value)
        for member, found in vars(value).items() if isinstance(value, type) else ():
            function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
            if not member.startswith("_") and inspect.isfunction(function):
                yield f"{name}.{member}", Documented(function, value)


PUBLIC = dict(public())
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example")


def sections(docstring: str) -> list[str]:
    return re.findall(rf"^({'|'.join(SECTIONS)})::?$", docstring, re.MULTILINE)


def entries(docstring: str, section: str) -> list[str]:
    """The names a section explains."""
    lines = iter(docstring.splitlines())
    found = []
    for line in lines:
        if line == f"{section}:":
            break
    for line in lines:
        if line and not line.startswith("    "):
            break
        if match := re.match(r"    (\w[\w, ]*):", line):
            found += match[1].split(", ")
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str) -> None:
    value, owner = PUBLIC[name]
    docstring = inspect.cleandoc(value.__doc__ or "")
    first = docstring.partition("\n\n")[0]
    assert first, "a docstring"
    assert first.endswith(".") and len(first.splitlines()) <= 2, first  # noqa: PT018
    assert (order := sections(docstring)) == sorted(order, key=SECTIONS.index)
    if isinstance(value, type):
        return
    parameters = [p for p in inspect.signature(value).parameters.values() if p.name not in ("self", "cls")]
    if "Args" in sections(docstring):
        assert entries(docstring, "Args") == [p.name for p in parameters]
    around = docstring + inspect.cleandoc(getattr(owner, "__doc__", "") or "")
    for parameter in parameters:
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            assert re.search(rf"\b{parameter.name}\b", around), f"{parameter.name} is not explained"


@pytest.mark.parametrize("name", PUBLIC)
def test_what_a_public_function_raises_is_documented(name: str) -> None:
    value, _ = PUBLIC[name]
    if isinstance(value, type):
        return
    node = ast.parse(inspect.cleandoc("\n" + inspect.getsource(value)))
    raises = any(isinstance(found, ast.Raise) for found in ast.walk(node))
    docstring = inspect.cleandoc(value.__doc__ or "")
    if raises and name != "GradScaler.step":  # its error is torch's own
        assert "Raises" in sections(docstring)


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("convert", ["CaptureError", "PolicyError", "PlanError"]),
        ("Policy.with_ops", ["PolicyError"]),
        ("Policy.with_modules", ["PolicyError"]),
        ("Report.table", ["FxampError"]),
        ("AmpModule.replan", ["PolicyError"]),
        ("GradScaler.backward", ["FxampError"]),
        ("inspect", ["FxampError"]),
    ],
)
def test_the_errors_named(name: str, errors: list[str]) -> None:
    assert entries(inspect.cleandoc(PUBLIC[name].value.__doc__), "Raises") == errors


# -- who imports whom ------------------------------------------------------------------------------------

# Each part may import itself and the parts before it.
ORDER = (
    "errors", "dtypes", "cost", "policy", "capture", "plan", "scaling", "runtime", "rewrite", "insight", "convert",
    "compiling", "backend", "registered", "__init__",
)  # fmt: skip


def imports(name: str) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node, str(node.module)
            if node.module == "fxamp":
                yield from ((node, f"fxamp.{alias.name}") for alias in node.names)


def part_of(name: str) -> str:
    return name.partition("/")[0].removesuffix(".py")


def test_every_part_has_its_place() -> None:
    assert {part_of(name) for name in FILES} == set(ORDER)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name: str) -> None:
    mine = ORDER.index(part_of(name))
    for node, module in imports(name):
        if module.split(".")[0] == "fxamp":
            other = (*module.split("."), "__init__")[1]
            assert ORDER.index(other) <= mine, f"line {node.lineno}: {module}"


@pytest.mark.parametrize("name", FILES)
def test_imports_are_pythons_torch_and_tabulate(name: str) -> None:
    found = {module.split(".")[0] for _, module in imports(name)}
    assert found - set(sys.stdlib_module_names) <= {"fxamp", "torch", "tabulate", "networkx"}  # torch brings the last


# file: function: what it imports, and only when it runs
LOCAL_IMPORTS: dict[tuple[str, str], str] = {
    # To import Dynamo takes a second, which who does not need it shall not wait for.
    ("capture/sizes.py", "written"): "from torch.utils._sympy.printers import PythonPrinter",
    ("capture/sizes.py", "_is_endless"): "from torch.utils._sympy.numbers import int_oo",
    ("capture/traces.py", "_trace_whole_once"): "from fxamp.capture.dynamo import DynamoTracer",
    ("compiling/running.py", "_inductor"): "from torch import _inductor",
    ("compiling/running.py", "_looked_up"): "from torch._dynamo.backends.registry import lookup_backend",
    ("compiling/surrounding.py", "surround_calls"): "from torch._dynamo import eval_frame",
    # Nor networkx, which torch itself imports only when it is used.
    ("plan/cut.py", "_cut"): "import networkx",
}


@pytest.mark.parametrize("name", FILES)
def test_imports_are_at_the_top(name: str) -> None:
    for function in functions(name):
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert LOCAL_IMPORTS.get((name, function.name)) == ast.unparse(node), f"line {node.lineno}"


def test_it_imports_and_works_without_numpy() -> None:
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import torch, fxamp\n"
        "amp = fxamp.convert(torch.nn.Linear(2, 2), dtype=torch.bfloat16, example_inputs=(torch.zeros(1, 2),))\n"
        "assert amp(torch.zeros(1, 2)).dtype == torch.bfloat16\n"
        "assert 'F.linear' in str(amp.report())\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_it_depends_on() -> None:
    project = PACKAGE.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("no project file beside the package")
    found = tomllib.loads(project.read_text())["project"]["dependencies"]
    assert [re.split(r"\W", line)[0] for line in found] == ["torch", "tabulate"]


def test_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


# -- how big things are ----------------------------------------------------------------------------------


def functions(name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def table_lines(name: str) -> int:
    """How many lines of a file are tables written as one string."""
    values = (node.value for node in tree(name).body if isinstance(node, ast.Assign | ast.AnnAssign))
    tables = (value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str))
    return sum((table.end_lineno or 0) - table.lineno + 1 for table in tables)


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_long(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) - table_lines(name) <= MAX_LINES


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_long(name: str) -> None:
    for function in functions(name):
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        if body:
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1
            assert length <= MAX_FUNCTION, f"{function.name} has {length} lines"
