"""Attention in the spellings that repositories use."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, randn

__all__ = ["ATTENTION"]


class Projected(nn.Module):
    """What the layers here share: a fused projection, an output, a number of heads."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.scale = (width // heads) ** -0.5
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))


class EinsumAttention(Projected):
    """Chunk, rearrange, einsum."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, _, h = *x.shape, self.heads
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (t.reshape(b, n, h, -1).permute(0, 2, 1, 3) for t in qkv)
        sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        if mask is not None:
            sim.masked_fill_(~mask[:, None, None, :], -torch.finfo(sim.dtype).max)
        attn = sim.softmax(dim=-1)
        out = torch.einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, -1))


class UnbindAttention(Projected):
    """Reshape to three, permute, unbind; queries and keys normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.to_qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        attn = F.dropout(attn.softmax(dim=-1), 0.1, self.training)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.to_out(x)


class IndexedAttention(Projected):
    """The same with indices in place of unbind."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.to_qkv(x).reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn - attn.amax(-1, keepdim=True).detach()
        attn = attn.exp() / attn.exp().sum(-1, keepdim=True)
        return self.to_out((attn @ v).transpose(1, 2).reshape(B, N, C))


class CausalSplitAttention(Projected):
    """Split, a triangular buffer, minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(12, 12)).view(1, 1, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.to_qkv(x).split(self.width, dim=2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.to_out(y)


class BaddbmmAttention(Projected):
    """Heads folded into the batch; the scale is the alpha of the product."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            t.reshape(batch, length, self.heads, -1).permute(0, 2, 1, 3).reshape(batch * self.heads, length, -1)
            for t in self.to_qkv(x).chunk(3, -1)
        )
        scores = torch.baddbmm(
            torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device),
            q,
            k.transpose(-1, -2),
            beta=0,
            alpha=self.scale,
        )
        probabilities = scores.softmax(dim=-1).to(q.dtype)
        out = torch.bmm(probabilities, v)
        out = out.reshape(batch, self.heads, length, -1).permute(0, 2, 1, 3).reshape(batch, length, -1)
        return self.to_out(out)


class FlashAttention(Projected):
    """Causal, then with a float mask, then with a bool mask."""

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = self.to_qkv(x).view(*x.shape[:-1], 3, self.heads, -1).unbind(-3)
        return tuple(part.transpose(-3, -2) for part in parts)

    def forward(self, x: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
        for options in ({"is_causal": True}, {"attn_mask": bias}, {"attn_mask": keep[:, None, None, :]}):
            q, k, v = self.heads_of(x)
            dropout_p = 0.1 if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, **options)
            x = x + self.to_out(y.transpose(1, 2).flatten(2))
        return x


class MultiQuery(nn.Module):
    """Many queries, one key and value; then a key for each group."""

    def __init__(self, width: int = 16, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * self.size)
        self.wk, self.wv = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))

    def repeat_kv(self, x: Tensor, n_rep: int) -> Tensor:
        bs, slen, n_kv_heads, head_dim = x.shape
        if n_rep == 1:
            return x
        x = x[:, :, :, None, :].expand(bs, slen, n_kv_heads, n_rep, head_dim)
        return x.reshape(bs, slen, n_kv_heads * n_rep, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.heads, self.size)
        k, v = self.kv(x).split([self.size, self.size], dim=-1)
        scores = torch.einsum("bthd,bsd->bhts", q, k) / self.size**0.5
        x = x + self.wo(torch.einsum("bhts,bsd->bthd", F.softmax(scores, -1), v).flatten(2))

        repeats = self.heads // self.groups
        q = self.wq(x).view(b, t, self.heads, self.size).transpose(1, 2)
        k = self.repeat_kv(self.wk(x).view(b, t, self.groups, self.size), repeats).transpose(1, 2)
        v = torch.repeat_interleave(self.wv(x).view(b, t, self.groups, self.size).transpose(1, 2), repeats, dim=1)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.size)
        scores = F.softmax(scores.float(), dim=-1).type_as(q)
        output = torch.matmul(scores, v).transpose(1, 2).contiguous().view(b, t, -1)
        return x + self.wo(output)


class Alibi(Projected):
    """A linear bias by distance, made from the slopes of the heads."""

    def __init__(self) -> None:
        super().__init__()
        slopes = torch.tensor([2 ** (-8 * (i + 1) / self.heads) for i in range(self.heads)])
        self.register_buffer("slopes", slopes.view(self.heads, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x).tensor_split(3, -1))
        positions = torch.arange(n, device=x.device)
        distance = -torch.abs(positions[None, :] - positions[:, None])
        bias = distance[None] * self.slopes
        causal = torch.full((n, n), float("-inf"), device=x.device).triu(1)
        dots = q @ k.mT * self.scale + bias + causal
        out = dots.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return self.to_out(out.transpose(1, 2).reshape(b, n, c))


class LinearAttention(Projected):
    """Feature map elu + 1; causal by cumsum, and not causal by einsum."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (t.view(b, n, self.heads, -1) for t in self.to_qkv(x).chunk(3, dim=-1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        context = torch.einsum("bnhd,bnhe->bhde", k, v)
        z = 1 / (torch.einsum("bnhd,bhd->bnh", q, k.sum(dim=1)) + 1e-6)
        out = torch.einsum("bnhd,bhde,bnh->bnhe", q, context, z)
        running = torch.einsum("bnhd,bnhe->bnhde", k, v).cumsum(dim=1)
        norm = torch.einsum("bnhd,bnhd->bnh", q, k.cumsum(1)).clamp(min=1e-6)
        causal = torch.einsum("bnhd,bnhde->bnhe", q, running) / norm.unsqueeze(-1)
        return self.to_out((out + causal).reshape(b, n, c))


class CosineAttention(Projected):
    """Normalised queries and keys with a learned, clamped temperature, and talking heads."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones((self.heads, 1, 1))))
        self.talk = nn.Conv2d(self.heads, self.heads, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.to_qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logit_scale = torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        attn = self.talk((attn * logit_scale).softmax(-1))
        return self.to_out((attn @ v).transpose(1, 2).reshape(b, n, c))


class UpcastAttention(Projected):
    """The product and the softmax in float32, in a region that names the device of its input."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        query, key, value = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.to_qkv(x).split(c, dim=2))
        weights = torch.empty(b * self.heads, n, n, dtype=torch.float32, device=query.device)
        with torch.amp.autocast(query.device.type, enabled=False):
            q, k = query.reshape(-1, n, c // self.heads), key.transpose(-1, -2).reshape(-1, c // self.heads, n)
            weights = torch.baddbmm(weights, q.float(), k.float(), beta=0, alpha=self.scale)
            weights = weights.reshape(b, self.heads, n, n)
        weights = F.softmax(weights, dim=-1).type(value.dtype)
        return self.to_out(torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous().view(b, n, c))


class NumpyAttention(Projected):
    """Numbers that numpy made: a scale, a shape and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.from_numpy(np.triu(np.ones((6, 6)), k=1) == 1))

    def forward(self, x: Tensor) -> Tensor:
        d_k = self.width // self.heads
        q, k, v = (t.unflatten(-1, (self.heads, d_k)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1))
        scores = torch.matmul(q, k.transpose(-1, -2)) / np.sqrt(d_k)
        scores = scores.masked_fill(self.mask, -np.inf)
        out = torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2)
        return self.to_out(out.reshape(x.shape[0], -1, np.prod((self.heads, d_k)))) * np.float32(0.5)


class Modules(nn.Module):
    """torch's own attention with a padding mask, on sequences that come second."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.cross = nn.MultiheadAttention(width, 2)

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        y, weights = self.attn(y, y, y, key_padding_mask=padding)
        x = x + y
        memory = x.transpose(0, 1)
        z, _ = self.cross(memory, memory, memory, key_padding_mask=padding, need_weights=False)
        return z.transpose(0, 1) + x, weights


def _padding() -> Tensor:
    return torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


_x = randn((2, 6, 16))

ATTENTION: dict[str, Case] = {
    "attention_einsum": Case(EinsumAttention, _x, symbolic=False, opaque=2),
    "attention_einsum_masked": Case(EinsumAttention, _x, {"mask": ~_padding()}, symbolic=False, opaque=3),
    "attention_unbind": Case(UnbindAttention, _x),
    "attention_indexed": Case(IndexedAttention, _x),
    "attention_split": Case(CausalSplitAttention, _x),
    "attention_baddbmm": Case(BaddbmmAttention, _x),
    "attention_flash": Case(
        FlashAttention,
        lambda: (torch.randn(2, 6, 16), torch.randn(6, 6, requires_grad=True), ~_padding()),
        symbolic=False,
    ),
    "attention_multi_query": Case(MultiQuery, _x, opaque=2),
    "attention_alibi": Case(Alibi, _x),
    "attention_linear": Case(LinearAttention, _x, opaque=6),
    "attention_cosine": Case(CosineAttention, _x),
    "attention_upcast": Case(UpcastAttention, _x, symbolic=False),
    "attention_numpy": Case(NumpyAttention, _x),
    "attention_modules": Case(Modules, lambda: (torch.randn(2, 6, 16), _padding()), opaque=2),
}
