# Everything here makes its own environment in .venv; a second run finds it ready.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Beside .venv, for the tests of other video LLMs: what their processors need, for this PyTorch, and an old transformers.
TORCHVISION ?= torchvision==0.28.0
OLDEST ?= transformers==5.20.0
# What `make smoke` loads the Kernel Hub folder with.
KERNELS ?= kernels==0.17.2
VENV := .venv
# Where results go; by default benchmarks/results/<device>/.
OUT ?=
# Not empty: `make gpu` without the steps that passed before.
RESUME ?=
BIN := $(VENV)/bin
SOURCES := $(shell find csrc tests/cuda_on_host -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: benchmark test lint format table dist hub smoke gpu clean

# A command that fails fails this, too, when the others have run; Ctrl-C (130) stops all of them.
benchmark: $(VENV)/ready  ## measure the model, the ops and the projector on this machine; JSON, PNG and the README's tables
	@status=0; for name in throughput kernels projector steps swap fp8; do \
		echo "python -m benchmarks.$$name"; \
		$(BIN)/python -m benchmarks.$$name $(if $(OUT),--out $(OUT)) && continue; \
		status=$$?; test $$status != 130 || exit 130; \
	done; $(BIN)/python -m benchmarks.table && exit $$status

table: $(VENV)/ready  ## the tables of README and docs, from the JSON that is there
	$(BIN)/python -m benchmarks.table

test: $(VENV)/ready $(VENV)/swap/ready  ## all tests that this machine can run
	$(BIN)/python -m pytest -n auto --dist loadgroup
	PYTHONPATH=$(VENV)/swap/torchvision $(BIN)/python -m pytest -n auto tests/swap
	PYTHONPATH=$(VENV)/swap/torchvision:$(VENV)/swap/oldest $(BIN)/python -m pytest -n auto tests/swap

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(SOURCES)

dist: $(VENV)/ready  ## sdist and wheel in dist/
	rm -rf dist build
	$(BIN)/python -m build --no-isolation

hub: $(VENV)/ready  ## the folder that get_local_kernel of the package kernels loads, in hub/ppllava-kernels/
	$(BIN)/python hub/build.py

smoke: dist hub  ## the hub folder and the wheel in a second, fresh environment, outside of the checkout
	$(PYTHON) tests/smoke.py "$(TORCH)" "$(KERNELS)" hub/ppllava-kernels dist/*.whl

gpu:  ## the GPU round, without network or .venv, in ten minutes: build, test, compute-sanitizer, benchmarks, tables
	$(PYTHON) -m benchmarks.gpu_round $(if $(OUT),--out $(OUT)) $(if $(RESUME),--resume)

# torch first and no build isolation: with it, pip would fetch the newest torch to build against.
$(VENV)/ready: pyproject.toml setup.py $(filter csrc/%,$(SOURCES))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel pybind11 ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,lint]"
	touch $@

# Not in .venv: PyPI's torchvision is built for CUDA, and transformers takes it for one that works.
$(VENV)/swap/ready: $(VENV)/ready
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D)/torchvision "$(TORCHVISION)"
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D)/oldest "$(OLDEST)"
	touch $@

clean:
	rm -rf $(VENV) build dist hub/ppllava-kernels *.egg-info
