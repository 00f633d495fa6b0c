"""Faults of disk and machine at every point of a run: what a run may lose, and what it may not.

    python -m tests.faults                                      all of them, about 20,000
    python -m tests.faults --every 50 --seed 3                  one in fifty, others by the seed
    python -m tests.faults --scenario rollback --phase save     one run, or parts of runs
    python -m tests.faults --scenario fresh --point 45 --kind "EIO once"    one, and what it printed

A tiny run is stopped before each system call that changes or flushes a file of its folder
(`shim.c`). There a fork of it is killed, or has its call fail with ENOSPC, EDQUOT or EIO once or
from then on, or writes only a part; then the same command is given again. Power failures are worked
out from the log of the calls (`power.py`). `checks.py` says what must hold each time; pytest walks
a few points, and some of a run that was made careless, which must be found.
"""
