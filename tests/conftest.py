"""Every test runs on 8 simulated CPU devices, with a compilation cache that outlives the run."""

import os
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Both must be set before JAX is imported, which pytest's collection does.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=8"
# Most of the time is XLA's: what is tested is the program, not how well it is optimised. Slow tests
# compile as users do: `make test-slow` sets it to 0. Children inherit all of this.
quick = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
if quick:
    flags += " --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_multi_thread_eigen=false"
    flags += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
if quick and tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # These emitters build MLIR passes per fusion; later versions have no others, nor this flag.
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = flags.strip()
cache = ROOT / ".cache" / f"jax-{sys.version_info.major}.{sys.version_info.minor}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
# Every program, however small: JAX 0.12 takes 15 ms for an addition, and two workers share them.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Tests never reach for the network; a hub id must fail the way it does on a plane.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A first call compiles or imports, and a busy machine is slow: neither is a failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Processor seconds for a folder, cold cache: a quarter above what JAX 0.10.2 took on two cores of
# an AMD EPYC. More is reported, not failed, since machines differ.
BUDGETS = {
    "analysis": 20, "cli": 30, "core": 90, "data": 5, "docs": 15, "experiments": 20, "peft": 15,
    "generate": 15, "hostile": 10, "lora_jax": 10, "methods": 130, "models": 40, "notebooks": 35,
    "parallel": 35, "parity": 40, "plan": 12, "quant": 45, "report": 15, "serve": 20,
    "hub": 15, "settings": 10, "sweeps": 75, "tests": 20, "trackers": 15, "train": 135,
}  # fmt: skip
_spent: Counter = Counter()
# Whose tests may promote ranks unsaid: they run what other people wrote. All else is refused it.
RANKS_PROMOTE = {"docs", "notebooks", "tests", "lora_jax"}


@pytest.fixture
def float64():
    """Arrays are of 64 bits by default."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def register():
    """`register(name, Class)` as `lj.register_method`, forgotten after the test."""
    from lora_jax.methods.registry import METHODS, register_method
    from lora_jax.settings import schema

    before = [(kept, dict(kept)) for kept in (METHODS._complete(), schema.METHODS, schema.SETTINGS)]
    yield register_method
    for kept, was in before:
        kept.clear()
        kept.update(was)


@pytest.fixture
def optimised():
    """XLA's passes as users have them, for a test of what they do: memory, bits."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Notes the processor seconds of a test, its fixtures' and its children's included."""
    start, folder = _processor_seconds(), _folder_of(item.nodeid)
    with jax.numpy_rank_promotion("allow" if folder in RANKS_PROMOTE else "raise"):
        outcome = yield
    _spent[folder] += _processor_seconds() - start
    return outcome


def pytest_sessionfinish(session):
    worker = getattr(session.config, "workeroutput", None)
    if worker is not None:
        worker["processor_seconds"] = dict(_spent)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _spent.update(getattr(node, "workeroutput", {}).get("processor_seconds", {}))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("processor seconds per folder (budget of the fast tests)")
    for folder, seconds in _spent.most_common():
        budget = BUDGETS.get(folder)
        over = " OVER" if budget is not None and seconds > budget else ""
        terminalreporter.write_line(f"{folder:12} {seconds:8.1f}  ({budget or '-'}){over}")
    terminalreporter.write_line(f"{'all':12} {sum(_spent.values()):8.1f}")


def _processor_seconds() -> float:
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def _folder_of(nodeid: str) -> str:
    """The folder in tests/, or the top of the tree: "lora_jax" has the docstrings' examples."""
    parts = nodeid.partition("::")[0].split("/")
    return parts[1] if parts[0] == "tests" and len(parts) > 2 else parts[0]
