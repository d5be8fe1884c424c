"""The persistent compilation cache, on by default: a second start compiles nothing again."""

from __future__ import annotations

import os

import jax

from train.cache import default_cache


def use_compilation_cache() -> None:
    """Keeps compiled programs under the cache folder, unless JAX_COMPILATION_CACHE_DIR is set."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(default_cache() / "xla"))
    # Below half a second, reading the program costs about what compiling it does.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
