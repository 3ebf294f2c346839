# make compare   train with and without Gradient Centralization on bundled data, print the verdict and the report's place
# make test      lint, types and tests
# Both set up what they need in .venv first; Python 3, make and pip are enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
C := src/gradcentral/kernels/c
BUILT_FROM := pyproject.toml setup.py constraints.txt $(wildcard $(C)/*)
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: compare test lint types tests triton zoo cluster reference without-compiler sanitize bench clean

compare: $(VENV)/experiments
	$(BIN)/gradcentral compare

test: lint types tests triton zoo cluster without-compiler sanitize

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/dev
	$(BIN)/mypy

# On several cores: a file of tests to a process, each of one thread, for threads that share cores wait for each other.
JOBS ?= 2
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)
tests: $(VENV)/dev
	$(PARALLEL) --dist loadfile --ignore tests/zoo

# The kernels for CUDA devices, without one: Triton reads the variable when it is imported, hence a run of its own.
triton: $(VENV)/dev
	TRITON_INTERPRET=1 GRADCENTRAL_KERNELS=triton $(PARALLEL) tests/kernels/test_triton.py

# The layouts of real models; see the extra "zoo" in pyproject.toml.
zoo: $(VENV)/zoo
	PYTHONPATH=$(VENV)/torchvision $(PARALLEL) --dist loadfile tests/zoo

# Comparisons on a Ray and a Dask of this machine; see the extras of that name.
cluster: $(VENV)/cluster
	$(BIN)/pytest tests/experiment/test_backends.py

bench: $(VENV)/experiments
	$(BIN)/gradcentral bench

# Installed where there is no C compiler, the package runs its reference path.
KERNEL_TESTS := tests/kernels/test_native.py tests/optim tests/test_attach.py
without-compiler: $(VENV)/dev
	rm -rf build/without-compiler
	CC=/nonexistent $(PIP) --no-deps --target build/without-compiler .
	PYTHONPATH=build/without-compiler $(BIN)/pytest -q -p no:cacheprovider $(KERNEL_TESTS)

# The kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED := build/sanitized/gradcentral
sanitize: $(VENV)/dev
	rm -rf build/sanitized && mkdir -p build/sanitized && cp -r src/gradcentral $(SANITIZED)
	rm -f $(SANITIZED)/kernels/_native.*
	$(CC) -O1 -g -std=gnu11 -fopenmp -fno-math-errno -fPIC -shared -fno-sanitize-recover=undefined \
	    -fsanitize=address,undefined $(C)/gradcentral.c -o $(SANITIZED)/kernels/_native.so -lm
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 GRADCENTRAL_KERNELS=native PYTHONPATH=build/sanitized \
	    $(BIN)/pytest -q -p no:cacheprovider $(KERNEL_TESTS)

# torch comes first and alone: with it installed, nothing else asks for another build of it.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/experiments: $(VENV)/torch $(BUILT_FROM)
	$(PIP) --editable '.[experiments]'
	touch $@

$(VENV)/dev: $(VENV)/experiments
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/zoo: $(VENV)/dev
	$(PIP) --editable '.[zoo]'
	# timm imports torchvision, of which only the build on the package index is to be had: it stays out of sight of
	# everything else. Without it the tests of timm's models are skipped.
	-$(PIP) --no-deps timm && $(PIP) --no-deps --target $(VENV)/torchvision torchvision
	touch $@

$(VENV)/cluster: $(VENV)/dev
	$(PIP) --editable '.[ray,dask]'
	touch $@

clean:
	rm -rf build runs $(VENV) src/*.egg-info src/gradcentral/kernels/_native.*
