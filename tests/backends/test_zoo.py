"""Networks of other projects, with random weights: given coordinates, trained, exported, and back.

tox's ``zoo`` environment has the projects; with ``-s`` a table is printed at the end.
"""

import copy
import io
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
smp = pytest.importorskip("segmentation_models_pytorch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
onnxruntime = pytest.importorskip("onnxruntime")

from torch import nn
from torch.utils import _pytree as pytree  # what torch.export documents for its inputs

from coordconv.backends.torch import add_coords, fuse, remove_coords
from coordconv.layers import CoordLayer

STEPS = 10


class Output(nn.Module):
    """A network of a library that returns objects of its own, as tensors."""

    def __init__(self, model, *more):
        super().__init__()
        self.model, self.more = model, more

    def forward(self, x):
        found = self.model(x, *self.more)
        if hasattr(found, "to_tuple"):
            found = found.to_tuple()
        return tuple(leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor))


def of_timm(name, **options):
    return lambda: timm.create_model(name, pretrained=False, **options)


def segformer():
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, decoder_hidden_size=16, num_labels=3
    )
    return Output(transformers.SegformerForSemanticSegmentation(config))


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
    return Output(transformers.ConvNextForImageClassification(config))


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_labels=3,
    )
    return Output(transformers.DetrForObjectDetection(config))


def unet():
    model = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    )
    return Output(model, torch.tensor(10))


def segmentation():
    build = torchvision.models.segmentation.lraspp_mobilenet_v3_large
    return Output(build(weights=None, weights_backbone=None, num_classes=3))


class Detection(nn.Module):
    """A detector's losses where it is trained, and else what its head gives.

    Which boxes are left in the end follows from the order of scores, which no rounding may change.
    """

    def __init__(self):
        super().__init__()
        build = torchvision.models.detection.ssdlite320_mobilenet_v3_large
        self.model = build(weights=None, weights_backbone=None, num_classes=3)

    def forward(self, x):
        if self.training:
            box = torch.tensor([[5.0, 5.0, 40.0, 50.0]])
            return self.model([*x], [{"boxes": box, "labels": torch.tensor([1])} for _ in x])
        return self.model.head([*self.model.backbone(x).values()])


# Name: how it is built; the first convolution, and a block in it; the size of its input.
NETWORKS = {
    "timm resnet18": (of_timm("resnet18"), "conv1", "layer2", 64),
    "timm convnext_atto": (of_timm("convnext_atto"), "stem.0", "stages.1", 64),
    "timm mobilenetv3_small_050": (of_timm("mobilenetv3_small_050"), "conv_stem", "blocks.2", 64),
    "timm tf_efficientnet_lite0": (
        of_timm("tf_efficientnet_lite0"),
        "blocks.0.0.conv_pw",
        "blocks.0",
        64,
    ),
    "timm cspdarknet53": (of_timm("cspdarknet53"), "stem.conv1.conv", "stages.0", 64),
    # Of all its convolutions those are left that standardize their kernels.
    "timm nf_regnet_b0": (of_timm("nf_regnet_b0"), "stages.0.0.attn.fc1", "stages.1.0.attn", 64),
    "torchvision lraspp_mobilenet_v3_large": (
        segmentation,
        "backbone.0.0",
        "classifier",
        64,
    ),
    "torchvision ssdlite320_mobilenet_v3_large": (
        Detection,
        "features.0.0.0",
        "head.regression_head",
        96,
    ),
    "smp Unet resnet18": (
        lambda: smp.Unet("resnet18", encoder_weights=None),
        "encoder.conv1",
        "decoder",
        64,
    ),
    "transformers SegFormer": (
        segformer,
        "stages.0.patch_embeddings.proj",
        "decode_head",
        64,
    ),
    "transformers ConvNeXt": (convnext, "embeddings.patch_embeddings", "stages.1", 64),
    "transformers DETR": (detr, "embedder.embedder.convolution", "input_projection", 64),
    "diffusers UNet2D": (unet, "conv_in", "mid_block", 32),
}


@pytest.fixture(scope="module")
def table():
    rows = [("network", "scope", "layers", "difference", "checkpoint", "steps", "fuse", "ONNX")]
    yield rows
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip())


def leaves(outputs):
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def difference(one, other):
    """The largest difference of two networks' outputs; infinite if they do not go together."""
    one, other = leaves(one), leaves(other)
    if [each.shape for each in one] != [each.shape for each in other]:
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True) if a.numel())


def train(model, x):
    """The losses of a few steps; a detector's are its own."""
    model.train()
    torch.manual_seed(2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(STEPS):
        torch.manual_seed(3)  # the same dropout in every step
        optimizer.zero_grad()
        found = [leaf for leaf in leaves(model(x)) if leaf.is_floating_point()]
        loss = sum(leaf.mean() if not leaf.dim() else (leaf - 1).square().mean() for leaf in found)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def exported(model, x):
    """Outputs in ONNX Runtime, or the reason for which torch cannot export the network."""
    file = io.BytesIO()
    try:
        torch.onnx.export(model, (x,), file, dynamo=False, opset_version=17)
    except Exception as error:  # noqa: BLE001  # whatever torch raises is the reason
        return f"{type(error).__name__}"
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return [torch.from_numpy(np.asarray(each)) for each in found]


@pytest.mark.filterwarnings("ignore")  # the other projects' own, and the older exporter's
@pytest.mark.parametrize("scope", ["all", "first", "block"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, scope, table):
    build, first, block, size = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(x)
    before = copy.deepcopy(model.state_dict())
    training = copy.deepcopy(model).train()
    options = {"layers": {"all": None, "first": first, "block": block}[scope]}
    changes = add_coords(model, **options)
    with torch.no_grad():
        apart = difference(model(x), wanted)
        assert apart == 0
        torch.manual_seed(4)
        in_training = model.train()(x)
        torch.manual_seed(4)
        assert difference(in_training, training(x)) == 0  # with the same dropout
    model.load_state_dict(before, strict=True)
    assert difference(model.eval()(x), wanted) == 0

    restored = copy.deepcopy(model)
    remove_coords(restored)
    assert difference(restored(x), wanted) == 0
    assert [*restored.state_dict()] == [*before]
    assert all(torch.equal(restored.state_dict()[key], before[key]) for key in before)

    layers = [module for module in model.modules() if isinstance(module, CoordLayer)]
    assert len(layers) == len(changes.layers)
    largest = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args: largest.update({layer: args[0][0, 0].numel()})
        )
        for layer in layers
    ]
    losses = train(model, x)
    for handle in handles:
        handle.remove()
    assert min(losses[-3:]) < losses[0]
    moved = {layer for layer in layers if layer.layout.split(layer.weight)[1].any()}
    # On an axis of one sample the coordinate is 0, as after squeezing; the library froze some.
    able = {layer for layer in layers if layer.weight.requires_grad and largest.get(layer, 0) > 1}
    assert moved <= able
    # Before a global mean all positions have one gradient, whose sum over coordinates is 0; a
    # detector trains only the scales that have a box.
    assert len(moved) >= len(able) / 3
    assert moved or not able

    model.eval()
    with torch.no_grad():
        trained = model(x)
        fused = fuse(model, size=(x,))
        of_fused = difference(fused(x), trained)
    scale = max(1.0, *(float(leaf.abs().max()) for leaf in leaves(trained) if leaf.numel()))
    assert of_fused <= 1e-4 * scale
    onnx = exported(model, x)
    if isinstance(onnx, str):
        remove_coords(copied := copy.deepcopy(model))
        assert onnx == exported(copied, x)  # without coordinates, too
        shown = f"no: nor without ({onnx})"
    else:
        assert difference(onnx, trained) <= 1e-4 * scale
        shown = f"{difference(onnx, trained) / scale:.1e}"
    table.append(
        (
            name,
            scope,
            str(len(changes.layers)),
            f"{apart:g}",
            "strict",
            f"{losses[0]:.3g} -> {losses[-1]:.3g}",
            f"{of_fused / scale:.1e}",
            shown,
        )
    )


def test_same_padding_takes_coordinates_by_appending():
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    x = torch.randn(2, 3, 64, 64)
    wanted = model(x)
    changes = add_coords(model, layers=re.compile("conv_stem|.*conv_dw"), subclasses=True)
    assert "CoordConv2dSame('xy')" in {change.after for change in changes.layers}
    assert torch.allclose(model(x), wanted, atol=1e-4 * float(wanted.abs().max()))


def test_standardized_kernels_are_left_by_name():
    model = timm.create_model("nf_regnet_b0", pretrained=False)
    standardized = {n for n, m in model.named_modules() if type(m).__name__ == "ScaledStdConv2d"}
    with pytest.raises(ValueError, match="stem.conv: ScaledStdConv2d is a subclass of Conv2d"):
        add_coords(model, layers="stem.conv")
    with pytest.raises(ValueError, match="stem.conv: ScaledStdConv2d computes something else"):
        add_coords(model, layers="stem.conv", subclasses=True)
    assert {*add_coords(model, subclasses=True).skipped} == standardized != set()


def test_from_pretrained_into_a_network_with_coordinates(tmp_path):
    """A checkpoint without coordinates, and a class that adds them in its constructor: refused."""

    class WithCoordinates(transformers.ConvNextForImageClassification):
        def __init__(self, config):
            super().__init__(config)
            add_coords(self)

    plain = convnext().model.eval()
    plain.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        WithCoordinates.from_pretrained(tmp_path)
    # What is always right: the plain class first, and the coordinates after.
    model = transformers.ConvNextForImageClassification.from_pretrained(tmp_path).eval()
    add_coords(model)
    assert torch.equal(model(x).logits, plain(x).logits)
