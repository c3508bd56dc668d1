"""Networks and layers of Paddle that are given coordinates, and lose them.

What torch does alike is in ``test_changing_shared.py``.
"""

import copy
import gc
import importlib
from functools import partial

import pytest

paddle = pytest.importorskip("paddle")

import changing_cases
from changing_cases import Paddle, equal, set_training
from paddle import nn
from paddle.quantization import QAT, QuantConfig
from paddle.quantization.quanters import FakeQuanterWithAbsMaxObserver
from paddle.static import InputSpec

from coordconv import Coordinates
from coordconv.backends.paddle import (
    CoordConv2D,
    CoordConv2DTranspose,
    adapt_state_dict,
    add_coords,
    remove_coords,
)

FACE = Paddle()
network, images, refused = FACE.network, FACE.images, partial(changing_cases.refused, FACE)


def test_gradients_of_an_output_of_before_are_refused_by_paddle():
    model = network()
    output = model(images())
    add_coords(model)
    with pytest.raises(RuntimeError, match="(?i)inplace"):
        output.sum().backward()


def test_hooks_stay():
    model, calls = network(), []
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[0].register_forward_post_hook(lambda *_: calls.append("after"))
    model[0].weight.register_hook(lambda gradient: calls.append(tuple(gradient.shape)))
    add_coords(model)
    model(images()).sum().backward()
    assert calls == ["before", "after", (8, 5, 3, 3)]
    remove_coords(model)
    calls.clear()
    model(images()).sum().backward()
    assert calls == ["before", "after", (8, 3, 3, 3)]


def test_flags_types_and_names_stay():
    model = network()
    model.to(dtype="float64")
    model[4].to(dtype="bfloat16")
    model[0].weight.stop_gradient = True
    model[0].weight.optimize_attr["learning_rate"] = 0.5
    model[3].eval()
    model[0].note = "mine"
    before = {name: (id(p), p.name, p.dtype) for name, p in model.named_parameters()}
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    add_coords(model)
    assert before == {name: (id(p), p.name, p.dtype) for name, p in model.named_parameters()}
    assert buffers == {name: id(buffer) for name, buffer in model.named_buffers()}
    assert model[0].weight.stop_gradient
    assert not model[0].bias.stop_gradient
    assert model[0].weight.optimize_attr["learning_rate"] == 0.5
    assert model[0].training
    assert not model[3].training
    assert model[4].weight.dtype == paddle.bfloat16
    assert tuple(model[4].weight.shape) == (16, 10, 3, 3)
    assert not model[4].weight[:, 8:].astype("float32").any()
    assert model[0].note == "mine"


def test_a_network_of_float64():
    model, x = set_training(network(), False), images().astype("float64")
    model.to(dtype="float64")
    wanted = model(x)
    add_coords(model)
    assert equal(model(x), wanted)


@pytest.mark.parametrize("transposed", [False, True])
def test_channels_last(transposed):
    model = nn.Sequential(FACE.conv(4, 8, 3, groups=2, transposed=transposed, data_format="NHWC"))
    x = images(2, 9, 9, 4)
    wanted = model(x)
    add_coords(model)
    assert equal(model(x), wanted)
    FACE.fill(model[0].weight)
    position = model[0](x)
    features = nn.Sequential(copy.deepcopy(model[0]))
    remove_coords(features)
    rest = features(x).numpy()
    variance = (position.numpy() - rest).var((0, 1, 2)).sum()
    share = remove_coords(model, x).layers[0].variance_share
    assert share == pytest.approx(variance / (variance + rest.var((0, 1, 2)).sum()), rel=1e-3)
    assert equal(model(x), features(x))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_computed_kernels_are_refused_by_name(norm):
    model = network()
    norm(model[0])
    refused(model, "0: its weight is computed from other parameters by a hook")
    refused(model, "0: its weight is computed", layers="0")
    add_coords(model, exclude="0")
    assert type(model[0]) is nn.Conv2D
    assert type(model[4]) is CoordConv2D


@pytest.mark.filterwarnings("ignore:The program will return to single-card operation")
def test_wrappers_and_what_is_inside_of_them_are_refused():
    model = network()
    wrapped = paddle.DataParallel(model)
    refused(wrapped, "as it is before DataParallel wraps it: change what is inside model")
    refused(nn.Sequential(wrapped), "before DataParallel wraps it: change what is inside 0")
    refused(model, "inside of a DataParallel")
    refused(model[0], "inside of a DataParallel")
    del wrapped
    gc.collect()
    assert len(add_coords(model).layers) == 4


@pytest.mark.parametrize(
    "name",
    [
        "meta_parallel.PipelineParallel",
        "meta_parallel.SegmentParallel",
        "meta_parallel.ShardingParallel",
        "meta_parallel.TensorParallel",
        "meta_parallel.sharding.group_sharded_stage2.GroupShardedStage2",
        "meta_parallel.sharding.group_sharded_stage3.GroupShardedStage3",
        "utils.mix_precision_utils.MixPrecisionLayer",
    ],
)
def test_fleets_wrappers_are_refused(name):
    """They need several devices to be constructed, of which their classes tell nothing."""
    module, _, kind = name.rpartition(".")
    cls = getattr(importlib.import_module(f"paddle.distributed.fleet.{module}"), kind)
    wrapper = cls.__new__(cls)
    nn.Layer.__init__(wrapper)
    inside = wrapper.layers = network()
    refused(wrapper, f"as it is before {kind} wraps it")
    refused(inside, f"inside of a {kind}")


def test_quantized_layers_are_refused():
    quanter = FakeQuanterWithAbsMaxObserver(moving_rate=0.9)
    config = QuantConfig(activation=None, weight=None)
    config.add_type_config(nn.Conv2D, weight=quanter)
    quantized = QAT(config).quantize(network())
    refused(quantized, "model is quantized .0 is a QuantedConv2D.")


def test_layers_without_values_are_refused():
    with paddle.LazyGuard():
        model = network()
    with pytest.raises(ValueError, match="0: its weight has no values yet: call initialize"):
        add_coords(model)
    for parameter in model.parameters():
        parameter.initialize()
    add_coords(model)


def test_static_mode_is_refused():
    model = network()
    paddle.enable_static()
    try:
        refused_in = pytest.raises(ValueError, match="static mode: call paddle.disable_static")
        with refused_in:
            add_coords(model)
        program = nn.Conv2D(3, 8, 3)
    finally:
        paddle.disable_static()
    assert type(model[0]) is nn.Conv2D
    with pytest.raises(ValueError, match="made in static mode"):
        add_coords(program)


def test_a_forward_of_an_instance_is_refused():
    model = network()
    model[0].forward = lambda x: x
    refused(model, "0: its forward was replaced on the instance")


def test_what_was_traced_as_a_whole_is_refused():
    model, x = set_training(network(), False), images()
    wanted = model(x)
    traced = paddle.jit.to_static(model, full_graph=True)
    add_coords(model, layers="0").undo()  # as nothing was traced so far
    traced(x)
    refused(model, "model was traced by to_static with full_graph")
    refused(nn.Sequential(traced), "0 was traced by to_static with full_graph")
    model.forward.rollback()
    add_coords(model)
    assert equal(model(x), wanted)
    found = paddle.jit.to_static(model, full_graph=True)(x)
    assert (found - wanted).abs().max() <= 1e-5


def test_what_was_traced_in_parts_is_refused():
    """Such a program is found by the layers' identities, which stay."""
    model, x = set_training(network(), False), images()
    paddle.jit.to_static(lambda x: model(x), full_graph=False)(x)
    refused(model, "0: its forward was replaced on the instance, by hand or by to_static")
    model = set_training(network(), False)
    add_coords(model)
    FACE.fill(model[0].weight)
    wanted = model(x)
    traced = paddle.jit.to_static(model, full_graph=False)
    assert (traced(x) - wanted).abs().max() <= 1e-4
    remove_coords(model)  # our layers are not in the program, but called by it
    wanted = model[5](model[4](model[3](nn.functional.relu(model[1](model[0](x))))))
    assert (traced(x) - wanted).abs().max() <= 1e-4


def test_saved_and_loaded(tmp_path):
    model, x = set_training(network(), False), images()
    add_coords(model)
    for parameter in model.parameters():
        FACE.fill(parameter)
    shape = [InputSpec([None, *x.shape[1:]], "float32")]
    paddle.jit.save(model, str(tmp_path / "model"), input_spec=shape)
    found, wanted = paddle.jit.load(str(tmp_path / "model"))(x), model(x)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_checkpoint_of_before_that_is_not_adapted_is_warned_of():
    model = network()
    state = copy.deepcopy(model.state_dict())
    add_coords(model)
    with pytest.warns(UserWarning, match=r"0.weight receives a shape \[8, 3, 3, 3\]"):
        model.set_state_dict(state)
    missing, unexpected = model.set_state_dict(adapt_state_dict(model, state))
    assert not missing + unexpected


def trained(optimizer, model, x):
    model(x).square().mean().backward()
    optimizer.step()


OTHER_USES = {
    "minimize": lambda optimizer, loss, _: optimizer.minimize(loss),
    "apply_gradients": lambda optimizer, _, kernel: optimizer.apply_gradients([(kernel, kernel)]),
    "scaler": lambda optimizer, loss, _: paddle.amp.GradScaler(enable=False).step(optimizer),
}


@pytest.mark.parametrize("use", OTHER_USES)
def test_every_use_of_an_optimizer_of_before_is_refused(use):
    model, x = network(), images()
    optimizer = paddle.optimizer.Momentum(0.1, parameters=model.parameters())
    trained(optimizer, model, x)
    changes = add_coords(model)
    model(x).mean().backward()
    loss = model(x).mean()
    with pytest.raises(RuntimeError, match="call update_optimizer"):
        OTHER_USES[use](optimizer, loss, model[0].weight)
    changes.update_optimizer(optimizer)
    OTHER_USES[use](optimizer, loss, model[0].weight)


def test_optimizers_around_an_optimizer():
    model, x = network(), images()
    inner = paddle.optimizer.Momentum(0.01, parameters=model.parameters())
    ahead = paddle.incubate.LookAhead(inner, k=1)
    average = paddle.incubate.ModelAverage(
        0.15, parameters=model.parameters(), min_average_window=2, max_average_window=4
    )
    for each in (ahead, average):
        trained(each, model, x)
    changes = add_coords(model)
    model(x).mean().backward()
    for use in (ahead.step, inner.step, average.step, average.restore, average.apply):
        with pytest.raises(RuntimeError, match="call update_optimizer"):
            use()
    changes.update_optimizer(inner)
    with pytest.raises(RuntimeError, match="call update_optimizer"):
        ahead.step()
    for each in (ahead, average):
        changes.update_optimizer(each)
        trained(each, model, x)
    with average.apply():
        assert tuple(model[0].weight.shape) == (8, 5, 3, 3)
        model(x)
    assert tuple(model[0].weight.shape) == (8, 5, 3, 3)


def test_optimizers_that_cannot_be_updated():
    model, x = network(), images()
    parameters = model.parameters()
    averaged = paddle.optimizer.ASGD(0.01, batch_num=2, parameters=parameters)
    flat = paddle.optimizer.LBFGS(0.01, parameters=parameters)
    trained(averaged, model, x)

    def closure():
        flat.clear_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    flat.step(closure)
    changes = add_coords(model)
    with pytest.raises(RuntimeError, match="call update_optimizer"):
        averaged.step()
    with pytest.raises(ValueError, match=r"keeps 'y' of shape \(2, 8, 3, 3, 3\).* new ASGD"):
        changes.update_optimizer(averaged)
    with pytest.raises(ValueError, match="make a new LBFGS"):
        changes.update_optimizer(flat)
    with pytest.raises(ValueError, match="none of the kernels"):
        changes.update_optimizer(paddle.optimizer.SGD(0.1, nn.Linear(2, 2).parameters()))
    with pytest.raises(TypeError, match=r"must be a paddle.optimizer.Optimizer, got dict"):
        changes.update_optimizer({})
    changes.update_optimizer(paddle.optimizer.Adam(parameters=parameters))  # which has not stepped


def test_master_weights_of_before_are_refused():
    """No processor convolves 16 bits in Paddle, nor steps them: so the master weight is all."""
    conv = nn.Conv2D(3, 8, 3)
    conv.to(dtype="bfloat16")
    kinds = {"multi_precision": True, "parameters": conv.parameters()}
    optimizer = paddle.optimizer.Adam(0.1, **kinds)
    conv.weight.grad = paddle.ones_like(conv.weight)
    with pytest.raises(RuntimeError, match="(?i)kernel"):
        optimizer.step()
    assert optimizer.state_dict()["master_weights"]
    changes = add_coords(conv)
    conv.weight.grad = paddle.ones_like(conv.weight)
    with pytest.raises(RuntimeError, match="call update_optimizer"):
        optimizer.step()
    with pytest.raises(ValueError, match=f"master weights of {conv.weight.name}.* new Adam"):
        changes.update_optimizer(optimizer)


def test_an_optimizers_state_of_before_is_refused_by_paddle():
    model, x = network(), images()
    optimizer = paddle.optimizer.Momentum(0.1, parameters=model.parameters())
    trained(optimizer, model, x)
    before = {name: state.clone() for name, state in optimizer.state_dict().items()}
    changes = add_coords(model)
    changes.update_optimizer(optimizer)
    with pytest.raises(AssertionError, match="Variable Shape not match"):
        optimizer.set_state_dict(before)


def test_parameters_whose_names_begin_alike():
    """A copy's name is the name and more, and so are the names of what is kept for it."""
    model, x = nn.Sequential(nn.Conv2D(3, 4, 3)), images()
    model.append(nn.Conv2D(3, 4, 3))
    model[1].weight.name = f"{model[0].weight.name}_velocity"
    optimizer = paddle.optimizer.Momentum(0.1, parameters=model.parameters())
    for layer in model:
        layer(x).sum().backward()
    optimizer.step()
    add_coords(model, layers="0").update_optimizer(optimizer)
    for layer in model:
        layer(x).sum().backward()
    optimizer.step()
    shapes = {tuple(state.shape) for state in optimizer.state_dict().values()}
    assert shapes == {(4, 5, 3, 3), (4, 3, 3, 3), (4,)}


@pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
@pytest.mark.parametrize("cls", [CoordConv2D, CoordConv2DTranspose])
def test_from_conv(cls, data_format):
    paddle.seed(0)
    plain = getattr(nn, cls.__name__.removeprefix("Coord"))
    conv = plain(4, 8, 3, stride=2, groups=2, data_format=data_format)
    conv.weight.stop_gradient = True
    x = paddle.randn([2, 4, 9, 9] if data_format == "NCHW" else [2, 9, 9, 4])
    layer = cls.from_conv(conv, "xyr")
    assert paddle.equal_all(layer(x), conv(x))
    assert type(conv) is plain
    assert layer.map_only
    assert layer.coords == Coordinates("xyr")
    assert layer.weight.stop_gradient
    assert not layer.layout.split(layer.weight)[1].any()
    for wrong in (nn.Conv1D(3, 8, 3), nn.Linear(3, 8), layer, "conv"):
        with pytest.raises(TypeError, match=f"conv must be a paddle.nn.{plain.__name__}, got a"):
            cls.from_conv(wrong)
    with pytest.raises(ValueError, match="'z'"):
        cls.from_conv(conv, "xz")
    nn.utils.weight_norm(conv)
    with pytest.raises(ValueError, match="computed from other parameters"):
        cls.from_conv(conv)
