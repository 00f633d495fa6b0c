"""Every method at once, for the tests that batches, checkpoints and ranks change nothing."""

from __future__ import annotations

from groundkern.hf import Basic, DvSft, Hist, Klal, LogitLens, Margins, PatchText, Smam

METHODS = {
    "attention": {
        "smam": Smam(divide_by="aligned"),
        "dv_sft": DvSft(weight=0.5, average="image"),
        "klal": Klal(average_layers=True, head_weight="learned", divergence="js"),
        "hist": Hist(),
        "margins": Margins(),
        "logit_lens": LogitLens(),
        "basic": Basic(logits=1.0),
        "patch_text": PatchText(words=0.5),
    },
    "gradcam": {
        "smam": Smam(),
        "dv_sft": DvSft(weight=0.5, average="visual"),
        "klal": Klal(over="renormalised", divergence="reverse_kl"),
        "hist": Hist(maps="gradcam", composition=50.0),
        "margins": Margins(maps="gradcam"),
        "logit_lens": LogitLens(),
        "basic": Basic(patches="uniform", head="output", detach_head=False),
        "patch_text": PatchText(temperature=0.5),
    },
}
