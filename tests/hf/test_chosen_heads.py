"""Maps of chosen heads: which are computed, what their gradient reaches, and what is refused."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from groundkern import asked, attention_map
from groundkern.hf import Klal, attach
from groundkern.hf.model.chosen_heads import key_heads, take_heads
from groundkern.hf.model.layer import Layer
from groundkern.hf.model.map_readings import MapLoss, MapRows
from groundkern.hf.model.rows import Rows
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.naive import run_samples
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.test_klal import divergence

LAYERS, HEADS = 3, 4


def layer_of(q: torch.Tensor, k: torch.Tensor, sinks: torch.Tensor | None = None) -> Layer:
    """A layer of q [B, Hq, S, D] and k [B, Hkv, S, D]."""
    v = k.detach().flip(-1)
    options = {"scale": None, "softcap": None, "backend": "auto"}
    return Layer(0, None, q, k, v, None, None, options, {}, {}, False, sinks)


@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (6, 2), (6, 3), (4, 1)])
def test_any_heads_are_the_same_heads_of_the_whole_map(heads, keys):
    """Every subset of MHA, of two kinds of GQA and of MQA, in fp64, values and gradients."""
    torch.manual_seed(0)
    q = torch.randn(2, heads, 7, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, keys, 7, 3, dtype=torch.float64, requires_grad=True)
    rows = Rows(torch.tensor([[6, 2], [4, -1]]), torch.tensor([[0, 0], [1, 1]]).int())
    columns = torch.tensor([[1, 2, 3], [1, 3, -1]]).int()
    layer, upstream = layer_of(q, k), torch.randn(4, 3, dtype=torch.float64)
    for count in range(1, heads + 1):
        for chosen in combinations(range(heads), count):
            own = layer.at_heads(rows, chosen)
            at = rows.at(None)
            ours = attention_map(own.queries(rows), own.k, at, columns, over="visible")
            found = torch.autograd.grad((ours * upstream).sum(), (q, k))
            weight = torch.zeros(heads, dtype=torch.float64)
            weight[list(chosen)] = 1 / count
            whole = layer.queries(rows)
            wanted = attention_map(whole, k, at, columns, over="visible", head_weight=weight)
            expected = torch.autograd.grad((wanted * upstream).sum(), (q, k))
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
            others = [h for h in range(heads) if h not in chosen]
            unread = [g for g in range(keys) if g not in {h // (heads // keys) for h in chosen}]
            assert not found[0][:, others].any()
            assert not found[1][:, unread].any()


def test_only_the_chosen_heads_are_computed():
    q, k = torch.randn(1, 8, 5, 4), torch.randn(1, 4, 5, 4)
    rows = Rows(torch.tensor([[4]]), torch.tensor([[0]]).int())
    layer = layer_of(q, k)
    one = layer.at_heads(rows, (5,))
    assert one.queries(rows).shape == (1, 1, 4)
    assert one.k.shape == (1, 1, 5, 4)
    assert one.k.data_ptr() == k[:, 2].data_ptr()  # a view
    whole = layer.at_heads(rows, tuple(range(8)))
    assert whole.k is k
    assert key_heads((0, 1, 2, 3, 6, 7), 2) == [0, 1, 3]  # two each: no key twice
    assert key_heads((0, 1, 2, 4, 5), 3) == [0, 0, 0, 1, 1]
    assert key_heads((0, 1, 2, 3, 4, 5), 4) == [0, 0, 1]
    assert torch.equal(take_heads(k, (3, 0)), k[:, [3, 0]])


def test_sinks_of_the_chosen_heads_take_part():
    """Head 1 of two, by hand: scores ln 3 and 0 and a sink of ln 2 share 3, 1 and 2 of 6."""
    k = torch.tensor([[1.0], [0.0]]).expand(1, 2, 2, 1)
    q = torch.zeros(1, 2, 2, 1)
    q[0, 1, 1] = torch.tensor(3.0).log()
    sinks = torch.tensor([5.0, 2.0]).log()
    rows = Rows(torch.tensor([[1]]), torch.tensor([[0]]).int())
    own = layer_of(q, k, sinks).at_heads(rows, (1,))
    columns = torch.tensor([[0, 1]]).int()
    lse = own.normaliser(rows)
    at = rows.at(None)
    ours = attention_map(own.queries(rows), own.k, at, columns, over="visible", lse=lse, scale=1.0)
    torch.testing.assert_close(ours, torch.tensor([[3 / 6, 1 / 6]]))


@pytest.mark.parametrize(
    ("over", "both", "first", "second"),
    [("columns", 0.5, 1.0, 0.0), ("renormalised", 0.9, 1.0, 0.0), ("visible", 0.45, 0.9, 0.0)],
)
def test_two_heads_by_hand(over, both, first, second):
    """Head 0 has .9 on the image, all on its target; head 1 .1, all beside the target.

    Target share of both: columns (1 + 0) / 2, renormalised (.9 + 0) / (.9 + .1), visible .9 / 2.
    """
    image = torch.tensor([[[0.9, 0.0, 0.1], [0.0, 0.1, 0.9]]])  # [1, heads, keys]: target, other
    k = torch.eye(3).expand(1, 2, 3, 3)
    q = torch.zeros(1, 2, 3, 3)
    q[:, :, 2] = image.log().clamp(min=-200.0)
    rows = Rows(torch.tensor([[2]]), torch.tensor([[0]]).int())
    layer = layer_of(q, k)._replace(options={"scale": 1.0, "softcap": None, "backend": "auto"})
    at = MapRows(rows, torch.tensor([[0, 1]]).int())
    for heads, share in (((0, 1), both), ((0,), first), ((1,), second)):
        klal = Klal(over=over, chosen_heads=tuple((0, head) for head in heads))
        loss = MapLoss(at, torch.tensor([[1.0, 0.0]]), klal, None)
        kl = loss.of(layer.at_heads(rows, heads))
        if isinstance(kl, asked.Asked):
            ((kl,),) = asked.run([kl])
        if share == 0:
            assert kl > 80  # -ln of what is all but nothing
        else:
            torch.testing.assert_close(kl, -torch.tensor([share]).log(), atol=1e-6, rtol=1e-6)


def naive_chosen(model, batch: dict, klal: Klal, weight: torch.Tensor | None) -> torch.Tensor:
    """KLAL of chosen heads written out on stored attention."""
    losses = []
    for b, sample in enumerate(run_samples(model, batch)):
        for r, t in enumerate(sample.positions("map")):
            own = (sample.image == batch["gk_map_image"][b, r]).nonzero()[:, 0]
            at = sample.image[sample.image >= 0] == batch["gk_map_image"][b, r]
            p = batch["gk_map_target"][b, r, : len(at)][at].double()
            p = p / p.sum()
            maps = {}  # of a pair
            for n, h in klal.chosen_heads:
                a = sample.layers[n][0][h, t, own].double()
                maps[n, h] = a / a.sum() if klal.over == "columns" else a
            if klal.average_layers:
                groups = [list(maps)]
            else:
                layers = sorted({n for n, _ in maps})
                groups = [[pair for pair in maps if pair[0] == n] for n in layers]
            rows = []
            for pairs in groups:
                each = torch.stack([maps[pair] for pair in pairs])
                share = torch.full((len(pairs),), 1 / len(pairs), dtype=torch.float64)
                if weight is not None:
                    share = torch.stack([weight[pair] for pair in pairs]).double().softmax(0)
                if klal.heads == "each":
                    of_heads = torch.stack([divergence(p, q, klal) for q in each])
                    rows.append((share * of_heads).sum())
                else:
                    rows.append(divergence(p, share @ each, klal))
            losses.append(torch.stack(rows).mean())
    return torch.stack(losses).mean()


ONE = ((1, 2),)
RANGE = ((0, 1), (0, 2), (0, 3))  # one KV head of two, and half of the other
SCATTERED = ((2, 3), (0, 0), (2, 0), (0, 2), (0, 3))
CASES = (
    Klal(chosen_heads=ONE),
    Klal(chosen_heads=ONE, over="visible"),
    Klal(chosen_heads=RANGE, heads="each"),
    Klal(chosen_heads=RANGE, over="renormalised", divergence="reverse_kl"),
    Klal(chosen_heads=SCATTERED, over="visible", heads="each"),
    Klal(chosen_heads=SCATTERED, divergence="js", average_layers=True),
    Klal(chosen_heads=SCATTERED, over="renormalised", average_layers=True),
    Klal(chosen_heads=SCATTERED, head_weight="learned"),
    Klal(chosen_heads=SCATTERED, head_weight="learned", average_layers=True, over="visible"),
)


@pytest.mark.parametrize("klal", CASES, ids=str)
def test_losses_and_gradients_are_those_written_out(qwen, klal):
    attach(qwen, klal=klal).train()
    batch, weight = make_batch(qwen, SAMPLES["qwen"], side="left"), None
    if klal.head_weight == "learned":
        weight = qwen.groundkern_head_weight
        with torch.no_grad():
            weight.copy_(torch.arange(12.0).view(LAYERS, HEADS).sin())
    text_only = {k: v for k, v in batch.items() if k != "gk_text_position"}
    ours = qwen(**text_only)
    found = gradients(qwen, ours.loss)
    wanted = naive_chosen(qwen, batch, klal, weight)
    torch.testing.assert_close(ours.loss.detach().double(), wanted.detach(), rtol=1e-5, atol=0)
    expected = gradients(qwen, wanted)
    assert_same_gradients({k: found[k] for k in expected}, expected, share=2e-4)
    if weight is not None:
        chosen = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
        chosen[tuple(zip(*klal.chosen_heads, strict=True))] = True
        assert torch.equal(found["groundkern_head_weight"] != 0, chosen)


def test_gradient_reaches_the_queries_of_chosen_heads_and_their_keys_alone(qwen):
    """Head 3 of the last layer reads KV head 1 of 2."""
    attach(qwen, klal=Klal(chosen_heads=((2, 3),))).train()
    batch = make_batch(qwen, SAMPLES["qwen"])
    del batch["gk_text_position"]
    found = gradients(qwen, qwen(**batch).loss)
    of = {k.rpartition("layers.2.self_attn.")[2]: g for k, g in found.items()}
    queries = of["q_proj.weight"].unflatten(0, (HEADS, -1)).flatten(1).any(1)
    keys = of["k_proj.weight"].unflatten(0, (2, -1)).flatten(1).any(1)
    assert queries.tolist() == [False, False, False, True]
    assert keys.tolist() == [False, True]


def test_checkpointing_changes_nothing(qwen):
    attach(qwen, klal=Klal(chosen_heads=SCATTERED, over="visible")).train()
    batch = make_batch(qwen, SAMPLES["qwen"])
    plain = gradients(qwen, qwen(**dict(batch)).loss)
    qwen.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(qwen, qwen(**dict(batch)).loss)
    assert_same_gradients(again, plain)


@pytest.mark.parametrize("mode", ["eager", "checkpointed"])
def test_recorded_heads_are_those_of_the_model(qwen, mode):
    """Over all visible keys, in every layer, and 0 on the columns of another image."""
    batch = make_batch(qwen, SAMPLES["qwen"], side="left")
    attach(qwen, klal=Klal())
    if mode == "checkpointed":
        qwen.gradient_checkpointing_enable({"use_reentrant": False})
        qwen.train()
    output = qwen(**dict(batch), gk_record=("maps", "heads"))
    found = output.head_maps
    rows, columns = batch["gk_map_position"].shape, batch["gk_map_columns"].shape[1]
    assert found.shape == (*rows, LAYERS, HEADS, columns)
    assert not found.requires_grad
    for b, sample in enumerate(run_samples(qwen, batch)):
        for r, t in enumerate(sample.positions("map")):
            at = sample.image[sample.image >= 0] == batch["gk_map_image"][b, r]
            own = (sample.image == batch["gk_map_image"][b, r]).nonzero()[:, 0]
            wanted = torch.zeros(LAYERS, HEADS, columns)
            wanted[..., : len(at)][..., at] = torch.stack(
                [sample.layers[n][0][:, t, own] for n in range(LAYERS)]
            )
            torch.testing.assert_close(found[b, r], wanted.detach(), rtol=1e-4, atol=1e-6)
    mean = (found / found.sum(-1, keepdim=True).clamp(min=1e-30)).mean((2, 3))
    torch.testing.assert_close(mean, output.maps)  # each head over its image, then the mean


def test_heads_of_a_batch_without_rows_are_empty(qwen):
    output = attach(qwen)(**make_batch(qwen, SAMPLES["qwen"][2:3]), gk_record="heads")
    assert output.head_maps.shape[1:] == (0, LAYERS, HEADS, 0)


PICKED = (
    Klal(average_layers=True, over="renormalised", picked_heads=5),
    Klal(average_layers=True, layers=(0, 2), divergence="js", picked_heads=3),
)


@pytest.mark.parametrize("klal", PICKED, ids=str)
def test_heads_are_picked_by_their_mass_on_the_image(qwen, klal):
    """A row's own heads, by stored attention; a choice of others gives another loss."""
    batch = make_batch(qwen, SAMPLES["qwen"], side="left")
    del batch["gk_text_position"]
    model = attach(qwen, klal=klal).train()
    ours = model(**dict(batch)).loss
    found = gradients(model, ours)
    rows, worst, choices = [], [], set()
    for b, sample in enumerate(run_samples(model, batch)):
        for r, t in enumerate(sample.positions("map")):
            own = (sample.image == batch["gk_map_image"][b, r]).nonzero()[:, 0]
            at = sample.image[sample.image >= 0] == batch["gk_map_image"][b, r]
            p = batch["gk_map_target"][b, r, : len(at)][at].float()
            every = [sample.layers[n][0][:, t, own] for n in klal.layers or range(LAYERS)]
            every = torch.cat(every)  # [heads of all layers, C]
            order = every.sum(-1).argsort(descending=True)
            choices.add(tuple(sorted(order[: klal.picked_heads].tolist())))
            if klal.over == "columns":
                every = every / every.sum(-1, keepdim=True)
            for picked, into in ((order, rows), (order.flip(0), worst)):
                q = every[picked[: klal.picked_heads]].mean(0)
                into.append(divergence(p / p.sum(), q, klal))
    assert len(choices) > 1  # rows differ
    wanted = torch.stack(rows).mean()
    torch.testing.assert_close(ours.detach(), wanted.detach(), rtol=1e-4, atol=0)
    assert abs(float((torch.stack(worst).mean() - wanted).detach())) > 1e-3
    expected = gradients(model, wanted)
    assert_same_gradients({k: found[k] for k in expected}, expected, share=5e-4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = model(**dict(batch)).loss
    assert_same_gradients(gradients(model, again), found)


def test_all_heads_picked_are_the_mean_of_all(qwen):
    batch = make_batch(qwen, SAMPLES["qwen"])
    losses = [
        attach(qwen, klal=Klal(average_layers=True, picked_heads=picked))(**dict(batch)).loss
        for picked in (None, LAYERS * HEADS)
    ]
    torch.testing.assert_close(*losses)


def test_picked_heads_are_refused_where_a_sequence_is_split(qwen, monkeypatch):
    monkeypatch.setattr("groundkern.hf.model.request.split_of", lambda *_: object())
    attach(qwen, klal=Klal(average_layers=True, picked_heads=2)).train()
    with pytest.raises(ValueError, match=r"klal.picked_heads`: expected whole sequences"):
        qwen(**make_batch(qwen, SAMPLES["qwen"]))


def test_heads_that_do_not_exist_are_refused(qwen):
    for heads, said in (
        (((3, 0),), r"`klal.chosen_heads`: expected layers in \[0, 3\), got \(3,\)"),
        (((0, 1), (1, 4)), r"`klal.chosen_heads`: expected pairs .* in \[0, 4\), got \(1, 4\)"),
    ):
        with pytest.raises(ValueError, match=said):
            attach(qwen, klal=Klal(chosen_heads=heads))
    for heads in ((), ((0, 1), (0, 1)), ((0,),), (1, 2), ((0, -1),), ((0, 1.5),), ((True, 1),)):
        with pytest.raises(ValueError, match="`chosen_heads`: expected distinct pairs"):
            Klal(chosen_heads=heads)
    with pytest.raises(ValueError, match="`layers`: expected None beside chosen_heads"):
        Klal(layers=(1,), chosen_heads=((1, 2),))
    with pytest.raises(ValueError, match=r"picked_heads`: expected at most 12, .* got 13"):
        attach(qwen, klal=Klal(average_layers=True, picked_heads=13))
    for options in (
        {"picked_heads": 3},
        {"picked_heads": 0, "average_layers": True},
        {"picked_heads": 2, "average_layers": True, "chosen_heads": ((0, 1),)},
        {"picked_heads": 2, "average_layers": True, "head_weight": "learned"},
    ):
        with pytest.raises(ValueError, match="picked_heads"):
            Klal(**options)
