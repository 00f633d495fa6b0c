"""Parameters of the functions that groundkern.compat stands in for, as their sources have them:
name and default in order; a name alone has no default. "*" begins those that are keyword-only.

torch 2.13.0, Liger-Kernel 0.8.2 (commit ead96b6), cut-cross-entropy 25.6.4 (commit d42911f).
"""

LIGER_OPTIONS = (
    ("ignore_index", -100),
    ("lse_square_scale", 0.0),
    ("label_smoothing", 0.0),
    ("reduction", "mean"),
    ("softcap", None),
    ("return_z_loss", False),
    ("accum_dtype", None),
    ("use_token_scaling", False),
    ("return_token_accuracy", False),
    ("return_predicted_tokens", False),
)
CCE_FILTERS = (
    ("filter_eps", "auto"),
    ("accum_e_fp32", False),
    ("accum_c_fp32", False),
    ("filter_e_grad", True),
    ("filter_c_grad", True),
    ("impl", "CCE"),
)
# by module of groundkern.compat and name
SIGNATURES = {
    "torch.linear_cross_entropy": (
        "input",
        "linear_weight",
        "target",
        "*",
        ("linear_bias", None),
        ("weight", None),
        ("reduction", "mean"),
        ("ignore_index", None),
        ("label_smoothing", 0.0),
        ("options", None),
    ),
    "liger.liger_fused_linear_cross_entropy": (
        "input",
        "weight",
        "target",
        ("bias", None),
        ("ce_weight", None),
        *LIGER_OPTIONS,
    ),
    "liger.LigerFusedLinearCrossEntropyLoss": (("ce_weight", None), *LIGER_OPTIONS),
    "liger.LigerFusedLinearCrossEntropyLoss.forward": (
        "self",
        "lin_weight",
        "_input",
        "target",
        ("bias", None),
    ),
    "liger.liger_fused_linear_jsd": (
        "student_input",
        "student_weight",
        "teacher_input",
        "teacher_weight",
        ("shift_labels", None),
        ("jsd_beta", 0.5),
        ("ignore_index", -100),
        ("temperature", 1.0),
        ("accum_dtype", None),
    ),
    "liger.LigerFusedLinearJSD": (
        ("jsd_beta", 0.5),
        ("ignore_index", -100),
        ("temperature", 1.0),
        ("accum_dtype", None),
    ),
    "liger.LigerFusedLinearJSD.forward": (
        "self",
        "student_input",
        "student_weight",
        "teacher_input",
        "teacher_weight",
        "shift_labels",
    ),
    "liger.CrossEntropyOutput": (
        "loss",
        ("z_loss", None),
        ("token_accuracy", None),
        ("predicted_tokens", None),
    ),
    "cut_cross_entropy.linear_cross_entropy": (
        "e",
        "c",
        "targets",
        ("bias", None),
        ("ignore_index", -100),
        ("softcap", None),
        ("reduction", "mean"),
        ("shift", 0),
        ("return_lse", False),
        *CCE_FILTERS,
        ("vocab_parallel_options", None),
    ),
    "cut_cross_entropy.LinearCrossEntropy": (
        ("ignore_index", -100),
        ("softcap", None),
        ("reduction", "mean"),
        ("shift", 0),
        *CCE_FILTERS,
        ("return_lse", False),
    ),
    "cut_cross_entropy.LinearCrossEntropy.forward": ("self", "e", "c", "targets", ("bias", None)),
    "cut_cross_entropy.VocabParallelOptions": (
        "start",
        "stop",
        ("group", None),
        ("reduce_e_grad", True),
    ),
    "cut_cross_entropy.VocabParallelOptions.from_vocab": (
        "vocab_size",
        ("group", None),
        ("reduce_e_grad", True),
    ),
    "cut_cross_entropy.compute_z_loss": (
        "lse",
        ("targets", None),
        ("shift", False),
        ("ignore_index", -100),
        ("reduction", "mean"),
    ),
}
