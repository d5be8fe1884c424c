"""The persistent compilation cache, on by default: a second start compiles nothing again.

And what a process holds of compiled programs: many runs in one process would hold too many.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import jax

from train.cache import default_cache


def use_compilation_cache() -> None:
    """Keeps compiled programs under the cache folder, unless JAX_COMPILATION_CACHE_DIR is set."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(default_cache() / "xla"))
    # Below half a second, reading the program costs about what compiling it does.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# Linux lets a process have 65,530 memory mappings. Each compiled program keeps several for as long
# as JAX remembers it: past the limit any allocation of any thread fails, and the process is gone
# without a word.
MAPPINGS = 16_384


def mappings(maps: Path = Path("/proc/self/maps")) -> int:
    """Returns how many memory mappings this process has; 0 where the system does not list them."""
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def forget_programs_if_many(most: int = MAPPINGS) -> None:
    """Lets JAX forget every compiled program once they take more than so many memory mappings.

    For a process that runs one thing after another, between two of them; what is asked for again is
    compiled, or loaded from the persistent cache, again.
    """
    if mappings() > most:
        jax.clear_caches()
        gc.collect()


def compiler_options(platform: str | None = None) -> dict[str, Any] | None:
    """Returns what a training step is compiled with, for `jax.jit`; None for what XLA does itself.

    On an H100 a step of GPT-2 124M took 3 % less time with its products left to cuBLAS (none in
    Triton) and as they are written (merged ones are copied together and apart). XLA:CPU would add
    up bfloat16 in float32, and aborts where that is the sum of a pipeline: a `shard_map` over some
    of the mesh's axes gives it a reduction with a copy in it.

    Args:
      platform: what the program is for; the backend by default. Its mesh is that of `jax.set_mesh`.

    >>> compiler_options("cpu") is None
    True
    """
    platform = platform or jax.default_backend()
    if platform == "gpu":
        return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
    stages = jax.sharding.get_abstract_mesh().shape.get("pipeline", 1)
    if platform == "cpu" and stages > 1:
        return {"xla_disable_hlo_passes": "all-reduce-promotion"}
    return None
