"""The torch layers: against the definition, and under the habits of torch's users."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.autograd import forward_ad

from coordconv import (
    Coordinates,
    coordinate_grid,
    load_weights,
    networks,
    position_bias,
    save_weights,
)
from coordconv.backends import torch as backend
from coordconv.backends.torch import AddCoords, CoordConv1d, CoordConv2d, CoordConvTranspose2d
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network
from coordconv.parity.comparison import expected
from coordconv.reference import Reference
from definition import gamma


def with_gradients(layer, x, dy):
    """Output and gradients by name, in NumPy."""
    x = x.clone().requires_grad_()
    y = layer(x)
    tensors = {"x": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(y, list(tensors.values()), dy)
    found = {"y": y, **dict(zip(tensors, gradients, strict=True))}
    return {name: tensor.detach().double().numpy() for name, tensor in found.items()}


def same(found, wanted):
    """Whether arrays by name are the same to the last bit."""
    return found.keys() == wanted.keys() and all(
        np.array_equal(found[name], wanted[name]) for name in wanted
    )


def integers(*shape, largest=4):
    return torch.randint(-largest, largest + 1, shape).float()


def fill(layer, largest=4):
    """Integers for all weights."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(integers(*parameter.shape, largest=largest))


def exact(name, coords, largest=4):
    """A layer, a batch and an output's gradient on which no sum is ever rounded.

    All values are integers, the coordinates of axes of two and three samples too; where only one
    axis is longer than one sample, so is the radius. With ``largest=1`` every sum of absolute
    terms is below 256: exact in bfloat16, too.
    """
    torch.manual_seed(2)
    layer = getattr(backend, name)(4, 6, 3, padding=1, coords=coords)
    fill(layer, largest)
    shape = (1, 1, 3) if "r" in layer.coords.channels else (3, 2, 3)
    x = integers(2, 4, *shape[-layer.rank :], largest=largest)
    return layer, x, integers(*layer(x).shape, largest=largest)


def hold(layer, geometry, x, unit):
    """Hold the output to the definition, componentwise, for arithmetic of a unit roundoff.

    Twice the bound: the definition itself is computed in float64.
    """
    arrays = [array.astype(np.float64) for array in layer.export_weights().values()]
    reference, given = Reference(geometry, layer.coords), x.double().numpy()
    terms = (layer.in_channels // layer.groups + len(layer.coords)) * geometry.taps + 1
    bound = 2 * gamma(terms, unit) * reference.forward(given, *arrays, magnitudes=True)
    error = np.abs(layer(x).detach().double().numpy() - reference.forward(given, *arrays))
    assert (error <= bound).all(), (error - bound).max()


def concatenated(layer, x):
    """The definition in torch itself, for one group: concatenate, then convolve."""
    plain = nn.Conv2d(
        layer.in_channels + len(layer.coords),
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        padding_mode=layer.padding_mode,
        dtype=layer.weight.dtype,
    )
    with torch.no_grad():
        plain.weight.copy_(torch.cat([layer.weight, layer.coord_weight], dim=1))
        plain.bias.copy_(layer.bias)
    return plain(AddCoords(layer.coords)(x))


@pytest.mark.parametrize("coords", ["xy", "yx", "xyr", "r", Coordinates("ry", r_center=0.5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        *({"padding": 2, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    ],
)
def test_equals_the_concatenation_that_defines_it(options, coords):
    torch.manual_seed(0)
    layer = CoordConv2d(3, 4, 3, coords=coords, dtype=torch.float64, **options)
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    found, wanted = layer(x).detach(), concatenated(layer, x).detach()
    assert found.shape == wanted.shape
    terms = layer.weight[0].numel() + layer.coord_weight[0].numel() + 1
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.abs_()
        span = AddCoords(layer.coords)(x)[:, 3:].abs().max()
        size = (layer.weight.flatten(1).sum(1) * x.abs().max()).max()
        size += (layer.coord_weight.flatten(1).sum(1) * span).max() + layer.bias.max()
    assert (found - wanted).abs().max() <= 2 * terms * torch.finfo(x.dtype).eps * size


def test_unbatched_input_is_a_batch_of_one():
    layer = CoordConv2d(3, 4, 3, coords="xyr", padding=1)
    x = torch.randn(3, 6, 5)
    assert torch.equal(layer(x), layer(x[None])[0])


def test_every_group_sees_every_coordinate():
    layer = CoordConv2d(4, 8, 1, groups=4, bias=False)
    fill(layer)
    with torch.no_grad():
        layer.weight.zero_()
        layer.coord_weight[:, 0] += 10  # of x: no output is constant
    y = layer(torch.zeros(1, 4, 5, 3))[0]
    grid = torch.tensor(np.array(coordinate_grid((5, 3))))
    assert torch.equal(y, torch.einsum("on,nhw->ohw", layer.coord_weight[:, :, 0, 0], grid))
    assert (y.flatten(1).std(dim=1) > 0).all()


def test_options_changed_on_the_layer_count():
    """Dilating a trained backbone by hand is a habit of segmentation code."""
    layer = CoordConv2d(2, 3, 3, padding=1)
    fill(layer)
    layer(torch.zeros(1, 2, 9, 5))  # nothing of the options may be kept from here
    layer.dilation, layer.padding = (2, 2), (2, 2)
    x = integers(1, 2, 9, 5)
    assert torch.equal(layer(x), concatenated(layer, x))


class TestInit:
    def test_fan_in_is_what_torch_draws_for_all_channels(self):
        torch.manual_seed(3)
        layer = CoordConv2d(5, 8, 3, coords="xyr")
        torch.manual_seed(3)
        plain = nn.Conv2d(8, 8, 3)
        assert torch.equal(torch.cat([layer.weight, layer.coord_weight], 1), plain.weight)
        assert torch.equal(layer.bias, plain.bias)

    def test_fan_in_of_groups_counts_the_coordinates_in_each(self):
        layer = CoordConv2d(64, 64, 3, groups=64, coords="xy")
        limit = (3 * 9) ** -0.5
        for parameter in layer.parameters():
            assert 0.8 * limit < parameter.abs().max() <= limit

    def test_zeros_starts_as_the_plain_layer(self):
        torch.manual_seed(3)
        layer = CoordConv2d(5, 8, 3, coord_init="zeros")
        torch.manual_seed(3)
        plain = nn.Conv2d(5, 8, 3)
        x = torch.randn(1, 5, 6, 6)
        assert not layer.coord_weight.any()
        assert torch.equal(layer(x), plain(x))

    def test_reset_parameters_draws_all_anew(self):
        layer = CoordConv2d(2, 3, 3)
        before = {name: p.clone() for name, p in layer.named_parameters()}
        layer.reset_parameters()
        assert all((p != before[name]).all() for name, p in layer.named_parameters())

    def test_initialisers_that_look_for_conv2d_find_it(self):
        assert isinstance(CoordConv2d(1, 1, 1), nn.Conv2d)

    def test_takes_device_and_dtype(self):
        layer = CoordConv2d(2, 3, 3, device="meta", dtype=torch.float16, bias=False)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}
        assert layer(torch.empty(1, 2, 5, 5, device="meta", dtype=torch.float16)).shape[1] == 3


class TestPrecision:
    @pytest.mark.parametrize(("coords", "roundings"), [("xy", 3), ("xyr", 4)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_map_is_computed_in_float32_and_rounded_once(self, dtype, coords, roundings):
        """A coordinate is rounded, its product, and a sum for each coordinate but the first."""
        layer = CoordConv2d(1, 4, 1, bias=False, coords=coords, dtype=dtype)
        with torch.no_grad():
            layer.weight.zero_()
        y = layer(torch.zeros(1, 1, 512, 512, dtype=dtype))[0].double()
        grid = torch.tensor(np.array(coordinate_grid((512, 512), coords, dtype=np.float64)))
        kernel = layer.coord_weight[:, :, 0, 0].double()
        exact = torch.einsum("on,nhw->ohw", kernel, grid)
        size = torch.einsum("on,nhw->ohw", kernel.abs(), grid.abs())
        once = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
        assert ((y - exact).abs() <= once + 2 * gamma(roundings, 2.0**-24) * size).all()

    def test_autocast_leaves_the_map_alone(self):
        layer = CoordConv2d(1, 4, 1, bias=False)
        with torch.no_grad():
            layer.weight.zero_()
        x = torch.zeros(1, 1, 512, 512)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, layer(x).bfloat16())

    @pytest.mark.parametrize("cast", [False, True], ids=["made so", "cast later"])
    def test_float64_stays_float64(self, cast):
        layer = CoordConv2d(2, 3, 3, coords="xyr", dtype=None if cast else torch.float64)
        x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
        if cast:
            layer(x.float())  # float32 tables may be kept, and must not be used
            layer.double()
        assert layer(x).dtype == torch.float64
        hold(layer, ConvGeometry((3, 3)), x, 2.0**-53)

    @pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
    @pytest.mark.parametrize(("coords", "shape"), [("xy", (5, 3)), ("xyr", (1, 5))])
    def test_complex_weights(self, coords, shape):
        layer = CoordConv2d(2, 3, 3, padding=1, coords=coords, dtype=torch.complex64)
        with torch.no_grad():
            for parameter in layer.parameters():
                parts = integers(*parameter.shape), integers(*parameter.shape)
                parameter.copy_(torch.complex(*parts))
        x = torch.complex(integers(1, 2, *shape), integers(1, 2, *shape))
        y = layer(x)
        assert y.dtype == torch.complex64
        assert torch.equal(y, concatenated(layer, x))


def signs(*shape):
    """Of -1, 0 and 1: sums over a large output stay below 2**24 steps of its coordinates."""
    return integers(*shape, largest=1)


def defined(layer, geometry, x, dy):
    """What :func:`with_gradients` must find, by the definition in float64."""
    reference, arrays = Reference(geometry, layer.coords), layer.export_weights()
    given, gradient = x.double().numpy(), dy.double().numpy()
    found = {
        "y": reference.forward(given, *arrays.values()),
        "x": reference.input_gradient(gradient, arrays["weight"], given.shape[2:]),
        **reference.weight_gradients(given, gradient),
    }
    return {name: found[name] for name in ("y", "x", *dict(layer.named_parameters()))}


class TestWaysOfAdding:
    """Which way the map is added depends on the shape; all of them compute the same."""

    @pytest.mark.parametrize("batched", [True, False])
    @pytest.mark.parametrize(
        ("out", "shape"), [(16, (257, 257)), (128, (129, 65))], ids=["by function", "product"]
    )
    def test_one_large_map(self, batched, out, shape):
        """Long enough for the product that makes it to be added to the output."""
        torch.manual_seed(3)
        layer = CoordConv2d(1, out, 3, padding=1)
        fill(layer, largest=1)
        x, dy = signs(1, 1, *shape), signs(1, out, *shape)
        wanted = defined(layer, ConvGeometry((3, 3), padding=1), x, dy)
        seen = []
        product = backend._AddProduct.forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                backend._AddProduct,
                "forward",
                staticmethod(lambda *a: seen.append(a) or product(*a)),
            )
            if batched:
                found = with_gradients(layer, x, dy)
            else:
                found = with_gradients(layer, x[0], dy[0])
                found |= {name: found[name][None] for name in "xy"}
        assert seen
        assert same(found, wanted)
        with torch.inference_mode():
            assert np.array_equal(layer(x).numpy(), wanted["y"])

    def test_one_large_map_of_a_frozen_convolution(self):
        """Its output has no gradient of its own when the map is added to it."""
        layer = CoordConv2d(1, 16, 3, padding=1)
        fill(layer, largest=1)
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
        x, dy = signs(1, 1, 257, 257), signs(1, 16, 257, 257)
        (found,) = torch.autograd.grad(layer(x), [layer.coord_weight], dy)
        wanted = defined(layer, ConvGeometry((3, 3), padding=1), x, dy)["coord_weight"]
        assert np.array_equal(found.double().numpy(), wanted)

    def test_second_derivatives_of_one_large_map(self):
        """Of the sum of y * y in the coordinate kernel's direction d: twice that of P(d) ** 2."""
        layer = CoordConv2d(1, 16, 1)
        fill(layer, largest=1)
        x, d = signs(1, 1, 257, 257), signs(16, 2, 1, 1)
        (slope,) = torch.autograd.grad(
            layer(x).square().sum(), [layer.coord_weight], create_graph=True
        )
        (curvature,) = torch.autograd.grad((slope * d).sum(), [layer.coord_weight])
        g = coordinate_grid((257, 257), dtype=np.float64).reshape(2, -1)
        wanted = 2 * d.double().numpy()[..., 0, 0] @ (g @ g.T)
        # sums of 257 * 257 products, each of a product
        bound = (
            gamma(257**2 + 4, 2.0**-24) * 2 * np.abs(d[..., 0, 0].numpy()) @ np.abs(g) @ np.abs(g.T)
        )
        assert (np.abs(curvature[..., 0, 0].double().numpy() - wanted) <= bound).all()

    @pytest.mark.parametrize("frozen", [True, False])
    def test_forward_mode_derivatives_of_one_large_map(self, frozen):
        """A layer is linear in input and kernels together: its derivative is a layer's output."""
        layer = CoordConv2d(1, 16, 3, padding=1)
        fill(layer, largest=1)
        x, dx = signs(1, 1, 257, 257), signs(1, 1, 257, 257)
        d = signs(*layer.coord_weight.shape)
        wanted = CoordConv2d(1, 16, 3, padding=1, bias=False)
        wanted.load_state_dict({"weight": layer.weight, "coord_weight": d})
        layer.requires_grad_(not frozen)
        with forward_ad.dual_level():
            kernel = forward_ad.make_dual(layer.coord_weight, d)
            inputs = (forward_ad.make_dual(x, dx),)
            y = torch.func.functional_call(layer, {"coord_weight": kernel}, inputs)
            assert torch.equal(forward_ad.unpack_dual(y).tangent, wanted(dx))

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("name", ["CoordConv1d", "CoordConv2d", "CoordConv3d"])
    def test_one_tap_is_a_product(self, name, bias):
        torch.manual_seed(4)
        layer = getattr(backend, name)(5, 7, 1, coords="x", bias=bias)
        fill(layer)
        x, dy = integers(3, 5, *(2, 3, 5)[-layer.rank :]), integers(3, 7, *(2, 3, 5)[-layer.rank :])
        assert layer._is_product(x, layer.coord_weight)
        wanted = defined(layer, ConvGeometry((1,) * layer.rank), x, dy)
        assert same(with_gradients(layer, x, dy), wanted)

    @pytest.mark.parametrize(
        "options",
        [
            {"kernel_size": 3},
            {"stride": 2},
            {"padding": 1},
            {"groups": 2},
            {"in_channels": 51},  # more than twice the positions
            {"dtype": torch.bfloat16},
        ],
    )
    def test_what_is_no_product_or_slower_as_one(self, options):
        options = {"in_channels": 4, "out_channels": 4, "kernel_size": 1, **options}
        layer = CoordConv2d(**options)
        x = torch.zeros(3, layer.in_channels, 5, 5, dtype=layer.weight.dtype)
        assert not layer._is_product(x, layer.coord_weight)
        layer(x)

    def test_inputs_that_are_no_product(self):
        layer, x = CoordConv2d(4, 4, 1), torch.zeros(3, 4, 5, 5)
        kernel = layer.coord_weight
        assert layer._is_product(x, kernel)
        assert not layer._is_product(x[0], kernel)
        assert not layer._is_product(x.to(memory_format=torch.channels_last), kernel)
        assert not layer._is_product(x, kernel.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not layer._is_product(x, kernel)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_parametrized_weight_is_computed_once(self, compiled):
        layer, calls = CoordConv2d(4, 4, 1), []

        class Count(nn.Module):
            def forward(self, weight):
                calls.append(weight.shape)
                return weight

        nn.utils.parametrize.register_parametrization(layer, "weight", Count())
        calls.clear()
        if compiled:
            layer.compile(backend="eager")
        layer(torch.zeros(3, 4, 5, 5))
        assert len(calls) == 1

    def test_the_kept_arrays_are_bounded(self):
        layer = CoordConv1d(1, 1, 3)
        for n in range(3, 200):
            layer(torch.zeros(1, 1, n))
        info = backend._kept.cache_info()
        assert info.currsize <= info.maxsize < 197


class TestModule:
    def test_inference_mode_first_does_not_spoil_training_later(self):
        layer = CoordConv2d(2, 3, 3, coords="xyr")
        x = torch.randn(1, 2, 11, 13)
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
        assert layer.coord_weight.grad.abs().sum() > 0

    def test_copies_and_state(self):
        layer = CoordConv2d(2, 3, 3, coords=Coordinates("yx", align="edges"))
        x = torch.randn(1, 2, 5, 5)
        other = CoordConv2d(2, 3, 3, coords=layer.coords)
        other.load_state_dict(layer.state_dict())
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
            assert twin.coords == layer.coords
            assert torch.equal(twin(x), layer(x))

    def test_repr_shows_the_coordinates(self):
        shown = repr(CoordConv2d(2, 3, 3, padding=1, coords="xyr"))
        assert shown == (
            "CoordConv2d(2, 3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), "
            "coords=Coordinates('xyr'))"
        )

    def test_frozen_parameters_get_no_gradient(self):
        layer = CoordConv2d(2, 3, 3).requires_grad_(False)
        assert not layer(torch.randn(1, 2, 5, 5)).requires_grad


class TestWeights:
    def test_round_trip_through_a_file(self, tmp_path):
        layer = CoordConv2d(2, 3, 3, coords="xyr")
        other = CoordConv2d(2, 3, 3, coords="xyr")
        save_weights(tmp_path / "layer.safetensors", layer.export_weights())
        other.import_weights(load_weights(tmp_path / "layer.safetensors"))
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name))

    def test_other_order_of_the_same_coordinates_is_permuted(self):
        layer, other = CoordConv2d(2, 3, 3, coords="xyr"), CoordConv2d(2, 3, 3, coords="ryx")
        other.import_weights(layer.export_weights())
        assert torch.equal(other.coord_weight, layer.coord_weight[:, [2, 1, 0]])

    def test_all_problems_at_once_and_nothing_changed(self):
        layer = CoordConv2d(2, 3, 3)
        before = layer.export_weights()
        wrong = {
            "weight": np.ones((3, 4, 3, 3)),
            "conv.weight": np.ones(1),
            "bias": np.ones(3, dtype=np.int64),
        }
        with pytest.raises(ValueError, match="cannot import weights") as error:
            layer.import_weights(wrong)
        for part in (
            "missing: coord_weight, shape (3, 2, 3, 3)",
            "unexpected: conv.weight, shape (1,)",
            "wrong shape: weight is (3, 4, 3, 3), want (3, 2, 3, 3)",
            "not floating-point: bias is int64",
        ):
            assert part in str(error.value)
        for name, array in layer.export_weights().items():
            assert np.array_equal(array, before[name])

    def test_bfloat16_travels_as_float32(self):
        layer = CoordConv2d(2, 3, 3, dtype=torch.bfloat16)
        exported = layer.export_weights()
        assert {array.dtype for array in exported.values()} == {np.dtype(np.float32)}
        other = CoordConv2d(2, 3, 3, dtype=torch.bfloat16)
        other.import_weights(exported)
        assert torch.equal(layer.coord_weight, other.coord_weight)


LAYERS = [f"CoordConv{transpose}{rank}d" for transpose in ("", "Transpose") for rank in (1, 2, 3)]


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


def make(name, *arguments, **options):
    """A layer by name, and a batch for it with axes of different lengths."""
    layer = getattr(backend, name)(*arguments, **options)
    return layer, torch.randn(2, 4, *(5, 4, 3)[: layer.rank])


class TestEveryRank:
    def test_is_torchs_own_class(self, name):
        layer, _ = make(name, 4, 6, 3)
        assert isinstance(layer, getattr(nn, name.removeprefix("Coord")))
        assert layer.coords == Coordinates("xyz"[: layer.rank])

    def test_against_the_reference(self, name):
        torch.manual_seed(1)
        options = {"stride": 2, "padding": 1, "groups": 2}
        layer, x = make(name, 4, 6, 3, coords="rx", **options)
        transposed = "Transpose" in name
        geometry = ConvGeometry((3,) * layer.rank, transposed=transposed, **options)
        network = Network(
            "layer", tuple(x.shape[1:]), (Conv("conv", 4, 6, geometry, layer.coords),)
        )
        dy = torch.randn_like(layer(x))
        found = with_gradients(layer, x, dy)
        weights = {f"conv.{key}": array for key, array in layer.export_weights().items()}
        for key, wanted in expected(network, weights, x.numpy(), dy.numpy()).items():
            assert wanted.error(found[key.removeprefix("conv.")]) <= 1

    def test_unbatched(self, name):
        layer, x = make(name, 4, 6, 2, coords="rx")
        assert torch.equal(layer(x[0]), layer(x[:1])[0])

    def test_fan_in_is_what_torch_draws_for_all_channels(self, name):
        torch.manual_seed(3)
        layer, _ = make(name, 4, 6, 3, groups=2, coords="xr")
        torch.manual_seed(3)
        plain = getattr(nn, name.removeprefix("Coord"))(8, 6, 3, groups=2)
        fused = plain.weight.detach()
        if "Transpose" in name:  # (groups * (2 + 2), 3, *k): both kernels' inputs lead
            groups = fused.reshape(2, 4, 3, *fused.shape[2:])
            features = groups[:, :2].reshape(layer.weight.shape)
            coordinates = groups[:, 2:].transpose(1, 2).reshape(layer.coord_weight.shape)
        else:
            features, coordinates = fused[:, :2], fused[:, 2:]
        assert torch.equal(layer.weight, features)
        assert torch.equal(layer.coord_weight, coordinates)
        assert torch.equal(layer.bias, plain.bias)

    def test_lazy(self, name):
        lazy = getattr(backend, "Lazy" + name)(6, 3, groups=2, coords="rx")
        layer, x = make(name, 4, 6, 3, groups=2, coords="rx")
        torch.manual_seed(0)
        y = lazy(x)
        assert type(lazy) is type(layer)
        torch.manual_seed(0)
        layer.reset_parameters()
        assert torch.equal(y, layer(x))

    def test_copies_and_state(self, name):
        layer, x = make(name, 4, 6, 3, coords="rx")
        loaded, _ = make(name, 4, 6, 3, coords="rx")
        loaded.load_state_dict(layer.state_dict())
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
            assert torch.equal(twin(x), layer(x))

    def test_repr_shows_the_coordinates(self, name):
        layer, _ = make(name, 4, 6, 3, coords="rx")
        assert repr(layer).startswith(f"{name}(4, 6, kernel_size=(3,")
        assert repr(layer).endswith(", coords=Coordinates('rx'))")

    def test_takes_a_plain_layers_state_but_for_the_coordinates(self, name):
        layer, x = make(name, 4, 6, 3, coord_init="zeros")
        plain = getattr(nn, name.removeprefix("Coord"))(4, 6, 3)
        missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
        assert (missing, unexpected) == (["coord_weight"], [])
        assert torch.equal(layer(x), plain(x))

    def test_meta_device(self, name):
        options = {"stride": 2, "padding": 1, "device": "meta"}
        layer, x = make(name, 4, 6, 3, coords="rx", **options)
        plain = getattr(nn, name.removeprefix("Coord"))(4, 6, 3, **options)
        y = layer(x.to("meta"))
        assert y.is_meta
        assert y.shape == plain(x.to("meta")).shape
        layer.to_empty(device="cpu")
        torch.manual_seed(4)
        layer.reset_parameters()
        torch.manual_seed(4)
        fresh, _ = make(name, 4, 6, 3, coords="rx", stride=2, padding=1)
        assert torch.equal(layer(x), fresh(x))

    @pytest.mark.parametrize("name", [name for name in LAYERS if "1d" not in name])
    def test_channels_last_memory(self, name):
        layer, x, dy = exact(name, None)
        memory = {2: torch.channels_last, 3: torch.channels_last_3d}[layer.rank]
        twin, given = copy.deepcopy(layer).to(memory_format=memory), x.to(memory_format=memory)
        assert twin(given).is_contiguous(memory_format=memory)
        assert same(with_gradients(twin, given, dy), with_gradients(layer, x, dy))

    @pytest.mark.parametrize("coords", [None, "rx"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, name, dtype, coords):
        layer, x, dy = exact(name, coords, largest=1)
        twin = copy.deepcopy(layer).to(dtype)
        assert twin(x.to(dtype)).dtype == dtype
        found = with_gradients(twin, x.to(dtype), dy.to(dtype))
        assert same(found, with_gradients(layer, x, dy))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_sixteen_bits_of_real_data_keep_their_bound(self, name, dtype):
        torch.manual_seed(1)
        layer, x = make(name, 4, 6, 2, coords="rx")
        layer.to(dtype)
        geometry = ConvGeometry((2,) * layer.rank, transposed=layer.transposed)
        hold(layer, geometry, x.to(dtype), torch.finfo(dtype).eps / 2)

    @pytest.mark.parametrize("coords", [None, "rx"])
    def test_autocast(self, name, coords):
        layer, x, dy = exact(name, coords, largest=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.backward(dy.bfloat16())
        found = {"y": y.detach().double().numpy()}
        for key, parameter in layer.named_parameters():
            assert parameter.grad.dtype == torch.float32
            found[key] = parameter.grad.double().numpy()
        wanted = with_gradients(layer, x, dy)
        del wanted["x"]
        assert same(found, wanted)

    @pytest.mark.parametrize("coords", [None, "rx"])
    def test_per_sample_gradients(self, name, coords):
        layer, x, dy = exact(name, coords)
        parameters = dict(layer.named_parameters())

        def loss(parameters, x, dy):
            return (torch.func.functional_call(layer, parameters, (x,)) * dy).sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, dy)
        for key, gradient in torch.func.grad(loss)(parameters, x, dy).items():
            assert torch.equal(each[key].sum(0), gradient)
            assert each[key].any()

    def test_an_ensemble_under_vmap(self, name):
        layer, x, _ = exact(name, "rx")
        states = [{k: integers(*p.shape) for k, p in layer.named_parameters()} for _ in range(3)]
        stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}

        def call(state):
            return torch.func.functional_call(layer, state, (x,))

        for y, state in zip(torch.func.vmap(call)(stacked), states, strict=True):
            assert torch.equal(y, call(state))


class TestHabits:
    """What training scripts do to every convolution that they find."""

    def test_each_parameter_is_listed_once(self, name):
        layer, _ = make(name, 4, 6, 3)
        module = nn.Sequential(layer, nn.ReLU())
        assert sorted(n for n, _ in module.named_parameters()) == [
            "0.bias",
            "0.coord_weight",
            "0.weight",
        ]
        assert len(set(module.parameters())) == 3

    def test_weight_decay_of_kernels_alone(self, name):
        layer, x = make(name, 4, 6, 3)
        before = {key: p.clone() for key, p in layer.named_parameters()}
        kernels = [p for p in layer.parameters() if p.ndim > 1]
        others = [p for p in layer.parameters() if p.ndim <= 1]
        groups = [{"params": kernels, "weight_decay": 0.5}, {"params": others}]
        optimizer = torch.optim.SGD(groups, lr=0.5)
        y = layer(x)
        y.backward(torch.zeros_like(y))
        optimizer.step()
        for key, parameter in layer.named_parameters():
            factor = 1 if key == "bias" else 0.75  # by learning rate and decay
            assert torch.equal(parameter, before[key] * factor)

    @pytest.mark.parametrize("frozen", ["weight", "coord_weight", "bias"])
    def test_a_frozen_parameter_gets_no_gradient_while_others_do(self, name, frozen):
        layer, x = make(name, 4, 6, 3)
        layer.get_parameter(frozen).requires_grad_(False)
        layer(x).square().sum().backward()
        for key, parameter in layer.named_parameters():
            assert (parameter.grad is None) == (key == frozen)
            assert key == frozen or parameter.grad.any()

    def test_initialisers_of_torchs_class_find_the_feature_kernel(self, name):
        layer, _ = make(name, 4, 6, 3)
        before = layer.coord_weight.clone()

        def initialise(module):
            if isinstance(module, getattr(nn, name.removeprefix("Coord"))):
                nn.init.constant_(module.weight, 0.5)
                nn.init.zeros_(module.bias)

        nn.Sequential(layer, nn.ReLU()).apply(initialise)
        assert (layer.weight == 0.5).all()
        assert not layer.bias.any()
        assert torch.equal(layer.coord_weight, before)

    def test_parametrizations_hold_for_the_coordinate_kernel(self, name):
        class Double(nn.Module):
            def forward(self, tensor):
                return 2 * tensor

        layer, x, _ = exact(name, "rx")
        twin = copy.deepcopy(layer)
        nn.utils.parametrize.register_parametrization(layer, "coord_weight", Double())
        with torch.no_grad():
            twin.coord_weight *= 2
        assert torch.equal(layer(x), twin(x))

    def test_a_lazy_layer_that_was_given_a_state(self, name):
        lazy = getattr(backend, "Lazy" + name)(6, 3, groups=2, coords="rx")
        layer, x = make(name, 4, 6, 3, groups=2, coords="rx")
        lazy.load_state_dict(layer.state_dict())
        assert torch.equal(lazy(x), layer(x))
        assert type(lazy) is type(layer)
        assert lazy.in_channels == 4


class TestOutputSize:
    @pytest.mark.parametrize("size", [(9, 7), (10, 7), (10, 8)])
    def test_of_the_call_is_that_of_output_padding(self, size):
        layer = CoordConvTranspose2d(2, 3, 3, stride=2, padding=1, coords="yr")
        x = torch.randn(1, 2, 5, 4)
        other = copy.deepcopy(layer)
        other.output_padding = (size[0] - 9, size[1] - 7)
        assert layer(x, output_size=size).shape[2:] == size
        assert torch.equal(layer(x, output_size=size), other(x))


def _make_maps_apart(monkeypatch):
    """As large ones are; all of these are small."""
    monkeypatch.setattr(position_bias, "MOST_TOGETHER", 0)
    for cache in (position_bias.shares, backend._kept):
        cache.cache_clear()


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("name", "coords"), [*((name, "rx") for name in LAYERS), ("CoordConv3d", None)]
    )
    @pytest.mark.parametrize("batch", [1, 2])  # of one sample, the map is of sums, not products
    @pytest.mark.parametrize("apart", [False, True])
    def test_in_one_graph_as_eager(self, name, coords, batch, apart, monkeypatch):
        if apart:
            _make_maps_apart(monkeypatch)
        layer, x, dy = exact(name, coords)
        x, dy = x[:batch].clone(), dy[:batch]
        assert len(x) == batch
        wanted = with_gradients(layer, x, dy)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x.requires_grad_()
        y = compiled(x)
        y.backward(dy)
        gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
        found = {"y": y.detach(), "x": x.grad, **gradients}
        assert same({key: tensor.double().numpy() for key, tensor in found.items()}, wanted)

    def test_in_inference_as_eager(self, name, monkeypatch):
        _make_maps_apart(monkeypatch)
        layer, x, _ = exact(name, None)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_another_batch_compiles_nothing_anew(self, dynamic):
        layer = CoordConv2d(2, 3, 3, padding=1, coords="xyr")
        fill(layer)
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=count)
        for batch in (2, 3):  # the second makes the batch dynamic
            compiled(torch.randn(batch, 2, 1, 5))
        before = len(graphs)
        for batch in (4, 5, 9):
            x = integers(batch, 2, 1, 5)
            assert torch.equal(compiled(x), layer(x))
        assert len(graphs) == before <= 2
        x = integers(4, 2, 9, 1)  # another map
        assert torch.equal(compiled(x), layer(x))

    @pytest.mark.parametrize("trained", [True, False])
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize(
        ("channels", "bias"), [(3, True), (3, False), (8, True), (8, False), (513, True)]
    )
    def test_one_tap(self, channels, bias, batch, trained):
        """A sum, a product or a convolution: what was the fastest."""
        layer = CoordConv2d(channels, 4, 1, bias=bias)
        fill(layer)
        x, dy = integers(batch, channels, 3, 3), integers(batch, 4, 3, 3)
        wanted = with_gradients(layer, x, dy)
        graphs = []

        def keep(graph, inputs):
            graphs.append(graph.code)
            return graph.forward

        layer.compile(fullgraph=True, backend=keep)
        if trained:
            assert same(with_gradients(layer, x, dy), wanted)
        else:
            with torch.inference_mode():
                assert np.array_equal(layer(x).double().numpy(), wanted["y"])
        (graph,) = graphs
        product = channels < 513 and (trained or (channels == 8 and batch > 1))
        assert ("baddbmm" in graph) == product
        assert ("conv2d" in graph) == (channels == 513 or (channels == 8 and not product))

    @pytest.mark.parametrize("gradients", [True, False])
    @pytest.mark.parametrize("kernel_size", [1, 3])
    @pytest.mark.parametrize("channels", [3, 8])
    def test_export_with_any_batch(self, channels, kernel_size, gradients):
        layer = CoordConv2d(channels, 4, kernel_size)
        fill(layer)
        with torch.set_grad_enabled(gradients):
            program = torch.export.export(
                layer,
                (integers(3, channels, 9, 5),),
                dynamic_shapes={"input": {0: torch.export.Dim.DYNAMIC}},
            )
            for batch in (1, 2, 5):
                x = integers(batch, channels, 9, 5)
                assert torch.equal(program.module()(x), layer(x))

    def test_new_weights_count(self):
        layer = CoordConv2d(2, 3, 3)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = integers(1, 2, 5, 5)
        compiled(x)
        fill(layer)
        assert torch.equal(compiled(x), layer(x))


class TestAddCoords:
    @pytest.mark.parametrize("shape", [(5,), (5, 4), (2, 5, 4)])
    def test_appends_the_grid(self, shape):
        x = torch.randn(2, 3, *shape)
        y = AddCoords()(x).numpy()
        assert np.array_equal(y[:, :3], x.numpy())
        for sample in y[:, 3:]:
            assert np.array_equal(sample, coordinate_grid(shape))

    def test_bad_input(self):
        with pytest.raises(TypeError, match="floating-point"):
            AddCoords()(torch.zeros(1, 1, 3, dtype=torch.int32))
        with pytest.raises(ValueError, match="1, 2 or 3 axes"):
            AddCoords()(torch.zeros(1, 1))
        with pytest.raises(ValueError, match="'y', which a 1-D grid"):
            AddCoords("xy")(torch.zeros(1, 1, 3))


class TestNetworks:
    @pytest.mark.parametrize("name", networks.NETWORKS)
    def test_parameter_count_is_the_modules_own(self, name):
        module = networks.build(name, "torch")
        counted = sum(parameter.numel() for parameter in module.parameters())
        assert counted == networks.summary(name).parameters

    def test_a_step_of_training_lowers_the_loss(self):
        module = networks.build("deconv_classifier", "torch")
        step, export = backend.trainer(module, module.export_weights())
        x, labels = np.zeros((2, 2, 1, 1), np.float32), np.array([5, 4000])
        losses = [step(x, labels, 0.01) for _ in range(5)]
        assert losses[-1] < losses[0]
        assert not np.array_equal(
            export()["deconv1.bias"], networks.initial_weights("deconv_classifier")["deconv1.bias"]
        )

    def test_same_seed_same_weights(self):
        a, b = (networks.build("coord_cnn", "torch", seed=s).export_weights() for s in (1, 1))
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_gradients_of_the_coordinate_kernel_are_those_of_the_concatenation():
    torch.manual_seed(0)
    layer = CoordConv2d(2, 3, 3, padding=1, coords="xyr", dtype=torch.float64)
    x, dy = torch.randn(2, 2, 6, 5).double(), torch.randn(2, 3, 6, 5).double()
    found = with_gradients(layer, x, dy)["coord_weight"]
    channels = AddCoords("xyr")(x)[:, 2:]
    wanted = nn.grad.conv2d_weight(channels, layer.coord_weight.shape, dy, padding=1).numpy()
    size = nn.grad.conv2d_weight(
        channels.abs(), layer.coord_weight.shape, dy.abs(), padding=1
    ).numpy()
    assert (np.abs(found - wanted) <= 2 * gamma(2 * 30 + 2) * size).all()
