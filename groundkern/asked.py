"""Calls of the attention ops that are to run together.

>>> side = asked.side_attention(q, k, v, rows, allowed=sets)
>>> kl = asked.attention_kl(other_q, k, target, other_rows, columns, over="columns")
>>> (out, lse), (loss,) = asked.run([side, kl])

What they compute is what the public functions of these names compute. Those with the same keys are
one node of the graph, which hands autograd one gradient of k, and one of v.
"""

from groundkern.ops.attention_map.api import asked_kl as attention_kl
from groundkern.ops.attention_map.api import asked_map as attention_map
from groundkern.ops.side_attention.api import asked as side_attention
from groundkern.together import Asked, Repeated, run

__all__ = ["Asked", "Repeated", "attention_kl", "attention_map", "run", "side_attention"]
