"""Networks of torch that are given coordinates, and lose them: all that a convolution had stays.

What Paddle does alike is in ``test_changing_shared.py``.
"""

import gc
from functools import partial

import pytest

torch = pytest.importorskip("torch")

import changing_cases
from changing_cases import Torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from coordconv import Coordinates, Window
from coordconv.backends.torch import (
    CoordConv2d,
    add_coords,
    remove_coords,
)


class SamePadding(nn.Conv2d):
    """Pads one end more than the other, as TensorFlow does."""

    def forward(self, x):
        return nn.functional.conv2d(
            nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride
        )


FACE = Torch()
network, images, refused = FACE.network, FACE.images, partial(changing_cases.refused, FACE)


def test_map_only_is_a_choice():
    """Without it, a pointwise layer is a product, whose sums have another order."""
    conv = nn.Conv2d(32, 64, 1)
    x = images(8, 32, 16, 16)
    layer = CoordConv2d.from_conv(conv)
    layer.map_only = False
    bound = 34 * 2**-24 * (conv.weight.abs().sum((1, 2, 3)).max() * x.abs().max() + 1)
    assert (layer(x) - conv(x)).abs().max() <= bound


def test_hooks_stay():
    model, calls = network(), []
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    model[0].weight.register_hook(lambda gradient: calls.append(tuple(gradient.shape)))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.grad.shape)))
    alive = model(images())  # keeps what torch accumulates gradients with
    calls.clear()
    add_coords(model)
    model(images()).sum().backward()
    shape = (8, 5, 3, 3)
    assert calls[:2] == ["before", "after"]
    assert calls.count("backward") == 1
    assert calls.count(shape) == 2
    del alive


def test_flags_types_and_devices_stay():
    model = network().double()
    model[0].weight.requires_grad_(False)
    model[3].eval()
    model[4].to(torch.bfloat16)
    model[0].note = "mine"
    add_coords(model)
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert model[0].training
    assert not model[3].training
    assert model[0].weight.dtype == torch.float64
    assert model[4].weight.dtype == torch.bfloat16
    assert model[0].note == "mine"

    with torch.device("meta"):
        meta = network()
    add_coords(meta)
    assert meta[0].weight.is_meta
    assert meta(torch.empty(2, 3, 8, 8, device="meta")).is_meta


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_memory_format_stays(kind):
    conv = kind(8, 4, 3, groups=2).to(memory_format=torch.channels_last)
    add_coords(conv)
    last = {"memory_format": torch.channels_last}
    assert conv.weight.is_contiguous(**last)
    assert not conv.weight.is_contiguous()
    remove_coords(conv)
    assert conv.weight.is_contiguous(**last)
    assert not conv.weight.is_contiguous()
    assert conv.weight.untyped_storage().nbytes() == conv.weight.numel() * 4


def weight_norm(conv):
    parametrizations.weight_norm(conv)


def old_weight_norm(conv):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(conv)


def pruned(conv):
    prune.l1_unstructured(conv, "weight", 0.5)


def parametrized_bias(conv):
    nn.utils.parametrize.register_parametrization(conv, "bias", nn.Softplus())


@pytest.mark.parametrize(
    "change",
    [
        weight_norm,
        old_weight_norm,
        parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        pruned,
        parametrized_bias,
    ],
)
def test_computed_kernels_are_refused_by_name(change):
    model = network()
    change(model[0])
    refused(model, "0: its parameters are computed from others.*prune.remove")
    refused(model, "0: its parameters are computed", layers="0")
    add_coords(model, exclude="0")
    assert isinstance(model[4], CoordConv2d)


def test_what_pruning_of_the_bias_or_a_removed_one_leaves_is_carried():
    model, x = network(), images()
    prune.l1_unstructured(model[0], "bias", 0.5)
    prune.l1_unstructured(model[4], "weight", 0.5)
    prune.remove(model[4], "weight")
    wanted = model(x)
    add_coords(model)
    assert torch.equal(model(x), wanted)
    assert not (model[0].bias_mask.all())
    assert not (model[0].bias[model[0].bias_mask == 0].any())


@pytest.mark.filterwarnings("ignore")  # torch.jit's deprecation
def test_wrappers_are_refused():
    x = images()
    for wrapper in (
        nn.DataParallel(network()),
        torch.optim.swa_utils.AveragedModel(network()),
        torch.compile(network(), backend="eager"),
        torch.jit.trace(network(), x),
        nn.Sequential(nn.DataParallel(network())),
    ):
        refused(wrapper, "as it is before .* wraps it")


def test_what_is_inside_of_ddp_is_refused(tmp_path):
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this torch is built without torch.distributed")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = network()
        wrapped = nn.parallel.DistributedDataParallel(model)
        refused(model, "inside of a DistributedDataParallel")
        refused(model[0], "inside of a DistributedDataParallel")
        refused(wrapped, "before DistributedDataParallel wraps it")
        del wrapped
        gc.collect()
        add_coords(model)
        wrapped, x = nn.parallel.DistributedDataParallel(model), images()
        wrapped(x).square().sum().backward()
        assert model[0].weight.grad[:, 3:].abs().max() > 0
        del wrapped
    finally:
        distributed.destroy_process_group()


def test_quantized_and_lazy_modules_are_refused():
    quantized = pytest.importorskip("torch.ao.nn.quantized")
    refused(nn.Sequential(nn.Conv2d(3, 3, 1), quantized.Conv2d(3, 8, 3)), "1 is a quantized Conv2d")
    with pytest.raises(ValueError, match="0: it has no weight yet: run the network once"):
        add_coords(nn.Sequential(nn.LazyConv2d(8, 3)))


def test_a_forward_of_an_instance_is_refused():
    model = network()
    model[0].forward = lambda x: x
    refused(model, "0: its forward was replaced on the instance")


def test_a_compiled_network_that_is_changed_inside_is_compiled_anew():
    model, x = network(), images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    add_coords(model)
    with torch.no_grad():
        model[0].weight[:, 3:] = 1
        assert torch.allclose(model.eval()(x), compiled(x), atol=1e-5)


def test_a_traced_graph_is_changed():
    graph, x = torch.fx.symbolic_trace(network()), images()
    wanted = graph(x)
    assert len(add_coords(graph).layers) == 4
    assert torch.equal(graph(x), wanted)


@pytest.mark.skipif(not hasattr(torch.optim, "Adafactor"), reason="torch 2.4 has no Adafactor")
def test_an_optimizer_that_cannot_be_updated():
    model = network()
    factored = torch.optim.Adafactor(model.parameters())
    model(images()).sum().backward()
    factored.step()
    flat = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        flat.zero_grad()
        loss = model(images()).square().mean()
        loss.backward()
        return loss

    flat.step(closure)
    changes = add_coords(model)
    with pytest.raises(ValueError, match="keeps 'row_var' of shape .* make a new Adafactor"):
        changes.update_optimizer(factored)
    with pytest.raises(ValueError, match=r"of shape \(\d+,\) .* make a new LBFGS"):
        changes.update_optimizer(flat)
    with pytest.raises(ValueError, match="none of the kernels"):
        changes.update_optimizer(torch.optim.SGD([torch.zeros(1)], 0.1))
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer, got dict"):
        changes.update_optimizer({})
    changes.update_optimizer(torch.optim.Adam(model.parameters()))  # which has not stepped


def test_the_share_of_the_variance_in_a_window():
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = CoordConv2d(3, 8, 3)

        def forward(self, x, window=None):
            return self.conv(x, window=window)

    shares = [
        remove_coords(Seen(), given).layers[0].variance_share
        for given in (images(), (images(), Window(0.25, 0.75)))
    ]
    assert 0 < shares[1] < shares[0]  # a part of the frame has less of the coordinates


class OfLargest(nn.Conv2d):
    """Divides by the largest number of its input, which may be a coordinate."""

    def forward(self, x):
        return super().forward(x) / x.abs().amax()


class OfShareAboveZero(nn.Conv2d):
    """Weighs its output by how much of the input is there, as partial convolutions do."""

    def forward(self, x):
        return super().forward(x) * (x != 0).to(x.dtype).mean()


@pytest.mark.parametrize("kind", [OfLargest, OfShareAboveZero])
def test_a_subclass_that_looks_at_its_whole_input_is_left(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} computes something else"):
        add_coords(kind(3, 4, 3), subclasses=True)


def test_a_subclass_gets_no_coordinates_that_go_on_beyond_the_border():
    class Mine(nn.Conv2d):
        pass

    coords = Coordinates("xy", outside="extend")
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Mine(4, 4, 3, padding=1))
    changes = add_coords(model, coords, subclasses=True)
    assert changes.skipped["1"].startswith("Mine pads the coordinates as it pads")
    with pytest.raises(ValueError, match='want outside="zero"'):
        add_coords(nn.Sequential(model[1]), coords, layers="0", subclasses=True)


def test_undo_of_what_was_pruned_since_is_refused():
    model = network()
    changes = add_coords(model)
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="0 cannot lose its coordinates: .* pruning"):
        changes.undo()
    assert isinstance(model[4], CoordConv2d)


def test_from_conv():
    conv, x = nn.Conv2d(3, 8, 3, stride=2), images()
    conv.weight.requires_grad_(False)
    layer = CoordConv2d.from_conv(conv, "xyr")
    assert torch.equal(layer(x), conv(x))
    assert type(conv) is nn.Conv2d
    assert layer.coords == Coordinates("xyr")
    assert not layer.weight.requires_grad
    assert layer.weight.data_ptr() != conv.weight.data_ptr()
    assert CoordConv2d.from_conv(conv).coords == Coordinates("xy")
    for wrong in (nn.Conv1d(3, 8, 3), nn.Linear(3, 8), SamePadding(3, 8, 3), "conv"):
        with pytest.raises(TypeError, match="conv must be a torch.nn.Conv2d, got a"):
            CoordConv2d.from_conv(wrong)
    with pytest.raises(ValueError, match="'z'"):
        CoordConv2d.from_conv(conv, "xz")
    with pytest.raises(ValueError, match="init must be"):
        CoordConv2d.from_conv(conv, init="random")
    prune.l1_unstructured(conv, "weight", 0.5)
    with pytest.raises(ValueError, match="conv cannot be given coordinates: .* pruning"):
        CoordConv2d.from_conv(conv)
