"""Random calls of the ops against fp64: everything a user may pass, drawn by lot.

    python -m tests.ops.random_calls --calls 5000 --seed 0 --jobs 2
    python -m tests.ops.random_calls --seed 0 --only 1234          one call, with what was drawn
    python -m tests.ops.random_calls --backend native --op kl      another backend, one op
    python -m tests.ops.random_calls --op loss                     the loss (all others: attention)

Without a GPU the Triton kernels run in the interpreter. A call is made from the seed and its number
alone, so that a failure is found again. The files: `layouts` (views of tensors), `drawing` (calls),
`truth` (the ops in plain torch), `checking` (what must hold), `losses` (all
three for the loss), `running` (a call in any process),
`__main__` (the command).
"""
