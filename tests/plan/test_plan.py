"""Plans: what the compiler says of arguments is what is allocated; what cannot be asked for."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import types

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.cli import plan as command
from lora_jax.models.shapes import abstract_model
from lora_jax.models.tiny import TINY_MODELS
from lora_jax.parallel import Placement, make_mesh, read_mesh
from lora_jax.plan import plan
from lora_jax.plan.plan import Request, make_plan, step_flops
from lora_jax.plan.topology import SLICES, describe_topology, needed_bytes

CONFIG = dataclasses.replace(
    TINY_MODELS["tiny-llama"], vocab_size=512, hidden_size=256, intermediate_size=512, head_dim=64,
    num_attention_heads=4, num_key_value_heads=2, scan_layers=True,
)  # fmt: skip


def request(**changes):
    basis = {
        "model": CONFIG, "method": "lora", "topology": "v5e:2x4", "batch": 8, "length": 16,
        "settings": {"targets": "all-linear", "rank": 4, "alpha": 8.0}, "mesh": read_mesh("fsdp=8"),
    }  # fmt: skip
    return Request(**{**basis, **changes})


@pytest.fixture
def simulated(monkeypatch):
    """The eight devices of the tests in the place of a slice."""
    found = types.SimpleNamespace(devices=jax.devices())
    monkeypatch.setattr(plan, "describe_topology", lambda name: found)


def held_by_first(tree):
    """Bytes that the first device holds of a tree of arrays."""
    first = jax.devices()[0]
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == first)


@pytest.mark.parametrize(
    "mesh, change",
    [
        ("data=2,fsdp=2,tensor=2", {"quantize": "nf4"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *(("fsdp=8", {}), ("fsdp=8", {"quantize": "nf4"}), ("fsdp=8", {"method": "full"})),
                *(("data=2,fsdp=2,tensor=2", {}), ("data=2,fsdp=2,tensor=2", {"method": "full"})),
            )
        ),
    ],
)
def test_planned_arguments_are_those_allocated(mesh, change, simulated):
    asked = request(mesh=read_mesh(mesh), **change)
    found = make_plan(asked)
    assert found.fits and found.num_devices == 8
    model, method = plan._model_and_method(asked)
    placement = Placement(make_mesh(asked.mesh), model)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model.params)
    trainable, frozen = jax.jit(method.init)(jax.random.key(0), params)
    _, _, batch, tx = plan._abstract(asked, model, method)
    state = plan.init_state(trainable, tx, jax.random.key(1))
    held = held_by_first(jax.device_put(state, placement.state(method, state)))
    held += held_by_first(jax.device_put(frozen, placement.params(frozen)))
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in batch.items()}
    held += held_by_first(jax.device_put(batch, placement.batch(batch)))
    assert found.argument_bytes == held
    if change.get("method") != "full":
        assert found.state_bytes < found.base_bytes
    # A quarter of everything at most: matrices are split over all four, or eight, of them.
    whole = found.base_bytes + found.state_bytes
    assert found.argument_bytes < 0.5 * whole
    assert json.loads(json.dumps({**found.to_json(), "model": "it"}))["num_devices"] == 8


def test_flops_are_those_of_products_by_hand():
    model = abstract_model(CONFIG)
    tokens, length, width, inner = 128, 16, 256, 512
    kernels = 2 * (2 * width * width + 2 * width * width // 2 + 3 * width * inner) + width * 512
    forward = 2 * tokens * kernels
    attention = 4 * length * width * 2 * tokens
    full = step_flops(model, lj.FullFineTuning(), tokens=tokens, length=length)
    # Of what trains whole the head counts once more, too; tables and norms meet no product.
    assert full == pytest.approx(3 * forward + 3 * attention)
    method = lj.LoRA(targets="q", rank=4, alpha=8, axes=model.axes, aliases=model.aliases)
    adapters = 2 * 4 * (width + width)
    found = step_flops(model, method, tokens=tokens, length=length)
    assert found == pytest.approx(2 * forward + 3 * attention + 6 * tokens * adapters)


@pytest.mark.parametrize(
    "text, says",
    [
        ("fsd=4", "no axis 'fsd'; nearest: 'fsdp'"),
        ("fsdp=0", "'fsdp=0' is no size"),
        ("fsdp", "'fsdp' is no size"),
        ("fsdp=2,fsdp=2", "comes twice"),
    ],
)
def test_meshes_that_are_none_are_named(text, says):
    with pytest.raises(lj.RequestError, match=says):
        read_mesh(text)


def test_a_mesh_must_take_all_devices_and_divide_the_batch(simulated):
    with pytest.raises(lj.RequestError, match="fsdp=4 has 4 places, and there are 8 devices"):
        make_plan(request(mesh=read_mesh("fsdp=4")))
    with pytest.raises(lj.RequestError, match="--batch=12 does not divide over 8 parts"):
        make_plan(request(batch=12))


def test_topologies_that_are_none_are_named():
    for name, says in [
        ("v5q:2x4", "no kind 'v5q'; nearest: .*'v5p'"),
        ("v5e-8", "no kind 'v5e-8'; nearest: 'v5e'"),
        ("v5e:8", "write the layout in chips, as v5e:2x4"),
    ]:
        with pytest.raises(lj.RequestError, match=says):
            describe_topology(name)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_its_compiler_a_plan_says_how_to_get_it():
    with pytest.raises(lj.RequestError, match=r"install it: pip install 'jax\[tpu\]'"):
        describe_topology("v5e:2x4")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the tpu extra")
def test_every_slice_has_the_meshes_that_are_searched():
    """tensor=8 is no whole row of 4x4 chips; it takes two."""
    for kind, layouts in SLICES.items():
        for layout in layouts:
            devices = list(describe_topology(f"{kind}:{layout}").devices)
            for tensor in (1, 2, 4, 8):
                if len(devices) % tensor == 0:
                    mesh = make_mesh({"fsdp": len(devices) // tensor, "tensor": tensor}, devices)
                    assert len(set(mesh.devices.flat)) == len(devices)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the tpu extra")
def test_a_real_plan_of_a_real_slice():
    found = make_plan(request(model="llama-2-7b", length=2048))
    assert found.fits and found.peak_bytes < found.limit_bytes
    assert found.base_bytes == pytest.approx(13.48e9, rel=0.01)
    small = make_plan(request(model="llama-2-7b", length=2048, method="full", topology="v5e:2x2",
                              mesh=read_mesh("fsdp=4")))  # fmt: skip
    assert not small.fits and small.needed_bytes > small.limit_bytes


def test_what_xla_wanted_is_read_off_its_error():
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (40.00G) exceeds available HBM (15.75G)."
    )
    assert needed_bytes(text) == 40 * 2**30
    with pytest.raises(lj.RequestError, match="could not compile"):
        needed_bytes("INTERNAL: something else")


def test_the_command_prints_a_table_and_json(simulated, monkeypatch, capsys):
    monkeypatch.setattr(plan, "abstract_model", lambda name, **more: abstract_model(CONFIG, **more))
    made, real = {}, plan.make_plan

    def once(request, show):
        if repr(request) not in made:
            made[repr(request)] = real(request, show)
        return made[repr(request)]

    monkeypatch.setattr(plan, "make_plan", once)
    argv = ["--model=it", "--topology=v5e:2x4", "--batch=8", "--length=16", "--compare=full"]
    assert command.run(argv) == 0
    out = capsys.readouterr().out
    assert "full / lora: arguments of the whole slice" in out and "fsdp=8" in out
    assert command.run([*argv[:-1], "--json"]) == 0
    keys = {"num_devices", "argument_bytes", "temp_bytes", "peak_bytes", "limit_bytes", "fits"}
    assert keys <= json.loads(capsys.readouterr().out).keys()
    with pytest.raises(lj.RequestError, match="--batch=0 must be at least 1"):
        command.run([*argv, "--batch=0"])


def test_what_is_offloaded_makes_no_slice_too_small():
    """Full fine-tuning in float32: two moments a parameter lie in the memory of hosts."""
    whole, rest = (
        plan.arguments_at_least(request(method="full", offload=offload, dtype="float32"))
        for offload in (False, True)
    )
    assert 0 <= whole - 3 * rest < 100  # counts of steps stay
