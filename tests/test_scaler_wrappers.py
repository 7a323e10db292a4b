"""The scaler with DistributedDataParallel, and with both kinds of FSDP, on two ranks."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

from fxamp.errors import FxampError
from fxamp.scaling import GradScaler
from tests.helpers import assert_same
from tests.rank_models import FLAT, MODELS, SHARDED, converted, flat, small_model
from tests.rank_training import SETTINGS, Counting, Script, Training, average, local_part

SCALERS = {"ours": GradScaler, "torch": torch.amp.GradScaler, "sharded": ShardedGradScaler}


def scaler_of(kind, **kwargs):
    return SCALERS[kind]("cpu", **SETTINGS, **kwargs)


def without_skipped(traces):
    """What torch's scaler tells, too."""
    return [trace._replace(skipped=[]) for trace in traces]


# -- DistributedDataParallel ---------------------------------------------------------------------------------

FAULTS = {"loss": {"bad_loss": math.inf}, "inf": {"fault": math.inf}, "nan": {"fault": math.nan}}


class Wrapper(DistributedDataParallel):
    """One of the user's own."""


def ddp_training(rank, kind, script, convert, wrapper=DistributedDataParallel):
    model = wrapper(converted(small_model()) if convert else small_model())
    return Training(rank, model, scaler_of(kind), script._replace(autocast=not convert))


def with_ddp(rank, kind, script, convert):
    return ddp_training(rank, kind, script, convert).run(4).result()


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("optimizer", ["momentum", "fused adamw"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_rank_makes_both_skip(ranks, fault, optimizer, convert):
    script = Script((optimizer,), **FAULTS[fault])
    first, second = ranks(with_ddp, "ours", script, convert)
    assert_same(first.common, second.common)
    assert first.skipped == [False, True, False, False]
    assert first.moved == second.moved == [True, False, True, True]
    if fault == "loss":  # with it torch's agrees as well
        assert_same(without_skipped([first, second]), ranks(with_ddp, "torch", script, False))


@contextmanager
def ddp_alone(model, scaler):
    with model.join():
        yield


JOINS = {"with the scaler": lambda model, scaler: Join([model, scaler]), "alone": ddp_alone}


def uneven(rank, kind, script, convert, join, calls, wrapper=DistributedDataParallel):
    """The scale and its tracker after the context, and what happened until two steps later."""
    training = ddp_training(rank, kind, script, convert, wrapper)
    with JOINS[join](training.model, training.scaler):
        training.run(calls[rank])
    after = training.scaler.get_scale(), training.scaler._get_growth_tracker(), training.result().parameters
    return after, training.run(2 * script.accumulate).result()


UNEVEN = {
    "sgd": Script(("sgd",)),
    "an inf loss": Script(("sgd",), bad_loss=math.inf),
    "an inf loss, fused": Script(("fused sgd",), bad_loss=math.inf),
    "an inf gradient": Script(("sgd",), fault=math.inf),
    "two optimizers": Script(("sgd", "sgd"), bad_loss=math.inf),
    "accumulated": Script(("sgd",), accumulate=2),
    "accumulated, an inf loss": Script(("sgd",), accumulate=2, bad_loss=math.inf, fault_step=0),
}


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        *((name, (2, 5)) for name in UNEVEN),
        *((name, (0, 3)) for name in ("sgd", "an inf loss", "two optimizers", "accumulated, an inf loss")),
        *((name, (5, 2)) for name in ("an inf loss", "an inf gradient", "two optimizers")),
        ("an inf loss", (3, 3)),
    ],
)
def test_after_a_join_with_the_scaler_all_ranks_have_one_scale(ranks, name, calls):
    (after, first), (also, second) = ranks(uneven, "ours", UNEVEN[name], calls == (0, 3), "with the scaler", calls)
    assert_same(after, also)
    longest = first if calls[0] > calls[1] else second
    assert after[:2] == (longest.scales[-3], longest.trackers[-3])
    steps = 2 * len(UNEVEN[name].optimizers)
    assert first.moved[-steps:] == second.moved[-steps:] == [True] * steps
    assert_same(
        [first.scales[-2:], first.trackers[-2:], first.parameters],
        [second.scales[-2:], second.trackers[-2:], second.parameters],
    )


@pytest.mark.parametrize(
    ("name", "calls", "wrapper"),
    [
        *((name, (2, 5), DistributedDataParallel) for name in UNEVEN),
        ("sgd", (0, 3), Wrapper),
        ("two optimizers", (0, 3), DistributedDataParallel),
        ("an inf gradient", (5, 2), Wrapper),
    ],
)
def test_a_join_without_it_is_as_with_torchs(ranks, name, calls, wrapper):
    script = UNEVEN[name]
    ours, theirs = (ranks(uneven, kind, script, False, "alone", calls, wrapper) for kind in ("ours", "torch"))
    assert_same([after for after, _ in ours], [after for after, _ in theirs])
    assert_same(without_skipped(trace for _, trace in ours), [trace for _, trace in theirs])


def wrapped_later(rank, calls):
    """Two steps with the gradients averaged by hand, then the module is wrapped, and inputs are uneven."""
    model, scaler = small_model(), scaler_of("ours")
    training = Training(rank, model, scaler, Script(("sgd",)))
    training.run(2, lambda: average(list(model.parameters())))
    training.model = DistributedDataParallel(model)
    with Join([training.model, scaler]):
        training.run(calls[rank])
    return training.result()


def test_a_module_that_was_wrapped_after_the_first_step(ranks):
    first, second = ranks(wrapped_later, (2, 5))
    assert_same(first.parameters, second.parameters)
    assert second.scales == [1024.0, 1024.0, 2048.0, 2048.0, 2048.0, 4096.0, 4096.0]


def first_in_join(rank):
    model, scaler = DistributedDataParallel(small_model()), scaler_of("ours")
    with pytest.raises(FxampError, match=r"(?s)comes first in Join.*with Join\(\[ddp, scaler\]\):"):
        Join([scaler, model])
    with pytest.raises(FxampError, match="process_group=False joins no other rank"):
        Join([model, scaler_of("ours", process_group=False)])
    return True


def test_a_join_that_could_not_end_well_is_refused_on_all_ranks(ranks):
    """Else a rank that is out of inputs takes the flag of another for the number of ranks with inputs."""
    assert ranks(first_in_join) == [True, True]


# -- fully_shard -----------------------------------------------------------------------------------------------


def with_fully_shard(rank, kind, script, layout, count=False, **kwargs):
    model = SHARDED[layout](small_model())
    plain = [p for p in model.parameters() if local_part(p) is p]
    script = script._replace(autocast=layout != "converted")
    training = (Counting if count else Training)(rank, model, scaler_of(kind, **kwargs), script)
    training.run(4, lambda: average(plain))
    return training.collectives if count else training.result()


def apart(rank, script, layout):
    return with_fully_shard(rank, "ours", script, layout, process_group=False)


SHARD_SCRIPTS = {
    "inf": Script(fault=math.inf),
    "nan": Script(fault=math.nan, bad_parameter=0),
    "loss": Script(bad_loss=math.inf),
    "fused": Script(("fused adamw",), fault=math.inf),
    "two optimizers": Script(("adamw", "momentum"), fault=math.inf, bad_parameter=0),
    "clipped": Script(fault=math.inf, clip="by hand"),
    "fused, clipped": Script(("fused adamw",), fault=math.inf, clip="by hand"),
}


@pytest.mark.parametrize(
    ("layout", "name"), [*(("converted", name) for name in SHARD_SCRIPTS), ("whole", "inf"), ("layers", "fused")]
)
def test_fully_shard_is_as_with_torchs(ranks, layout, name):
    """A fault is in the part of one rank; torch's, which agrees here, runs the same model under autocast."""
    script = SHARD_SCRIPTS[name]
    ours = ranks(with_fully_shard, "ours", script, layout)
    assert_same(without_skipped(ours), ranks(with_fully_shard, "torch", script, "whole"))
    assert ours[0].scales == [1024.0, 512.0, 512.0, 512.0]
    assert ours[0].skipped == ours[1].skipped == [i == len(script.optimizers) for i in range(len(ours[0].skipped))]
    assert_same(ranks(apart, script, layout), ours)  # the ranks of a mesh have one model, so they agree all the same


@pytest.mark.parametrize("bad_parameter", [0, -1])
def test_plain_and_sharded_gradients_go_together(ranks, bad_parameter):
    """In one optimizer, which torch's scaler refuses."""
    script = Script(fault=math.inf, bad_parameter=bad_parameter)
    first, second = ranks(with_fully_shard, "ours", script, "first layer")
    assert_same(first.common, second.common)
    assert first.skipped == [False, True, False, False]
    assert first.moved == second.moved == [True, False, True, True]


@pytest.mark.parametrize("optimizer", ["momentum", "fused adamw"])
def test_clip_norm_is_clip_grad_norm_of_all_shards(ranks, optimizer):
    scripts = [Script((optimizer,), fault=math.inf, clip=clip) for clip in ("clip_norm", "by hand", "")]
    ours, by_hand, without = (ranks(with_fully_shard, "ours", script, "converted") for script in scripts)
    assert_same(ours, by_hand)
    assert any(not torch.equal(a, b) for a, b in zip(ours[0].parameters, without[0].parameters, strict=True))


def switched(rank):
    amps = [shard(small_model()) for shard in (SHARDED["converted"], converted)]
    return [amp.train(mode)(torch.ones(2, 3)).detach() for mode in (True, False, True) for amp in amps]


def test_a_sharded_module_is_switched_between_train_and_eval(ranks):
    """A switch generates code; torch.fx makes an endless recursion of it once fully_shard has changed the class."""
    outputs = ranks(switched)[0]
    assert_same(outputs[::2], outputs[1::2])


# -- FullyShardedDataParallel ------------------------------------------------------------------------------------


def with_fsdp(rank, kind, script, layout, model="small", count=False):
    model = flat(MODELS[model](), layout)
    training = (Counting if count else Training)(rank, model, scaler_of(kind), script)
    training.run(4)
    return training.collectives if count else training.result()


def refused(rank, script):
    """The error that a step gets."""
    with pytest.raises(FxampError) as error:
        with_fsdp(rank, "ours", script, "full")
    return str(error.value)


FLAT_SCRIPTS = {
    "inf": Script(fault=math.inf),
    "loss": Script(bad_loss=math.inf),
    "clipped": Script(("adamw",), fault=math.nan, clip="by hand"),
}


@pytest.mark.parametrize(
    ("layout", "name", "model"),
    [
        *((layout, name, "small") for layout in FLAT for name in ("inf", "loss")),
        ("full", "clipped", "small"),
        ("full, original", "clipped", "converted"),
        ("full", "inf", "converted"),
        # One rank has no gradient, or one that is all padding.
        ("full", "loss", "one number"),
        ("full, original", "loss", "one number"),
    ],
)
def test_it_takes_the_place_of_the_sharded_grad_scaler(ranks, layout, name, model):
    script = FLAT_SCRIPTS[name]
    first, second = ranks(with_fsdp, "ours", script, layout, model)
    assert_same(without_skipped([first, second]), ranks(with_fsdp, "sharded", script, layout, model))
    assert first.scales == second.scales == [1024.0, 512.0, 512.0, 512.0]
    assert first.skipped == second.skipped == [False, True, False, False]


@pytest.mark.parametrize(
    ("layout", "model"), [("full", "small"), ("gradients, original", "small"), ("full", "one number")]
)
def test_a_fused_optimizer_skips_on_all_ranks(ranks, layout, model):
    """With the sharded scaler of torch it does not."""
    script = Script(("fused adamw",), **FAULTS["inf" if model == "small" else "loss"])
    first, second = ranks(with_fsdp, "ours", script, layout, model)
    assert_same(first.common, second.common)
    assert first.skipped == [False, True, False, False]
    assert first.moved == [True, False, True, True]
    assert second.moved == (first.moved if model == "small" else [False] * 4)


def test_clip_norm_refuses_what_it_cannot_see(ranks):
    """The way that the hint names is tested above: "clipped"."""
    first, second = ranks(refused, Script(clip="clip_norm"))
    assert first == second
    assert "FullyShardedDataParallel gives each rank a part" in first
    assert "clip_grad_norm_ of that module" in first


@pytest.mark.parametrize("optimizer", ["momentum", "fused adamw"])
@pytest.mark.parametrize(
    ("function", "layout"), [(with_fully_shard, "layers"), (with_fully_shard, "converted"), (with_fsdp, "full")]
)
def test_a_step_is_one_collective(ranks, function, layout, optimizer):
    found = ranks(function, "ours", Script((optimizer,)), layout, *["small"] * (function is with_fsdp), True)
    assert found == [[["c10d::allreduce_"]] * 4] * 2
