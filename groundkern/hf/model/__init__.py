"""The model side of groundkern.hf: from `attach` to the losses of a batch.

attach.py         puts supervision on a model; support.py refuses what cannot be served
doctor.py         measures on a batch that the wiring fits
request.py        one forward's inputs, sorted and checked
forward.py        the grounded forward: body, head, terms
body.py           one run of the body, with side_tokens.py appended
attention.py      the wrapped attention function: side tokens, and what is read in each layer
readings.py       attention maps, summed over layers; head_weight.py weights their heads
gradcam.py        GradCAM maps that a loss differentiates
attribution.py    recorded contributions and GradCAM
head.py           scores of a few rows under the model's own output head
terms.py          the terms of the loss
"""
