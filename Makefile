# Everything here makes its own environment in .venv, with the versions of requirements.lock; a second run finds it ready.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
# Where results go; by default benchmarks/results/<device>/.
OUT ?=
# What `make regress` compares this checkout with.
BASE ?= HEAD
# Not empty: `make gpu` without the steps that passed before.
RESUME ?=
# What test, test-newest and test-oldest run: files, folders, or tests as pytest names them.
TESTS ?= tests tests/swap
# Options of both fuzzers, as FUZZ="--time-limit 60".
FUZZ ?=
BIN := $(VENV)/bin
PIP := python -m pip install --quiet
LOCKED := $(PIP) --constraint requirements.lock
SOURCES := $(shell find csrc tests/cuda_on_host -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: benchmark regress test test-newest test-oldest test-video fuzz lint format table lock dist hub smoke gpu clean

# A command that fails fails this, too, when the others have run; Ctrl-C (130) stops all of them.
benchmark: $(VENV)/ready  ## measure the model, the ops and the projector on this machine; JSON, PNG and the README's tables
	@status=0; for name in throughput kernels projector steps swap fp8; do \
		echo "python -m benchmarks.$$name"; \
		$(BIN)/python -m benchmarks.$$name $(if $(OUT),--out $(OUT)) && continue; \
		status=$$?; test $$status != 130 || exit 130; \
	done; $(BIN)/python -m benchmarks.table && exit $$status

regress: $(VENV)/ready  ## make regress BASE=main: fails where an op became over 10 % slower since that commit
	$(BIN)/python -m benchmarks.regress "$(BASE)"

table: $(VENV)/ready  ## the tables of README and docs, from the JSON that is there
	$(BIN)/python -m benchmarks.table

# $(call pytest,ENVIRONMENT): TESTS there. Those of other video LLMs by themselves: the rest must not see torchvision.
IN_SWAP = $(filter tests/swap%,$(TESTS))
OTHERS = $(filter-out tests/swap%,$(TESTS))
FAILED = { $(1)/bin/python tests/versions.py differences; exit 1; }
define pytest
	$(if $(OTHERS),$(1)/bin/python -m pytest -n auto $(OTHERS) || $(FAILED))
	$(if $(IN_SWAP),PYTHONPATH=$(VENV)/torchvision $(1)/bin/python -m pytest -n auto $(IN_SWAP) || $(FAILED))
endef

test: $(VENV)/ready $(VENV)/torchvision/ready  ## all tests that this machine can run
	$(call pytest,$(VENV))

# The same, each time in a new environment above .venv, which lends it PyTorch, the extension, and what does not differ.
test-newest: $(VENV)/ready $(VENV)/torchvision/ready  ## with the newest packages that there are, but for PyTorch
	$(BIN)/python -m venv --clear --without-pip $(VENV)/newest
	$(BIN)/python tests/versions.py overlay $(VENV)/newest
	$(BIN)/python tests/versions.py newest > $(VENV)/newest/requirements.txt
	$(VENV)/newest/bin/$(PIP) --upgrade --upgrade-strategy eager "$(TORCH)" -r $(VENV)/newest/requirements.txt
	$(call pytest,$(VENV)/newest)

test-oldest: $(VENV)/ready $(VENV)/torchvision/ready  ## with the oldest packages that pyproject.toml allows, but for PyTorch
	$(BIN)/python -m venv --clear --without-pip $(VENV)/oldest
	$(BIN)/python tests/versions.py overlay $(VENV)/oldest
	$(BIN)/python tests/versions.py oldest > $(VENV)/oldest/requirements.txt
	$(VENV)/oldest/bin/$(PIP) -r $(VENV)/oldest/requirements.txt
	$(call pytest,$(VENV)/oldest)

test-video:  ## reading video without torch, on each Python from 3.11 on that is here, with the PyAV that it gets
	$(PYTHON) tests/torch_free.py $(VENV)/video

fuzz: $(VENV)/ready  ## random calls: of torch.ops under AddressSanitizer, of the functions against the reference
	PYTHONPATH=tests $(BIN)/python -m fuzz direct $(FUZZ)
	PYTHONPATH=tests $(BIN)/python -m fuzz public $(FUZZ)

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/shellcheck .ci/run

format: $(VENV)/ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(SOURCES)

dist: $(VENV)/ready  ## sdist and wheel in dist/, both of the checkout, whose objects in build/ are used
	rm -rf dist build/lib* build/bdist*
	$(BIN)/python -m build --no-isolation --sdist --wheel

hub: $(VENV)/ready  ## the folder that get_local_kernel of the package kernels loads, in hub/ppllava-kernels/
	$(BIN)/python hub/build.py

smoke: dist hub  ## the hub folder and the wheel in a second, fresh environment, outside of the checkout
	$(PYTHON) tests/smoke.py "$(TORCH)" requirements.lock hub/ppllava-kernels dist/*.whl

gpu:  ## the GPU round, without network or .venv, in ten minutes: build, test, compute-sanitizer, benchmarks, tables
	$(PYTHON) -m benchmarks.gpu_round $(if $(OUT),--out $(OUT)) $(if $(RESUME),--resume)

# For each Python from 3.10 on: `--universal` gives a package as many lines as the versions that these need.
lock:  ## requirements.lock, with the newest packages within the ranges of pyproject.toml, and README's line about them
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/$(LOCKED) uv packaging "tomli; python_version < '3.11'"
	echo "$(TORCH)" | $(VENV)/lock/bin/uv pip compile --quiet --no-config --upgrade --universal --python-version 3.10 --all-extras \
		--no-annotate --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml requirements.in -
	$(VENV)/lock/bin/python tests/versions.py readme

# torch first and no build isolation: with it, pip would fetch the newest torch to build against.
$(VENV)/ready: pyproject.toml setup.py requirements.lock $(filter csrc/%,$(SOURCES))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(LOCKED) "$(TORCH)"
	$(BIN)/$(LOCKED) setuptools pybind11 ninja
	$(BIN)/$(LOCKED) --no-build-isolation -e ".[test,lint]"
	touch $@

# Not in .venv: PyPI's torchvision is built for CUDA, and transformers takes it for one that works.
$(VENV)/torchvision/ready: requirements.lock $(VENV)/ready
	rm -rf $(@D)
	$(BIN)/$(LOCKED) --no-deps --target $(@D) torchvision
	touch $@

clean:
	rm -rf $(VENV) build dist hub/ppllava-kernels *.egg-info
