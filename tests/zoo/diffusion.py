"""U-Nets and what conditions them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, images, randn

__all__ = ["DIFFUSION"]


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    """Sinusoids of the step, in float32."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(0, half, dtype=torch.float32) / half)
    args = timesteps[:, None].float() * freqs.to(device=timesteps.device)[None]
    embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
    if dim % 2:
        embedding = torch.cat([embedding, torch.zeros_like(embedding[:, :1])], dim=-1)
    return embedding


class GroupNorm32(nn.GroupNorm):
    """A norm in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class ResBlock(nn.Module):
    """Scale and shift by the embedding of the step."""

    def __init__(self, width: int, out: int, emb: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm32(2, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.out_norm = GroupNorm32(2, out)
        self.out_rest = nn.Sequential(nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        scale, shift = torch.chunk(emb_out, 2, dim=1)
        h = self.out_rest(self.out_norm(h) * (1 + scale) + shift)
        return self.skip(x) + h


class SpatialAttention(nn.Module):
    """Attention over pixels, scaled on both sides before the product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = (
            GroupNorm32(2, width),
            nn.Conv1d(width, 3 * width, 1),
            nn.Conv1d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=1)
        scale = 1 / math.sqrt(math.sqrt(c))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        h = self.proj(torch.einsum("bts,bcs->bct", weight, v))
        return (x + h).reshape(b, c, *spatial)


class DiffusionUNet(nn.Module):
    """Skips on a stack, time embedding, attention at the bottom."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(width, 16), nn.SiLU(), nn.Linear(16, 16))
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([ResBlock(width, width, 16), ResBlock(width, 12, 16)])
        self.middle = nn.ModuleList([ResBlock(12, 12, 16), SpatialAttention(12)])
        self.up = nn.ModuleList([ResBlock(24, width, 16), ResBlock(2 * width, width, 16)])
        self.out = nn.Sequential(GroupNorm32(2, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))
        self.width = width

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.width))
        hs = []
        h = self.stem(x)
        for block in self.down:
            h = block(h, emb)
            hs.append(h)
            h = F.avg_pool2d(h, 2)
        h = self.middle[1](self.middle[0](h, emb))
        for block in self.up:
            h = F.interpolate(h, scale_factor=2, mode="nearest")
            h = block(torch.cat([h, hs.pop()], dim=1), emb)
        return self.out(h)


class Diffusion(nn.Module):
    """Adds noise by a schedule, predicts it, and weights the loss by the ratio of signal to noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DiffusionUNet()
        alphas = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 10), dim=0)
        self.register_buffer("sqrt_alphas", torch.sqrt(alphas))
        self.register_buffer("sqrt_one_minus", torch.sqrt(1.0 - alphas))

    def forward(self, x: Tensor) -> Tensor:
        t = torch.randint(0, 10, (x.shape[0],), device=x.device).long()
        noise = torch.randn_like(x)
        a, b = (buffer.gather(-1, t).view(-1, 1, 1, 1) for buffer in (self.sqrt_alphas, self.sqrt_one_minus))
        predicted = self.net(a * x + b * noise, t)
        loss = F.mse_loss(predicted, noise, reduction="none").flatten(1).mean(-1)
        snr = (a / b).view(-1) ** 2
        return (loss * torch.clamp(snr, max=5) / snr).mean()


class AttentionUNet(nn.Module):
    """Skips that a gate weighs, transposed convolutions, deep supervision."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.InstanceNorm2d(6, affine=True), nn.LeakyReLU())
        self.enc2 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(6, 12, 3, padding=1), nn.PReLU(12))
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1)
        self.w_g, self.w_x, self.psi = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 1, 1)
        self.dec, self.out, self.deep = nn.Conv2d(12, 6, 3, padding=1), nn.Conv2d(6, 1, 1), nn.Conv2d(12, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skip = self.enc1(x)
        bottom = self.enc2(skip)
        up = self.up(bottom)
        dy, dx = skip.size(2) - up.size(2), skip.size(3) - up.size(3)
        up = F.pad(up, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        gate = torch.sigmoid(self.psi(F.relu(self.w_g(up) + self.w_x(skip), inplace=True)))
        y = F.relu(self.dec(torch.cat((skip * gate, up), 1)))
        deep = F.interpolate(self.deep(bottom), size=(x.size(2), x.size(3)), mode="bilinear", align_corners=True)
        return self.out(y), deep


def supervised(outputs: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    weight = torch.tensor(2.0)
    total = sum(
        F.binary_cross_entropy_with_logits(o.squeeze(1), mask, pos_weight=weight) * w
        for o, w in zip(outputs, (1.0, 0.5), strict=True)
    )
    p = torch.sigmoid(outputs[0]).flatten()
    return total + 1 - (2 * (p * mask.flatten()).sum() + 1) / (p.sum() + mask.sum() + 1)


class FiLM(nn.Module):
    """Feature-wise modulation by a question, with coordinates."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.question = nn.GRU(6, 10, batch_first=True)
        self.film = nn.Linear(10, 2 * width)
        self.conv1, self.conv2 = nn.Conv2d(5, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width, affine=False)
        self.fc = nn.Linear(width, 4)

    def coordinates(self, x: Tensor) -> Tensor:
        b, _, h, w = x.size()
        ys = torch.linspace(-1, 1, h, device=x.device).view(1, 1, h, 1).expand(b, 1, h, w)
        xs = torch.linspace(-1, 1, w, device=x.device).view(1, 1, 1, w).expand(b, 1, h, w)
        return torch.cat([x, ys.type_as(x), xs.type_as(x)], 1)

    def forward(self, image: Tensor, words: Tensor) -> Tensor:
        _, h = self.question(words)
        gamma, beta = self.film(h[-1]).view(-1, 2, 8).unbind(1)
        x = F.relu(self.conv1(self.coordinates(image)))
        y = self.bn(self.conv2(x))
        y = F.relu(torch.addcmul(beta[..., None, None].to(y), y, gamma[..., None, None].to(y)))
        return self.fc((x + y).flatten(2).logsumexp(-1))


class DiT(nn.Module):
    """A transformer block with modulation from a condition, zero at the start, and patches put together again."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.x_embedder, self.y_embedder = nn.Conv2d(3, width, 2, 2), nn.Embedding(6, width)
        self.t_embedder = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU("tanh"), nn.Linear(24, width))
        self.final = nn.Linear(width, 2 * 2 * 3)

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def unpatchify(self, x: Tensor) -> Tensor:
        h = w = 4
        x = x.reshape(shape=(x.shape[0], h, w, 2, 2, 3))
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(shape=(x.shape[0], 3, h * 2, w * 2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        if self.training:
            drop = torch.rand(y.shape[0], device=y.device) < 0.3
            y = torch.where(drop, 5, y)
        c = self.t_embedder(timestep_embedding(t, 8)) + self.y_embedder(y)
        parts = self.adaln(c).chunk(6, dim=1)
        h = self.modulate(self.norm1(x), parts[0], parts[1])
        x = x + parts[2].unsqueeze(1) * self.attn(h, h, h, need_weights=False)[0]
        x = x + parts[5].unsqueeze(1) * self.mlp(self.modulate(self.norm2(x), parts[3], parts[4]))
        return self.unpatchify(self.final(x))


def _steps() -> Tensor:
    return torch.randint(0, 10, (2,))


DIFFUSION: dict[str, Case] = {
    "diffusion_unet": Case(
        DiffusionUNet, lambda: (*images()(), _steps()), loss=F.mse_loss, loss_args=images(), opaque=7
    ),
    "diffusion": Case(Diffusion, images(), opaque=7),
    "attention_unet": Case(
        AttentionUNet, images(), loss=supervised, loss_args=lambda: ((torch.rand(2, 8, 8) > 0.5).float(),)
    ),
    "film": Case(FiLM, randn((2, 3, 6, 6), (2, 4, 6)), loss=F.mse_loss, loss_args=randn((2, 4)), opaque=1),
    "dit": Case(
        DiT, lambda: (*images()(), _steps(), torch.tensor([1, 4])), loss=F.mse_loss, loss_args=images(), opaque=2
    ),
}
