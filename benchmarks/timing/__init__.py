"""How a call is measured: the interleaving loop, peak memory, the machine, rows of results."""
