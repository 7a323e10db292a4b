"""Encoders and decoders: T5, torch's own transformer, BERT, pointer and memory networks, and the like."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, labels, randn, tokens

__all__ = ["SEQUENCES"]


class T5Norm(nn.Module):
    """No mean, variance in float32, the result in the dtype of the weight when that is low."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


class T5Attention(nn.Module):
    """Bucketed relative positions; self- or cross-attention."""

    def __init__(self, width: int = 16, heads: int = 2, buckets: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.relative_attention_bias = nn.Embedding(buckets, heads)
        self.heads, self.buckets = heads, buckets

    def bucket(self, relative_position: Tensor) -> Tensor:
        num_buckets = self.buckets // 2
        found = (relative_position > 0).to(torch.long) * num_buckets
        relative_position = torch.abs(relative_position)
        max_exact = num_buckets // 2
        is_small = relative_position < max_exact
        large = max_exact + (
            torch.log(relative_position.float() / max_exact) / math.log(16 / max_exact) * (num_buckets - max_exact)
        ).to(torch.long)
        large = torch.min(large, torch.full_like(large, num_buckets - 1))
        found += torch.where(is_small, relative_position, large)
        return found

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        batch_size, seq_length = x.shape[:2]

        def shape(states: Tensor) -> Tensor:
            return states.view(batch_size, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)

        source = x if memory is None else memory
        query, key, value = shape(self.q(x)), shape(self.k(source)), shape(self.v(source))
        scores = torch.matmul(query, key.transpose(3, 2))
        if memory is None:
            context = torch.arange(seq_length, dtype=torch.long, device=x.device)[:, None]
            position = torch.arange(seq_length, dtype=torch.long, device=x.device)[None, :]
            bias = self.relative_attention_bias(self.bucket(position - context))
            bias = bias.permute([2, 0, 1]).unsqueeze(0)
            scores += bias if mask is None else bias + mask
        elif mask is not None:
            scores = scores + mask
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        weights = F.dropout(weights, p=0.1, training=self.training)
        return self.o(torch.matmul(weights, value).transpose(1, 2).contiguous().view(batch_size, -1, x.shape[-1]))


class T5(nn.Module):
    """Shared embeddings, a padding mask made additive, a scaled tied head."""

    def __init__(self, vocab: int = 23, width: int = 16) -> None:
        super().__init__()
        self.shared = nn.Embedding(vocab, width)
        self.encoder, self.decoder, self.cross = (T5Attention(width) for _ in range(3))
        self.norms = nn.ModuleList(T5Norm(width) for _ in range(5))
        self.wi_0, self.wi_1 = (nn.Linear(width, 24, bias=False) for _ in range(2))
        self.wo = nn.Linear(24, width, bias=False)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.shared(input_ids)
        extended = attention_mask[:, None, None, :].to(dtype=x.dtype)
        extended = (1.0 - extended) * torch.finfo(x.dtype).min
        x = x + self.encoder(self.norms[0](x), mask=extended)
        if x.dtype == torch.float16:
            clamp_value = torch.finfo(x.dtype).max - 1000
            x = torch.clamp(x, min=-clamp_value, max=clamp_value)
        memory = self.norms[1](x)
        y = self.shared(decoder_input_ids)
        length = decoder_input_ids.shape[1]
        causal = torch.triu(torch.full((length, length), torch.finfo(torch.float32).min), 1)
        y = y + self.decoder(self.norms[2](y), mask=causal)
        y = y + self.cross(self.norms[3](y), memory, extended)
        h = self.norms[4](y)
        y = y + self.wo(F.gelu(self.wi_0(h), approximate="tanh") * self.wi_1(h))
        return F.linear(y * (y.shape[-1] ** -0.5), self.shared.weight)


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), target.view(-1), ignore_index=0)


class Translator(nn.Module):
    """torch's own transformer with sinusoidal positions and all its masks."""

    def __init__(self, vocab: int = 23, width: int = 16) -> None:
        super().__init__()
        self.src_embed, self.tgt_embed = nn.Embedding(vocab, width), nn.Embedding(vocab, width)
        position = torch.arange(12).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        pe = torch.zeros(1, 12, width)
        pe[0, :, 0::2], pe[0, :, 1::2] = torch.sin(position * div_term), torch.cos(position * div_term)
        self.register_buffer("pe", pe)
        self.transformer = nn.Transformer(width, 2, 1, 1, 24, dropout=0.1, batch_first=True)
        self.generator = nn.Linear(width, vocab)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        scale = math.sqrt(16)
        s = self.src_embed(src) * scale + self.pe[:, : src.size(1)]
        t = self.tgt_embed(tgt) * scale + self.pe[:, : tgt.size(1)]
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        padding = src == 0
        out = self.transformer(
            s, t, tgt_mask=mask.bool(), src_key_padding_mask=padding, memory_key_padding_mask=padding
        )
        return self.generator(out).log_softmax(-1)


class Bert(nn.Module):
    """torch's own encoder, a pooler, and two heads."""

    def __init__(self, vocab: int = 23, width: int = 16) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(vocab, width, padding_idx=0), nn.Embedding(2, width)
        self.register_buffer("position_ids", torch.arange(12).expand((1, -1)))
        self.positions, self.norm = nn.Embedding(12, width), nn.LayerNorm(width, eps=1e-12)
        layer = nn.TransformerEncoderLayer(width, 2, 24, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pooler, self.nsp = nn.Linear(width, width), nn.Linear(width, 2)
        self.transform, self.bias = nn.Linear(width, width), nn.Parameter(torch.zeros(vocab))

    def forward(self, ids: Tensor, types: Tensor | None = None) -> dict[str, Tensor]:
        if types is None:
            types = torch.zeros_like(ids)
        seq_length = ids.size()[1]
        x = self.words(ids) + self.types(types) + self.positions(self.position_ids[:, :seq_length])
        x = self.encoder(self.norm(x), src_key_padding_mask=ids.eq(0))
        pooled = torch.tanh(self.pooler(x[:, 0]))
        h = F.gelu(self.transform(x))
        return {"mlm": F.linear(h, self.words.weight) + self.bias, "nsp": self.nsp(pooled)}


def bert_loss(out: dict[str, Tensor], target: Tensor, following: Tensor) -> Tensor:
    mlm = F.cross_entropy(out["mlm"].permute(0, 2, 1), target, ignore_index=-100)
    return mlm + F.cross_entropy(out["nsp"].view(-1, 2), following.view(-1))


class Pointer(nn.Module):
    """A decoder that points at its inputs, and masks what it chose."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Linear(2, width), nn.GRU(width, width, batch_first=True)
        self.cell = nn.GRUCell(width, width)
        self.w1, self.w2 = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v = nn.Parameter(torch.randn(width))
        self.start = nn.Parameter(torch.zeros(width))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        memory, hidden = self.encoder(self.embed(points))
        batch, length = points.size(0), 4
        state, step = hidden.squeeze(0), self.start.expand(batch, -1)
        mask = torch.zeros(batch, length, dtype=torch.bool, device=points.device)
        log_scores, chosen = [], []
        for _ in range(length):
            state = self.cell(step, state)
            u = torch.tanh(self.w1(memory) + self.w2(state).unsqueeze(1)) @ self.v
            log_p = F.log_softmax(u.masked_fill(mask, -1e4), dim=-1)
            index = log_p.argmax(-1, keepdim=True)
            mask = mask.scatter(1, index, True)
            step = memory.gather(1, index.unsqueeze(-1).expand(-1, -1, memory.size(-1))).squeeze(1)
            log_scores.append(log_p)
            chosen.append(index)
        return torch.stack(log_scores, 1), torch.cat(chosen, 1)


def pointer_loss(out: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return F.nll_loss(out[0].flatten(0, 1).float(), target.flatten())


class Memory(nn.Module):
    """Reads and writes a matrix by content and by a shift."""

    def __init__(self, width: int = 8, slots: int = 5) -> None:
        super().__init__()
        self.initial = nn.Parameter(torch.randn(slots, width) * 0.1)
        self.controller = nn.LSTMCell(2 * width, width)
        self.key, self.gates, self.shift = nn.Linear(width, width), nn.Linear(width, 3), nn.Linear(width, 3)
        self.erase, self.add, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(2 * width, 4)

    def address(self, h: Tensor, memory: Tensor, previous: Tensor) -> Tensor:
        beta, g, gamma = self.gates(h).unbind(-1)
        content = F.cosine_similarity(memory, torch.tanh(self.key(h)).unsqueeze(1), dim=-1, eps=1e-6)
        content = F.softmax(F.softplus(beta).unsqueeze(-1) * content, dim=-1)
        g = torch.sigmoid(g).unsqueeze(-1)
        w = g * content + (1 - g) * previous
        s = F.softmax(self.shift(h), dim=-1)
        w = sum(s[:, i : i + 1] * w.roll(i - 1, dims=-1) for i in range(3))
        w = (w + 1e-6) ** (1 + F.softplus(gamma)).unsqueeze(-1)
        return w / w.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        memory = self.initial.unsqueeze(0).repeat(batch, 1, 1)
        w = torch.softmax(memory.new_zeros(batch, 5), -1)
        h, c = (x.new_zeros(batch, 8) for _ in range(2))
        outputs = []
        for t in range(3):
            read = torch.bmm(w.unsqueeze(1), memory).squeeze(1)
            h, c = self.controller(torch.cat([x[:, t], read], dim=-1), (h, c))
            w = self.address(h, memory, w)
            erase, add = torch.sigmoid(self.erase(h)), torch.tanh(self.add(h))
            memory = memory * (1 - torch.einsum("bn,bd->bnd", w, erase)) + w.unsqueeze(2) * add.unsqueeze(1)
            outputs.append(self.out(torch.cat([h, torch.matmul(w.unsqueeze(1), memory)[:, 0]], -1)))
        return torch.stack(outputs, dim=1)


class DecisionTransformer(nn.Module):
    """Three kinds of tokens interleaved; returns, states, actions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed_return, self.embed_state, self.embed_action = (nn.Linear(n, width) for n in (1, 3, 2))
        self.embed_time = nn.Embedding(20, width)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.predict_action = nn.Sequential(nn.Linear(width, 2), nn.Tanh())

    def forward(self, returns: Tensor, states: Tensor, actions: Tensor, steps: Tensor) -> Tensor:
        batch_size, seq_length = states.shape[0], states.shape[1]
        time = self.embed_time(steps)
        stacked = torch.stack(
            (self.embed_return(returns) + time, self.embed_state(states) + time, self.embed_action(actions) + time),
            dim=1,
        )
        x = self.norm(stacked.permute(0, 2, 1, 3).reshape(batch_size, 3 * seq_length, 16))
        q, k, v = self.qkv(x).split(16, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x.reshape(batch_size, seq_length, 3, 16).permute(0, 2, 1, 3)
        return self.predict_action(x[:, 1])


def _pairs() -> tuple[Any, ...]:
    mask = torch.ones(2, 7)
    mask[1, 5:] = 0
    return (*tokens()(), *tokens(2, 5)(), mask)


def _trajectories() -> tuple[Any, ...]:
    return (*randn((2, 4, 1), (2, 4, 3), (2, 4, 2))(), torch.randint(0, 20, (2, 4)))


SEQUENCES: dict[str, Case] = {
    "t5": Case(T5, _pairs, loss=token_loss, loss_args=tokens(2, 5), symbolic=False, opaque=1),
    "translator": Case(
        Translator,
        lambda: (*tokens()(), *tokens(2, 5)()),
        loss=lambda y, t: nn.NLLLoss()(y.flatten(0, 1), t.flatten()),
        loss_args=tokens(2, 5),
        opaque=3,
    ),
    "bert": Case(Bert, tokens(), loss=bert_loss, loss_args=lambda: (*tokens()(), torch.tensor([0, 1])), opaque=2),
    "pointer": Case(Pointer, randn((2, 4, 2)), loss=pointer_loss, loss_args=labels(4, 2, 4), opaque=5),
    "memory": Case(Memory, randn((2, 3, 8)), loss=F.mse_loss, loss_args=randn((2, 3, 4)), opaque=6),
    "decision_transformer": Case(DecisionTransformer, _trajectories, loss=F.smooth_l1_loss, loss_args=randn((2, 4, 2))),
}
