"""qwix: `LoraRule(module_path=".*")` over a Flax model, which it intercepts while the model runs.

A case is tried as a module that calls the plain function, as NNX layers, as Linen, and with each
NNX layer adapted by itself; also with qwix's `disable_jit`, which its docstring offers, and with
the adapters made in a traced first call, where qwix follows a kernel through more operations.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import qwix
from flax import nnx, traverse_util

from experiments.peers import linen_models, nnx_models
from experiments.peers.cases import ALPHA, RANK, Case
from experiments.peers.judge import Adapted, NotExpressible, Way, update_of

NAME = "qwix"
PACKAGES = ("qwix", "flax", "jax")
STATE = (nnx.RngState, nnx.BatchStat)


def ways(case: Case):
    """Ways of writing a case, the model as it is first."""
    if case.slices or case.framework == "equinox":
        yield Way("", lambda params, x: _refuse(case))
        return
    plain = case.framework == "plain"
    layered = case.name in nnx_models.MODELS
    styles = [
        ("a module that calls the function", _nnx_whole, False, plain),
        ("Linen", _linen, case.name in linen_models.LAYERED, case.framework != "nnx"),
        ("NNX layers", _nnx_layers, True, layered),
    ]
    for style, build, layers, applies in styles:
        for traced, no_jit in itertools.product((False, True), repeat=2) if applies else ():
            options = ", disable_jit=True" * no_jit + ", adapters made under jit" * traced
            yield _way(case, style + options, build, layers and plain, traced, no_jit)
    if case.name in nnx_models.LAYERED:
        yield _way(case, "NNX layers adapted one by one", _one_by_one, True, False, False)


def _way(case, name, build, rewritten, traced, no_jit) -> Way:
    def fresh(params, x):
        # qwix patches functions while they are traced; what was traced before, it would not see.
        jax.clear_caches()
        rule = qwix.LoraRule(module_path=".*", rank=RANK, alpha=ALPHA)
        return build(case, params, x, qwix.LoraProvider([rule], disable_jit=no_jit), traced)

    return Way(name, fresh, rewritten)


def _refuse(case):
    if case.slices:
        raise NotExpressible("a rule takes a module's whole kernel, not a slice of it")
    raise NotExpressible("it adapts Flax models")


class Whole(nnx.Module):
    """A plain function with its kernels as this module's parameters."""

    def __init__(self, f, params):
        self.f, self.names = f, tuple(params)
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))

    def __call__(self, x):
        return self.f({name: getattr(self, name)[...] for name in self.names}, x)


def _nnx_whole(case, params, x, provider, traced) -> Adapted:
    where = {kernel: ((), kernel) for kernel in params}
    model = _adapt(Whole(case.apply, params), x, provider, traced)
    return _of_nnx(case, model, params, where, provider)


def _nnx_layers(case, params, x, provider, traced) -> Adapted:
    plain, where = nnx_models.make_model(case.name, params)
    model = _adapt(plain, x, provider, traced)
    # Its first call moves statistics and counts, and draws from the model's own keys.
    fresh, _ = nnx_models.make_model(case.name, params)
    nnx.update(model, nnx.state(fresh, STATE))
    return _of_nnx(case, model, params, where, provider)


def _one_by_one(case, params, x, provider, traced) -> Adapted:
    def layer(w):
        made = nnx_models.plain_layer(w)
        sample = jnp.ones((1, w.shape[0]), w.dtype)
        return _adapt(made, sample, provider, traced)

    model, where = nnx_models.make_model(case.name, params, layer)
    return _of_nnx(case, model, params, where, provider)


def _adapt(model, x, provider, traced):
    def adapt(model, x):
        return qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(0))

    return (nnx.jit(adapt) if traced else adapt)(model, x)


def _of_nnx(case, model, params, where, provider) -> Adapted:
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(lora))
    paths = {kernel: (*path, leaf) for kernel, (path, leaf) in where.items()}

    def run(factors, x):
        new = traverse_util.unflatten_dict(_put(flat, factors, paths))
        held = jax.tree.map(lambda leaf: leaf, rest)  # variables of this trace
        state = jax.tree.map(lambda leaf: leaf, lora)
        nnx.replace_by_pure_dict(state, new)
        return nnx_models.outputs_of(nnx.merge(graph, state, held), x)

    return _adapted(case, flat, run, params, paths, provider)


def _linen(case, params, x, provider, traced) -> Adapted:
    dtype = next(iter(params.values())).dtype.name
    plain, paths = linen_models.make_model(case, dtype)
    model = qwix.apply_lora_to_model(plain, provider)
    init = jax.jit(model.init) if traced else model.init
    flat = traverse_util.flatten_dict(init(jax.random.key(0), x)["params"])
    flat |= {paths[kernel]: value for kernel, value in params.items()}

    def run(factors, x):
        new = _put(flat, factors, paths)
        return model.apply({"params": traverse_util.unflatten_dict(new)}, x)

    return _adapted(case, flat, run, params, paths, provider)


def _adapted(case, flat, run, params, paths, provider) -> Adapted:
    factors = {
        kernel: {letter: flat[_factor(path, letter)] for letter in "ab"}
        for kernel, path in paths.items()
        if _factor(path, "a") in flat
    }
    if not factors:
        told = "reports" if provider.get_unused_rules() else "does not report"
        return Adapted(factors, run, None, f"`get_unused_rules()` {told} the rule")
    readings = {
        kernel: _reading(case, pair, case.roles[kernel], params[kernel].shape)
        for kernel, pair in factors.items()
    }

    def update(kernel, pair):
        shape, reading = params[kernel].shape, readings[kernel]
        if not reading:
            return OF_PARTS[kernel](ALPHA / RANK * pair["a"] @ pair["b"])
        shared = len(shape) - len(reading)
        one = update_of(pair, reading, shape[shared:], ALPHA / RANK)
        return jnp.broadcast_to(one, shape)

    return Adapted(factors, run, update, _note(case, readings))


# In `sliced_and_split`: an adapter that both halves of w share, and one of every other row of v.
OF_PARTS = {
    "w": lambda part: jnp.concatenate([part, part]),
    "v": lambda part: jnp.zeros((6, 4), part.dtype).at[::2].set(part),
}


def _reading(case, pair, roles: str, shape) -> str:
    """How qwix's factors are to be read, from their sizes: by where it saw the kernel, the axes of
    `roles` may be the other way round, experts may be outputs, or one adapter serve all layers."""
    swapped = roles.translate(str.maketrans("io", "oi"))
    experts = [roles.replace("s", role) for role in "oi"]
    candidates = (roles, swapped, *experts, roles.lstrip("s"))
    for reading in candidates:
        sizes = dict.fromkeys("sio", 1)
        for role, size in zip(reading, shape[len(shape) - len(reading) :], strict=True):
            sizes[role] *= size
        wanted = [RANK * sizes["s"] * sizes[role] for role in "io"]
        leading = "s" not in reading or pair["a"].shape[0] == sizes["s"]
        if [pair["a"].size, pair["b"].size] == wanted and leading:
            return reading
    if case.name == "sliced_and_split":
        return ""
    raise AssertionError(f"factors {pair['a'].shape}, {pair['b'].shape} of a kernel {shape}")


def _note(case, readings) -> str:
    if case.name == "grouped_conv":  # checked by the Jacobian of outputs by input channels
        return "its B mixes the groups, so no kernel of the grouped shape does the same"
    said = []
    for kernel, reading in readings.items():
        if not reading:
            said.append(f"an adapter on the part of {kernel} that is used, shared by its parts")
        elif len(reading) < len(case.roles[kernel]):
            said.append(f"one adapter on {kernel}, shared by all its layers")
        elif "s" in case.roles[kernel] and "s" not in reading:
            shared = "A" if reading == case.roles[kernel].replace("s", "o") else "B"
            said.append(f"one {shared} on {kernel}, shared by its experts")
    return "; ".join(said)


def _factor(path, letter):
    return (*path[:-1], f"{path[-1]}_lora_{letter}")


def _put(flat, factors, paths):
    new = dict(flat)
    for kernel, pair in factors.items():
        for letter, value in pair.items():
            new[_factor(paths[kernel], letter)] = value
    return new
