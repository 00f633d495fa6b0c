# make integrations-axolotl | integrations-llama_factory | integrations-ms_swift: tests of their own
# runs (450 MB on disk, 260 and 390 MB of wheels). Each patches transformers, and wants other versions
# of it, so that each has a process and a folder of its own, which is ahead of .venv. axolotl 0.21
# asks for Python 3.12, and runs on 3.11 too; it has a requirement that is no wheel.
PROGRAMS := axolotl llama_factory ms_swift
PROGRAM_PLUGINS := -p benchmarks.families.torchvision_beside_cpu -p tests.integrations.torchaudio_absent

.PHONY: $(PROGRAMS:%=integrations-%)
.PRECIOUS: build/integrations-%/.installed

$(PROGRAMS:%=integrations-%): integrations-%: build/integrations-%/.installed
	PYTHONPATH=$(CURDIR)/build/integrations-$* CUDA_VISIBLE_DEVICES= $(PY) -m pytest -q -n 0 \
		$(PROGRAM_PLUGINS) tests/integrations/test_$*.py

build/integrations-%/.installed: tests/integrations/%.txt | $(INSTALLED)
	rm -rf $(@D)
	$(INSTALL) --no-build-isolation --ignore-requires-python --no-deps --target $(@D) -r $<
	touch $@
