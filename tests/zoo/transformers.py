"""Transformers: language, vision, encoders and decoders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, images, labels, randn, tokens

__all__ = ["TRANSFORMERS"]


class RMSNorm(nn.Module):
    """Norm in float32, given back in the dtype it came in."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


def rotate_half(x: Tensor) -> Tensor:
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


class Rotary(nn.Module):
    """Angles in float32 outside autocast, cosines in the dtype of the input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        inv_freq = 1.0 / (10000 ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1).to(x.device)
        positions = position_ids[:, None, :].float()
        device_type = x.device.type if isinstance(x.device.type, str) and x.device.type != "mps" else "cpu"
        with torch.autocast(device_type=device_type, enabled=False):
            freqs = (inv_freq.float() @ positions.float()).transpose(1, 2)
            emb = torch.cat((freqs, freqs), dim=-1)
            cos, sin = emb.cos(), emb.sin()
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


class LlamaAttention(nn.Module):
    """Grouped keys, rotary positions, an additive mask, a cache that is passed in and out."""

    def __init__(self, width: int = 16, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.size = width // heads
        self.repeats = heads // groups
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        input_shape = x.shape[:-1]
        hidden_shape = (*input_shape, -1, self.size)
        q = self.q_proj(x).view(hidden_shape).transpose(1, 2)
        k = self.k_proj(x).view(hidden_shape).transpose(1, 2)
        v = self.v_proj(x).view(hidden_shape).transpose(1, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q = (q * cos) + (rotate_half(q) * sin)
        k = (k * cos) + (rotate_half(k) * sin)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
        present = (k, v)
        k, v = (t.repeat_interleave(self.repeats, dim=1) for t in present)
        weights = torch.matmul(q, k.transpose(2, 3)) * self.size**-0.5
        weights = weights + mask[:, :, :, : k.shape[-2]]
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        weights = F.dropout(weights, p=0.1, training=self.training)
        out = torch.matmul(weights, v).transpose(1, 2).contiguous()
        return self.o_proj(out.reshape(*input_shape, -1).contiguous()), present


class LlamaBlock(nn.Module):
    """Attention and a gated network."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)
        self.self_attn = LlamaAttention(width)
        self.gate_proj, self.up_proj = nn.Linear(width, 24, bias=False), nn.Linear(width, 24, bias=False)
        self.down_proj = nn.Linear(24, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Any]:
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + attended
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y)), present


class Llama(nn.Module):
    """A decoder that takes and gives a list of caches."""

    def __init__(self, vocab: int = 23, width: int = 16) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(LlamaBlock(width) for _ in range(2))
        self.norm, self.rotary = RMSNorm(width), Rotary(4)
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, input_ids: Tensor, past_key_values: Any) -> tuple[Tensor, tuple[Any, ...]]:
        x = self.embed_tokens(input_ids)
        start = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        length = input_ids.shape[1]
        position_ids = torch.arange(start, start + length, device=input_ids.device).unsqueeze(0)
        min_dtype = torch.finfo(x.dtype).min
        mask = torch.full((length, start + length), fill_value=min_dtype, dtype=x.dtype, device=x.device)
        mask = torch.triu(mask, diagonal=start + 1)[None, None]
        cos, sin = self.rotary(x, position_ids)
        presents: tuple[Any, ...] = ()
        for i, layer in enumerate(self.layers):
            x, present = layer(x, cos, sin, mask, past_key_values[i] if past_key_values is not None else None)
            presents += (present,)
        return self.lm_head(self.norm(x)), presents


def next_token_loss(outputs: tuple[Tensor, Any], ids: Tensor) -> Tensor:
    logits = outputs[0].float()
    shifted = logits[..., :-1, :].contiguous()
    wanted = ids[..., 1:].contiguous()
    return F.cross_entropy(shifted.view(-1, shifted.size(-1)), wanted.view(-1), ignore_index=0)


class ComplexRotary(nn.Module):
    """Rotary positions as complex numbers, on either side of one attention."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        size = width // heads
        freqs = 1.0 / (10000.0 ** (torch.arange(0, size, 2).float() / size))
        angles = torch.outer(torch.arange(12), freqs)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))
        self.wqkv, self.wo, self.heads = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width), heads

    def apply_rotary(self, x: Tensor, freqs: Tensor) -> Tensor:
        x_ = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(x_ * freqs[None, :, None]).flatten(3).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq, xk, xv = (t.view(bsz, seqlen, self.heads, -1) for t in self.wqkv(x).chunk(3, dim=-1))
        freqs = self.freqs_cis[:seqlen]
        xq, xk = self.apply_rotary(xq, freqs), self.apply_rotary(xk, freqs)
        xq, xk, xv = (t.transpose(1, 2) for t in (xq, xk, xv))
        out = F.scaled_dot_product_attention(xq, xk, xv, is_causal=True)
        return self.wo(out.transpose(1, 2).contiguous().view(bsz, seqlen, -1))


class Swin(nn.Module):
    """Shifted windows with a relative position bias."""

    def __init__(self, width: int = 8, window: int = 2, heads: int = 2, shift: int = 1) -> None:
        super().__init__()
        self.window, self.heads, self.shift, self.scale = window, heads, shift, (width // heads) ** -0.5
        self.embed = nn.Conv2d(3, width, 2, 2)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        coords = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("relative_position_index", relative[..., 0] * (2 * window - 1) + relative[..., 1])
        groups = torch.zeros(4, 4)
        groups[-1:] += 1
        groups[:, -1:] += 2
        groups = self.partition(groups[None, :, :, None], 4, 4).squeeze(-1)
        mask = groups[:, None] - groups[:, :, None]
        self.register_buffer("attn_mask", mask.masked_fill(mask != 0, -100.0))
        self.merge = nn.Linear(4 * width, 5, bias=False)

    def partition(self, x: Tensor, height: int, width: int) -> Tensor:
        size = self.window
        x = x.view(-1, height // size, size, width // size, size, x.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        shortcut = x
        x = torch.roll(self.norm(x), shifts=(-self.shift, -self.shift), dims=(1, 2))
        x = self.partition(x, H, W)
        B_, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B_, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        windows = self.attn_mask.shape[0]
        attn = attn.view(B_ // windows, windows, self.heads, N, N) + self.attn_mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, self.heads, N, N).softmax(-1)
        x = self.proj((attn @ v).transpose(1, 2).reshape(B_, N, C))
        x = x.view(B, H // self.window, W // self.window, self.window, self.window, -1)
        x = x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)
        x = shortcut + torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.merge(x).mean((1, 2))


class ViT(nn.Module):
    """Patches, a class token, torch's own encoder layer by hand."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, width) * 0.02)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(approximate="tanh"), nn.Linear(32, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.pos_embed
        B, N, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


class Perceiver(nn.Module):
    """Latents that read a long input, with a gated network."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, width))
        self.norm_context, self.norm = nn.LayerNorm(6), nn.LayerNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, width, bias=False), nn.Linear(6, 2 * width, bias=False)
        self.ff, self.out = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, context: Tensor) -> Tensor:
        x = self.latents.unsqueeze(0).repeat(context.shape[0], 1, 1)
        k, v = self.to_kv(self.norm_context(context)).chunk(2, dim=-1)
        for _ in range(2):
            q = self.to_q(self.norm(x))
            sim = torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5
            x = torch.einsum("bij,bjd->bid", sim.softmax(dim=-1), v) + x
            x_, gates = self.ff(self.norm(x)).chunk(2, dim=-1)
            x = self.out(x_ * F.gelu(gates)) + x
        return x.mean(dim=-2)


TRANSFORMERS: dict[str, Case] = {
    "llama": Case(Llama, lambda: (*tokens()(), None), loss=next_token_loss, loss_args=tokens(), opaque=4),
    "llama_cached": Case(
        Llama,
        lambda: (*tokens(2, 3)(), tuple((torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)) for _ in range(2))),
        opaque=4,
    ),
    "rotary_complex": Case(ComplexRotary, randn((2, 6, 16)), loss=lambda y: y.pow(2).mean(), symbolic=False),
    "swin": Case(Swin, images(), loss=F.cross_entropy, loss_args=labels(5)),
    "vit": Case(ViT, images(), loss=F.cross_entropy, loss_args=labels(5)),
    "perceiver": Case(Perceiver, randn((2, 9, 6)), loss=F.mse_loss, loss_args=randn((2, 16)), opaque=4),
}
