# Two commands are enough: `make serve` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Two processes of one thread each: more would only wait for each other on a small machine, and hold 1 GB apiece.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help serve test soak lint types bench capacity doctor budget clean

help: ## What can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml requirements.lock protos/build_hook.py $(wildcard protos/shoplm/v1/*.proto)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ShopLM needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

serve: $(INSTALLED) ## Install, fetch the default base model and serve the default shop on 127.0.0.1:50051
	$(BIN)/shoplm serve --bundle bundles/complete-journey $(ARGS)

test: $(INSTALLED) ## Every test that this machine can run
	$(BIN)/python -c 'from shoplm.model.base import resolve_base; resolve_base()'
	$(PYTEST) tests --ignore=tests/kernels $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels $(ARGS)

soak: $(INSTALLED) ## Overload, disconnects, stalls, floods, noise and lost engines, at full length
	SOAK=1 $(BIN)/python -m pytest tests/robustness $(ARGS)

lint: $(INSTALLED) ## Style of the Python code and the protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd protos && $(abspath $(BIN))/buf lint

types: $(INSTALLED) ## Static types, strict
	$(BIN)/mypy server kernels training clients/python benchmarks

# What a CPU can hold; the defaults of `shoplm bench` are a GPU's.
CPU_TARGETS := --recommendation-target 0.5 --prediction-target 0.5 --chat-first-target 1.0 --chat-token-target 0.12

bench: $(INSTALLED) ## A mixed load of 60 s and the offline throughput, through gRPC
	$(BIN)/shoplm bench --bundle bundles/complete-journey $(CPU_TARGETS) $(ARGS)

# The search measures what a machine can carry: targets that any machine can hold, and no rate that only one can.
# A quarter of the customers have never been seen, as in the simulator's trace: else all is cached and costs the same.
capacity: $(INSTALLED) ## What slack carries beside first come, first served: two servers, half an hour at most
	timeout 1800 $(BIN)/shoplm bench --bundle bundles/complete-journey --policies slack,fcfs --find-knee --minutes 28 \
	  --rate 4 --seconds 30 --rounds 2 --warmup-seconds 5 --deadline-at-target --no-allow-degraded \
	  --customers 1024 --new-customer-share 0.25 \
	  --recommendation-target 6 --prediction-target 6 --chat-first-target 6 --chat-token-target 0.5 $(ARGS)

doctor: ## What this machine has, and what each part is for
	@PYTHONPATH=server $(PYTHON) -m shoplm.doctor

budget: $(INSTALLED) ## Compile every kernel for every card and write the table
	$(BIN)/python benchmarks/kernel_budget.py --full --write --keep .kernel-budget.jsonl $(ARGS)

clean: ## Remove what was built (not the cache of base models)
	rm -rf $(VENV) protos/gen .pytest_cache .mypy_cache .ruff_cache
