"""Who shares a program: cells whose shapes agree once ranks are padded within a bucket."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.methods import FullFineTuning, LoRA
from lora_jax.models import Model
from lora_jax.sweeps.pack import Pack, is_padded, is_subspace, make_pack
from lora_jax.train.build import Base, make_method, plan_steps
from lora_jax.train.cell import Cell
from lora_jax.train.optimizer import make_optimizer

# In the place of any dimension: subspaces of all of them share a program, whose cost is what moves.
_ANY = 1
NARROWEST_BUCKET = 8  # below it, padding a rank costs nothing that could be measured


def bucket_of(rank: int) -> int:
    """The width of the bucket a rank is padded in: 8, 16, 32, …, so that 1 never pays for 64.

    >>> [bucket_of(rank) for rank in (1, 8, 9, 64, 65)]
    [8, 8, 16, 64, 128]
    """
    return max(NARROWEST_BUCKET, 1 << (rank - 1).bit_length())


def make_packs(
    cells: Sequence[Cell], params: Any, key_of: Callable[[Cell], Any] = lambda cell: None
) -> tuple[list[Pack], dict[str, RequestError]]:
    """The packs, in order of their first cells, and `{name: why}` of cells that cannot be run.

    A cell whose rules do not fit `params` (a rank above the matrix, no such target) is refused; the
    others still run. Cells with another `key_of` do not share a program.
    """
    groups: list[tuple[Any, dict[str, str], list[Cell]]] = []
    refused: dict[str, RequestError] = {}
    for cell in cells:
        try:
            if cell.refused is not None:
                raise cell.refused
            own, roles = _shape_of(cell, params)
            kind = (key_of(cell), own)
        except RequestError as error:
            refused[cell.name] = error
            continue
        for same, taken, members in groups:
            if same == kind and all(taken.get(p, r) == r for p, r in roles.items()):
                taken |= roles
                members.append(cell)
                break
        else:
            groups.append((kind, dict(roles), [cell]))
    return [make_pack(members, params) for _, _, members in groups], refused


def _shape_of(cell: Cell, params) -> tuple[Any, dict[str, str]]:
    """What must agree for two cells to share a program, and the roles of each adapter's axes, which
    must agree where both have it."""
    method = cell.method
    whole = tuple(method.whole_paths(params))
    if not is_padded(method):
        method.table(params)  # for its checks
        if isinstance(method, FullFineTuning):
            return object(), {}  # each trains a base of its own: nothing to share
        if is_subspace(method):
            return (dataclasses.replace(cast(Any, method), dim=_ANY), whole), {}
        # Nothing is known of other methods but that equal ones have equal programs.
        return method, {}
    sites = cast(LoRA, method).sites(params)
    bucket = bucket_of(max(own.rank for own in sites.values()))
    # What is left of the method once all that may differ is gone: its type and own settings.
    names = {field.name for field in dataclasses.fields(method)}
    own = {name: getattr(method, name) for name in names - {"rules", "axes", "train", "aliases"}}
    targets = None if "targets" in method.ZERO_PADDABLE else tuple(sites)
    roles = {name: own.roles for name, own in sites.items()}
    return (type(method), own, whole, bucket, targets), roles


def make_groups(cells: Sequence[Cell], base: Base) -> tuple[list[Pack], dict[str, RequestError]]:
    """`make_packs` of configs' cells that share `base`, which is what makes their methods.

    A cell that cannot be run (an impossible rank, a bad rate) is refused, the others still run.
    """
    made = [_completed(cell, base) for cell in cells]
    return make_packs(made, base.model.params, lambda cell: _shared_key(cell, base.model))


def _completed(cell: Cell, base: Base) -> Cell:
    """The cell with its method and its number of steps, or with why it is refused."""
    config = cell.config
    try:
        steps_per_epoch = base.train_batches_of(config).steps_per_epoch
        num_steps = plan_steps(config.train, steps_per_epoch).num_steps
        config.check()
        make_optimizer(config.optimizer, num_steps)  # for what its settings mean together
        method = make_method(config.method, base.model_of(cell.seed))
    except RequestError as error:
        return dataclasses.replace(cell, refused=error)
    return dataclasses.replace(cell, made=method, num_steps=num_steps)


def _shared_key(cell: Cell, model: Model) -> str:
    """Cells of one key may share a program, if their shapes agree."""
    # A new head that stays frozen differs by seed.
    return cell.config.program_key(with_seed=not _whole_head(cell, model))


def _whole_head(cell: Cell, model: Model) -> bool:
    if not model.head_is_new:
        return True
    whole = set(cell.method.whole_paths(model.params))
    heads = [p for p in trees.flatten(model.params).paths if re.fullmatch(model.head_pattern, p)]
    return whole.issuperset(heads)
