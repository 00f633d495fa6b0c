"""Which rows, which keys, which labels: the value types every op takes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from groundkern import checks
from groundkern.kept import capturing, kept

if TYPE_CHECKING:
    from typing_extensions import Self

BITS = 32  # keys in one int32 of mask bits
BYTE = 8  # keys in one of its bytes, the lowest first


@dataclass(frozen=True)
class _Tensors:
    """A frozen dataclass whose tensor fields move together."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same selection with every tensor on `device`."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def __getstate__(self) -> dict[str, object]:
        """Without what is remembered (`groundkern.kept`)."""
        return {name: x for name, x in vars(self).items() if not name.startswith("_")}

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors."""
        known = self.__dict__.get("_tensors")
        if known is None:
            known = tuple(x for x in vars(self).values() if isinstance(x, Tensor))
            self.__dict__["_tensors"] = known
        return known


@dataclass(frozen=True)
class QueryRows(_Tensors):
    """N query rows, sorted by sequence: row n sees the keys `start[n] <= j < stop[n]` of its
    sequence.

    One form covers causal masks (`stop = position + 1`), left padding, packed documents and sliding
    windows. A padding row has `start == stop`.

    Args:
        sequence: int32 [N], the row's sequence in the batch, ascending.
        position: int32 [N], the row's place in its sequence (where its query is taken from).
        start: int32 [N], the first visible key.
        stop: int32 [N], one past the last visible key.
        most: no sequence has more rows than this; None: N. A GPU kernel then needs no larger tiles
            than that, and reads the keys fewer times. It must be true: rows beyond it are lost.

    Raises:
        TypeError: a tensor that is not int32.
        ValueError: unequal lengths or devices, a negative `most`; on CPU also rows not sorted by
            sequence, a sequence with more than `most` rows, `start > stop`, or a negative
            `sequence` or `start`.
    """

    sequence: Tensor
    position: Tensor
    start: Tensor
    stop: Tensor
    most: int | None = None
    if TYPE_CHECKING:  # set once made, and no field

        @property
        def captured(self) -> bool: ...

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for name in ("sequence", "position", "start", "stop"):
            x = getattr(self, name)
            device = None if name == "sequence" else self.sequence.device
            checks.tensor(f"rows.{name}", x, "N", sizes, dtype=torch.int32, device=device)
        if self.most is not None:
            checks.require(self.most >= 0, "rows.most", "a number of rows >= 0", self.most)
        object.__setattr__(self, "captured", capturing(self.start))
        if len(self) == 0 or not checks.values_visible(self.sequence, self.start, self.stop):
            return
        steps = self.sequence.diff()
        checks.require(
            not bool((steps < 0).any()), "rows.sequence", "rows sorted by sequence", "unsorted rows"
        )
        checks.require(
            int(self.sequence[0]) >= 0, "rows.sequence", "values >= 0", int(self.sequence[0])
        )
        empty = (self.start > self.stop).nonzero()
        if len(empty):
            n = int(empty[0])
            got = f"start {int(self.start[n])} > stop {int(self.stop[n])} at row {n}"
            checks.fail("rows.start", "start <= stop in every row", got)
        checks.require(
            int(self.start.min()) >= 0, "rows.start", "values >= 0", int(self.start.min())
        )
        if self.most is not None:
            most = int(self.sequence.bincount().max())
            wanted = f"at least {most}, the rows of the sequence that has the most"
            checks.require(most <= self.most, "rows.most", wanted, self.most)

    def __len__(self) -> int:
        return self.sequence.shape[0]

    @classmethod
    def causal(
        cls,
        sequence: Tensor,
        position: Tensor,
        *,
        start: Tensor | int | None = None,
        window: int | None = None,
        most: int | None = None,
    ) -> QueryRows:
        """Rows under a causal mask: `stop = position + 1`.

        Args:
            sequence: integers [N], ascending.
            position: integers [N]; -1 makes a padding row.
            start: first visible key, integers [N] or one number (left padding, packed documents);
                default 0.
            window: sliding window, counting the row itself as transformers does.
            most: as in `QueryRows`.

        Returns:
            QueryRows with int32 tensors on `sequence`'s device.

        Raises:
            ValueError: a window that is not positive, and as `QueryRows`.
        """
        checks.require(
            window is None or window > 0, "window", "a positive number of keys or None", window
        )
        sequence, position = sequence.to(torch.int32), position.to(torch.int32)
        stop = position + 1
        first = torch.zeros_like(stop) if start is None else torch.zeros_like(stop) + start
        first = first.to(torch.int32)
        if window is not None:
            first = torch.maximum(first, stop - window)
        stop = torch.maximum(stop, torch.zeros_like(stop))
        return cls(sequence, position, torch.minimum(first, stop), stop, most)

    def take(self, x: Tensor) -> Tensor:
        """Gather the rows of a tensor, differentiably.

        Args:
            x: [B, H, S, D] or [B, S, D].

        Returns:
            [N, H, D] or [N, D] in x's dtype; a padding row at position -1 has position 0's values.

        Raises:
            ValueError: x has another number of dimensions.
        """
        if x.dim() not in (3, 4):
            checks.fail("x", "a tensor [B, H, S, D] or [B, S, D]", list(x.shape))
        sequence, position = self.places()
        return x[sequence, :, position] if x.dim() == 4 else x[sequence, position]

    def places(self) -> tuple[Tensor, Tensor]:
        """Where `take` takes the rows from, made once.

        Returns:
            sequence and position, int64 [N] each; a padding row's position is 0.
        """

        def make() -> tuple[Tensor, Tensor]:
            return self.sequence.long(), self.position.clamp(min=0).long()

        return kept(self, (), "places", make)


def pack_bits(allowed: Tensor) -> Tensor:
    """bool [G, S] -> int32 [G, ceil(S / 32)]: key j is bit j % 32 of element j // 32."""
    sets, keys = allowed.shape
    width = -(-keys // BITS)
    bits = torch.nn.functional.pad(allowed.contiguous(), (0, width * BITS - keys))
    # byte by byte: as integers of 32 bits, a boolean would take eight bytes meanwhile
    bits = bits.view(torch.uint8).view(sets, width, BITS // BYTE, BYTE)
    shifts = torch.arange(BYTE, dtype=torch.uint8, device=allowed.device)
    packed = (bits << shifts).sum(-1, dtype=torch.uint8)  # [G, ceil(S / 32), 4]
    return packed.view(torch.int32).squeeze(-1)


def unpack_bits(bits: Tensor, keys: int) -> Tensor:
    """int32 [..., ceil(keys / 32)] -> bool [..., keys]; the inverse of `pack_bits`."""
    shifts = torch.arange(BITS, dtype=torch.int32, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :keys].bool()


@dataclass(frozen=True)
class KeySets(_Tensors):
    """G bit sets over the S keys of a sequence, and which of them restricts each row.

    Build with `from_bool` or `regions`; the packing is private.

    Args:
        bits: int32 [G, ceil(S / 32)], 32 keys to an element.
        index: int32 [N] from row to set; -1 leaves the row unrestricted.
        keys: S.
    """

    bits: Tensor
    index: Tensor
    keys: int

    def __post_init__(self) -> None:
        sizes = {"W": -(-self.keys // BITS)}
        checks.tensor("allowed.bits", self.bits, "G W", sizes, dtype=torch.int32)
        checks.tensor("index", self.index, "N", sizes, dtype=torch.int32, device=self.bits.device)
        if self.index.numel() and checks.values_visible(self.index):
            low, high = int(self.index.min()), int(self.index.max())
            wanted = f"values in [-1, {sizes['G']})"
            checks.require(low >= -1 and high < sizes["G"], "index", wanted, f"[{low}, {high}]")

    @classmethod
    def from_bool(cls, allowed: Tensor, index: Tensor) -> KeySets:
        """Pack sets given as booleans.

        Args:
            allowed: bool [G, S], the keys in each set.
            index: int32 [N] from row to set (-1: unrestricted).

        Returns:
            KeySets on `allowed`'s device.

        Raises:
            TypeError: tensors of other dtypes.
            ValueError: other shapes or devices; on CPU also an index outside [-1, G).
        """
        checks.tensor("allowed", allowed, "G S", {}, dtype=torch.bool)
        return cls(pack_bits(allowed), index, allowed.shape[1])

    @classmethod
    def regions(cls, visual: Tensor, inside: Tensor, sequence: Tensor, index: Tensor) -> KeySets:
        """Sets of "not visual, or inside the region" (Omega of (S1)).

        Args:
            visual: bool [B, S], the visual tokens of each sequence.
            inside: bool [G, S], the tokens inside each region.
            sequence: integers [G], the sequence each region belongs to.
            index: int32 [N] from row to region (-1: unrestricted). A region of the row's own
                sequence: this is not checked.

        Returns:
            KeySets of G sets.

        Raises:
            TypeError: `visual` or `inside` is not bool.
            ValueError: mismatched shapes or devices.
        """
        sizes: dict[str, int] = {}
        checks.tensor("visual", visual, "B S", sizes, dtype=torch.bool)
        checks.tensor("inside", inside, "G S", sizes, dtype=torch.bool, device=visual.device)
        checks.tensor("sequence", sequence, "G", sizes, device=visual.device)
        return cls.from_bool(~visual[sequence.long()] | inside, index)

    @classmethod
    def all_but(cls, left_out: Tensor, keys: int) -> KeySets:
        """Sets of every key but one, a set for each row.

        Args:
            left_out: int32 [N], the key that each row may not use.
            keys: S.

        Returns:
            KeySets of N sets; made as bits, so that no [N, S] is.

        Raises:
            TypeError: `left_out` is not int32.
        """
        checks.tensor("left_out", left_out, "N", {}, dtype=torch.int32)
        at, rows = left_out.clamp(min=0, max=max(0, keys - 1)), len(left_out)
        bits = left_out.new_full((rows, -(-keys // BITS)), -1)
        if keys % BITS:
            bits[:, -1] = 2 ** (keys % BITS) - 1
        word, bit = (at // BITS).long()[:, None], torch.ones_like(at) << (at % BITS)
        bits = bits.scatter(1, word, bits.gather(1, word) & ~bit[:, None])
        return cls(bits, torch.arange(rows, dtype=torch.int32, device=at.device), keys)

    def to_bool(self) -> Tensor:
        """Unpack the sets.

        Returns:
            bool [G, S].
        """
        return unpack_bits(self.bits, self.keys)


@dataclass(frozen=True)
class LabelBags(_Tensors):
    """The label ids of G images, and each row's image.

    Args:
        ids: int64 [T]; ids beyond `offsets[-1]` are spare (ragged bags can be built without a
            sync).
        offsets: int64 [G + 1], ascending: image g owns `ids[offsets[g]:offsets[g + 1]]`.
        index: int64 [N] from row to image; -1: the row has no bag.
    """

    ids: Tensor
    offsets: Tensor
    index: Tensor

    def __post_init__(self) -> None:
        for f in fields(self):
            checks.tensor(
                f"bags.{f.name}",
                getattr(self, f.name),
                f.name,
                {},
                dtype=torch.int64,
                device=self.ids.device,
            )
        images = self.offsets.shape[0] - 1
        checks.require(images >= 0, "bags.offsets", "at least one offset", "none")
        if not checks.values_visible(self.ids, self.offsets, self.index):
            return
        last = int(self.offsets[-1])
        ascending = int(self.offsets[0]) == 0 and not bool((self.offsets.diff() < 0).any())
        checks.require(
            ascending and last <= len(self.ids),
            "bags.offsets",
            f"offsets ascending from 0 to at most {len(self.ids)} (the number of ids)",
            self.offsets.tolist(),
        )
        if self.index.numel():
            low, high = int(self.index.min()), int(self.index.max())
            wanted = f"values in [-1, {images})"
            checks.require(low >= -1 and high < images, "bags.index", wanted, f"[{low}, {high}]")


@dataclass(frozen=True)
class SoftTargets(_Tensors):
    """Several labels a row, each with its probability, in place of one target.

    Args:
        ids: int64 [..., K], in any order; one that is listed twice counts with the sum. An id equal
            to the call's `ignore_index` is padding; a row of nothing else is ignored.
        probabilities: fp32 (fp64) [..., K], >= 0; they need not sum to 1. No gradient.
        label: int64 [...], the id whose log-probability is returned, also if it is not listed;
            None: each row's likeliest.
    """

    ids: Tensor
    probabilities: Tensor
    label: Tensor | None = None

    def __post_init__(self) -> None:
        floats = (torch.float32, torch.float64)
        for f, dtype in (("ids", torch.int64), ("probabilities", floats)):
            x, device = getattr(self, f), self.ids.device
            checks.tensor(f"target.{f}", x.flatten(), f, {}, dtype=dtype, device=device)
        wanted = f"the ids' shape {list(self.ids.shape)}, [..., K]"
        got = list(self.probabilities.shape)
        same = self.ids.dim() > 0 and self.ids.shape == self.probabilities.shape
        checks.require(same, "target.probabilities", wanted, got)
        if self.label is not None:
            flat, device = self.label.flatten(), self.ids.device
            checks.tensor("target.label", flat, "N", {}, dtype=torch.int64, device=device)
            rows, got = self.ids.shape[:-1], list(self.label.shape)
            checks.require(self.label.shape == rows, "target.label", f"shape {list(rows)}", got)
        if self.probabilities.requires_grad:
            wanted = "a tensor without gradient, such as its detach()"
            checks.fail("target.probabilities", wanted, "one that requires it")
        if self.probabilities.numel() and checks.values_visible(self.probabilities):
            low = float(self.probabilities.min())
            checks.require(low >= 0, "target.probabilities", "values >= 0", low)


class Selection(NamedTuple):
    """Rows, key sets and key columns as the plain tensors that ops take and kernels read."""

    sequence: Tensor  # int32 [N], ascending
    start: Tensor  # int32 [N], the first visible key
    stop: Tensor  # int32 [N], one past the last visible key
    bits: Tensor | None  # int32 [G, ceil(S / 32)]
    set_index: Tensor | None  # int32 [N], -1: unrestricted; None without bits
    columns: Tensor | None  # int32 [B, C], padded with -1; None: all keys

    @classmethod
    def of(
        cls, rows: QueryRows, allowed: KeySets | None, columns: Tensor | None = None
    ) -> Selection:
        bits, index = (None, None) if allowed is None else (allowed.bits, allowed.index)
        return cls(rows.sequence, rows.start, rows.stop, bits, index, columns)

    def contiguous(self) -> Selection:
        return Selection._make(None if x is None else x.contiguous() for x in self)

    def visible(self, rows: slice, keys: int) -> Tensor:
        """bool [n, keys]: the keys that each of `rows` sees."""
        j = torch.arange(keys, device=self.start.device)
        return (j >= self.start[rows, None]) & (j < self.stop[rows, None])

    def allowed(self, rows: slice, keys: int) -> Tensor:
        """bool [n, keys]: the keys that each of `rows` sees and that are in its set."""
        visible = self.visible(rows, keys)
        if self.bits is None or len(self.bits) == 0:
            return visible
        assert self.set_index is not None
        index = self.set_index[rows]
        member = unpack_bits(self.bits[index.clamp(min=0).long()], keys)
        return visible & (member | (index < 0)[:, None])

    def own_columns(self) -> Tensor:
        """bool [N, C]: the columns that are keys a row may use."""
        assert self.columns is not None
        at = self.columns[self.sequence.long()]  # [N, C]
        own = (at >= 0) & (at >= self.start[:, None]) & (at < self.stop[:, None])
        if self.bits is None or self.bits.numel() == 0:
            return own
        assert self.set_index is not None
        at = at.clamp(min=0).long()
        words = self.bits[self.set_index.clamp(min=0).long()[:, None], at // BITS]  # [N, C]
        member = (words >> (at % BITS).int()) & 1
        return own & ((member > 0) | (self.set_index < 0)[:, None])


def check_selection(
    rows: QueryRows, allowed: KeySets | None, sizes: dict[str, int], device: torch.device
) -> None:
    """Hold rows and key sets to the sizes (N, B, S, Hq, Hkv) that q and k have bound."""
    heads, kv_heads = sizes["Hq"], sizes["Hkv"]
    if kv_heads == 0 or heads % kv_heads:
        checks.fail("k", f"a number of KV heads that divides q's {heads} heads", kv_heads)
    checks.tensor("rows.sequence", rows.sequence, "N", sizes, device=device)
    if len(rows) and checks.values_visible(rows.sequence, rows.stop):
        last, stop = int(rows.sequence[-1]), int(rows.stop.max())
        checks.require(
            last < sizes["B"], "rows.sequence", f"values < {sizes['B']} (k's batch)", last
        )
        checks.require(stop <= sizes["S"], "rows.stop", f"values <= {sizes['S']} (k's keys)", stop)
    if allowed is not None:
        checks.tensor("allowed.index", allowed.index, "N", sizes, device=device)
        if allowed.keys != sizes["S"]:
            checks.fail("allowed", f"sets over S={sizes['S']} keys", f"{allowed.keys} keys")
