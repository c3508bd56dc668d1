"""PyTorch on two processes: rows of an image, samples of a batch, and parameters that are split."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import sharding
from sharding import KINDS, Cases, Lacking, hold
from torch import distributed as dist
from torch import nn

from coordconv import Window, window
from coordconv.backends import load
from coordconv.parity.bounds import expected

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch is built without gloo", allow_module_level=True)

from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

case = Cases()
RANKS = 2


@pytest.fixture(scope="module")
def results():
    return sharding.run(__file__, RANKS)


@pytest.mark.parametrize("name", case)
def test_on_two_ranks(results, name):
    sharding.check(results, name)


def built(network: Any, weights: Any) -> Any:
    return load("torch").build(network, weights)


def half(array: Any, rank: int, axis: int) -> Any:
    """A rank's half of an array."""
    return torch.tensor(np.split(array, RANKS, axis)[rank])


def gathered(tensor: Any, axis: int | None = None) -> Any:
    """The halves of all ranks joined, or summed."""
    parts = [torch.empty_like(tensor) for _ in range(RANKS)]
    dist.all_gather(parts, tensor.detach().contiguous())
    return (sum(parts) if axis is None else torch.cat(parts, axis)).numpy()


class Halo(torch.autograd.Function):
    """The rows of a part with some of the other part's beside them."""

    @staticmethod
    def forward(ctx: Any, x: Any, rank: int, rows: tuple[int, int]) -> Any:
        """``rows``: how many the upper part has of the lower, and the lower of the upper."""
        ctx.rank, ctx.rows = rank, rows
        mine, theirs = rows[rank], rows[1 - rank]
        edge = x[:, :, :theirs] if rank else x[:, :, x.shape[2] - theirs :]
        halo = exchanged(edge, x[:, :, :mine], rank)
        return torch.cat([halo, x] if rank else [x, halo], 2)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        mine, theirs = ctx.rows[ctx.rank], ctx.rows[1 - ctx.rank]
        n = dy.shape[2] - mine
        halo, dx = (dy.split([mine, n], 2)) if ctx.rank else reversed(dy.split([n, mine], 2))
        dx = dx.clone()
        edge = dx[:, :, :theirs] if ctx.rank else dx[:, :, n - theirs :]
        edge += exchanged(halo, edge, ctx.rank)
        return dx, None, None


def exchanged(sent: Any, like: Any, rank: int) -> Any:
    """What the other rank sent."""
    received = torch.empty_like(like, memory_format=torch.contiguous_format)
    steps = [dist.P2POp(dist.isend, sent.contiguous(), 1 - rank)] * bool(sent.numel())
    steps += [dist.P2POp(dist.irecv, received, 1 - rank)] * bool(received.numel())
    for step in dist.batch_isend_irecv(steps):
        step.wait()
    return received


def of_half(layer: Any, x: Any, rank: int, seen: bool) -> Any:
    """A layer's output for half of the rows.

    The layer pads as ever, and what it makes of the halo's padding is cut off. So in front the halo
    has a multiple of the stride.
    """
    stride, n = layer.stride[0], x.shape[2]
    before, after = (stride, 0) if rank else (0, 2 - stride)
    wide = Halo.apply(x, rank, (2 - stride, stride))
    w = Window.of_shard(rank, RANKS, "y").widened(before, after, "y", n)
    y = layer(wide, **({"window": w} if seen else {}))
    return y[:, :, before // stride :][:, :, : n // stride]


@case
def rows(rank: int) -> dict[str, float]:
    largest: dict[str, float] = {}
    for kind, (network, make) in KINDS.items():
        for outside in ("extend", "zero"):
            network = sharding.with_outside(network, outside)
            weights, x, dy = sharding.data(network, make)
            want = sharding.wanted(network, weights, x, dy)
            module = built(network, weights)
            part = half(x, rank, 2).requires_grad_()
            for seen in (False, True):
                y = of_half(module.first, part, rank, seen).relu()
                y = of_half(module.second, y, rank, seen)
                if not seen:
                    error = want["y"].error(gathered(y, 2))
                    assert error > 100, f"without a window the halves are alike: {error}"
            y.backward(half(dy, rank, 2))
            found = {"y": gathered(y, 2), "x": gathered(part.grad, 2)}
            found |= {name: gathered(p.grad) for name, p in module.named_parameters()}
            largest |= hold(kind, want, found, outside)
    return largest


@case
def data_parallel(rank: int) -> dict[str, float]:
    largest: dict[str, float] = {}
    for kind, (network, make) in KINDS.items():
        weights, x, dy = sharding.data(network, make)
        want = sharding.wanted(network, weights, x, dy)
        module = built(network, weights)
        parallel = nn.parallel.DistributedDataParallel(module)
        y = parallel(half(x, rank, 0))
        y.backward(half(dy, rank, 0) * RANKS)  # gradients are averaged over the ranks
        found = {"y": gathered(y, 0)}
        found |= {name: p.grad.numpy() for name, p in module.named_parameters()}
        largest |= hold(kind, want, found)
    return largest


def dtensor() -> Any:
    try:
        from torch.distributed import tensor
    except ImportError:
        tensor = None
    if not hasattr(tensor, "DTensor"):
        raise Lacking(f"torch {torch.__version__} has no public DTensor, which came with 2.5")
    return tensor


@case
def samples_of_distributed_tensors(rank: int) -> dict[str, float]:
    tensor, mesh = dtensor(), init_device_mesh("cpu", (RANKS,))
    per_sample = Window({"y": [0.0, 0.5, 1.0, 0.25]}, {"y": [0.5, 1.0, 0.0, 0.75]})
    largest: dict[str, float] = {}
    for kind, (network, make) in KINDS.items():
        weights, x, dy = sharding.data(network, make)
        for w in (Window(), per_sample):
            with window(w):
                want = expected(network, weights, x, dy)
                module = tensor.distribute_module(built(network, weights), mesh)
                given, back = (
                    tensor.distribute_tensor(torch.tensor(a), mesh, [tensor.Shard(0)])
                    for a in (x, dy)
                )
                y = module(given.requires_grad_())
            y.backward(back)
            assert y.placements == (tensor.Shard(0),), y.placements
            found = {"y": y, "x": given.grad}
            found |= {name: p.grad for name, p in module.named_parameters()}
            whole = {name: each.full_tensor().detach().numpy() for name, each in found.items()}
            largest |= hold(kind, want, whole, "" if w is not per_sample else "windows")
    return largest


@case
def rows_of_distributed_tensors_are_refused(rank: int) -> None:
    """Torch itself convolves each part alone, and tells nobody."""
    tensor, mesh = dtensor(), init_device_mesh("cpu", (RANKS,))
    network, make = KINDS["exact"]
    weights, x, _ = sharding.data(network, make)
    module = tensor.distribute_module(built(network, weights), mesh)
    for axis in (2, 3):
        given = tensor.distribute_tensor(torch.tensor(x), mesh, [tensor.Shard(axis)])
        with pytest.raises(ValueError, match="split along a spatial axis"):
            module(given)
        y = load("torch").AddCoords("xy")(given)  # no sample of which needs another
        wanted = load("torch").AddCoords("xy")(torch.tensor(x))
        np.testing.assert_array_equal(y.full_tensor().numpy(), wanted.numpy())


def fully_sharded(module: Any) -> Any:
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise Lacking(f"torch {torch.__version__} has no public fully_shard, new in 2.6") from None
    for layer in module.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    return fully_shard(module)


def step(module: Any, x: Any, dy: Any) -> Any:
    """The output, after a step of plain gradient descent that is exact for integers."""
    rule = torch.optim.SGD(module.parameters(), lr=2.0**-4)
    y = module(x)
    y.backward(dy)
    rule.step()
    return y


@case
def fully_sharded_data_parallel(rank: int) -> dict[str, float]:
    largest: dict[str, float] = {}
    for kind, (network, make) in KINDS.items():
        weights, x, dy = sharding.data(network, make)
        want = sharding.wanted(network, weights, x, dy)
        module = fully_sharded(built(network, weights))
        assert all(p.to_local().numel() < p.numel() for p in module.parameters())
        y = step(module, half(x, rank, 0), half(dy, rank, 0) * RANKS)
        gradients = {n: p.grad.full_tensor().numpy() for n, p in module.named_parameters()}
        largest |= hold(kind, want, {"y": gathered(y, 0), **gradients})
        exported = module.export_weights()
        for name, gradient in gradients.items():
            moved = weights[name] - np.float32(2.0**-4) * gradient
            np.testing.assert_array_equal(exported[name], moved)
    return largest


@case
def weights_of_sharded_parameters(rank: int) -> None:
    """In and out, also where FSDP2 still has what it gathered for a call."""
    network, make = KINDS["real"]
    weights, x, _ = sharding.data(network, make)
    module, layer = (
        fully_sharded(made) for made in (built(network, weights), torch_layer(coords="xy"))
    )
    others = {name: array + 1 for name, array in weights.items()}
    with torch.no_grad():
        module(torch.tensor(x))
        layer(torch.tensor(x))
    assert not hasattr(layer.weight, "full_tensor"), "FSDP2 keeps nothing: test what it keeps"
    for sharded, given in ((module, others), (module.first, None), (layer, None)):
        given = given or {n: a + 1 for n, a in sharded.export_weights().items()}
        sharded.import_weights(given)
        module.reshard()
        layer.reshard()
        for name, array in sharded.export_weights().items():
            np.testing.assert_array_equal(array, given[name])
    with pytest.raises(ValueError, match="got DTensors"):
        layer.eval().fuse()
    with pytest.raises(ValueError, match="weight"):
        layer.import_weights({"weight": given["weight"][:1], "bias": given["bias"]})


@case
def states_of_sharded_parameters(rank: int) -> None:
    """Also those that a layer puts in its own order, and a plain convolution's."""
    for other in (torch_layer(coords="yx"), nn.Conv2d(sharding.CHANNELS, 4, 3)):
        layer = torch_layer(coords="xy")
        layer.load_state_dict(other.state_dict())
        wanted = layer.export_weights()
        for sharded in (False, True):
            layer = fully_sharded(torch_layer(coords="xy"))
            if sharded:
                fully_sharded(other)
                layer.load_state_dict(other.state_dict())
            else:
                options = StateDictOptions(full_state_dict=True)
                set_model_state_dict(layer, other.state_dict(), options=options)
            for name, array in layer.export_weights().items():
                np.testing.assert_array_equal(array, wanted[name])
    with torch.device("meta"):
        layer = torch_layer(coord_init="zeros")
    fully_sharded(layer).to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    for name, array in torch_layer(coord_init="zeros").export_weights().items():
        np.testing.assert_array_equal(layer.export_weights()[name], array)


def torch_layer(**given: Any) -> Any:
    return load("torch").CoordConv2d(sharding.CHANNELS, 4, 3, **given)


@case
def distributed_checkpoint(rank: int) -> None:
    """Written by both ranks, and read by one."""
    from torch.distributed import checkpoint

    network, make = KINDS["real"]
    weights, x, dy = sharding.data(network, make)
    module = fully_sharded(built(network, weights))
    step(module, half(x, rank, 0), half(dy, rank, 0))
    folder = Path(os.environ["SHARDING_FOLDER"], "checkpoint")
    checkpoint.save(module.state_dict(), checkpoint_id=folder)
    exported = module.export_weights()
    if rank == 0:
        plain = built(network, weights)
        state = plain.state_dict()
        checkpoint.load(state, checkpoint_id=folder, no_dist=True)
        plain.load_state_dict(state)
        found = plain.export_weights()
        for name, array in exported.items():
            assert not np.array_equal(array, weights[name]), "nothing was trained"
            np.testing.assert_array_equal(found[name], array)
    dist.barrier()


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)  # what both ranks draw is the same
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    sharding.main(case, rank)
    dist.destroy_process_group()
