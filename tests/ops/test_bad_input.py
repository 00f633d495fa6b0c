"""Bad input: one clear error that names the argument, what was wanted and what came."""

# ruff: noqa: E501 (a table: one bad call a line)

from dataclasses import replace

import pytest
import torch

from groundkern import KeySets, QueryRows
from groundkern.kept import nothing_kept
from groundkern.ops.attention_map import cases as attention_map_cases
from groundkern.ops.linear_cross_entropy import cases as linear_cross_entropy_cases
from groundkern.ops.linear_kl import cases as linear_kl_cases
from groundkern.ops.side_attention import cases as side_attention_cases
from tests.ops.test_contract import CPU

SIDE = side_attention_cases.CASES["regions"](torch.float32, CPU)
KL = attention_map_cases.CASES["kl_visible_mean_sets_weights"](torch.float32, CPU)
CONTRIBUTION = attention_map_cases.CASES["contribution_visible"](torch.float32, CPU)
LOSS = linear_cross_entropy_cases.CASES["everything"](torch.float32, CPU)
DISTILLED = linear_kl_cases.CASES["everything"](torch.float32, CPU)

_ROWS = SIDE.options["rows"]
_FAR = QueryRows(_ROWS.sequence, _ROWS.position, _ROWS.start, _ROWS.stop + 1)
_THIRD = replace(_ROWS, sequence=_ROWS.sequence + 1)
_COLUMNS = KL.options["columns"]

BAD = {
    "k dim": (SIDE, {"k": torch.zeros(2, 2, 45, 8)}, ValueError, r"`k`: expected shape \[B, Hkv, S, D=16\], got \[2, 2, 45, 8\]"),
    "v keys": (SIDE, {"v": torch.zeros(2, 2, 44, 16)}, ValueError, r"`v`: expected shape \[B=2, Hkv=2, S=45, Dv\]"),
    "kv heads": (SIDE, {"k": torch.zeros(2, 3, 45, 16), "v": torch.zeros(2, 3, 45, 16)}, ValueError, r"`k`: expected a number of KV heads that divides q's 4 heads, got 3"),
    "dtype": (SIDE, {"k": SIDE.inputs["k"].bfloat16()}, TypeError, r"`k`: expected torch.float32, got torch.bfloat16"),
    "integers": (SIDE, {"q": torch.zeros(5, 4, 16, dtype=torch.int64)}, TypeError, r"`q`: expected torch.float32 or"),
    "not a tensor": (SIDE, {"q": [1.0]}, TypeError, r"`q`: expected a tensor \[N, Hq, D\], got list"),
    "row count": (SIDE, {"q": torch.zeros(4, 4, 16)}, ValueError, r"`rows.sequence`: expected shape \[N=4\], got \[5\]"),
    "row past the keys": (SIDE, {"rows": _FAR}, ValueError, r"`rows.stop`: expected values <= 45 \(k's keys\), got 46"),
    "row past the batch": (SIDE, {"rows": _THIRD}, ValueError, r"`rows.sequence`: expected values < 2 \(k's batch\), got 2"),
    "sets of other keys": (SIDE, {"allowed": KeySets.from_bool(torch.zeros(1, 44, dtype=torch.bool), torch.zeros(5, dtype=torch.int32))}, ValueError, r"`allowed`: expected sets over S=45 keys, got 44 keys"),
    "sets of other rows": (SIDE, {"allowed": KeySets.from_bool(torch.zeros(1, 45, dtype=torch.bool), torch.zeros(4, dtype=torch.int32))}, ValueError, r"`allowed.index`: expected shape \[N=5\], got \[4\]"),
    "lse shape": (SIDE, {"lse": torch.zeros(5, 2)}, ValueError, r"`lse`: expected shape \[N=5, Hq=4\]"),
    "lse dtype": (SIDE, {"lse": torch.zeros(5, 4).half()}, TypeError, r"`lse`: expected torch.float32"),
    "scale": (SIDE, {"scale": -1.0}, ValueError, r"`scale`: expected a positive finite number or None, got -1.0"),
    "softcap": (SIDE, {"softcap": float("nan")}, ValueError, r"`softcap`: expected a positive finite number"),
    "backend name": (SIDE, {"backend": "cuda"}, ValueError, r"`backend`: expected 'auto' \| 'reference' \| 'triton' \| 'native', got 'cuda'"),
    "columns past the keys": (KL, {"columns": _COLUMNS + 1}, ValueError, r"`columns`: expected key columns in \[0, 45\) padded with -1, got values in \[0, 45\]"),
    "columns unsorted": (KL, {"columns": _COLUMNS.flip(1)}, ValueError, r"`columns`: expected ascending columns in every sequence, got unsorted ones in 0"),
    "columns dtype": (KL, {"columns": _COLUMNS.long()}, TypeError, r"`columns`: expected torch.int32"),
    "over": (KL, {"over": "all"}, ValueError, r"`over`: expected 'visible' or 'columns', got 'all'"),
    "heads": (KL, {"heads": "max"}, ValueError, r"`heads`: expected 'mean' or 'each', got 'max'"),
    "target shape": (KL, {"target": torch.zeros(12, 7)}, ValueError, r"`target`: expected shape \[N=12, C=8\]"),
    "target negative": (KL, {"target": -torch.ones(12, 8)}, ValueError, r"`target`: expected finite values >= 0"),
    "head weight shape": (KL, {"head_weight": torch.ones(3)}, ValueError, r"`head_weight`: expected shape \[Hq=4\], got \[3\]"),
    "head weight negative": (KL, {"head_weight": -torch.ones(4)}, ValueError, r"`head_weight`: expected values >= 0"),
    "g shape": (CONTRIBUTION, {"g": torch.zeros(12, 4, 16)}, ValueError, r"`g`: expected shape \[N=12, Hq=4, Dv=12\]"),
    "weight dim": (LOSS, {"weight": torch.zeros(97, 8)}, ValueError, r"`weight`: expected shape \[V, D=24\]"),
    "bias": (LOSS, {"bias": torch.zeros(96)}, ValueError, r"`bias`: expected shape \[V=97\], got \[96\]"),
    "target rows": (LOSS, {"target": torch.zeros(7, dtype=torch.int64)}, ValueError, r"`target`: expected hidden's leading shape \[8\], got \[7\]"),
    "target dtype": (LOSS, {"target": torch.zeros(8, dtype=torch.int32)}, TypeError, r"`target`: expected torch.int64"),
    "target out of the vocabulary": (LOSS, {"target": torch.full((8,), 97)}, ValueError, r"`target`: expected labels in \[0, 97\) \(the vocabulary\), got \[97, 97\]"),
    "target negative label": (LOSS, {"target": torch.full((8,), -1)}, ValueError, r"`target`: expected labels in \[0, 97\)"),
    "label out of the vocabulary": (LOSS, {"weight": torch.zeros(97, 24)[:97], "bags": replace(LOSS.options["bags"], ids=LOSS.options["bags"].ids + 40)}, ValueError, r"`bags.ids`: expected labels in \[0, 97\)"),
    "bag rows": (LOSS, {"bags": replace(LOSS.options["bags"], index=torch.zeros(3, dtype=torch.int64))}, ValueError, r"`bags.index`: expected shape \[N=8"),
    "row weight": (LOSS, {"row_weight": torch.ones(3)}, ValueError, r"`row_weight`: expected target's shape \[8\], got \[3\]"),
    "reduction": (LOSS, {"reduction": "max"}, ValueError, r"`reduction`: expected 'mean', 'sum' or 'none', got max"),
    "smoothing": (LOSS, {"smoothing": 1.0}, ValueError, r"`smoothing`: expected a share in \[0, 1\), got 1.0"),
    "weight grad": (LOSS, {"weight_grad": torch.zeros(97, 24).bfloat16()}, TypeError, r"`weight_grad`: expected torch.float32"),
    "teacher rows": (DISTILLED, {"teacher_hidden": torch.zeros(6, 40)}, ValueError, r"`teacher_hidden`: expected hidden's leading shape \[7\], got \[6\]"),
    "teacher dim": (DISTILLED, {"teacher_weight": torch.zeros(97, 24)}, ValueError, r"`teacher_weight`: expected shape \[V=97, Dt=40\], got \[97, 24\]"),
    "teacher vocabulary": (DISTILLED, {"teacher_weight": torch.zeros(96, 40)}, ValueError, r"`teacher_weight`: expected shape \[V=97, Dt=40\], got \[96, 40\]"),
    "teacher dtype": (DISTILLED, {"teacher_weight": torch.zeros(97, 40).bfloat16()}, TypeError, r"`teacher_weight`: expected torch.float32, got torch.bfloat16"),
    "student bias": (DISTILLED, {"bias": torch.zeros(96)}, ValueError, r"`bias`: expected shape \[V=97\], got \[96\]"),
    "kind": (DISTILLED, {"kind": "tv"}, ValueError, r"`kind`: expected 'forward', 'reverse' or 'js', got 'tv'"),
    "beta": (DISTILLED, {"beta": 1.0}, ValueError, r"`beta`: expected a share in \(0, 1\), got 1.0"),
    "temperature": (DISTILLED, {"temperature": 0.0}, ValueError, r"`temperature`: expected a positive finite number, got 0.0"),
    "teacher softcap": (DISTILLED, {"teacher_softcap": -1.0}, ValueError, r"`teacher_softcap`: expected a positive finite number or None"),
    "mask shape": (DISTILLED, {"mask": torch.ones(6, dtype=torch.bool)}, ValueError, r"`mask`: expected hidden's leading shape \[7\], got \[6\]"),
    "mask dtype": (DISTILLED, {"mask": torch.ones(7)}, TypeError, r"`mask`: expected torch.bool, got torch.float32"),
    "kl row weight": (DISTILLED, {"row_weight": torch.ones(6)}, ValueError, r"`row_weight`: expected hidden's leading shape \[7\], got \[6\]"),
    "kl reduction": (DISTILLED, {"reduction": "batchmean"}, ValueError, r"`reduction`: expected 'mean', 'sum' or 'none', got batchmean"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, replaced, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call.run(**replaced)


def _absent() -> None:
    raise ImportError("not built")


@pytest.mark.parametrize(
    ("name", "place", "value", "why"),
    [
        ("triton", "groundkern.backends._NO_TRITON", "the package is not there", "the package is"),
        ("native", "groundkern.native.dtype_codes", _absent, "the C.. extension .* not built"),
    ],
)
def test_a_named_backend_that_is_not_there_never_falls_back(
    name: str, place: str, value: object, why: str, monkeypatch
) -> None:
    monkeypatch.setattr(place, value)
    message = rf"`backend`: expected one that serves this call, got '{name}': {why}"
    with nothing_kept():  # or the call before is found, with the backend that was there
        with pytest.raises(ValueError, match=message):
            SIDE.run(backend=name)
        assert SIDE.run(backend="auto")[0].isfinite().all()


def test_auto_uses_the_reference_for_fp64() -> None:
    wide = {n: x.double() for n, x in SIDE.inputs.items()}
    assert SIDE.run(**wide)[0].dtype == torch.float64


def test_metadata_is_checked_on_every_device() -> None:
    with torch.device("meta"):
        q, k = torch.zeros(5, 4, 16), torch.zeros(2, 2, 45, 8)
    with pytest.raises(ValueError, match="`k`"):
        SIDE.run(q=q, k=k, v=k, rows=_ROWS.to("meta"), allowed=None)
