"""Adapters of this project as factors, matrix by matrix, as those of files are."""

from __future__ import annotations

import numpy as np

from lora_jax.analysis.profiles import Kernels
from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.core.values import is_adapted
from lora_jax.methods.base import Method, PyTree, Trainable
from lora_jax.methods.intrinsic import IntrinsicDimension
from lora_jax.methods.sites import Site, path_of
from lora_jax.methods.sums import Changes
from lora_jax.methods.uni_lora import UniLoRA
from lora_jax.peft.factors import AdapterFactors, Factors
from lora_jax.quant.weight import NF4Weight


def factors_of(
    method: Method, trainable: Trainable, params: PyTree, *, name: str = "adapter"
) -> AdapterFactors:
    """The matrices that a method of this project changes, by path, as `Factors`.

    Stacked layers come apart, `path[0]`, `path[1]`, …; several axes of inputs or outputs count as
    one. Parameters that train in full are left out.

    Args:
      method, trainable: what `method.init` gave, or what it became in training.
      params: the base's parameters.
      name: what the adapter is called in results.

    Raises:
      RequestError: the method's change is not low-rank (DoRA, full fine-tuning: take
        `lj.analysis.kernel_svd` of the difference), or nothing is adapted.

    >>> import jax, lora_jax as lj
    >>> params = {"w": jax.numpy.ones((6, 4))}
    >>> method = lj.LoRA(targets="w", rank=2, alpha=4)
    >>> factors_of(method, method.init(jax.random.key(0), params)[0], params).factors["w"].shape
    (6, 4)
    """
    found = {}
    for entry_name, part in _parts_of(method, trainable, params):
        site = part.site
        a = np.asarray(part.a).reshape(site.size("s"), site.size("i"), -1)
        b = np.asarray(part.b).reshape(site.size("s"), -1, site.size("o"))
        for layer, own in enumerate(_names_of(entry_name, site)):
            found[own] = Factors(a[layer], b[layer], 1.0)
    if not found:
        raise RequestError(
            f"{type(method).__name__} adapts no matrix here; there is nothing to analyse"
        )
    return AdapterFactors(name=name, factors=found)


def kernels_of(method: Method, trainable: Trainable, params: PyTree) -> Kernels:
    """W of the matrices that `factors_of` names, for `profile_adapter`. Raises as that does.

    >>> import jax, lora_jax as lj
    >>> params = {"w": jax.numpy.ones((6, 4))}
    >>> method = lj.LoRA(targets="w", rank=2, alpha=4)
    >>> trainable = method.init(jax.random.key(0), params)[0]
    >>> adapter = factors_of(method, trainable, params)
    >>> kernels_of(method, trainable, params)(adapter, "w").shape
    (6, 4)
    """
    flat = dict(trees.flatten(params, is_leaf=is_adapted).items())
    places = {
        own: (part.site, layer)
        for name, part in _parts_of(method, trainable, params)
        for layer, own in enumerate(_names_of(name, part.site))
    }

    def kernel(adapter: AdapterFactors, module: str) -> np.ndarray:
        if module not in places:
            raise RequestError(
                f"the base has no matrix {module!r}; {trees.nearest(module, places)}"
            )
        site, layer = places[module]
        kernel = flat[site.path]
        kernel = kernel.dequantize() if isinstance(kernel, NF4Weight) else kernel
        whole = np.asarray(site.cut(kernel), np.float32)
        order = [n for role in "sio" for n, own in enumerate(site.roles) if own == role]
        sizes = tuple(site.size(role) for role in "sio")
        return whole.transpose(order).reshape(sizes)[layer]

    return kernel


def _parts_of(method: Method, trainable: Trainable, params: PyTree):
    """`(name, LowRank)` of every adapter. Raises `RequestError` where one is not low-rank."""
    if isinstance(method, UniLoRA):
        method, trainable = method.to_lora(trainable, params)
    if isinstance(method, IntrinsicDimension):
        raise RequestError(
            "what a random subspace changes is not low-rank; take lj.analysis.kernel_svd of the "
            "merged parameters' differences"
        )
    flat = dict(trees.flatten(params, is_leaf=is_adapted).items())
    changes = Changes(flat)
    for name, entry in trainable.items():
        if path_of(name) not in flat:
            raise RequestError(
                f"the adapter is of {name!r}, which the parameters do not have; give the params "
                "it was trained on"
            )
        changes.add(method, name, entry, 1.0)
    for name, parts in changes.low_rank.items():
        yield from ((name, part) for part in parts)


def _names_of(name: str, site: Site) -> list[str]:
    """A name for each matrix of an adapter: of stacked ones with the layer."""
    return [f"{name}[{n}]" for n in range(site.size("s"))] if site.sizes("s") else [name]
