"""Paddle's own networks, with random weights: given coordinates, trained, saved, and back.

With ``-s`` a table is printed at the end.
"""

import copy

import pytest

paddle = pytest.importorskip("paddle")

from changing_cases import equal
from harness import normal
from paddle.static import InputSpec
from paddle.vision import models

from coordconv.backends.paddle import adapt_state_dict, add_coords, fuse, remove_coords
from coordconv.layers import CoordLayer

STEPS = 10
SIZE = 64

# How it is built; the first convolution, and a block in it.
NETWORKS = {
    "resnet18": (models.resnet18, "conv1", "layer2"),
    "mobilenet_v3_small": (models.mobilenet_v3_small, "conv.0", "blocks.1"),
}


@pytest.fixture(scope="module")
def table():
    rows = [("network", "scope", "layers", "difference", "checkpoint", "steps", "fuse", "saved")]
    yield rows
    print()
    for row in rows:
        print(f"| {' | '.join(row)} |")


def train(model, x):
    """The losses of a few steps, with the same dropout in each."""
    model.train()
    optimizer = paddle.optimizer.Adam(1e-3, parameters=model.parameters())
    losses = []
    for _ in range(STEPS):
        paddle.seed(3)
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scope", ["all", "first", "block"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, scope, table, tmp_path):
    build, first, block = NETWORKS[name]
    paddle.seed(0)
    model = build(num_classes=3)
    model.eval()
    x = paddle.to_tensor(normal(2, 3, SIZE, SIZE, seed=1))
    with paddle.no_grad():
        wanted = model(x)
    before = copy.deepcopy(model.state_dict())
    training = copy.deepcopy(model)
    changes = add_coords(model, layers={"all": None, "first": first, "block": block}[scope])
    assert len(changes.layers) == 1 or scope != "first"
    with paddle.no_grad():
        assert equal(model(x), wanted)
        model.train()
        training.train()
        found = []
        for each in (model, training):
            paddle.seed(4)  # the same dropout
            found.append(each(x))
        assert equal(*found)
    missing, unexpected = model.set_state_dict(adapt_state_dict(model, before))
    assert not missing + unexpected
    model.eval()
    with paddle.no_grad():
        assert equal(model(x), wanted)

    restored = copy.deepcopy(model)
    remove_coords(restored)
    with paddle.no_grad():
        assert equal(restored(x), wanted)
    assert [*restored.state_dict()] == [*before]
    assert all(equal(restored.state_dict()[key], before[key]) for key in before)

    layers = [layer for layer in model.sublayers() if isinstance(layer, CoordLayer)]
    assert len(layers) == len(changes.layers)
    sizes = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args: sizes.update({layer: args[0].shape[2] * args[0].shape[3]})
        )
        for layer in layers
    ]
    losses = train(model, x)
    for handle in handles:
        handle.remove()
    assert min(losses[-3:]) < losses[0]
    # On an axis of one sample the coordinate is 0, as after squeezing.
    moved = {layer for layer in layers if layer.layout.split(layer.weight)[1].any()}
    assert moved <= {layer for layer in layers if sizes[layer] > 1}
    assert len(moved) >= sum(size > 1 for size in sizes.values()) / 2
    assert moved

    model.eval()
    with paddle.no_grad():
        trained = model(x)
        apart = {"fuse": fuse(model, size=(x,))(x)}
        spec = [InputSpec([None, 3, SIZE, SIZE], "float32", "x")]
        paddle.jit.save(model, str(tmp_path / "model"), input_spec=spec)
        apart["saved"] = paddle.jit.load(str(tmp_path / "model"))(x)
    scale = max(1.0, trained.abs().max().item())
    differences = [(each - trained).abs().max().item() / scale for each in apart.values()]
    assert max(differences) <= 1e-4
    shown = [f"{each:.1e}" for each in differences]
    steps = f"{losses[0]:.3g} -> {losses[-1]:.3g}"
    row = (f"paddle {name}", scope, f"{len(layers)}", "0", "adapted", steps, *shown)
    table.append(row)
