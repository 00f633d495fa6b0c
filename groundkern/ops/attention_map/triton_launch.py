"""Tiles, plan, grids and launches of the Triton kernels of attention maps, contributions and their
KL."""

import torch
from torch import Tensor

from groundkern import plan_kernels, tiles
from groundkern.attention_kernels import merge_counters
from groundkern.calls import Call
from groundkern.kept import kept
from groundkern.map_kernels import Maps
from groundkern.op_body import empty_like, zeros_like
from groundkern.ops.attention_map import (
    CONTRIBUTION,
    KL_EACH,
    KL_MEAN,
    NO_MAP_PLAN,
    Gradients,
    Inputs,
    MapPlan,
    Options,
    Outputs,
    Saved,
    Upstream,
    like_gradients,
    output_shape,
)
from groundkern.ops.attention_map import triton_kernels as kernels
from groundkern.selection import KeySets, QueryRows, Selection
from groundkern.tile_kernels import Heads, Keys
from groundkern.tiles import Launcher, Scratch, Tile

# (4-byte operands, largest sum of head dimensions: of q and of values; with a softcap of q twice,
# and with either at least 256; one less where 16 does not divide them and loads are of 16 bits) ->
# tile of all kernels of this op. 4 warps on 64 lanes: of 8, each half computes all scores again for
# the second product. Every row is an untuned first guess: compiled by `make aot`, never timed on a
# device. `make gpu` finds better ones.
TILES = {  # of Hopper and the Blackwell of data centres
    (False, 63): Tile(16, 64, 8, 4, 255),
    (False, 64): Tile(64, 64, 4, 4, 255),
    (False, 127): Tile(16, 64, 8, 4, 255),
    (False, 128): Tile(64, 64, 4, 4, 255),
    (False, 255): Tile(16, 32, 8, 4, 255),
    (False, 256): Tile(64, 32, 4, 4, 255),
    (False, 511): Tile(16, 32, 8, 4, 255),
    (False, 512): Tile(16, 64, 8, 4, 255),
    (True, 64): Tile(16, 32, 4),
    (True, 128): Tile(16, 32, 8),
    (True, 512): Tile(16, 32, 8, 1),
}
SMALL_TILES = {  # of other devices (`tiles.small`)
    (False, 255): Tile(16, 32, 8, 4, 255),
    (False, 512): Tile(16, 32, 8, 4, 168),
    (True, 64): Tile(16, 32, 4),
    (True, 128): Tile(16, 32, 8),
    (True, 512): Tile(16, 32, 8, 1),
}
# Four warps of 64 lanes have 512 registers a lane, eight have 256 and spill at widths from 256 on.
AMD_TILES = SMALL_TILES | {(False, 512): Tile(16, 32, 4)}
# At most, where a loop loads more than keys: rows, or values too. Of two operands two copies are in
# flight at the wait, as of keys alone with a stage more.
SEVERAL_STAGES = 3


def unsupported(inputs: Inputs) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None if it can."""
    return tiles.unsupported(inputs.q, inputs.k, inputs.v)


def _tile(inputs: Inputs, options: Options) -> Tile:
    """The row of the table that serves a call."""
    q, k, v = inputs[:3]
    # Sums of both widths are held at a time, and with a softcap slopes of scores. As plain numbers:
    # torch.compile would reason for minutes about powers of two of symbolic ones.
    held = [x.shape[-1] for x in (q, v, q if options.softcap else None) if x is not None]
    odd = any(dim % 16 != 0 for dim in held)
    least = 256 if options.softcap or v is not None else 0
    dims = [max(tiles.width(sum(map(tiles.width, held))), least) - odd]
    packed = q.shape[0] * (q.shape[1] // k.shape[1])
    table = AMD_TILES if tiles.amd() else SMALL_TILES if tiles.small(q.device) else TILES
    return table[tiles.tile_key(table, (q.dtype == torch.float32,), dims, packed)]


def plan(
    inputs: Inputs, rows: QueryRows, allowed: KeySets | None, columns: Tensor, options: Options
) -> MapPlan:
    """The row tiles of a call, the key tiles that they read, and the target on own columns."""
    q, k = inputs[:2]
    if 0 in (len(rows), q.shape[1], *k.shape[:3], columns.shape[1]):
        return NO_MAP_PLAN
    tile, group = _tile(inputs, options), q.shape[1] // k.shape[1]
    lanes = min(1 << (group - 1).bit_length(), tile.block_m)
    sizes = {"lanes": lanes, "batch": k.shape[0], "keys": k.shape[2], "wide": tile.block_n}
    sizes |= {"block_m": tile.block_m, "block_n": tile.block_n}
    selection, names = Selection.of(rows, allowed, columns), tuple(sizes.values())
    found = kept(
        rows, (allowed, columns), ("map", *names), lambda: plan_kernels.plan(selection, **sizes)
    )
    visible = (None, None)
    if options.over == "visible" and not options.lse_grad:
        every = Selection.of(rows, None)
        of = kept(rows, (), ("visible", *names), lambda: plan_kernels.plan(every, **sizes))
        visible = (of.tiles, of.row_spans)
    target = (None, None)
    if inputs.target is not None:
        of_target = (allowed, columns, inputs.target)
        target = kept(
            rows, of_target, "target", lambda: _target(inputs.target, selection.own_columns())
        )
    return MapPlan(*found[:5], *visible, *target, lanes)


def _target(target: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """P [N, C] fp32, renormalised over own columns, and its sums [N], 1 or 0."""
    mass = torch.where(own, target.float(), 0.0)
    total = mass.sum(-1, keepdim=True)
    target = (mass / torch.where(total > 0, total, 1.0)).contiguous()
    return target, target.sum(-1)


def _at_once(tile: Tile) -> int:
    """How many key tiles `_map_kernel` reads at once. With 64 lanes it has two warp groups, which
    divide the keys of a product: each is to have 32, or wgmma waits for its other operand."""
    return 2 if tile.block_m == 64 and tile.block_n == 32 else 1


class _Launch:
    """What the kernels are launched with in calls that are alike (`tiles.prepared`).

    Args:
        call: one of them.
        inputs: rows contiguous.
    """

    def __init__(self, call: Call, inputs: Inputs) -> None:
        q, k, v, g = inputs[:4]
        plan, options = call.plan, call.options
        self.launcher, tile = Launcher(), _tile(inputs, options)
        self.adding = Launcher(), self.launcher  # of dk that is made, and added to
        self.of_p = Launcher()
        (self.rows, heads, dim), (batch, kv_heads, self.keys, _) = q.shape, k.shape
        group, self.columns = heads // kv_heads, call.selection.columns.shape[1]
        parts = -(-group // plan.lanes)  # of a KV head's query heads, `lanes` at a time
        self.device, self.heads, self.virtual_heads = q.device, heads, kv_heads * parts
        self.kind, self.lse_grad, self.whole = options.kind, options.lse_grad, call.whole
        # Whether the normaliser is over all visible keys, and whether its gradient reaches them.
        self.visible = options.over == "visible"
        self.reached = self.visible and not options.lse_grad
        self.strides = q.stride()[:2], k.stride()[:3]
        self.valued = None if v is None else (g.stride()[:2], v.stride()[:3])
        sizes = (heads, group, plan.lanes, parts, self.columns)
        self.numbers = (options.scale, options.softcap or None, *sizes)
        dims = {"D": dim, "DV": dim if v is None else v.shape[3]}
        flags = {"LANES": plan.lanes, "KIND": options.kind, "RECTIFY": options.rectify}
        constants = dims | flags | tile.constants
        self.norm_constants = {"D": dim, "VISIBLE": self.visible} | tile.constants
        several = {"num_stages": tiles.at_most_stages(min(tile.stages, SEVERAL_STAGES))}
        of_keys = several if options.kind == CONTRIBUTION else {}
        # There is no second product in it, and with 4 warps it spills.
        alone = tile.block_m == 16 and options.kind != CONTRIBUTION  # loads keys and nothing else
        of_map = ({} if alone else several) | ({"num_warps": 8} if tile.block_m == 64 else {})
        at_once = _at_once(tile)
        self.map_constants = constants | of_map | {"TILES": at_once}
        self.sums_constants = constants | of_keys
        self.dq_constants = constants | {"VISIBLE": self.reached} | of_keys
        self.dkv_constants = constants | {"VISIBLE": self.reached} | several
        row_tiles, key_tiles = plan.tiles.shape[0], -(-self.keys // tile.block_n)
        self.wide_grid = (batch * key_tiles, kv_heads)

        def splits(programs: int, most: int) -> int:
            return tiles.splits(q.device, programs, most)

        own, of_heads = min(key_tiles, self.columns), row_tiles * self.virtual_heads
        self.map_grid = (row_tiles, splits(row_tiles, -(-own // at_once)))
        # (row tiles, virtual heads, splits) over own columns and, if True, over all visible keys
        self.grids = {
            visible: (row_tiles, self.virtual_heads, splits(of_heads, most))
            for visible, most in ((False, own), (True, key_tiles))
        }

    def operands(self, inputs: Inputs) -> tuple:
        """q, k, g and v as `Maps` has them."""
        q, k, v, g, *_ = inputs
        (of_q, of_k), valued = self.strides, (None, None)
        if v is not None:
            valued = Heads(g, *self.valued[0]), Keys(v, *self.valued[1])
        return Heads(q, *of_q), Keys(k, *of_k), *valued

    def maps(
        self, call: Call, operands: tuple, *others: Tensor | None, visible: bool = False
    ) -> Maps:
        """What kernels read.

        Args:
            call: one that is launched like this.
            operands: as above.
            others: norm, weight, target, made, upstream and dnorm.
            visible: over the key tiles of all visible keys, and not of own columns.
        """
        plan = call.plan
        tiles_of = (plan.visible_tiles, None) if visible else (plan.tiles, plan.key_tiles)
        return Maps(*operands, call.selection, *tiles_of, plan.place, *others, *self.numbers)

    def parts(
        self, call: Call, name: str, grid: tuple[int, ...], counters: int, *shapes: tuple | None
    ) -> tuple:
        """What the splits of a launch leave of each shape, nothing if there is one, and the
        counters of their merge."""
        splits = grid[-1] if grid[-1] > 1 else 0

        def make() -> tuple:
            kept = {"dtype": torch.float32, "device": self.device}
            found = [None if x is None else torch.empty((splits, *x), **kept) for x in shapes]
            return *found, tiles.arrival_counters(self.device, counters)

        return call.once("scratch", Scratch)(name, self.device, make)

    def norm(self, call: Call, inputs: Inputs, of_p: Tensor | None = None) -> Tensor:
        """[N, Hq]: log-sum-exp over all visible keys or over own columns; 0 if there are none.

        Args:
            of_p: a normaliser [N, Hq]: of the log p that it leaves, the log of the sum of p.
        """
        grid, shape = self.grids[self.visible], (self.rows, self.heads)
        operands = (*self.operands(inputs)[:2], None, None)  # one variant for all kinds
        x = self.maps(call, operands, of_p, *[None] * 5, visible=self.visible)
        norm = inputs.q.new_empty(shape, dtype=torch.float32)
        part, counters = self.parts(call, "norm", grid, grid[0] * grid[1], shape)
        arguments = (x, part, norm, counters, self.rows, self.keys)
        launcher = self.launcher if of_p is None else self.of_p
        launcher(kernels._norm_kernel, grid, arguments, self.norm_constants)
        return norm

    def map(self, call: Call, inputs: Inputs, norm: Tensor, target: Tensor | None) -> tuple:
        """[N, C] the map, the contributions, or for KL_MEAN log P - log M of own columns; and then
        the KL [N]."""
        q, mean, grid = inputs.q, self.kind == KL_MEAN, self.map_grid
        # Of log P - log M nothing is read but what is own.
        new = q.new_empty if mean and not self.whole else q.new_zeros
        out = new((self.rows, self.columns), dtype=torch.float32)
        kl = q.new_empty(self.rows, dtype=torch.float32) if mean else None
        shape = (self.rows,) if mean else None
        part, counters = self.parts(call, "map", grid, grid[0], shape)
        weight = inputs.head_weight
        x = self.maps(call, self.operands(inputs), norm, weight, target, None, None, None)
        arguments = (x, out, kl, part, counters, self.rows, self.keys, self.virtual_heads)
        self.launcher(kernels._map_kernel, grid, arguments, self.map_constants)
        return out, kl

    def sums(
        self,
        call: Call,
        inputs: Inputs,
        norm: Tensor,
        target: Tensor | None,
        made: Tensor | None = None,
        upstream: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[N, Hq] sum_c u z and dnorm; KL_EACH: sum_c P (log P - log p), and the KL [N]."""
        q, each, grid = inputs.q, self.kind == KL_EACH, self.grids[False]
        shape = (self.rows, self.heads)
        total = q.new_empty(shape, dtype=torch.float32)
        second = q.new_empty(self.rows if each else shape, dtype=torch.float32)
        part, counters = self.parts(call, "sums", grid, grid[0] * (grid[1] + 1), shape)
        weight, results = inputs.head_weight, (None, second) if each else (second, None)
        x = self.maps(call, self.operands(inputs), norm, weight, target, made, upstream, None)
        arguments = (x, part, total, *results, counters, self.rows, self.keys)
        self.launcher(kernels._sums_kernel, grid, arguments, self.sums_constants)
        return total, second

    def gradients(
        self,
        call: Call,
        inputs: Inputs,
        norm: Tensor,
        target: Tensor | None,
        made: Tensor | None,
        upstream: Tensor,
        dnorm: Tensor,
        dk: Tensor | None = None,
    ) -> Gradients:
        """All but dhead_weight.

        Args:
            dnorm: [N, Hq], the normaliser's gradient.
            dk: to add to; None: it is made.
        """
        q, k, v, g, weight = inputs[:5]
        above = (norm, weight, target, made, upstream, None if self.lse_grad else dnorm)
        x = self.maps(call, self.operands(inputs), *above, visible=self.reached)
        dq, add = empty_like(q), dk is not None
        dk = empty_like(k) if dk is None else dk
        dv, dg = (None, None) if v is None else (empty_like(v), empty_like(g))
        grid = self.grids[self.reached]
        shapes = q.shape, None if g is None else g.shape
        *parts, counters = self.parts(call, "dq", grid, merge_counters(grid), *shapes)
        arguments = (x, *parts, dq, dg, counters, self.rows, self.keys)
        self.launcher(kernels._backward_dq_kernel, grid, arguments, self.dq_constants)
        plan = call.plan
        spans = (None, plan.visible_row_spans) if self.reached else plan[2:4]
        arguments = (x, *spans, dk, dv, self.keys, plan.row_tiles.shape[1])
        constants = self.dkv_constants | {"ADD": add}
        self.adding[add](kernels._backward_dkv_kernel, self.wide_grid, arguments, constants)
        return Gradients(dq, dk, dv, dg, None, dnorm if self.lse_grad else None)


def _launch(inputs: Inputs, call: Call, *, checked: bool = False) -> tuple[_Launch, Inputs]:
    """The launch of a call, and its inputs as kernels read them."""
    return tiles.prepared(call, inputs, 4, _Launch, checked=checked)


def forward(inputs: Inputs, call: Call) -> Outputs:
    """fp32 [N, C], of a KL [N], and what the backward need not make again."""
    if call.plan.tiles is None:
        shape = output_shape(inputs, call.selection.columns, call.options)
        empty = (inputs.q.new_empty(0, dtype=torch.float32) for _ in range(2))
        return Outputs(inputs.q.new_zeros(shape, dtype=torch.float32), *empty)
    (launch, inputs), target = _launch(inputs, call, checked=True), call.plan.own_target
    given = inputs.lse is not None
    norm = inputs.lse if given else launch.norm(call, inputs)
    saved = inputs.q.new_empty(0, dtype=torch.float32) if given else norm
    if launch.kind == KL_EACH:
        sums, kl = launch.sums(call, inputs, norm, target)
        return Outputs(kl, saved, sums)
    out, kl = launch.map(call, inputs, norm, target)
    if kl is None:
        return Outputs(out, saved, out.new_empty(0))
    return Outputs(kl, saved, out)


def backward(
    above: Upstream, inputs: Inputs, saved: Saved, call: Call, dk: Tensor | None = None
) -> Gradients:
    """Contiguous, in the inputs' dtypes and shapes; the same bits on every run.

    Args:
        dk: contiguous, what others found for k, which is added to; None: it is made.
    """
    options, plan = call.options, call.plan
    if plan.tiles is None:
        like = like_gradients(inputs, options)
        zeros = Gradients(*(None if x is None else zeros_like(x) for x in like))
        return zeros if dk is None else zeros._replace(dk=dk)
    launch, inputs = _launch(inputs, call)
    upstream, made = tiles.aligned(above.upstream), tiles.aligned(saved.made)
    norm = tiles.aligned(saved.norm) if inputs.lse is None else inputs.lse
    read = (inputs, norm, plan.own_target, made if launch.kind == KL_MEAN else None, upstream)
    if launch.kind == KL_EACH:
        dweight = upstream[:, None] * made
        dnorm = inputs.head_weight * (upstream * plan.target_sum)[:, None]
        if options.lse_grad:
            dnorm = torch.where(inputs.lse.isinf(), 0.0, dnorm)
    else:
        dweight, dnorm = launch.sums(call, *read)
    if inputs.q.dtype == torch.float32 and not options.lse_grad:
        # p sums to 1 only as far as the normaliser is exact (one of 500 is rounded by 1.5e-5), but
        # the gradient of the scores must sum to 0: what is left over would be multiplied by all
        # that the keys have in common. 16-bit operands round each of its terms by more than that.
        sum_p = torch.exp(launch.norm(call, inputs, norm))
        dnorm = dnorm / sum_p.clamp_min(1e-30)  # where p underflows, nothing
    gradients = launch.gradients(call, *read, dnorm, dk)
    return gradients._replace(dhead_weight=None if launch.kind == CONTRIBUTION else dweight)
