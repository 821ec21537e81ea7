"""Checkpoints: whole or not there, written while training goes on, verified when read.

Orbax writes each step into a temporary folder and renames it when all is on the disk. It does not
notice changed bytes, so every checkpoint carries the SHA-256 of each array, and restoring compares.
The arrays of a step lie one after the other in one array of bytes: Orbax reads arrays side by side,
and one that fails leaves the others to print tracebacks into a terminal that is owed one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lora_jax.core.draws import KEY_IMPL
from lora_jax.core.errors import RequestError

PyTree = Any


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run in `folder`, at most the last two; a context manager.

    Opening removes what a killed process left half written. Leaving waits for what is being
    written. Failing to write is a `RequestError`, and the checkpoints before stay as they are.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).absolute()
        logging.getLogger("absl").addFilter(_is_not_orbax)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        try:
            self._orbax = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise self._write_error("open", error) from error
        # What Orbax finds there it parses, and damaged metadata raise as many types as parsers do.
        except Exception as error:
            raise RequestError(
                f"{self.folder} holds no checkpoints that can be read ({_one_line(error)}); remove "
                "it to begin again"
            ) from error

    @property
    def latest_step(self) -> int | None:
        """The last step that is wholly on the disk or on its way there."""
        return self._orbax.latest_step()

    def save(self, step: int, groups: Mapping[str, PyTree], facts: Mapping[str, Any]) -> None:
        """Begins to write named trees of arrays and JSON `facts`; the arrays are copied first.

        Copying is all that the caller waits for, so buffers may be donated right after. A write
        that failed since the last call is raised here.
        """
        packed, manifest = _pack(groups)
        facts = {"facts": dict(facts), "manifest": manifest}
        try:
            self._orbax.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave({"bytes": packed}),
                    facts=ocp.args.JsonSave({**facts, "sha256": _digest_json(facts)}),
                ),
            )
        # Orbax and TensorStore raise ValueError, RuntimeError and OSError alike for a failed write.
        except Exception as error:
            raise self._write_error(f"write the checkpoint of step {step} in", error) from error

    def wait(self) -> None:
        """Returns when everything is on the disk. Raises `RequestError` if it could not be."""
        try:
            self._orbax.wait_until_finished()
            self._orbax.check_for_errors()
        except Exception as error:
            raise self._write_error("write the last checkpoint in", error) from error

    def restore(
        self, like: Mapping[str, PyTree] | Callable[[dict], Mapping[str, PyTree]]
    ) -> tuple[dict[str, PyTree], dict] | None:
        """The latest checkpoint as `(groups, facts)`, bit for bit what was saved; None if none is.

        `like` gives the structure, shapes and dtypes of each group (arrays or shape structs), or is
        a function that makes them of the facts; a group that was not saved is left out. Raises
        `RequestError` naming the step and the way out if a byte was changed or the arrays are not
        like `like`.
        """
        step = self.latest_step
        if step is None:
            return None
        try:
            facts = self._read(step, "facts", ocp.args.JsonRestore())
            digest = facts.pop("sha256")
            if _digest_json(facts) != digest:
                raise ValueError("its facts are not those that were saved")
            packed = self._read(step, "arrays", ocp.args.PyTreeRestore())["bytes"]
            groups = _unpack(packed, facts["manifest"])
        # Changed bytes can raise anything on their way through the decoders.
        except Exception as error:
            raise RequestError(
                f"checkpoint {self.folder / str(step)} is damaged ({_one_line(error)}); "
                f"{self._way_out(step)}"
            ) from error
        if callable(like):
            like = like(facts["facts"])
        return {
            name: self._rebuild(step, name, leaves, facts["manifest"][name], like[name])
            for name, leaves in groups.items()
        }, facts["facts"]

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except RequestError:
            if error is None:  # else what went wrong first is the better story
                raise
        finally:
            self._orbax.close()
            logging.getLogger("absl").removeFilter(_is_not_orbax)

    def _read(self, step: int, item: str, args):
        return self._orbax.restore(step, args=ocp.args.Composite(**{item: args}))[item]

    def _rebuild(self, step: int, name: str, leaves, rows, like: PyTree) -> PyTree:
        keyed, treedef = jax.tree_util.tree_flatten_with_path(like)
        wanted = [[_name(keys), *_shape_dtype(leaf)] for keys, leaf in keyed]
        saved = [row[:3] for row in rows]
        if saved != wanted:
            pairs = itertools.zip_longest(saved, wanted)
            there, here = next(pair for pair in pairs if pair[0] != pair[1])
            raise RequestError(
                f"checkpoint {self.folder / str(step)} holds {there} in {name} where this run has "
                f"{here}: another version wrote it; remove {self.folder} to begin "
                "again"
            )
        restored = [_from_host(leaf, one) for leaf, (_, one) in zip(leaves, keyed, strict=True)]
        return jax.tree_util.tree_unflatten(treedef, restored)

    def _way_out(self, step: int) -> str:
        earlier = max((s for s in self._orbax.all_steps() if s < step), default=None)
        if earlier is None:
            return f"remove {self.folder} to begin again"
        return f"remove that folder to go on from step {earlier}"

    def _write_error(self, doing: str, error: Exception) -> RequestError:
        return RequestError(
            f"cannot {doing} {self.folder}: {_one_line(error)}; free some space and run the same "
            "command again: it goes on from the last checkpoint that is whole"
        )


def _pack(groups: Mapping[str, PyTree]) -> tuple[np.ndarray, dict[str, list]]:
    """All arrays as one of bytes, and rows of name, shape, dtype and SHA-256 for each group."""
    keyed = {name: jax.tree_util.tree_flatten_with_path(tree)[0] for name, tree in groups.items()}
    leaves = [_plain(leaf) for rows in keyed.values() for _, leaf in rows]
    packed = np.empty(sum(leaf.nbytes for leaf in leaves), np.uint8)
    # A CPU array's host view is its buffer, which the next step takes back: hence the copy.
    host, start = iter(jax.device_get(leaves)), 0
    manifest: dict[str, list] = {}
    for group, rows in keyed.items():
        manifest[group] = []
        for keys, _ in rows:
            array = np.asarray(next(host))
            part = packed[start : start + array.nbytes]
            part[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            start += array.nbytes
            row = [_name(keys), list(array.shape), str(array.dtype), _digest(part)]
            manifest[group].append(row)
    return packed, manifest


def _from_host(leaf: np.ndarray, like: Any) -> jax.Array:
    # A copy again: JAX may take an aligned NumPy buffer over as it is, and donate it later.
    array = jnp.array(leaf, copy=True)
    if _is_key(like):
        # JAX does not tell the kind of a shape struct; a run's keys are of the stated one.
        impl = jax.random.key_impl(like) if isinstance(like, jax.Array) else KEY_IMPL
        array = jax.random.wrap_key_data(array, impl=impl)
    where = getattr(like, "sharding", None)
    if where is None or (where.num_devices, where.memory_kind) == (1, array.sharding.memory_kind):
        return array
    # Where the run has it now, which need not be the mesh, or the memory, that it was saved from.
    return jax.device_put(array, where)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    """The leaf as it is saved: of a key its data."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _shape_dtype(leaf: Any) -> tuple[list[int], str]:
    plain = jax.eval_shape(_plain, leaf)
    return list(plain.shape), str(plain.dtype)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Keeps Orbax quiet: it logs each failure with tracebacks, we raise one error."""
    return "orbax" not in record.pathname


def _name(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _unpack(packed: np.ndarray, manifest: Mapping[str, list]) -> dict[str, list[np.ndarray]]:
    """The arrays by group. Raises `ValueError` naming the first that is not what was saved."""
    groups, start = {}, 0
    for group, rows in manifest.items():
        groups[group] = []
        for name, shape, dtype, digest in rows:
            stop = start + math.prod(shape) * np.dtype(dtype).itemsize
            part, start = packed[start:stop], stop
            if _digest(part) != digest:
                raise ValueError(f"{group}/{name} is not what was saved")
            groups[group].append(part.view(dtype).reshape(shape))
    return groups


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.data).hexdigest()


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
