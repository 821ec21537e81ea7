"""`Placement`: the sharding of everything a train step takes, on one mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.methods import Method
from lora_jax.methods.sites import path_of
from lora_jax.models import Model
from lora_jax.parallel.mesh import BATCH, batch_parts, without_cells
from lora_jax.parallel.rules import fitted, roles_of, spec_of
from lora_jax.quant.weight import NF4Weight

_ACTIVATIONS = {
    "states": (BATCH, "tensor", None),
    "heads": (BATCH, None, "tensor", None),
    "inner": (BATCH, None, "tensor"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Shardings on `mesh` for a model and what trains on it; trees of `NamedSharding`s.

    Without a model, before one is loaded, kernels are (in, out) by their names.
    """

    mesh: Mesh
    model: Model | None = None

    def _named(self, spec, shape, elsewhere: tuple[int, ...] = ()) -> NamedSharding:
        fits = fitted(tuple(spec), tuple(shape), self.mesh, elsewhere=elsewhere)
        return NamedSharding(self.mesh, fits)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def params(self, params: Any) -> Any:
        """Of a params tree, or of `frozen`, by `parallel.rules`."""
        flat = trees.flatten(params)
        leaves = [
            leaf if isinstance(leaf, trees.Hole) else self.leaf(path, leaf)
            for path, leaf in flat.items()
        ]
        return flat.unflatten(leaves)

    def _roles(self, path: str, ndim: int) -> str:
        return roles_of(path, ndim, self.model.axes if self.model else {})

    def leaf(self, path: str, leaf: Any) -> Any:
        """Of one parameter, in four bits or not."""
        roles = self._roles(path, len(leaf.shape))
        spec = spec_of(path, roles)
        if isinstance(leaf, NF4Weight):
            return self._of_four_bits(leaf, roles, spec)
        # The inputs and outputs of a matrix; never its stack, which a scan walks along.
        others = tuple(n for n, role in enumerate(roles) if role != "s") if "i" in roles else ()
        return self._named(spec, leaf.shape, others[::-1])

    def _of_four_bits(self, leaf: NF4Weight, roles: str, spec) -> NF4Weight:
        """Codes and scales are (stack…, out, in / …), split as their kernel is.

        Where blocks run on they are one row, whole on every device: XLA's partitioner computes
        wrong values of a row that is cut up (seen with jax 0.10.2 on CPU).
        """
        stack, by_role = [], {}
        for role, axis in zip(roles, spec, strict=True):
            if role == "s":
                stack.append(axis)
            else:
                by_role[role] = by_role.get(role) or axis
        of_rows = (*stack, by_role.get("o"), by_role.get("i"))
        if leaf.scales.shape[-2] == 1:
            of_rows = (None,) * len(of_rows)
        # Codes as their scales are: half of a block is no block.
        last = len(of_rows) - 1
        elsewhere = () if leaf.scales.shape[-2] == 1 else (last - 1, last)
        named = self._named(of_rows, leaf.scales.shape, elsewhere)
        return dataclasses.replace(
            leaf,
            kernel=named,
            scales=named,
            block_scales=None if leaf.block_scales is None else self.replicated,
            mean=None if leaf.mean is None else self.replicated,
        )

    def trainable(self, method: Method, trainable: Any) -> Any:
        """Of what trains: a part of an adapter follows the axes of its kernel, by their roles."""
        assert self.model is not None  # trainables belong to a model that is loaded
        shapes = {p: leaf.shape for p, leaf in trees.flatten(self.model.params).items()}

        def of_part(name: str, part: str, leaf: Any) -> NamedSharding:
            path = path_of(name)
            if path not in shapes:
                return self.replicated
            roles = self._roles(path, len(shapes[path]))
            spec = spec_of(path, roles)
            if part == "value":
                return self._named(spec, leaf.shape)
            letters = method.roles_of(name, part)
            if letters is None:
                return self.replicated
            own: list[str | None] = []
            for letter in letters:
                axes = [axis for axis, role in zip(spec, roles, strict=True) if role == letter]
                own += [None] if letter == "r" else axes
            return self._named(own, leaf.shape) if len(own) == leaf.ndim else self.replicated

        return {
            name: {part: of_part(name, part, leaf) for part, leaf in entry.items()}
            for name, entry in trainable.items()
        }

    def state(self, method: Method, state: Any) -> Any:
        """Of a whole `TrainState`, as one of shardings: moments lie where their parameters do."""
        of_trainable = self.trainable(method, state.trainable)

        def of_moment(keys, leaf) -> NamedSharding:
            # A moment's last two keys are its parameter's: the adapter's name and the part.
            name, part = (getattr(key, "key", None) for key in ((None, None, *keys)[-2:]))
            like = state.trainable.get(name, {}).get(part) if isinstance(name, str) else None
            same = like is not None and jnp.shape(like) == jnp.shape(leaf)
            return of_trainable[name][part] if same else self.replicated

        of_opt = jax.tree_util.tree_map_with_path(of_moment, state.opt_state)
        return dataclasses.replace(
            state,
            step=self.replicated,
            trainable=of_trainable,
            opt_state=of_opt,
            key=self.replicated,
        )

    def batch(self, batch: Any) -> Any:
        """Of a batch: rows over `data` and `fsdp` together, where these divide them."""
        return jax.tree.map(
            lambda x: self._named((BATCH, *[None] * (jnp.ndim(x) - 1)), jnp.shape(x)), batch
        )

    def place_batch(self, batch: Any) -> Any:
        """The batch, or its shapes, there."""
        return place(batch, self.batch(batch))

    def alone(self, batch_size: int, accumulate: int = 1) -> Placement:
        """For one cell by itself: the devices of `cell` share its batch where they divide it, and
        else they all do the same."""
        mesh = without_cells(self.mesh)
        divides = batch_size % (batch_parts(mesh.shape) * accumulate) == 0
        return dataclasses.replace(self, mesh=mesh) if divides else self

    def check_batch(self, size: int, accumulate: int = 1) -> None:
        """Raises `RequestError` where the rows of a training batch do not divide over the mesh."""
        rows = batch_parts(self.mesh.shape)
        if size % (rows * accumulate):
            parts = f" in {accumulate} parts" if accumulate > 1 else ""
            raise RequestError(
                f"data.batch_size={size}{parts} does not divide over the {rows} places of data x "
                f"fsdp in --mesh; give a multiple of {rows * accumulate}, or another mesh"
            )

    def constrain(self, x: jax.Array, kind: str = "states") -> jax.Array:
        """Where an activation lies: each device has rows of the batch, and its part of `tensor`.

        Of "states" between layers (B, T, D) that is a part of the positions, so that what is kept
        for the backward pass is split, too (Korthikanti et al. 2022, arXiv:2205.05198); of "heads"
        (B, T, N, H) some heads, of "inner" (B, T, F) some of the MLP's units.
        """
        spec = _ACTIVATIONS[kind]
        return jax.lax.with_sharding_constraint(x, self._named(spec, x.shape))


def place(tree: Any, shardings: Any) -> Any:
    """The tree's arrays where `shardings` say, those that lie there as they are; of a tree with
    shape structs all as such, with their sharding."""
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)):
        return jax.device_put(tree, shardings)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=where),
        tree,
        shardings,
    )
