"""What a user may do with a converted module."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxamp
from fxamp.runtime.folding import folded_linear
from tests.helpers import assert_same, check_against_autocast
from tests.zoo.basic import GPT, Attention, Regions, ResNet


def small(policy: str = "autocast", **options: Any) -> tuple[nn.Module, fxamp.AmpModule]:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4))
    return model, fxamp.convert(model, dtype=torch.bfloat16, policy=policy, **options)


class TestSharing:
    def test_parameters_and_names_are_the_models(self) -> None:
        model = ResNet()
        amp = fxamp.convert(model)
        assert {n: id(p) for n, p in amp.named_parameters()} == {n: id(p) for n, p in model.named_parameters()}
        assert list(amp.state_dict()) == list(model.state_dict())

    def test_unused_and_tied_parameters_keep_their_keys(self) -> None:
        class Odd(GPT):
            def __init__(self) -> None:
                super().__init__()
                self.unused = nn.Linear(3, 3)

        model = Odd()
        assert list(fxamp.convert(model).state_dict()) == list(model.state_dict())

    def test_checkpoints_load_both_ways(self) -> None:
        model, amp = small()
        other, other_amp = small()
        other_amp.load_state_dict(model.state_dict())
        assert_same(other.state_dict(), model.state_dict())
        nn.init.ones_(other[0].weight)
        model.load_state_dict(other_amp.state_dict())
        assert_same(amp.state_dict(), other.state_dict())

    def test_the_loss_adds_no_keys(self) -> None:
        model = nn.Linear(4, 3)
        amp = fxamp.convert(model, nn.CrossEntropyLoss(weight=torch.ones(3)))
        assert list(amp.state_dict()) == list(model.state_dict())

    def test_conversion_leaves_the_model_as_it_was(self) -> None:
        model = ResNet()
        model.stem.eval()
        before = [{k: v for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()]
        state = copy.deepcopy(model.state_dict())
        amp = fxamp.convert(model)
        amp.train()
        amp.eval()
        after = [{k: v for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()]
        assert before == after
        assert_same(dict(model.state_dict()), dict(state))


class TestModes:
    def test_train_and_eval_switch_graphs(self) -> None:
        class Flagged(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                x = F.dropout(self.fc(x), 0.5, training=self.training)
                return x + 1 if self.training else x

        amp = check_against_autocast(Flagged(), torch.randn(3, 4))
        names = []
        for mode in (True, False):
            amp.train(mode)
            names.append([node.name for node in amp.graph.nodes])
        assert names[0] != names[1]
        assert amp.report().mode == "eval"

    def test_a_model_in_mixed_modes_is_converted_as_it_is(self) -> None:
        class Half(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.dropout(x, 0.5, self.training)

        model = nn.Sequential(Half(), Half())
        model[1].eval()
        amp = fxamp.convert(model)
        torch.manual_seed(0)
        expected = model(torch.ones(50))
        torch.manual_seed(0)
        assert_same(amp(torch.ones(50)), expected)
        assert amp.report().mode == "as_is"
        assert amp.eval()(torch.ones(50)).sum() == 50

    def test_a_submodule_put_into_another_mode_is_an_error_where_the_graph_depends_on_it(self) -> None:
        class Inner(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.dropout(x, 0.5, self.training)

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Inner()

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x)

        amp = fxamp.convert(Outer())
        amp.inner.eval()
        with pytest.raises(
            fxamp.CaptureError, match=r"submodule 'inner' has training=False.*traced with training=True"
        ):
            amp(torch.ones(3))

    def test_a_frozen_batch_norm_behaves_as_in_the_original(self) -> None:
        model = ResNet()
        amp = fxamp.convert(copy.deepcopy(model), dtype=torch.bfloat16)
        for owner in (model, amp):
            owner.train()
            owner.bn1.eval()
        x = torch.randn(2, 3, 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
        assert_same(amp(x), expected)
        assert_same(dict(amp.named_buffers()), dict(model.named_buffers()))


class TestCopies:
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_a_copy_computes_the_same_and_is_independent(self, how: str) -> None:
        amp = fxamp.convert(Attention(), dtype=torch.bfloat16)
        x = torch.randn(2, 5, 16)
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        expected = amp(x), amp(x, mask)
        new = _copied(amp, how)
        assert_same((new(x), new(x, mask)), expected)
        assert str(new.report()) == str(amp.report())
        with torch.no_grad():
            new.out.weight.zero_()
        assert_same(amp(x), expected[0])
        assert new.query.weight is not amp.query.weight

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_a_copy_can_trace_new_calls_and_switch_modes(self, how: str) -> None:
        amp = _copied(fxamp.convert(Attention(), dtype=torch.bfloat16), how)
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        assert amp.eval()(torch.randn(2, 5, 16), mask=mask).dtype == torch.bfloat16

    def test_regions_survive_a_copy(self) -> None:
        amp = fxamp.convert(Regions(), dtype=torch.bfloat16)
        x = torch.randn(8, 8)
        assert_same(_copied(amp, "pickle")(x), amp(x))

    def test_an_edited_graph_is_what_a_copy_runs(self) -> None:
        amp = fxamp.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), dtype=torch.bfloat16)
        for node in amp.graph.nodes:
            if node.target is F.relu:
                node.target = torch.sigmoid
                node.kwargs = {}
        amp.recompile()
        x = torch.randn(2, 4)
        assert (amp(x) > 0).all()
        assert_same(_copied(amp, "pickle")(x), amp(x))


def _copied(amp: fxamp.AmpModule, how: str) -> fxamp.AmpModule:
    if how == "deepcopy":
        return copy.deepcopy(amp)
    if how == "pickle":
        loaded: fxamp.AmpModule = pickle.loads(pickle.dumps(amp))
        return loaded
    buffer = io.BytesIO()
    torch.save(amp, buffer)
    buffer.seek(0)
    saved: fxamp.AmpModule = torch.load(buffer, weights_only=False)
    return saved


class TestOwnNames:
    def test_submodules_called_like_our_attributes_win(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name in ("scaler", "policy", "plan", "report", "loss", "freeze", "replan"):
                    setattr(self, name, nn.Linear(4, 4))

            def forward(self, x: Tensor) -> Tensor:
                for name in ("scaler", "policy", "plan", "report", "loss", "freeze", "replan"):
                    x = getattr(self, name)(x)
                return x

        model = Named()
        amp = check_against_autocast(model, torch.randn(2, 4), loss=nn.MSELoss(), loss_args=(torch.zeros(2, 4),))
        assert list(amp.state_dict()) == list(model.state_dict())
        assert isinstance(amp.scaler, nn.Linear)
        assert isinstance(amp.policy, nn.Linear)
        view = fxamp.inspect(amp)
        assert view.policy.name == "autocast"
        assert view.plan["linear"].rule == "lower"
        assert not view.scaler.is_enabled()
        assert view.report().totals["lower"] == 7
        assert isinstance(copy.deepcopy(amp).scaler, nn.Linear)

    def test_inspect_wants_a_converted_module(self) -> None:
        with pytest.raises(fxamp.FxampError, match="found a Linear: expected an AmpModule"):
            fxamp.inspect(nn.Linear(2, 2))  # type: ignore[arg-type]


class TestReplan:
    def test_a_new_policy_needs_no_new_trace_and_shares_tensors(self) -> None:
        model, amp = small()
        full = amp.replan("full").eval()
        x = torch.randn(3, 8)
        model.eval()
        assert_same(full(x), model(x))
        assert [id(p) for p in full.parameters()] == [id(p) for p in amp.parameters()]
        assert full.policy.name == "full"
        assert amp.policy.name == "autocast"
        with torch.autocast("cpu", torch.float16):
            expected = model(x)
        half = amp.replan(fxamp.Policy.autocast("cpu", torch.float16)).eval()
        assert_same(half(x), expected)

    def test_replanning_keeps_the_scaler_as_it_was_set(self) -> None:
        amp = fxamp.convert(nn.Linear(2, 2), dtype=torch.float16, device_type="cpu")
        amp.scaler = fxamp.GradScaler("cpu", 8.0, min_scale=4.0, max_skips=3, process_group=False)
        amp.scaler.scale(torch.ones(()))
        amp.scaler.update(16.0)
        twin = amp.replan(amp.policy).scaler
        assert twin is not amp.scaler
        assert (twin.get_scale(), twin.min_scale, twin.process_group) == (16.0, 4.0, False)
        assert twin.state_dict() == amp.scaler.state_dict()
        with pytest.raises(
            fxamp.FxampError, match=r"^found an object of type GradScaler: expected an fxamp.GradScaler"
        ):
            amp.scaler = torch.amp.GradScaler("cpu")

    def test_replanning_to_the_same_policy_gives_the_same_graph(self) -> None:
        _, amp = small()
        assert amp.replan(amp.policy).code == amp.code


class TestFreeze:
    def test_outputs_are_bitwise_those_of_eval(self) -> None:
        model = ResNet()
        amp = fxamp.convert(model, dtype=torch.bfloat16)
        x = torch.randn(2, 3, 8, 8)
        amp(x)
        frozen = amp.freeze()
        amp.eval()
        with torch.no_grad():
            assert_same(frozen(x), amp(x))
        assert frozen.report().totals["weight_casts"] == 0
        assert frozen.conv1.weight.dtype == torch.bfloat16
        assert amp.conv1.weight.dtype == torch.float32
        assert amp.conv1.weight.requires_grad
        assert model.conv1.weight.dtype == torch.float32

    def test_nothing_of_the_model_is_kept_alive(self) -> None:
        model = ResNet()
        kept = [weakref.ref(parameter) for parameter in model.parameters()]
        frozen = fxamp.convert(model, dtype=torch.bfloat16).freeze()
        del model
        gc.collect()
        assert not any(ref() is not None for ref in kept)
        assert frozen(torch.randn(2, 3, 8, 8)).dtype == torch.bfloat16

    @pytest.mark.parametrize("policy", ["autocast", "fast"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_linear_on_what_is_not_contiguous(self, policy: str, bias: bool) -> None:
        class Transposed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 16, bias=bias)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.fc(x).transpose(0, 1))

        amp, x = fxamp.convert(Transposed(), dtype=torch.bfloat16, policy=policy).eval(), torch.randn(4, 5, 8)
        frozen = amp.freeze()
        assert any(node.target is folded_linear for node in frozen.graph.nodes)
        with torch.no_grad():
            assert_same(frozen(x), amp(x))
        assert_same(frozen(x), amp(x).detach())

    def test_a_weight_also_used_in_float32_keeps_its_dtype(self) -> None:
        amp = fxamp.convert(GPT(), dtype=torch.bfloat16)
        frozen = amp.freeze()
        tokens = torch.randint(0, 23, (2, 7))
        assert frozen.token.weight.dtype == torch.float32
        assert_same(frozen(tokens), amp.eval()(tokens).detach())


class TestHoldWeights:
    def test_no_weight_is_cast_twice_inside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, amp = small()
        x = torch.randn(3, 8)
        amp(x)
        casts: list[int] = []
        original = torch._foreach_copy_
        monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (casts.append(len(of)), original(to, of))[1])
        with amp.hold_weights():
            for _ in range(3):
                amp(x)
        assert casts == [4]
        casts.clear()
        amp(x)
        assert casts == [4]

    def test_accumulated_gradients_are_bitwise_the_same(self) -> None:
        grads = []
        for hold in (False, True):
            model = GPT()
            torch.manual_seed(1)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.1)
            amp = fxamp.convert(model, dtype=torch.bfloat16).eval()
            torch.manual_seed(2)
            batches = [torch.randint(0, 23, (2, 7)) for _ in range(3)]
            if hold:
                with amp.hold_weights():
                    for batch in batches:
                        amp(batch).float().pow(2).sum().backward()
            else:
                for batch in batches:
                    amp(batch).float().pow(2).sum().backward()
            grads.append({name: p.grad for name, p in amp.named_parameters()})
        assert_same(grads[1], grads[0])

    def test_edits_are_seen_again_outside(self) -> None:
        model, amp = small()
        amp.eval()
        x = torch.randn(3, 8)
        with amp.hold_weights(), torch.no_grad():
            before = amp(x)
            model[4].bias.data.add_(1)
            assert_same(amp(x), before)
        assert not torch.equal(amp(x), before)

    def test_held_under_no_grad_then_trained(self) -> None:
        model, amp = small()
        x = torch.randn(3, 8)
        with amp.hold_weights():
            with torch.no_grad():
                amp(x)
            amp(x).sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


class TestAmbient:
    def test_an_outer_autocast_changes_nothing(self) -> None:
        _, amp = small(policy="full")
        amp.eval()
        x = torch.randn(3, 8)
        expected = amp(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(amp(x), expected)

    def test_the_grad_mode_is_restored_after_an_error(self) -> None:
        class Fails(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad(), torch.inference_mode():
                    return x.view(7)

        amp = fxamp.convert(Fails())
        with pytest.raises(RuntimeError):
            amp(torch.zeros(3))
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert amp(torch.zeros(7)).shape == (7,)

    def test_grad_regions_respect_the_callers_no_grad(self) -> None:
        class Region(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    x = x + 1
                return self.fc(x)

        amp = fxamp.convert(Region(), dtype=torch.bfloat16)
        with torch.no_grad():
            assert not amp(torch.zeros(2, 4)).requires_grad
        assert amp(torch.zeros(2, 4)).requires_grad


class TestScaler:
    def test_it_scales_for_float16_only(self) -> None:
        model = nn.Linear(4, 4)
        assert fxamp.convert(model, dtype=torch.float16).scaler.is_enabled()
        assert not fxamp.convert(model, dtype=torch.bfloat16).scaler.is_enabled()
        assert not fxamp.convert(model, dtype=torch.float16, policy="full").scaler.is_enabled()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_loop_of_the_readme(self, dtype: torch.dtype) -> None:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        amp = fxamp.convert(model, loss=F.cross_entropy, dtype=dtype)
        optimizer = torch.optim.AdamW(amp.parameters(), lr=0.05)
        x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))
        first = None
        for _ in range(30):
            loss, output = amp(x, y)
            first = first if first is not None else loss.item()
            amp.scaler.backward(loss)
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in amp.parameters())
            amp.scaler.step(optimizer)
            amp.scaler.update()
            optimizer.zero_grad()
        assert output.dtype == dtype
        assert loss.item() < first / 2


class TestTorch:
    def test_print_tabular_and_readable(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, amp = small()
        amp.graph.print_tabular()
        assert "linear" in capsys.readouterr().out
        assert "linear" in amp.print_readable(print_output=False)

    def test_to_moves_and_keeps_working(self) -> None:
        _, amp = small()
        assert amp.to("cpu") is amp
        amp.double().float()
        assert amp(torch.randn(2, 8)).dtype == torch.bfloat16

    def test_another_dtype_of_the_weights_is_planned_anew(self) -> None:
        model, amp = small(example_inputs=(torch.randn(2, 8),))
        model, x = copy.deepcopy(model).double().eval(), torch.randn(2, 8, dtype=torch.float64)
        amp.double().eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(amp(x), model(x))
        assert amp.report().totals["weight_casts"] == 0

    def test_functional_call(self) -> None:
        model, amp = small()
        amp.eval()
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        out = torch.func.functional_call(amp, zeros, (torch.randn(2, 8),))
        assert (out == 0).all()

    def test_hooks_on_submodules_fire_once_a_call(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        seen = []
        model[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
        model.register_forward_hook(lambda m, i, o: o * 2)
        amp = fxamp.convert(model, dtype=torch.bfloat16)
        x = torch.randn(2, 4)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
        seen.clear()
        assert_same(amp(x), expected)
        assert seen == [torch.bfloat16]
