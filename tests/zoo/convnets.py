"""Convolutional networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, images, labels, randn

__all__ = ["CONVNETS"]


class VGG(nn.Module):
    """Layers from a configuration, and a classifier with dropout."""

    def __init__(self, config: tuple[int | str, ...] = (8, "M", 12, 12, "M"), classes: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for entry in config:
            if isinstance(entry, str):
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            else:
                layers += [nn.Conv2d(width, entry, 3, padding=1), nn.BatchNorm2d(entry), nn.ReLU(inplace=True)]
                width = entry
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(width * 4, 16), nn.ReLU(True), nn.Dropout(p=0.5), nn.Linear(16, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        x = torch.flatten(x, 1)
        return self.classifier(x)


class DenseLayer(nn.Module):
    """Bottleneck over the concatenation of all that came before."""

    def __init__(self, width: int, growth: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.drop = drop

    def forward(self, features: list[Tensor]) -> Tensor:
        bottleneck = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        new = self.conv2(F.relu(self.norm2(bottleneck)))
        if self.drop > 0:
            new = F.dropout(new, p=self.drop, training=self.training)
        return new


class DenseNet(nn.Module):
    """A list that grows, and a transition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList(DenseLayer(6 + 4 * i, 4, 0.1) for i in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 9, 1), nn.AvgPool2d(2, 2))
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = self.transition(torch.cat(features, 1))
        return self.head(x.mean([2, 3]))


class Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.one = nn.Conv2d(width, 4, 1)
        self.three = nn.Sequential(nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, (1, 3), padding=(0, 1)))
        self.five = nn.Sequential(nn.Conv2d(width, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 5, padding=2))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(width, 4, 1))
        self.head, self.aux = nn.Linear(18, 5), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = F.relu(self.stem(x))
        branches = [branch(x) for branch in (self.one, self.three, self.five, self.pool)]
        x = F.relu(torch.cat(branches, dim=1))
        aux = self.aux(F.avg_pool2d(x, 4).flatten(1)) if self.training else None
        return self.head(x.amax((2, 3))), aux


def inception_loss(outputs: Any, target: Tensor) -> Tensor:
    logits, aux = outputs
    loss = F.cross_entropy(logits, target, label_smoothing=0.1)
    return loss if aux is None else loss + 0.4 * F.cross_entropy(aux, target)


class SqueezeExcite(nn.Module):
    """Channel gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        scale = F.hardsigmoid(self.fc2(F.relu(self.fc1(scale))))
        return x * scale


class InvertedResidual(nn.Module):
    """Expand, depthwise, gate, project."""

    def __init__(self, width: int, out: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        hidden = width * 2
        self.use_res_connect = stride == 1 and width == out
        self.conv = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            act(inplace=True), SqueezeExcite(hidden), nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNet(nn.Module):
    """Inverted residuals with either activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.Sequential(InvertedResidual(8, 8, 1, nn.ReLU6), InvertedResidual(8, 12, 2, nn.Hardswish))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.hardswish(self.stem(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], -1))


class ChannelsFirstNorm(nn.Module):
    """Layer norm over channels, by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXt(nn.Module):
    """Depthwise, permute, layer norm, layer scale."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 2, 2), ChannelsFirstNorm(width))
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(1e-1 * torch.ones(width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(F.gelu(self.pwconv1(self.norm(x))))
        if self.gamma is not None:
            x = self.gamma * x
        x = shortcut + x.permute(0, 3, 1, 2)
        return self.head(x.mean([-2, -1]))


def drop_path(x: Tensor, drop_prob: float, training: bool) -> Tensor:
    """Stochastic depth with a mask in the dtype of its input."""
    if drop_prob == 0.0 or not training:
        return x
    keep = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = keep + torch.rand(shape, dtype=x.dtype, device=x.device)
    random_tensor.floor_()
    return x.div(keep) * random_tensor


class EfficientNet(nn.Module):
    """Swish, gates, and two spellings of stochastic depth."""

    def __init__(self, width: int = 8, p: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU())
        self.a = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU())
        self.b = nn.Sequential(nn.Conv2d(width, width, 5, padding=2, groups=width), SqueezeExcite(width))
        self.head = nn.Linear(width, 5)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + drop_path(self.a(x), self.p, self.training)
        y = self.b(x)
        if self.training:
            mask = y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(1 - self.p)
            y = y * mask.div_(1 - self.p)
        x = x + y
        return self.head(x.mean((2, 3)))


class ResNeXt(nn.Module):
    """Grouped bottleneck with a projection shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 2, 1, groups=4, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.downsample: nn.Module | None = nn.Sequential(nn.Conv2d(3, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return self.fc(out.mean(dim=(-2, -1)))


class ASPP(nn.Module):
    """Dilated branches, a pooled branch scaled up, per-pixel logits."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.branches = nn.ModuleList(nn.Conv2d(width, 6, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 6, 1), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(24, 4, 1), nn.Dropout2d(0.2))

    def forward(self, x: Tensor) -> Tensor:
        input_shape = x.shape[-2:]
        x = F.relu(self.stem(x))
        found = [F.relu(branch(x)) for branch in self.branches]
        found.append(F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False))
        x = self.project(torch.cat(found, dim=1))
        return F.interpolate(x, size=input_shape, mode="bilinear", align_corners=False)


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    cross_entropy = F.cross_entropy(logits, target, ignore_index=3, reduction="none")
    probabilities = logits.softmax(1)
    wanted = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2).to(probabilities.dtype)
    dims = (0, 2, 3)
    dice = (2 * (probabilities * wanted).sum(dims) + 1) / ((probabilities + wanted).sum(dims) + 1)
    return cross_entropy.mean() + (1 - dice).mean()


class WaveNet(nn.Module):
    """Causal dilated convolutions with gates and a sum of skips."""

    def __init__(self, width: int = 8, classes: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(3))
        self.residuals = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(3))
        self.end = nn.Conv1d(width, classes, 1)

    def forward(self, samples: Tensor) -> Tensor:
        x = self.embed(samples).transpose(1, 2)
        total: Any = 0
        for i, (gate, skip, residual) in enumerate(zip(self.gates, self.skips, self.residuals, strict=True)):
            z = gate(F.pad(x, (2**i, 0)))
            filtered, gated = z.chunk(2, dim=1)
            z = torch.tanh(filtered) * torch.sigmoid(gated)
            total = total + skip(z)
            x = (x + residual(z)) * 0.5**0.5
        return self.end(F.relu(total))


class Video(nn.Module):
    """Factored 3d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.Conv3d(2, 6, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0))
        self.norm = nn.BatchNorm3d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.time(self.space(x)), 0.1, inplace=True)
        x = F.max_pool3d(self.norm(x), 2)
        return self.fc(x.flatten(2).mean(-1))


class Discriminator(nn.Module):
    """Normalised convolutions, old and new spelling."""

    def __init__(self) -> None:
        super().__init__()
        norms = nn.utils.parametrizations
        self.first = norms.spectral_norm(nn.Conv2d(3, 6, 3, padding=1))
        self.second = norms.weight_norm(nn.Conv2d(6, 6, 3, padding=1))
        self.third = nn.utils.spectral_norm(nn.Linear(6, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for layer in (self.first, self.second):
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.third(x.sum((2, 3))).squeeze(-1), features


def hinge_loss(outputs: tuple[Tensor, list[Tensor]], real: Tensor) -> Tensor:
    logits, features = outputs
    signs = torch.where(real, 1.0, -1.0)
    return F.relu(1 - signs * logits).mean() + 0.1 * sum(f.abs().mean() for f in features)


CONVNETS: dict[str, Case] = {
    "vgg": Case(VGG, images(), loss=nn.CrossEntropyLoss(), loss_args=labels(5)),
    "densenet": Case(DenseNet, images(), loss=F.cross_entropy, loss_args=labels(5)),
    "inception": Case(Inception, images(), loss=inception_loss, loss_args=labels(5)),
    "mobilenet": Case(MobileNet, images(), loss=F.cross_entropy, loss_args=labels(5)),
    "convnext": Case(ConvNeXt, images(), loss=F.cross_entropy, loss_args=labels(5)),
    "efficientnet": Case(EfficientNet, images(), loss=F.cross_entropy, loss_args=labels(5)),
    "resnext": Case(ResNeXt, images(), loss=F.cross_entropy, loss_args=labels(5)),
    "aspp": Case(ASPP, images(), loss=segmentation_loss, loss_args=labels(4, 2, 8, 8)),
    "wavenet": Case(
        WaveNet, lambda: (torch.randint(0, 11, (2, 12)),), loss=F.cross_entropy, loss_args=labels(11, 2, 12)
    ),
    "video": Case(Video, randn((2, 2, 4, 6, 6)), loss=F.cross_entropy, loss_args=labels(5)),
    "discriminator": Case(
        Discriminator, images(), loss=hinge_loss, loss_args=lambda: (torch.tensor([True, False]),), opaque=2
    ),
}
