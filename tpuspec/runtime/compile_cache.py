"""Compiled programs that outlive the process, where the platform can read them back."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tpuspec.config import DEFAULT_COMPILE_CACHE, RunConfig, compile_cache_folder

logger = logging.getLogger(__name__)

PATH_VARIABLE = "XLA_PERSISTENT_CACHE_PATH"

# torch_xla 2.9 on XLA:CPU writes each program, and then fails to read it back: "UNIMPLEMENTED: Deserializing serialized
# executable not supported". It compiles again, so that a cache costs time and gives none.
_CANNOT_READ_BACK = ("CPU",)


def initialize_compile_cache(config: RunConfig, platform: str) -> Path | None:
    """Lets XLA keep compiled programs in the folder of `config.compile_cache`; before the first computation.

    Each process of a run has a folder of its own below it, and a program that another run is just writing is compiled
    anew.

    Args:
      config: the settings of the run.
      platform: of PJRT.

    Returns:
      The folder; None where there is no cache, or where XLA_PERSISTENT_CACHE_PATH or an earlier call has set one.
    """
    if config.compile_cache is None or PATH_VARIABLE in os.environ:
        return None
    if platform in _CANNOT_READ_BACK:
        level = logging.DEBUG if config.compile_cache == DEFAULT_COMPILE_CACHE else logging.WARNING
        logger.log(level, "compile_cache has no effect on XLA:%s, which cannot read compiled programs back.", platform)
        return None
    import torch_xla
    import torch_xla.runtime as xr

    if torch_xla._XLAC._xla_computation_cache_is_initialized():
        logger.warning("compile_cache has no effect: this process has run an XLA computation before.")
        return None
    folder = compile_cache_folder(config.compile_cache) / f"process{config.cluster.task_index}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("there is no compile cache: %s. Set RunConfig(compile_cache=folder), or None.", error)
        return None
    xr.initialize_cache(str(folder))
    return folder
