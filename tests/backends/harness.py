"""Layers of every framework behind the same few functions, for what all of them must do alike.

Arrays are NumPy's with the channels first. A layer is one of ours, or the framework's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from coordconv import backends, position_bias
from coordconv.geometry import ConvGeometry

FLAX = ("flax", "linen")
WAYS = (position_bias.APPEND, position_bias.MAP)


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integers(*shape: int, seed: int = 0, largest: int = 4) -> Any:
    rng = np.random.default_rng(seed)
    return rng.integers(-largest, largest + 1, shape).astype(np.float32)


def ways_taken(monkeypatch: Any) -> list[str]:
    """What ``choose`` answers from now on, call by call."""
    found: list[str] = []
    choose = position_bias.choose

    def noted(*args: Any, **kwargs: Any) -> str:
        found.append(choose(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(position_bias, "choose", noted)
    return found


class Framework:
    """The functions; each framework fills in those that raise."""

    name: str
    kernel = "weight"

    def make(
        self,
        geometry: ConvGeometry,
        channels: int,
        out: int,
        *,
        bias: bool = True,
        seed: int = 0,
        **ours: Any,
    ) -> Any:
        """A layer of ours, whose parameters are drawn from ``seed``."""
        kind = getattr(backends.load(self.name), f"Coord{self.plain_class(geometry).__name__}")
        return self.construct(kind, geometry, channels, out, bias, seed, ours)

    def make_plain(
        self, geometry: ConvGeometry, channels: int, out: int, *, bias: bool = True, seed: int = 0
    ) -> Any:
        """The framework's own convolution."""
        return self.construct(self.plain_class(geometry), geometry, channels, out, bias, seed, {})

    def plain_class(self, geometry: ConvGeometry) -> Any:
        raise NotImplementedError

    def construct(self, kind, geometry, channels, out, bias, seed, ours) -> Any:
        raise NotImplementedError

    def call(self, layer: Any, x: Any) -> Any:
        raise NotImplementedError

    def parameters(self, layer: Any) -> dict[str, Any]:
        """The parameters as the framework has them: its names, its layout."""
        raise NotImplementedError

    def export_weights(self, layer: Any) -> Any:
        return layer.export_weights()

    def import_weights(self, layer: Any, weights: Mapping[str, Any]) -> None:
        layer.import_weights(weights)

    def state(self, module: Any) -> dict[str, Any]:
        """Of a module, layers inside it included: arrays by the framework's names."""
        raise NotImplementedError

    def load_state(self, module: Any, state: Mapping[str, Any]) -> None:
        """Into a module; ValueError or RuntimeError where the framework's loader complains."""
        raise NotImplementedError

    def tensors(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def nested(self, layer: Any) -> Any:
        """A network whose first layer, called ``0``, this is."""
        raise NotImplementedError

    def filled(self, layer: Any, largest: int = 4) -> Any:
        """The layer, with small integers for all weights."""
        found = self.export_weights(layer)
        arrays = {
            name: integers(*array.shape, seed=i, largest=largest)
            for i, (name, array) in enumerate(found.items())
        }
        self.import_weights(layer, arrays)
        return layer

    def add_coords(self, *args: Any, **kwargs: Any) -> Any:
        return backends.load(self.name).AddCoords(*args, **kwargs)


class Torch(Framework):
    name = "torch"

    def __init__(self) -> None:
        import torch

        self.torch = torch

    def plain_class(self, geometry):
        kind = "ConvTranspose" if geometry.transposed else "Conv"
        return getattr(self.torch.nn, f"{kind}{geometry.rank}d")

    def construct(self, kind, geometry, channels, out, bias, seed, ours):
        from coordconv.backends.torch import options

        self.torch.manual_seed(seed)
        return kind(channels, out, bias=bias, **options.arguments(geometry), **ours)

    def call(self, layer, x):
        with self.torch.no_grad():
            return layer(self.torch.tensor(x)).numpy()

    def parameters(self, layer):
        return {name: p.detach().numpy().copy() for name, p in layer.named_parameters()}

    def state(self, module):
        return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}

    def load_state(self, module, state):
        module.load_state_dict(self.tensors(state))

    def tensors(self, arrays):
        return {name: self.torch.tensor(array) for name, array in arrays.items()}

    def nested(self, layer):
        return self.torch.nn.Sequential(layer, self.torch.nn.ReLU())


class Paddle(Framework):
    name = "paddle"

    def __init__(self) -> None:
        import paddle

        self.paddle = paddle

    def plain_class(self, geometry):
        kind = "Transpose" if geometry.transposed else ""
        return getattr(self.paddle.nn, f"Conv{geometry.rank}D{kind}")

    def construct(self, kind, geometry, channels, out, bias, seed, ours):
        from coordconv.backends.paddle import options

        self.paddle.seed(seed)
        bias = None if bias else False
        return kind(channels, out, bias_attr=bias, **options.arguments(geometry), **ours)

    def call(self, layer, x):
        with self.paddle.no_grad():
            return layer(self.paddle.to_tensor(x)).numpy()

    def parameters(self, layer):
        return {name: p.numpy() for name, p in layer.named_parameters()}

    def state(self, module):
        return {name: tensor.numpy() for name, tensor in module.state_dict().items()}

    def load_state(self, module, state):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a tensor that does not fit, which is left out
            problems = module.set_state_dict(self.tensors(state))
        if any(problems):
            raise ValueError(f"missing and unexpected: {problems}")

    def tensors(self, arrays):
        return {name: self.paddle.to_tensor(array) for name, array in arrays.items()}

    def nested(self, layer):
        return self.paddle.nn.Sequential(layer, self.paddle.nn.ReLU())


class Flax(Framework):
    name, kernel = "flax", "kernel"

    def __init__(self) -> None:
        import flax.nnx

        self.nnx = flax.nnx

    def plain_class(self, geometry):
        return self.nnx.ConvTranspose if geometry.transposed else self.nnx.Conv

    def construct(self, kind, geometry, channels, out, bias, seed, ours):
        from coordconv.backends.jax import options

        given = options.arguments(geometry) | ours
        return kind(channels, out, use_bias=bias, rngs=self.nnx.Rngs(seed), **given)

    def call(self, layer, x):
        return channels_first(layer(channels_last(x)))

    def parameters(self, layer):
        state = self.nnx.to_pure_dict(self.nnx.state(layer, self.nnx.Param))
        return {name: np.asarray(array) for name, array in state.items()}


class LinenLayer:
    """A Linen module and its variables."""

    def __init__(self, module: Any, variables: Any) -> None:
        self.module, self.variables = module, variables

    def __call__(self, x: Any) -> Any:
        return self.module.apply(self.variables, x)

    def __repr__(self) -> str:
        return repr(self.module)


class Linen(Framework):
    name, kernel = "linen", "kernel"

    def __init__(self) -> None:
        import flax.linen
        import jax

        self.linen, self.jax = flax.linen, jax

    def plain_class(self, geometry):
        return self.linen.ConvTranspose if geometry.transposed else self.linen.Conv

    def construct(self, kind, geometry, channels, out, bias, seed, ours):
        from coordconv.backends.jax import options

        module = kind(out, use_bias=bias, **options.arguments(geometry), **ours)
        x = np.zeros((1, *(9,) * geometry.rank, channels), np.float32)
        return LinenLayer(module, module.init(self.jax.random.key(seed), x))

    def call(self, layer, x):
        return channels_first(layer(channels_last(x)))

    def parameters(self, layer):
        return {name: np.asarray(array) for name, array in layer.variables["params"].items()}

    def export_weights(self, layer):
        return layer.module.export_weights(layer.variables)

    def import_weights(self, layer, weights):
        layer.variables = layer.module.import_weights(weights)

    def add_coords(self, *args, **kwargs):
        return LinenLayer(super().add_coords(*args, **kwargs), {})


def channels_last(x: Any) -> Any:
    return np.moveaxis(x, 1, -1)


def channels_first(y: Any) -> Any:
    return np.moveaxis(np.asarray(y), -1, 1)


_KINDS = {"torch": Torch, "paddle": Paddle, "flax": Flax, "linen": Linen}


def load(name: str) -> Framework:
    """The framework of a backend."""
    return _KINDS[name]()
