"""`lift`: lets any JAX function meet adapted values.

`lift(apply)` traces `apply` once to a jaxpr, with each adapted value seen as the plain array it
stands for, then evaluates the jaxpr with the rules for adapted values (`core/interpreter.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from lora_jax.core import control as control  # their import fills the table of rules
from lora_jax.core import jaxprs
from lora_jax.core import primitives as primitives
from lora_jax.core.explicit import in_mesh
from lora_jax.core.interpreter import RULES as RULES
from lora_jax.core.interpreter import Interpreter as Interpreter
from lora_jax.core.interpreter import MaterialisedWarning as MaterialisedWarning
from lora_jax.core.interpreter import watch_materialised as watch_materialised
from lora_jax.core.trees import filled
from lora_jax.core.values import is_adapted


def lift(fun: Callable, *, strict: bool = False) -> Callable:
    """Returns `fun` taught to take adapted values anywhere among its arguments.

    A function that changes a module in place does so on a copy made inside the trace: return what
    should be kept. Lifting twice is lifting once.

    Args:
      fun: any traceable function: `apply(params, *inputs)` of plain JAX, Linen, NNX or Equinox.
      strict: makes a materialisation a `RequestError` instead of a `MaterialisedWarning`.

    Returns:
      A function of the same arguments and plain outputs, which is traceable itself: jit, grad,
      vmap, remat and scan work around it. Where no argument is adapted, it is `fun`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"kernel": jnp.eye(4)}
    >>> method = lj.LoRA(targets="kernel", rank=1, alpha=1)
    >>> trainable, frozen = method.init(jax.random.key(0), params)
    >>> apply = lift(lambda params, x: x @ params["kernel"])
    >>> apply(method.bind(trainable, frozen), jnp.ones((2, 4))).shape
    (2, 4)
    """
    if isinstance(fun, Lifted):
        return fun if fun.strict == strict else Lifted(fun.fun, strict=strict)
    return Lifted(fun, strict=strict)


class Lifted:
    """A function that `lift` has taught to take adapted values."""

    def __init__(self, fun: Callable, *, strict: bool):
        self.fun = fun
        self.strict = strict
        functools.update_wrapper(self, fun)

    def __call__(self, *args, **kwargs):
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs), is_leaf=is_adapted)
        places = [n for n, leaf in enumerate(leaves) if is_adapted(leaf)]
        if not places:
            return self.fun(*args, **kwargs)

        def plain(*kernels):
            # Everything but the adapted kernels is closed over, so Python values stay static and
            # modules are rebuilt inside the trace, where they may be changed.
            inner = filled(leaves, places, kernels)
            inner_args, inner_kwargs = jax.tree_util.tree_unflatten(treedef, inner)
            return self.fun(*inner_args, **inner_kwargs)

        values = [in_mesh(leaves[place]) for place in places]
        kernels = (value.base for value in values)
        jaxpr, consts, out_tree, whole = jaxprs.trace(plain, *kernels)
        interpreter = Interpreter(strict=self.strict, whole=(whole, consts, values))
        outs = interpreter.evaluate(jaxpr, consts, values)
        name = getattr(self.fun, "__name__", "the function")
        outs = [interpreter.materialise(out, "output", f"the result of {name}") for out in outs]
        return jax.tree_util.tree_unflatten(out_tree, outs)

    def __repr__(self) -> str:
        return f"lift({self.fun!r})"
