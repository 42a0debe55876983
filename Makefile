PYTHON ?= python3
VENV := .venv
DEV_VENV := .venv-dev
DEV := $(DEV_VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
LOCK := $(DEV)/uv pip compile --quiet pyproject.toml --upgrade --generate-hashes --python-version 3.12 \
	--python-platform linux --no-header --no-annotate --no-emit-index-url

# The number of test processes. The tests of one file, or of one group (tests/conftest.py), share a process. In each
# process PyTorch has one thread. Compiled files are kept, whatever the environment says: hundreds of processes read them.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(DEV)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
LINTERS := --deselect tests/test_architecture.py::test_the_linter_finds_nothing

.PHONY: help serve dev train export check quick test soak lint format protos requirements clean

## List the targets.
help:
	@awk '/^## / { text = text " " substr($$0, 4); next } \
		/^[a-z-]+:/ && text { sub(":.*", "", $$1); printf "make %-13s%s\n", $$1, text } { text = "" }' $(MAKEFILE_LIST)

## Install the server and serve the embedded model: gRPC on 8001, metrics on 8002. ARGS='--port 9001' adds flags.
serve: $(VENV)/.installed
	$(VENV)/bin/python -m serving $(ARGS)

## Install the packages for training, export, tests and linters.
dev: $(DEV_VENV)/.installed

## Train a network. ARGS='--config compact --dataset mnist' sets its flags, ARGS=--help lists them.
train: $(DEV_VENV)/.installed
	$(DEV)/python -m training $(ARGS)

## Export a trained network to ONNX. ARGS='runs/NAME/capsnet.pt runs/models' sets its arguments, ARGS=--help lists them.
export: $(DEV_VENV)/.installed
	$(DEV)/python -m export $(ARGS)

## Run lint and the quick tests: those that start no server and no training. ARGS='-k NAME' chooses tests.
check: $(DEV_VENV)/.installed
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint quick

## Run the quick tests without lint. ARGS='-k NAME' chooses tests.
quick: $(DEV_VENV)/.installed
	$(PYTEST) -m "not server and not training" $(LINTERS) $(ARGS)

## Run all tests. ARGS='-k NAME' chooses tests, JOBS=1 runs one at a time.
test: $(DEV_VENV)/.installed
	$(PYTEST) $(ARGS)

## Run both transports for a minute under mixed load, with every answer compared. ARGS='--minutes 30' sets flags.
soak: $(DEV_VENV)/.installed
	$(DEV)/python -m benchmarks.soak $(ARGS)

## Check format, lint, types, import rules and .proto files.
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

## Update the versions and digests that the images install.
requirements: $(DEV_VENV)/.installed
	$(LOCK) --extra cpu --extra tracing --output-file deploy/requirements/cpu.txt
	$(LOCK) --extra gpu --extra tracing --output-file deploy/requirements/gpu.txt
	$(LOCK) --extra cpu --extra export --output-file deploy/requirements/training.txt

## Remove both environments.
clean:
	rm -rf $(VENV) $(DEV_VENV)

$(VENV)/.installed: pyproject.toml
	@echo "installing the server into $(VENV) (once)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) --editable '.[cpu]'
	@touch $@

$(DEV_VENV)/.installed: pyproject.toml
	@echo "installing the packages for training, export and tests into $(DEV_VENV) (once)"
	$(PYTHON) -m venv $(DEV_VENV)
	$(DEV_VENV)/bin/python $(PIP) --editable '.[cpu,export,tracing,dev]'
	@touch $@
