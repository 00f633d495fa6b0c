"""What torch's and DeepSpeed's engines ask of a batch, looked at once for all layers."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from groundkern.checks import fail, require
from groundkern.hf.model.rows import Window
from groundkern.kept import versions
from groundkern.parallel import Shard, Sharding


class Demands:
    """Equal shards in one order; every token sees all before it.

    Args:
        engine: its name.
        order: the name of the order.
        sharding: the order itself, of a length and a number of ranks.
        pieces: of equal length that a rank's tokens are made of.
    """

    def __init__(
        self, engine: str, order: str, sharding: Callable[[int, int], Sharding], pieces: int
    ) -> None:
        self.engine, self.order, self.sharding, self.pieces = engine, order, sharding, pieces
        self._shards: WeakSet[Shard] = WeakSet()
        self._keys: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def check(self, shard: Shard, first_key: Tensor, window: Window) -> None:
        """Refuse what is not so; asks the device once a batch.

        Args:
            shard: a rank's tokens.
            first_key: int32 [B, S].
            window: of the layer.

        Raises:
            ValueError: it is not.
        """
        within = f"with the engine {self.engine!r}"
        if window is not None:
            fail("sliding_window", f"no windows or chunks {within}", window)
        if shard not in self._shards:
            length, ranks = shard.length, shard.ranks
            wanted = f"a length divisible by {self.pieces * ranks} {within} on {ranks} ranks"
            equal = length % (self.pieces * ranks) == 0
            require(equal, "input_ids", f"{wanted}: pad on the right", length)
            owner = self.sharding(length, ranks).owner.to(shard.owner.device)
            same = bool((shard.owner == owner).all())
            require(same, "order", f"{self.order!r} {within}", "another")
            self._shards.add(shard)
        now = versions((first_key,))
        if now is None or self._keys.get(first_key) != now:
            wanted = f"no padding on the left and no packed documents {within}"
            require(not bool(first_key.any()), "attention_mask", wanted, "some")
            self._keys[first_key] = now
