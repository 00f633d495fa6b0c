# make demo | test | lint | bench | aot (kernels compiled for GPUs that are not here): each installs
# what it needs into .venv first, once.
# make gpu: GPU tests and benchmarks with $(PYTHON)'s own torch, from the source tree, into $$OUT.
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

# A CPU subset in under 5 minutes; `python -m benchmarks --help` has the rest.
bench: $(INSTALLED)
	$(PY) -m benchmarks --device cpu --no-whole --seconds 2 --least 3 --deadline 220 $(BENCH_ARGS) \
		--csv bench_results/cpu.csv --json bench_results/cpu.json --plot bench_results

gpu:
	$(PYTHON) -m benchmarks.gpu

aot: $(INSTALLED)
	$(PY) -m benchmarks.aot $(AOT_ARGS)

# No build isolation: the extension is built with the pinned ninja and pybind11.
$(INSTALLED): $(BUILD_INPUTS)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PINNED) setuptools wheel ninja pybind11
	$(PINNED) --no-build-isolation --editable '.[dev]'
	$(PY) -c "import groundkern; print('backends:', groundkern.available_backends())"
	touch $@
