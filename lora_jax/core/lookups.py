"""Lookups in an adapted table: the rows of A and B that are asked for, never ΔW."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError
from lora_jax.core.labelled_dot import contract, times_side
from lora_jax.core.values import Use, use_beneath
from lora_jax.core.weights import LoRAWeight

_FILL = lax.GatherScatterMode.FILL_OR_DROP


class GatherUse(Use):
    """A lookup: whole slices of the kernel by index along some of its axes.

    The axes that are looked up are gone from the result, or of size one; the others are there in
    full. Along an axis of `batching` each index has its own part of the kernel (a table vmapped
    over its stack). Adapter dropout does not reach it: there is no input to drop from (as in
    `peft`).
    """

    @property
    def numbers(self) -> lax.GatherDimensionNumbers:
        return self.params["dimension_numbers"]

    @property
    def looked_up(self) -> tuple[int, ...]:
        return looked_up(self.eqn, self.kernel_shape)

    def has_form(self) -> bool:
        """Whether the kernel is the table, and there in full along what is not looked up."""
        if self.place != 0:
            return False
        numbers, sizes = self.numbers, self.params["slice_sizes"]
        # An index along an axis that is there in full says nothing, unless it may be past the end.
        if self.params["mode"] == _FILL and len(self.looked_up) < len(numbers.start_index_map):
            return False
        gone = {*self.looked_up, *numbers.operand_batching_dims}
        pairs = enumerate(zip(sizes, self.kernel_shape, strict=True))
        cut = {axis for axis, (size, full) in pairs if size != full}
        return {*numbers.collapsed_slice_dims, *cut} <= gone

    @property
    def batch_labels(self) -> list:
        """For each batch axis of the indices: the kernel's axis it goes along, or its own."""
        numbers = self.numbers
        along = zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True)
        labels = {int(n): int(axis) for n, axis in along}
        return [labels.get(n, ("g", n)) for n in range(self.other.ndim - 1)]

    @property
    def out_axes(self) -> list:
        gone = {*self.numbers.collapsed_slice_dims, *self.numbers.operand_batching_dims}
        kept = iter(axis for axis in range(len(self.kernel_shape)) if axis not in gone)
        kept = iter(("one", axis) if axis in self.looked_up else axis for axis in kept)
        batch = iter(self.batch_labels)
        offsets = self.numbers.offset_dims
        return [next(kept if n in offsets else batch) for n in range(len(self.out.shape))]

    def gain_on_outputs(self, gain, axes):
        gain, axes = self._looked_up(gain, axes, fill=1)
        if not self.params["fill_value"]:  # zero and NaN stay what they are
            return gain, axes
        # What stands for an index past the end is no output of the kernel.
        ones = jnp.ones([self.kernel_shape[axis] for axis in self.looked_up], gain.dtype)
        inside, places = self._looked_up(ones, list(self.looked_up))
        out = [axis for axis in self.out_axes if axis in (*axes, *places)]
        sizes = dict(zip((*axes, *places), (*gain.shape, *inside.shape), strict=True))
        whole = jnp.ones([sizes[axis] for axis in out], gain.dtype)
        inside = times_side(whole, out, inside, places)
        return jnp.where(inside != 0, times_side(whole, out, gain, axes), 1), out

    def low_rank(self, weight: LoRAWeight):
        wide = float32_or_wider(weight.a.dtype)
        out = [x for x in self.out_axes if not (isinstance(x, tuple) and x[0] == "one")]
        a, a_axes = self._looked_up(weight.a.astype(wide), weight.side_axes("a"))
        b, b_axes = self._looked_up(weight.b.astype(wide), weight.side_axes("b"))
        scale = jnp.asarray(weight.scale).astype(wide)
        a = times_side(a, a_axes, *self._looked_up(scale, weight.side_axes("scale")))
        return lax.reshape(contract(a, a_axes, b, b_axes, out), self.out.shape)

    def _looked_up(self, x, axes, fill=0):
        """What the lookup makes of an array that has some of the kernel's axes; with its axes."""
        mine = [axis for axis in self.looked_up if axis in axes]
        if not mine:
            return x, axes
        columns = [self.numbers.start_index_map.index(axis) for axis in mine]
        indices = self.other[..., jnp.array(columns)]
        places = tuple(axes.index(axis) for axis in mine)
        along = {axes.index(axis): n for n, axis in enumerate(self.batch_labels) if axis in axes}
        rest = [n for n in range(x.ndim) if n not in places and n not in along]
        num_batch = indices.ndim - 1
        numbers = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(num_batch, num_batch + len(rest))),
            collapsed_slice_dims=tuple(sorted(places)),
            start_index_map=places,
            operand_batching_dims=tuple(sorted(along)),
            start_indices_batching_dims=tuple(along[n] for n in sorted(along)),
        )
        # Past the end the frozen lookup says what is there; nothing is added.
        names = ("indices_are_sorted", "unique_indices", "mode", "fill_value")
        options = {name: self.params[name] for name in names}
        if options["fill_value"] is not None or options["mode"] == _FILL:
            options["fill_value"] = fill
        if len(columns) < self.other.shape[-1]:  # what holds of the pairs need not hold of one
            options |= {"indices_are_sorted": False, "unique_indices": False}
        sizes = [1 if n in places or n in along else x.shape[n] for n in range(x.ndim)]
        found = lax.gather(x, indices, numbers, tuple(sizes), **options)
        return found, [*self.batch_labels, *(axes[n] for n in rest)]


def looked_up(eqn, shape) -> tuple[int, ...]:
    """The axes of a kernel of this shape that a `gather` equation looks up by index."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    return tuple(
        axis
        for axis in numbers.start_index_map
        if axis in numbers.collapsed_slice_dims or sizes[axis] == 1 < shape[axis]
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupWeight(LoRAWeight):
    """A `LoRAWeight` that acts on lookups alone: other uses of a tied table see the frozen one."""

    def use(self, use: Use) -> jax.Array | None:
        return super().use(use) if isinstance(use, GatherUse) else use_beneath(self.kernel, use)

    def materialise(self) -> jax.Array:
        raise RequestError(
            f"the adapter of {self.path!r} acts on lookups alone, while the model uses the same "
            "table elsewhere without it, so no one array stands for both; load the model with "
            "load_model(…, untie=True), and the adapter into that"
        )
