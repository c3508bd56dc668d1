"""What people do to a convolution stays right on ours; ``tools.py`` has the tools, and a table."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tools
from harness import WAYS
from tools import LAYERS, TOOLS

from coordconv import backends, position_bias
from coordconv.backends import BACKENDS

# What a library is asked for, if it is there.
LIBRARIES = {
    "peft LoRA, at its start": "peft",
    "peft LoRA, merged": "peft",
    "torch_pruning of outputs": "torch_pruning",
}
# Those that build a plain convolution from the attributes of ours, or of ours a further one: they
# fail aloud at once, or when the result is used.
REFUSED = {
    "batch norm folded as in YOLO": "is invalid for input of size",
    "peft LoRA, merged": "channels, but got",
    "to_mkldnn": "TorchScript",
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(position_bias, "FORCED", request.param)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("backend", "tool"), [(backend, tool) for backend in TOOLS for tool in TOOLS[backend]]
)
def test_is_no_worse_than_on_a_convolution_over_all_channels(backend, tool):
    if BACKENDS[backend].missing:
        pytest.skip(f"{backend} is not installed")
    if tool in LIBRARIES:
        pytest.importorskip(LIBRARIES[tool])
    if backend == "flax" and tool in ("SpectralNorm", "WeightNorm"):
        from flax import nnx

        if not hasattr(nnx, tool):
            pytest.skip(f"this release of flax.nnx has no {tool}")
    row = tools.row(backend, tool)
    assert row.plain <= tools.FLOOR
    assert (row.ours is None) == (tool in REFUSED)
    if tool in REFUSED:
        assert REFUSED[tool] in row.refused
    assert row.ok


@pytest.mark.parametrize("backend", LAYERS)
def test_the_two_are_the_same_layer(backend):
    """And a part that is missing shows: the coordinates matter."""
    if BACKENDS[backend].missing:
        pytest.skip(f"{backend} is not installed")
    ours, plain = (LAYERS[backend].make(kind)() for kind in (True, False))
    assert np.abs(ours - plain).max() <= tools.FLOOR
    layer = LAYERS[backend].make(True)
    weight, bias = layer.get()
    assert np.array_equal(weight, tools.WEIGHT)
    without = weight.copy()
    without[:, tools.C :] = 0
    layer.set(without, bias)
    assert np.abs(layer() - plain).max() > 1000 * tools.FLOOR


def test_a_tool_that_loses_the_coordinates_is_found(monkeypatch):
    """The table says so, as it would have of the first edition."""
    pytest.importorskip("torch")

    def loses(layer):
        wanted = layer()
        weight, bias = layer.get()
        if layer.ours:
            weight[:, tools.C :] = 0
        layer.set(weight, bias)
        return layer(), wanted

    monkeypatch.setitem(TOOLS["torch"], "loses", loses)
    row = tools.row("torch", "loses")
    assert row.plain == 0
    assert not row.ok


@pytest.mark.usefixtures("way")
def test_a_transposed_layer_takes_a_batch_norm():
    """Whose kernel has the outputs on another axis."""
    torch = pytest.importorskip("torch")
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    kind = backends.load("torch").CoordConvTranspose2d
    torch.manual_seed(0)
    block = torch.nn.Sequential(kind(3, 4, 3, stride=2), torch.nn.BatchNorm2d(4))
    x = torch.tensor(tools.X)
    for _ in range(5):
        block(x)
    block.eval()
    wanted = block(x)
    assert (fuse_conv_bn_eval(*block, transpose=True)(x) - wanted).abs().max() <= tools.FLOOR


@pytest.mark.usefixtures("way")
def test_a_library_that_takes_channels_out_of_the_input_fails_aloud():
    """It goes by ``in_channels``, so that it takes the coordinates away, too."""
    torch = pytest.importorskip("torch")
    pruning = pytest.importorskip("torch_pruning")
    layer = tools.TorchLayer.make(True)
    for kind in (copy.deepcopy(layer.module), layer.module.double()):
        pruning.prune_conv_in_channels(kind, [1])
        x = torch.zeros(2, tools.C - 1, 7, 6, dtype=kind.weight.dtype)
        with pytest.raises((RuntimeError, ValueError)):
            kind(x)


def test_the_table(capsys, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("sys.argv", ["tools.py", "torch"])
    monkeypatch.setitem(TOOLS, "torch", {"zeros for a head": tools.zero_head})
    assert tools.main() == 0
    assert "zeros for a head" in capsys.readouterr().out
