"""Compiled programs that outlive the process: jax's persistent cache, in the folder of the settings."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from tpuspec.config import RunConfig, compile_cache_folder

logger = logging.getLogger(__name__)

_LEAST_SECONDS = 0.2
"""To compile a program that is kept: smaller ones are compiled as fast as they are read."""


def keep_programs(config: RunConfig) -> Path | None:
    """Lets jax keep compiled programs in the folder of `config.compile_cache`.

    Several processes may share it.

    Returns:
      The folder; None where there is no cache, or where the user has set jax's own (JAX_COMPILATION_CACHE_DIR).
    """
    own = getattr(jax.config, "jax_compilation_cache_dir", None)
    if config.compile_cache is None:
        return None
    folder = compile_cache_folder(config.compile_cache)
    if own is not None:
        return folder if own == str(folder) else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("there is no compile cache: %s. Set RunConfig(compile_cache=folder), or None.", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    return folder


@contextlib.contextmanager
def cache_passed_over() -> Iterator[None]:
    """Neither reads nor writes the cache within the block: a program for chips that are not there cannot be loaded."""
    is_enabled = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009  # jax does not type its settings
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # jax asks for the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", is_enabled)
        reset_cache()
