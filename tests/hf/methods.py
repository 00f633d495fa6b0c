"""Every method at once, for the tests that batches, checkpoints and ranks change nothing."""

from __future__ import annotations

from groundkern.hf import DvSft, Hist, Klal, LogitLens, Margins, Smam

METHODS = {
    "attention": {
        "smam": Smam(divide_by="aligned"),
        "dv_sft": DvSft(weight=0.5, average="image"),
        "klal": Klal(average_layers=True, head_weight="learned", divergence="js"),
        "hist": Hist(),
        "margins": Margins(),
        "logit_lens": LogitLens(),
    },
    "gradcam": {
        "smam": Smam(),
        "dv_sft": DvSft(weight=0.5, average="visual"),
        "klal": Klal(over="renormalised", divergence="reverse_kl"),
        "hist": Hist(maps="gradcam", composition=50.0),
        "margins": Margins(maps="gradcam"),
        "logit_lens": LogitLens(),
    },
}
