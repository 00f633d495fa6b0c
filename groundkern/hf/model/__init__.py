"""The model side of groundkern.hf: from `attach` to the losses of a batch.

attach.py         puts objectives on a model; support.py refuses those that do not fit it
layers.py         what mixes tokens in each layer; prefix.py: tokens that see later keys
doctor.py         measures on a batch that the wiring fits; comparing.py: attention, layer by layer
request.py        what one forward is asked for: inputs, supervision, objectives, denominators
forward.py        the grounded forward: body, head, terms, recordings
body.py           one run of the body, with the tokens of side_tokens.py appended
attention.py      the wrapped attention function: side tokens, and what is read in each layer
body_run.py       what one run asks of its layers and finds out for all of them
mixers.py         recurrences and convolutions, which run on the main tokens alone
rows.py           rows and key sets as the ops want them
readings.py       what a forward reads in its layers; map_readings.py: attention maps, summed over
                  layers; head_weight.py weights their heads, chosen_heads.py takes some of them
gradcam.py        GradCAM maps for losses
attribution.py    contributions and GradCAM for recordings
head.py           scores of a few rows under the model's own output head
terms.py          the terms of the loss
records.py        the recordings that `gk_record` asks for
"""
