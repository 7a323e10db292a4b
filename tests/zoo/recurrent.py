"""Recurrent networks, as modules of torch and by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import BF16, Case, labels, randn, tokens

__all__ = ["RECURRENT"]


class Tagger(nn.Module):
    """Bidirectional, two layers, packed by length."""

    def __init__(self, vocab: int = 23, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.dropout, self.fc = nn.Dropout(0.3), nn.Linear(2 * width, 4)

    def forward(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = self.dropout(self.embed(ids))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        packed, (hidden, _) = self.lstm(packed)
        output, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        last = torch.cat((hidden[-2, :, :], hidden[-1, :, :]), dim=1)
        return self.fc(output), self.fc(last)


class SentimentLSTM(nn.Module):
    """Bidirectional without packing, pooled two ways."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, width)
        self.lstm = nn.LSTM(width, width, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(4 * width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        output, (h_n, c_n) = self.lstm(self.embed(ids))
        pooled = torch.cat([output.mean(1), output.max(dim=1)[0]], dim=-1)
        return self.fc(pooled) + h_n.sum() * 0 + c_n[-1].mean()


class Seq2Seq(nn.Module):
    """GRU encoder and decoder with additive attention and teacher forcing."""

    def __init__(self, vocab: int = 23, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder = nn.GRU(2 * width, width, batch_first=True)
        self.Wa, self.Ua, self.Va = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.out = nn.Linear(width, vocab)

    def attend(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.Va(torch.tanh(self.Wa(query) + self.Ua(keys)))
        weights = F.softmax(scores.squeeze(2).unsqueeze(1), dim=-1)
        return torch.bmm(weights, keys), weights

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        keys, hidden = self.encoder(self.embedding(source))
        outputs, attentions = [], []
        for i in range(3):
            embedded = self.embedding(target[:, i].unsqueeze(1))
            context, weights = self.attend(hidden.permute(1, 0, 2), keys)
            output, hidden = self.decoder(torch.cat((embedded, context), dim=2), hidden)
            outputs.append(self.out(output))
            attentions.append(weights)
        return F.log_softmax(torch.cat(outputs, dim=1), dim=-1), torch.cat(attentions, dim=1)


class Elman(nn.Module):
    """The tanh network of torch, and its cell."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, width, 2, nonlinearity="tanh")
        self.cell = nn.RNNCell(width, width, nonlinearity="relu")
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(2, x.size(1), 8, device=x.device)
        out, hn = self.rnn(x, h0)
        state = hn[-1]
        for step in range(2):
            state = self.cell(out[step], state)
        return self.fc(state)


class CellDecoder(nn.Module):
    """An LSTM cell unrolled; the state is a tuple; it feeds on its own output."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(3, width), nn.LSTMCell(width, width)])
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Any]]:
        states = [state, state]
        outputs = []
        y = x
        for _ in range(3):
            h = y
            for i, cell in enumerate(self.cells):
                states[i] = cell(h, states[i])
                h = states[i][0]
            y = self.out(h)
            outputs.append(y)
        return torch.stack(outputs, dim=1), states


class HandLSTM(nn.Module):
    """Gates from one matrix, with layer norms, over every step there is."""

    def __init__(self, size: int = 4, width: int = 8) -> None:
        super().__init__()
        self.weight_ih, self.weight_hh = (nn.Parameter(torch.randn(4 * width, n) / 3) for n in (size, width))
        self.bias = nn.Parameter(torch.zeros(4 * width))
        self.layernorm = nn.LayerNorm(4 * width)
        self.width = width

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Any]:
        if state is None:
            zeros = torch.zeros(x.size(0), self.width, dtype=x.dtype, device=x.device)
            hx, cx = zeros, zeros
        else:
            hx, cx = state
        outputs = torch.jit.annotate(list[Tensor], [])
        for step in x.unbind(1):
            gates = self.layernorm(torch.mm(step, self.weight_ih.t()) + torch.mm(hx, self.weight_hh.t())) + self.bias
            ingate, forgetgate, cellgate, outgate = gates.chunk(4, 1)
            ingate, forgetgate, outgate = torch.sigmoid(ingate), torch.sigmoid(forgetgate), torch.sigmoid(outgate)
            cx = (forgetgate * cx) + (ingate * torch.tanh(cellgate))
            hx = outgate * torch.tanh(cx)
            outputs += [hx]
        return torch.stack(outputs, dim=1), (hx, cx)


class ConvLSTMCell(nn.Module):
    """Gates from one convolution, with a peephole."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(size + width, 4 * width, 3, padding=1)
        self.peephole = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.width = width

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        combined = self.conv(torch.cat([x, h], dim=1))
        i, f, o, g = torch.split(combined, self.width, dim=1)
        c = torch.sigmoid(f + self.peephole * c) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def init_hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, _, height, width = x.shape
        zeros = torch.zeros(b, self.width, height, width, device=self.conv.weight.device)
        return zeros, zeros.clone()


class ConvLSTM(nn.Module):
    """The cell over the frames of a video, then the next frame."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = ConvLSTMCell(2, 4), nn.Conv2d(4, 2, 1)

    def forward(self, frames: Tensor) -> Tensor:
        h, c = self.cell.init_hidden(frames[:, 0])
        for t in range(3):
            h, c = self.cell(frames[:, t], h, c)
        return self.out(h)


class QRNN(nn.Module):
    """Convolutions give all the gates, a loop pools, zoneout drops."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, width)
        self.conv = nn.Conv1d(width, 3 * width, 2)
        self.out = nn.Linear(width, 23)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        gates = self.conv(F.pad(x.transpose(1, 2), (1, 0))).transpose(1, 2)
        z, f, o = gates.chunk(3, dim=-1)
        z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
        if self.training:
            keep = torch.bernoulli(torch.full_like(f, 0.9))
            f = 1 - keep * (1 - f)
        states = []
        c = torch.zeros_like(z[:, 0])
        for t in range(7):
            c = torch.addcmul(f[:, t] * c, 1 - f[:, t], z[:, t])
            states.append(c)
        return self.out(o * torch.stack(states, dim=1))


class IndRNN(nn.Module):
    """A cumulative form: decays in logs, then a sum; and a highway around it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inp, self.gate, self.decay = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        log_a = F.logsigmoid(self.decay(x))
        total = torch.cumsum(log_a, dim=1)
        h = torch.exp(total) * torch.cumsum(self.inp(x) * torch.exp(-total), dim=1)
        g = torch.sigmoid(self.gate(x))
        return torch.lerp(x.to(h.dtype), h, g.to(h.dtype))


def tagger_loss(out: tuple[Tensor, Tensor], tags: Tensor) -> Tensor:
    return F.cross_entropy(out[0].transpose(1, 2), tags, ignore_index=-1) + out[1].logsumexp(-1).mean()


RECURRENT: dict[str, Case] = {
    "tagger": Case(
        Tagger,
        lambda: (*tokens()(), torch.tensor([5, 7])),
        loss=tagger_loss,
        loss_args=labels(4, 2, 7),
        dtypes=BF16,
        opaque=5,
    ),
    "sentiment": Case(SentimentLSTM, tokens(), loss=F.cross_entropy, loss_args=labels(2), dtypes=BF16, opaque=1),
    "seq2seq": Case(
        Seq2Seq,
        lambda: (*tokens()(), *tokens(2, 3)()),
        loss=lambda out, t: F.nll_loss(out[0].view(-1, out[0].size(-1)), t.view(-1)),
        loss_args=tokens(2, 3),
        opaque=4,
    ),
    "elman": Case(Elman, randn((5, 2, 4)), loss=F.cross_entropy, loss_args=labels(3), opaque=3),
    "cell_decoder": Case(
        CellDecoder,
        lambda: (torch.randn(2, 3), (torch.randn(2, 8), torch.randn(2, 8))),
        loss=lambda out, t: F.l1_loss(out[0], t),
        loss_args=randn((2, 3, 3)),
        opaque=6,
    ),
    "hand_lstm": Case(
        HandLSTM,
        randn((2, 3, 4)),
        loss=lambda out, t: F.mse_loss(out[0], t),
        loss_args=randn((2, 3, 8)),
        symbolic=False,
    ),
    "conv_lstm": Case(ConvLSTM, randn((2, 3, 2, 5, 5)), loss=F.mse_loss, loss_args=randn((2, 2, 5, 5))),
    "qrnn": Case(QRNN, tokens(), loss=lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()), loss_args=tokens()),
    "cumulative": Case(IndRNN, randn((2, 5, 8)), loss=F.huber_loss, loss_args=randn((2, 5, 8))),
}
