# make help lists the targets.
.DEFAULT_GOAL := help
SHELL := bash
PY := .venv/bin/python
CHECKPOINT ?= benchmarks/tiny_model/checkpoint
HOST ?= 127.0.0.1
PORT ?= 8000
PYTEST_ARGS ?=
# Files of tests run side by side: each engine runs one thread and has its own GiB of cache.
TEST_WORKERS ?= 2
CUDA_ARCHITECTURES ?= 80;90

# The checkpoint is in the repository: nothing is ever fetched from a hub.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
# GiB for the KV cache on CPU; vLLM's own default takes a large share of the host's memory.
export VLLM_CPU_KVCACHE_SPACE ?= 1

.PHONY: help setup demo serve test soak lint format csrc bench bench-quick bench-speed train-tiny docs licences audit clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make .venv (vLLM CPU build, tools, this project); a second run changes nothing
	@bash scripts/setup.sh

demo: setup ## Show what compression saves and what it keeps, on the tiny model
	@$(PY) -m benchmarks.demo

serve: setup ## Serve the tiny model with --kv-compression fastkv on HOST:PORT
	.venv/bin/vllm serve $(CHECKPOINT) --kv-compression fastkv --kv-compression-config '{"tsp_layer": 5}' \
		--host $(HOST) --port $(PORT) --served-model-name tiny --block-size 32 --max-model-len 4096

test: setup ## Run all tests, two files at a time (PYTEST_ARGS="-m 'not slow'" for fewer, TEST_WORKERS=0 for one)
	$(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

soak: setup ## 50,000 engine steps of random requests, aborts and preemptions
	FASTKV_RANDOM_STEPS=50000 $(PY) -m pytest -s -o timeout=0 tests/engine/test_random.py

lint: setup ## Check style, formatting and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup ## Rewrite files in the house style
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

csrc: ## Build the CUDA library (needs nvcc and CMake); CUDA_ARCHITECTURES=90 for one GPU
	cmake -S csrc -B build/csrc -DCMAKE_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" -DCMAKE_INSTALL_PREFIX=$(CURDIR)/fastkv_vllm/kernels
	cmake --build build/csrc
	cmake --install build/csrc

bench: setup ## Measure what the plugin costs and saves in prefill (about ten minutes)
	$(PY) -m benchmarks.speed --scenario prefill

bench-quick: setup ## Quality of ten methods at a tenth, the main lines (under ten minutes)
	$(PY) -m benchmarks.quality --quick

bench-speed: setup ## Answer all speed and memory questions (about 90 minutes, on a quiet machine)
	$(PY) -m benchmarks.speed --json benchmarks/results/speed.json

train-tiny: setup ## Train the tiny model again (about ten minutes on one core)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.tiny_model.train

docs: setup ## Make docs/results.md from the reports and build the documentation into site/
	$(PY) -m benchmarks.plots
	$(PY) -m benchmarks.report
	.venv/bin/mkdocs build --strict

licences: setup ## Write the table of docs/licences.md anew
	$(PY) -m scripts.licences

audit: setup ## Known vulnerabilities of what is installed (pip-audit, asks the network; not part of CI)
	test -x .venv-audit/bin/pip-audit || { $(PY) -m venv .venv-audit && .venv-audit/bin/pip install --quiet 'pip-audit>=2.9,<3'; }
	.venv-audit/bin/pip-audit --path $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

clean: ## Remove caches and build results; .venv stays
	rm -rf {.,packaging/*}/{build,*.egg-info} fastkv_vllm/kernels/*.so dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
