# mojomesh: `make demo` shows the whole mesh at work, `make test` proves it. Both do all their own set-up.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
MAGE := .venv-mage
BIN := $(VENV)/bin
SERVICES := ingest features trainer registry scorer
COMPILE = $(BIN)/uv pip compile --universal --generate-hashes --no-annotate --no-header --quiet --python-version 3.11 \
  $(shell sed -n 's/^name = "\(mojomesh-.*\)"/--no-emit-package \1/p' $(MEMBERS:%=%/pyproject.toml))
MEMBERS := contracts chassis store services/ingest services/features services/trainer services/registry services/scorer cli deploy/local examples/flights

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | sort | expand -t 16

setup: $(VENV)/.done $(MAGE)/.done $(VENV)/.jars ## Make both environments and fetch the jars (done once)

$(VENV)/.done: requirements/build.txt requirements/dev.txt $(MEMBERS:%=%/pyproject.toml)
	@$(PYTHON) deploy/local/mojomesh_local/platform_check.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/build.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation $(MEMBERS:%=-e ./%)
	@touch $@

$(MAGE)/.done: requirements/mage.txt contracts/pyproject.toml services/trainer/pyproject.toml $(VENV)/.done
	$(PYTHON) -m venv $(MAGE)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(MAGE)/bin/python --require-hashes -r requirements/mage.txt
	$(BIN)/uv pip install --quiet --python $(MAGE)/bin/python --no-deps --no-build-isolation -e ./contracts -e ./services/trainer
	@touch $@

$(VENV)/.jars: $(VENV)/.done deploy/local/mojomesh_local/jars.py deploy/local/mojomesh_local/jars.sha256 $(shell find services/scorer -name '*.java')
	$(BIN)/python -m mojomesh_local.jars
	@touch $@

lock: $(VENV)/.done ## Write requirements/*.txt anew from the pyproject.toml files
	$(COMPILE) --group build -o requirements/build.txt
	$(COMPILE) --group dev $(MEMBERS:%=%/pyproject.toml) -o requirements/dev.txt
	$(COMPILE) services/trainer/pipelines/pyproject.toml -o requirements/mage.txt
	for service in $(SERVICES); do $(COMPILE) contracts/pyproject.toml chassis/pyproject.toml store/pyproject.toml \
	  services/$$service/pyproject.toml -c requirements/dev.txt -o requirements/$$service.txt || exit 1; done

check: setup ## Formatting, lint, types and the arrows between packages, in seconds
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(foreach m,$(MEMBERS),$(wildcard $(m)/mojomesh_*)) tests
	$(BIN)/lint-imports

format: setup ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

contracts: setup ## Add changed event schemas to the golden ones (refused if they break any) and write docs/asyncapi.yaml
	$(BIN)/python -m mojomesh_contracts.compatibility --write
	$(BIN)/python -m mojomesh_contracts.asyncapi --write

demo: setup ## A year of flights through the whole mesh, in minutes; ends with reports/demo.html
	$(BIN)/mojomesh demo

test: setup ## The tests, on real servers: some twenty minutes
	$(BIN)/pytest -n 2 --dist loadfile

test-long: setup ## The same promises over thousands of histories, and for longer under load: hours
	$(BIN)/pytest -m long -s

bench-scorer: setup ## The scorer beside other servers of the same model; writes docs/benchmarks.md, ARGS=--quick only prints
	$(BIN)/python -m bench.scorer $(ARGS)

bench-store: setup ## The feature store against other ways, in one run; ARGS=--quick for a small one
	$(BIN)/python -m bench.store $(ARGS)

images: setup ## One container image per service, mojomesh-<service>
	for service in $(SERVICES); do docker build --network host --build-arg SERVICE=$$service -t mojomesh-$$service -f deploy/images/Dockerfile . || exit 1; done

.PHONY: help setup lock check format contracts demo test test-long bench-scorer bench-store images
