PYTHON ?= python3
VENV := .venv
DEV_VENV := .venv-dev
DEV := $(DEV_VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
LOCK := $(DEV)/uv pip compile --quiet pyproject.toml --upgrade --generate-hashes --python-version 3.12 \
	--python-platform linux --no-header --no-annotate --no-emit-index-url

.PHONY: serve test lint format protos requirements clean

## Install what serving needs and serve the embedded model: gRPC on 8001, metrics on 8002. ARGS='--port 9001' adds flags.
serve: $(VENV)/.installed
	$(VENV)/bin/python -m serving $(ARGS)

## Install what the tests need and run them all.
test: $(DEV_VENV)/.installed
	$(DEV)/python -m pytest $(ARGS)

## Formatting, lint, types, import rules and the .proto files.
lint: $(DEV_VENV)/.installed
	$(DEV)/ruff format --check .
	$(DEV)/ruff check .
	$(DEV)/mypy
	$(DEV)/lint-imports
	cd protos && ../$(DEV)/buf lint && ../$(DEV)/buf format --diff --exit-code

format: $(DEV_VENV)/.installed
	$(DEV)/ruff format .
	$(DEV)/ruff check --fix .
	cd protos && ../$(DEV)/buf format --write

## Generate the code from the .proto files.
protos: $(DEV_VENV)/.installed
	$(DEV)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. \
		protos/capsnet/v1/*.proto protos/inference/*.proto

## Write down the versions and digests of what the images install.
requirements: $(DEV_VENV)/.installed
	$(LOCK) --extra cpu --extra tracing --output-file deploy/requirements/cpu.txt
	$(LOCK) --extra gpu --extra tracing --output-file deploy/requirements/gpu.txt
	$(LOCK) --extra cpu --extra export --output-file deploy/requirements/training.txt

clean:
	rm -rf $(VENV) $(DEV_VENV)

$(VENV)/.installed: pyproject.toml
	@echo "installing what serving needs into $(VENV) (once)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) --editable '.[cpu]'
	@touch $@

$(DEV_VENV)/.installed: pyproject.toml
	@echo "installing what the tests need into $(DEV_VENV) (once)"
	$(PYTHON) -m venv $(DEV_VENV)
	$(DEV_VENV)/bin/python $(PIP) --editable '.[cpu,export,tracing,dev]'
	@touch $@
