"""The calls that are measured, of realistic size, by name, with their floors."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

import groundkern as gk
from benchmarks.costs import floors
from groundkern.ops.cases import Call, integers

ISSUE_5 = "issue-5"
QUICK = "quick"


@dataclass(frozen=True)
class Model:
    """Sizes of a model: hidden size, query heads, KV heads, head dimension, vocabulary."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int


MODELS = {
    "qwen2.5-vl-3b": Model(2048, 16, 2, 128, 151_936),
    "qwen2.5-vl-7b": Model(3584, 28, 4, 128, 152_064),
    "qwen3-vl-2b": Model(2048, 16, 8, 128, 151_936),
    "qwen3-vl-8b": Model(4096, 32, 8, 128, 151_936),
    "llava-1.5-7b": Model(4096, 32, 32, 128, 32_064),
}
ISSUE_5_MODEL = Model(1024, 16, 4, 128, 32_768)
TINY = Model(32, 4, 2, 16, 96)
SHAPES = (QUICK, ISSUE_5, *MODELS)
Mode = Literal["forward", "backward", "full"]
SWEEPS = {
    "keys": (1024, 2048, 4096, 8192, 16384),
    "rows": (16, 32, 64, 128, 256),
    "columns": (256, 512, 1024, 2048, 4096),
    "vocabulary": (8192, 16384, 32768, 65536, 131072),
}
OPS = ("side_attention", "attention_map", "linear_cross_entropy")


@dataclass(frozen=True)
class Problem:
    """One call to measure.

    op: the op's name. name: of the case. shape: its sizes as text. make: builds the call. count:
    the work of "forward" or "full". whole: also run the [S, S] eager path, which is slow and large.
    keys, rows, columns, vocabulary: S, N, C and V, 0 if it has none. swept: the size that a
    sweep lets grow.
    """

    op: str
    name: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.device], Call]
    count: Callable[[floors.Mode], floors.Floor]
    whole: bool = False
    keys: int = 0
    rows: int = 0
    columns: int = 0
    vocabulary: int = 0
    swept: str = ""

    @property
    def key(self) -> str:
        return f"{self.name}/{str(self.dtype).removeprefix('torch.')}"

    def floor(self, mode: Mode) -> floors.Floor:
        """The least work of a mode; "backward" is what "full" adds to "forward"."""
        if mode != "backward":
            return self.count(mode)
        forward, full = self.count("forward"), self.count("full")
        return floors.Floor(full.bytes - forward.bytes, full.gemms[len(forward.gemms) :])


def randn(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Seeded normal numbers, drawn on the device because a head is gigabytes."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def _rows(n: int, keys: int, device: torch.device) -> gk.QueryRows:
    """The last n positions of one sequence, which are the answer's."""
    position = torch.arange(keys - n, keys, dtype=torch.int32, device=device)
    return gk.QueryRows.causal(torch.zeros_like(position), position)


def _visual(keys: int, count: int) -> slice:
    """The visual tokens: side by side, after a short system prompt."""
    first = min(16, keys - count)
    return slice(first, first + count)


def _sizes(
    model: Model, dtype: torch.dtype, rows: int, keys: int, **sizes: int
) -> floors.AttentionSizes:
    """The sizes of a problem's floor; `used` and, for maps, `columns` as in AttentionSizes."""
    return floors.AttentionSizes(
        rows=rows,
        heads=model.heads,
        kv_heads=model.kv_heads,
        dim=model.dim,
        value_dim=model.dim,
        keys=keys,
        itemsize=dtype.itemsize,
        **sizes,
    )


def side_attention(
    model: Model,
    dtype: torch.dtype,
    *,
    shape: str,
    rows: int = 64,
    keys: int = 4096,
    visual: int | None = None,
    regions: int = 8,
    patches: int = 16,
    whole: bool = False,
) -> Problem:
    """SMAM: each row uses the text and the patches of its region; three quarters of the keys are
    visual."""
    visual = (3000 * keys) // 4096 if visual is None else visual
    regions, patches = min(regions, rows), min(patches, visual // min(regions, rows))
    seen = _visual(keys, visual)

    def make(device: torch.device) -> Call:
        inside = torch.zeros(regions, keys, dtype=torch.bool, device=device)
        for g in range(regions):
            first = seen.start + g * (visual // regions)
            inside[g, first : first + patches] = True
        is_visual = torch.zeros(1, keys, dtype=torch.bool, device=device)
        is_visual[0, seen] = True
        index = (torch.arange(rows, device=device) * regions // rows).to(torch.int32)
        zeros = torch.zeros(regions, dtype=torch.int32, device=device)
        sets = gk.KeySets.regions(is_visual, inside, zeros, index)
        h, g, d = model.heads, model.kv_heads, model.dim
        inputs = {
            "q": randn(1, rows, h, d, dtype=dtype, device=device),
            "k": randn(2, 1, g, keys, d, dtype=dtype, device=device),
            "v": randn(3, 1, g, keys, d, dtype=dtype, device=device),
        }
        # SMAM and the baselines use the output alone, so `lse` gets no gradient here.
        return Call(gk.side_attention, inputs, {"rows": _rows(rows, keys, device), "allowed": sets})

    sizes = _sizes(model, dtype, rows, keys, used=keys - visual + regions * patches)
    sizes_text = (
        f"{rows} rows, {sizes.used} of {keys} keys used, "
        f"{model.heads}/{model.kv_heads} heads, dim {model.dim}"
    )
    count = lambda mode: floors.side_attention(sizes, mode)  # noqa: E731
    name = f"{shape}/side_attention" + ("_whole" if whole else f"/S{keys}xN{rows}")
    return Problem("side_attention", name, sizes_text, dtype, make, count, whole, keys, rows)


def attention_map(
    model: Model,
    dtype: torch.dtype,
    *,
    shape: str,
    function: Callable = gk.attention_kl,
    over: str = "visible",
    heads: str = "mean",
    rows: int = 32,
    keys: int = 4096,
    columns: int | None = None,
) -> Problem:
    """A map, or KLAL's KL, on the visual columns; every row uses every column."""
    columns = keys // 2 if columns is None else columns
    seen = _visual(keys, columns)
    is_kl, is_contribution = function is gk.attention_kl, function is gk.attention_contribution

    def make(device: torch.device) -> Call:
        h, g, d = model.heads, model.kv_heads, model.dim
        inputs = {
            "q": randn(1, rows, h, d, dtype=dtype, device=device),
            "k": randn(2, 1, g, keys, d, dtype=dtype, device=device),
        }
        fixed: tuple[str, ...] = ()
        if is_contribution:
            inputs["v"] = randn(3, 1, g, keys, d, dtype=dtype, device=device)
            inputs["g"] = randn(4, rows, h, d, dtype=dtype, device=device)
        if is_kl:
            target = randn(5, rows, columns, dtype=torch.float32, device=device).square()
            inputs["target"], fixed = target, ("target",)
        listed = integers([list(range(seen.start, seen.stop))], device)
        options = {"rows": _rows(rows, keys, device), "columns": listed, "over": over}
        if is_kl:
            options["heads"] = heads
        return Call(function, inputs, options, fixed)

    used = keys if over == "visible" else columns
    sizes = _sizes(model, dtype, rows, keys, used=used, columns=columns)
    sizes_text = (
        f"{rows} rows, {columns} columns of {keys} keys, over {over}, "
        f"{model.heads}/{model.kv_heads} heads, dim {model.dim}"
    )
    count = lambda mode: floors.attention_map(  # noqa: E731
        sizes, mode, per_row=is_kl, contribution=is_contribution
    )
    label = function.__name__ + (f"_{heads}" if is_kl and heads != "mean" else "")
    name = f"{shape}/{label}_{over}/S{keys}xN{rows}xC{columns}"
    sizes_of = {"keys": keys, "rows": rows, "columns": columns}
    return Problem("attention_map", name, sizes_text, dtype, make, count, **sizes_of)


def linear_cross_entropy(
    model: Model,
    dtype: torch.dtype,
    *,
    shape: str,
    rows: int = 512,
    counted: int | None = None,
    trained: bool = True,
    smoothing: float = 0.0,
) -> Problem:
    """The text loss, or DV-SFT's loss on a few labelled rows, smoothed over the image's labels."""
    counted = rows if counted is None else counted
    d, v = model.hidden, model.vocabulary

    def make(device: torch.device) -> Call:
        generator = torch.Generator().manual_seed(6)
        chosen = torch.randperm(rows, generator=generator)[:counted].sort().values
        target = torch.full((rows,), -100)
        target[chosen] = torch.randint(v, (counted,), generator=generator)
        inputs = {
            "hidden": randn(1, rows, d, dtype=dtype, device=device),
            "weight": randn(2, v, d, dtype=dtype, device=device).mul_(d**-0.5),
        }
        options: dict[str, object] = {"target": target.to(device)}
        if smoothing:
            labels = target[chosen].unique().to(device)
            bag = torch.zeros(rows, dtype=torch.int64, device=device)
            offsets = integers([0, len(labels)], device, torch.int64)
            options |= {"bags": gk.LabelBags(labels, offsets, bag), "smoothing": smoothing}
        fixed = () if trained else ("weight",)
        return Call(gk.linear_cross_entropy, inputs, options, fixed)

    def count(mode: floors.Mode) -> floors.Floor:
        return floors.linear_cross_entropy(
            rows=rows,
            counted=counted,
            dim=d,
            vocabulary=v,
            itemsize=dtype.itemsize,
            mode=mode,
            trained=trained,
        )

    labelled = "" if counted == rows else f"{counted} of "
    smooth = f", smoothing {smoothing}" if smoothing else ""
    head = "trained" if trained else "frozen"
    sizes_text = f"{labelled}{rows} rows x {d} x {v}, {head} head{smooth}"
    name = f"{shape}/linear_cross_entropy_{head}{'_smoothed' if smoothing else ''}/N{rows}xV{v}"
    sizes = {"rows": rows, "vocabulary": v}
    return Problem("linear_cross_entropy", name, sizes_text, dtype, make, count, **sizes)


def _issue_5(dtype: torch.dtype) -> Iterable[Problem]:
    """The cases of the README's table."""
    m = ISSUE_5_MODEL
    yield side_attention(m, dtype, shape=ISSUE_5)
    for over in ("visible", "columns"):
        yield attention_map(m, dtype, shape=ISSUE_5, over=over)
    yield linear_cross_entropy(
        m, dtype, shape=ISSUE_5, rows=4096, counted=205, trained=False, smoothing=0.3
    )
    for trained in (True, False):
        yield linear_cross_entropy(m, dtype, shape=ISSUE_5, trained=trained)
    yield side_attention(m, dtype, shape=ISSUE_5, whole=True)


def _quick(dtype: torch.dtype) -> Iterable[Problem]:
    """Every op and kind at a size that takes milliseconds."""
    yield side_attention(TINY, dtype, shape=QUICK, rows=4, keys=64, visual=40, regions=2, patches=4)
    yield side_attention(
        TINY, dtype, shape=QUICK, rows=4, keys=64, visual=40, regions=2, patches=4, whole=True
    )
    for over in ("visible", "columns"):
        for function in (gk.attention_map, gk.attention_contribution, gk.attention_kl):
            yield attention_map(
                TINY, dtype, shape=QUICK, function=function, over=over, rows=4, keys=64
            )
        yield attention_map(TINY, dtype, shape=QUICK, over=over, heads="each", rows=4, keys=64)
    yield linear_cross_entropy(TINY, dtype, shape=QUICK, rows=12)
    yield linear_cross_entropy(TINY, dtype, shape=QUICK, rows=12, trained=False)
    yield linear_cross_entropy(TINY, dtype, shape=QUICK, rows=12, counted=5, smoothing=0.3)


def _model(shape: str, dtype: torch.dtype, keys: list[int], rows: list[int]) -> Iterable[Problem]:
    m = MODELS[shape]
    for s, n in product(keys or [4096], rows or [64]):
        yield side_attention(m, dtype, shape=shape, keys=s, rows=n)
    for s, n in product(keys or [4096], rows or [32]):
        for over in ("visible", "columns"):
            yield attention_map(m, dtype, shape=shape, over=over, keys=s, rows=n)
        yield attention_map(m, dtype, shape=shape, heads="each", keys=s, rows=n)
    for trained in (True, False):
        yield linear_cross_entropy(m, dtype, shape=shape, rows=2048, trained=trained)
    yield linear_cross_entropy(
        m, dtype, shape=shape, rows=2048, counted=137, trained=False, smoothing=0.3
    )


def _sweep(
    along: str, shape: str, dtype: torch.dtype, keys: list[int], rows: list[int]
) -> Iterable[Problem]:
    """One case per op that has the size `along`, which grows while all others stay."""
    m = {QUICK: TINY, ISSUE_5: ISSUE_5_MODEL, **MODELS}[shape]
    given = {"keys": keys, "rows": rows}
    fixed = {"keys": [4096], "rows": [64], "columns": [1024], "vocabulary": [m.vocabulary]}
    values = fixed | {n: x[:1] for n, x in given.items() if x}
    values[along] = given.get(along) or SWEEPS[along]
    for s, n, c, v in product(*(values[x] for x in SWEEPS)):
        some: list[Problem] = []
        if along in ("keys", "rows"):
            some.append(side_attention(m, dtype, shape=shape, keys=s, rows=n))
        if along != "vocabulary":
            sizes = {"keys": s, "rows": n, "columns": min(c, s)}
            some.append(attention_map(m, dtype, shape=shape, **sizes))
        if along in ("rows", "vocabulary"):
            head = replace(m, vocabulary=v)
            some.append(linear_cross_entropy(head, dtype, shape=shape, rows=n))
        yield from (replace(p, swept=along) for p in some)


def problems(
    *,
    shapes: list[str],
    ops: list[str],
    dtypes: list[torch.dtype],
    keys: list[int],
    rows: list[int],
    sweep: Sequence[str] = (),
) -> list[Problem]:
    """Every problem of the chosen shapes, ops and dtypes.

    Cases of different dtypes stand together and the [S, S] path comes last, so that a deadline cuts
    whole cases.

    Args:
        keys, rows: of the shapes that are models, and of sweeps.
        sweep: sizes, keys of SWEEPS, that grow one after another, instead of the shapes' cases.
    """
    found = []
    for along, shape, dtype in product(sweep, shapes, dtypes):
        found += [p for p in _sweep(along, shape, dtype, keys, rows) if p.op in ops]
    for shape, dtype in product(() if sweep else shapes, dtypes):
        match shape:
            case "quick":
                some = _quick(dtype)
            case "issue-5":
                some = _issue_5(dtype)
            case _:
                some = _model(shape, dtype, keys, rows)
        found += [p for p in some if p.op in ops]
    names = list(dict.fromkeys(p.name for p in found))
    return sorted(found, key=lambda p: (p.whole, names.index(p.name)))
