# One command runs the main job, one the tests; both set everything up by themselves.
#   make demo    prune the shipped model, serve both on vLLM, compare
#   make test    the whole test suite
#   make check   what CI runs: formatter, linter, types, import rules, tests
# PYTHON picks the interpreter for the virtual environment (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

# Threads that spin while they wait cost more than they gain on small, shared machines.
export OMP_NUM_THREADS ?= 1
export VLLM_CPU_KVCACHE_SPACE ?= 1
export HF_HUB_OFFLINE ?= 1
export GOMP_SPINCOUNT ?= 0
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check setup clean
.DEFAULT_GOAL := demo

demo: setup
	$(BIN)/liveprune demo

test: setup
	$(BIN)/pytest

check: setup
	scripts/check

setup: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt scripts/build_stubs.py scripts/setup
	PYTHON=$(PYTHON) VENV=$(VENV) scripts/setup
	touch $@

clean:
	rm -rf $(VENV) build
