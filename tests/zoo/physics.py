"""Fields, splines, differential equations, spectra, capsules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, images, labels, randn

__all__ = ["PHYSICS"]


class NeRF(nn.Module):
    """Encoded positions, two heads, and rays composed by cumprod."""

    def __init__(self, freqs: int = 3, width: int = 12) -> None:
        super().__init__()
        self.freq_bands = 2.0 ** torch.linspace(0.0, freqs - 1, freqs)
        encoded = 3 + 6 * freqs
        self.layers = nn.ModuleList([nn.Linear(encoded, width), nn.Linear(width + encoded, width)])
        self.alpha, self.feature, self.rgb = nn.Linear(width, 1), nn.Linear(width, width), nn.Linear(width + 3, 3)

    def encode(self, x: Tensor) -> Tensor:
        fns: list[Tensor] = [x]
        for freq in self.freq_bands:
            fns += [torch.sin(x * freq), torch.cos(x * freq)]
        return torch.cat(fns, -1)

    def forward(self, origins: Tensor, directions: Tensor, z_vals: Tensor) -> dict[str, Tensor]:
        if self.training:
            mids = 0.5 * (z_vals[..., 1:] + z_vals[..., :-1])
            upper, lower = torch.cat([mids, z_vals[..., -1:]], -1), torch.cat([z_vals[..., :1], mids], -1)
            z_vals = lower + (upper - lower) * torch.rand(z_vals.shape, device=z_vals.device)
        points = origins[..., None, :] + directions[..., None, :] * z_vals[..., :, None]
        encoded = self.encode(points)
        h = encoded
        for i, layer in enumerate(self.layers):
            h = F.relu(layer(h))
            if i == 0:
                h = torch.cat([encoded, h], -1)
        sigma = self.alpha(h)[..., 0]
        viewed = (directions / torch.norm(directions, dim=-1, keepdim=True))[:, None].expand(points.shape)
        rgb = torch.sigmoid(self.rgb(torch.cat([self.feature(h), viewed], -1)))
        dists = z_vals[..., 1:] - z_vals[..., :-1]
        dists = torch.cat([dists, torch.tensor([1e10]).expand(dists[..., :1].shape)], -1)
        alpha = 1.0 - torch.exp(-F.relu(sigma) * dists)
        trans = torch.cumprod(torch.cat([torch.ones((alpha.shape[0], 1)), 1.0 - alpha + 1e-10], -1), -1)[:, :-1]
        weights = alpha * trans
        rgb_map = torch.sum(weights[..., None] * rgb, -2)
        depth = torch.sum(weights * z_vals, -1)
        return {"rgb": rgb_map + (1.0 - torch.sum(weights, -1)[..., None]), "depth": depth}


class Siren(nn.Module):
    """Sines of layers, and a periodic embedding by random features."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.register_buffer("B", torch.randn(2, 4) * 2)
        self.first, self.second, self.last = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, coords: Tensor) -> Tensor:
        projected = (2.0 * math.pi * coords) @ self.B
        x = torch.cat([torch.sin(projected), torch.cos(projected)], dim=-1)
        x = torch.sin(30 * self.first(x))
        x = torch.sin(self.second(x))
        return self.last(x)


def rk4(f: Callable[[Tensor, Tensor], Tensor], t: Tensor, dt: float, y: Tensor) -> Tensor:
    k1 = f(t, y)
    k2 = f(t + dt / 3, y + dt * k1 / 3)
    k3 = f(t + dt * 2 / 3, y + dt * (k2 - k1 / 3))
    k4 = f(t + dt, y + dt * (k1 - k2 + k3))
    return y + (k1 + 3 * (k2 + k3) + k4) * dt * 0.125


class NeuralODE(nn.Module):
    """A network integrated by Runge and Kutta."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width + 1, 12), nn.Softplus(), nn.Linear(12, width))

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([y, t.expand(y.shape[0], 1)], dim=-1))

    def forward(self, y0: Tensor) -> Tensor:
        times = torch.linspace(0.0, 1.0, 4, device=y0.device)
        y, path = y0, [y0]
        for i in range(3):
            y = rk4(self.field, times[i : i + 1], 1 / 3, y)
            path.append(y)
        return torch.stack(path)


class KANLinear(nn.Module):
    """B-splines by recursion, next to a plain layer."""

    def __init__(self, size: int = 4, out: int = 3, grid: int = 3, order: int = 2) -> None:
        super().__init__()
        h = 2 / grid
        knots = (torch.arange(-order, grid + order + 1) * h - 1).expand(size, -1).contiguous()
        self.register_buffer("grid", knots)
        self.base_weight = nn.Parameter(torch.randn(out, size) / 2)
        self.spline_weight = nn.Parameter(torch.randn(out, size, grid + order) / 4)
        self.spline_scaler = nn.Parameter(torch.ones(out, size))
        self.order = order

    def b_splines(self, x: Tensor) -> Tensor:
        grid: Tensor = self.grid
        x = x.unsqueeze(-1)
        bases = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            bases = ((x - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)]) * bases[:, :, :-1]) + (
                (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:(-k)]) * bases[:, :, 1:]
            )
        return bases.contiguous()

    @property
    def scaled_spline_weight(self) -> Tensor:
        return self.spline_weight * self.spline_scaler.unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        base_output = F.linear(F.silu(x), self.base_weight)
        spline_output = F.linear(
            self.b_splines(x).view(x.size(0), -1), self.scaled_spline_weight.view(self.base_weight.shape[0], -1)
        )
        return base_output + spline_output


class SpectralConv(nn.Module):
    """Multiplies the lowest modes by complex weights."""

    def __init__(self, width: int = 4, modes: int = 2) -> None:
        super().__init__()
        self.weights1, self.weights2 = (
            nn.Parameter(torch.rand(width, width, modes, modes, dtype=torch.cfloat) / width**2) for _ in range(2)
        )
        self.modes = modes

    def forward(self, x: Tensor) -> Tensor:
        batchsize = x.shape[0]
        x_ft = torch.fft.rfft2(x.float())
        out_ft = torch.zeros(batchsize, 4, x.size(-2), x.size(-1) // 2 + 1, dtype=torch.cfloat, device=x.device)
        m = self.modes
        out_ft[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", x_ft[:, :, :m, :m], self.weights1)
        out_ft[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", x_ft[:, :, -m:, :m], self.weights2)
        return torch.fft.irfft2(out_ft, s=(x.size(-2), x.size(-1)))


class FNO(nn.Module):
    """Fourier layers beside pointwise ones, with the grid as input."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.p, self.q = nn.Linear(3, width), nn.Linear(width, 1)
        self.spectral, self.w = (
            nn.ModuleList(SpectralConv() for _ in range(2)),
            nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2)),
        )

    def get_grid(self, shape: torch.Size, device: torch.device) -> Tensor:
        batchsize, size_x, size_y = shape[0], shape[1], shape[2]
        gridx = torch.linspace(0, 1, size_x).reshape(1, size_x, 1, 1).repeat([batchsize, 1, size_y, 1])
        gridy = torch.linspace(0, 1, size_y).reshape(1, 1, size_y, 1).repeat([batchsize, size_x, 1, 1])
        return torch.cat((gridx, gridy), dim=-1).to(device)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x, self.get_grid(x.shape, x.device)), dim=-1)
        x = self.p(x).permute(0, 3, 1, 2)
        for spectral, w in zip(self.spectral, self.w, strict=True):
            x = F.gelu(spectral(x) + w(x))
        return self.q(x.permute(0, 2, 3, 1))


def relative_loss(x: Tensor, y: Tensor) -> Tensor:
    n = x.size()[0]
    difference = torch.norm(x.reshape(n, -1) - y.reshape(n, -1), 2, 1)
    return (difference / torch.norm(y.reshape(n, -1), 2, 1)).mean()


class Capsules(nn.Module):
    """Routing by agreement over three rounds."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.primary = nn.Conv2d(3, 8, 4, 2)
        self.W = nn.Parameter(torch.randn(1, 18, classes, 6, 4) / 3)

    def squash(self, s: Tensor) -> Tensor:
        mag_sq = torch.sum(s**2, dim=-1, keepdim=True)
        return (mag_sq / (1.0 + mag_sq)) * (s / torch.sqrt(mag_sq + 1e-8))

    def forward(self, x: Tensor) -> Tensor:
        u = self.squash(self.primary(x).view(x.size(0), -1, 4))
        u_hat = torch.matmul(self.W, u[:, :, None, :, None]).squeeze(-1)
        b_ij = torch.zeros(*u_hat.size()[:3], 1, device=x.device)
        for i in range(3):
            c_ij = F.softmax(b_ij, dim=2)
            v = self.squash((c_ij * (u_hat if i == 2 else u_hat.detach())).sum(dim=1, keepdim=True))
            if i < 2:
                b_ij = b_ij + (u_hat.detach() * v).sum(-1, keepdim=True)
        return v.squeeze(1).norm(dim=-1)


def margin_loss(lengths: Tensor, target: Tensor) -> Tensor:
    wanted = F.one_hot(target, 3).float()
    return (wanted * F.relu(0.9 - lengths) ** 2 + 0.5 * (1 - wanted) * F.relu(lengths - 0.1) ** 2).sum(1).mean()


class DeepONet(nn.Module):
    """Branch and trunk networks, and the operator that joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 6))
        self.trunk = nn.Sequential(nn.Linear(1, 12), nn.Mish(), nn.Linear(12, 6))
        self.b = nn.Parameter(torch.tensor(0.0))

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        return torch.tensordot(self.branch(u), self.trunk(y), dims=([1], [1])) + self.b


class Spectrogram(nn.Module):
    """Audio to mel bands in logs, masked in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(8))
        self.register_buffer("mel", torch.rand(5, 4))
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.ctc = nn.Linear(6, 5)

    def forward(self, wave: Tensor) -> Tensor:
        spectrum = torch.stft(wave, 8, 4, window=self.window, return_complex=True, center=True)
        power = spectrum.abs().pow(2)
        mel = torch.matmul(power.transpose(1, 2), self.mel).transpose(1, 2)
        mel = torch.log10(torch.clamp(mel, min=1e-5))
        mel = torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8.0)
        x = F.gelu(self.conv((mel + 4.0) / 4.0))
        return self.ctc(x.permute(2, 0, 1)).log_softmax(-1)


def ctc(log_probs: Tensor, target: Tensor) -> Tensor:
    lengths = torch.full((2,), 9, dtype=torch.long)
    return F.ctc_loss(log_probs.float(), target, lengths, torch.tensor([3, 2]), zero_infinity=True)


class GaussianProcess(nn.Module):
    """A kernel over features; the likelihood by Cholesky."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(3, 4)
        self.raw_scale, self.raw_noise = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.features(x).float()
        distance = (z.unsqueeze(1) - z.unsqueeze(0)).square().sum(-1)
        kernel = torch.exp(-0.5 * distance / F.softplus(self.raw_scale))
        kernel = kernel + (F.softplus(self.raw_noise) + 1e-3) * torch.eye(x.shape[0])
        chol = torch.linalg.cholesky(kernel)
        alpha = torch.cholesky_solve(y.unsqueeze(-1), chol).squeeze(-1)
        return 0.5 * torch.dot(y, alpha) + chol.diagonal().log().sum() + 0.5 * x.shape[0] * math.log(2 * math.pi)


class Burgers(nn.Module):
    """The residual of a differential equation, by gradients inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 1))

    def forward(self, xt: Tensor) -> tuple[Tensor, Tensor]:
        xt = xt.clone().requires_grad_(True)
        u = self.net(xt)
        grad = torch.autograd.grad(u, xt, grad_outputs=torch.ones_like(u), create_graph=True)[0]
        u_x, u_t = grad[:, :1], grad[:, 1:]
        u_xx = torch.autograd.grad(u_x.sum(), xt, create_graph=True)[0][:, :1]
        return u, u_t + u * u_x - (0.01 / math.pi) * u_xx


def residual_loss(out: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return F.mse_loss(out[0], target) + out[1].pow(2).mean()


class Optics(nn.Module):
    """A field through phase masks, with complex transfer matrices made from real parameters."""

    def __init__(self, size: int = 5) -> None:
        super().__init__()
        self.phase, self.mixing = nn.Parameter(torch.randn(2, size)), nn.Parameter(torch.randn(size, size) / 3)
        self.readout = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        transfer = self.mixing + 1j * self.mixing.t()
        field = torch.complex(x, torch.zeros_like(x))
        for phase in (self.phase[0], self.phase[1]):
            field = torch.matmul(field * torch.exp(1j * phase), transfer)
        return self.readout(field.real**2 + field.imag**2)


class KernelRegression(nn.Module):
    """Inputs in float64 meet float32 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.log_noise, self.mixing = nn.Parameter(torch.zeros(())), nn.Parameter(torch.eye(5) * 0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gram = torch.mm(x, x.t()) + self.mixing @ self.mixing.t() + self.log_noise.exp() * torch.eye(5)
        smoothed = torch.mm(gram, torch.mm(gram, y.unsqueeze(-1)))
        return torch.cumsum(torch.prod(gram, 0, keepdim=True), -1) @ smoothed


PHYSICS: dict[str, Case] = {
    "nerf": Case(
        NeRF,
        lambda: (torch.randn(3, 3), torch.randn(3, 3), torch.linspace(2, 6, 5).expand(3, 5).contiguous()),
        loss=lambda out, t: F.mse_loss(out["rgb"], t),
        loss_args=randn((3, 3)),
    ),
    "siren": Case(Siren, randn((6, 2)), loss=F.mse_loss, loss_args=randn((6, 1))),
    "neural_ode": Case(NeuralODE, randn((3, 4)), loss=F.l1_loss, loss_args=randn((4, 3, 4))),
    "kan": Case(KANLinear, randn((5, 4)), loss=F.mse_loss, loss_args=randn((5, 3))),
    "fno": Case(FNO, randn((2, 6, 6, 1)), loss=relative_loss, loss_args=randn((2, 6, 6, 1)), opaque=4),
    "capsules": Case(Capsules, images(), loss=margin_loss, loss_args=labels(3), symbolic=False),
    "deeponet": Case(DeepONet, randn((3, 5), (4, 1)), loss=F.mse_loss, loss_args=randn((3, 4)), opaque=1),
    "spectrogram": Case(Spectrogram, randn((2, 32)), loss=ctc, loss_args=lambda: (torch.randint(1, 5, (2, 3)),)),
    "pinn": Case(Burgers, randn((5, 2)), loss=residual_loss, loss_args=randn((5, 1)), opaque=2),
    "optics": Case(Optics, randn((4, 5)), loss=F.cross_entropy, loss_args=labels(3, 4)),
    "kernel_regression": Case(KernelRegression, lambda: (torch.rand(5, 3).double(), torch.rand(5).double())),
    "gaussian_process": Case(GaussianProcess, randn((5, 3), (5,))),
}
