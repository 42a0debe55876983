PYTHON ?= python3
VENV := .venv
DEV_VENV := .venv-dev
DEV := $(DEV_VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
LOCK := $(DEV)/uv pip compile --quiet pyproject.toml --upgrade --generate-hashes --python-version 3.12 \
	--python-platform linux --no-header --no-annotate --no-emit-index-url

# How many processes run tests. The tests of one file, or of one group (tests/conftest.py), share a process, and each
# process leaves PyTorch one thread.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(DEV)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
LINTERS := --deselect tests/test_architecture.py::test_the_linter_finds_nothing

.PHONY: help serve dev train export check test lint format protos requirements clean

## List the targets.
help:
	@awk '/^## / { text = text " " substr($$0, 4); next } \
		/^[a-z-]+:/ && text { sub(":.*", "", $$1); printf "make %-13s%s\n", $$1, text } { text = "" }' $(MAKEFILE_LIST)

## Install what serving needs and serve the embedded model: gRPC on 8001, metrics on 8002. ARGS='--port 9001' adds flags.
serve: $(VENV)/.installed
	$(VENV)/bin/python -m serving $(ARGS)

## Install what training, export, the tests and the linters need.
dev: $(DEV_VENV)/.installed

## Train a network. ARGS='--config compact --dataset mnist' are its flags, ARGS=--help lists them.
train: $(DEV_VENV)/.installed
	$(DEV)/python -m training $(ARGS)

## Export a trained network to ONNX. ARGS='runs/NAME/capsnet.pt runs/models' are its arguments, ARGS=--help lists them.
export: $(DEV_VENV)/.installed
	$(DEV)/python -m export $(ARGS)

## Run what takes little: lint, types and the tests that start no server and no training. ARGS='-k NAME' chooses tests.
check: lint
	$(PYTEST) -m "not server and not training" $(LINTERS) $(ARGS)

## Run all tests. ARGS='-k NAME' chooses among them, JOBS=1 runs one at a time.
test: $(DEV_VENV)/.installed
	$(PYTEST) $(ARGS)

## Check format, lint, types, import rules and the .proto files.
lint: $(DEV_VENV)/.installed
	$(DEV)/ruff format --check .
	$(DEV)/ruff check .
	$(DEV)/mypy
	$(DEV)/lint-imports
	cd protos && ../$(DEV)/buf lint && ../$(DEV)/buf format --diff --exit-code

## Format the code and the .proto files.
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

## Remove both environments.
clean:
	rm -rf $(VENV) $(DEV_VENV)

$(VENV)/.installed: pyproject.toml
	@echo "installing what serving needs into $(VENV) (once)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) --editable '.[cpu]'
	@touch $@

$(DEV_VENV)/.installed: pyproject.toml
	@echo "installing what training, export and the tests need into $(DEV_VENV) (once)"
	$(PYTHON) -m venv $(DEV_VENV)
	$(DEV_VENV)/bin/python $(PIP) --editable '.[cpu,export,tracing,dev]'
	@touch $@
