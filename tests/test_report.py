"""The report: what it prints, what it holds, and that it adds up."""

from __future__ import annotations

import functools
import json
import os
import re
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxamp
from tests.zoo import BASIC as ZOO

FILE = os.path.basename(__file__)
NODE_KEYS = {
    "name": str,
    "op": str,
    "module": str,
    "rule": str,
    "inputs": str,
    "runs_in": str,
    "output": str,
    "casts": int,
    "reason": str,
    "source": str,
}
TOTAL_KEYS = """
    nodes lower fp32 promote follow opaque casts weight_casts activation_casts soft_casts dtype_unknown dtype_known
""".split()
RULES = ("lower", "fp32", "promote", "follow", "opaque", "")
DTYPES = {"f32", "bf16", "f16", "f64", "i64", "b8", "?", ""}


class Model(nn.Module):
    """Every rule, a weight used twice, a write, and integers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rnn = nn.Linear(4, 4), nn.GRU(4, 4)

    def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        a = self.fc(x)
        b = self.fc(a)
        b += 1
        c = torch.cat([b, b.float()])
        y, _ = self.rnn(c.softmax(-1))
        return F.mse_loss(y, c), i + 1


@functools.cache
def report(device_type: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> fxamp.Report:
    inputs = torch.zeros(4, 4), torch.zeros(2, dtype=torch.int64)
    amp = fxamp.convert(Model(), dtype=dtype, device_type=device_type, example_inputs=inputs)
    found = amp.report()
    assert isinstance(found, fxamp.Report)
    return found


def test_the_table() -> None:
    expected = textwrap.dedent(
        """\
        Model   policy autocast/cpu bf16   mode train

        name       op                module    rule     inputs     runs in    output      casts  why
        ---------  ----------------  --------  -------  ---------  ---------  --------  -------  ----------------------
        x          placeholder                                                f32             0  model input
        i          placeholder                                                i64             0  model input
        linear     F.linear          fc        lower    f32        bf16       bf16            3  op table
        linear_1   F.linear          fc        lower    bf16, f32  bf16       bf16            0  op table
        iadd       operator.iadd               follow   bf16       bf16       bf16            0  in-place
        float_1    Tensor.float                follow   bf16       f32        f32             0  input dtype
        cat        torch.cat                   promote  bf16, f32  f32        f32             1  op table
        softmax    Tensor.softmax              follow   f32        f32        f32             0  input dtype
        rnn        nn.GRU            rnn       opaque   f32                   f32             0  module runs as a whole
        getitem    operator.getitem            follow   f32        f32        f32             0  input dtype
        getitem_1  operator.getitem            follow   f32        f32        f32             0  input dtype
        mse_loss   F.mse_loss                  fp32     f32        f32        f32             0  op table
        add        operator.add                follow   i64                   i64             0  input dtype
        output     output                               f32, i64                              0

        ops: 2 lower, 1 fp32, 1 promote, 6 follow, 1 opaque     casts: 4 (2 of weights)     dtype unknown: 0 of 13 values"""  # noqa: E501
    )
    assert str(report()) == expected


def test_the_same_model_on_a_gpu_in_float16() -> None:
    found = report("cuda", torch.float16)
    assert str(found).splitlines()[0] == "Model   policy autocast/cuda f16   mode train"
    rules = {node["name"]: (node["rule"], node["runs_in"]) for node in found.nodes}
    assert rules["linear"] == ("lower", "f16")
    assert rules["cat"] == ("follow", "f32")
    assert rules["softmax"] == ("fp32", "f32")


def test_github() -> None:
    assert report().table("github", columns=("name", "rule", "casts")).splitlines()[:5] == [
        "| name      | rule    |   casts |",
        "|-----------|---------|---------|",
        "| x         |         |       0 |",
        "| i         |         |       0 |",
        "| linear    | lower   |       3 |",
    ]


def test_columns_in_the_order_asked_for() -> None:
    assert (
        report().table(columns=("why", "runs in", "name")).splitlines()[4]
        == "op table                bf16       linear"
    )
    assert report().table(columns=["reason", "runs_in"]).splitlines()[4].split() == ["op", "table", "bf16"]
    assert report().table(columns="op").splitlines()[2] == "placeholder"
    (line,) = (row for row in report().table(columns=("name", "source")).splitlines() if row.startswith("float_1"))
    assert re.fullmatch(rf"float_1\s+\S*{FILE}:\d+", line)


@pytest.mark.parametrize(
    ("call", "message", "hint"),
    [
        (
            lambda r: r.table(columns=("nme",)),
            "unknown column 'nme': expected one of name, op, module, rule, inputs, runs in, output, casts, why, "
            "source, runs_in, reason",
            "write 'name'",
        ),
        (
            lambda r: r.table(columns="sources"),
            "unknown column 'sources': expected one of name, op, module, rule, inputs, runs in, output, casts, why, "
            "source, runs_in, reason",
            "write 'source'",
        ),
        (lambda r: r.table("gihub"), r"unknown tablefmt 'gihub': expected one of ", "write 'github'"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_an_error(call: Any, message: str, hint: str) -> None:
    with pytest.raises(fxamp.FxampError) as raised:
        call(report())
    assert str(raised.value).startswith(message)
    assert str(raised.value).endswith(f"\n\nhint: {hint}")


def test_it_follows_the_mode_and_the_policy() -> None:
    amp = fxamp.convert(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), dtype=torch.bfloat16)
    assert (amp.report().mode, amp.eval().report().mode, amp.train().report().mode) == ("train", "eval", "train")
    assert "policy fast/cpu bf16" in str(amp.replan("fast").report())
    full = amp.replan("full").report()
    assert full.totals["casts"] == 0
    assert str(full).endswith("casts: 0 (0 of weights)     dtype unknown: 3 of 3 values")


# -- every model -----------------------------------------------------------------------------------------


ALL = [(name, device_type) for name in ZOO for device_type in ("cpu", "cuda")]


@functools.cache
def zoo(name: str, device_type: str, examples: bool) -> tuple[fxamp.AmpModule, fxamp.Report]:
    case = ZOO[name]
    inputs = ((*case.inputs(), *case.loss_args()), dict(case.kwargs)) if examples else None
    loss = None if name == "autoencoder" else case.loss  # its loss is refused on a GPU
    inputs = (case.inputs(), dict(case.kwargs)) if examples and loss is None else inputs
    amp = fxamp.convert(case.make(), loss, example_inputs=inputs, dtype=torch.bfloat16, device_type=device_type)
    return amp, amp.report()


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "derived"])
@pytest.mark.parametrize(("name", "device_type"), ALL)
def test_the_data_has_the_promised_form(name: str, device_type: str, examples: bool) -> None:
    amp, found = zoo(name, device_type, examples)
    data = found.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert list(data) == [
        "policy", "device_type", "dtype", "mode", "frontend", "failed_frontends", "note", "nodes", "totals",
    ]  # fmt: skip
    assert (data["policy"], data["device_type"], data["dtype"], data["mode"]) == (
        "autocast",
        device_type,
        "bf16",
        "train",
    )
    for node in data["nodes"]:
        assert {key: type(value) for key, value in node.items()} == NODE_KEYS
        assert list(node) == list(NODE_KEYS)
        assert node["rule"] in RULES
        assert node["reason"] or not node["rule"]
        assert {*node["inputs"].split(", "), node["runs_in"], *node["output"].split(", ")} <= DTYPES
        assert re.fullmatch(r"\S+\.py:\d+|", node["source"])
    assert [node["name"] for node in data["nodes"]] == [d.name for d in amp.plan if d.op != "get_attr"]
    if examples and name in ("mlp", "mlp_loss", "attention", "unet", "resnet", "gpt"):
        assert all("?" not in node["inputs"] + node["output"] for node in data["nodes"])


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "derived"])
@pytest.mark.parametrize(("name", "device_type"), ALL)
def test_columns_add_up_to_the_totals(name: str, device_type: str, examples: bool) -> None:
    amp, found = zoo(name, device_type, examples)
    data = found.to_dict()
    totals = data["totals"]
    assert list(totals) == TOTAL_KEYS
    assert {type(value) for value in totals.values()} == {int}
    assert totals["nodes"] == len(data["nodes"])
    for rule in ("lower", "fp32", "promote", "follow", "opaque"):
        assert totals[rule] == sum(node["rule"] == rule for node in data["nodes"]), rule
    casts = [node.meta["cast"] for node in amp.graph.nodes if "cast" in node.meta]
    assert totals["casts"] == sum(node["casts"] for node in data["nodes"]) == len(casts)
    assert totals["weight_casts"] == sum(cast.weight for cast in casts)
    assert totals["weight_casts"] + totals["activation_casts"] == totals["casts"]
    values = [node["output"] for node in data["nodes"] if node["output"]]
    assert totals["dtype_unknown"] == sum("?" in value for value in values)
    assert totals["dtype_known"] == len(values) - totals["dtype_unknown"]
    if examples and (device_type == "cpu" or name != "recurrent"):  # no GPU tells what its GRU gives
        assert totals["soft_casts"] == 0
    shown = found.table("tsv", columns=("casts",)).split()[1:]
    assert sum(map(int, shown)) == totals["casts"]


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "derived"])
@pytest.mark.parametrize(("name", "device_type"), ALL)
def test_the_text_is_plain(name: str, device_type: str, examples: bool) -> None:
    _, found = zoo(name, device_type, examples)
    text = str(found)
    assert text.isascii()
    assert "0x" not in text + json.dumps(found.to_dict())
    assert all(line == line.rstrip() for line in text.splitlines())
    assert str(found) == text
    assert found.to_dict() == found.to_dict()


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "derived"])
@pytest.mark.parametrize(("name", "device_type"), ALL)
def test_no_line_is_wider_than_119(name: str, device_type: str, examples: bool) -> None:
    text = str(zoo(name, device_type, examples)[1])
    assert max(map(len, text.splitlines())) <= 119


def test_the_widest_names_are_cut() -> None:
    class Inner(nn.Module):
        def forward(self, first_of_the_very_long_names: Tensor) -> Tensor:
            return torch.nn.functional.binary_cross_entropy_with_logits(
                first_of_the_very_long_names, first_of_the_very_long_names.double().float()
            )

    model = nn.Sequential()
    inner: nn.Module = model
    for name in ("encoder_with_a_long_name", "layers_with_a_long_name", "attention_with_a_long_name"):
        child = nn.Sequential()
        inner.add_module(name, child)
        inner = child
    inner.add_module("last", Inner())
    found = fxamp.convert(model, dtype=torch.bfloat16).report()
    assert max(map(len, str(found).splitlines())) <= 119
    whole = found.table("github")
    assert "encoder_with_a_long_name.layers_with_a_long_name.attention_with_a_long_name.last" in whole
    assert "binary_cross_entropy_with_logits" in whole


def test_the_data_is_the_readers_own() -> None:
    data = report().to_dict()
    data["nodes"][0]["name"] = "other"
    data["totals"]["casts"] = -1
    assert report().to_dict()["nodes"][0]["name"] == "x"
    assert report().to_dict()["totals"]["casts"] == 4
