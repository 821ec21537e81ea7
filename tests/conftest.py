"""Every test runs on 8 simulated CPU devices, with a compilation cache that outlives the run."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Both must be set before JAX is imported, which pytest's collection does.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
cache = ROOT / ".cache" / f"jax-{sys.version_info.major}.{sys.version_info.minor}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
# Tests never reach for the network; a hub id must fail the way it does on a plane.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings  # noqa: E402

# A first call compiles or imports, and a busy machine is slow: neither is a failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
