"""An NNX module seen as a pure function of a nested plain dict of arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from lora_jax.core.errors import RequestError


def functional(make_module: Callable[[], nnx.Module]) -> tuple[dict[str, Any], Callable]:
    """Returns `(shapes, call)` for the module, without computing or storing any weight.

    `shapes` maps each parameter's path ("encoder/layers/0/…") to a `jax.ShapeDtypeStruct`;
    `call(params, *args, **kwargs)` runs the module with the nested dict `params`, whose leaves may
    be arrays or tracers of any dtype. It raises `RequestError` if they lack a path or have another.
    """
    graph, state = nnx.split(nnx.eval_shape(make_module))
    keyed, treedef = jax.tree_util.tree_flatten_with_path(state)
    # The last key is the variable's own `.value`, which a plain dict does not have.
    shapes = {"/".join(str(key.key) for key in keys[:-1]): leaf for keys, leaf in keyed}

    def call(params: Mapping[str, Any], *args, **kwargs):
        flat = flatten(params)
        for path in shapes:
            if flat.get(path) is None:
                raise RequestError(
                    f"params hold no array at {path!r}; pass the whole tree, as model.params or "
                    "method.bind(trainable, frozen) give it"
                )
        if extra := sorted(flat.keys() - shapes.keys()):
            raise RequestError(f"params hold {', '.join(extra[:5])}, which the model does not have")
        leaves = [flat[path] for path in shapes]
        return nnx.merge(graph, jax.tree.unflatten(treedef, leaves))(*args, **kwargs)

    return shapes, call


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
