.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test slow heavy studio-load long-stories cuda jax lint types docs clean

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
# The first of these that is there, runs and is supported; another: make PYTHON=/path/to/python
PYTHON ?= $(or $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done),python3)
BIN := .venv/bin/
VENV := $(BIN)python
# Compiling takes most of the time and one core: a process a core, up to 4. A file's tests share
# compiled programs and trained models.
PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=loadfile

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 8

venv: .venv/installed-test ## make .venv with the package and what its tests need

demo: .venv/installed-test ## generate held-out stories, train a model for minutes, write demo/
	$(VENV) scripts/demo.py --out demo

# Tests run a program for a moment and take most of their time to compile it; the long ones run some
# for minutes. Plain pytest, and `make heavy`, compile as users do.
slow: export XLA_FLAGS := $(XLA_FLAGS) --xla_llvm_disable_expensive_passes=true
test: export XLA_FLAGS := $(XLA_FLAGS) --xla_backend_optimization_level=0
test: .venv/installed-test ## run the tests (minutes, no network)
	$(VENV) -m pytest $(PARALLEL)

slow: .venv/installed-test ## run the long tests that need nothing more installed
	$(VENV) -m pytest -m "(slow or multiprocess) and not (heavy or torch or browser)" $(PARALLEL)

heavy: .venv/installed-test ## run the heaviest tests, before a release (an hour, 16 GB of memory)
	$(VENV) -m pytest -m "heavy and not torch"

STUDIO_LOAD ?= --clients 20 --seconds 120 --kills 20
studio-load: .venv/installed-test ## load the studio with clients and kill it (minutes)
	$(VENV) scripts/studio_load.py $(STUDIO_LOAD)

long-stories: .venv/installed-test ## measure stories of 8 and of 50 sentences (minutes)
	$(VENV) scripts/measure_long_stories.py --stories 32 --sentences 8
	$(VENV) scripts/measure_long_stories.py --stories 32 --sentences 50

cuda: .venv/installed-test,gpu ## compile for GPUs that are not there (several GB of packages)
	$(VENV) -m pytest -m cuda_aot

# On the newest and the oldest JAX that pyproject.toml admits, each with the Python it needs.
jax: ## run the tests of devices on the oldest and the newest JAX (python3.11 and python3.12)
	scripts/test_jax_versions.sh

lint: .venv/installed-dev ## check style, formatting, spelling, shell scripts and workflows
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check
	$(BIN)shellcheck --external-sources scripts/*.sh scripts/*.slurm .ci/run
	git ls-files -z | xargs -0 $(BIN)codespell
	$(BIN)check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(BIN)zizmor --offline --quiet .github

types: .venv/installed-dev ## check types
	$(VENV) -m pyright

docs: .venv/installed-docs ## build the documentation's pages in docs/_build/html
	$(VENV) -m sphinx --fresh-env --nitpicky --fail-on-warning --keep-going --quiet \
		--doctree-dir docs/_build/doctrees docs docs/_build/html

clean: ## remove .venv, demo/, built documentation and caches
	rm -rf .venv demo docs/_build .pytest_cache .ruff_cache

.venv/bin/python:
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { \
	echo "Python 3.11 to 3.13 is needed, not '$(PYTHON)': make PYTHON=/path/to/python3.11" >&2; \
	exit 1; }
	"$(PYTHON)" -m venv .venv

# Stamps: an installation is repeated only when what it is made from changed.
.venv/installed-%: pyproject.toml constraints.txt | .venv/bin/python
	$(VENV) -m pip install --quiet --disable-pip-version-check -e '.[$*]' -c constraints.txt
	@touch $@
