PYTHON ?= python3
VENV := .venv
DEV_VENV := .venv-dev
DEV := $(DEV_VENV)/bin
# Python compiles what it imports, which is a third of the files.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile
AUDIT_VENV := .venv-audit
# The generator of protos/. Its own dependencies are left out: it needs none of them, and they are older than the server's.
# Its version decides which versions of grpcio and protobuf the client can work with.
PROTOC := grpcio-tools==1.81.1
LOCKED := build cpu gpu installer training torch-cuda
IMAGE := capsnet-serving
TORCH := deploy/requirements/torch.in
# Where uv finds PyTorch's build for the CPU: its own index. '--index-url URL' names a mirror.
TORCH_SOURCE ?= --torch-backend cpu
LOCK := $(DEV)/uv pip compile --quiet --upgrade --generate-hashes --python-version 3.12 \
	--python-platform linux --no-header --no-annotate --no-emit-index-url

# The number of test processes. With three, two cores have work while tests wait for a server or a clock. The tests of
# one file, or of one group (tests/conftest.py), share a process. In each process PyTorch has one thread. Compiled files
# are kept, whatever the environment says: hundreds of processes read them.
JOBS ?= 3
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(DEV)/python -m pytest
PARALLEL := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
# The commit whose clients must be able to go on with the .proto files.
BASE ?= main
# Where the site of the documents is built, and what is copied there: all pages, and the files that they show or link to.
SITE ?= site
SITE_FILES := '*.md' docs/site.css docs/images docs/claims/pictures docs/claims/claims.html benchmarks/results \
	CITATION.cff LICENSE NOTICE protos/capsnet/v1/capsnet.proto training/model.py training/data/specs.py \
	benchmarks/absent_network.py deploy/haproxy/haproxy.cfg deploy/kubernetes/client-service-config.json \
	tests/photographs.py tests/test_balancing.py tests/test_kubernetes.py
LINTERS := --deselect tests/test_architecture.py::test_the_linter_finds_nothing

.PHONY: help serve dev train export claims check quick test attacks soak dist image lint site format protos cards requirements sbom audit \
	scan clean

## List the targets.
help:
	@awk '/^## / { text = text " " substr($$0, 4); next } \
		/^[a-z-]+:/ && text { sub(":.*", "", $$1); printf "make %-13s%s\n", $$1, text } { text = "" }' $(MAKEFILE_LIST)

## Install the server and serve the embedded model: HTTP on 8000, gRPC on 8001, metrics on 8002. ARGS='--port 9001' adds flags.
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

## Measure the claims made for capsule networks on a tiny scale. ARGS=full takes a night, or an hour with a GPU.
claims: $(DEV_VENV)/.claims
	$(DEV)/python -m training.claims $(ARGS)

## Run lint and the quick tests: those that start no server, training or export. ARGS='-k NAME' chooses tests.
check: $(DEV_VENV)/.installed
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint quick

## Run the quick tests without lint. ARGS='-k NAME' chooses tests.
quick: $(DEV_VENV)/.installed
	$(PYTEST) $(PARALLEL) -m "not server and not training and not exporter and not attack and not install" $(LINTERS) $(ARGS)

## Run all tests but those of `make attacks` and `make dist`. ARGS='-k NAME' chooses tests, JOBS=1 runs one at a time.
test: $(DEV_VENV)/.installed
	$(PYTEST) $(PARALLEL) -m "not attack and not install" $(ARGS)

## Attack the server on both transports, and check that it serves others meanwhile. ARGS='--attacks all' takes longer.
attacks: $(DEV_VENV)/.installed
	$(PYTEST) -m attack tests/test_attacks.py $(ARGS)

## Run both transports for a minute under mixed load, with every answer compared. ARGS='--minutes 30' sets flags.
soak: $(DEV_VENV)/.installed
	$(DEV)/python -m benchmarks.soak $(ARGS)

## Build the wheel, the source distribution and their lists of packages into dist/, and test them as installed packages.
dist: $(DEV_VENV)/.installed
	rm -rf dist
	$(DEV)/uv build --quiet --build-constraints deploy/requirements/build.txt --require-hashes --out-dir dist
	$(DEV)/python deploy/sbom.py --wheel dist/*.whl
	$(PYTEST) -m install tests/test_installed.py $(ARGS)

## Build the server's image, labelled with version and commit. ARGS=training builds another one of docker-compose.yml.
image: $(DEV_VENV)/.installed
	docker compose build --build-arg VERSION="$$($(DEV)/python -m setuptools_scm)" \
		--build-arg REVISION="$$(git rev-parse HEAD)" $(or $(ARGS),capsnet)

## Check format, lint, types, import rules, .proto files and the site of the documents.
lint: $(DEV_VENV)/.installed
	$(DEV)/ruff format --check .
	$(DEV)/ruff check .
	$(DEV)/mypy
	$(DEV)/lint-imports
	cd protos && ../$(DEV)/buf lint && ../$(DEV)/buf format --diff --exit-code
	$(MAKE) --no-print-directory site
	if git rev-parse --quiet --verify $(BASE) >/dev/null; then \
		cd protos && ../$(DEV)/buf breaking --against \
			"$$(git rev-parse --path-format=absolute --git-common-dir)#ref=$$(git rev-parse $(BASE)),subdir=protos"; fi

## Build the site of the documents from their Markdown. A warning is an error. It opens from site/html/index.html.
site: $(DEV_VENV)/.installed
	rm -rf $(SITE)/.pages
	mkdir -p $(SITE)/.pages
	cp zensical.toml $(SITE)
	git ls-files -z --cached --others --exclude-standard -- $(SITE_FILES) | xargs -0 cp --parents --target-directory $(SITE)/.pages
	$(DEV)/zensical build --strict --config-file $(SITE)/zensical.toml
	@echo "open $(SITE)/html/index.html; for its search: python3 -m http.server --bind 127.0.0.1 --directory $(SITE)/html 8080"

## Format the code and the .proto files.
format: $(DEV_VENV)/.installed
	$(DEV)/ruff format .
	$(DEV)/ruff check --fix .
	cd protos && ../$(DEV)/buf format --write

## Generate the code from the .proto files.
protos: $(DEV_VENV)/.installed
	PYTHONPATH=$(DEV_VENV)/protoc $(DEV)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. \
		protos/capsnet/v1/*.proto protos/inference/*.proto

## Write the model cards of the networks in models/ from their manifests.
cards: $(DEV_VENV)/.installed
	$(DEV)/python -m export.model_card models/*/*/

## Update the versions and digests that the images install, and the lists of packages.
requirements: $(DEV_VENV)/.installed
	$(LOCK) pyproject.toml --extra cpu --extra tracing --output-file deploy/requirements/cpu.txt
	$(LOCK) pyproject.toml --extra gpu --extra tracing --output-file deploy/requirements/gpu.txt
	$(LOCK) pyproject.toml --extra cpu --extra export --constraints $(TORCH) --excludes deploy/requirements/cuda.in \
		--no-emit-package torch --output-file deploy/requirements/training.txt
	$(LOCK) $(TORCH) --constraints deploy/requirements/training.txt --output-file deploy/requirements/torch-cuda.txt
	echo uv | $(LOCK) - --output-file deploy/requirements/installer.txt
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		| $(LOCK) - --output-file deploy/requirements/build.txt
	@failed=; sed 's/^torch==.*/&+cpu/' $(TORCH) | $(LOCK) - --no-deps $(TORCH_SOURCE) \
		--output-file deploy/requirements/torch-cpu.txt 2>/dev/null || failed=1; \
	$(PYTHON) deploy/sbom.py || exit 1; \
	test -z "$$failed" || { echo "deploy/requirements/torch-cpu.txt is as it was: uv found no PyTorch for the CPU with" \
		"'$(TORCH_SOURCE)'; all other files are new" >&2; exit 1; }

## Write the list of packages of each image (SBOM, CycloneDX): deploy/sbom/*.json.
sbom:
	$(PYTHON) deploy/sbom.py

## Look up known weaknesses of every package in deploy/requirements. Fails if one cannot be looked up.
audit: $(AUDIT_VENV)/.installed
	$(AUDIT_VENV)/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner off \
		$(LOCKED:%=--requirement deploy/requirements/%.txt) $(ARGS)

## Compare an image's packages with its list, and scan it with trivy or grype. IMAGE=NAME, KIND=gpu or KIND=training.
scan:
	docker run --rm --network none --entrypoint python $(IMAGE) -c "from importlib.metadata import distributions; \
		print(*sorted(f'{one.name}=={one.version}' for one in distributions()), sep='\n')" \
		| $(PYTHON) deploy/sbom.py --compare $(or $(KIND),cpu)
	docker run --rm --network none --entrypoint dpkg-query $(IMAGE) --show
	if command -v trivy; then trivy image --exit-code 1 --ignore-unfixed $(IMAGE); \
		else grype $(IMAGE) --fail-on high --only-fixed; fi

## Remove all environments.
clean:
	rm -rf $(VENV) $(DEV_VENV) $(AUDIT_VENV)

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
	$(DEV_VENV)/bin/python $(PIP) --no-deps --upgrade --target $(DEV_VENV)/protoc '$(PROTOC)'
	@touch $@

$(DEV_VENV)/.claims: $(DEV_VENV)/.installed
	@echo "installing the toolboxes of attacks into $(DEV_VENV) (once)"
	$(DEV_VENV)/bin/python $(PIP) --editable '.[cpu,export,tracing,dev,claims]'
	@touch $@

$(AUDIT_VENV)/.installed:
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python $(PIP) 'pip-audit>=2.9'
	@touch $@
