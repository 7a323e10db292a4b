"""Detection, matching and geometry: boxes, anchors, sampling by index."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, images, randn

__all__ = ["DETECTION"]


class RetinaHead(nn.Module):
    """Two levels, anchors made on the fly, boxes decoded with exp and clamp."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.lateral, self.smooth = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.cls, self.box = nn.Conv2d(width, 2 * classes, 3, padding=1), nn.Conv2d(width, 8, 3, padding=1)
        self.register_buffer("sizes", torch.tensor([[2.0, 2.0], [3.0, 1.5]]))
        self.classes = classes

    def anchors(self, feature: Tensor, stride: int) -> Tensor:
        h, w = feature.shape[-2:]
        ys = (torch.arange(h, device=feature.device) + 0.5) * stride
        xs = (torch.arange(w, device=feature.device) + 0.5) * stride
        grid_y, grid_x = torch.meshgrid(ys, xs, indexing="ij")
        centres = torch.stack([grid_x, grid_y], dim=-1).view(-1, 1, 2).expand(-1, 2, -1)
        return torch.cat([centres, (self.sizes * stride).expand_as(centres)], -1).reshape(-1, 4)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        xy = anchors[:, :2] + deltas[..., :2] * anchors[:, 2:]
        wh = anchors[:, 2:] * torch.exp(torch.clamp(deltas[..., 2:], max=math.log(1000.0 / 16)))
        boxes = torch.cat([xy - wh / 2, xy + wh / 2], dim=-1)
        return boxes.clamp(min=0, max=8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c1 = F.relu(self.c1(x))
        c2 = F.relu(self.c2(c1))
        p1 = self.smooth(self.lateral(c1) + F.interpolate(c2, size=c1.shape[-2:], mode="nearest"))
        logits, boxes = [], []
        for feature, stride in ((p1, 2), (c2, 4)):
            n = feature.shape[0]
            logits.append(self.cls(feature).permute(0, 2, 3, 1).reshape(n, -1, self.classes))
            deltas = self.box(feature).permute(0, 2, 3, 1).reshape(n, -1, 4)
            boxes.append(self.decode(deltas, self.anchors(feature, stride)))
        return torch.cat(logits, dim=1), torch.cat(boxes, dim=1)


def sigmoid_focal_loss(inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2) -> Tensor:
    p = torch.sigmoid(inputs)
    ce_loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce_loss * ((1 - p_t) ** gamma)
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return loss


def giou(a: Tensor, b: Tensor) -> Tensor:
    lt, rb = torch.max(a[..., :2], b[..., :2]), torch.min(a[..., 2:], b[..., 2:])
    wh = (rb - lt).clamp(min=0)
    inter = wh[..., 0] * wh[..., 1]
    area_a, area_b = ((t[..., 2] - t[..., 0]) * (t[..., 3] - t[..., 1]) for t in (a, b))
    union = area_a + area_b - inter
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp_min(0).prod(-1)
    return inter / (union + 1e-7) - (hull - union) / (hull + 1e-7)


def retina_loss(outputs: tuple[Tensor, Tensor], classes: Tensor, boxes: Tensor) -> Tensor:
    logits, predicted = outputs
    positive = classes.sum(-1) > 0
    found = sigmoid_focal_loss(logits, classes).sum() / positive.sum().clamp(min=1)
    overlap = (1 - giou(predicted, boxes)) * positive
    return found + overlap.sum() / positive.sum().clamp(min=1) + F.smooth_l1_loss(predicted, boxes, beta=0.1)


class DETR(nn.Module):
    """Learned queries that attend to pixels, boxes by sigmoid, an auxiliary output for each layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.backbone, self.query_embed = nn.Conv2d(3, width, 4, 4), nn.Embedding(3, width)
        self.row_embed, self.col_embed = (nn.Parameter(torch.rand(4, width // 2)) for _ in range(2))
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(width, 2, 24, dropout=0.1, batch_first=True) for _ in range(2)
        )
        self.class_embed, self.bbox_embed = nn.Linear(width, 4), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.backbone(x)
        H, W = h.shape[-2:]
        pos = torch.cat(
            [self.col_embed[:W].unsqueeze(0).repeat(H, 1, 1), self.row_embed[:H].unsqueeze(1).repeat(1, W, 1)], dim=-1
        )
        memory = pos.flatten(0, 1).unsqueeze(0) + h.flatten(2).transpose(1, 2)
        y = self.query_embed.weight.unsqueeze(0).repeat(x.shape[0], 1, 1)
        outputs = []
        for layer in self.decoder:
            y = layer(y, memory)
            outputs.append({"logits": self.class_embed(y), "boxes": self.bbox_embed(y).sigmoid()})
        return {**outputs[-1], "aux": outputs[:-1]}


def detr_loss(out: dict[str, Any], target: Tensor, boxes: Tensor) -> Tensor:
    total = 0
    for part in (out, *out["aux"]):
        logits = part["logits"]
        weight = torch.ones(4, device=logits.device)
        weight[-1] = 0.1
        with torch.no_grad():
            cost = torch.cdist(part["boxes"].float(), boxes, p=1)
            order = cost.argmin(-1)
        wanted = boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
        total = total + F.cross_entropy(logits.transpose(1, 2), target, weight) + F.l1_loss(part["boxes"], wanted)
    return total


class RoIHead(nn.Module):
    """Bilinear sampling by index arithmetic, and again by grid_sample."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.fc1, self.score, self.delta = nn.Linear(width * 9, 12), nn.Linear(12, 3), nn.Linear(12, 4)

    def bilinear(self, feature: Tensor, y: Tensor, x: Tensor) -> Tensor:
        _, h, w = feature.shape
        y0, x0 = y.floor().long().clamp(0, h - 1), x.floor().long().clamp(0, w - 1)
        y1, x1 = (y0 + 1).clamp(max=h - 1), (x0 + 1).clamp(max=w - 1)
        ly, lx = y - y0, x - x0
        top = feature[:, y0, x0] * (1 - lx) + feature[:, y0, x1] * lx
        bottom = feature[:, y1, x0] * (1 - lx) + feature[:, y1, x1] * lx
        return top * (1 - ly) + bottom * ly

    def forward(self, image: Tensor, rois: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = F.relu(self.conv(image))
        steps = (torch.arange(3, dtype=rois.dtype, device=rois.device) + 0.5) / 3
        x0, y0, x1, y1 = rois.unbind(-1)
        xs = x0[:, None] + steps * (x1 - x0)[:, None]
        ys = y0[:, None] + steps * (y1 - y0)[:, None]
        y, x = ys[:, :, None].expand(-1, 3, 3), xs[:, None, :].expand(-1, 3, 3)
        pooled = self.bilinear(features[0], y, x).transpose(0, 1)
        grid = torch.stack([x, y], -1) / 3.5 - 1
        again = F.grid_sample(features[:1].expand(2, -1, -1, -1), grid.to(features.dtype), align_corners=True)
        h = F.relu(self.fc1(torch.flatten((pooled + again) / 2, 1)))
        return self.score(h), self.delta(h), pooled


class CenterNet(nn.Module):
    """Peaks of a heat map by max pooling and topk; offsets gathered at the peaks."""

    def __init__(self, width: int = 8, k: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1))
        self.heat, self.offset, self.size = nn.Conv2d(width, 2, 1), nn.Conv2d(width, 2, 1), nn.Conv2d(width, 2, 1)
        self.k = k

    def gather(self, feature: Tensor, index: Tensor) -> Tensor:
        feature = feature.permute(0, 2, 3, 1).contiguous().view(feature.size(0), -1, feature.size(1))
        return feature.gather(1, index.unsqueeze(2).expand(index.size(0), index.size(1), feature.size(2)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.backbone(x)
        heat = torch.clamp(self.heat(y).sigmoid_(), min=1e-4, max=1 - 1e-4)
        peaks = F.max_pool2d(heat, 3, stride=1, padding=1)
        kept = heat * (peaks == heat).float()
        batch, _, height, width = heat.size()
        scores, index = torch.topk(kept.view(batch, -1), self.k)
        classes = torch.div(index, height * width, rounding_mode="floor")
        index = index % (height * width)
        ys, xs = (index // width).float(), (index % width).float()
        offset, size = self.gather(self.offset(y), index), self.gather(self.size(y), index)
        centre = torch.stack([xs, ys], -1) + offset
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=2)
        return {"heat": heat, "scores": scores, "classes": classes, "boxes": boxes}


def centernet_loss(out: dict[str, Tensor], target: Tensor) -> Tensor:
    pred = out["heat"]
    pos, neg = target.eq(1).float(), target.lt(1).float()
    positive = torch.log(pred) * torch.pow(1 - pred, 2) * pos
    negative = torch.log(1 - pred) * torch.pow(pred, 2) * torch.pow(1 - target, 4) * neg
    return -(positive.sum() + negative.sum()) / torch.clamp(pos.sum(), min=1) + 0.1 * out["boxes"].abs().mean()


class SpatialTransformer(nn.Module):
    """Predicts an affine map and samples by it."""

    def __init__(self) -> None:
        super().__init__()
        self.localization = nn.Sequential(nn.Conv2d(3, 4, 5), nn.MaxPool2d(2, 2), nn.ReLU(True))
        self.fc_loc = nn.Linear(16, 6)
        self.fc_loc.weight.data.mul_(0.1)
        self.fc_loc.bias.data.copy_(torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float))
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.fc_loc(self.localization(x).view(-1, 16)).view(-1, 2, 3)
        grid = F.affine_grid(theta, x.size(), align_corners=False)
        x = F.grid_sample(x, grid.to(x.dtype), padding_mode="border", align_corners=False)
        return F.log_softmax(self.fc(self.conv(x).amax((-2, -1))), dim=1)


class Flow(nn.Module):
    """A correlation volume, and features warped by the flow."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.fnet, self.update = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(16 + 2, 2, 3, padding=1)

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        f1, f2 = torch.split(self.fnet(torch.cat([first, second], dim=0)), [2, 2], dim=0)
        f1, f2 = f1.float(), f2.float()
        batch, dim, h, w = f1.shape
        corr = torch.matmul(f1.view(batch, dim, h * w).transpose(1, 2), f2.view(batch, dim, h * w))
        corr = (corr.view(batch, h, w, h * w) / torch.sqrt(torch.tensor(dim).float())).permute(0, 3, 1, 2)
        coords = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")[::-1]).float()
        coords0 = coords[None].repeat(batch, 1, 1, 1)
        coords1 = coords0.clone()
        flows = []
        for _ in range(2):
            coords1 = coords1.detach()
            flow = coords1 - coords0
            grid = (2 * coords1 / 3 - 1).permute(0, 2, 3, 1)
            near = F.grid_sample(corr, grid, align_corners=True)
            coords1 = coords1 + self.update(torch.cat([near, flow], dim=1))
            flows.append(2 * F.interpolate(coords1 - coords0, size=(8, 8), mode="bilinear", align_corners=True))
        return flows


def flow_loss(flows: list[Tensor], target: Tensor, valid: Tensor) -> Tensor:
    loss = 0.0
    for i, flow in enumerate(flows):
        loss += 0.8 ** (1 - i) * (valid[:, None] * (flow - target).abs()).mean()
    return loss


def _boxes(*shape: int) -> Tensor:
    corner = torch.rand(*shape, 2) * 4
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2) * 2], -1)


def _classes() -> Tensor:
    return F.one_hot(torch.randint(0, 3, (2, 40)), 3).float() * (torch.rand(2, 40, 1) > 0.5)


DETECTION: dict[str, Case] = {
    "retina": Case(RetinaHead, images(), loss=retina_loss, loss_args=lambda: (_classes(), _boxes(2, 40))),
    "detr": Case(
        DETR, images(), loss=detr_loss, loss_args=lambda: (torch.randint(0, 4, (2, 3)), _boxes(2, 5) / 8), opaque=4
    ),
    "roi": Case(
        RoIHead,
        lambda: (torch.randn(1, 3, 8, 8), _boxes(2)),
        loss=lambda out, t: F.cross_entropy(out[0], t) + out[1].square().mean(),
        loss_args=lambda: (torch.tensor([0, 2]),),
    ),
    "centernet": Case(CenterNet, images(), loss=centernet_loss, loss_args=lambda: (torch.rand(2, 2, 4, 4).round(),)),
    "spatial_transformer": Case(
        SpatialTransformer, images(), loss=F.nll_loss, loss_args=lambda: (torch.tensor([0, 2]),), opaque=1
    ),
    "flow": Case(
        Flow,
        randn((2, 3, 8, 8), (2, 3, 8, 8)),
        loss=flow_loss,
        loss_args=lambda: (torch.randn(2, 2, 8, 8), torch.ones(2, 8, 8)),
    ),
}
