"""Generative models and models with several losses."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, images, labels, randn, tokens

__all__ = ["GENERATIVE"]


class VectorQuantizer(nn.Module):
    """Nearest code, straight-through gradients, a codebook that follows by moving averages."""

    def __init__(self, codes: int = 8, width: int = 4, decay: float = 0.9) -> None:
        super().__init__()
        embed = torch.randn(width, codes)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(codes))
        self.register_buffer("embed_avg", embed.clone())
        self.codes, self.decay, self.eps = codes, decay, 1e-5

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flatten = x.reshape(-1, 4)
        dist = flatten.pow(2).sum(1, keepdim=True) - 2 * flatten @ self.embed + self.embed.pow(2).sum(0, keepdim=True)
        _, index = (-dist).max(1)
        onehot = F.one_hot(index, self.codes).type(flatten.dtype)
        index = index.view(*x.shape[:-1])
        quantize = F.embedding(index, self.embed.transpose(0, 1))
        if self.training:
            onehot_sum = onehot.sum(0)
            embed_sum = flatten.transpose(0, 1) @ onehot
            self.cluster_size.data.mul_(self.decay).add_(onehot_sum, alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_(embed_sum.detach(), alpha=1 - self.decay)
            n = self.cluster_size.sum()
            size = (self.cluster_size + self.eps) / (n + self.codes * self.eps) * n
            self.embed.data.copy_(self.embed_avg / size.unsqueeze(0))
        diff = (quantize.detach() - x).pow(2).mean()
        quantize = x + (quantize - x).detach()
        return quantize, diff, index


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Conv2d(3, 4, 4, 2, 1), nn.ConvTranspose2d(4, 3, 4, 2, 1)
        self.quantize = VectorQuantizer()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        quant, diff, _ = self.quantize(self.enc(x).permute(0, 2, 3, 1))
        return self.dec(quant.permute(0, 3, 1, 2)), diff.unsqueeze(0)


class VAE(nn.Module):
    """Convolutional, with the reparameterisation that asks for the mode."""

    def __init__(self, latent: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.LeakyReLU(), nn.Flatten())
        self.fc_mu, self.fc_var, self.fc = (nn.Linear(96, latent), nn.Linear(96, latent), nn.Linear(latent, 96))
        self.decoder = nn.Sequential(nn.ConvTranspose2d(6, 3, 3, 2, 1, output_padding=1), nn.Tanh())

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        if not self.training:
            return mu
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return eps.mul(std).add_(mu)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mu, logvar = (layer(self.encoder(x)) for layer in (self.fc_mu, self.fc_var))
        z = self.reparameterize(mu, logvar)
        return {"recon": self.decoder(self.fc(z).view(-1, 6, 4, 4)), "mu": mu, "logvar": logvar}


def vae_loss(out: dict[str, Tensor], x: Tensor, kld_weight: float = 0.1) -> Tensor:
    mu, log_var = out["mu"], out["logvar"]
    kld = torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1), dim=0)
    return F.mse_loss(out["recon"], x) + kld_weight * kld


class Coupling(nn.Module):
    """Half of the input gives scale and shift of the other half."""

    def __init__(self, width: int, flip: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width // 2, 12), nn.Tanh(), nn.Linear(12, width))
        self.flip = flip

    def forward(self, x: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=-1)
        if self.flip:
            a, b = b, a
        log_s, t = self.net(a).chunk(2, dim=-1)
        log_s = 2 * torch.tanh(log_s / 2)
        b = b * torch.exp(log_s) + t
        out = torch.cat([b, a] if self.flip else [a, b], dim=-1)
        return out, log_det + log_s.sum(-1)


class Flow(nn.Module):
    """Couplings, an invertible matrix, actnorm; the likelihood by a distribution's formula."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling(width, bool(i % 2)) for i in range(2))
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(width, width))[0].contiguous())
        self.loc, self.log_scale = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        x = (x + self.loc) * torch.exp(self.log_scale)
        log_det = log_det + self.log_scale.sum() + torch.slogdet(self.weight)[1]
        z = F.linear(x, self.weight)
        for layer in self.layers:
            z, log_det = layer(z, log_det)
        return z, log_det


def likelihood_loss(out: tuple[Tensor, Tensor]) -> Tensor:
    z, log_det = out
    log_prob = -0.5 * (z**2 + math.log(2 * math.pi)).sum(dim=-1)
    return -(log_prob + log_det).mean()


class GAN(nn.Module):
    """Both networks; the generator's step and the discriminator's in one call."""

    def __init__(self, latent: int = 4) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(latent, 16), nn.BatchNorm1d(16, 0.8), nn.LeakyReLU(0.2, inplace=True), nn.Linear(16, 6), nn.Tanh()
        )
        self.discriminator = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2, inplace=True), nn.Linear(16, 1))
        self.latent = latent

    def forward(self, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.randn(real.size(0), self.latent, device=real.device)
        fake = self.generator(z)
        return self.discriminator(real), self.discriminator(fake.detach()), self.discriminator(fake)


def gan_loss(out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    real, detached, fake = out
    criterion = nn.BCEWithLogitsLoss()
    d_loss = (criterion(real, torch.ones_like(real)) + criterion(detached, torch.zeros_like(detached))) / 2
    return d_loss + F.softplus(-fake).mean()


class CLIP(nn.Module):
    """Two towers and a learned temperature."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.visual, self.token = nn.Conv2d(3, width, 4, 4), nn.Embedding(23, width)
        self.image_projection = nn.Parameter(torch.randn(width, width) / 3)
        self.text_projection = nn.Parameter(torch.randn(width, width) / 3)
        self.ln_final = nn.LayerNorm(width)
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        i = self.visual(image).flatten(2).mean(-1) @ self.image_projection
        x = self.ln_final(self.token(text))
        t = x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection
        i, t = i / i.norm(dim=-1, keepdim=True), t / t.norm(dim=1, keepdim=True)
        logit_scale = self.logit_scale.exp()
        logits_per_image = logit_scale * i @ t.t()
        return logits_per_image, logits_per_image.t()


def clip_loss(out: tuple[Tensor, Tensor]) -> Tensor:
    wanted = torch.arange(out[0].shape[0], device=out[0].device, dtype=torch.long)
    return (F.cross_entropy(out[0], wanted) + F.cross_entropy(out[1], wanted)) / 2


class BYOL(nn.Module):
    """An online network, a target without gradients that follows it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.online, self.target = (
            nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width)) for _ in "ab"
        )
        self.target.requires_grad_(False)
        self.predictor = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
        )

    @torch.no_grad()
    def update(self, m: float = 0.9) -> None:
        for q, k in zip(self.online.parameters(), self.target.parameters(), strict=True):
            k.data.mul_(m).add_((1 - m) * q.detach().data)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        p1, p2 = self.predictor(self.online(a)), self.predictor(self.online(b))
        with torch.no_grad():
            if self.training:
                self.update()
            z1, z2 = self.target(a), self.target(b)
        return regression(p1, z2.detach()) + regression(p2, z1.detach())


def regression(x: Tensor, y: Tensor) -> Tensor:
    x, y = F.normalize(x, dim=-1, p=2), F.normalize(y, dim=-1, p=2)
    return (2 - 2 * (x * y).sum(dim=-1)).mean()


class MoCo(nn.Module):
    """A queue in a buffer, written at a place that a buffer holds."""

    def __init__(self, width: int = 6, size: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, width)
        self.register_buffer("queue", F.normalize(torch.randn(width, size), dim=0))
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))
        self.size = size

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        place = (self.ptr + torch.arange(keys.shape[0], device=keys.device)) % self.size
        self.queue[:, place] = keys.T.to(self.queue.dtype)
        self.ptr[0] = (self.ptr[0] + keys.shape[0]) % self.size

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.encoder(q), dim=1)
        with torch.no_grad():
            k = F.normalize(self.encoder(k), dim=1)
        positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([positive, negative], dim=1) / 0.07
        self.enqueue(k)
        return logits, torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)


class Triplet(nn.Module):
    """One network on three inputs, hardest negatives by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.PReLU(), nn.Linear(12, 4))

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, p, n = self.net(torch.cat([anchor, positive, negative])).chunk(3)
        hardest = torch.cdist(a.float(), n.float()).argmin(dim=1)
        return a, p, n[hardest]


class MaskedAutoencoder(nn.Module):
    """Hides patches by a random order and restores them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.decode = nn.Linear(12, width), nn.Linear(width, 12)
        self.encoder = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 16, width), requires_grad=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = images.shape[0]
        x = images.reshape(n, 3, 4, 2, 4, 2)
        target = torch.einsum("nchpwq->nhwpqc", x).reshape(n, 16, -1)
        x = self.embed(target) + self.pos
        noise = torch.rand(n, 16, device=x.device)
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        kept = shuffle[:, :6]
        latent = self.encoder(torch.gather(x, dim=1, index=kept.unsqueeze(-1).repeat(1, 1, x.shape[-1])))
        mask = torch.ones([n, 16], device=x.device)
        mask[:, :6] = 0
        mask = torch.gather(mask, dim=1, index=restore)
        filled = torch.cat([latent, self.mask_token.repeat(n, 10, 1).to(latent.dtype)], dim=1)
        filled = torch.gather(filled, 1, restore.unsqueeze(-1).repeat(1, 1, latent.shape[2]))
        return self.decode(filled + self.pos), target, mask


def masked_loss(out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    predicted, target, mask = out
    mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - mean) / (var + 1.0e-6) ** 0.5
    return ((predicted - target) ** 2).mean(dim=-1).mul(mask).sum() / mask.sum()


class ActorCritic(nn.Module):
    """Policy and value; the clipped objective of PPO in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.trunk(state))
        return self.policy(x), self.value(x).squeeze(-1)


def ppo_loss(out: tuple[Tensor, Tensor], action: Tensor, old: Tensor, advantage: Tensor, returns: Tensor) -> Tensor:
    log_probs = F.log_softmax(out[0], dim=-1)
    log_prob = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = torch.exp(log_prob - old)
    policy_loss = -torch.min(ratio * advantage, torch.clamp(ratio, 0.8, 1.2) * advantage).mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    return policy_loss + 0.5 * F.mse_loss(out[1], returns) - 0.01 * entropy


def dpo_loss(logits: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    log_probs = F.log_softmax(logits.float(), -1)
    a, b = (torch.gather(log_probs, 2, ids.unsqueeze(2)).squeeze(2).sum(-1) for ids in (chosen, rejected))
    return -F.logsigmoid(0.1 * (a - b)).mean()


def _language_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(23, 8), nn.Linear(8, 8), nn.SiLU(), nn.RMSNorm(8), nn.Linear(8, 23))


def _ppo() -> tuple[Any, ...]:
    return (torch.randint(0, 3, (5,)), -torch.rand(5), torch.randn(5), torch.randn(5))


GENERATIVE: dict[str, Case] = {
    "vqvae": Case(
        VQVAE, images(), loss=lambda o, x: F.mse_loss(o[0], x) + 0.25 * o[1].mean(), loss_args=images(), opaque=1
    ),
    "vae": Case(VAE, images(), loss=vae_loss, loss_args=images()),
    "normalizing_flow": Case(Flow, randn((4, 6)), loss=likelihood_loss),
    "gan": Case(GAN, randn((4, 6)), loss=gan_loss),
    "clip": Case(CLIP, lambda: (*images()(), *tokens()()), loss=clip_loss),
    "byol": Case(BYOL, randn((4, 6), (4, 6))),
    "moco": Case(MoCo, randn((3, 6), (3, 6)), loss=lambda out: F.cross_entropy(*out), opaque=2),
    "triplet": Case(
        Triplet, randn((4, 6), (4, 6), (4, 6)), loss=lambda out: F.triplet_margin_loss(*out, margin=1.0, p=2)
    ),
    "masked_autoencoder": Case(MaskedAutoencoder, images(), loss=masked_loss, opaque=1),
    "actor_critic": Case(ActorCritic, randn((5, 6)), loss=ppo_loss, loss_args=_ppo),
    "preferences": Case(_language_model, tokens(), loss=dpo_loss, loss_args=lambda: (*tokens()(), *labels(23, 2, 7)())),
}
