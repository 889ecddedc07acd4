# `make demo` and `make test` are all the set-up there is.
PYTHON ?= python3
BIN = .venv/bin
INSTALLED = .venv/.installed
INSTALLED_DEV = .venv/.installed-dev

.PHONY: help demo serve test services test-services test-production check soak benchmarks clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("aq-data needs Python 3.11 or later; name one with PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

$(INSTALLED): .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[server]'
	@touch $@

$(INSTALLED_DEV): .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[server,gcs,s3,arrow,dask,netcdf,dev]'
	@touch $@ $(INSTALLED)

demo: $(INSTALLED) ## install, start a server, save a simulated sweep, find it, read a slice
	@$(BIN)/aq-data demo

serve: $(INSTALLED) ## start a server on ./aq-data
	@$(BIN)/aq-data serve

test: $(INSTALLED_DEV) ## the whole suite; skips what needs a service
	@$(BIN)/python -m pytest -n auto --dist worksteal

services: .venv/bin/python ## fetch what test-services needs into .cache, once
	@$(BIN)/python tests/services/fetch.py

test-services: $(INSTALLED_DEV) ## the tests against real services; a service that is not there is a failure
	@AQ_DATA_SERVICES=required $(BIN)/python -m pytest -m services -n auto --dist worksteal

test-production: $(INSTALLED_DEV) ## the tests of servers, clients and promises again, over MongoDB and buckets
	@AQ_DATA_SERVICES=required AQ_DATA_DEPLOYMENT=production $(BIN)/python -m pytest -m 'not services' -n auto --dist worksteal \
		tests/server tests/client tests/promises

check: $(INSTALLED_DEV) ## linters, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

soak: $(INSTALLED_DEV) services ## long runs of the random tests, over MongoDB and buckets too
	@AQ_DATA_SOAK=1 AQ_DATA_SERVICES=required $(BIN)/python -m pytest --timeout 7200 -o faulthandler_timeout=0 \
		tests/models tests/storage tests/client tests/promises

benchmarks: $(INSTALLED_DEV) services ## workloads on both deployments, against Tiled and the floors
	@$(BIN)/python -m benchmarks
	@$(BIN)/python -m benchmarks.search --documents 10000 --sides store,http,mongo,tiled

clean: ## remove what make made
	rm -rf .venv .cache demo-data
