# make integrations-llama_factory | integrations-ms_swift: tests of their own runs (260 and 390 MB of
# wheels). Each wants other versions of transformers, PEFT and datasets, so that each has a folder,
# which is ahead of .venv.
PROGRAMS := llama_factory ms_swift
PROGRAM_PLUGINS := -p benchmarks.families.torchvision_beside_cpu -p tests.integrations.torchaudio_absent

.PHONY: integrations $(PROGRAMS:%=integrations-%)
.PRECIOUS: build/integrations-%/.installed

integrations: $(PROGRAMS:%=integrations-%)

$(PROGRAMS:%=integrations-%): integrations-%: build/integrations-%/.installed
	PYTHONPATH=$(CURDIR)/build/integrations-$* CUDA_VISIBLE_DEVICES= $(PY) -m pytest -q -n 0 \
		$(PROGRAM_PLUGINS) tests/integrations/test_$*.py

build/integrations-%/.installed: tests/integrations/%.txt | $(INSTALLED)
	rm -rf $(@D)
	$(INSTALL) --no-deps --target $(@D) -r $<
	touch $@
