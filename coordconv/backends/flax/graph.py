"""What an NNX network holds, and under which names; modules that take the place of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any

from flax import nnx

# Modules that compute the kernel of the one inside of them, where a release has them.
COMPUTING = tuple(getattr(nnx, n) for n in ("WeightNorm", "SpectralNorm") if hasattr(nnx, n))


_OBJECTS = getattr(nnx, "Pytree", nnx.Module), nnx.Module
_NODES = (*_OBJECTS, nnx.Variable, MutableSequence, MutableMapping)


def children(node: Any) -> list[tuple[Any, Any]]:
    """What a node of a graph holds, under its attributes, keys or places."""
    if isinstance(node, (MutableSequence, tuple)):
        return [*enumerate(node)]
    if isinstance(node, Mapping):
        return [*node.items()]
    return [*vars(node).items()] if isinstance(node, _OBJECTS) else []


def named(model: nnx.Module) -> dict[str, Any]:
    """All modules, Variables, lists, tuples and dicts in a network, under each of their names.

    ``nnx.iter_graph`` has each once, under one name. ValueError for a module that is where none
    could take its place.
    """
    found = dict(_named(model, (), ()))
    known = {*map(id, found.values())}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module) and id(node) not in known:
            raise ValueError(
                f"{'.'.join(map(str, path))} must be in modules, lists, tuples and dicts alone, "
                "for another to take its place"
            )
    return found


def _named(node: Any, path: tuple[Any, ...], inside: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    if id(node) in inside:  # in a circle
        return
    yield ".".join(map(str, path)), node
    for key, child in children(node):
        if isinstance(child, _NODES) or (type(child) is tuple and any(map(_is_node, child))):
            yield from _named(child, (*path, key), (*inside, id(node)))


def _is_node(value: Any) -> bool:
    return isinstance(value, (*_NODES, tuple))


def replace(model: nnx.Module, new: Mapping[int, nnx.Module]) -> None:
    """Put modules in place of others, by the ids of these, wherever a network holds them."""
    seen = {id(node): node for node in named(model).values()}
    for parent in seen.values():
        if isinstance(parent, (tuple, nnx.Variable)):
            continue
        for key, child in children(parent):
            other = _replaced(child, new)
            if other is child:
                continue
            if isinstance(parent, (MutableSequence, MutableMapping)):
                parent[key] = other
            else:
                setattr(parent, key, other)


def _replaced(child: Any, new: Mapping[int, nnx.Module]) -> Any:
    """What takes a child's place: in a tuple, another tuple."""
    if type(child) is not tuple:
        return new.get(id(child), child)
    others = tuple(_replaced(each, new) for each in child)
    return others if any(a is not b for a, b in zip(child, others, strict=True)) else child
