"""The network of ``sizes.py``, in PyTorch, and its training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from common import Array
from coordconv import Coordinates, Window, window
from coordconv.backends.torch import CoordConv2d
from evidence.sizes import FRAME, RATE, Batch

WIDTH = 16
DILATIONS, WIDE = (1, 2, 2), (1, 2, 4, 8)


class Pointer(nn.Module):
    """Convolutions, a softmax over places, and the mean of two maps by its weights.

    The first has stride 2 and a kernel of 4, whose middle is that of the two pixels which a sample
    stands for. The dilated ones look 10 pixels far, about as far as an object reaches; the ``wide``
    ones 30, so that nearly all of them see the zeros of the padding at 64x64, and can learn places
    from these. The last convolution, of 1x1, has the coordinates, and starts with these alone as
    the two maps: with maps drawn at random, three seeds of five never came to use coordinates.
    """

    def __init__(self, coords: Coordinates | None, wide: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, WIDTH, 4, stride=2, padding=1), nn.ReLU()]
        for by in WIDE if wide else DILATIONS:
            made = nn.Conv2d(WIDTH, WIDTH, 3, padding=by, dilation=by, bias=False)
            layers += [made, nn.BatchNorm2d(WIDTH), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        if coords is None:
            self.last: nn.Conv2d = nn.Conv2d(WIDTH, 3, 1)
            return
        self.last = CoordConv2d(WIDTH, 3, 1, coords=coords)
        with torch.no_grad():
            self.last.weight[:2] = torch.eye(2, WIDTH + 2).roll(WIDTH, 1)[..., None, None]
            nn.init.zeros_(self.last.bias)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Places ``(N, 2)``, x and y."""
        maps = self.last(self.features(pictures)).flatten(2)
        weights = maps[:, 2].softmax(1)
        places: torch.Tensor = (maps[:, :2] * weights[:, None]).sum(-1)
        return places


class Training:
    """A network of a variant, and the steps of its training."""

    def __init__(self, variant: str, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.in_windows = variant == "window"
        align: Any = "edges" if self.in_windows else variant
        coords = None if variant in ("none", "wide") else Coordinates("xy", align=align)
        self.network = Pointer(coords, variant == "wide")
        self.optimizer = torch.optim.Adam(self.network.parameters(), RATE)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, RATE, steps)
        self.parameters = sum(p.numel() for p in self.network.parameters())

    def _places(self, of: Batch) -> torch.Tensor:
        pictures = torch.from_numpy(of.pictures)
        seen = Window.from_boxes(of.boxes, (FRAME, FRAME)) if self.in_windows else None
        with window(seen):
            places: torch.Tensor = self.network(pictures)
        return places

    def step(self, of: Batch) -> None:
        off = self._places(of) - torch.from_numpy(of.answers)
        self.optimizer.zero_grad()
        off.norm(dim=1).mean().backward()
        self.optimizer.step()
        self.schedule.step()

    def answers(self, of: Batch) -> Array:
        self.network.eval()
        with torch.no_grad():
            found = np.asarray(self._places(of))
        self.network.train()
        return found
