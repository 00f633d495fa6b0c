"""Other libraries' linear cross entropies, by their names and signatures, on groundkern's kernels.

    from groundkern.compat.torch import linear_cross_entropy                 # torch 2.13
    from groundkern.compat.liger import LigerFusedLinearCrossEntropyLoss     # Liger-Kernel 0.8.2
    from groundkern.compat.cut_cross_entropy import linear_cross_entropy     # 25.6.4

Names, order and defaults are theirs, and so are the meanings: what is divided by what, what an
ignored row gives, the dtype of the result. What groundkern cannot do raises ValueError or
TypeError with the argument's name. Options that only tune how they compute are checked and have no
effect. None of these libraries is imported.
"""
