"""Layers and networks fused for inference: the same outputs, and what cannot be fused."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn.utils import parametrizations, prune

from coordconv import Coordinates, position_bias
from coordconv.backends import torch as backend
from coordconv.backends.torch import (
    AddCoords,
    CoordConv1d,
    CoordConv2d,
    CoordConv3d,
    CoordConvTranspose1d,
    CoordConvTranspose2d,
    CoordConvTranspose3d,
    LazyCoordConv2d,
    fuse,
)

# Axis lengths of which every coordinate is a multiple of a power of two: all sums are exact.
SIZES = ((9, 5, 3), (5, 9, 17), (3, 9, 5), (17, 3, 9), (5, 5, 5))


def exact(layer):
    """Small integers for weights, so that no order of a sum makes a difference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape))
    return layer.eval()


def inputs(layer, size, batch=2):
    return torch.randint(-3, 4, (batch, layer.in_channels, *size)).to(layer.weight.dtype)


LAYERS = {
    "1-D": lambda: CoordConv1d(3, 4, 3, padding=1),
    "2-D": lambda: CoordConv2d(3, 4, 3, padding=1, coords="yx"),
    "3-D": lambda: CoordConv3d(3, 4, 3, padding=1),
    "1-D transposed": lambda: CoordConvTranspose1d(3, 4, 3, stride=2),
    "2-D transposed": lambda: CoordConvTranspose2d(4, 4, 3, stride=2, padding=1, groups=2),
    "3-D transposed": lambda: CoordConvTranspose3d(3, 4, 3),
    "pointwise": lambda: CoordConv2d(3, 4, 1),
    "groups": lambda: CoordConv2d(4, 6, 3, padding=1, groups=2, stride=2),
    "dilation": lambda: CoordConv2d(3, 4, 3, padding="same", dilation=2),
    "reflect": lambda: CoordConv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "extend": lambda: CoordConv2d(3, 4, 3, padding=1, coords=Coordinates("xy", outside="extend")),
    "no bias": lambda: CoordConv2d(3, 4, 3, bias=False),
    "float64": lambda: CoordConv2d(3, 4, 3, dtype=torch.float64),
    "bfloat16": lambda: CoordConv2d(3, 4, 3, padding=1, dtype=torch.bfloat16),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return exact(LAYERS[request.param]())


@pytest.mark.parametrize("gradients", [False, True])
def test_one_map_for_one_size(layer, gradients):
    size = (9, 5, 3)[: layer.rank]
    with torch.set_grad_enabled(gradients):
        fused, x = layer.fuse(size), inputs(layer, size)
        for given in (x, x[:1], x[0]):
            assert torch.equal(fused(given), layer(given))
    assert fused.map.shape == layer(x).shape[1:]
    assert fused.map.dtype == torch.promote_types(layer.weight.dtype, torch.float32)
    assert not any(parameter.requires_grad for parameter in fused.parameters())


def test_maps_as_they_come(layer):
    fused = layer.fuse()
    for size in 2 * SIZES:
        x = inputs(layer, size[: layer.rank])
        assert torch.equal(fused(x), layer(x))
    assert 1 < len(fused._maps) <= len(SIZES)


def test_maps_are_bounded_and_follow_the_state():
    layer, other = exact(CoordConv2d(2, 3, 3)), CoordConv2d(2, 3, 3).eval()
    fused = layer.fuse()
    for n in range(3, 30):
        fused(torch.zeros(1, 2, n, 3))
    assert len(fused._maps) == 8
    x = torch.randn(2, 2, 29, 3)
    fused.load_state_dict(other.fuse().state_dict())
    assert torch.allclose(fused(x), other(x), atol=1e-5)
    fused.double()
    assert torch.allclose(fused(x.double()), copy.deepcopy(other).double()(x.double()))


def test_a_state_of_other_coordinates_is_refused():
    one, other = (CoordConv2d(3, 4, 3, coords=coords).eval() for coords in ("xy", "yx"))
    x = torch.randn(2, 3, 5, 6)
    with pytest.raises(RuntimeError, match=r"coordinates was made for Coordinates\('xy'\), want"):
        other.fuse().load_state_dict(one.fuse().state_dict())
    again = copy.deepcopy(one)
    again.reset_parameters()
    for size in (None, (5, 6)):
        fused = again.fuse(size)
        fused.load_state_dict(one.fuse(size).state_dict())
        assert torch.allclose(fused(x), one(x), atol=1e-5)


def test_maps_follow_a_functional_call():
    layers = [CoordConv2d(3, 4, 3).eval() for _ in range(3)]
    one, *_ = fused = [layer.fuse() for layer in layers]
    x = torch.randn(2, 3, 5, 6)
    wanted = torch.stack([layer(x) for layer in layers])
    for i in (0, 1, 2, 0):
        found = torch.func.functional_call(one, fused[i].state_dict(), (x,))
        assert torch.allclose(found, wanted[i], atol=1e-5)
    states = torch.func.stack_module_state(fused)
    found = torch.vmap(lambda *state: torch.func.functional_call(one, state, (x,)))(*states)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(one(x), wanted[0], atol=1e-5)


def test_a_copy_and_a_pickle():
    layer = exact(CoordConv2d(2, 3, 3))
    x = inputs(layer, (5, 9))
    for fused in (layer.fuse(), layer.fuse((5, 9))):
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(twin(x), layer(x))


def test_a_map_made_in_inference_mode_serves_in_training():
    layer = exact(CoordConv2d(2, 3, 3))
    fused, x = layer.fuse(), inputs(layer, (5, 9))
    with torch.inference_mode():
        fused(x)
    x = x.requires_grad_()
    fused(x).sum().backward()
    found, x.grad = x.grad, None
    layer(x).sum().backward()
    assert torch.equal(found, x.grad)


def test_an_output_size():
    layer = exact(CoordConvTranspose2d(2, 3, 3, stride=2))
    fused, x = layer.fuse(), inputs(layer, (3, 2))
    for size in ([8, 5], [7, 6], None):
        assert torch.equal(fused(x, size), layer(x, size))


@pytest.mark.parametrize("size", [None, (9, 5)])
def test_compiled_and_exported(size):
    layer = exact(CoordConv2d(2, 3, 3, padding=1))
    fused, x = layer.fuse(size), inputs(layer, (9, 5))
    with torch.no_grad():
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
        program = torch.export.export(fused, (x,))
        assert torch.equal(program.module()(x), layer(x))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    if size is not None:  # a convolution and a sum, of constants
        assert {name.split(".")[1] for name in targets} <= {"conv2d", "add", "add_"}


@pytest.mark.parametrize("size", [None, (9, 5)])
@pytest.mark.parametrize("cls", [CoordConv2d, CoordConvTranspose2d])
def test_a_fused_network_can_be_traced_by_torch_fx(cls, size):
    if size is None and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch.fx of this torch traces no range of unknown length")
    layer = exact(cls(2, 3, 3))
    fused = fuse(nn.Sequential(layer, nn.ReLU()).eval(), size)
    traced = torch.fx.symbolic_trace(fused)
    for shape in (9, 5), *[(3, 17)] * (size is None):
        x = inputs(layer, shape)
        assert torch.equal(traced(x), fused(x))


class Block(nn.Module):
    """Its order of calls is not the order of its modules."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8)
        self.other = nn.BatchNorm2d(8)
        self.conv = CoordConv2d(8, 8, 3, padding=1, bias=False)
        self.used_twice = CoordConv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.used_twice(torch.relu(self.bn(self.conv(x))))
        return self.other(y) + y


class Untraceable(nn.Module):
    """In ``twice`` a ReLU that also stands elsewhere is between the layer and the norm."""

    def __init__(self):
        super().__init__()
        relu = nn.ReLU()
        self.twice = nn.Sequential(relu, CoordConv2d(8, 8, 1), relu, nn.BatchNorm2d(8))
        self.stem = nn.Sequential(CoordConv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.conv, self.bn = CoordConv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(self.stem(self.twice(x)))) if x.sum() > -1e9 else x


def trained(model):
    """With statistics that are not those of the start."""
    torch.manual_seed(0)
    for _ in range(5):
        model(2 * torch.randn(4, 8, 17, 9) + 1)
    return model.eval()


@pytest.mark.parametrize(
    "size", [None, (17, 9), torch.zeros(1, 8, 17, 9)], ids=["any", "size", "x"]
)
@pytest.mark.parametrize("kind", [Block, Untraceable])
def test_a_network(kind, size):
    model = trained(kind())
    before = copy.deepcopy(model.state_dict())
    fused, x = fuse(model, size), torch.randn(2, 8, 17, 9)
    with torch.no_grad():
        wanted = model(x)
        assert (fused(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not any(type(each).__name__ == "CoordConv2d" for each in fused.modules())
    report = fused.fuse_report
    batch_norms = {row.name: row.batch_norm for row in report.layers}
    if kind is Block:
        assert batch_norms == {"conv": "bn", "used_twice": None}
        assert isinstance(fused.bn, nn.Identity)
        assert isinstance(fused.other, nn.BatchNorm2d)
        assert not report.notes
    else:
        # The network may run any part by itself; with a size runs show that it does not.
        stem = None if size is None else "stem.1"
        assert batch_norms == {"twice.1": None, "stem.0": stem, "conv": None}
        assert "torch.fx fails" in str(report)
    assert all((row.size is None) == (size is None) for row in report.layers)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_sequence_that_is_run_in_parts():
    """As to take features out of it, here where torch.fx cannot look."""

    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(CoordConv2d(8, 8, 3), nn.BatchNorm2d(8))

        def forward(self, x):
            y = self.parts[0](x) if x.sum() > -1e9 else x
            return self.parts[1](y) + y

    model, x = trained(Tapped()), torch.randn(2, 8, 17, 9)
    assert torch.allclose(fuse(model)(x), model(x), atol=1e-5)


def test_a_layer_that_sees_two_sizes_or_is_in_two_places():
    conv = CoordConv2d(8, 8, 3, padding=1)
    model = nn.Sequential(conv, nn.MaxPool2d(2), conv, CoordConv2d(8, 4, 1)).eval()
    fused, x = fuse(model, (17, 9)), torch.randn(2, 8, 17, 9)
    assert fused[0] is fused[2]
    assert [row.size for row in fused.fuse_report.layers] == [None, (8, 4)]
    assert torch.allclose(fused(x), model(x), atol=1e-5)


def test_without_batch_norms():
    model = trained(nn.Sequential(CoordConv2d(8, 8, 3), nn.BatchNorm2d(8)))
    assert isinstance(fuse(model, batch_norm=False)[1], nn.BatchNorm2d)
    assert isinstance(fuse(model)[1], nn.Identity)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_layer_takes_a_batch_norm(norm, groups):
    model = trained(
        nn.Sequential(CoordConvTranspose2d(8, 8, 3, groups=groups), copy.deepcopy(norm))
    )
    x = torch.randn(2, 8, 5, 6)
    fused = fuse(model)
    assert isinstance(fused[1], nn.Identity)
    assert torch.allclose(fused(x), model(x), atol=1e-5)


def test_statistics_of_the_batch_are_not_folded():
    model = nn.Sequential(CoordConv2d(8, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    assert isinstance(fuse(model)[1], nn.BatchNorm2d)


@pytest.mark.parametrize(
    "hook",
    [
        lambda norm: norm.register_forward_hook(lambda _, inputs, output: output.abs()),
        lambda norm: norm.register_forward_pre_hook(lambda _, inputs: inputs[0].abs()),
    ],
    ids=["after", "before"],
)
def test_a_batch_norm_with_a_hook_is_left(hook):
    model = trained(nn.Sequential(CoordConv2d(8, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 8, 9, 9)
    hook(model[1])
    fused = fuse(model)
    assert fused.fuse_report.layers[0].batch_norm is None
    assert torch.allclose(fused(x), model(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_would_be_lost_or_be_old_is_refused():
    layer = CoordConv2d(3, 4, 3).eval()
    layer.forward = lambda input: 2 * input
    with pytest.raises(ValueError, match="CoordConv2d has a forward of its own"):
        layer.fuse()
    for norm in (nn.utils.weight_norm, nn.utils.spectral_norm):  # which compute it at a call
        layer = norm(CoordConv2d(3, 4, 3)).eval()
        with pytest.raises(ValueError, match="weight must be a parameter.*remove_weight_norm"):
            layer.fuse()


def test_a_parametrized_layer():
    conv = parametrizations.weight_norm(CoordConv2d(8, 8, 3))
    model, x = trained(nn.Sequential(conv, nn.BatchNorm2d(8))), torch.randn(2, 8, 9, 9)
    assert torch.allclose(fuse(model)(x), model(x), atol=1e-5)


def test_a_layer_as_the_network():
    layer, x = CoordConv2d(3, 4, 3).eval(), torch.randn(1, 3, 5, 5)
    fused = fuse(layer, (5, 5))
    assert torch.allclose(fused(x), layer(x), atol=1e-5)
    assert str(fused.fuse_report) == "(itself)  CoordConv2d  one map for 5x5"


def test_a_layer_that_is_asked_for_another_size_keeps_no_map():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = CoordConvTranspose2d(3, 4, 3, stride=2)

        def forward(self, input):
            return self.up(input=input, output_size=(12, 12))

    model, x = Up().eval(), torch.randn(2, 3, 5, 5)
    fused = fuse(model, size=(5, 5))
    assert str(fused.fuse_report) == "up  CoordConvTranspose2d  maps as they come"
    assert torch.allclose(fused(x), model(x), atol=1e-5)


def test_a_forward_of_its_own_is_refused():
    class Mine(CoordConv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match="forward"):
        fuse(nn.Sequential(Mine(3, 4, 3)).eval())
    with pytest.raises(ValueError, match="forward"):
        Mine(3, 4, 3).eval().fuse()


def test_a_step_of_its_own_is_refused():
    class Doubled(CoordConv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, 2 * weight, bias)

    replaced = CoordConv2d(3, 4, 3).eval()
    replaced.forward = lambda input: input
    for layer, step in (Doubled(3, 4, 3).eval(), "_conv_forward"), (replaced, "forward"):
        with pytest.raises(ValueError, match=f"has a {step} of its own"):
            fuse(nn.Sequential(layer))
        with pytest.raises(ValueError, match=f"has a {step} of its own"):
            layer.fuse()


@pytest.mark.filterwarnings("ignore")  # which deprecate the first two
@pytest.mark.parametrize(
    ("compute", "remove"),
    [
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), prune.remove),
    ],
)
def test_a_weight_of_the_last_call_is_refused(compute, remove):
    layer, other = CoordConv2d(3, 4, 3), CoordConv2d(3, 4, 3)
    compute(layer)
    compute(other)
    layer.eval()
    layer.load_state_dict(other.state_dict())  # the weight is still the old one
    for use in (layer.fuse, lambda: fuse(nn.Sequential(layer)), layer.export_weights):
        with pytest.raises(ValueError, match="weight must be a parameter, but is computed from"):
            use()
    remove(layer, *["weight"] * (remove is prune.remove))
    x = torch.randn(2, 3, 5, 6)
    assert torch.allclose(layer.fuse()(x), layer(x), atol=1e-5)


def test_hooks_of_a_layer_are_refused():
    layer = CoordConv2d(3, 4, 3).eval()
    handle = layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    for use in (layer.fuse, lambda: fuse(nn.Sequential(layer))):
        with pytest.raises(ValueError, match="must have no forward hooks"):
            use()
    handle.remove()
    layer.fuse()


def doubled_after(norm):
    norm.register_forward_hook(lambda module, inputs, output: 2 * output)


def doubled_before(norm):
    norm.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def replaced(norm):
    norm.forward = lambda input: 2 * input


@pytest.mark.parametrize("change", [doubled_after, doubled_before, replaced])
def test_a_norm_that_computes_more_is_left(change):
    model, x = nn.Sequential(CoordConv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 5, 6)
    model(x)  # statistics that are not those of the start
    model.eval()
    change(model[1])
    assert torch.allclose(fuse(model)(x), model(x), atol=1e-5)


@pytest.mark.parametrize("missing", [False, True])
def test_an_optional_argument_between_layer_and_norm(missing):
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = CoordConv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, input, more=None):
            found = self.layer(input)
            if (more is None) == missing:
                found = 2 * found
            return self.norm(found)

    model, x = Conditioned(), torch.randn(2, 3, 5, 6)
    model(x)  # statistics that are not those of the start
    model.eval()
    fused = fuse(model)
    for more in (None, 1):
        assert torch.allclose(fused(x, more), model(x, more), atol=1e-5)


def test_a_sequence_that_is_a_list_of_layers():
    """As networks of features use it; the condition is what torch.fx cannot trace."""

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(CoordConv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, input):
            found = [input] if input.sum() < 1e9 else []
            for layer in self.layers:
                found.append(layer(found[-1]))
            return found[1:]

    model, x = Features(), torch.randn(2, 3, 5, 6)
    model(x)
    model.eval()
    assert "layers.1 is left: nothing shows that it alone takes" in str(fuse(model, x).fuse_report)
    for fused in fuse(model, (5, 6)), fuse(model, x), fuse(model, batch_norm=False):
        for found, wanted in zip(fused(x), model(x), strict=True):
            assert torch.allclose(found, wanted, atol=1e-5)


def test_what_a_call_changes_in_a_network_is_not_in_the_copy():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = CoordConv2d(3, 4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, input):
            self.calls += 1
            return self.layer(input) + self.calls

    model, x = Counting().eval(), torch.randn(2, 3, 5, 6)
    fused = fuse(model, size=(5, 6))
    assert model.calls == fused.calls == 0
    assert torch.allclose(fused(x), model(x), atol=1e-5)


def test_what_cannot_be_fused():
    layer = CoordConv2d(3, 4, 3)
    with pytest.raises(ValueError, match="must be in evaluation mode.*call eval"):
        layer.fuse()
    model = nn.Sequential(layer.eval(), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="must be in evaluation mode, '1' is not"):
        fuse(model)
    with pytest.raises(ValueError, match=r"size must have 2 lengths, got \(5,\)"):
        layer.fuse((5,))
    with pytest.raises(ValueError, match="model has no CoordConv to fuse"):
        fuse(nn.Sequential(AddCoords(), nn.Conv2d(5, 3, 3)))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        fuse(3)
    with pytest.raises(TypeError, match="size must be a spatial shape or an example of .*, got 5"):
        fuse(layer, 5)
    for size in (None, (5, 6)):
        with pytest.raises(ValueError, match="a lazy layer has no weight.*run the network once"):
            fuse(nn.Sequential(LazyCoordConv2d(3, 4)).eval(), size and torch.zeros(1, 3, *size))
    fused = layer.fuse((5, 6))
    with pytest.raises(ValueError, match=r"the size that was fused, \(5, 6\), got \(6, 5\)"):
        fused(torch.zeros(1, 3, 6, 5))


def test_neither_way_is_forced_on_it(monkeypatch):
    monkeypatch.setattr(position_bias, "FORCED", "append")
    layer = exact(backend.CoordConv2d(3, 4, 3))
    x = inputs(layer, (5, 9))
    assert torch.equal(layer.fuse((5, 9))(x), layer(x))
