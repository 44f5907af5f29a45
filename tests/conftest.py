"""Every test runs on XLA:CPU with few threads, and fails if it leaves threads, environment or files behind."""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# Before any test module: torch reads the one and torch_xla the other when they are first imported.
os.environ.setdefault("PJRT_DEVICE", "CPU")
# As torch_xla sets it when it is first imported.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, len(os.sched_getaffinity(0)))))

import pytest

ROOT = Path(__file__).resolve().parent.parent
THREAD_GRACE_SECONDS = 2.0
FILE_GRACE_SECONDS = 20.0

# Started once in a process and never ended: by fsspec for its asynchronous file systems, and by torch.compile, whose
# pool has the first of the unnamed executors of a process.
LASTING_THREADS = frozenset({"fsspecIO", "ThreadPoolExecutor-0_0", "ThreadPoolExecutor-0_1"})

# Set once in a process: by torch_xla, jax and scikit-learn when they are imported, by tpuspec.tracer before the
# XLA client starts, by torch when it first traces an export or compiles. They may appear; a test that changes or
# removes one of them leaks.
APPEARING_VARIABLES = frozenset({
    "GRPC_VERBOSITY", "PJRT_DYNAMIC_PLUGINS", "PTXLA_TPU_LIBRARY_PATH", "TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS",
    "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TORCHINDUCTOR_CACHE_DIR", "TPU_LIBRARY_PATH",
    "TPU_SKIP_MDS_QUERY",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
    "CPU_NUM_DEVICES", "NPROC", "PJRT_NPROC", "XLA_THREAD_POOL_SIZE", "XLA_USE_SPMD",
})

# pytest sets the variable itself; the folders are caches of the tools, which git ignores too.
PYTEST_VARIABLE = b"PYTEST_CURRENT_TEST"
CACHES = frozenset({".pytest_cache", ".hypothesis", ".ruff_cache", "__pycache__"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts modules of minutes first: the last one would leave the other process of `make test` idle."""
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


def entries(folder: Path | str) -> frozenset[str]:
    """Returns the names in a folder; lists it anew only when it has changed."""
    return _entries(str(folder), os.stat(folder).st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _entries(folder: str, mtime_ns: int) -> frozenset[str]:
    return frozenset(os.listdir(folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a test must leave as it found it."""

    threads: frozenset[threading.Thread]
    environment: dict[bytes, bytes]
    cwd: str
    files: frozenset[str]
    num_modes: int

    @classmethod
    def take(cls) -> Self:
        """Notes the surroundings as they are now."""
        cwd = os.getcwd()
        files = entries(ROOT)
        if cwd != str(ROOT):
            files |= entries(cwd)
        # The mapping's own bytes: a copy through its public methods decodes each variable, 100 times as slow.
        environment = os.environ._data.copy()
        environment.pop(PYTEST_VARIABLE, None)
        modes = sys.modules.get("torch.overrides")
        return cls(threads=frozenset(threading.enumerate()), environment=environment, cwd=cwd, files=files,
                   num_modes=len(modes._get_current_function_mode_stack()) if modes else 0)

    def leaks_into(self, after: "Surroundings") -> list[str]:
        """Names what `after` has and this lacks, one line each."""
        leaks = [f"thread {thread.name!r} still runs: close what started it" for thread in self._lasting(after)]
        if self.environment != after.environment:
            leaks += self._changed_variables(after)
        if self.num_modes != after.num_modes:
            leaks.append(f"{self.num_modes} modes of torch functions were active and {after.num_modes} are")
        if self.cwd != after.cwd:
            leaks.append(f"the working directory was {self.cwd} and is {after.cwd}: use monkeypatch.chdir")
        else:
            left = self._left_files(after.files)
            leaks += [f"file {name!r} was left behind: use tmp_path" for name in left]
        return leaks

    def _changed_variables(self, after: "Surroundings") -> list[str]:
        changes = []
        for key in sorted(self.environment.keys() | after.environment.keys()):
            old, new = self.environment.get(key), after.environment.get(key)
            name = os.fsdecode(key)
            if old != new and not (old is None and name in APPEARING_VARIABLES):
                changes.append(f"environment variable {name} was {old!r} and is {new!r}: use monkeypatch.setenv")
        return changes

    def _left_files(self, files: frozenset[str]) -> list[str]:
        """Names files that stay; one that goes is a test's that another process runs at the same time."""
        deadline = time.monotonic() + FILE_GRACE_SECONDS
        while (left := files - self.files - CACHES) and time.monotonic() < deadline:
            time.sleep(0.1)
            files = entries(ROOT) | (entries(self.cwd) if self.cwd != str(ROOT) else frozenset())
        return sorted(left)

    def _lasting(self, after: "Surroundings") -> list[threading.Thread]:
        # A dummy is a thread of C++ (autograd's) that once called Python: not ours to end.
        started = [thread for thread in after.threads - self.threads
                   if thread.name not in LASTING_THREADS and not isinstance(thread, threading._DummyThread)]
        deadline = time.monotonic() + THREAD_GRACE_SECONDS
        for thread in started:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread for thread in started if thread.is_alive()]

    def restore(self) -> None:
        """Mends what can be mended, so that one leak fails one test."""
        os.chdir(self.cwd)
        for key in os.environb.keys() - self.environment.keys() - {PYTEST_VARIABLE}:
            if os.fsdecode(key) not in APPEARING_VARIABLES:
                del os.environb[key]
        os.environb.update(self.environment)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fails a test that leaves threads, environment variables, a working directory or files behind."""
    before = Surroundings.take()
    yield
    leaks = before.leaks_into(Surroundings.take())
    if leaks:
        before.restore()
        pytest.fail("This test leaks:\n" + "\n".join(f"- {leak}" for leak in leaks), pytrace=False)


@pytest.fixture
def signals_as_in_a_terminal() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and with it the tests of signals would."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
