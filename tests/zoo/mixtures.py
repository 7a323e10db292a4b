"""Mixtures of experts and state space models."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, randn, tokens

__all__ = ["MIXTURES"]


class SwitchMoE(nn.Module):
    """Top-1 routing in float32, dispatch by one-hot einsum with a capacity, a balancing loss."""

    def __init__(self, width: int = 8, experts: int = 4, capacity: int = 5) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.w1, self.w2 = (
            nn.Parameter(torch.randn(experts, width, 16) / 3),
            nn.Parameter(torch.randn(experts, 16, width) / 4),
        )
        self.experts, self.capacity = experts, capacity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x).float()
        if self.training:
            logits = logits * torch.empty_like(logits).uniform_(0.99, 1.01)
        gates = F.softmax(logits, dim=-1)
        expert_gate, expert_index = gates.max(dim=-1)
        expert_mask = F.one_hot(expert_index, self.experts).float()
        density = expert_mask.mean(dim=0)
        loss = (density * gates.mean(dim=0)).sum() * self.experts
        position = (torch.cumsum(expert_mask, dim=0) - 1.0) * expert_mask
        expert_mask = expert_mask * position.lt(self.capacity)
        slots = F.one_hot(position.sum(-1).long().clamp(max=self.capacity - 1), self.capacity).float()
        combine = expert_gate[:, None, None] * expert_mask[..., None] * slots[:, None, :]
        dispatch = combine.bool().to(x.dtype)
        inputs = torch.einsum("nec,nd->ecd", dispatch, x)
        hidden = F.gelu(torch.einsum("ecd,edh->ech", inputs, self.w1))
        outputs = torch.einsum("ech,ehd->ecd", hidden, self.w2)
        return torch.einsum("nec,ecd->nd", combine.to(outputs), outputs), loss


class TopKMoE(nn.Module):
    """Top-2 routing, every expert a loop, combined with index_add_."""

    def __init__(self, width: int = 8, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(a, b) for name, a, b in (("w1", 8, 16), ("w2", 16, 8), ("w3", 8, 16))})
            for _ in range(experts)
        )
        self.shared_gate = nn.Linear(width, 1)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden_dim)
        router_logits = self.gate(hidden_states)
        routing_weights = F.softmax(router_logits, dim=1, dtype=torch.float)
        routing_weights, selected = torch.topk(routing_weights, 2, dim=-1)
        routing_weights /= routing_weights.sum(dim=-1, keepdim=True)
        routing_weights = routing_weights.to(hidden_states.dtype)
        final = torch.zeros(
            (batch_size * sequence_length, hidden_dim), dtype=hidden_states.dtype, device=hidden_states.device
        )
        mask = F.one_hot(selected, num_classes=3).permute(2, 1, 0)
        for index, expert in enumerate(self.experts):
            slot, rows = torch.where(mask[index])
            current = hidden_states[None, rows].reshape(-1, hidden_dim)
            current = expert["w2"](F.silu(expert["w1"](current)) * expert["w3"](current))
            current = current * routing_weights[rows, slot, None]
            final.index_add_(0, rows, current.to(hidden_states.dtype))
        final = final + torch.sigmoid(self.shared_gate(hidden_states)) * hidden_states
        return final.reshape(batch_size, sequence_length, hidden_dim), router_logits


def routed_loss(out: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    y, logits = out
    if logits.dim() == 0:
        return F.mse_loss(y, target) + 0.01 * logits
    weights = logits.softmax(-1)
    balance = (F.one_hot(weights.argmax(-1), 3).float().mean(0) * weights.mean(0)).sum()
    return F.mse_loss(y, target) + 0.01 * balance + 1e-3 * torch.logsumexp(logits, -1).square().mean()


class SoftMoE(nn.Module):
    """Slots are mixtures of all tokens; no routing."""

    def __init__(self, width: int = 8, experts: int = 2, slots: int = 3) -> None:
        super().__init__()
        self.phi, self.scale = nn.Parameter(torch.randn(width, experts, slots)), nn.Parameter(torch.ones(()))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bnd,des->bnes", F.normalize(x, dim=-1), self.scale * F.normalize(self.phi, dim=0))
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
        slots = torch.einsum("bnd,bnes->besd", x, dispatch)
        out = torch.stack([expert(slots[:, i]) for i, expert in enumerate(self.experts)], dim=1)
        return torch.einsum("besd,bnes->bnd", out, combine)


class S4D(nn.Module):
    """Diagonal state space: a kernel from complex exponentials, convolved by FFT."""

    def __init__(self, width: int = 4, state: int = 4) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(torch.rand(width) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        self.C = nn.Parameter(torch.randn(width, state, 2))
        self.log_A_real = nn.Parameter(torch.log(0.5 * torch.ones(width, state)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(state).repeat(width, 1).float())
        self.D = nn.Parameter(torch.randn(width))
        self.out = nn.Sequential(nn.Conv1d(width, 2 * width, 1), nn.GLU(dim=-2))

    def kernel(self, length: int) -> Tensor:
        dt = torch.exp(self.log_dt)
        C = torch.view_as_complex(self.C)
        A = -torch.exp(self.log_A_real) + 1j * self.A_imag
        dtA = A * dt.unsqueeze(-1)
        K = dtA.unsqueeze(-1) * torch.arange(length, device=A.device)
        C = C * (torch.exp(dtA) - 1.0) / A
        return 2 * torch.einsum("hn, hnl -> hl", C, torch.exp(K)).real

    def forward(self, u: Tensor) -> Tensor:
        L = u.size(-1)
        k = self.kernel(L)
        k_f = torch.fft.rfft(k, n=2 * L)
        u_f = torch.fft.rfft(u.float(), n=2 * L)
        y = torch.fft.irfft(u_f * k_f, n=2 * L)[..., :L]
        y = y + u * self.D.unsqueeze(-1)
        return self.out(F.gelu(y))


class Mamba(nn.Module):
    """Selective scan as a loop over every step."""

    def __init__(self, width: int = 6, inner: int = 8, state: int = 4, rank: int = 2) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.x_proj, self.dt_proj = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner)
        A = torch.arange(1, state + 1, dtype=torch.float32).repeat(inner, 1)
        self.A_log, self.D = nn.Parameter(torch.log(A)), nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.rank, self.state = rank, state

    def selective_scan(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        b, length, d_in = u.shape
        n = A.shape[1]
        deltaA = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
        deltaB_u = torch.einsum("bld,bln,bld->bldn", delta, B, u)
        x = torch.zeros((b, d_in, n), device=deltaA.device)
        ys = []
        for i in range(length):
            x = deltaA[:, i] * x + deltaB_u[:, i]
            ys.append(torch.einsum("bdn,bn->bd", x, C[:, i, :]))
        return torch.stack(ys, dim=1) + u * D

    def forward(self, x: Tensor) -> Tensor:
        _, length, _ = x.shape
        x, res = self.in_proj(x).split(split_size=[8, 8], dim=-1)
        x = self.conv1d(x.transpose(1, 2))[:, :, :length].transpose(1, 2)
        x = F.silu(x)
        A = -torch.exp(self.A_log.float())
        delta, B, C = self.x_proj(x).split([self.rank, self.state, self.state], dim=-1)
        delta = F.softplus(self.dt_proj(delta))
        y = self.selective_scan(x, delta, A, B, C, self.D.float())
        return self.out_proj(y * F.silu(res))


class RWKV(nn.Module):
    """Time mixing with a shift, a running maximum and a decay; squared ReLU channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.time_decay, self.time_first = nn.Parameter(torch.linspace(-2, 1, width)), nn.Parameter(torch.ones(width))
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.full((1, 1, width), 0.5)) for _ in range(3))
        self.key, self.value, self.receptance, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.ln, self.ck, self.cv = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln(x)
        xx = self.time_shift(x)
        xk, xv, xr = (x * m + xx * (1 - m) for m in (self.mix_k, self.mix_v, self.mix_r))
        k, v, r = self.key(xk).float(), self.value(xv).float(), torch.sigmoid(self.receptance(xr))
        w, u = -torch.exp(self.time_decay), self.time_first
        aa = bb = torch.zeros_like(k[:, 0])
        pp = torch.full_like(aa, -1e38)
        outputs = []
        for t in range(5):
            kk, vv = k[:, t], v[:, t]
            ww = u + kk
            p = torch.maximum(pp, ww)
            e1, e2 = torch.exp(pp - p), torch.exp(ww - p)
            outputs.append((e1 * aa + e2 * vv) / (e1 * bb + e2))
            ww = w + pp
            p = torch.maximum(ww, kk)
            e1, e2 = torch.exp(ww - p), torch.exp(kk - p)
            aa, bb, pp = e1 * aa + e2 * vv, e1 * bb + e2, p
        x = x + self.output(r * torch.stack(outputs, 1).type_as(r))
        return x + self.cv(torch.square(torch.relu(self.ck(x))))


class GatedLinear(nn.Module):
    """Gated linear attention in chunks, decays by cumsum of logs."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gk = nn.Sequential(nn.Linear(width, 2), nn.Linear(2, width))
        self.norm = nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x) * 8**-0.5, self.k(x), self.v(x)
        g = F.logsigmoid(self.gk(x)) / 16
        q, k, v, g = (t.unflatten(1, (2, 3)) for t in (q, k, v, g.float()))
        g = g.cumsum(-2)
        decay = g[..., -1:, :]
        kv = torch.einsum("bcld,bcle->bcde", k * (decay - g).exp(), v.float())
        state = torch.zeros_like(kv[:, 0])
        states = []
        for i in range(2):
            states.append(state)
            state = state * decay[:, i].exp().transpose(-1, -2) + kv[:, i]
        q_g, k_g = q * g.exp(), k * (-g).exp()
        inter = q_g @ torch.stack(states, 1)
        intra = (q_g @ k_g.transpose(-1, -2)).tril() @ v.float()
        y = (inter + intra).flatten(1, 2).to(x.dtype)
        return self.o(self.norm(y.transpose(1, 2)).transpose(1, 2))


class Retention(nn.Module):
    """Attention with a decay for each head and a group norm, gated."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.embed, self.heads = nn.Embedding(23, width), heads
        self.qkvg, self.out = nn.Linear(width, 4 * width, bias=False), nn.Linear(width, 23)
        self.register_buffer("decay", torch.log(1 - 2 ** (-5 - torch.arange(heads, dtype=torch.float))))
        self.group_norm = nn.LayerNorm(width // heads, elementwise_affine=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, n, d = x.size()
        q, k, v, g = self.qkvg(x).chunk(4, dim=-1)
        q, k, v = (t.view(b, n, self.heads, d // self.heads).transpose(1, 2) for t in (q, k, v))
        index = torch.arange(n).to(self.decay)
        mask = torch.tril(torch.ones(n, n).to(self.decay))
        mask = torch.masked_fill(index[:, None] - index[None, :], ~mask.bool(), float("inf"))
        mask = torch.nan_to_num(torch.exp(mask * self.decay[:, None, None]))
        mask = mask / mask.sum(dim=-1, keepdim=True).sqrt()
        qk = (q @ k.transpose(-1, -2)) * mask
        qk = qk / qk.detach().abs().sum(dim=-1, keepdim=True).clamp(min=1)
        y = self.group_norm((qk @ v).transpose(1, 2)).reshape(b, n, -1)
        return self.out(F.silu(g) * y)


def _tokens_loss(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y.transpose(1, 2), t)


MIXTURES: dict[str, Case] = {
    "switch_moe": Case(SwitchMoE, randn((10, 8)), loss=routed_loss, loss_args=randn((10, 8)), symbolic=False, opaque=4),
    "top_k_moe": Case(TopKMoE, randn((2, 5, 8)), loss=routed_loss, loss_args=randn((2, 5, 8)), symbolic=False),
    "soft_moe": Case(SoftMoE, randn((2, 5, 8)), loss=F.mse_loss, loss_args=randn((2, 5, 8)), opaque=3),
    "s4d": Case(S4D, randn((2, 4, 6)), loss=F.mse_loss, loss_args=randn((2, 4, 6)), opaque=1),
    "mamba": Case(Mamba, randn((2, 5, 6)), loss=F.mse_loss, loss_args=randn((2, 5, 6)), symbolic=False, opaque=7),
    "rwkv": Case(RWKV, randn((2, 5, 8)), loss=F.mse_loss, loss_args=randn((2, 5, 8))),
    "gated_linear": Case(GatedLinear, randn((2, 6, 8)), loss=F.mse_loss, loss_args=randn((2, 6, 8)), opaque=1),
    "retention": Case(Retention, tokens(), loss=_tokens_loss, loss_args=tokens()),
}
