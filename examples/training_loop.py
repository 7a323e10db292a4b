"""Train a classifier in float16 with the scaler, gradient clipping included."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import fxamp

EPOCHS, BATCH = 8, 64


def digits() -> list[Tensor]:
    """Training and test images, then training and test labels."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images.astype("float32") / 16, labels, stratify=labels, random_state=0)
    return [torch.from_numpy(part) for part in parts]


def main() -> None:
    torch.manual_seed(0)
    images, test_images, labels, test_labels = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(0.1), nn.Linear(64, 10))

    amp = fxamp.convert(model, loss=F.cross_entropy, dtype=torch.float16)
    amp.scaler.set_growth_interval(40)  # the default is 2000 steps, more than this run has
    optimizer = torch.optim.AdamW(amp.parameters(), lr=3e-3)

    rows = []
    for epoch in range(1, EPOCHS + 1):
        amp.train()
        skipped = 0
        for chosen in torch.randperm(len(images)).split(BATCH):
            loss, _ = amp(images[chosen], labels[chosen])
            amp.scaler.backward(loss)  # of the scaled loss
            amp.scaler.step(optimizer, clip_norm=1.0)  # skipped when a gradient is not finite
            amp.scaler.update()
            optimizer.zero_grad()
            skipped += amp.scaler.skipped

        amp.eval()  # the graph without dropout
        with torch.no_grad():
            test_loss, output = amp(test_images, test_labels)
        accuracy = 100 * (output.argmax(dim=1) == test_labels).double().mean().item()
        rows.append([epoch, test_loss.item(), accuracy, amp.scaler.get_scale(), skipped])

    headers = ["epoch", "test loss", "accuracy %", "scale", "skipped steps"]
    print(tabulate(rows, headers, floatfmt=("", ".4f", ".1f", ".0f", "")))


if __name__ == "__main__":
    main()
