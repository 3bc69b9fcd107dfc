# Everything runs in .venv, made from hashed requirements the first time a target needs it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# A file runs in one process, with servers of that process. More than four gain nothing.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo up down control-plane cluster cluster-images cluster-down e2e load bench test test-all faults check-locks \
  images check lint lock

help: ## Print the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Create .venv, and download Kafka into the cache

$(READY): dev/requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@echo "Installing into .venv …"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r dev/requirements.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -m dev.stack fetch
	@touch $@

demo: $(READY) ## Sell 100 phones to a crowd on real servers, and check every promise
	@$(BIN)/python -m dev.demo

up: $(READY) ## Start the stack, the API on port 8080 and a consumer, in the background
	@$(BIN)/python -m dev.local up

down: $(READY) ## Stop what `make up` started
	@$(BIN)/python -m dev.local down

control-plane: $(READY) ## Start a Kubernetes API with CRD and operator, after `make up` (needs Go)
	@$(BIN)/python -m dev.local control-plane

cluster: $(READY) ## Start a real one-node Kubernetes without Docker (Linux, root, Debian, Go)
	@$(BIN)/python -m dev.cluster up

cluster-images: $(READY) ## Build all images and load them into the cluster
	@$(BIN)/python -m dev.cluster load

cluster-down: $(READY) ## Stop the cluster, and remove everything that it left
	@$(BIN)/python -m dev.cluster down

e2e: $(READY) ## Install, sell, break and upgrade on a cluster of its own (needs as `make cluster`)
	$(BIN)/pytest tests/e2e

load: $(READY) ## Run a k6 script of loadtest/ against `make up`: SCRIPT=stampede.js
	@$(BIN)/python -m dev.load $(or $(SCRIPT),stampede.js)

bench: $(READY) ## Measure the engine in under half an hour, and write docs/performance.md
	@$(BIN)/python -m bench --write

test: $(READY) ## The quick tests, on real servers: three to five minutes on two cores
	@echo "Running the quick tests: three to five minutes on two cores."
	$(BIN)/pytest --quick $(PARALLEL)

test-all: $(READY) ## All tests: about 20 minutes, after 10 for building Kubernetes once (needs Go)
	@echo "Running all tests: about 20 minutes on two cores. The first run also builds Kubernetes and"
	@echo "Helm with Go, which takes about ten minutes. Without Go their tests are skipped."
	@if command -v go >/dev/null; then $(BIN)/python -m dev.cluster build kubernetes helm; fi
	$(BIN)/pytest $(PARALLEL) --ignore tests/faults
	$(BIN)/pytest tests/faults

faults: $(READY) ## Run N schedules of faults on real servers, beginning with seed SEED (needs Go)
	$(BIN)/python -m tests.faults -n $(or $(N),20) --seed $(or $(SEED),0)

check-locks: $(READY) ## Check the images' pinned packages against the index and the advisories
	@$(BIN)/python -m dev.check_locks

lint: $(READY) ## Run ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test-all ## Lint, then run all tests

images: $(READY) ## Build the three images with buildah, from a stand-in base
	@$(BIN)/python -m dev.images build

lock: $(READY) ## Compile the hashed requirements from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
	  --all-extras pyproject.toml -o dev/requirements.txt
	for deployable in api consumer operator; do \
	  case $$deployable in operator) folder=operator;; *) folder=services/$$deployable;; esac; \
	  $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
	    --constraint dev/requirements.txt --extra $$deployable pyproject.toml \
	    -o $$folder/requirements.txt || exit 1; \
	done
