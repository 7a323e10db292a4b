"""What overflow() says of loops, hooks and compiled modules, when it says less, and that asking leaves no trace."""

import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxamp
from fxamp.scaling import trail
from tests.test_overflow import INF, Apply, converted, enlarge, inputs, step


def test_a_hook_on_a_parameter():
    amp = converted()
    amp.blocks[1].up.bias.register_hook(lambda gradient: gradient / 0)
    found = step(amp, *inputs())
    assert (found.phase, found.module, found.overrides) == ("backward", "blocks.1.up", {})
    assert "a hook on 'blocks.1.up.bias' made it" in str(found)


def test_what_is_written_between_backward_and_step():
    amp = converted()
    optimizer = torch.optim.SGD(amp.parameters(), lr=0.1)
    amp.scaler.backward(amp(*inputs())[0])
    amp.head.bias.grad[0] = math.nan
    amp.scaler.step(optimizer)
    found = amp.scaler.overflow()
    assert (found.parameters, found.phase, found.module) == (("head.bias",), "backward", "head")
    assert "from code between backward and step" in str(found)


def test_a_loss_outside_of_the_graph():
    amp = converted(loss=None)
    x, y = inputs()
    found = step(amp, x, loss=lambda output: F.cross_entropy(output.float(), y) * 1e38)
    assert (found.phase, found.node, found.overrides) == ("backward", "output", {})
    assert "the gradient of the output is not finite when it comes in" in str(found)
    enlarge(amp, "blocks.0.up.weight", 6e4 / 0.3)
    found = step(amp, x * 1e3, loss=lambda output: F.cross_entropy(output.float(), y))
    assert (found.phase, found.module) == ("forward", "blocks.0.up")


@pytest.mark.parametrize("bad", range(4))
def test_accumulated_gradients(bad):
    amp = converted()
    optimizer = torch.optim.SGD(amp.parameters(), lr=0.1)
    for i in range(4):
        x, y = inputs()
        x[0, 0] = INF if i == bad else 1
        amp.scaler.backward(amp(x, y)[0] / 4)
    amp.scaler.step(optimizer)
    assert amp.scaler.overflow().op == "placeholder"


def test_the_numbers_drawn_are_those_of_the_call():
    told = 0
    for seed in range(8):
        amp = converted(Apply(lambda x: F.dropout(x[:1, :1], 0.5) * 6e4), None)
        torch.manual_seed(seed)
        amp.scaler = fxamp.GradScaler("cpu", init_scale=1.0)
        amp.scaler.backward(amp(inputs()[0] + 9))
        optimizer = torch.optim.SGD(amp.parameters(), lr=0.1)
        amp.scaler.step(optimizer)
        before = torch.get_rng_state()
        if amp.scaler.skipped:
            told += 1
            assert amp.scaler.overflow().value
        assert torch.equal(torch.get_rng_state(), before)
    assert 0 < told < 8


def test_being_asked_leaves_no_trace():
    runs = []
    for asks in (False, True):
        torch.manual_seed(3)
        amp = converted()
        optimizer = torch.optim.AdamW(amp.parameters(), lr=0.01)
        losses = []
        for i in range(6):
            x, y = inputs()
            x[0, 0] = INF if i == 3 else 1
            loss = amp(x, y)[0]
            amp.scaler.backward(loss)
            amp.scaler.step(optimizer)
            assert amp.scaler.skipped == (i == 3)
            if asks:
                assert (amp.scaler.overflow() is None) == (i != 3)
            losses.append(loss.item())
            amp.scaler.update()
            if i != 3:
                optimizer.zero_grad()
            elif asks:
                gradients = [p.grad.clone() for p in amp.parameters()]
                amp.scaler.overflow()
                torch.testing.assert_close(
                    [p.grad for p in amp.parameters()], gradients, rtol=0, atol=0, equal_nan=True
                )
            optimizer.zero_grad()
        runs.append((losses, amp.state_dict(), optimizer.state_dict()["state"], amp.scaler.state_dict()))
    torch.testing.assert_close(*runs, rtol=0, atol=0, equal_nan=True)


def test_asked_too_late():
    amp = converted()
    x, y = inputs()
    x[0, 0] = INF
    optimizer = torch.optim.SGD(amp.parameters(), lr=0.1)
    assert step(amp, x, y, optimizer=optimizer).op == "placeholder"
    amp(*inputs())
    assert str(amp.scaler.overflow()) == (
        "non-finite gradients, cleared since: call overflow() between step() and zero_grad()"
    )


def test_an_input_that_is_written_to_since():
    amp = converted()
    x, y = inputs()
    x[0, 0] = INF
    optimizer = torch.optim.SGD(amp.parameters(), lr=0.1)
    amp.scaler.backward(amp(x, y)[0])
    amp.scaler.step(optimizer)
    x[0, 1] = math.nan
    assert "an input was written to since the call" in str(amp.scaler.overflow())


def test_inputs_are_let_go_with_the_next_call():
    amp = converted()
    seen = weakref.WeakSet()
    for i in range(4):
        x, y = inputs()
        seen.add(x)
        loss = amp(x, y)[0]
        amp.scaler.backward(loss)
        if i % 2:
            amp.scaler.step(torch.optim.SGD(amp.parameters(), lr=0.1))
            amp.scaler.update()
        del x, y
    assert len(seen) == 2  # of the last iteration
    amp(*inputs())
    del loss
    assert not seen


def test_without_gradients_or_a_scaler_of_ours_no_input_is_kept():
    amp = converted()
    seen, scaler = weakref.WeakSet(), torch.amp.GradScaler("cpu")
    for scales in (False, True):
        x, y = inputs()
        seen.add(x)
        loss = amp(x, y)[0]
        if scales:
            scaler.scale(loss).backward()
        del x, y, loss
        assert not seen


def test_a_sum_of_losses_keeps_no_inputs():
    amp = converted()
    seen, total = weakref.WeakSet(), 0
    for _ in range(3):
        x, y = inputs()
        seen.add(x)
        loss = amp(x, y)[0]
        total = total + loss  # without detach(), as is often seen
        amp.scaler.backward(loss, retain_graph=True)
        amp.scaler.step(torch.optim.SGD(amp.parameters(), lr=0.0))
        amp.scaler.update()
        del x, y, loss
        assert len(seen) == 1


def test_there_is_a_bound_for_the_inputs_of_many_calls(monkeypatch):
    monkeypatch.setattr(trail, "_MOST_BYTES", 3 * inputs()[0].nbytes)
    amp = converted(loss=None)
    optimizer = torch.optim.SGD(amp.parameters(), lr=0.1)
    seen, outputs = [], []
    for i in range(6):
        x, _ = inputs()
        x[0, 0] = INF if i == 2 else 1
        seen.append(weakref.ref(x))
        outputs.append(amp(x).float().mean())
        del x
    assert [x() is None for x in seen] == [True] * 3 + [False] * 3
    amp.scaler.backward(sum(outputs))
    amp.scaler.step(optimizer)
    found = amp.scaler.overflow()
    assert (found.phase, found.module) == ("backward", "head")
    assert "it came from another rank, from a hook" in found.note


def test_two_optimizers_are_told_apart():
    models = [converted(), converted()]
    optimizers = [torch.optim.SGD(amp.parameters(), lr=0.1) for amp in models]
    scaler = fxamp.GradScaler("cpu")
    enlarge(models[1], "blocks.0.up.weight", 3e5)
    scaler.backward(sum(amp(*inputs())[0] for amp in models))
    scaler.step(optimizers[0])
    assert scaler.overflow() is None
    scaler.step(optimizers[1])
    assert (scaler.overflow().phase, scaler.overflow().module) == ("forward", "blocks.0.up")


def test_a_compiled_module_is_told_of_by_its_parameters():
    amp = converted()
    compiled = torch.compile(amp, backend="eager")
    optimizer = torch.optim.SGD(amp.parameters(), lr=0.1)
    amp.scaler.backward(compiled(*inputs())[0])
    amp.head.bias.grad[0] = math.nan
    amp.scaler.step(optimizer)
    assert str(amp.scaler.overflow()) == "non-finite gradients in 1 parameter: head.bias"


def test_a_call_that_cannot_be_run_again():
    amp = converted()
    optimizer = torch.optim.SGD(amp.parameters(), lr=0.1)
    enlarge(amp, "head.weight", math.nan)
    amp.scaler.backward(amp(*inputs())[0])
    amp.scaler.step(optimizer)
    amp._root.head.weight.data = torch.ones(3, 3)
    assert "the call could not be run again: RuntimeError: " in str(amp.scaler.overflow())


def test_after_max_skips_in_a_row_there_is_an_error_with_the_report():
    amp = converted()
    amp.scaler = fxamp.GradScaler("cpu", max_skips=3)
    enlarge(amp, "head.weight", math.nan)
    optimizer = torch.optim.SGD(amp.parameters(), lr=0.1)
    for i in range(6):
        amp.scaler.backward(amp(*inputs())[0])
        amp.scaler.step(optimizer)
        if i % 3 < 2:
            amp.scaler.update()
            continue
        with pytest.raises(fxamp.FxampError) as error:
            amp.scaler.update()
        assert str(error.value).startswith("3 iterations in a row had a skipped step, and the scale is down to ")
        assert "'head.weight' of the model is not finite when it comes in" in str(error.value)
    assert amp.scaler.get_scale() == 2.0**10


def scaled_loss(output, target):
    return (output.float() * 40).sum()


@pytest.mark.parametrize("outside", [False, True])
def test_the_gradient_of_an_output_is_what_it_was(outside):
    """It has a part from the loss of the graph, which is not to be counted twice."""
    amp = converted(nn.Sequential(nn.Linear(8, 1)), None if outside else scaled_loss)
    optimizer, scaler = torch.optim.SGD(amp.parameters(), lr=0.1), fxamp.GradScaler("cpu", init_scale=1024.0)
    x, y = (tensor[:1] for tensor in inputs())
    x *= 0.1
    scaler.backward(scaled_loss(amp(x), y) if outside else amp(x, y)[0])
    amp.get_parameter("0.weight").grad[0, 0] = INF
    scaler.step(optimizer)
    found = scaler.overflow()
    assert (found.value, found.parameters) == ("", ("0.weight",))


def test_the_loss_in_a_graph_is_named_for_what_it_makes():
    amp = converted(nn.Sequential(nn.Linear(8, 1)), scaled_loss)
    amp.scaler = fxamp.GradScaler("cpu", init_scale=2.0**20)
    found = step(amp, *inputs())
    assert (found.phase, found.op) == ("backward", "Tensor.float")


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x):
        return self.used(x), self.unused(x)


def test_an_output_without_a_gradient_is_not_blamed():
    amp = converted(Two(), None)
    enlarge(amp, "unused.weight", 6e4 * 1e3)
    x, _ = inputs()
    found = step(amp, x, loss=lambda outputs: outputs[0].float().mean() * 1e38)
    assert (found.phase, found.op) == ("backward", "output")


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x, memory):
        memory.mul_(2)
        return self.first(x) + memory


def test_an_input_is_not_written_to_again():
    amp = converted(Writes(), None)
    enlarge(amp, "first.weight", 1e6)
    memory = torch.ones(8)
    found = step(amp, inputs()[0], memory, loss=lambda output: output.float().square().mean())
    assert (found.phase, found.module) == ("forward", "first")
    assert torch.equal(memory, torch.full((8,), 2.0))
