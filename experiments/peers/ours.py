"""lora_jax: rules over the parameters' paths, the model under `lj.lift`."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

import lora_jax as lj
from experiments.peers import functional
from experiments.peers.cases import ALPHA, RANK, Case
from experiments.peers.judge import Adapted, Way, update_of

NAME = "lora_jax"
PACKAGES = ("lora_jax", "jax", "flax", "equinox")


def ways(case: Case):
    """One way: the model as it is."""
    yield Way("lift the model", lambda params, x: _lifted(case, params, x))


def _lifted(case: Case, params, x) -> Adapted:
    model = functional.model_of(case, params)
    paths = {"/".join(path): kernel for kernel, path in model.paths.items()}
    axes = dict(lj.kernel_axes(model.apply, model.tree, x))
    for path, kernel in paths.items():
        # What no product of the model shows is stated, as the error of `LoRA` asks for.
        axes[path] = axes.get(path) or _stated(case.roles[kernel])
    method = lj.LoRA(rules=_rules(case, paths), axes=axes)
    trainable, frozen = method.init(jax.random.key(0), model.tree)
    lifted = lj.lift(model.apply)
    names = _names(trainable, paths)

    def run(factors, x):
        bound = method.bind({own: factors[name] for own, name in names.items()}, frozen)
        return lifted(bound, x)

    def update(name, pair):
        kernel, _, part = name.partition(":")
        path = next(path for path, named in paths.items() if named == kernel)
        shape, roles = params[kernel].shape, _roles(axes[path], params[kernel].ndim)
        if not part:
            return update_of(pair, roles, shape, ALPHA / RANK)
        return _update_of_slice(pair, roles, shape, case.slices[int(part)])

    factors = {name: dict(trainable[own]) for own, name in names.items()}
    with lj.watch_materialised() as events:
        jax.eval_shape(run, factors, x)
    return Adapted(factors, run, update, _note(events))


def _note(events) -> str:
    """What `lift` says of materialising, once for each kernel and without this machine's paths."""
    said: dict[str, str] = {}
    for event in events:
        said.setdefault(event.path, f"{event.path} at `{event.primitive}`")
    return "as it warns: " + ", ".join(sorted(said.values())) if said else ""


def _rules(case, paths) -> list[lj.Rule]:
    options = {"rank": RANK, "alpha": ALPHA}
    patterns = [re.escape(path) for path in paths]
    if case.slices:
        return [
            lj.Rule(pattern, slice=slice_, **options)
            for pattern in patterns
            for slice_ in case.slices
        ]
    return [lj.Rule(pattern, **options) for pattern in patterns]


def _names(trainable, paths) -> dict[str, str]:
    """`{name in trainable: kernel, or "kernel:n" for the n-th slice of it}`."""
    of = {
        own: next(kernel for path, kernel in paths.items() if own.startswith(path))
        for own in trainable
    }
    if len(set(of.values())) == len(of):
        return of
    return {own: f"{kernel}:{n}" for n, (own, kernel) in enumerate(of.items())}


def _stated(roles: str) -> lj.KernelAxes:
    ndim = len(roles)
    of = {role: tuple(n - ndim for n, r in enumerate(roles) if r == role) for role in "sio"}
    return lj.KernelAxes(of["s"], of["i"], of["o"])


def _roles(axes: lj.KernelAxes, ndim: int) -> str:
    named = dict.fromkeys(axes.stack, "s") | dict.fromkeys(axes.in_, "i")
    return "".join(named.get(n - ndim, "o") for n in range(ndim))


def _update_of_slice(pair, roles, shape, slice_):
    axis, start, stop = slice_
    part = list(shape)
    part[axis] = stop - start
    made = update_of(pair, roles, tuple(part), ALPHA / RANK)
    places = [slice(None)] * len(shape)
    places[axis] = slice(start, stop)
    return jnp.zeros(shape, made.dtype).at[tuple(places)].set(made)
