"""Quantized to int8: a CoordConv as a convolution behind a concatenation, or refused by name."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

from coordconv import Coordinates, coordinate_grid, position_bias
from coordconv.backends.torch import (
    AddCoords,
    CoordConv1d,
    CoordConv2d,
    CoordConvTranspose2d,
    fuse,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
C, SIZE = 8, (12, 12)
ALLOWED = 0.02  # of the output, by root mean squares: int8 has 1/127 of the largest value


class Concatenated(nn.Module):
    """What others write: a concatenation and torch's own convolution."""

    def __init__(self, layer, plain=nn.Conv2d):
        super().__init__()
        self.add = AddCoords(layer.coords, rank=layer.rank)
        options = {"padding": layer.padding, "padding_mode": layer.padding_mode}
        channels = layer.in_channels + len(layer.coords)
        self.conv = plain(channels, layer.out_channels, layer.kernel_size, **options)
        self.conv.load_state_dict(layer.state_dict())

    def forward(self, x):
        return self.conv(self.add(x))


def network(**options):
    """A CoordConv whose coordinates matter as much as its features do, and plain layers."""
    torch.manual_seed(3)
    layer = CoordConv2d(C, 16, 3, padding=1, **options)
    with torch.no_grad():
        layer.weight[:, -len(layer.coords) :] *= 4
    return nn.Sequential(layer, nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))


def concatenated(model):
    return nn.Sequential(Concatenated(model[0]), *copy.deepcopy(list(model)[1:])).eval()


def images(batch=32):
    return torch.randn(batch, C, *SIZE, generator=torch.Generator().manual_seed(1))


def error(found, wanted):
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def test_the_coordinates_matter_more_than_the_errors_allowed():
    """So that no test here passes with coordinates dropped."""
    model = network().eval()
    without = copy.deepcopy(model)
    with torch.no_grad():
        without[0].weight[:, C:] = 0
        assert error(without(images()), model(images())) > 10 * ALLOWED


class TestPT2E:
    """torchao's quantizer for torch.compile, of a program of torch.export."""

    @pytest.fixture(autouse=True, scope="class")
    def _torchao(self):
        pytest.importorskip("torchao")

    def exported(self, model, strict=True, training=False):
        model.train(training)
        batch = {0: torch.export.Dim.DYNAMIC}
        return torch.export.export(
            model, (images(4),), dynamic_shapes=(batch,), strict=strict
        ).module()

    def quantized(self, program, dynamic=False, training=False):
        from torchao.quantization.pt2e import move_exported_model_to_eval
        from torchao.quantization.pt2e.quantize_pt2e import (
            convert_pt2e,
            prepare_pt2e,
            prepare_qat_pt2e,
        )
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

        config = get_default_x86_inductor_quantization_config(is_dynamic=dynamic, is_qat=training)
        quantizer = X86InductorQuantizer().set_global(config)
        prepared = (prepare_qat_pt2e if training else prepare_pt2e)(program, quantizer)
        prepared(images())
        if training:
            move_exported_model_to_eval(prepared)
        return convert_pt2e(prepared)

    def convolutions(self, program):
        """Whether input and kernel of each convolution come from int8."""
        return [
            all("dequantize" in str(node.args[i].target) for i in (0, 1))
            for node in program.graph.nodes
            if str(node.target).startswith("aten.conv")
        ]

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    @pytest.mark.parametrize(
        "options",
        [{}, {"coords": "xyr"}],
        ids=["xy", "xyr"],
    )
    def test_is_the_concatenation_to_the_bit(self, options, dynamic):
        model = network(**options).eval()
        x, (ours, theirs) = (
            images(),
            (self.quantized(self.exported(each), dynamic) for each in (model, concatenated(model))),
        )
        assert self.convolutions(ours) == self.convolutions(theirs) == [True] * 3
        assert torch.equal(ours(x), theirs(x))
        assert 0 < error(ours(x), model(x)) <= ALLOWED

    def test_with_padding_that_is_a_function_of_its_own(self):
        """Which the quantizer refuses behind a concatenation: it takes it for the convolution."""
        model = network(padding_mode="reflect").eval()
        found = self.quantized(self.exported(model))
        assert self.convolutions(found) == [True] * 3
        assert 0 < error(found(images()), model(images())) <= ALLOWED
        with pytest.raises(ValueError, match="pad is not an aten conv2d operator"):
            self.quantized(self.exported(concatenated(model)))

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    @pytest.mark.parametrize(
        "options", [{"groups": 2}, {"coords": Coordinates("xy", outside="extend")}]
    )
    def test_as_a_map_both_parts_of_the_kernel_are_quantized(self, options, dynamic):
        model = network(**options).eval()
        found = self.quantized(self.exported(model), dynamic)
        assert self.convolutions(found) == [True] * 4
        assert 0 < error(found(images()), model(images())) <= ALLOWED

    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_fused(self, dynamic, strict):
        model = network().eval()
        fused = fuse(model, SIZE)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            program = self.exported(fused, strict)
        found = self.quantized(program, dynamic)
        assert self.convolutions(found) == [True] * 3
        assert 0 < error(found(images()), model(images())) <= ALLOWED

    def test_what_would_stay_in_float_is_said(self):
        """The quantizer knows a convolution of this program by the class of its module alone."""
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer  # noqa: F401

        model = network().eval()
        with pytest.warns(UserWarning, match="export with strict=True, or fuse the network first"):
            program = self.exported(model, strict=False)
        assert self.convolutions(self.quantized(program)) == [False, True, True]

    def test_1d(self):
        model = nn.Sequential(CoordConv1d(C, 16, 3, padding=1), nn.ReLU()).eval()
        x = images()[..., 0]
        program = torch.export.export(model, (x,), strict=True).module()
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        config = x86.get_default_x86_inductor_quantization_config()
        prepared = prepare_pt2e(program, x86.X86InductorQuantizer().set_global(config))
        prepared(x)
        found = convert_pt2e(prepared)
        assert self.convolutions(found) == [True]
        assert 0 < error(found(x), model(x)) <= ALLOWED

    def test_trained_with_fake_quantization(self):
        """The batch normalization is folded as after a plain convolution."""
        model = nn.Sequential(network()[0], nn.BatchNorm2d(16), nn.ReLU())
        plain = nn.Sequential(Concatenated(model[0]), *copy.deepcopy(list(model)[1:]))
        x, (ours, theirs) = (
            images(),
            (
                self.quantized(self.exported(each, training=True), training=True)
                for each in (model, plain)
            ),
        )
        assert self.convolutions(ours) == [True]
        assert not any("batch_norm" in str(node.target) for node in ours.graph.nodes)
        torch.testing.assert_close(ours(x), theirs(x))


class TestWeightOnly:
    @pytest.fixture(autouse=True, scope="class")
    def _torchao(self):
        pytest.importorskip("torchao")

    def test_of_a_linear_layer_behind_coordinates(self):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        torch.manual_seed(0)
        model = nn.Sequential(CoordConv2d(C, 4, 3), AddCoords(), nn.Flatten(), nn.Linear(600, 64))
        x, kernel = images(), model[0].weight.detach().clone()
        wanted = model(x)
        quantize_(model, Int8WeightOnlyConfig())
        assert type(model[-1].weight).__name__ == "Int8Tensor"
        assert torch.equal(model[0].weight, kernel)  # convolutions are left alone
        assert 0 < error(model(x), wanted) <= ALLOWED

    @pytest.mark.parametrize("way", [None, position_bias.APPEND, position_bias.MAP])
    def test_of_a_convolution_is_refused(self, way, monkeypatch):
        """As that of torch's own is: torchao has no convolution with such a weight."""
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        monkeypatch.setattr(position_bias, "FORCED", way)
        for layer in (nn.Conv2d(C, 16, 3), CoordConv2d(C, 16, 3)):
            model = nn.Sequential(layer).eval()
            quantize_(
                model, Int8WeightOnlyConfig(), filter_fn=lambda m, _: isinstance(m, nn.Conv2d)
            )
            with pytest.raises((NotImplementedError, ValueError), match="Int8Tensor|qdata"):
                model(images())


ENGINE = "x86"
with_engine = pytest.mark.skipif(
    ENGINE not in torch.backends.quantized.supported_engines, reason=f"no engine {ENGINE}"
)


@with_engine
class TestEagerMode:
    def prepared(self, model, training=False):
        import torch.ao.quantization as ao

        model = ao.QuantWrapper(copy.deepcopy(model)).train(training)
        name = ao.get_default_qat_qconfig if training else ao.get_default_qconfig
        model.qconfig = name(ENGINE)
        prepared = (ao.prepare_qat if training else ao.prepare)(model)
        prepared(images())
        return prepared.eval()

    @pytest.mark.parametrize("training", [False, True])
    def test_is_refused(self, training):
        from torch.ao.quantization import convert

        model = convert(self.prepared(network(), training))
        assert type(model.module[2]) is not nn.Conv2d  # what it can it has quantized
        with pytest.raises(TypeError, match="eager mode leaves this layer in float, PT2E"):
            model(images())

    def test_with_a_mapping_too(self):
        from torch.ao.nn import quantized
        from torch.ao.quantization import convert
        from torch.ao.quantization.quantization_mappings import (
            get_default_static_quant_module_mappings,
        )

        mapping = get_default_static_quant_module_mappings() | {CoordConv2d: quantized.Conv2d}
        with pytest.raises(AssertionError, match="only works for Conv2d but got: ?.*CoordConv2d"):
            convert(self.prepared(network()), mapping=mapping)

    def test_between_stubs_the_rest_is_quantized(self):
        """A CoordConv before the first stub stays in float, as it was asked to."""
        import torch.ao.quantization as ao

        first, *rest = network()
        model = nn.Sequential(first, ao.QuantStub(), *rest, ao.DeQuantStub()).eval()
        x, wanted = images(), model(images())
        for layer in list(model)[1:]:
            layer.qconfig = ao.get_default_qconfig(ENGINE)
        prepared = ao.prepare(model)
        prepared(x)
        found = ao.convert(prepared)
        assert type(found[0]) is CoordConv2d
        assert 0 < error(found(x), wanted) <= 2 * ALLOWED  # 7 bits: the engine's reduce_range


@with_engine
@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="torch.fx traces no range of open length"
)
class TestFXGraphMode:
    def prepared(self, model, custom=None):
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_fx

        x, mapping = images(), get_default_qconfig_mapping(ENGINE)
        prepared = prepare_fx(copy.deepcopy(model), mapping, (x,), prepare_custom_config=custom)
        prepared(x)
        return prepared

    def test_the_whole_kernel_is_quantized(self):
        from torch.ao.quantization.quantize_fx import convert_fx

        model, x = network().eval(), images()
        found = convert_fx(self.prepared(model))
        packed = getattr(found, "0_packed_weight_0").unpack()[0]
        assert packed.shape == model[0].weight.shape
        theirs = convert_fx(self.prepared(concatenated(model)))
        allowed = 1.1 * error(theirs(x), model(x))
        assert 0 < error(found(x), model(x)) <= allowed <= 3 * ALLOWED  # 7 bits, each way

    @pytest.mark.parametrize(
        "layer",
        [
            lambda: CoordConvTranspose2d(C, 16, 3),
            lambda: CoordConv2d(C, 16, 3, groups=2),
            lambda: CoordConv2d(C, 16, 3, coords=Coordinates("xy", outside="extend")),
        ],
        ids=["transposed", "groups", "extend"],
    )
    def test_what_it_gets_wrong_is_refused(self, layer):
        from torch.ao.quantization.quantize_fx import convert_fx

        model, x = nn.Sequential(layer(), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval(), images()
        with pytest.raises(NotImplementedError, match="use PT2E, or list its class as"):
            self.prepared(model)
        left = {"non_traceable_module_class": [type(model[0])]}
        found = convert_fx(self.prepared(model, left))
        assert 0 < error(found(x), model(x)) <= 2 * ALLOWED


class TestONNXRuntime:
    """A network that names the pixel at a target's x and y, tiled over the canvas.

    It needs no training: its output is minus the distance between the target and each position.
    """

    CANVAS = 32

    @pytest.fixture(autouse=True, scope="class")
    def _onnx(self):
        for name in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(name)

    def model(self):
        model = nn.Sequential(CoordConv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1), nn.Flatten())
        with torch.no_grad():
            features = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])
            model[0].weight.copy_(torch.cat([features, -features], 1)[..., None, None])
            model[2].weight.fill_(-1)
            model[0].bias.zero_()
            model[2].bias.zero_()
        return model.eval()

    def inputs(self):
        """Of every position in turn."""
        grid = coordinate_grid((self.CANVAS,) * 2).reshape(2, -1).T[:, :, None, None]
        return np.ascontiguousarray(np.broadcast_to(grid, (len(grid), 2, *(self.CANVAS,) * 2)))

    def exported(self, model, path):
        x = torch.zeros(2, 2, *(self.CANVAS,) * 2)
        shape = ({0: "batch"},)
        names = {"input_names": ["x"], "dynamic_shapes": shape}
        torch.onnx.export(
            model, (x,), path, dynamo=True, verbose=False, external_data=False, **names
        )

    def run(self, path):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": self.inputs()})[0]

    def quantized(self, kind, source, path):
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantType,
            quantize_dynamic,
            quantize_static,
        )

        if kind == "dynamic":
            quantize_dynamic(source, path, weight_type=QuantType.QUInt8)
            return
        batches = iter(np.split(self.inputs(), 8))

        class Reader(CalibrationDataReader):
            def get_next(self):
                batch = next(batches, None)
                return None if batch is None else {"x": batch}

        kinds = {"op_types_to_quantize": ["Conv", "Relu"], "per_channel": True}
        quantize_static(source, path, Reader(), **kinds)

    def operators(self, path):
        import onnx

        return Counter(node.op_type for node in onnx.load(path).graph.node)

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_answers_as_the_concatenation(self, kind, tmp_path):
        model, outputs = self.model(), {}
        variants = {
            "ours": model,
            "theirs": nn.Sequential(Concatenated(model[0]), *list(model)[1:]).eval(),
            "fused": fuse(model, (self.CANVAS,) * 2),
        }
        every = np.arange(self.CANVAS**2)
        for name, each in variants.items():
            plain, small = str(tmp_path / f"{name}.onnx"), str(tmp_path / f"{name}-{kind}.onnx")
            self.exported(each, plain)
            assert (self.run(plain).argmax(1) == every).all()
            self.quantized(kind, plain, small)
            outputs[name] = self.run(small)
            found = self.operators(small)
            assert found["ConvInteger"] == 2 * (kind == "dynamic")
            assert found["Conv"] == 2 * (kind == "static")
            if kind == "static":
                assert found["QuantizeLinear"] >= 2
        assert np.array_equal(outputs["ours"], outputs["theirs"])
        for name, output in outputs.items():
            right = (output.argmax(1) == every).mean()
            assert right >= 0.9, (name, right)


BLOCKS = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.M)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0])
def test_lines_to_paste(block, tmp_path, monkeypatch):
    """Those of docs/deployment.md that need more than a framework; the others run elsewhere."""
    for name in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE):
        pytest.importorskip(name)
    if "torch.onnx" in block:
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(PAGE), "exec"), {})


def test_there_are_such_lines():
    assert any("torchao" in block for block in BLOCKS)
    assert any("onnxruntime" in block for block in BLOCKS)
