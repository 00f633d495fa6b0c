"""What a checker says of the ops on several ranks, as in `ops`."""

from typing import assert_type

from torch import Tensor

from groundkern import AttentionReference, QueryRows, SideAttention, parallel


def calls(q: Tensor, k: Tensor, columns: Tensor, shard: parallel.Shard, rows: QueryRows) -> None:
    sharded = parallel.ShardedRows(rows, shard)
    assert_type(parallel.side_attention(q, k, k, sharded), SideAttention)
    assert_type(parallel.attention_map(q, k, sharded, columns, over="visible"), Tensor)
    reference = AttentionReference(q, k)
    assert_type(parallel.attention_divergence(q, k, reference, sharded, columns), Tensor)
    of_heads = parallel.heads.HeadRows(rows, heads=4)
    assert_type(parallel.heads.attention_map(q, k, of_heads, columns, over="visible"), Tensor)
    parallel.side_attention(q, k, k, rows)  # type: ignore[arg-type]  # rows that are not sharded
    parallel.heads.attention_map(q, k, of_heads, columns)  # type: ignore[call-arg]
