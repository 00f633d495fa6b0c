# make demo | test | lint | aot (kernels compiled for GPUs that are not here) | gpu (tests on one):
# each installs what it needs into .venv first, once.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto
DEMO = -m trainer demo --output demo_run

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PINNED := $(PY) -m pip install --quiet -c constraints.txt
BUILD_INPUTS := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test lint bench aot gpu
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(PY) $(DEMO)

test: $(INSTALLED)
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

aot: $(INSTALLED)
	$(PY) -m benchmarks.aot $(AOT_ARGS)

gpu: $(INSTALLED)
	$(PY) -m pytest -m gpu

bench:
	@echo "make $@: not part of this version; it comes with the benchmarks." >&2
	@exit 1

# No build isolation: the extension is built with the pinned ninja and pybind11.
$(INSTALLED): $(BUILD_INPUTS)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PINNED) setuptools wheel ninja pybind11
	$(PINNED) --no-build-isolation --editable '.[dev]'
	$(PY) -c "import groundkern; print('backends:', groundkern.available_backends())"
	touch $@
