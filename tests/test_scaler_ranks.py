"""The scaler on two ranks that average gradients by hand: they skip together, and each can say why."""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fxamp
from fxamp.scaling import GradScaler
from tests.helpers import assert_same
from tests.rank_models import MODELS, SHARDED, Squares, converted, flat, small_model
from tests.rank_training import OPTIMIZERS, SETTINGS, Counting, Script, Training, add_fault, average

GROUPS = {  # made on all ranks
    "default": lambda rank: None,
    "False": lambda rank: False,
    "given": lambda rank: dist.new_group([0, 1]),
    "rank 0": lambda rank: dist.new_group([0]),
    "each alone": lambda rank: [dist.new_group([0]), dist.new_group([1])][rank],
}


def data_parallel(rank, script, group="default", ours=True, model="small"):
    script, model = script._replace(autocast=model == "float16"), MODELS[model]()
    kwargs = {"process_group": GROUPS[group](rank)} if ours else {}
    scaler = (GradScaler if ours else torch.amp.GradScaler)("cpu", **SETTINGS, **kwargs)
    parameters = list(model.parameters())
    return Training(rank, model, scaler, script).run(4, lambda: average(parameters)).result()


# -- a fault on one rank -----------------------------------------------------------------------------------

FAULTS = {
    "inf": Script(fault=math.inf),
    "nan": Script(fault=math.nan),
    "the first step": Script(fault=math.inf, fault_step=0),
    "clipped by hand": Script(fault=math.inf, clip="by hand"),
    "clip_norm": Script(fault=math.inf, clip="clip_norm"),
    "nan, clip_norm": Script(fault=math.nan, clip="clip_norm"),
    "adamw": Script(("adamw",), fault=math.inf),
    "fused": Script(("fused adamw",), fault=math.inf),
    "fused, nan": Script(("fused adamw",), fault=math.nan),
    "fused, clipped by hand": Script(("fused adamw",), fault=math.inf, clip="by hand"),
    "fused, clip_norm": Script(("fused adamw",), fault=math.inf, clip="clip_norm"),
}
SPARSE = {
    "inf": Script(("sgd",), fault=math.inf, bad_parameter=0),
    "nan": Script(("sgd",), fault=math.nan, bad_parameter=0),
}
CASES = {
    **{("small", name): script for name, script in FAULTS.items()},
    **{("sparse", name): script for name, script in SPARSE.items()},
    **{("float16", name): FAULTS[name] for name in ("fused", "fused, nan")},
}


@pytest.mark.parametrize(
    ("model", "name", "group"),
    [*((*case, "default") for case in CASES), ("small", "nan", "given"), ("small", "fused, clip_norm", "given")],
)
def test_a_fault_on_one_rank_makes_both_skip(ranks, model, name, group):
    script = CASES[model, name]
    first, second = ranks(data_parallel, script, group, True, model)
    assert_same(first.common, second.common)
    skipped = [step == script.fault_step for step in range(4)]
    assert first.skipped == skipped
    assert first.moved == second.moved == [not skip for skip in skipped]
    assert first.scales == ([512.0, 512.0, 512.0, 1024.0] if skipped[0] else [1024.0, 512.0, 512.0, 512.0])


def raises_at(rank, fused):
    """When ``update`` gives up, if rank 1 has an inf in all steps but the first and the third."""
    model = small_model()
    optimizer = OPTIMIZERS["fused adamw" if fused else "momentum"](model.parameters())
    scaler = GradScaler("cpu", **SETTINGS, max_skips=3)
    for step in range(9):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).square().mean()).backward()
        if rank == 1 and step not in (0, 2):
            add_fault(model, 0, math.inf)
        scaler.step(optimizer)
        try:
            scaler.update()
        except fxamp.FxampError:
            return step, scaler.get_scale()
    return "never"


@pytest.mark.parametrize(("fused", "expected"), [(False, (5, 64.0)), (True, (8, 8.0))])
def test_both_give_up_at_the_same_step(ranks, fused, expected):
    assert ranks(raises_at, fused) == [expected] * 2


TWO = [("momentum", "adamw"), ("fused adamw", "momentum"), ("fused adamw", "fused adamw")]


@pytest.mark.parametrize("bad_parameter", [0, 3])
@pytest.mark.parametrize("optimizers", TWO)
def test_of_two_optimizers_the_one_with_the_fault_skips(ranks, optimizers, bad_parameter):
    first, second = ranks(data_parallel, Script(optimizers, fault=math.inf, bad_parameter=bad_parameter))
    assert_same(first.common, second.common)
    skipped = [False] * 2 + [bad_parameter == 0, bad_parameter == 3] + [False] * 4
    assert first.skipped == skipped
    assert first.moved == second.moved == [not skip for skip in skipped]
    assert first.scales == [1024.0, 512.0, 512.0, 512.0]


# -- who decides together ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "name"),
    [("False", "inf"), ("False", "clipped by hand"), ("False", "adamw"), ("rank 0", "nan"), ("each alone", "inf")],
)
def test_ranks_that_are_kept_apart_diverge_as_torchs_do(ranks, group, name):
    script = FAULTS[name]
    ours, theirs = ranks(data_parallel, script, group), ranks(data_parallel, script, group, False)
    assert [trace.scales[1] for trace in ours] == [1024.0, 512.0]
    assert [trace.skipped[1] for trace in ours] == [False, True]
    assert_same([trace._replace(skipped=[]) for trace in ours], theirs)


@pytest.mark.parametrize("group", ["default", "given"])
def test_without_a_fault_it_is_torchs(ranks, group):
    ours, theirs = ranks(data_parallel, Script(), group), ranks(data_parallel, Script(), group, False)
    assert_same([trace._replace(skipped=[]) for trace in ours], theirs)
    assert ours[0].scales == [1024.0, 1024.0, 2048.0, 2048.0]


# -- gradients on one rank only ----------------------------------------------------------------------------


def idle(rank, optimizer, fault):
    """Rank 1 has no gradient in the second of three steps; what rank 0 has there, it has to itself."""
    model = small_model()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    scaler = GradScaler("cpu", **SETTINGS)
    seen = []
    for step in range(3):
        loss = scaler.scale(model(torch.ones(2, 3)).square().mean())
        before = [p.detach().clone() for p in model.parameters()]
        if rank == 0 or step != 1:
            loss.backward()
        if rank == 0 and step == 1:
            add_fault(model, 2, fault)
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        seen.append((scaler.skipped, moved, scaler.get_scale(), scaler._get_growth_tracker()))
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("optimizer", ["momentum", "fused adamw"])
@pytest.mark.parametrize("fault", [0.0, math.inf, math.nan])
def test_a_rank_without_gradients_follows_the_other(ranks, optimizer, fault):
    """Both know of every step, and have one scale."""
    bad = fault != 0.0
    first, second = ranks(idle, optimizer, fault)
    before, after = (False, True, 1024.0, 1), (False, True, 512.0, 1) if bad else (False, True, 2048.0, 0)
    assert first == [before, (True, False, 512.0, 0) if bad else (False, True, 1024.0, 2), after]
    assert second == [before, (True, False, 512.0, 0) if bad else (False, False, 1024.0, 2), after]


# -- what it costs -----------------------------------------------------------------------------------------


def collectives(rank, script, group="default"):
    """Those of each of three steps, and how often torch's function was called."""
    model = small_model()
    scaler = GradScaler("cpu", **SETTINGS, process_group=GROUPS[group](rank))
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as called:
        training = Counting(rank, model, scaler, script).run(3)
    return training.collectives, called.call_count


@pytest.mark.parametrize(
    ("script", "group", "count"),
    [
        *((FAULTS[name], "default", 1) for name in ("inf", "clipped by hand", "fused", "fused, clip_norm")),
        (FAULTS["inf"], "given", 1),
        (FAULTS["inf"], "False", 0),
        (FAULTS["inf"], "each alone", 0),
        *((Script(two, fault=math.inf), "default", 2) for two in TWO),
    ],
)
def test_a_step_is_one_collective(ranks, script, group, count):
    assert ranks(collectives, script, group) == [([["c10d::allreduce_"] * count] * 3, 3 * count)] * 2


def test_without_ranks_there_is_no_collective():
    assert not dist.is_initialized()
    assert collectives(0, FAULTS["inf"]) == ([[]] * 3, 0)


# -- why ---------------------------------------------------------------------------------------------------


# What holds the model, and what the rank says that did not overflow.
KEPT = {
    "apart": (lambda model: model, "the gradients of this rank are finite: another rank's were not"),
    "averaged": (lambda model: model, "it came from another rank"),
    "ddp": (DistributedDataParallel, "it came from another rank"),
    "fully_shard": (SHARDED["whole"], "each rank has a part of the parameters"),
    "fsdp": (flat, ""),
}


def explained(rank, kept, asked):
    """What each of three steps says on this rank, if it is asked; the second overflows on rank 1."""
    model = KEPT[kept][0](converted(Squares(), pow="lower"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = GradScaler("cpu", init_scale=4.0)
    found = []
    for step in range(3):
        scaler.backward(model(torch.full((1, 2), 1000.0 if (rank, step) == (1, 1) else 1.0)))
        if kept == "averaged":
            average(list(model.parameters()))
        scaler.step(optimizer)
        found.append((scaler.skipped, scaler.overflow() if rank in asked else None))
        scaler.update()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("asked", [(0, 1), (0,)])
@pytest.mark.parametrize("kept", KEPT)
def test_the_rank_with_the_fault_names_the_call_and_no_rank_waits_for_it(ranks, kept, asked):
    found = ranks(explained, kept, asked)
    for rank, ((skipped, before), (fault, report), (skipped_again, after)) in enumerate(found):
        assert (skipped, fault, skipped_again, before, after) == (False, True, False, None, None)
        assert (report is not None) == (rank in asked)
        if report is not None and rank == 1 and "shard" not in kept and kept != "fsdp":
            assert (report.phase, report.op, report.value) == ("forward", "operator.pow", "inf")
            assert report.overrides == {"aten::pow": "fp32"}
        elif report is not None:
            assert KEPT[kept][1] in report.note
            assert not report.value
            assert bool(report.parameters) == (kept != "apart")


# -- resuming ----------------------------------------------------------------------------------------------


def run_on(rank, script, calls, states=None):
    """The steps from a state on; what happened, and the state after them."""
    model, scaler = small_model(), GradScaler("cpu", **SETTINGS)
    training = Training(rank, model, scaler, script)
    parts = [model, scaler, *training.optimizers]
    if states is not None:
        *saved, data, training.steps = states[rank]
        for part, state in zip(parts, saved, strict=True):
            part.load_state_dict(state)
        training.data.set_state(data)
    training.run(calls, lambda: average(list(model.parameters())))
    return training.result(), [*(part.state_dict() for part in parts), training.data.get_state(), training.steps]


def test_new_processes_go_on_where_others_ended(ranks):
    """After a skipped step, and one step later, when the scale is on its way to grow."""
    cases = [(name, saved) for name in ("momentum", "fused adamw") for saved in (2, 3)]
    scripts = [Script((name,), fault=math.inf) for name, _ in cases]
    whole = [ranks(run_on, script, 6) for script in scripts]
    states = [[state for _, state in ranks(run_on, s, saved)] for s, (_, saved) in zip(scripts, cases, strict=True)]
    ranks.close()
    for script, (_, saved), state, expected in zip(scripts, cases, states, whole, strict=True):
        rest = ranks(run_on, script, 6 - saved, state)
        for (found, last), (full, full_last) in zip(rest, expected, strict=True):
            assert_same(last, full_last)
            assert_same(found, [full[i][saved:] for i in range(5)] + [full.parameters])
            assert full.scales == [1024.0, 512.0, 512.0, 512.0, 1024.0, 1024.0]
