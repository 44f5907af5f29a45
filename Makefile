# Every target sets itself up on a bare machine: a virtual environment in .venv, uv into it, the packages of
# requirements.lock, the project. `make help` lists the targets.

PYTHON ?= python3
ARGS ?=
UV_HTTP_TIMEOUT ?= 300

VENV := .venv
RUN := $(VENV)/bin/python
UV := $(RUN) -m uv
LOCKED := $(VENV)/.locked
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train test test-faults test-faults-long format lint types check bench lock operations plans tpu-operations release clean FORCE

export UV_HTTP_TIMEOUT
# Without compiled files each process compiles torch anew, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE
# pyright runs the JavaScript of its own wheel: no look for newer versions.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'ARGS="..." goes to train, test, lint, format, bench, operations, plans, tpu-operations and lock; PYTHON=python3.12 chooses the Python.'

setup: $(READY)  ## makes or mends .venv; every other target does so too

train: $(READY)  ## trains and evaluates on the digits: make train ARGS="run.max_steps=50"
	$(RUN) -m tpuspec.train config=digits $(ARGS)

# Whole modules stay in one process, for importing torch_xla takes seconds.
test: $(READY)  ## runs the tests, in two processes: make test ARGS="tests/drain -n 0" in one
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-faults: $(READY)  ## runs the tests of faults: damage, kills, resume, locks
	$(RUN) -m pytest tests -k 'test_fault_ or tests_of_several_replicas' $(ARGS)

test-faults-long: $(READY)  ## kills trainings by SIGKILL 100 times, and looks for leaks: three quarters of an hour
	$(RUN) -m pytest tests/faults -m long $(ARGS)

format: $(READY)  ## sorts imports and mends what ruff can mend
	$(RUN) -m ruff check --fix $(ARGS)

lint: $(READY)  ## ruff
	$(RUN) -m ruff check $(ARGS)

types: $(READY)  ## pyright, by its strict rules for what a user writes
	$(RUN) -m pyright
	$(RUN) -m pyright -p tests/typing

check: lint types test  ## lint, types and test: what CI runs

bench: $(READY)  ## runs every benchmarks/bench_*.py
	@set -e; for script in benchmarks/bench_*.py; do \
	  [ -e "$$script" ] || { echo 'There is no benchmarks/bench_*.py yet.'; break; }; \
	  echo "== $$script"; $(RUN) "$$script" $(ARGS); \
	done

operations: $(READY)  ## compares all of torch's operations on XLA with the CPU: docs/operations.md, a quarter of an hour
	$(RUN) -m tests.operations.compare $(ARGS)

plans: $(READY)  ## compiles every recipe for TPUs that are not there, in all modes and layouts: make plans ARGS="digits"
	$(RUN) -m tests.plan.recipes $(ARGS)

tpu-operations: $(READY)  ## compiles torch's operations for a TPU that is not there: docs/tpu_operations.md, a few minutes
	$(RUN) -m tests.operations.on_tpu $(ARGS)

release: $(READY)  ## releases what stands on main: make release VERSION=0.2.0
	.ci/release "$(VERSION)"

lock: $(LOCKED)  ## writes requirements.lock from pyproject.toml: make lock ARGS=--upgrade
	$(UV) pip compile --quiet --universal --python-version 3.11 --extra dev --extra plan --generate-hashes --no-emit-index-url \
	  --no-emit-find-links --custom-compile-command 'make lock' $(ARGS) --output-file requirements.lock pyproject.toml

clean:  ## removes .venv, builds and caches; keeps runs
	rm -f $(LOCKED) $(READY)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find $(wildcard tpuspec tests benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up: each stamp is written last, so that what was interrupted is done again.

# A .venv that was moved, whose Python is gone or which lost a file of a package is built anew. Compiled files are no
# loss. Only a .venv that has its stamp is asked.
LOST = import csv, importlib.metadata, os, sys, sysconfig; \
  site = sysconfig.get_path("purelib"); \
  packages = importlib.metadata.distributions(path=[site]); \
  files = (row[0] for package in packages for row in csv.reader(package.read_text("RECORD").splitlines())); \
  whole = all(os.path.exists(os.path.join(site, name)) for name in files if not name.endswith(".pyc")); \
  sys.exit(sys.prefix == sys.base_prefix or not whole)
STAMPED_HERE := test "$$(cat $(LOCKED) 2>/dev/null)" = '$(CURDIR)'
INTACT := $(shell $(STAMPED_HERE) && $(RUN) -I -c '$(LOST)' 2>/dev/null && echo yes)

WRONG_PYTHON = echo 'tpuspec needs Python 3.11 to 3.13; $(PYTHON) is none of them. Name one: make setup PYTHON=python3.12'
LOCK_LACKS = echo 'requirements.lock does not hold what pyproject.toml asks for: make lock'

FORCE:

$(LOCKED): requirements.lock $(if $(INTACT),,FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { $(WRONG_PYTHON) >&2; exit 1; }
	@rm -f $(LOCKED) $(READY)
	@rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@awk '/^uv==/ {on = 1} on {print} on && !/\\$$/ {exit}' requirements.lock >$(VENV)/uv.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	$(UV) pip install --python $(RUN) --require-hashes -r requirements.lock
	@echo '$(CURDIR)' >$@

$(READY): $(LOCKED) pyproject.toml
	@rm -f $@
	$(UV) pip install --quiet --python $(RUN) --no-deps --no-build-isolation -e .
	@$(UV) pip check --quiet --python $(RUN) || { $(LOCK_LACKS) >&2; exit 1; }
	@touch $@
