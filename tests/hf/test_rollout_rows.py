"""Map rows of completions: which tokens have one, and targets that are those of the collator."""

from __future__ import annotations

import pytest
import torch

from groundkern.hf import Evidence
from groundkern.hf.data.rollouts import map_rows
from groundkern.maps import dequantise, patch_grid
from tests.hf.collating import make_collator, make_example, make_region

EASE = Evidence(kind="evidence", floor=0.1, rows=2)


def of_rollouts(how: Evidence, rects, regions, *, weight=(1.0,), tokens=5):
    """Rows of completions behind a prompt of the image's tokens and two more."""
    table = torch.cat((torch.zeros(len(rects), 1), rects), 1).double()
    count, prompt = len(weight), len(rects) + 2
    number = torch.full((count, prompt + tokens), -1, dtype=torch.int32)
    number[:, 1:-1][:, : len(rects)] = 0
    mask = torch.ones(count, tokens, dtype=torch.int64)
    known = mask, prompt, number, [table] * count, [regions] * count
    return map_rows(*known, torch.tensor(weight), how.targets)


def test_the_map_of_ease_by_hand():
    """Three columns and two rows of tokens; the box is the first of them, so its bell is 1/12 wide
    and 1/8 high, a quarter of the token's sides, and its centre is the token's.

    Along either axis the token reaches from -2 to 2 deviations, its neighbour from 2 to 6:
    .954500 and .022750, divided by their sum .976721 and .023279. Token 0: .9 * .953984 + .1 / 6 =
    .875252; its two neighbours .9 * .022737 + .016667 = .037130; diagonally .9 * .000542 + .016667
    = .017154; the last column has the floor alone.
    """
    batch = of_rollouts(EASE, patch_grid(2, 3), [{"boxes": [[0.0, 0.0, 1 / 3, 0.5]]}])
    wanted = [0.875252, 0.037130, 0.016667, 0.037130, 0.017154, 0.016667]
    found = dequantise(batch["gk_map_target"])[0]
    assert found.tolist() == [pytest.approx(wanted, abs=2e-6)] * 2
    # the middles of two equal parts of five tokens
    assert (batch["gk_map_position"] - 8).tolist() == [[1, 3]]


def test_a_rollout_of_weight_zero_has_no_row():
    box = [{"boxes": [[0.0, 0.0, 1 / 3, 0.5]]}]
    batch = of_rollouts(Evidence(rows=None), patch_grid(2, 3), box, weight=(0.0, 2.0))
    assert (batch["gk_map_position"] >= 0).sum(1).tolist() == [0, 5]
    assert batch["gk_map_weight"].tolist() == [[0.0] * 5, [2.0] * 5]


@pytest.mark.parametrize("how", [EASE, Evidence(kind="centre", sigma=0.3, floor=0.2)])
def test_targets_are_those_of_the_collator(how):
    boxes = ((0.0, 0.0, 0.2, 0.25), (0.7, 0.3, 1.0, 1.0))
    answer = "The red patch."
    options = {"map_kind": how.kind, "map_sigma": how.sigma, "map_floor": how.floor}
    region = make_region(answer, "red", boxes=boxes)
    known = make_collator(map_rows="answer", max_map_rows=how.rows, **options)(
        [make_example(answer, [region])]
    )
    ours = of_rollouts(how, patch_grid(4, 5), [{"boxes": [box]} for box in boxes])
    assert torch.equal(ours["gk_map_target"][0, 0], known["gk_map_target"][0, 0])


@pytest.mark.parametrize(
    ("slip", "sentence"),
    [
        ({"rows": 0}, "evidence.rows.*positive number"),
        ({"floor": 1.5}, r"evidence.floor.*\[0, 1\]"),
    ],
)
def test_evidence_out_of_range_is_refused(slip, sentence):
    with pytest.raises(ValueError, match=sentence):
        _ = Evidence(**slip).targets
