"""The operator tables against the running torch: its registrations, its autocast, and what comes out."""

from __future__ import annotations

import operator
import re
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fxamp.errors import PolicyError
from fxamp.policy import composites, operators
from fxamp.policy.flow import ONE_DTYPE, _kinds, output_kind
from fxamp.policy.operators import FORWARDS_TO, OPERATORS, operator_rules, packet_of, transparent
from fxamp.policy.python_table import FUNCTIONS, OPERATOR_MODULE
from fxamp.policy.spellings import _parameters, aten_name, resolve_operator
from tests.samples import op_db, samples

DEVICES = ("cuda", "cpu")
LOW = torch.bfloat16
ONLY_IN_BUILDS_WITH_A_GPU = {"_cudnn_rnn", "miopen_rnn"}
NEWEST = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def rows(device_type: str) -> dict[str, str]:
    return {name: row[device_type] for name, row in OPERATORS.items() if row[device_type] != "follow"}


def overload(name: str) -> Any:
    packet, _, rest = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), rest or "default")


# -- the rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_type", DEVICES)
def test_the_rows_are_what_torch_registers(device_type: str) -> None:
    registered = operators.registered_operators(device_type) - ONLY_IN_BUILDS_WITH_A_GPU
    assert registered <= set(rows(device_type))
    if NEWEST:
        assert registered == set(rows(device_type))


def test_every_row_is_an_operator_with_known_rules() -> None:
    known = {"lower", "fp32", "fp32_dtype", "promote", "banned", "follow"}
    for name, row in OPERATORS.items():
        assert set(row.values()) <= known, name
        assert set(row.values()) != {"follow"}, name
        if NEWEST:
            assert overload(name), name


def test_the_cuda_rows_are_the_lists_of_the_installed_header() -> None:
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    if not header.exists() or not NEWEST:
        pytest.skip("no header of this version")
    text = header.read_text().replace("\\\n", "")
    lists = dict(re.findall(r"#define AT_FORALL_(\w+)\(_\)(.*)", text))
    rules = {
        "LOWER_PRECISION_FP": "lower",
        "FP32": "fp32",
        "FP32_SET_OPT_DTYPE": "fp32_dtype",
        "PROMOTE": "promote",
    }
    found = {
        ".".join(filter(None, (part.strip() for part in entry.split(",")))): rule
        for key, rule in rules.items()
        for entry in re.findall(r"_\(([^()]+)\)", lists[key])
    }
    found |= dict.fromkeys(re.findall(r'"(norm\.\w+)"', text), "fp32_dtype")
    # Registered by name beside the lists, in autocast_mode.cpp.
    by_hand = {
        "binary_cross_entropy": "banned",
        "cudnn_convolution": "lower",
        "cudnn_convolution_transpose": "lower",
    }
    assert rows("cuda") == found | by_hand


class Reached(Exception):
    """Raised in place of an operator's kernel, with what autocast passed on to it."""


def _invented(argument: torch.Argument, tensor: Callable[[], torch.Tensor]) -> Any:
    """Some value of an argument's type; no kernel ever looks at it."""
    kind = str(argument.type)
    if kind.startswith("List[Optional"):
        return [torch.ones(1, dtype=torch.int64)]
    if "Tensor" in kind:
        return [tensor(), tensor()] if "List" in kind else tensor()
    values = {"int": 1, "SymInt": 1, "float": 1.0, "number": 1, "bool": False, "str": "x"}
    item = values.get(kind.removeprefix("List[").removesuffix("]"))
    return [item] if kind.startswith("List") else item


def _passed_on(name: str, device_type: str, dtypes: tuple[torch.dtype, ...]) -> set[torch.dtype | str]:
    """The dtypes with which autocast calls an operator that is given these."""
    made = iter(range(1000))

    def tensor() -> torch.Tensor:
        with FakeTensorMode():
            return torch.empty(2, 2, dtype=dtypes[next(made) % len(dtypes)], device=device_type)

    def record(*args: Any, **kwargs: Any) -> None:
        leaves = tree_leaves((args, kwargs))
        named = {"dtype=" for leaf in leaves if leaf is torch.float32}
        raise Reached({leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)} - {torch.int64} | named)

    target = overload(name)
    arguments = {a.name: (a.kwarg_only, _invented(a, tensor)) for a in target._schema.arguments}
    with warnings.catch_warnings(), torch.library._scoped_library("aten", "IMPL") as library:
        warnings.simplefilter("ignore")
        for each in {name, "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim_dtype"}:
            library.impl(each, record, f"Autograd{device_type.upper()}")
        try:
            with autocast_on(device_type):
                target(
                    *(value for only, value in arguments.values() if not only),
                    **{key: value for key, (only, value) in arguments.items() if only},
                )
        except Reached as reached:
            return reached.args[0]
        except RuntimeError as error:
            return {"banned"} if "unsafe to autocast" in str(error) else {str(error)}
    return set()


@contextmanager
def autocast_on(device_type: str) -> Iterator[None]:
    """Autocast as the thread's state has it: the context manager refuses "cuda" on a build without."""
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, True)
    torch.set_autocast_dtype(device_type, LOW)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])
        torch.clear_autocast_cache()


BEFORE_THE_KERNEL: dict[str, list[set[Any]]] = {
    "lower": [{LOW}, {LOW}, {LOW}],
    "fp32": [{torch.float32}, {torch.float32}, {torch.float32}],
    "fp32_dtype": [{torch.float32, "dtype="}, {LOW, "dtype="}],
    "promote": [{torch.float32}, {LOW}, {torch.float32}],
    "banned": [{"banned"}] * 3,
    "follow": [{torch.float32}, {LOW}],
}


def check_row(name: str, device_type: str) -> None:
    """The rule of a row is what autocast does to an operator's arguments before its kernel."""
    rule = OPERATORS[name][device_type]
    registered = name in operators.registered_operators(device_type)
    assert registered == (rule != "follow") or not NEWEST, name
    if registered or rule == "follow":
        given = ((torch.float32,), (LOW,), (torch.float32, LOW))
        expected = BEFORE_THE_KERNEL[rule]
        assert [_passed_on(name, device_type, dtypes) for dtypes in given][: len(expected)] == expected, name


@pytest.mark.parametrize("device_type", DEVICES)
def test_every_row_is_what_autocast_does_before_the_kernel(device_type: str) -> None:
    for name in OPERATORS:
        check_row(name, device_type)


def test_rules_are_by_packet_and_forwarded() -> None:
    cuda, cpu = operator_rules("cuda"), operator_rules("cpu")
    assert cuda["linear"] == cpu["linear"] == "lower"
    assert (cuda["softmax"], cuda["special_softmax"], cuda["square"]) == ("fp32_dtype", "fp32_dtype", "fp32")
    assert (cpu["hstack"], cpu["nll_loss_nd"]) == ("promote", "fp32")
    assert "softmax" not in cpu
    assert "hstack" not in cuda
    assert "_convolution" not in cpu  # one overload is listed, the other is not
    assert "follow" not in set(cuda.values()) | set(cpu.values())
    for device_type in DEVICES:
        listed = {packet_of(name) for name in OPERATORS}
        assert set(FORWARDS_TO[device_type].values()) <= listed


def test_an_unknown_device_type_is_an_error_with_the_nearest() -> None:
    for function in (operator_rules, lambda device_type: transparent("add", device_type)):
        with pytest.raises(PolicyError, match=r"unknown device type 'cud'.*\n\nhint: write device_type='cuda'"):
            function("cud")


# -- transparent -----------------------------------------------------------------------------------------

SAME_ON_BOTH = """
    reshape flatten chunk split dropout contiguous to type_as expand_as view_as batch_norm instance_norm
    max_pool1d max_pool2d adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d selu silu gelu
    relu hardshrink where std var mean embedding embedding_bag unflatten narrow index_select movedim tile
    repeat_interleave one_hot add add_ take_along_dim constant_pad_nd masked_fill view permute transpose
    unsqueeze clone rsub relu_ exp_ pixel_shuffle
"""


def test_common_operators_are_transparent_where_autocast_leaves_them_alone() -> None:
    assert [name for name in SAME_ON_BOTH.split() if not (transparent(name, "cpu") and transparent(name, "cuda"))] == []
    for name in "layer_norm softmax log_softmax exp sum group_norm rms_norm square arctan2 upsample_nearest2d".split():
        assert transparent(name, "cpu"), name
        assert not transparent(name, "cuda") or name in FORWARDS_TO["cuda"], name
    for name in "cat stack pad".split():
        assert transparent(name, "cuda"), name
        assert not transparent(name, "cpu"), name
    for name in "matmul lstm gru affine_grid_generator cov corrcoef linalg_pinv no_such_operator".split():
        assert not transparent(name, "cpu"), name
        assert not transparent(name, "cuda"), name


def test_the_rows_of_composites_name_operators() -> None:
    for device_type in DEVICES:
        listed = {packet_of(name) for name in rows(device_type)}
        for name, cell in composites._CELLS[device_type].items():
            assert cell in ("same", "listed", "-") or cell in operators.aten_packets(), name
            if NEWEST:
                assert name in operators.aten_packets(), name
                assert (cell == "listed") == (name in listed), name
        if NEWEST:
            assert composites.UNDER_AUTOCAST[device_type] <= operators.aten_packets() - listed


# -- spellings -------------------------------------------------------------------------------------------

FUNCTION_NAMES = [
    (torch.softmax, "softmax"),
    (F.softmax, "softmax"),
    (F.softmin, "softmax"),
    (F.linear, "linear"),
    (F.conv2d, "conv2d"),
    (F.gelu, "gelu"),
    (F.logsigmoid, "log_sigmoid"),
    (F.cross_entropy, "cross_entropy_loss"),
    (F.nll_loss, "nll_loss"),
    (F.embedding, "embedding"),
    (F.grid_sample, "grid_sampler"),
    (F.unfold, "im2col"),
    (F.fold, "col2im"),
    (F.dropout2d, "feature_dropout"),
    (F.max_pool2d, "max_pool2d"),
    (F.scaled_dot_product_attention, "scaled_dot_product_attention"),
    (F.pad, "constant_pad_nd"),
    (F.interpolate, "upsample_nearest2d"),
    (F.normalize, None),
    (F.multi_head_attention_forward, None),
    (F.gumbel_softmax, None),
    (F.local_response_norm, None),
    (F.fractional_max_pool2d, None),
    (torch.matmul, "matmul"),
    (torch.einsum, "einsum"),
    (torch.norm, "linalg_vector_norm"),
    (torch.split, "split"),
    (torch.stft, "stft"),
    (torch.unique, None),
    (torch.Tensor.add_, "add_"),
    (torch.Tensor.__rsub__, "rsub"),
    (torch.Tensor.norm, "linalg_vector_norm"),
    (torch._VF.dropout, "dropout"),
    (torch._C._nn.nll_loss_nd, "nll_loss_nd"),
    (torch.linalg.norm, "linalg_norm"),
    (torch.fft.fft, "fft_fft"),
    (torch.special.expit, "special_expit"),
    (torch.ops.aten.mm, "mm"),
    (torch.ops.aten.mm.default, "mm"),
    (torch.ops.aten.mm.dtype, None),
    (torch.ops.aten.norm.Scalar, None),
    (torch.ops.aten.add_.Tensor, "add_"),
    (torch.ops.prims.exp.default, None),
    (operator.add, "add"),
    (operator.iadd, "add_"),
    (operator.imatmul, "matmul"),
    (operator.truediv, "div"),
    (operator.invert, "bitwise_not"),
    (operator.getitem, None),
    (len, None),
    (max, None),
    (lambda x: x, None),
]


@pytest.mark.parametrize(("function", "name"), FUNCTION_NAMES)
def test_a_function_reaches_an_operator(function: Callable[..., Any], name: str | None) -> None:
    assert aten_name("call_function", function) == name
    if name is not None:
        assert resolve_operator(function) == name


METHOD_NAMES = """
    matmul=matmul __matmul__=matmul __rmatmul__=matmul softmax=softmax float=float bfloat16=bfloat16 to=to
    cuda=to view=view add_=add_ __radd__=add __iadd__=add_ __and__=bitwise_and __ror__=bitwise_or
    __neg__=neg __rpow__=pow __rsub__=rsub __rtruediv__=reciprocal norm=linalg_vector_norm split=split
    stft=stft unflatten=unflatten index_put_=index_put_ masked_fill=masked_fill new_zeros=new_zeros
    unique= lu= T= no_such_method= new_tensor=
"""


@pytest.mark.parametrize("row", METHOD_NAMES.split())
def test_a_method_reaches_an_operator(row: str) -> None:
    method, _, name = row.partition("=")
    assert aten_name("call_method", method) == (name or None)


X = object()


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "name"),
    [
        (F.relu, (X, True), {}, "relu_"),
        (F.dropout, (X,), {"inplace": True}, "dropout_"),
        (F.max_pool2d, (X, 2), {"return_indices": True}, "max_pool2d_with_indices"),
        (F.max_pool3d, (X, 2, 2, 0, 1, False, True), {}, "max_pool3d_with_indices"),
        (F.adaptive_max_pool3d, (X, 2, True), {}, None),
        (F.pad, (X, [1, 1], "reflect"), {}, "reflection_pad1d"),
        (F.pad, (X, (1, 1, 1, 1)), {"mode": "replicate"}, "replication_pad2d"),
        (F.pad, (X, X, "reflect"), {}, "pad"),
        (F.mse_loss, (X, X), {"weight": X}, None),
        (F.mse_loss, (X, X), {"weight": None}, "mse_loss"),
        (operator.truediv, (1.0, X), {}, "reciprocal"),
        (operator.truediv, (X, 2.0), {}, "div"),
        (operator.sub, (1.0, X), {}, "rsub"),
        (F.pad, (X, (1, 1), "circular"), {}, "_pad_circular"),
        (torch.norm, (X, "nuc"), {}, "linalg_matrix_norm"),
        (torch.mm, (X, X), {"out_dtype": torch.float32}, None),
    ],
)
def test_arguments_choose_the_operator(function: Any, args: Any, kwargs: Any, name: str | None) -> None:
    assert aten_name("call_function", function, args, kwargs) == name


# Written in Python: they reach several operators that autocast treats differently, or draw random numbers.
WITHOUT_AN_OPERATOR = """
F.assert_int_or_pair F.boolean_dispatch F.handle_torch_function F.fractional_max_pool2d
F.fractional_max_pool2d_with_indices F.fractional_max_pool3d F.fractional_max_pool3d_with_indices
F.gaussian_nll_loss F.grouped_mm F.gumbel_softmax F.linear_cross_entropy F.local_response_norm
F.lp_pool1d F.lp_pool2d F.lp_pool3d F.multi_head_attention_forward F.multilabel_soft_margin_loss F.normalize
F.scaled_grouped_mm F.scaled_mm F.triplet_margin_with_distance_loss F.upsample F.upsample_bilinear
F.upsample_nearest torch.broadcast_shapes torch.lu torch.pca_lowrank torch.svd_lowrank torch.unique
torch.unique_consecutive torch.unravel_index
""".split()


def test_every_python_function_of_torch_is_decided() -> None:
    if not NEWEST:
        pytest.skip("the list is of the newest version")
    public = {
        f"{prefix}.{name}"
        for prefix, module in (("F", F), ("torch", torch.functional))
        for name in (dir(F) if module is F else module.__all__)
        if isinstance(getattr(module, name), types.FunctionType) and not name.startswith("_")
    }
    rows = {line.split()[0] for line in FUNCTIONS.strip().splitlines()}
    assert public - rows - {"F.interpolate", "F.pad", "torch.norm"} == set(WITHOUT_AN_OPERATOR)
    for name in WITHOUT_AN_OPERATOR:
        with pytest.raises(PolicyError, match="reaches no single ATen operator"):
            resolve_operator(name)


def test_every_row_of_functions_names_a_function_and_an_operator() -> None:
    for line in FUNCTIONS.strip().splitlines():
        spelling, name, *rest = line.split()
        assert operators.is_aten(name), line
        assert not rest[1:] or operators.is_aten(rest[1]), line
        assert resolve_operator(spelling) == name


class Dispatched(TorchDispatchMode):
    """Remembers which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("row", list(zip(*[iter(OPERATOR_MODULE.split())] * 2, strict=True)))
def test_a_function_of_the_operator_module_runs_the_operator_of_its_row(row: tuple[str, str]) -> None:
    function, name = getattr(operator, row[0]), row[1]
    x = torch.tensor([[1, 2], [3, 4]]) if "bitwise" in name or "shift" in name else torch.ones(2, 2)
    with Dispatched() as seen:
        function(x) if row[0] in ("abs", "inv", "invert", "neg", "pos") else function(x.clone(), x)
    ran = {"matmul": "mm", "positive": "positive"}.get(name, name)  # made of others, and nothing at all
    assert ran in (*seen.names, "positive"), seen.names
    assert (name == "positive") == (row[0] == "pos")


WITHOUT_ARITHMETIC = """
    attrgetter call concat contains countOf delitem getitem iconcat ilshift index indexOf irshift is_ is_not
    itemgetter length_hint methodcaller not_ setitem truth
""".split()


def test_every_function_of_the_operator_module_is_decided() -> None:
    assert set(operator.__all__) - set(OPERATOR_MODULE.split()[::2]) - set(WITHOUT_ARITHMETIC) <= {"call"}


# Functions that are called otherwise than the operator that they reach.
RENAMED = """
    F.adaptive_max_pool1d_with_indices=adaptive_max_pool1d F.adaptive_max_pool2d_with_indices=adaptive_max_pool2d
    F.adaptive_max_pool3d_with_indices=adaptive_max_pool3d F.affine_grid=affine_grid_generator
    F.cross_entropy=cross_entropy_loss F.dropout1d=feature_dropout F.dropout2d=feature_dropout
    F.dropout3d=feature_dropout F.fold=col2im F.grid_sample=grid_sampler F.logsigmoid=log_sigmoid
    F.max_unpool1d=max_unpool2d F.softmin=softmax F.softsign=div F.tanhshrink=sub F.unfold=im2col
""".split()


def test_a_function_stands_for_the_operator_of_its_name() -> None:
    renamed = dict(row.split("=") for row in RENAMED)
    for line in FUNCTIONS.strip().splitlines():
        spelling, name, *_ = line.split()
        own = spelling.rpartition(".")[2]
        assert name == renamed.get(spelling, own), line


@pytest.mark.parametrize("argument", ["return_indices", "max_norm", "weight"])
def test_an_argument_that_makes_another_operator_of_it_is_looked_at(argument: str) -> None:
    weighted = ("mse_loss", "l1_loss", "huber_loss")
    for line in FUNCTIONS.strip().splitlines():
        function = getattr(F, line.split()[0].partition(".")[2], None) if line.startswith("F.") else None
        if function is None or argument not in _parameters(function) or "_with_indices" in line.split()[0]:
            continue
        if argument == "weight" and function.__name__ not in weighted:
            continue
        plain = aten_name("call_function", function, (X, X))
        assert aten_name("call_function", function, (X, X), {argument: True}) != plain, line


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("aten::exp", "exp"),
        ("exp", "exp"),
        ("softmax.int", "softmax"),
        ("torch.softmax", "softmax"),
        ("F.cross_entropy", "cross_entropy_loss"),
        ("torch.nn.functional.cross_entropy", "cross_entropy_loss"),
        ("torch.ops.aten.exp.default", "exp"),
        ("Tensor.exp", "exp"),
        ("operator.add", "add"),
    ],
)
def test_a_key_in_words_names_an_operator(key: str, name: str) -> None:
    assert resolve_operator(key) == name


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "torch.sofmax",
            "unknown operator 'torch.sofmax': not an ATen operator\n\nhint: did you mean 'torch.softmax'?",
        ),
        ("aten::expp", "unknown operator 'aten::expp': not an ATen operator\n\nhint: did you mean 'exp'?"),
        (
            "F.normalize",
            "'F.normalize' reaches no single ATen operator\n\nhint: name an operator as torch does",
        ),
        (torch.nn.Linear, "Linear reaches no single ATen operator\n\nhint: name an operator as torch does"),
        ("zzzqqq", "unknown operator 'zzzqqq': not an ATen operator\n\nhint: name an operator as torch does"),
    ],
)
def test_an_unknown_key_is_an_error_with_the_nearest(key: Any, message: str) -> None:
    with pytest.raises(PolicyError) as raised:
        resolve_operator(key)
    assert str(raised.value).startswith(message)


# -- what comes out --------------------------------------------------------------------------------------


def told(kind: Any, tensors: list[torch.Tensor]) -> Any:
    """The dtype that a kind stands for, or None."""
    if isinstance(kind, tuple):
        return tuple(told(item, tensors) for item in kind)
    floats = {x.dtype for x in tensors if x.is_floating_point()}
    first, joined = tensors[0].dtype, tensors[0]
    for x in tensors[1:]:
        joined = torch.empty((1,) * max(joined.dim(), x.dim()), dtype=torch.result_type(joined, x))
    return {
        "first": first,
        "promote": joined.dtype,
        "float_promote": joined.dtype if joined.is_floating_point() else torch.float32,
        "uniform": next(iter(floats)) if len(floats) == 1 else None,
        "accumulate": first if first.is_floating_point else torch.int64,
        "bool": torch.bool,
        "int32": torch.int32,
        "int64": torch.int64,
    }.get(kind)


def agrees(kind: Any, dtype: Any, out: Any) -> bool:
    """Whether a result is what the kind promised; a list of tensors has the one kind of its elements."""
    if isinstance(dtype, tuple):
        same_length = isinstance(out, tuple) and len(out) == len(dtype)
        return same_length and all(agrees(kind, one, x) for one, x in zip(dtype, out, strict=True))
    if isinstance(out, (tuple, list)):
        return all(agrees(kind, dtype, x) for x in out)
    return dtype is None or (isinstance(out, torch.Tensor) and out.dtype == dtype)


def check_kinds(count: int, dtypes: tuple[torch.dtype, ...], second: torch.dtype | None) -> int:
    checked, wrong = 0, []
    for info in op_db():
        for dtype in dtypes:
            for args, kwargs in samples(info, count, dtype) if dtype in info.dtypes else ():
                flat, spec = tree_flatten((args, kwargs))
                floats = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor) and x.is_floating_point()]
                for i in floats[1::2] if second is not None else ():
                    flat[i] = flat[i].to(second)
                args, kwargs = tree_unflatten(flat, spec)
                name = aten_name("call_function", info.op, args, kwargs)
                kind = output_kind(name, info.op, args, kwargs) if name else None
                tensors = [x for x in flat if isinstance(x, torch.Tensor)]
                if kind is None or not tensors or not all(x.numel() for x in tensors):
                    continue
                try:
                    out = info.op(*args, **kwargs)
                except (RuntimeError, TypeError, ValueError, IndexError):
                    continue
                checked += 1
                if not agrees(kind, told(kind, tensors), out):
                    wrong.append(f"{name}: {kind} of {[x.dtype for x in tensors]}")
    assert not wrong, "\n".join(wrong)
    return checked


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(ONE_DTYPE))
def test_an_operator_of_one_dtype_refuses_two(name: str) -> None:
    found = [i for i in op_db() if name in (i.aten_name, i.name.rpartition(".")[2], i.name.replace(".", "_"))]
    for info in found:
        for args, kwargs in samples(info, 3):
            flat, spec = tree_flatten((args, kwargs))
            floats = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor) and x.is_floating_point()]
            flat[floats[0]] = flat[floats[0]].double()
            if len(floats) > 1 and all(flat[i].numel() for i in floats):
                args, kwargs = tree_unflatten(flat, spec)
                with pytest.raises(RuntimeError):
                    info.op(*args, **kwargs)
    assert found or name in ("_addmm_activation", "chain_matmul", "conv_tbc", "convolution", "vdot")


@pytest.mark.filterwarnings("ignore")
def test_what_comes_out_is_of_the_promised_kind() -> None:
    assert check_kinds(2, (torch.float32, LOW), None) > 1000
    assert check_kinds(4, (torch.float32,), LOW) > 200


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_comes_out_is_of_the_promised_kind_in_all_samples() -> None:
    assert check_kinds(60, (torch.float32, LOW), None) > 5000
    assert check_kinds(60, (torch.float32,), LOW) > 1000


INTEGERS = """
    exp float_promote sigmoid float_promote div float_promote mean first argmax int64 eq bool add promote
    embedding promote cumsum accumulate sum accumulate relu promote abs promote
"""


def test_integers_turn_floating_where_they_should() -> None:
    x = torch.arange(1, 4)
    for name, kind in zip(*[iter(INTEGERS.split())] * 2, strict=True):
        assert output_kind(name) == kind, name
    for name in "exp sigmoid sqrt log sin tanh sum prod relu abs neg sign argmax isnan".split():
        assert getattr(torch, name)(x).dtype == told(output_kind(name), [x]), name
    assert torch.div(x, x).dtype == told(output_kind("div"), [x, x])
    floor = torch.div(x, x, rounding_mode="floor")
    assert floor.dtype == told(output_kind("div", kwargs={"rounding_mode": "floor"}), [x, x])


def test_the_arguments_tell_a_reduction_from_a_pair() -> None:
    assert output_kind("max") is None
    assert output_kind("max", torch.max, (X,)) == "first"
    assert output_kind("max", torch.max, (X, 1)) == output_kind("max", "max", (X,), {"dim": 1}) == ("first", "int64")
    assert output_kind("max", torch.max, (X, X)) is None
    assert output_kind("view", "view", (X, torch.int32)) is None
    assert output_kind("adaptive_max_pool2d") is None
    assert output_kind("adaptive_max_pool2d", F.adaptive_max_pool2d, (X, 2)) == "first"
    assert output_kind("embedding_bag", F.embedding_bag, (X, X)) == "promote"
    assert output_kind("embedding_bag", torch.embedding_bag, (X, X)) is None


def test_views_writes_and_pointwise_operators_are_told_by_torch() -> None:
    for name in "view transpose squeeze select detach add_ relu_ index_put_ reshape contiguous to_".split():
        assert output_kind(name) == ("first" if name != "to_" else None), name
    for name in "add mul gelu where maximum clamp rsub".split():
        assert output_kind(name) == "promote", name
    for name in "to _to_copy type_as view_as_complex no_such_operator size".split():
        assert output_kind(name) is None, name
    assert [name for name in _kinds() if not operators.is_aten(name)] == []


@pytest.mark.parametrize(("name", "call"), [("real", torch.real), ("positive", torch.positive), ("conj", torch.conj)])
def test_a_kind_that_promises_a_new_tensor_keeps_the_promise(name: str, call: Callable[..., Any]) -> None:
    x = torch.ones(2)
    assert call(x) is x or call(x).data_ptr() == x.data_ptr()
    assert output_kind(name) == "first"


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear", "bilinear", "trilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
def test_each_mode_of_interpolate_has_the_rule_of_its_operators(mode: str, antialias: bool) -> None:
    if antialias and mode not in ("bilinear", "bicubic"):
        pytest.skip("torch antialiases in two modes")
    name = aten_name("call_function", F.interpolate, (None,), {"mode": mode, "antialias": antialias})
    assert name is not None
    assert operator_rules("cuda")[name] == "fp32"
    assert name not in operator_rules("cpu")


def test_interpolating_by_area_reaches_a_pool() -> None:
    assert aten_name("call_function", F.interpolate, (None, 4), {"mode": "area"}) is None
