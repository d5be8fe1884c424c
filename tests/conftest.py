"""Eight virtual CPU devices for every test, and strict promotion for our own code."""

import os
from collections import Counter
from pathlib import Path

import jax
import pytest

from experiments.compilation import forget_programs_if_many

jax.config.update("jax_platforms", "cpu")  # whatever else is there
jax.config.update("jax_num_cpu_devices", 8)

# Most of a test's time is compilation, and tests compile the same programs again and again: what
# one has compiled, all others load, in other workers and in processes that tests start as well.
CACHE = str(Path(__file__).parent.parent / ".pytest_cache" / "xla")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# LLVM at its quickest, and loops emitted the older, shorter way (a fifth of the compile time of a
# training step): tests run each program a few times, and look at results, not at speed.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture
def strict():
    """Implicit dtype and rank promotion raise: use it around our own code (Optax relies on it)."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def compilations():
    """Counts XLA compilations by program name, such as "jit(step)", loads from the cache included.

    A jitted function's own `_cache_size` counts entries of a cache that all functions share, and
    that forgets: in a long process it was seen at 0 right after a call.
    """
    counts = Counter()

    def listen(event, seconds, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            counts[kwargs["fun_name"]] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counts
    jax.monitoring.unregister_event_duration_listener(listen)


def pytest_runtest_teardown(item, nextitem):
    """Between two files, a worker that holds many compiled programs forgets them.

    It compiles thousands, and where it ran out of memory mappings it would be gone without a word.
    """
    if nextitem is not None and nextitem.path != item.path:
        forget_programs_if_many()


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    """`variants(n)`: `make test` runs the first n of a test's cases, `make test-all` every one."""
    seen = {}
    for item in items:
        if marker := item.get_closest_marker("variants"):
            test = (item.path, item.originalname)
            seen[test] = seen.get(test, 0) + 1
            if seen[test] > marker.args[0]:
                item.add_marker(pytest.mark.slow)
