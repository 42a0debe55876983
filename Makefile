PYTHON ?= python3
VENV := .venv
DEV_VENV := .venv-dev
DEV := $(DEV_VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: serve test lint format protos clean

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
	$(DEV)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. protos/capsnet/v1/*.proto

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
	$(DEV_VENV)/bin/python $(PIP) --editable '.[cpu,export,dev]'
	@touch $@
