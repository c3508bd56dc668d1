"""PP-YOLO's neck, described once and built in torch, Paddle and Flax NNX.

The network is PaddleDetection's ``PPYOLOFPN`` as ``ppyolo_r50vd_dcn`` configures it, written anew
from its structure: two blocks of convolutions, pooling at several sizes, coordinates. DropBlock,
which acts in training alone, is left out. Three maps of a backbone go in, the coarsest first, and
three come out. Every convolution is followed by batch normalization and a leaky ReLU; 12 of the 21
have coordinates, on the scale that PaddleDetection has used since 2.2.

A variant says how these 12 compute: ``concat`` makes the coordinates and concatenates them in every
call, as PaddleDetection does; ``ours`` are the layers of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from coordconv import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network
from coordconv.parity.bounds import expected

Array: TypeAlias = npt.NDArray[Any]
Watch: TypeAlias = Callable[[str, Any], Any]

COORDS = Coordinates.named("paddledetection")
CONCAT, OURS = "concat", "ours"
CHANNELS, WIDTH = (2048, 1024, 512), 512
POOLS = (5, 9, 13)
SLOPE, EPSILON = 0.1, 1e-5  # of the leaky ReLU, and of the normalization


@dataclass(frozen=True)
class Step:
    """One operation, on the values that ``inputs`` names; its own value has its ``name``.

    ``kind`` is ``conv``, ``norm``, ``act``, ``pool``, ``concat`` or ``upsample``. ``kernel`` is the
    side of the kernel or of the pooled window, ``coords`` whether the convolution has coordinates.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    channels: int = 0
    out: int = 0
    kernel: int = 1
    coords: bool = False


def steps(
    channels: Sequence[int] = CHANNELS, width: int = WIDTH, coords: bool = True
) -> tuple[Step, ...]:
    """The neck for maps ``map0``, ``map1``, ... of so many channels; ``tip0``, ... come out.

    ``width`` is the number of channels inside of the first block, halved in each that follows.
    Without ``coords`` all convolutions are plain.
    """
    made: list[Step] = []

    def added(name: str, kind: str, *inputs: str, **options: Any) -> str:
        made.append(Step(name, kind, inputs, **options))
        return name

    def convolved(
        name: str, x: str, channels: int, out: int, kernel: int, coords: bool = False
    ) -> str:
        sizes: dict[str, Any] = {"channels": channels, "out": out, "kernel": kernel}
        x = added(f"{name}_conv", "conv", x, **sizes, coords=coords)
        return added(name, "act", added(f"{name}_norm", "norm", x, channels=out))

    route = ""
    for i, own in enumerate(channels):
        x, taken, w = f"map{i}", own, width >> i
        if i:
            x_above = convolved(f"transition{i}", route, 2 * w, w, 1)
            x_above = added(f"upsample{i}", "upsample", x_above)
            x, taken = added(f"joined{i}", "concat", x_above, x), own + w
        x = convolved(f"first{i}", x, taken, w, 1, coords)
        x = convolved(f"second{i}", x, w, 2 * w, 3)
        x = convolved(f"third{i}", x, 2 * w, w, 1, coords)
        if not i:
            pooled = [added(f"pool{size}", "pool", x, kernel=size) for size in POOLS]
            x = convolved("pyramid", added("pyramid_in", "concat", x, *pooled), 4 * w, w, 1)
        x = convolved(f"fourth{i}", x, w, 2 * w, 3)
        route = convolved(f"route{i}", x, 2 * w, w, 1, coords)
        convolved(f"tip{i}", route, w, 2 * w, 3, coords)
    return tuple(made)


class Neck:
    """The neck in a framework, with a module for each step under the step's name.

    A framework adds ``make(step)``, the module of a step; ``state()``, all arrays by canonical
    names, and ``load_state``; and ``evaluate``.
    """

    steps: tuple[Step, ...]
    variant: str

    def describe(self, steps: tuple[Step, ...], variant: str) -> None:
        """Make every module."""
        self.steps, self.variant = steps, variant
        for step in steps:
            setattr(self, step.name, self.make(step))

    def make(self, step: Step) -> Any:
        raise NotImplementedError

    def run(self, maps: Sequence[Any], watch: Watch = lambda name, value: value) -> list[Any]:
        """The outputs; ``watch`` lets what goes into and out of a convolution go on, or another."""
        values = {f"map{i}": x for i, x in enumerate(maps)}
        for step in self.steps:
            given = [values[name] for name in step.inputs]
            if step.kind != "conv":
                values[step.name] = getattr(self, step.name)(*given)
                continue
            x = watch(f"input of {step.name}", given[0])
            values[step.name] = watch(step.name, getattr(self, step.name)(x))
        return [values[f"tip{i}"] for i in range(len(maps))]

    def state(self) -> dict[str, Array]:
        raise NotImplementedError

    def load_state(self, state: Mapping[str, Array]) -> None:
        raise NotImplementedError

    def evaluate(
        self, maps: Sequence[Array], gradients: Sequence[Array] | None = None
    ) -> dict[str, Array]:
        """What goes into and out of each convolution, and the outputs, by name; nothing is changed.

        Without the outputs' ``gradients``, in inference; with them in training, where there is
        also ``gradient of NAME`` of all these, of the maps, and of the parameters.
        """
        raise NotImplementedError


class TapeNeck(Neck):
    """What torch and Paddle do alike.

    ``grad`` is the framework's function of that name, ``take`` the method that loads a state,
    ``arrays`` makes the framework's own of NumPy's, to take gradients of. These two are timed:
    ``forward(maps)``, the outputs in inference, and ``step``, all gradients in training.
    """

    arrays: Callable[[Sequence[Array]], list[Any]]
    grad: Callable[..., Sequence[Any]]
    take: Callable[[dict[str, Any]], Any]
    train: Callable[[], Any]
    eval: Callable[[], Any]
    named_parameters: Callable[[], Any]
    state_dict: Callable[[], Mapping[str, Any]]

    def state(self) -> dict[str, Array]:
        # Without torch's counts of the batches seen, which nothing here needs.
        return {_canonical(n): a.numpy().copy() for n, a in self.state_dict().items() if a.ndim}

    def load_state(self, state: Mapping[str, Array]) -> None:
        own = dict(self.state_dict())
        names = [name for name, array in own.items() if array.ndim]
        arrays = self.arrays([state[_canonical(name)] for name in names])
        self.take(own | dict(zip(names, arrays, strict=True)))

    def step(self, maps: Sequence[Any], gradients: Sequence[Any]) -> Any:
        self.train()
        return self.grad(self.run(maps), [*maps, *self.trained().values()], [*gradients])

    def trained(self) -> dict[str, Any]:
        """The parameters; to Paddle a normalization's statistics are parameters as well."""
        return {_canonical(n): p for n, p in self.named_parameters() if p.requires_grad}

    def evaluate(
        self, maps: Sequence[Array], gradients: Sequence[Array] | None = None
    ) -> dict[str, Array]:
        inputs = self.arrays(maps)
        seen = {f"map{i}": x for i, x in enumerate(inputs)}

        def watch(name: str, value: Any) -> Any:
            seen[name] = value.clone()  # so that it has a gradient of its own
            return seen[name]

        before = self.state()
        (self.eval if gradients is None else self.train)()
        outputs = self.run(inputs, watch)
        tips = {f"tip{i}": y for i, y in enumerate(outputs)}
        found = {name: tensor.detach().numpy() for name, tensor in (seen | tips).items()}
        if gradients is None:
            return found
        of = seen | self.trained()
        made = self.grad(outputs, [*of.values()], self.arrays(gradients))
        self.load_state(before)  # the statistics, of which each framework takes another mean
        return found | {f"gradient of {n}": g.numpy() for n, g in zip(of, made, strict=True)}


# Canonical names, which are torch's, of what Paddle and Flax call otherwise.
_NAMES = {
    "_mean": "running_mean",
    "_variance": "running_var",
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def _canonical(name: str) -> str:
    """The canonical name of an array, in every variant the same."""
    step, _, own = name.replace("_conv.conv.", "_conv.").rpartition(".")
    return f"{step}.{_NAMES.get(own, own)}"


def build(framework: str, steps: tuple[Step, ...], variant: str = OURS) -> Neck:
    """The neck in ``"torch"``, ``"paddle"`` or ``"flax"``; the last has ``ours`` alone."""
    builders = {"torch": _torch, "paddle": _paddle, "flax": _flax}
    made: Neck = builders[framework]()(steps, variant)
    return made


def data(
    steps: tuple[Step, ...], sizes: Sequence[tuple[int, int]], batch: int, seed: int = 0
) -> tuple[list[Array], list[Array]]:
    """Maps as a backbone's ReLU leaves them, and gradients of the outputs."""
    rng = np.random.default_rng(seed)
    found = {step.name: step for step in steps}
    maps, gradients = [], []
    for i, size in enumerate(sizes):
        tip, first = found[f"tip{i}_conv"], found[f"first{i}_conv"]
        own = first.channels - (tip.channels if i else 0)
        maps.append(np.maximum(rng.standard_normal((batch, own, *size), np.float32), 0))
        gradients.append(rng.standard_normal((batch, tip.out, *size), np.float32))
    return maps, gradients


def initial_state(steps: tuple[Step, ...], seed: int = 0) -> dict[str, Array]:
    """All arrays by canonical names, which are torch's; float32.

    Kernels keep the size of what goes through them, and normalizations are near what they start as.
    """
    rng, state = np.random.default_rng(seed), {}
    for step in steps:
        if step.kind == "conv":
            seen = step.channels + len(COORDS) * step.coords
            kernel = rng.standard_normal((step.out, seen, step.kernel, step.kernel))
            state[f"{step.name}.weight"] = kernel * np.sqrt(2 / kernel[0].size)
        elif step.kind == "norm":
            for name, start in (
                ("weight", 1),
                ("bias", 0),
                ("running_mean", 0),
                ("running_var", 1),
            ):
                state[f"{step.name}.{name}"] = start + rng.uniform(-0.5, 0.5, step.channels)
    return {name: array.astype(np.float32) for name, array in state.items()}


def errors(
    steps: tuple[Step, ...], state: Mapping[str, Array], found: Mapping[str, Array]
) -> Iterator[tuple[str, float]]:
    """Of each convolution's output and gradients the largest error, in units of its bound.

    Each is held to the float64 reference for what the convolution was given in this very run, the
    gradient of its output included. So nothing that an earlier layer did is in the bound: composed
    through 21 layers the bounds would be worth nothing, since each multiplies them by the sum of
    its kernel's absolute values.
    """
    for step in steps:
        if step.kind != "conv":
            continue
        geometry = ConvGeometry((step.kernel,) * 2, padding=step.kernel // 2)
        coords = COORDS if step.coords else None
        conv = Conv(step.name, step.channels, step.out, geometry, coords, bias=False)
        x, dy = found[f"input of {step.name}"], found.get(f"gradient of {step.name}")
        weight = f"{step.name}.weight"
        network = Network(step.name, x.shape[1:], (conv,))
        wanted = expected(network, {weight: state[weight]}, x, dy)
        yield step.name, wanted["y"].error(found[step.name])
        if dy is not None:
            for name, own in (("x", f"input of {step.name}"), (weight, weight)):
                yield f"gradient of {own}", wanted[name].error(found[f"gradient of {own}"])


def _torch() -> Any:
    import torch
    from torch import nn

    from coordconv.backends.torch import CoordConv2d

    class Concat(nn.Module):
        """PaddleDetection's CoordConv; ``x.new_...`` are on the input's device, in its type."""

        def __init__(self, channels: int, *args: Any, **options: Any) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels + 2, *args, **options)

        def forward(self, x: Any) -> Any:
            n, _, h, w = x.shape
            gx = (torch.arange(w, device=x.device) / ((w - 1) * 2.0) - 1).to(x.dtype)
            gy = (torch.arange(h, device=x.device) / ((h - 1) * 2.0) - 1).to(x.dtype)
            gx, gy = gx.expand(n, 1, h, w), gy[:, None].expand(n, 1, h, w)
            return self.conv(torch.cat([x, gx, gy], 1))

    class Joined(nn.Module):
        def forward(self, *xs: Any) -> Any:
            return torch.cat(xs, 1)

    class TorchNeck(TapeNeck, nn.Module):
        grad = staticmethod(torch.autograd.grad)
        take = nn.Module.load_state_dict

        def __init__(self, steps: tuple[Step, ...], variant: str) -> None:
            nn.Module.__init__(self)
            self.describe(steps, variant)

        def make(self, step: Step) -> Any:
            k = step.kernel
            match step.kind:
                case "conv":
                    options: dict[str, Any] = {"padding": k // 2, "bias": False}
                    args = step.channels, step.out, k
                    if step.coords and self.variant == OURS:
                        return CoordConv2d(*args, coords=COORDS, **options)
                    kind = Concat if step.coords and self.variant == CONCAT else nn.Conv2d
                    return kind(*args, **options)
                case "norm":
                    return nn.BatchNorm2d(step.channels, EPSILON)
                case "act":
                    return nn.LeakyReLU(SLOPE)
                case "pool":
                    return nn.MaxPool2d(k, 1, k // 2)
                case "upsample":
                    return nn.Upsample(scale_factor=2)
            return Joined()

        def arrays(self, arrays: Sequence[Array]) -> list[Any]:
            return [torch.tensor(array, requires_grad=True) for array in arrays]

        def forward(self, maps: Sequence[Any]) -> Any:
            with torch.inference_mode():
                return self.eval().run(maps)

    return TorchNeck


def _paddle() -> Any:
    from coordconv.backends.paddle import CoordConv2D

    import paddle  # isort: skip  # after the adapter, which keeps its warning quiet
    from paddle import nn  # isort: skip

    class Concat(nn.Layer):
        """PaddleDetection's CoordConv."""

        def __init__(self, channels: int, *args: Any, **options: Any) -> None:
            super().__init__()
            self.conv = nn.Conv2D(channels + 2, *args, **options)

        def forward(self, x: Any) -> Any:
            n, _, h, w = x.shape
            gx = (paddle.arange(w) / ((w - 1) * 2.0) - 1).astype(x.dtype)
            gy = (paddle.arange(h) / ((h - 1) * 2.0) - 1).astype(x.dtype)
            gx = gx.reshape([1, 1, 1, w]).expand([n, 1, h, w])
            gy = gy.reshape([1, 1, h, 1]).expand([n, 1, h, w])
            return self.conv(paddle.concat([x, gx, gy], 1))

    class Joined(nn.Layer):
        def forward(self, *xs: Any) -> Any:
            return paddle.concat(xs, 1)

    class PaddleNeck(TapeNeck, nn.Layer):
        grad = staticmethod(paddle.grad)
        take = nn.Layer.set_state_dict

        def __init__(self, steps: tuple[Step, ...], variant: str) -> None:
            nn.Layer.__init__(self)
            self.describe(steps, variant)

        def make(self, step: Step) -> Any:
            k = step.kernel
            match step.kind:
                case "conv":
                    options: dict[str, Any] = {"padding": k // 2, "bias_attr": False}
                    args = step.channels, step.out, k
                    if step.coords and self.variant == OURS:
                        return CoordConv2D(*args, coords=COORDS, **options)
                    kind = Concat if step.coords and self.variant == CONCAT else nn.Conv2D
                    return kind(*args, **options)
                case "norm":
                    return nn.BatchNorm2D(step.channels, epsilon=EPSILON)
                case "act":
                    return nn.LeakyReLU(SLOPE)
                case "pool":
                    return nn.MaxPool2D(k, 1, k // 2)
                case "upsample":
                    return nn.Upsample(scale_factor=2)
            return Joined()

        def arrays(self, arrays: Sequence[Array]) -> list[Any]:
            return [paddle.to_tensor(array, stop_gradient=False) for array in arrays]

        def forward(self, maps: Sequence[Any]) -> Any:
            self.eval()
            with paddle.no_grad():
                return self.run(maps)

    return PaddleNeck


def _flax() -> Any:
    import jax
    from flax import nnx
    from jax import numpy as jnp

    from coordconv.backends.flax import CoordConv

    def upsampled(x: Any) -> Any:
        return x.repeat(2, 1).repeat(2, 2)

    def joined(*xs: Any) -> Any:
        return jnp.concatenate(xs, -1)

    def rectified(x: Any) -> Any:
        return nnx.leaky_relu(x, SLOPE)

    def last(array: Any) -> Any:
        return jnp.moveaxis(jnp.asarray(array), 1, -1)

    def first(array: Any) -> Array:
        return np.moveaxis(np.asarray(array), -1, 1)

    def named(state: Any) -> Iterator[tuple[str, Array]]:
        """The arrays by canonical names, in torch's layout."""
        for layer, arrays in nnx.to_pure_dict(state).items():
            for name, array in arrays.items():
                found = np.asarray(array)
                if name == "kernel":
                    found = np.moveaxis(found, (-1, -2), (0, 1))
                yield _canonical(f"{layer}.{name}"), found

    class FlaxNeck(Neck, nnx.Module):
        def __init__(self, steps: tuple[Step, ...], variant: str) -> None:
            if variant != OURS:
                raise ValueError(f"in NNX variant must be {OURS!r}, got {variant!r}")
            self.describe(steps, variant)

        def make(self, step: Step) -> Any:
            k, rngs = step.kernel, nnx.Rngs(0)
            match step.kind:
                case "conv":
                    options: dict[str, Any] = {"padding": k // 2, "use_bias": False, "rngs": rngs}
                    args = step.channels, step.out, (k, k)
                    if step.coords:
                        return CoordConv(*args, coords=COORDS, **options)
                    return nnx.Conv(*args, **options)
                case "norm":
                    # The default computes a variance as a difference of large numbers.
                    return nnx.BatchNorm(
                        step.channels, epsilon=EPSILON, use_fast_variance=False, rngs=rngs
                    )
                case "act":
                    return rectified
                case "pool":
                    pads = ((k // 2,) * 2,) * 2
                    return lambda x: nnx.max_pool(x, (k, k), (1, 1), pads)
                case "upsample":
                    return upsampled
            return joined

        def state(self) -> dict[str, Array]:
            return dict(named(nnx.state(self, (nnx.Param, nnx.BatchStat))))

        def load_state(self, state: Mapping[str, Array]) -> None:
            found = nnx.state(self, (nnx.Param, nnx.BatchStat))
            arrays = nnx.to_pure_dict(found)
            for layer, own in arrays.items():
                for name in own:
                    array = state[_canonical(f"{layer}.{name}")]
                    if name == "kernel":
                        array = np.moveaxis(array, (0, 1), (-1, -2))
                    own[name] = jnp.array(array)
            nnx.replace_by_pure_dict(found, arrays)
            nnx.update(self, found)

        def evaluate(
            self, maps: Sequence[Array], gradients: Sequence[Array] | None = None
        ) -> dict[str, Array]:
            self.train() if gradients is not None else self.eval()
            graph, params, rest = nnx.split(self, nnx.Param, ...)

            def run(params: Any, maps: list[Any], added: dict[str, Any], rest: Any) -> Any:
                seen = {f"map{i}": x for i, x in enumerate(maps)}

                def watch(name: str, value: Any) -> Any:
                    seen[name] = value + added[name] if added else value
                    return seen[name]

                outputs = nnx.merge(graph, params, rest).run(maps, watch)
                return outputs, seen | {f"tip{i}": y for i, y in enumerate(outputs)}

            def back(given: list[Any], *of: Any) -> Any:
                _, pull, seen = jax.vjp(run, *of, has_aux=True)
                return seen, pull(given)

            inputs = [last(x) for x in maps]
            with jax.default_matmul_precision("highest"):
                if gradients is None:
                    _, seen = jax.jit(run)(params, inputs, {}, rest)
                    return {name: first(array) for name, array in seen.items()}
                shapes = jax.eval_shape(run, params, inputs, {}, rest)[1]
                # What is added is nothing, but its gradient is that of what it is added to.
                added = {n: jnp.zeros(a.shape) for n, a in shapes.items() if n.endswith("conv")}
                given = [last(dy) for dy in gradients]
                seen, of = jax.jit(back)(given, params, inputs, added, rest)
            of_params, of_maps, of_added, _ = of
            found = {name: first(array) for name, array in seen.items()}
            of_added |= {f"map{i}": array for i, array in enumerate(of_maps)}
            found |= {f"gradient of {name}": first(array) for name, array in of_added.items()}
            return found | {f"gradient of {name}": array for name, array in named(of_params)}

    return FlaxNeck
