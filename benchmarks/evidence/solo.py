"""The network of ``dense.py``, in PyTorch, its loss, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from coordconv.backends.torch import CoordConv2d
from evidence.dense import CELLS, RATE, Found, Scene, Variant, cells_of, suppressed

MASK_WEIGHT = 3.0  # SOLO, section 3.3
LEAST_SCORE = 0.1  # SOLO, section 3.4


class Solo(nn.Module):
    """A backbone of strides 2 and 4, the branch of the cells, and that of the masks.

    Masks have stride 2. Each convolution is followed by group normalisation, as in SOLO's head.
    """

    def __init__(self, variant: Variant, width: int = 24) -> None:
        super().__init__()

        def conv(channels: int, out: int, stride: int = 1, first: bool = False) -> nn.Module:
            options: Any = {"stride": stride, "padding": 1, "padding_mode": variant.padding}
            sees = variant.coords == "all" or (first and variant.coords == "first")
            made = (CoordConv2d if sees else nn.Conv2d)(channels, out, 3, bias=False, **options)
            return nn.Sequential(made, nn.GroupNorm(4, out), nn.ReLU())

        self.fine = conv(1, 16, stride=2)
        self.coarse = nn.Sequential(
            conv(16, width, stride=2), conv(width, width), conv(width, width)
        )
        self.masks = nn.Sequential(
            conv(width, width, first=True), conv(width, width), conv(width, width)
        )
        self.lateral = nn.Conv2d(16, width, 1)
        self.merged = conv(width, width)
        self.mask_logits = nn.Conv2d(width, CELLS**2, 1)
        self.cells = nn.Sequential(conv(width, width), conv(width, width))
        self.cell_logits = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.cell_logits.bias, -2.2)  # type: ignore[arg-type]  # of 10%

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the cells, ``(N, S * S)``, and of their masks, ``(N, S * S, H / 2, W / 2)``."""
        fine = self.fine(pictures)
        coarse = self.coarse(fine)
        cells = self.cell_logits(self.cells(F.adaptive_avg_pool2d(coarse, CELLS)))
        masks = F.interpolate(self.masks(coarse), scale_factor=2.0, mode="nearest")
        masks = self.mask_logits(self.merged(masks + self.lateral(fine)))
        return cells.flatten(1), masks


def _inputs(scenes: Sequence[Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([each.picture for each in scenes])[:, None])


def _full(masks: torch.Tensor) -> torch.Tensor:
    """Probabilities of the masks at the size of the picture."""
    grown = F.interpolate(masks[None], scale_factor=2.0, mode="bilinear", align_corners=False)
    return grown[0].sigmoid()


def loss(network: Solo, scenes: Sequence[Scene]) -> torch.Tensor:
    """SOLO's: focal loss of the cells, and dice loss of the masks of those with an instance."""
    cells, masks = network(_inputs(scenes))
    places: list[tuple[int, int]] = []
    wanted: list[np.ndarray[Any, Any]] = []
    for i, one in enumerate(scenes):
        owner = {cell: mask for mask in one.masks for cell in cells_of(mask)}
        places += [(i, cell) for cell in owner]
        wanted += owner.values()
    index = torch.tensor(places)
    target = torch.zeros_like(cells)
    target[index[:, 0], index[:, 1]] = 1
    each = F.binary_cross_entropy_with_logits(cells, target, reduction="none")
    off = (target - cells.sigmoid()).abs()
    focal = ((0.25 * target + 0.75 * (1 - target)) * off.square() * each).sum() / len(places)
    found = _full(masks[index[:, 0], index[:, 1]]).flatten(1)
    true = torch.from_numpy(np.stack(wanted)).float().flatten(1)
    both = 2 * (found * true).sum(1) / (found.square().sum(1) + true.sum(1))
    total: torch.Tensor = focal + MASK_WEIGHT * (1 - both).mean()
    return total


def answers(network: Solo, scenes: Sequence[Scene], batch: int = 50) -> list[Found]:
    """The instances of each picture, the best of those that overlap.

    A score is the probability of the cell times the mean of the mask's, as in SOLO's program.
    """
    found = []
    with torch.no_grad():
        for start in range(0, len(scenes), batch):
            cells, masks = network(_inputs(scenes[start : start + batch]))
            for scores, logits in zip(cells.sigmoid(), masks, strict=True):
                likely = scores > LEAST_SCORE
                soft = _full(logits[likely])
                hard = soft > 0.5
                area = hard.flatten(1).sum(1)
                mean = (soft * hard).flatten(1).sum(1) / area.clamp(min=1)
                some = area > 0
                each = Found(hard[some].numpy(), (scores[likely] * mean)[some].numpy())
                found.append(suppressed(each))
    return found


class Training:
    """A network of a variant, and the steps of its training."""

    def __init__(self, variant: Variant, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.network = Solo(variant)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), RATE)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, RATE, steps)
        self.parameters = sum(p.numel() for p in self.network.parameters())

    def step(self, scenes: Sequence[Scene]) -> None:
        found = loss(self.network, scenes)
        self.optimizer.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()

    def answers(self, scenes: Sequence[Scene]) -> list[Found]:
        return answers(self.network, scenes)
