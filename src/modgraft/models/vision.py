"""The vision model of DigitsQA: a small CNN that turns strips of digits into patches."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modgraft.core.errors import ModgraftError
from modgraft.data.digits import CUT, scans

PATCHES, FEATURES, POSITION = 12, 64, 16
"""The number of patches of three digits, of features of a patch, of values for its position."""


class DigitPatches(nn.Module):
    """strips [B, 8, 8n] -> patches [B, 4n, 80]: 64 features and 16 values of position each.

    Each of the n 8 x 8 digits, three in DigitsQA's published form, goes through the same
    convolutions separately, down to a 2 x 2 map. Patches are in reading order over the strip, two
    rows of 2n (`patches.reshape(B, 2, 2n, 80)`), each over 4 x 4 pixels. The receptive field of
    every patch is its whole digit, so one patch is enough to recognise it. The position is the
    digit (one-hot, 3), the patch (one-hot, 12), and a constant 1; those of other than three digits
    lie between the three, interpolated.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        wide = 2 * width
        self.body = nn.Sequential(
            *_layer(1, width),
            *_layer(width, width),
            *_layer(width, wide, stride=2),  # 8 x 8 -> 4 x 4
            *_layer(wide, wide),
            *_layer(wide, FEATURES, stride=2),  # 4 x 4 -> 2 x 2
        )
        self.mix = nn.Conv2d(FEATURES, FEATURES, 3, padding=1)
        self.head = nn.Linear(FEATURES, 10)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("scale", torch.ones(FEATURES))

    def maps(self, digits: Tensor) -> Tensor:
        """Map digits [N, 8, 8] in 0..1 to their raw 2 x 2 maps, as rows [N, 4, 64]."""
        h = self.body(digits[:, None])
        h = h + F.relu(self.mix(h))
        return h.flatten(2).transpose(1, 2)  # [N, 64, 2, 2] -> [N, 4, 64]

    def logits(self, digits: Tensor) -> Tensor:
        """Classify digits [N, 8, 8] from every patch, [N, 4, 10]; the mean is the prediction."""
        return self.head(self.maps(digits))

    def forward(self, strips: Tensor) -> Tensor:
        """Map strips [B, 8, 8n] in 0..1, where 1 is ink, to patches [B, 4n, 80].

        Raises:
            ModgraftError: The strips are not [B, 8, 8n].
        """
        digits = tiles(strips)  # [B, n, 8, 8]
        B, n = digits.shape[:2]
        maps = (self.maps(digits.flatten(0, 1)) - self.mean) / self.scale
        # [nB, 4, 64] -> [B, digit, row, column, 64] -> [B, row, digit, column, 64] -> [B, 4n, 64]
        patches = maps.reshape(B, n, 2, 2, FEATURES).transpose(1, 2).reshape(B, 4 * n, FEATURES)
        return torch.cat([patches, positions(n).to(patches).expand(B, -1, -1)], dim=-1)

    @torch.no_grad()
    def features(self, strips: Tensor | np.ndarray, batch: int = 512) -> Tensor:
        """Map strips [N, 8, 8n] to patches [N, 4n, 80] float32, in batches, without gradients."""
        strips = torch.as_tensor(strips, dtype=torch.float32)
        if not len(strips):
            return torch.zeros(0, strips.shape[-1] // 2, FEATURES + POSITION)
        return torch.cat([self(part) for part in strips.split(batch)])


def _layer(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def tiles(strips: Tensor) -> Tensor:
    """Cut strips [B, 8, 8n] into their digits, [B, n, 8, 8].

    Raises:
        ModgraftError: The strips are not [B, 8, 8n].
    """
    if strips.dim() != 3 or strips.shape[1] != 8 or strips.shape[2] % 8 or not strips.shape[2]:
        raise ModgraftError(
            f"DigitPatches: strips are {list(strips.shape)}, not [batch, 8, 8 a digit]; "
            "read an image file with modgraft.models.strips.find_strip(path, eye)"
        )
    return strips.unflatten(2, (-1, 8)).transpose(1, 2)  # [B, 8, n, 8] -> [B, n, 8, 8]


@cache
def positions(count: int) -> Tensor:
    """Return the positions of a strip's patches, [4 count, 16]: digit (3), patch (12), and 1.

    With three digits, digit and patch are one-hot. Another count lies from left to right over the
    same three places, each digit between the two that it is nearest to.
    """
    at = torch.linspace(0, 2, count) if count > 1 else torch.ones(1)
    digit = (1 - (at[:, None] - torch.arange(3.0)).abs()).clamp_min(0)  # [n, 3]
    inside = torch.eye(4).reshape(2, 1, 2, 2, 2)  # row, -, column -> row, column
    patch = torch.einsum(
        "nk,rocij->rncikj", digit, inside
    )  # row, digit, column -> row, place, column
    patch = patch.reshape(4 * count, PATCHES)
    digit = digit[None, :, None].expand(2, -1, 2, -1).reshape(4 * count, 3)
    return torch.cat([digit, patch, torch.ones(4 * count, 1)], dim=1)


def train_vision(
    seed: int = 0, *, steps: int = 1500, batch: int = 96, lr: float = 3e-3
) -> DigitPatches:
    """Train `DigitPatches` on the 1,197 training digits, with random distortions.

    The loss is the cross-entropy, with smoothed labels, of the mean of the four patches plus that
    of each patch alone.

    Args:
        seed: The seed of weights, batches and distortions; the global random state does not change.
        steps, batch, lr: Of AdamW with a one-cycle schedule. 1,500 steps take about 25 s on one
            thread.

    Returns:
        The running average of the weights, frozen and in evaluation mode.
    """
    images, labels = (torch.from_numpy(a[CUT["train"]]) for a in scans())
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitPatches()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    average = {k: v.clone() for k, v in net.state_dict().items()}
    for step in range(steps):
        index = torch.randint(len(images), (batch,), generator=generator)
        target = labels[index]
        logits = net.logits(distort(images[index], generator))  # [b, 4, 10]
        loss = F.cross_entropy(logits.mean(1), target, label_smoothing=0.05)
        each = F.cross_entropy(
            logits.flatten(0, 1), target.repeat_interleave(4), label_smoothing=0.05
        )
        optimizer.zero_grad()
        (loss + 0.5 * each).backward()
        optimizer.step()
        schedule.step()
        keep = min(0.99, (step + 1) / (step + 10))  # the average starts over few steps
        for key, value in net.state_dict().items():
            if value.is_floating_point():
                average[key].lerp_(value, 1 - keep)
    net.load_state_dict(average)
    net.eval().requires_grad_(False)
    rows = net.maps(images).flatten(0, 1)  # [4 * 1197, 64]
    net.mean.copy_(rows.mean(0))
    # a lower bound, so that a nearly constant channel is not amplified
    deviation = rows.std(0)
    net.scale.copy_(deviation.clamp_min(0.25 * float(deviation.mean())))
    return net


def distort(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Distort digits [N, 8, 8] in 0..1, as if other people had written them.

    The distortions are a random affine map (rotation, scale, shear, shift by about half a pixel), a
    smooth random bend, another stroke weight, and noise.
    """
    N = len(digits)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    turn, shear = 0.1 * normal(N), 0.1 * normal(N)
    wide, high = (0.07 * normal(N)).exp(), (0.07 * normal(N)).exp()
    rows = [
        torch.stack([turn.cos() * wide, shear - turn.sin() * high], dim=-1),
        torch.stack([turn.sin() * wide, turn.cos() * high], dim=-1),
    ]
    affine = torch.cat([torch.stack(rows, dim=1), 0.11 * normal(N, 2, 1)], dim=2)  # [N, 2, 3]
    grid = F.affine_grid(affine, [N, 1, 8, 8], align_corners=False)
    bend = F.interpolate(0.08 * normal(N, 2, 3, 3), size=8, mode="bicubic", align_corners=True)
    moved = F.grid_sample(
        digits[:, None], grid + bend.permute(0, 2, 3, 1), mode="bilinear", align_corners=False
    )[:, 0]
    weight = (0.25 * normal(N, 1, 1)).exp()
    moved = moved.clamp(0, 1) ** weight * (1 + 0.1 * normal(N, 1, 1))
    return (moved + 0.05 * normal(N, 8, 8)).clamp(0, 1)


def save_vision(net: DigitPatches, path: str | Path) -> None:
    """Save the network's weights as safetensors."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)


def load_vision(path: str | Path) -> DigitPatches:
    """Load a network of `save_vision`, frozen, in evaluation mode.

    Raises:
        ModgraftError: The file does not exist, or does not hold this network's weights.
    """
    if not Path(path).is_file():
        raise ModgraftError(f"{path}: no such file; write one with save_vision(net, path)")
    net = DigitPatches()
    try:
        net.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ModgraftError(f"{path}: not a DigitPatches network ({error})") from error
    return net.eval().requires_grad_(False)
