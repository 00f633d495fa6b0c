"""The ops where a sequence is split over the ranks of a process group: rows travel, keys stay.

Every rank holds the keys and values of its tokens. The queries of the few supervised rows are
gathered, each rank computes with its own keys, and results are merged by their log-sum-exp and sent
back to the ranks that own the rows: what is sent is as large as the rows, however long sequences
are. The loss of a step is the sum of what all ranks compute, and every rank runs its backward.
docs/scale/parallel.md says how, and what is sent. `heads` has the ops of a rank that holds all keys
of a part of the heads.
"""

from groundkern.parallel import heads
from groundkern.parallel.attention import (
    attention_contribution,
    attention_kl,
    attention_map,
    side_attention,
)
from groundkern.parallel.counts import row_count
from groundkern.parallel.divergence import attention_divergence
from groundkern.parallel.rows import ShardedRows
from groundkern.parallel.shards import LocalColumns, Shard, Sharding
from groundkern.parallel.traffic import Traffic, traffic

__all__ = [
    "LocalColumns",
    "Shard",
    "ShardedRows",
    "Sharding",
    "Traffic",
    "attention_contribution",
    "attention_divergence",
    "attention_kl",
    "attention_map",
    "heads",
    "row_count",
    "side_attention",
    "traffic",
]
