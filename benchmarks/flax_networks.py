"""What add_coords does to the networks of Flax's own examples, NNX and Linen, as a table.

git clone https://github.com/google/flax
python benchmarks/flax_networks.py flax

The classes are taken from the examples' source, with random weights, and coordinates are given to
all convolutions, to the first alone and to one block. docs/networks.md says what the columns are.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import typer
from flax import linen, nnx
from jax import export
from jax import numpy as jnp

from coordconv.backends import flax as in_nnx
from coordconv.backends import linen as in_linen
from coordconv.backends.jax.adding import split
from coordconv.layers import CoordLayer

_STEPS = 10


def classes(file: Path) -> Any:
    """The classes in a module, or in the Python on a page, with the imports that succeed."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        blocks = re.findall(
            r"^```(?:python|\{code-cell\}[^\n]*)$(.*?)^```$", text, re.DOTALL | re.M
        )
        text = "\n".join(
            re.sub(r"^---$.*?^---$|^[%!].*?$", "", b, flags=re.S | re.M) for b in blocks
        )
    found: dict[str, Any] = {"jax": jax, "jnp": jnp, "nnx": nnx, "__name__": file.stem}
    for node in ast.parse(text).body:
        alias = isinstance(node, ast.Assign) and isinstance(node.value, ast.Name)
        if alias or isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef)):
            try:
                exec(compile(ast.Module([node], []), str(file), "exec", dont_inherit=True), found)
            except (ImportError, NameError):  # of what is no network
                continue
    return found


class Call(nnx.Module):
    """A network as a function of one array."""

    def __init__(self, model: nnx.Module, call: Callable[[Any, Any], Any]) -> None:
        self.model, self.call = model, call

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(self.call(self.model, x))


# Each network: what it is built by, the shape of its input, its first convolution and a block.


def mnist(root: Path) -> Any:
    cnn = classes(root / "examples/mnist/train.py")["CNN"]
    call = lambda model, x: model(x, nnx.Rngs(0))  # noqa: E731
    return lambda: Call(cnn(nnx.Rngs(0)), call), (28, 28, 1), "conv1", "conv2"


def diffusion(root: Path) -> Any:
    unet = classes(root / "docs_nnx/examples/digits_diffusion_model.md")["UNet"]
    call = lambda model, x: model(x, jnp.linspace(0.1, 0.9, len(x)))  # noqa: E731
    build = lambda: Call(unet(1, 1, 8, rngs=nnx.Rngs(0)), call)  # noqa: E731
    return build, (32, 32, 1), "down_convs.0.conv1", "bridge_down"


def detr(root: Path) -> Any:
    found = classes(root / "docs_nnx/examples/object_detection_detr.md")
    build = partial(found["MinimalDETR"], 5, 32, 2, 1, 1)
    call = lambda model, x: model(x)  # noqa: E731
    return lambda: Call(build(rngs=nnx.Rngs(0)), call), (64, 64, 3), "stem.conv", "layer3"


def unetr(root: Path) -> Any:
    found = classes(root / "docs_nnx/examples/image_segmentation.md")
    vit = found["ViTConfig"](img_size=64, num_heads=2, mlp_dim=64, hidden_size=32)
    build = partial(found["UNETR"], found["ModelConfig"](3, vit, 4))
    call = lambda model, x: model(x, rngs=nnx.Rngs(0))  # noqa: E731
    first = "patch_embedding.patch_embeddings"
    return lambda: Call(build(rngs=nnx.Rngs(0)), call), (64, 64, 3), first, "decoder5"


NNX = {
    "NNX: mnist": mnist,
    "NNX: diffusion U-Net": diffusion,
    "NNX: DETR, ResNet50": detr,
    "NNX: UNETR": unetr,
}


def resnet(root: Path) -> Any:
    found = classes(root / "examples/imagenet/models.py")
    net = partial(found["ResNet"], [2, 2, 2, 2], found["ResNetBlock"], 5, 16)
    blocks = ["ResNetBlock_2", "ResNetBlock_3"]
    chosen = {
        "all": (None, lambda features, name: True),
        "first": ("conv_init", lambda features, name: name == "conv_init"),
        "block": (blocks, lambda features, name: features == 32),
    }
    return lambda conv: net(conv=conv), {"train": False}, (64, 64, 3), chosen


def actor_critic(root: Path) -> Any:
    found = classes(root / "examples/ppo/models.py")

    def build(conv: Any) -> Any:  # it has no argument for the class
        found["nn"] = SimpleNamespace(**{**vars(linen), "Conv": conv})
        return found["ActorCritic"](4)

    chosen = {
        "all": (None, lambda features, name: True),
        "first": ("conv1", lambda features, name: name == "conv1"),
        "block": ("conv2", lambda features, name: name == "conv2"),
    }
    return build, {}, (84, 84, 4), chosen


LINEN = {"Linen: imagenet ResNet18": resnet, "Linen: ppo": actor_critic}


class Conv(in_linen.CoordConv):
    """The class that is passed in, under the name that Linen gives its layers."""

    map_only = True


def difference(one: Any, other: Any) -> float:
    """The largest difference of two networks' outputs, over the largest output."""
    pairs = [*zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]
    scale = max(float(jnp.abs(b).max()) for _, b in pairs)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs) / scale


def loss(outputs: Any) -> Any:
    return sum(((leaf - 1) ** 2).mean() for leaf in jax.tree.leaves(outputs))


def exported(run: Any, x: jax.Array) -> Any:
    return export.export(jax.jit(run))(jax.ShapeDtypeStruct(x.shape, x.dtype)).call(x)


def equal(one: Any, other: Any) -> bool:
    structure: Any = jax.tree.structure(one)
    return structure == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(np.array_equal, one, other)
    )


def measured_nnx(build: Any, x: jax.Array, layers: str | None) -> tuple[Any, ...]:
    """A row of the table."""

    def arrays(model: nnx.Module) -> Any:
        return nnx.state(model, nnx.Not(nnx.RngState))

    @nnx.jit
    def run(model: Any, x: jax.Array) -> Any:
        return model(x)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        value, grads = nnx.value_and_grad(lambda model: loss(model(x)))(model)
        optimizer.update(model, grads)
        return value

    model = build()
    model.eval()
    before, wanted, compiled = jax.tree.map(jnp.copy, arrays(model)), model(x), run(model, x)
    changes = in_nnx.add_coords(model, layers=layers)
    found = [difference(model(x), wanted), difference(run(model, x), compiled)]
    nnx.update(model, changes.fit(before))
    loaded = "yes" if difference(model(x), wanted) == 0 else "NO"
    removed = nnx.clone(model)
    in_nnx.remove_coords(removed)
    back = equal(arrays(removed), before)
    model.train()
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    losses = [float(step(model, optimizer)) for _ in range(_STEPS)]
    coord: Any = [m for _, m in nnx.iter_graph(model) if isinstance(m, CoordLayer)]
    moved = sum(bool(split(layer, layer.kernel[...])[1].any()) for layer in coord)
    model.eval()
    fused, (graph, state) = in_nnx.fuse(model, size=x), nnx.split(model)
    found += [
        difference(fused(x), model(x)),
        difference(exported(lambda x: nnx.merge(graph, state)(x), x), run(model, x)),
    ]
    return len(coord), found, loaded, back, losses, moved


def measured_linen(build: Any, given: Any, x: jax.Array, layers: Any, ours: Any) -> tuple[Any, ...]:
    """A row of the table; ``ours(features, name)`` tells which layers are CoordConvs."""

    def conv(features: int, *args: Any, name: str | None = None, **options: Any) -> Any:
        kind = partial(Conv, coords="xy") if ours(features, name) else linen.Conv
        return kind(features, *args, name=name, **options)

    def apply(conv: Any, variables: Any, x: jax.Array) -> Any:
        return build(conv).apply(variables, x, **given)

    before = build(linen.Conv).init(jax.random.key(0), x, **given)
    variables = in_linen.add_coords(before, layers)
    found = [
        difference(run(conv, variables, x), run(linen.Conv, before, x))
        for run in (apply, jax.jit(apply, static_argnums=0))
    ]
    back = equal(in_linen.remove_coords(variables, layers), before)
    rule, rest = optax.adam(1e-3), {k: v for k, v in variables.items() if k != "params"}

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(
            lambda params: loss(apply(conv, {"params": params, **rest}, x))
        )(params)
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = variables["params"], rule.init(variables["params"]), []
    for _ in range(_STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    kernels = [
        new[..., old.shape[-2] :, :]
        for new, old in zip(*map(jax.tree.leaves, (params, before["params"])), strict=True)
        if new.shape != old.shape
    ]
    trained = {"params": params, **rest}
    fused, _ = in_linen.fuse(build(conv), trained, x, **given)
    run = partial(apply, conv, trained)
    found += [
        difference(apply(conv, fused, x), run(x)),
        difference(exported(run, x), run(x)),
    ]
    return len(kernels), found, "rewritten", back, losses, sum(bool(k.any()) for k in kernels)


def main(flax: Path) -> None:
    """The table, of a checkout of Flax."""
    head = (
        "network | scope | layers | eager | jit | state | removed | steps | moved | fuse | export"
    )
    print(f"| {head} |\n|{' --- |' * len(head.split('|'))}")
    draw = np.random.default_rng(0).normal

    def show(name: str, scope: str, row: tuple[Any, ...]) -> None:
        layers, (eager, jit, fused, run), loaded, back, losses, moved = row
        words = [loaded, "yes" if back else "NO"]
        steps = f"{losses[0]:.3g} -> {losses[-1]:.3g}"
        cells = [name, scope, layers, f"{eager:.2g}", f"{jit:.2g}", *words, steps, moved]
        print("|", " | ".join(map(str, [*cells, f"{fused:.1e}", f"{run:.1e}"])), "|", flush=True)

    for name, network in NNX.items():
        build, shape, first, block = network(flax)
        x = jnp.asarray(draw(size=(2, *shape)), "float32")
        for scope, layers in {"all": None, "first": first, "block": block}.items():
            show(name, scope, measured_nnx(build, x, layers))
    for name, network in LINEN.items():
        build, given, shape, chosen = network(flax)
        x = jnp.asarray(draw(size=(2, *shape)), "float32")
        for scope, choice in chosen.items():
            show(name, scope, measured_linen(build, given, x, *choice))


if __name__ == "__main__":
    typer.run(main)
