"""Paddle on two processes: samples of a batch, in DataParallel."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

if __name__ == "__main__":  # Paddle reads these as it is imported
    rank, ports = os.environ["RANK"], os.environ["SHARDING_PORTS"].split(",")
    ends = [f"127.0.0.1:{port}" for port in ports]
    os.environ |= {
        "PADDLE_TRAINER_ID": rank,
        "PADDLE_TRAINERS_NUM": str(len(ends)),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(ends),
        "PADDLE_CURRENT_ENDPOINT": ends[int(rank)],
        "PADDLE_DISTRI_BACKEND": "gloo",
    }

paddle = pytest.importorskip("paddle")
import sharding
from paddle import distributed as dist
from sharding import KINDS, Cases, hold

from coordconv import Window, window
from coordconv.backends import load
from coordconv.parity.bounds import expected

case = Cases()
RANKS = 2


@pytest.fixture(scope="module")
def results():
    return sharding.run(__file__, RANKS)


@pytest.mark.parametrize("name", case)
def test_on_two_ranks(results, name):
    sharding.check(results, name)


@case
def data_parallel(rank: int) -> dict[str, float]:
    starts, stops = np.array([0.0, 0.5, 1.0, 0.25]), np.array([0.5, 1.0, 0.0, 0.75])
    largest: dict[str, float] = {}
    for kind, (network, make) in KINDS.items():
        weights, x, dy = sharding.data(network, make)
        for label in ("", "windows"):

            def windowed(samples: slice, label: str = label) -> Any:
                both = {"y": starts[samples]}, {"y": stops[samples]}
                return window(Window(*both) if label else Window())

            with windowed(slice(None)):
                want = expected(network, weights, x, dy)
            half = slice(rank * len(x) // RANKS, (rank + 1) * len(x) // RANKS)
            module = load("paddle").build(network, weights)
            parallel = paddle.DataParallel(module)
            given = paddle.to_tensor(x[half], stop_gradient=False)
            with windowed(half):
                y = parallel(given)
            y.backward(paddle.to_tensor(dy[half] * RANKS))  # gradients are averaged over the ranks
            parts: list[Any] = []
            dist.all_gather(parts, y.detach())
            found = {"y": np.concatenate([part.numpy() for part in parts])}
            found |= {name: p.grad.numpy() for name, p in module.named_parameters()}
            largest |= hold(kind, want, found, label)
    return largest


if __name__ == "__main__":
    dist.init_parallel_env()
    assert dist.get_world_size() == RANKS
    sharding.main(case, dist.get_rank())
