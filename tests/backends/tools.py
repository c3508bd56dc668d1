"""What people do to a convolution through its kernel and bias, done to ours and to the framework's.

``python tests/backends/tools.py [BACKEND ...]`` prints the table: each tool's error on a CoordConv,
and on the framework's own convolution over ``C + n`` channels, which is given the features with the
coordinates behind them. Both have the same kernel and bias. It needs peft and torch-pruning for
torch, whose rows of these the tests skip where they are not installed.

A tool returns what it leaves behind and what it promises; the error is the largest difference. One
that refuses a layer raises.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from coordconv import Coordinates, available_backends, backends, coordinate_grid
from coordconv.geometry import ConvGeometry
from coordconv.parity.bounds import COORDINATE_ROUNDINGS
from coordconv.reference import Reference

C, OUT, KERNEL, COORDS = 3, 4, 3, Coordinates("xyr")
N = len(COORDS)
X = np.random.default_rng(1).standard_normal((8, C, 7, 6)).astype(np.float32)
_rng = np.random.default_rng(2)
WEIGHT = _rng.standard_normal((OUT, C + N, KERNEL, KERNEL)).astype(np.float32)  # canonical
BIAS = _rng.standard_normal(OUT).astype(np.float32)
SCALE = _rng.uniform(0.5, 2, OUT).astype(np.float32)
SHIFT = _rng.standard_normal(OUT).astype(np.float32)

Tool = Callable[["Layer"], tuple[Any, Any]]


class Layer:
    """A convolution in a framework: ours, or the framework's own behind an appended grid.

    Args:
        module: the framework's; of Linen the module without its variables.
        ours: whether it is a CoordConv.
    """

    last = False  # whether the framework has the channels last

    def __init__(self, module: Any, ours: bool) -> None:
        self.module, self.ours = module, ours
        self.set(WEIGHT, BIAS)

    def __call__(self, x: Any = X) -> Any:
        """The output for an input with the channels first, of NumPy both."""
        x = self.given(x)
        y = np.moveaxis(self.run(np.moveaxis(x, 1, -1)), -1, 1) if self.last else self.run(x)
        return y.copy()  # JAX's may not be written to

    def given(self, x: Any) -> Any:
        """What the module is given: the features, or all channels."""
        if self.ours:
            return x
        grid = coordinate_grid(x.shape[2:], COORDS)
        return np.concatenate([x, np.broadcast_to(grid, (len(x), *grid.shape))], 1)

    def run(self, x: Any) -> Any:
        raise NotImplementedError

    def get(self) -> tuple[Any, Any]:
        """The kernel in canonical layout, and the bias."""
        raise NotImplementedError

    def set(self, weight: Any, bias: Any) -> None:
        raise NotImplementedError

    def with_module(self, module: Any) -> Layer:
        """The same with another module, which has parameters already."""
        other = copy.copy(self)
        other.module = module
        return other

    def after(self, steps: int) -> Any:
        """The kernel after steps of training of the kernel alone, with weight decay."""
        raise NotImplementedError


class TorchLayer(Layer):
    @classmethod
    def make(cls, ours: bool) -> Layer:
        import torch

        kind, more = torch.nn.Conv2d, {}
        if ours:
            kind, more = backends.load("torch").CoordConv2d, {"coords": COORDS}
        return cls(kind(C if ours else C + N, OUT, KERNEL, padding=1, **more), ours)

    def run(self, x):
        import torch

        return self.module(torch.tensor(x)).detach().numpy()

    def get(self):
        return tuple(p.detach().numpy().copy() for p in (self.module.weight, self.module.bias))

    def set(self, weight, bias):
        import torch

        with torch.no_grad():
            self.module.weight.copy_(torch.tensor(weight))
            self.module.bias.copy_(torch.tensor(bias))

    def after(self, steps):
        import torch

        kinds = (torch.nn.Conv2d, torch.nn.Linear)
        kernels = [m.weight for m in self.module.modules() if isinstance(m, kinds)]
        rule = torch.optim.AdamW(kernels, lr=0.01, weight_decay=0.1)
        x = torch.tensor(self.given(X)).to(self.module.weight.dtype)
        for _ in range(steps):
            rule.zero_grad()
            self.module(x).square().mean().backward()
            rule.step()
        return self.get()[0]


class PaddleLayer(Layer):
    @classmethod
    def make(cls, ours: bool) -> Layer:
        import paddle

        kind, more = paddle.nn.Conv2D, {}
        if ours:
            kind, more = backends.load("paddle").CoordConv2D, {"coords": COORDS}
        return cls(kind(C if ours else C + N, OUT, KERNEL, padding=1, **more), ours)

    def run(self, x):
        import paddle

        return self.module(paddle.to_tensor(x)).numpy()

    def get(self):
        return self.module.weight.numpy(), self.module.bias.numpy()

    def set(self, weight, bias):
        self.module.weight.set_value(weight)
        self.module.bias.set_value(bias)

    def after(self, steps):
        import paddle

        kernels = [m.weight for m in self.module.sublayers(True) if hasattr(m, "weight")]
        rule = paddle.optimizer.AdamW(0.01, parameters=kernels, weight_decay=0.1)
        x = paddle.to_tensor(self.given(X))
        for _ in range(steps):
            self.module(x).square().mean().backward()
            rule.step()
            rule.clear_grad()
        return self.get()[0]


class FlaxLayer(Layer):
    last = True

    @classmethod
    def make(cls, ours: bool) -> Layer:
        from flax import nnx

        kind, more = nnx.Conv, {}
        if ours:
            kind, more = backends.load("flax").CoordConv, {"coords": COORDS}
        sizes = C if ours else C + N, OUT, (KERNEL, KERNEL)
        return cls(kind(*sizes, rngs=nnx.Rngs(0), **more), ours)

    def run(self, x):
        return np.asarray(self.module(x))

    def get(self):
        kernel, bias = np.asarray(self.module.kernel[...]), np.asarray(self.module.bias[...])
        return kernel.transpose(3, 2, 0, 1), bias

    def set(self, weight, bias):
        from jax import numpy as jnp

        self.module.kernel[...] = jnp.asarray(weight.transpose(2, 3, 1, 0))
        self.module.bias[...] = jnp.asarray(bias)

    def after(self, steps):
        import jax
        from flax import nnx

        graph, state = nnx.split(self.module)
        params = nnx.to_pure_dict(state)

        def loss(params, x):
            nnx.replace_by_pure_dict(state, params)
            return (nnx.merge(graph, state)(x) ** 2).mean()

        x = np.moveaxis(self.given(X), 1, -1)
        params = _decayed_by_path(jax.grad(loss), params, x, steps)
        return np.asarray(params["kernel"]).transpose(3, 2, 0, 1)


class LinenLayer(Layer):
    last = True

    @classmethod
    def make(cls, ours: bool) -> Layer:
        from flax import linen

        if ours:
            return cls(backends.load("linen").CoordConv(OUT, (KERNEL, KERNEL), coords=COORDS), ours)
        return cls(linen.Conv(OUT, (KERNEL, KERNEL)), ours)

    def run(self, x):
        return np.asarray(self.module.apply({"params": self.params}, x))

    def get(self):
        return np.asarray(self.params["kernel"]).transpose(3, 2, 0, 1), self.params["bias"]

    def set(self, weight, bias):
        self.params = {"kernel": weight.transpose(2, 3, 1, 0), "bias": bias}

    def after(self, steps):
        import jax

        def loss(params, x):
            return (self.module.apply({"params": params}, x) ** 2).mean()

        x = np.moveaxis(self.given(X), 1, -1)
        params = _decayed_by_path(jax.grad(loss), self.params, x, steps)
        return np.asarray(params["kernel"]).transpose(3, 2, 0, 1)


def _decayed_by_path(gradient: Any, params: Any, x: Any, steps: int) -> Any:
    """Trained by a recipe that decays and moves what is called ``kernel``."""
    import jax
    import optax

    def is_kernel(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    def is_other(params):
        return jax.tree.map(lambda kernel: not kernel, is_kernel(params))

    rule = optax.chain(
        optax.adamw(0.01, weight_decay=0.1, mask=is_kernel),
        optax.masked(optax.set_to_zero(), is_other),
    )
    state = rule.init(params)
    for _ in range(steps):
        updates, state = rule.update(gradient(params, x), state, params)
        params = optax.apply_updates(params, updates)
    return params


# --- recipes on kernel and bias, in every framework ----------------------------------------------


def folded(layer: Layer) -> tuple[Any, Any]:
    """Batch norm folded into the convolution before it, as toolboxes of detectors do."""
    y = layer().astype(np.float64)
    mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3))
    factor = SCALE / np.sqrt(variance + 1e-5)
    wanted = _by_channel(factor) * (y - _by_channel(mean)) + _by_channel(SHIFT)
    weight, bias = layer.get()
    folded = weight * factor.reshape(-1, 1, 1, 1), (bias - mean) * factor + SHIFT
    layer.set(*(array.astype(np.float32) for array in folded))
    return layer(), wanted


def zero_head(layer: Layer) -> tuple[Any, Any]:
    """A head that starts with one answer everywhere: RetinaNet's kernel of zeros, bias -4.6."""
    weight, bias = layer.get()
    layer.set(np.zeros_like(weight), np.full_like(bias, -4.6))
    y = layer()
    return y, np.full_like(y, -4.6)


def pruned(layer: Layer) -> tuple[Any, Any]:
    """Structured pruning: whole filters are zero, and their outputs the bias."""
    weight, bias = layer.get()
    wanted = layer()
    weight = weight * np.array([1, 0, 1, 0], np.float32).reshape(-1, 1, 1, 1)
    layer.set(weight, bias)
    wanted[:, 1::2] = _by_channel(bias[1::2])
    return layer(), wanted


def adapted(layer: Layer) -> tuple[Any, Any]:
    """A low-rank adapter: it starts as the identity, and is merged when it has moved."""
    weight, bias = layer.get()
    rng = np.random.default_rng(3)
    down = rng.standard_normal((1, weight[0].size)).astype(np.float32)
    up = rng.standard_normal((OUT, 1)).astype(np.float32)
    before, found = layer(), []
    for factor in (0 * up, up):
        layer.set(weight + (factor @ down).reshape(weight.shape), bias)
        found.append(layer())
    layer.set((up @ down).reshape(weight.shape), np.zeros_like(bias))
    return np.stack(found), np.stack([before, before + layer()])


def averaged(layer: Layer) -> tuple[Any, Any]:
    """A moving average of parameters; the output is linear in them."""
    weight, bias = layer.get()
    one = layer()
    layer.set(weight[::-1].copy(), bias[::-1].copy())
    other = layer()
    layer.set(0.75 * weight + 0.25 * weight[::-1], 0.75 * bias + 0.25 * bias[::-1])
    return layer(), 0.75 * one.astype(np.float64) + 0.25 * other


def trained(layer: Layer) -> tuple[Any, Any]:
    """An optimiser that is given what is called ``weight``, or ``kernel``, with weight decay.

    What it must come to is what a convolution over all channels does in float64.
    """
    return layer.after(3), _trained_in_float64()


def _trained_in_float64() -> Any:
    """AdamW by its definition (Loshchilov and Hutter, 2019), on the convolution of all channels."""
    rate, decay, beta, gamma, epsilon = 0.01, 0.1, 0.9, 0.999, 1e-8
    grid = coordinate_grid(X.shape[2:], COORDS, dtype=np.float64)
    x = np.concatenate([X, np.broadcast_to(grid, (len(X), *grid.shape))], 1)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (KERNEL, KERNEL), (2, 3))
    weight, first, second = WEIGHT.astype(np.float64), 0.0, 0.0
    for step in (1, 2, 3):
        y = np.einsum("nchwij,ocij->nohw", windows, weight) + _by_channel(BIAS)
        gradient = np.einsum("nchwij,nohw->ocij", windows, 2 * y / y.size)
        first = beta * first + (1 - beta) * gradient
        second = gamma * second + (1 - gamma) * gradient**2
        ratio = first / (1 - beta**step) / (np.sqrt(second / (1 - gamma**step)) + epsilon)
        weight = weight - rate * (decay * weight + ratio)
    return weight


def _by_channel(values: Any) -> Any:
    return np.asarray(values).reshape(-1, 1, 1)


def _largest_singular_value(weight: Any) -> float:
    return float(np.linalg.svd(weight.reshape(OUT, -1).astype(np.float64), compute_uv=False)[0])


ON_WEIGHT: dict[str, Tool] = {
    "batch norm folded by hand": folded,
    "zeros for a head": zero_head,
    "filters zeroed": pruned,
    "low-rank adapter by hand": adapted,
    "moving average": averaged,
    "optimiser of kernels": trained,
}

# --- libraries of torch --------------------------------------------------------------------------


def _trained_with_norm(layer: Layer) -> Any:
    """The module and a batch norm behind it, after steps of training, for evaluation."""
    import torch

    torch.manual_seed(0)
    block = torch.nn.Sequential(layer.module, torch.nn.BatchNorm2d(OUT))
    rule = torch.optim.SGD(block.parameters(), 0.1)
    x = torch.tensor(layer.given(X))
    for _ in range(5):
        block(x).sub(1).square().mean().backward()
        rule.step()
        rule.zero_grad()
    return block.eval()


def torch_fused(layer: Layer) -> tuple[Any, Any]:
    """``torch.nn.utils.fusion.fuse_conv_bn_eval``."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    block = _trained_with_norm(layer)
    fused = fuse_conv_bn_eval(*block)
    return layer.with_module(fused)(), layer.with_module(block)()


def toolbox_fused(layer: Layer) -> tuple[Any, Any]:
    """The recipe of OpenMMLab's ``fuse_conv_bn``."""
    import torch

    block = _trained_with_norm(layer)
    wanted = layer.with_module(block)()
    conv, norm = block
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    conv.weight = torch.nn.Parameter(conv.weight * factor.reshape([conv.out_channels, 1, 1, 1]))
    conv.bias = torch.nn.Parameter((conv.bias - norm.running_mean) * factor + norm.bias)
    return layer.with_module(conv)(), wanted


def yolo_fused(layer: Layer) -> tuple[Any, Any]:
    """The recipe of YOLOv5 to v8: a new ``nn.Conv2d`` from the attributes of the old one."""
    import torch

    block = _trained_with_norm(layer)
    conv, norm = block
    fused = torch.nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=True,
    ).requires_grad_(False)
    scale = torch.diag(norm.weight.div(torch.sqrt(norm.eps + norm.running_var)))
    kernel = conv.weight.clone().view(conv.out_channels, -1)
    fused.weight.copy_(torch.mm(scale, kernel).view(fused.weight.shape))
    shift = norm.bias - norm.weight.mul(norm.running_mean).div(
        torch.sqrt(norm.running_var + norm.eps)
    )
    fused.bias.copy_(torch.mm(scale, conv.bias.reshape(-1, 1)).reshape(-1) + shift)
    return layer.with_module(fused)(), layer.with_module(block)()


def torch_zero_head(layer: Layer) -> tuple[Any, Any]:
    """``nn.init``."""
    import torch

    torch.nn.init.zeros_(layer.module.weight)
    torch.nn.init.constant_(layer.module.bias, -4.6)
    y = layer()
    return y, np.full_like(y, -4.6)


def torch_parametrized(layer: Layer) -> tuple[Any, Any]:
    """A low-rank adapter as a parametrization: the identity, then what it is merged to."""
    import torch
    from torch.nn.utils import parametrize

    class LowRank(torch.nn.Module):
        def __init__(self, shape):
            super().__init__()
            torch.manual_seed(1)
            self.down = torch.nn.Parameter(torch.randn(1, shape[1:].numel()))
            self.up = torch.nn.Parameter(torch.zeros(shape[0], 1))

        def forward(self, weight):
            return weight + (self.up @ self.down).view_as(weight)

    wanted = layer()
    adapter = LowRank(layer.module.weight.shape)
    parametrize.register_parametrization(layer.module, "weight", adapter)
    found = layer()
    with torch.no_grad():
        adapter.up.fill_(0.5)
    adapted = layer()
    parametrize.remove_parametrizations(layer.module, "weight")  # what is merged stays
    return np.stack([found, layer()]), np.stack([wanted, adapted])


def _with_peft(layer: Layer) -> Any:
    import peft
    import torch

    torch.manual_seed(0)
    block = torch.nn.Sequential()
    block.add_module("conv", layer.module)
    config = peft.LoraConfig(target_modules=["conv"], r=2)
    return peft.get_peft_model(block, config).eval()


def peft_start(layer: Layer) -> tuple[Any, Any]:
    """``peft.LoraConfig`` on the convolution: it starts as the identity."""
    wanted = layer()
    return layer.with_module(_with_peft(layer))(), wanted


def peft_merged(layer: Layer) -> tuple[Any, Any]:
    """The same after the adapter has moved, merged."""
    import torch

    model = _with_peft(layer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    wanted = layer.with_module(model)()
    return layer.with_module(model.merge_and_unload())(), wanted


def torch_pruned(layer: Layer) -> tuple[Any, Any]:
    """``torch.nn.utils.prune.ln_structured``: of half of the filters only the bias is left."""
    from torch.nn.utils import prune

    weight, bias = layer.get()
    wanted = layer()
    prune.ln_structured(layer.module, "weight", amount=0.5, n=2, dim=0)
    sizes = np.square(weight).sum((1, 2, 3))
    gone = np.argsort(sizes)[: OUT // 2]
    wanted[:, gone] = _by_channel(bias[gone])
    return layer(), wanted


def shrunk(layer: Layer) -> tuple[Any, Any]:
    """``torch_pruning``, which takes output channels out of the kernel."""
    import torch_pruning

    wanted = layer()[:, [0, 2]]
    torch_pruning.prune_conv_out_channels(layer.module, [1, 3])
    return layer(), wanted


def torch_spectral(layer: Layer, new: bool = False) -> tuple[Any, Any]:
    """Spectral norm: the largest singular value of the whole kernel is 1."""
    import torch

    torch.manual_seed(0)
    norm = (torch.nn.utils.parametrizations if new else torch.nn.utils).spectral_norm
    norm(layer.module, n_power_iterations=200)
    layer()
    layer.module.eval()
    found = layer()
    weight = layer.module.weight.detach().numpy()
    plain = TorchLayer.make(layer.ours)
    plain.set(WEIGHT / _largest_singular_value(WEIGHT), BIAS)
    return np.append(found, _largest_singular_value(weight)), np.append(plain(), 1.0)


def torch_weight_norm(layer: Layer, new: bool = False) -> tuple[Any, Any]:
    """Weight norm: nothing changes, then each filter as its length says."""
    import torch

    wanted = layer()
    utils = torch.nn.utils
    (utils.parametrizations if new else utils).weight_norm(layer.module)
    found = layer()
    with torch.no_grad():
        length = layer.module.parametrizations.weight.original0 if new else layer.module.weight_g
        length.mul_(2)
    bias = _by_channel(BIAS)
    return np.stack([found, layer()]), np.stack([wanted, 2 * (wanted - bias) + bias])


def torch_averaged(layer: Layer) -> tuple[Any, Any]:
    """``torch.optim.swa_utils.AveragedModel`` of two: the output is linear in the parameters."""
    import torch
    from torch.optim.swa_utils import AveragedModel

    average = AveragedModel(torch.nn.Sequential(layer.module))
    one = layer()
    average.update_parameters(torch.nn.Sequential(layer.module))
    layer.set(WEIGHT[::-1].copy(), BIAS[::-1].copy())
    average.update_parameters(torch.nn.Sequential(layer.module))
    return layer.with_module(average)(), (one.astype(np.float64) + layer()) / 2


def mkldnn(layer: Layer) -> tuple[Any, Any]:
    """``torch.utils.mkldnn.to_mkldnn``."""
    import torch
    from torch.utils.mkldnn import to_mkldnn

    wanted = layer()
    module = to_mkldnn(torch.nn.Sequential(layer.module).eval())
    y = module(torch.tensor(layer.given(X)).to_mkldnn()).to_dense()
    return y.detach().numpy(), wanted


IN_TORCH: dict[str, Tool] = {
    "torch.nn.utils.fusion": torch_fused,
    "batch norm folded as in OpenMMLab": toolbox_fused,
    "batch norm folded as in YOLO": yolo_fused,
    "nn.init.zeros_": torch_zero_head,
    "low-rank parametrization": torch_parametrized,
    "peft LoRA, at its start": peft_start,
    "peft LoRA, merged": peft_merged,
    "prune.ln_structured": torch_pruned,
    "torch_pruning of outputs": shrunk,
    "spectral_norm": torch_spectral,
    "parametrizations.spectral_norm": lambda layer: torch_spectral(layer, new=True),
    "weight_norm": torch_weight_norm,
    "parametrizations.weight_norm": lambda layer: torch_weight_norm(layer, new=True),
    "AveragedModel": torch_averaged,
    "to_mkldnn": mkldnn,
}

# --- of Paddle -----------------------------------------------------------------------------------


def paddle_folded(layer: Layer) -> tuple[Any, Any]:
    """Batch norm after steps of training, folded by tensors."""
    import paddle

    block = paddle.nn.Sequential(layer.module, paddle.nn.BatchNorm2D(OUT))
    rule = paddle.optimizer.SGD(0.1, parameters=block.parameters())
    x = paddle.to_tensor(layer.given(X))
    for _ in range(5):
        (block(x) - 1).square().mean().backward()
        rule.step()
        rule.clear_grad()
    block.eval()
    wanted = block(x).numpy()
    conv, norm = layer.module, block[1]
    factor = norm.weight / (norm._variance + norm._epsilon).sqrt()
    conv.weight.set_value(conv.weight * factor.reshape([-1, 1, 1, 1]))
    conv.bias.set_value((conv.bias - norm._mean) * factor + norm.bias)
    return layer(), wanted


def paddle_spectral(layer: Layer) -> tuple[Any, Any]:
    import paddle

    paddle.seed(0)
    paddle.nn.utils.spectral_norm(layer.module, n_power_iterations=200)
    layer.module.train()
    layer()
    plain = PaddleLayer.make(layer.ours)
    plain.set(WEIGHT / _largest_singular_value(WEIGHT), BIAS)
    return layer(), plain()


def paddle_weight_norm(layer: Layer) -> tuple[Any, Any]:
    import paddle

    wanted = layer()
    paddle.nn.utils.weight_norm(layer.module)
    found = layer()
    layer.module.weight_g.set_value(layer.module.weight_g * 2)
    bias = _by_channel(BIAS)
    return np.stack([found, layer()]), np.stack([wanted, 2 * (wanted - bias) + bias])


def paddle_regularized(layer: Layer) -> tuple[Any, Any]:
    """``weight_attr`` with a regularizer: a step without a gradient is decay alone."""
    import paddle

    attr = paddle.ParamAttr(regularizer=paddle.regularizer.L2Decay(0.5), learning_rate=0.25)
    more = {"coords": COORDS} if layer.ours else {}
    kind = type(layer.module)
    conv = kind(C if layer.ours else C + N, OUT, KERNEL, padding=1, weight_attr=attr, **more)
    layer = PaddleLayer(conv, layer.ours)
    rule = paddle.optimizer.SGD(0.5, parameters=conv.parameters())
    (conv(paddle.to_tensor(layer.given(X))) * 0).sum().backward()
    rule.step()
    return layer.get()[0], WEIGHT * (1 - 0.5 * 0.25 * 0.5)


IN_PADDLE: dict[str, Tool] = {
    "batch norm folded": paddle_folded,
    "nn.utils.spectral_norm": paddle_spectral,
    "nn.utils.weight_norm": paddle_weight_norm,
    "weight_attr's regularizer": paddle_regularized,
}

# --- of Flax -------------------------------------------------------------------------------------


def flax_spectral(layer: Layer) -> tuple[Any, Any]:
    from flax import nnx

    norm = nnx.SpectralNorm(layer.module, n_steps=200, rngs=nnx.Rngs(0))
    found = layer.with_module(norm)()
    plain = FlaxLayer.make(layer.ours)
    plain.set(WEIGHT / _largest_singular_value(WEIGHT), BIAS)
    return found, plain()


def flax_weight_norm(layer: Layer) -> tuple[Any, Any]:
    from flax import nnx

    found = layer.with_module(nnx.WeightNorm(layer.module, rngs=nnx.Rngs(0)))()
    plain = FlaxLayer.make(layer.ours)
    lengths = np.sqrt(np.square(WEIGHT).sum((1, 2, 3), keepdims=True))
    plain.set(WEIGHT / lengths, BIAS)
    return found, plain()


def flax_zero_head(layer: Layer) -> tuple[Any, Any]:
    """``kernel_init``."""
    from flax import nnx

    more = {"coords": COORDS} if layer.ours else {}
    more |= {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
    more["bias_init"] = nnx.initializers.constant(-4.6)
    kind = type(layer.module)
    y = layer.with_module(kind(C if layer.ours else C + N, OUT, (KERNEL, KERNEL), **more))()
    return y, np.full_like(y, -4.6)


def linen_norm(layer: Layer, spectral: bool) -> tuple[Any, Any]:
    import jax
    from flax import linen

    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x):
            conv = layer.module.copy(name="conv")
            if spectral:
                return linen.SpectralNorm(conv, n_steps=200)(x, update_stats=True)
            return linen.WeightNorm(conv, use_scale=False)(x)

    x = np.moveaxis(layer.given(X), 1, -1)
    variables = Normed().init(jax.random.key(0), x)
    params = {**variables["params"], "conv": layer.params}
    y, _ = Normed().apply({**variables, "params": params}, x, mutable=["batch_stats"])
    lengths = np.sqrt(np.square(WEIGHT).sum((1, 2, 3), keepdims=True))
    layer.set(WEIGHT / (_largest_singular_value(WEIGHT) if spectral else lengths), BIAS)
    return np.moveaxis(np.asarray(y), -1, 1), layer()


def linen_zero_head(layer: Layer) -> tuple[Any, Any]:
    """``kernel_init``."""
    import jax
    from flax import linen

    init = linen.initializers
    layer.module = layer.module.clone(kernel_init=init.zeros, bias_init=init.constant(-4.6))
    x = np.moveaxis(layer.given(X), 1, -1)
    layer.params = layer.module.init(jax.random.key(0), x)["params"]
    y = layer()
    return y, np.full_like(y, -4.6)


IN_FLAX: dict[str, Tool] = {
    "SpectralNorm": flax_spectral,
    "WeightNorm": flax_weight_norm,
    "kernel_init=zeros": flax_zero_head,
}
IN_LINEN: dict[str, Tool] = {
    "SpectralNorm": lambda layer: linen_norm(layer, spectral=True),
    "WeightNorm": lambda layer: linen_norm(layer, spectral=False),
    "kernel_init=zeros": linen_zero_head,
}

LAYERS: dict[str, Any] = {
    "torch": TorchLayer,
    "paddle": PaddleLayer,
    "flax": FlaxLayer,
    "linen": LinenLayer,
}
TOOLS: dict[str, dict[str, Tool]] = {
    "torch": ON_WEIGHT | IN_TORCH,
    "paddle": ON_WEIGHT | IN_PADDLE,
    "flax": ON_WEIGHT | IN_FLAX,
    "linen": ON_WEIGHT | IN_LINEN,
}

# How far apart the same output may be that is summed in two orders: a smaller difference says
# nothing. Each term passes through so many roundings; a tool at most doubles a kernel.
_TERMS = (C + N) * KERNEL**2 + 1 + COORDINATE_ROUNDINGS
_MAGNITUDES = Reference(ConvGeometry((KERNEL, KERNEL), padding=1), COORDS).forward(
    X, WEIGHT, BIAS, magnitudes=True
)
FLOOR = 2 * _TERMS * 2.0**-24 * 2 * float(_MAGNITUDES.max())


@dataclass
class Row:
    """One tool's errors; a refusal has none, but a message."""

    backend: str
    tool: str
    ours: float | None
    plain: float | None
    refused: str = ""

    @property
    def ok(self) -> bool:
        """Whether ours is no worse than ten times the framework's own, or was refused aloud."""
        if self.ours is None or self.plain is None:
            return bool(self.refused)
        return self.ours <= 10 * self.plain + FLOOR


def row(backend: str, tool: str) -> Row:
    """One tool, done to both."""

    def error(ours: bool) -> float:
        """The largest difference."""
        found, wanted = TOOLS[backend][tool](LAYERS[backend].make(ours))
        assert np.shape(found) == np.shape(wanted)
        return float(np.abs(found - wanted).max())

    plain = error(False)
    try:
        return Row(backend, tool, error(True), plain)
    except (RuntimeError, ValueError, TypeError) as refusal:
        line = str(refusal).partition("\n")[0]
        return Row(backend, tool, None, plain, f"{type(refusal).__name__}: {line}")


def main() -> int:
    """Print the table for the backends that are named, or for all that are installed."""
    names = sys.argv[1:] or available_backends()
    print(f"a difference of {FLOOR:.1g} may be rounding")
    print(f"{'':8}{'tool':34}{'CoordConv':>12}{'plain':>10}")
    rows = [row(backend, tool) for backend in names for tool in TOOLS[backend]]
    for each in rows:
        found = "refused" if each.ours is None else f"{each.ours:.1e}"
        end = "" if each.ok else "  WRONG"
        print(f"{each.backend:8}{each.tool:34}{found:>12}{each.plain:>10.1e}{end}")
        if each.refused:
            print(f"{'':10}{each.refused}")
    return 0 if all(each.ok for each in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
