"""Other implementations' weights: one kernel over features and coordinates, or features alone."""

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordconv import Coordinates, backends, coordinate_grid, load_weights, networks, save_weights
from coordconv.backends import BACKENDS
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Flatten, Linear, Network, ReLU
from coordconv.parity.bounds import Expected, expected
from coordconv.weights import Weights, adopt, join_kernel, split_kernel
from coordconv.weights.foreign import fitted

# Rank, groups, transposed: all that makes one kernel another one.
KINDS = [(r, g, t) for r in (1, 2, 3) for g in (1, 2, 3) for t in (False, True)]
COORDS = {1: Coordinates("x"), 2: Coordinates("yx"), 3: Coordinates("xzy")}
SHAPES = {1: (9,), 2: (5, 9), 3: (5, 3, 9)}  # on which all coordinates are exact
FEATURES, OUT = 2, 3  # of each group
POSITIONS = ("last", "first")


def integers(*shape: int, seed: int = 0) -> Any:
    """So small that float32 sums of their products are exact, whatever their order."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def kernel_of(rank: int, groups: int, transposed: bool, coordinates: bool = True) -> Any:
    """Over features and coordinates, or over features alone."""
    inputs, kernel = FEATURES + coordinates * len(COORDS[rank]), (3, 2, 2)[:rank]
    if transposed:
        return integers(groups * inputs, OUT, *kernel)
    return integers(groups * OUT, inputs, *kernel)


def as_hwio(kernel: Any) -> Any:
    return np.ascontiguousarray(kernel.transpose(*range(2, kernel.ndim), 1, 0))


def concatenated(x: Any, coords: Coordinates, groups: int, position: str = "last") -> Any:
    """The definition: each group's features, then all the coordinates, or the other way round."""
    grid = np.broadcast_to(
        coordinate_grid(x.shape[2:], coords), (len(x), len(coords), *x.shape[2:])
    )
    order = 1 if position == "last" else -1
    parts = [p for group in np.split(x, groups, axis=1) for p in (group, grid)[::order]]
    return np.concatenate(parts, axis=1)


# --- the frameworks' own state -------------------------------------------------------------------


class Torch:
    """What the tests below need of torch."""

    def __init__(self) -> None:
        import torch

        from coordconv.backends import torch as ours

        self.torch, self.nn, self.ours, self.tensor = torch, torch.nn, ours, torch.tensor

    def plain(self, rank: int, transposed: bool) -> Any:
        return getattr(self.nn, f"Conv{'Transpose' if transposed else ''}{rank}d")

    def coord(self, rank: int, transposed: bool) -> Any:
        return getattr(self.ours, f"CoordConv{'Transpose' if transposed else ''}{rank}d")

    def load(self, layer: Any, state: Any, adapt: bool = True) -> None:
        layer.load_state_dict(state)

    def refuse(self, layer: Any, state: Any) -> None:
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="size mismatch for weight"):
                layer.load_state_dict(state, strict=strict)

    def refuse_channels(self, layer: Any, state: Any, message: str) -> None:
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=message):
                layer.load_state_dict(state, strict=strict)

    def bfloat16(self, layer: Any) -> Any:
        return layer.bfloat16()

    def numbers(self, tensor: Any) -> Any:
        return tensor.detach().float().numpy()


class Paddle:
    """What the tests below need of Paddle."""

    def __init__(self) -> None:
        import paddle

        from coordconv.backends import paddle as ours

        self.nn, self.ours, self.tensor = paddle.nn, ours, paddle.to_tensor

    def plain(self, rank: int, transposed: bool) -> Any:
        return getattr(self.nn, f"Conv{rank}D{'Transpose' if transposed else ''}")

    def coord(self, rank: int, transposed: bool) -> Any:
        return getattr(self.ours, f"CoordConv{rank}D{'Transpose' if transposed else ''}")

    def load(self, layer: Any, state: Any, adapt: bool = True) -> None:
        if adapt and isinstance(layer, self.nn.Sequential):  # Paddle asks the outermost layer alone
            state = self.ours.adapt_state_dict(layer, state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # how Paddle says that it skips something
            assert layer.set_state_dict(state) == ([], [])

    def refuse(self, layer: Any, state: Any) -> None:
        with pytest.warns(UserWarning, match="Skip loading for weight. weight receives a shape"):
            missing, unexpected = layer.set_state_dict(state)
        assert (missing, unexpected) == (["weight"], ["weight"])

    def refuse_channels(self, layer: Any, state: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            layer.set_state_dict(state)

    def bfloat16(self, layer: Any) -> Any:
        return layer.to(dtype="bfloat16")

    def numbers(self, tensor: Any) -> Any:
        return tensor.detach().astype("float32").numpy()


@pytest.fixture(params=[Torch, Paddle])
def framework(request: pytest.FixtureRequest) -> Any:
    """Those whose layers have a state of their own to load, each if it is installed."""
    name = request.param.__name__.lower()
    if BACKENDS[name].missing:
        pytest.skip(f"{name} is not installed")
    return request.param()


@pytest.fixture
def torch() -> Any:
    if BACKENDS["torch"].missing:
        pytest.skip("torch is not installed")
    return Torch()


def filled(module: Any, framework: Any) -> dict[str, Any]:
    """The module's state, of integers."""
    return {
        name: framework.tensor(integers(*tensor.shape, seed=i))
        for i, (name, tensor) in enumerate(module.state_dict().items())
    }


def pair(
    framework: Any, rank: int = 2, groups: int = 1, transposed: bool = False, **options: Any
) -> tuple[Any, Any]:
    """A plain layer for a concatenated input, and a CoordConv for the features."""
    coords = COORDS[rank]
    features, coordinates, out = groups * FEATURES, groups * len(coords), groups * OUT
    plain = framework.plain(rank, transposed)(
        features + coordinates, out, 3, groups=groups, **options
    )
    layer = framework.coord(rank, transposed)(
        features, out, 3, groups=groups, coords=coords, **options
    )
    return plain, layer


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("prefix", ["", "conv."])
@pytest.mark.parametrize(("rank", "groups", "transposed"), KINDS)
def test_another_implementations_state_gives_the_same_outputs(
    framework: Any, rank: int, groups: int, transposed: bool, prefix: str, position: str
) -> None:
    plain, layer = pair(framework, rank, groups, transposed, stride=2, padding=1)
    framework.load(plain, filled(plain, framework))
    state = {f"{prefix}{name}": tensor for name, tensor in plain.state_dict().items()}
    given = dict(state)
    if position == "first":  # which no shape tells
        framework.load(layer, framework.ours.adapt_state_dict(layer, state, position=position))
    else:
        framework.load(layer, state)
    assert state.keys() == given.keys()  # the caller's, as it was
    assert all(state[name] is given[name] for name in given)
    x = integers(2, groups * FEATURES, *SHAPES[rank], seed=9)
    wanted = plain(framework.tensor(concatenated(x, COORDS[rank], groups, position)))
    np.testing.assert_array_equal(
        framework.numbers(layer(framework.tensor(x))), framework.numbers(wanted)
    )


@pytest.mark.parametrize("prefix", ["", "conv."])
@pytest.mark.parametrize(("rank", "groups", "transposed"), KINDS)
def test_a_plain_convolutions_state_gives_the_same_outputs(
    framework: Any, rank: int, groups: int, transposed: bool, prefix: str
) -> None:
    """Its kernel is the features' part, and the coordinates' part zero; nothing is missing."""
    options = {"groups": groups, "stride": 2, "padding": 1}
    sizes = groups * FEATURES, groups * OUT, 3
    plain = framework.plain(rank, transposed)(*sizes, **options)
    layer = framework.coord(rank, transposed)(*sizes, coords=COORDS[rank], **options)
    framework.load(plain, filled(plain, framework))
    framework.load(layer, {f"{prefix}{name}": t for name, t in plain.state_dict().items()})
    x = framework.tensor(integers(2, groups * FEATURES, *SHAPES[rank], seed=9))
    np.testing.assert_array_equal(framework.numbers(layer(x)), framework.numbers(plain(x)))
    weight = layer.export_weights()["weight"]
    features, coordinates = split_kernel(weight, COORDS[rank], groups, transposed)
    np.testing.assert_array_equal(features, framework.numbers(plain.weight))
    assert not coordinates.any()


@pytest.mark.parametrize("prefix", ["", "conv."])
def test_in_a_network(framework: Any, prefix: str) -> None:
    plain, layer = pair(framework, padding=1)
    nn, last = framework.nn, framework.plain(2, False)
    theirs = nn.Sequential(nn.Sequential(plain, nn.ReLU()), last(OUT, 4, 1))
    ours = nn.Sequential(nn.Sequential(layer, nn.ReLU()), last(OUT, 4, 1))
    state = filled(theirs, framework)
    framework.load(theirs, state)
    state = {k.replace("0.0.", f"0.0.{prefix}"): v for k, v in state.items()}
    framework.load(ours, state, adapt=bool(prefix))  # under our names by the framework's own loader
    x = integers(2, FEATURES, 5, 9, seed=9)
    wanted = theirs(framework.tensor(concatenated(x, COORDS[2], 1)))
    np.testing.assert_array_equal(
        framework.numbers(ours(framework.tensor(x))), framework.numbers(wanted)
    )


def test_under_two_names(framework: Any) -> None:
    plain, layer = pair(framework)
    state = filled(plain, framework)
    twice = framework.nn.Sequential(layer, layer)
    framework.load(twice, {f"{i}.conv.{k}": v for i in (0, 1) for k, v in state.items()})
    np.testing.assert_array_equal(framework.numbers(layer.bias), framework.numbers(state["bias"]))


def test_in_a_network_of_ours(framework: Any) -> None:
    network = networks.get("coord_classifier")
    module = networks.build(network, type(framework).__name__.lower())
    weights = networks.initial_weights(network, 1)
    state = {name: framework.tensor(array) for name, array in weights.items()}
    for name in ("weight", "bias"):
        state[f"conv1.conv.{name}"] = state.pop(f"conv1.{name}")
    framework.load(module, state)
    for name, array in module.export_weights().items():
        np.testing.assert_array_equal(array, weights[name])


def test_a_convolution_that_holds_another(framework: Any) -> None:
    """As walsvid's are and do: the outer kernel is saved, and never used."""
    plain, layer = pair(framework)
    state = filled(plain, framework)
    unused = {
        "weight": framework.tensor(integers(OUT, FEATURES, 3, 3, seed=8) + 7),
        "bias": framework.tensor(integers(OUT, seed=8) + 7),
    }
    framework.load(layer, {**unused, **{f"conv.{name}": t for name, t in state.items()}})
    np.testing.assert_array_equal(framework.numbers(layer.bias), framework.numbers(state["bias"]))
    np.testing.assert_array_equal(
        framework.numbers(layer.weight), framework.numbers(state["weight"])
    )


@pytest.mark.parametrize(
    "shape",
    [
        (OUT, FEATURES + 2, 3, 2),
        (OUT + 1, FEATURES + 2, 3, 3),
        (OUT + 1, FEATURES, 3, 3),  # a plain convolution's, with other outputs
        (OUT, FEATURES + 2, 3),
        (OUT, FEATURES + 2),
    ],
)
def test_a_kernel_of_another_shape_is_the_frameworks_to_refuse(framework: Any, shape: Any) -> None:
    layer = pair(framework)[1]
    before = {name: array.copy() for name, array in layer.export_weights().items()}
    bias = framework.tensor(before["bias"])
    framework.refuse(layer, {"weight": framework.tensor(np.ones(shape, "f")), "bias": bias})
    for name, array in layer.export_weights().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    "shape",
    [(OUT, FEATURES + 3, 3, 3), (OUT, FEATURES + 1, 3, 3), (3, 3, FEATURES + 2, OUT)],
)
@pytest.mark.parametrize("prefix", ["", "conv."])
def test_a_kernel_of_other_channels_is_told_the_three_numbers(
    framework: Any, prefix: str, shape: Any
) -> None:
    layer = pair(framework)[1]
    before = {name: array.copy() for name, array in layer.export_weights().items()}
    state = {f"{prefix}weight": framework.tensor(np.ones(shape, "f"))}
    message = (
        rf"weight: a kernel must have {FEATURES + 2} input channels .* or {FEATURES} .*, "
        rf"got {shape[1]} in shape"
    )
    framework.refuse_channels(layer, state, message)
    for name, array in layer.export_weights().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_position_that_is_neither_word(framework: Any) -> None:
    plain, layer = pair(framework)
    with pytest.raises(ValueError, match="position must be one of .* got 'middle'"):
        framework.ours.adapt_state_dict(layer, plain.state_dict(), position="middle")


def test_sixteen_bits_pass_as_they_are(framework: Any) -> None:
    fused, layer = (framework.bfloat16(each) for each in pair(framework))
    plain = framework.bfloat16(framework.plain(2, False)(FEATURES, OUT, 3))
    for given in (fused, plain):
        state = dict(given.state_dict())
        framework.load(layer, state)
        assert layer.weight.dtype == state["weight"].dtype
        found, wanted = framework.numbers(layer.weight), framework.numbers(state["weight"])
        np.testing.assert_array_equal(found[:, : wanted.shape[1]], wanted)


def test_a_layer_with_a_conv_of_its_own(framework: Any) -> None:
    class Own(framework.coord(2, False)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(FEATURES, OUT, 3, coords=COORDS[2])
            self.conv = framework.plain(2, False)(OUT, OUT, 1)

    own = Own()
    state = filled(own, framework)
    framework.load(own, state)
    for found, name in ((own.conv.weight, "conv.weight"), (own.weight, "weight")):
        np.testing.assert_array_equal(framework.numbers(found), framework.numbers(state[name]))


def test_torch_may_make_parameters_of_what_it_is_given(torch: Any) -> None:
    """By ``assign=True``, the tensor itself where it fits, and else one of its own."""
    fused, layer = pair(torch)
    plain = torch.plain(2, False)(FEATURES, OUT, 3)
    for given in (fused, plain):
        layer.load_state_dict(dict(given.named_parameters()), assign=True)
        assert all(each.is_leaf and each.requires_grad for each in layer.parameters())
    kernel = plain.weight.detach().clone()
    with torch.torch.no_grad():
        layer.weight.zero_()
    assert torch.torch.equal(plain.weight, kernel)


def test_a_lazy_torch_layer_takes_one_when_it_knows_its_channels(torch: Any) -> None:
    plain, _ = pair(torch)
    for state in (filled(plain, torch), filled(torch.plain(2, False)(FEATURES, OUT, 3), torch)):
        lazy = torch.ours.LazyCoordConv2d(OUT, 3, coords=COORDS[2])
        lazy(torch.tensor(integers(1, FEATURES, 5, 5)))
        lazy.load_state_dict(state)
        given = state["weight"]
        assert torch.torch.equal(lazy.weight[:, : given.shape[1]], given)


def test_paddle_takes_arrays_and_its_own_names() -> None:
    if BACKENDS["paddle"].missing:
        pytest.skip("paddle is not installed")
    framework = Paddle()
    plain, layer = pair(framework)
    state = {name: tensor.numpy() for name, tensor in filled(plain, framework).items()}
    framework.load(layer, state)
    np.testing.assert_array_equal(layer.export_weights()["weight"], state["weight"])
    named = {tensor.name: tensor * 0 for tensor in layer.state_dict().values()}
    assert layer.set_state_dict(named, use_structured_name=False) == ([], [])
    assert not any(array.any() for array in layer.export_weights().values())
    features = {**state, "weight": state["weight"][:, :FEATURES]}
    for method in ("set_dict", "load_dict", "load_state_dict"):
        layer.import_weights({k: 0 * v for k, v in layer.export_weights().items()})
        getattr(layer, method)(features)
        found = layer.export_weights()["weight"]
        np.testing.assert_array_equal(found[:, :FEATURES], state["weight"][:, :FEATURES])
        assert not found[:, FEATURES:].any()


def test_paddles_own_names_mean_what_they_mean_to_paddle() -> None:
    if BACKENDS["paddle"].missing:
        pytest.skip("paddle is not installed")
    framework = Paddle()
    layer = framework.coord(2, False)(FEATURES, OUT, 3, weight_attr="weight", bias_attr=False)
    before = layer.export_weights()
    state = {"weight": framework.tensor(integers(OUT, FEATURES, 3, 3))}  # not to be filled up
    with pytest.warns(UserWarning, match="Skip loading for weight"):
        missing, _ = layer.set_state_dict(state, use_structured_name=False)
    assert missing == ["weight"]
    np.testing.assert_array_equal(layer.export_weights()["weight"], before["weight"])


# --- adopt ---------------------------------------------------------------------------------------


def theirs(arrays: dict[str, Any], x: Any, order: str) -> tuple[Any, list[Any]]:
    """The paper's classifier as a Keras user writes it, channels last; also each layer's input."""
    _, height, width, _ = x.shape
    rows, columns = np.meshgrid(
        np.arange(height) / (height - 1) * 2 - 1,
        np.arange(width) / (width - 1) * 2 - 1,
        indexing="ij",
    )
    grid = np.stack([{"y": rows, "x": columns}[axis] for axis in order], axis=-1)
    inputs = [np.concatenate([x, np.broadcast_to(grid, (*x.shape[:3], 2))], axis=-1)]
    for i in (1, 2, 3):
        kernel, bias = arrays[f"conv2d_{i}/kernel:0"], arrays[f"conv2d_{i}/bias:0"]
        inputs.append(np.maximum(inputs[-1] @ kernel[0, 0] + bias, 0 if i < 3 else -np.inf))
    return inputs.pop().reshape(len(x), -1), inputs


HEIGHT, WIDTH = 5, 7
CLASSIFIER = Network(
    "small_classifier",
    (2, HEIGHT, WIDTH),
    (
        Conv("conv1", 2, 16, ConvGeometry((1, 1)), Coordinates("xy")),
        ReLU(),
        Conv("conv2", 16, 16, ConvGeometry((1, 1))),
        ReLU(),
        Conv("conv3", 16, 1, ConvGeometry((1, 1))),
        Flatten("flatten"),
    ),
)
# Every target's x and y, tiled over the canvas, channels last.
TARGETS = np.array(
    [
        np.broadcast_to((x / (WIDTH - 1), y / (HEIGHT - 1)), (HEIGHT, WIDTH, 2))
        for y in range(HEIGHT)
        for x in range(WIDTH)
    ],
    np.float32,
)


@lru_cache
def checkpoint(order: str) -> dict[str, Any]:
    """Trained for a moment, by Adam in NumPy; the datasets in the order in which HDF5 has them."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for i, (inputs, outputs) in enumerate([(4, 16), (16, 16), (16, 1)], start=1):
        arrays[f"conv2d_{i}/bias:0"] = np.zeros(outputs)
        arrays[f"conv2d_{i}/kernel:0"] = (
            rng.normal(size=(1, 1, inputs, outputs)) * (2 / inputs) ** 0.5
        )
    mean = {name: np.zeros_like(array) for name, array in arrays.items()}
    square = {name: np.zeros_like(array) for name, array in arrays.items()}
    for step in range(1, 301):
        logits, inputs_of = theirs(arrays, TARGETS, order)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        dy = odds / odds.sum(axis=1, keepdims=True) - np.eye(len(TARGETS))
        dy = dy.reshape(*TARGETS.shape[:3], 1) / len(TARGETS)
        for i, given in zip((3, 2, 1), reversed(inputs_of), strict=True):
            kernel = arrays[f"conv2d_{i}/kernel:0"]
            gradients = {
                f"conv2d_{i}/kernel:0": np.einsum("nhwi,nhwo->io", given, dy)[None, None],
                f"conv2d_{i}/bias:0": dy.sum(axis=(0, 1, 2)),
            }
            dy = (dy @ kernel[0, 0].T) * (given > 0)
            for name, gradient in gradients.items():
                mean[name] = 0.9 * mean[name] + 0.1 * gradient
                square[name] = 0.99 * square[name] + 0.01 * gradient**2
                size = np.sqrt(square[name] / (1 - 0.99**step)) + 1e-8
                arrays[name] = arrays[name] - 0.02 * mean[name] / (1 - 0.9**step) / size
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def runs(backend: str, network: Network, weights: Any, x: Any) -> Any:
    module = backends.load(backend)
    return module.evaluate(module.build(network, weights), weights, x)[0]


@pytest.mark.parametrize("order", ["yx", "xy"])
def test_a_keras_checkpoint_gives_the_same_answers_everywhere(
    backend: str, order: str, tmp_path: Path
) -> None:
    arrays = checkpoint(order)
    network = CLASSIFIER.with_coordinates(order)
    weights = adopt(arrays, network, layout="hwio")
    answers, _ = theirs(arrays, TARGETS.astype(np.float64), order)
    x = np.moveaxis(TARGETS, -1, 1)
    bound = expected(network, weights, x, np.zeros_like(answers))["y"].bound
    wanted = Expected(answers, bound)
    assert wanted.error(runs(backend, network, weights, x)) <= 1

    # Through a file, and in a network whose channels are in the other order.
    save_weights(tmp_path / "w.safetensors", weights)
    other = CLASSIFIER.with_coordinates(order[::-1])
    found = runs(backend, other, load_weights(tmp_path / "w.safetensors"), x)
    assert wanted.error(found) <= 1

    # It has learned where things are, so the wrong convention has it look elsewhere.
    right = answers.argmax(axis=1)
    assert (right == np.arange(len(TARGETS))).mean() > 0.5
    np.testing.assert_array_equal(found.argmax(axis=1), right)
    mistaken = runs(backend, other, adopt(arrays, other, layout="hwio"), x)
    assert wanted.error(mistaken) > 1
    assert (mistaken.argmax(axis=1) == right).mean() < 0.5


def test_the_papers_classifier_with_kerass_names_and_coordinates() -> None:
    network = networks.get("coord_classifier").with_coordinates(Coordinates.named("keras"))
    weights = networks.initial_weights(network)
    given = {}
    for i in range(1, 6):
        given[f"conv2d_{i}/conv2d_{i}/bias:0"] = weights[f"conv{i}.bias"]
        given[f"conv2d_{i}/conv2d_{i}/kernel:0"] = as_hwio(weights[f"conv{i}.weight"])
    found = adopt(given, network, layout="hwio")
    assert list(found) == list(weights)
    assert found.coordinates == {"conv1": Coordinates("yx")}
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


DENSE = Network(
    "dense",
    (2, 5, 9),
    (
        Conv("conv1", 2, 3, ConvGeometry((3, 3), stride=(1, 2)), Coordinates("yx")),
        ReLU(),
        Flatten("flatten"),
        ReLU(),
        Linear("linear1", 36, 5),
        ReLU(),
        Linear("linear2", 5, 5),
    ),
)


def dense_arrays() -> dict[str, Any]:
    shapes = {
        "conv/kernel:0": (3, 3, 4, 3),
        "conv/bias:0": (3,),
        "dense/kernel:0": (36, 5),
        "dense/bias:0": (5,),
        "dense_1/kernel:0": (5, 5),
        "dense_1/bias:0": (5,),
    }
    return {name: integers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def test_features_whose_channels_came_last_before_they_were_flattened(backend: str) -> None:
    """To the last bit: every sum is exact."""
    arrays = dense_arrays()
    x = integers(3, 2, 5, 9, seed=7)
    z = np.moveaxis(concatenated(x, Coordinates("yx"), 1), 1, -1)
    windows = np.lib.stride_tricks.sliding_window_view(z, (3, 3), axis=(1, 2))[:, :, ::2]
    y = np.einsum("nhwcij,ijco->nhwo", windows, arrays["conv/kernel:0"]) + arrays["conv/bias:0"]
    y = np.maximum(y, 0).reshape(len(x), -1)
    y = np.maximum(y @ arrays["dense/kernel:0"] + arrays["dense/bias:0"], 0)
    y = y @ arrays["dense_1/kernel:0"] + arrays["dense_1/bias:0"]
    weights = adopt(arrays, DENSE, layout="hwio")
    np.testing.assert_array_equal(runs(backend, DENSE, weights, x), y)


def network_of_one(rank: int, groups: int, transposed: bool) -> Network:
    geometry = ConvGeometry((3, 2, 2)[:rank], groups=groups, transposed=transposed)
    sizes = groups * FEATURES, groups * OUT
    layer = Conv("c", *sizes, geometry, coords=COORDS[rank], bias=groups > 1)
    return Network("one", (groups * FEATURES, *SHAPES[rank]), (layer,))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layout", ["oihw", "hwio"])
@pytest.mark.parametrize(("rank", "groups", "transposed"), KINDS)
def test_every_kind_of_layer_is_adopted(
    rank: int, groups: int, transposed: bool, layout: Any, position: Any
) -> None:
    network, fused = network_of_one(rank, groups, transposed), kernel_of(rank, groups, transposed)
    given = {"kernel": fused if layout == "oihw" else as_hwio(fused)}
    if groups > 1:
        given["bias"] = integers(groups * OUT)
    found = adopt(given, network, layout=layout, position=position)
    options = groups, transposed
    parts = split_kernel(fused, COORDS[rank], *options, position=position)
    np.testing.assert_array_equal(found["c.weight"], join_kernel(*parts, *options), strict=True)
    assert not np.shares_memory(found["c.weight"], given["kernel"])  # ours, and no view of theirs


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layout", ["oihw", "hwio"])
@pytest.mark.parametrize(("rank", "groups", "transposed"), KINDS)
def test_a_plain_convolutions_kernel_is_given_zeros_for_the_coordinates(
    rank: int, groups: int, transposed: bool, layout: Any, position: Any
) -> None:
    plain = kernel_of(rank, groups, transposed, coordinates=False)
    given = {"c.weight": plain if layout == "oihw" else as_hwio(plain)}
    if groups > 1:
        given["c.bias"] = integers(groups * OUT)
    network = network_of_one(rank, groups, transposed)
    found = adopt(given, network, layout=layout, position=position)["c.weight"]
    features, coordinates = split_kernel(found, COORDS[rank], groups, transposed)
    np.testing.assert_array_equal(features, plain, strict=True)
    assert not coordinates.any()
    assert coordinates.dtype == plain.dtype


def test_arrays_in_pytorchs_layout() -> None:
    given = networks.initial_weights(DENSE)
    found = adopt(dict(reversed(given.items())), DENSE, layout="oihw")
    assert list(found) == list(given)
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
        assert not np.shares_memory(found[name], array)


@pytest.mark.parametrize("layout", ["oihw", "hwio"])
def test_a_convolution_inside_a_layer(layout: Any) -> None:
    """Under ``conv.``, beside the kernel of walsvid's outer layer, which that never uses."""
    arrays = dense_arrays()
    wanted = adopt(arrays, DENSE, layout="hwio")
    given = dict(wanted)
    if layout == "hwio":
        names = ("conv1.weight", "linear1.weight", "linear2.weight")
        given |= zip(names, (a for n, a in arrays.items() if "kernel" in n), strict=True)
    given = {n.replace("conv1.", "conv1.conv."): a for n, a in given.items()}
    unused = {"conv1.weight": np.full((7, 7), 7.0), "conv1.bias": np.full(7, 7.0)}
    for state in (given, given | unused):
        found = adopt(state, DENSE, layout=layout)
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
    assert adopt({**given, **unused}, DENSE, layout=layout).coordinates == DENSE.coordinates()


def test_names_may_say_which_is_which() -> None:
    arrays = dense_arrays()
    wanted = adopt(arrays, DENSE, layout="hwio")
    names = {
        "dense_1/kernel:0": "linear2.weight",
        "dense_1/bias:0": "linear2.bias",
        "conv/kernel:0": "conv1.weight",
        "conv/bias:0": "conv1.bias",
        "dense/kernel:0": "linear1.weight",
        "dense/bias:0": "linear1.bias",
    }
    shuffled = {name: arrays[name] for name in names}
    some = {names.get(n, n) if "conv" in n else n: a for n, a in shuffled.items()}
    for given in (shuffled, some):  # one that is called as ours needs no name
        found = adopt(
            given, DENSE, layout="hwio", names={n: o for n, o in names.items() if n in given}
        )
        assert list(found) == list(wanted)
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)


def test_what_cannot_be_adopted() -> None:
    arrays = dense_arrays()
    with pytest.raises(ValueError, match="layout must be one of"):
        adopt(arrays, DENSE, layout="HWIO")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="network must be one of"):
        adopt(arrays, "lenet", layout="hwio")
    with pytest.raises(ValueError, match="position must be one of .* got 'middle'"):
        adopt(arrays, DENSE, layout="hwio", position="middle")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="arrays must be a mapping .* got <class 'list'>"):
        adopt(list(arrays.items()), DENSE, layout="hwio")  # type: ignore[arg-type]


def test_all_problems_of_the_arrays_at_once() -> None:
    arrays = dense_arrays()
    arrays["conv/kernel:0"] = np.ones((3, 3, 7, 3))
    arrays["dense/bias:0"] = np.ones(5, int)
    del arrays["dense_1/bias:0"]
    arrays["more/kernel:0"] = np.ones((1, 1))
    with pytest.raises(ValueError, match="cannot import weights") as caught:
        adopt(arrays, DENSE, layout="hwio")
    assert str(caught.value).splitlines() == [
        "cannot import weights:",
        "  missing: linear2.bias, shape (5,)",
        "  wrong shape: conv1.weight (from 'conv/kernel:0' of shape (3, 3, 7, 3)) is (3, 7, 3, 3), "
        "want (3, 4, 3, 3): 7 input channels, where features and coordinates have 4, and features "
        "alone 2",
        "  not floating-point: linear1.bias (from 'dense/bias:0') is int64",
        "  unexpected: more/kernel:0, shape (1, 1)",
    ]


def test_all_problems_of_the_names_at_once() -> None:
    names = {"conv/kernel:0": "linear1.weight", "dense/kernel:0": "linear1.weight", "typo": "x"}
    with pytest.raises(ValueError, match="names") as caught:
        adopt(dense_arrays(), DENSE, layout="hwio", names=names)
    assert str(caught.value).splitlines() == [
        "names do not fit the arrays:",
        "  not among the arrays: 'typo'",
        "  two arrays for 'linear1.weight': 'dense/kernel:0' and another",
    ]


def test_other_coordinates_for_a_network() -> None:
    other = Coordinates("yxr", r_center=0.5)
    network = networks.get("coord_cnn").with_coordinates(other)
    assert network.coordinates() == {"conv4": other}
    assert network.weight_shapes()["conv4.weight"] == (64, 67, 3, 3)
    assert networks.get("coord_cnn").coordinates() == {"conv4": Coordinates("xy")}
    assert network.with_coordinates(None) == networks.get("coord_cnn")
    with pytest.raises(ValueError, match="'plain_cnn' has no CoordConv"):
        networks.get("plain_cnn").with_coordinates("xy")
    with pytest.raises(ValueError, match="axis 'z'"):
        network.with_coordinates("xyz")


# --- fitted --------------------------------------------------------------------------------------


def coord_cnn(coords: str = "xy") -> tuple[Network, dict[str, Any]]:
    network = networks.get("coord_cnn").with_coordinates(coords)
    return network, networks.initial_weights(network)


def test_what_fits_is_copied_in_the_networks_order() -> None:
    network, arrays = coord_cnn()
    found = fitted(dict(reversed(arrays.items())), network)
    assert list(found) == list(arrays)
    assert found.coordinates == network.coordinates()
    assert found.metadata == {"network": "coord_cnn"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
        assert not np.shares_memory(found[name], array)


def test_what_is_fitted_is_left_as_it_is() -> None:
    network, arrays = coord_cnn()
    arrays["conv4.conv.weight"] = arrays.pop("conv4.weight")[:, :64]
    given = dict(arrays)
    found = fitted(arrays, network)
    assert arrays.keys() == given.keys()
    assert all(arrays[name] is given[name] for name in given)
    np.testing.assert_array_equal(found["conv4.weight"][:, :64], given["conv4.conv.weight"])
    assert not found["conv4.weight"][:, 64:].any()


def test_coordinates_that_come_first() -> None:
    network, arrays = coord_cnn()
    kernel = arrays["conv4.weight"]
    given = {**arrays, "conv4.weight": np.concatenate([kernel[:, 64:], kernel[:, :64]], axis=1)}
    found = fitted(given, network, position="first")
    np.testing.assert_array_equal(found["conv4.weight"], kernel)
    with pytest.raises(ValueError, match="position must be one of .* got 'middle'"):
        fitted(given, network, position="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be 'last' for weights that carry their Coordinates"):
        fitted(Weights.of(network, arrays), network, position="first")


def test_a_network_with_a_layer_of_the_nested_name() -> None:
    geometry, coords = ConvGeometry((1,)), Coordinates("x")
    layers = Conv("a", 1, 1, geometry, coords), Conv("a.conv", 1, 1, geometry)
    network = Network("two", (1, 5), layers)
    arrays = networks.initial_weights(network)
    for found in (fitted(arrays, network), adopt(arrays, network, layout="oihw")):
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)


def test_weights_of_other_coordinates() -> None:
    """Another order is put in the network's; what is another coordinate is refused by name."""
    network, arrays = coord_cnn()
    made_for_yx = Weights.of(network.with_coordinates("yx"), arrays)
    found = fitted(made_for_yx, network)["conv4.weight"]
    np.testing.assert_array_equal(found, arrays["conv4.weight"][:, [*range(64), 65, 64]])
    np.testing.assert_array_equal(adopt(made_for_yx, network, layout="oihw")["conv4.weight"], found)
    renamed = Weights(
        {name.replace("conv4", "fourth"): array for name, array in arrays.items()},
        {"fourth": Coordinates("yx")},
    )
    names = {f"fourth.{name}": f"conv4.{name}" for name in ("weight", "bias")}
    adopted = adopt(renamed, network, layout="oihw", names=names)["conv4.weight"]
    np.testing.assert_array_equal(adopted, found)
    with pytest.raises(ValueError, match="must be 'last' for weights that carry their Coord"):
        adopt(made_for_yx, network, layout="oihw", position="first")
    other = Weights(arrays, {"conv4": Coordinates("xy", span=(0, 1))})
    with pytest.raises(ValueError, match=r"other coordinates: conv4.weight was made for .*, want"):
        fitted(other, network)


def test_a_kernel_that_fits_neither_is_told_with_all_other_problems() -> None:
    network, arrays = coord_cnn()
    arrays["conv4.conv.weight"] = np.ones((64, 65, 3, 3))
    del arrays["linear2.bias"]
    with pytest.raises(ValueError, match="cannot import weights") as caught:
        fitted(arrays, network)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: linear2.bias, shape (1,)",
        "  wrong shape: conv4.weight is (64, 65, 3, 3), want (64, 66, 3, 3): 65 input channels, "
        "where features and coordinates have 66, and features alone 64",
    ]
