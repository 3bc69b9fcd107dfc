# Everything runs in .venv, made from hashed requirements the first time a target needs it. Later
# runs keep its Python.
BIN := .venv/bin
PYTHON ?= $(or $(realpath $(BIN)/python),python3)
READY := .venv/.ready
# A file runs in one process, with servers of that process. Tests often wait for servers, so four
# processes are quicker on two cores than three: 4 min 21 s instead of 5 min 10 s for `make test`.
PARALLEL := --numprocesses 4 --dist loadfile

# Registry and owner of the released images and chart, such as ghcr.io/OWNER. This is the only place
# that names them. While it is empty, a tag publishes nothing.
IMAGES ?=
VERSION ?= $(shell sed -n 's/^appVersion: *//p' charts/flashsale/Chart.yaml)

.DEFAULT_GOAL := help
.PHONY: help setup demo up down clean control-plane cluster cluster-images cluster-down e2e load soak bench test test-rest test-all faults faults-table check-locks \
  images push check lint lint-workflows lock release-target release-check \
  release-notes release-digests release-verify release-chart release-push

help: ## Print the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Create .venv, and download Kafka into the cache

# A named Python is used, even if another one made .venv.
ifneq ($(and $(filter setup,$(MAKECMDGOALS)),$(filter-out file,$(origin PYTHON))),)
.PHONY: $(READY)
endif
# The Python of .venv is missing after the machine's Python was replaced.
$(BIN)/python:

$(READY): dev/requirements.txt pyproject.toml $(BIN)/python
	@$(PYTHON) dev/install.py
	@$(BIN)/python -m dev.stack fetch
	@touch $@

demo: $(READY) ## Sell 100 phones to a crowd on real servers, and check every promise
	@$(BIN)/python -m dev.demo $(if $(REDIS),--redis "$(REDIS)") $(if $(KAFKA),--kafka "$(KAFKA)") \
	  $(if $(DATABASE),--database "$(DATABASE)") $(if $(TOKENS),--tokens)

up: $(READY) ## Start the stack, the API on PORT (8080) and a consumer. REDIS=cluster for a cluster
	@$(BIN)/python -m dev.local up $(if $(PORT),--port "$(PORT)") $(if $(REDIS),--redis "$(REDIS)")

down: $(READY) ## Stop what `make up` started
	@$(BIN)/python -m dev.local down

clean: $(READY) ## Stop what `make up` started, and remove its data
	@$(BIN)/python -m dev.local clean

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

ifeq ($(firstword $(MAKECMDGOALS)),load)
ifneq ($(filter %.js $(patsubst loadtest/%.js,%,$(wildcard loadtest/*.js)),$(MAKECMDGOALS)),)
$(error Name the script with SCRIPT, such as `make load SCRIPT=soak`)
endif
endif
load: $(READY) ## Run a k6 script of loadtest/ against `make up`: SCRIPT=stampede.js
	@$(BIN)/python -m dev.load $(or $(SCRIPT),stampede.js)

soak: $(READY) ## Let buyers arrive for MINUTES (60) at RATE (2000) per second, and restart everything
	@$(BIN)/python -m dev.soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(RATE),--rate $(RATE))

bench: $(READY) ## Measure the engine in under half an hour, and write docs/performance.md
	@$(BIN)/python -m bench --write

test: $(READY) ## The quick tests, on real servers: about five minutes on two cores
	@echo "Running the quick tests: about five minutes on two cores."
	$(BIN)/pytest --quick $(PARALLEL)

test-all: test test-rest ## All tests: about 25 minutes, after 10 for building Kubernetes once (needs Go)

test-rest: $(READY) ## The tests that `make test` leaves out (needs Go)
	@echo "Running the slow tests: about 20 minutes on two cores. The first run also builds Kubernetes"
	@echo "and Helm with Go, which takes about ten minutes. Without Go their tests are skipped."
	@if command -v go >/dev/null; then $(BIN)/python -m dev.cluster build kubernetes helm; fi
	$(BIN)/pytest --rest $(PARALLEL) --ignore tests/faults
	$(BIN)/pytest tests/faults

faults: $(READY) ## Run N schedules of faults from seed FIRST. REDIS=one, sentinel, cluster (needs Go)
	$(BIN)/python -m tests.faults -n $(or $(N),20) --first $(or $(FIRST),0) \
	  $(if $(REDIS),--redis $(REDIS))

faults-table: $(READY) ## Print the sum of all schedules. WRITE=1 writes it into docs/reliability.md
	@$(BIN)/python -m tests.faults.table $(if $(WRITE),--write)

check-locks: $(READY) ## Check the images' pinned packages against the index and the advisories
	@$(BIN)/python -m dev.check_locks

lint: $(READY) ## Run ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lint-workflows: $(READY) ## Run actionlint on the workflows of .github (needs Go)
	@$(BIN)/python -m dev.release lint

check: lint test-all ## Lint, then run all tests

images: $(READY) ## Build the three images with buildah, from a stand-in base
	@$(BIN)/python -m dev.images build

# BUILD_FLAGS and PUSH_FLAGS are further flags, such as --platform. BUILDER is docker or buildah.
push: ## Build the three images, and push them to IMAGES=registry.example/shop (docker or buildah)
	@test -n "$(IMAGES)" || { echo "Name your registry: make push IMAGES=registry.example/shop" >&2; exit 2; }
	@set -eu; \
	builder="$${BUILDER:-$$(if docker version >/dev/null 2>&1; then echo docker; else echo buildah; fi)}"; \
	for folder in services/api services/consumer operator; do \
	  image="$(IMAGES)/flashsale/$${folder##*/}:$(VERSION)"; \
	  $$builder build --file "$$folder/Dockerfile" --tag "$$image" --build-arg VERSION="$(VERSION)" \
	    --build-arg REVISION="$$(git rev-parse HEAD)" $(BUILD_FLAGS) .; \
	  $$builder push $(PUSH_FLAGS) "$$image"; \
	done; \
	echo "Pushed. Install the chart with: --set image.registry=$(IMAGES)"

release-target: ## Print `images=IMAGES` and `version=VERSION`
	@test -n "$(IMAGES)" || { echo "IMAGES in the Makefile is empty: nothing can be published" >&2; exit 2; }
	@printf 'images=%s\nversion=%s\n' "$(IMAGES)" "$(VERSION)"

release-check: $(READY) ## Check that all files name VERSION, and CHART=FILE the images of DIGESTS=FILE
	@$(BIN)/python -m dev.release check "$(VERSION)" $(if $(CHART),--chart "$(CHART)") \
	  $(if $(DIGESTS),--digests "$(DIGESTS)")

release-notes: $(READY) ## Print the changelog's section of VERSION
	@$(BIN)/python -m dev.release notes "$(VERSION)"

release-chart: $(READY) ## Package the chart of VERSION with the images of IMAGES and DIGESTS=FILE (needs Go)
	@test -n "$(IMAGES)" && test -s "$(DIGESTS)" || { echo "Name the registry and the digests: make release-chart IMAGES=registry.example/shop DIGESTS=FILE" >&2; exit 2; }
	@$(BIN)/python -m dev.release chart "$(VERSION)" --images "$(IMAGES)" --digests "$(DIGESTS)" \
	  --source "$(SOURCE)"

release-digests: $(READY) ## Write the digests of the pushed images of VERSION to DIGESTS=FILE (needs Go)
	@test -n "$(IMAGES)" && test -n "$(DIGESTS)" || { echo "Name the registry and the file to write: make release-digests IMAGES=registry.example/shop DIGESTS=FILE" >&2; exit 2; }
	@$(BIN)/python -m dev.release digests "$(VERSION)" --images "$(IMAGES)" > "$(DIGESTS)"

release-verify: ## Verify that the release of VERSION at SOURCE signed the images of DIGESTS=FILE (needs cosign)
	@test -n "$(IMAGES)" && test -n "$(SOURCE)" && test -s "$(DIGESTS)" || { echo "Name the release: make release-verify IMAGES=registry.example/shop SOURCE=https://github.com/OWNER/flashsale DIGESTS=FILE" >&2; exit 2; }
	@set -eu; while read -r name digest || test -n "$$name"; do \
	  image="$(IMAGES)/flashsale/$$name"; \
	  cosign verify "$$image@$$digest" --annotations "image=$$image" \
	    --certificate-identity "$(SOURCE)/.github/workflows/release.yml@refs/tags/v$(VERSION)" \
	    --certificate-oidc-issuer https://token.actions.githubusercontent.com > /dev/null; \
	done < "$(DIGESTS)"

release-push: $(READY) ## Push CHART=FILE to IMAGES/charts, and print its name with digest (needs Go)
	@test -n "$(IMAGES)" && test -s "$(CHART)" || { echo "Name the registry and the package: make release-push IMAGES=registry.example/shop CHART=FILE" >&2; exit 2; }
	@$(BIN)/python -m dev.release push "$(CHART)" --images "$(IMAGES)" $(PUSH_FLAGS)

lock: $(READY) ## Compile the hashed requirements from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --all-extras pyproject.toml -o dev/requirements.txt
	for deployable in api consumer operator; do \
	  case $$deployable in operator) folder=operator;; *) folder=services/$$deployable;; esac; \
	  $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	    --no-emit-index-url --no-header --constraint dev/requirements.txt \
	    --extra $$deployable pyproject.toml -o $$folder/requirements.txt || exit 1; \
	done
