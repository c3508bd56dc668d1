"""Networks of torch that are given coordinates, and lose them: all that a convolution had stays."""

import copy
import gc
import json
import pickle
import random
import re

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn.utils import parametrizations, prune

from coordconv import Coordinates
from coordconv.backends import torch as backend
from coordconv.backends.torch import (
    CoordConv1d,
    CoordConv2d,
    CoordConvTranspose2d,
    add_coords,
    fuse,
    remove_coords,
)

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "fused adam": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


class SamePadding(nn.Conv2d):
    """Pads one end more than the other, as TensorFlow does."""

    def forward(self, x):
        return nn.functional.conv2d(
            nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride
        )


class Standardized(nn.Conv2d):
    """Starts with a scale of zero, so that its first outputs tell nothing of its kernel."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        mean, spread = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, (self.weight - mean) / spread * self.scale, self.bias)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=2, bias=False),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(16, 6, 2, stride=2, groups=2),
    )


def images(*shape):
    return torch.randn(*(shape or (4, 3, 18, 22)), generator=torch.Generator().manual_seed(1))


def snapshot(model):
    """All that a refused call must leave as it is."""
    parameters = [(name, id(p), p.detach().clone()) for name, p in model.named_parameters()]
    return parameters, [(name, type(module)) for name, module in model.named_modules()]


def same(one, other):
    return one[1] == other[1] and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(one[0], other[0], strict=True)
    )


def refused(model, message, error=ValueError, **options):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        add_coords(model, **options)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("training", [False, True])
def test_outputs_are_what_they_were_to_the_bit(training):
    model = network().train(training)
    x, before = images(), copy.deepcopy(model)
    changes = add_coords(model)
    assert torch.equal(model(x), before(x))
    assert len(changes.layers) == 4
    assert [type(model[i]) for i in (0, 3, 4, 5)] == [CoordConv2d] * 3 + [CoordConvTranspose2d]
    for name, tensor in before.state_dict().items():  # the statistics of training, too
        if "weight" not in name:
            assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("seed", range(60))
def test_outputs_of_one_layer_are_what_they_were_to_the_bit(seed):
    draw = random.Random(seed)
    rank = draw.choice([1, 2, 2, 2, 3])
    transposed = draw.random() < 0.3
    groups = draw.choice([1, 1, 1, 4])
    options = {
        "stride": draw.choice([1, 2]),
        "dilation": draw.choice([1, 1, 2]),
        "groups": groups,
        "padding": draw.choice([0, 1]),
        "bias": draw.random() < 0.7,
    }
    if not transposed:
        options["padding_mode"] = draw.choice(["zeros", "zeros", "reflect", "circular"])
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
    widths = [4 * draw.choice([1, 8, 16]) if groups > 1 else draw.choice([3, 16, 64, 512])]
    widths.append(4 * draw.choice([1, 8, 16]))
    conv = kind(*widths, draw.choice([1, 3]), **options)
    x = images(draw.choice([1, 2, 8]), widths[0], *[draw.choice([5, 7, 14]) for _ in range(rank)])
    if rank == 2 and draw.random() < 0.3:
        x = x.contiguous(memory_format=torch.channels_last)
        conv = conv.to(memory_format=torch.channels_last)
    wanted = conv(x)
    with torch.inference_mode():
        without_gradient = conv(x)
    add_coords(conv, draw.choice([None, "x", "xr"]))
    assert torch.equal(conv(x), wanted)
    with torch.inference_mode():
        assert torch.equal(conv(x), without_gradient)


def test_map_only_is_a_choice():
    """Without it, a pointwise layer is a product, whose sums have another order."""
    conv = nn.Conv2d(32, 64, 1)
    x = images(8, 32, 16, 16)
    layer = CoordConv2d.from_conv(conv)
    layer.map_only = False
    bound = 34 * 2**-24 * (conv.weight.abs().sum((1, 2, 3)).max() * x.abs().max() + 1)
    assert (layer(x) - conv(x)).abs().max() <= bound


def test_a_module_in_two_places_stays_one():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"one": conv, "two": nn.Sequential(conv, nn.ReLU())})
    changes = add_coords(model)
    assert [change.name for change in changes.layers] == ["one"]
    assert model["one"] is model["two"][0] is conv
    assert conv.weight.shape[1] == 6


def test_tied_kernels_stay_one_or_are_refused_by_name():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2))
    model[1].weight = model[0].weight
    kernel = model[0].weight
    refused(model, "0.weight and 1.weight are one parameter", layers="0")
    refused(model, "0.weight and 1.weight", exclude="1")
    add_coords(model, layers=["0", "1"])
    assert model[0].weight is model[1].weight is kernel
    assert kernel.shape == (4, 6, 3, 3)
    with pytest.raises(ValueError, match="0.weight and 1.weight are one parameter"):
        remove_coords(model, layers="0")
    remove_coords(model)
    assert model[0].weight is model[1].weight is kernel
    assert kernel.shape == (4, 4, 3, 3)


def test_a_kernel_tied_to_what_is_no_convolution_is_refused():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Identity())
    model[1].register_parameter("table", model[0].weight)
    refused(model, "0.weight and 1.table are one parameter", coords="x")


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


def test_no_random_number_is_drawn_and_gradients_stay():
    model = network()
    model(images()).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    add_coords(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].weight.grad[:, :3], before["0.weight"])
    assert not model[0].weight.grad[:, 3:].any()
    remove_coords(model)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_before(name):
    model, x = network(), images()
    twin = copy.deepcopy(model)
    optimizers = [OPTIMIZERS[name](each.parameters()) for each in (model, twin)]

    def step(model, optimizer):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for each, optimizer in zip((model, twin), optimizers, strict=True):
        step(each, optimizer)
    changes, (optimizer, other) = add_coords(model), optimizers
    for parameters in (model.parameters(), [model[0].weight, model[1].weight]):
        with pytest.raises(RuntimeError, match="call update_optimizer"):
            optimizer.step()
        assert {*map(id, parameters)} <= {
            id(p) for g in optimizer.param_groups for p in g["params"]
        }
    changes.update_optimizer(optimizer)
    step(model, optimizer)
    step(twin, other)
    # One step further the features' part is where it would be, and the coordinates have moved.
    for one, two in ((model[i], twin[i]) for i in (0, 3, 4, 5)):
        features, coordinates = one.layout.split(one.weight)
        assert torch.equal(features, two.weight)
        assert coordinates.abs().max() > 0
    changes.undo()
    with pytest.raises(RuntimeError, match="call update_optimizer"):
        optimizer.step()
    changes.update_optimizer(optimizer)
    step(model, optimizer)
    for state in optimizer.state[model[0].weight].values():
        assert not state.dim() or state.shape == model[0].weight.shape


@pytest.mark.skipif(not hasattr(torch.optim, "Adafactor"), reason="torch 2.4 has no Adafactor")
def test_an_optimizer_that_cannot_be_updated():
    model = network()
    factored = torch.optim.Adafactor(model.parameters())
    model(images()).sum().backward()
    factored.step()
    changes = add_coords(model)
    with pytest.raises(ValueError, match="keeps 'row_var' of shape .* make a new Adafactor"):
        changes.update_optimizer(factored)
    with pytest.raises(ValueError, match="none of the kernels"):
        changes.update_optimizer(torch.optim.SGD([torch.zeros(1)], 0.1))
    changes.update_optimizer(torch.optim.Adam(model.parameters()))  # which has not stepped


def test_states_of_before_and_after():
    model, x = network(), images()
    before, wanted = copy.deepcopy(model.state_dict()), model.eval()(x)
    add_coords(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.load_state_dict(before, strict=True)
    assert torch.equal(model(x), wanted)
    other = network().eval()
    add_coords(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), wanted)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), wanted)
    remove_coords(model)
    model.load_state_dict(before, strict=True)
    assert torch.equal(model(x), wanted)


def test_training_goes_on():
    model, x = network(), images()
    add_coords(model, "xyr")
    target = torch.linspace(-1, 1, 22).expand(4, 6, 18, 22)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(model[i].layout.split(model[i].weight)[1].abs().max() > 0 for i in (0, 3, 4, 5))
    model.eval()
    assert torch.allclose(fuse(model, size=(18, 22))(x), model(x), atol=1e-5)


def test_fan_in_draws_the_coordinates_alone():
    model = network()
    before = model[0].weight.detach().clone()
    torch.manual_seed(3)
    add_coords(model, "xyr", layers="0", init="fan_in")
    torch.manual_seed(3)
    drawn = nn.Conv2d(6, 8, 3).weight
    assert torch.equal(model[0].weight[:, :3], before)
    assert torch.equal(model[0].weight[:, 3:], drawn[:, 3:])
    assert not model[0].map_only


def test_layers_are_chosen():
    model = network()
    assert [c.name for c in add_coords(model, layers=re.compile("[03]")).layers] == ["0", "3"]
    changes = add_coords(model, "yx", layers=["0", "4"])
    assert [change.name for change in changes.layers] == ["4"]
    assert changes.skipped == {"0": f"has coordinates already, {Coordinates('xy')}"}
    assert model[0].coords == Coordinates("xy")
    assert model[4].coords == Coordinates("yx")
    json.loads(changes.to_json())
    everything = nn.ModuleDict({"a": nn.Conv1d(2, 2, 3), "b": nn.Conv2d(2, 2, 3)})
    assert "'y'" in add_coords(everything, "xy").skipped["a"]
    refused(everything, "a: .*'y'", layers="a")
    assert isinstance(everything["a"], nn.Conv1d)
    assert not isinstance(everything["a"], CoordConv1d)


def test_bad_arguments():
    model = network()
    refused(model, "coords 'q'", coords="q")
    refused(model, "init must be one of", init="ones")
    refused(model, "no layer 'conv7'; there are", layers="conv7")
    refused(nn.Sequential(), "no layer that could be changed")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got OrderedDict"):
        add_coords(model.state_dict())
    with pytest.raises(ValueError, match="no layer that could be changed"):
        remove_coords(model)


def test_a_network_that_is_one_convolution():
    conv, x = nn.Conv2d(3, 4, 3), images()
    wanted = conv(x)
    changes = add_coords(conv)
    assert type(conv) is CoordConv2d
    assert torch.equal(conv(x), wanted)
    changes.undo()
    assert type(conv) is nn.Conv2d
    assert torch.equal(conv(x), wanted)
    assert not {"coords", "coord_init", "map_only"} & {*vars(conv)}


def test_subclasses():
    torch.manual_seed(0)
    model = nn.Sequential(SamePadding(3, 8, 3, stride=2), Standardized(8, 8, 3))
    x, calls = images(), []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    refused(model, "nothing to change\n  0: SamePadding is a subclass of Conv2d.*subclasses=True")
    refused(model, "1: Standardized computes something else", layers="1", subclasses=True)
    wanted = model[0](x)
    calls.clear()
    changes = add_coords(model, subclasses=True)
    assert not calls
    assert "something else" in changes.skipped["1"]
    handle.remove()  # no pickle takes it
    layer = model[0]
    assert isinstance(layer, SamePadding)
    assert layer.in_channels == 3
    bound = 46 * 2**-24 * float(layer.weight.abs().sum((1, 2, 3)).max() * x.abs().max() + 1)
    assert (layer(x) - wanted).abs().max() <= bound  # the same terms, in any order
    with torch.no_grad():
        layer.weight.normal_()
        plain = SamePadding(5, 8, 3, stride=2)
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    assert torch.equal(layer(x), plain(backend.AddCoords("xy")(x)))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(nn.Sequential(layer)))[0]):
        assert torch.equal(copied(x), layer(x))
        assert type(copied) is type(layer)
    with pytest.raises(ValueError, match="input must have 3 channels"):
        layer(images(1, 5, 8, 8))
    assert remove_coords(model).layers[0].after == "SamePadding"
    assert type(model[0]) is SamePadding
    assert model[0].weight.shape == (8, 3, 3, 3)


def test_the_share_of_the_variance():
    model, x = network().eval(), images()
    add_coords(model, layers=["0", "5"])
    model.append(CoordConv2d(6, 2, 3))
    used = nn.Sequential(model[0], nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        model[0].weight[:, 3:].normal_(std=0.3)
    features = nn.functional.conv2d(x, model[0].weight[:, :3], model[0].bias, padding=1)
    position = model[0](x) - features
    variance = position.var((0, 2, 3), correction=0).sum()
    wanted = variance / (variance + features.var((0, 2, 3), correction=0).sum())
    changes = remove_coords(used, x)
    assert changes.layers[0].variance_share == pytest.approx(float(wanted), rel=1e-4)
    assert changes.layers[0].parameters == -144
    assert torch.equal(used[0](x), features)

    reached = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    add_coords(reached)
    found = remove_coords(reached[:1], x).layers[0]
    assert found.variance_share == 0.0
    assert remove_coords(reached).layers[0].variance_share is None


def test_a_layer_of_a_class_of_its_own_is_not_removed():
    class Mine(CoordConv2d):
        pass

    with pytest.raises(ValueError, match="0: it is a Mine, a class of its own"):
        remove_coords(nn.Sequential(Mine(3, 4, 1)))


def test_undo_keeps_what_training_made_of_the_features():
    model, x = network(), images()
    changes = add_coords(model)
    with torch.no_grad():
        model[0].weight.normal_()
    features = model[0].weight[:, :3].clone()
    changes.undo()
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(model[0].weight, features)
    assert model(x).shape == (4, 6, 18, 22)
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
