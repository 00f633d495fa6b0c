"""Packed rows: losses, gradients and readings of every document as in the padded batch."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import masking_utils

from benchmarks.families.zoo.tiles import gemma3_model, gemma3_processor
from groundkern.hf import (
    Basic,
    DvSft,
    Hist,
    Klal,
    LogitLens,
    Margins,
    PatchText,
    Smam,
    attach,
    detach,
    doctor,
    examine,
    packing_refusal,
)
from groundkern.hf.model.body import APART
from groundkern.hf.model.body_run import BodyRun
from groundkern.hf.model.documents import Documents
from groundkern.hf.model.positions import packed_inputs
from groundkern.hf.model.request import Request, with_documents
from groundkern.hf.model.support import FAILED
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.conftest import MODELS
from tests.hf.decoders import tiny_decoder
from tests.hf.logit_decoders import build_moe
from tests.hf.packed import packed_batch
from tests.hf.rows import plain_inputs
from tests.hf.samples import SAMPLES, make_batch, token_batch

# every way of reading attention: over all keys, over columns, per head and layer mean
OBJECTIVES = {
    "all": {
        "smam": Smam(weight=0.7, gamma=1.3),
        "dv_sft": DvSft(weight=0.5, smoothing=0.2),
        "klal": Klal(weight=0.8),
        "hist": Hist(),
        "margins": Margins(mean_margin=10.0),
        "logit_lens": LogitLens(),
        "basic": Basic(),
        "patch_text": PatchText(words=1.0),
    },
    "visible": {
        "klal": Klal(over="visible", head_weight="learned"),
        "dv_sft": DvSft(average="image"),
        "hist": Hist(over="visible"),
    },
    "gradcam": {"hist": Hist(maps="gradcam"), "margins": Margins(maps="gradcam", mean_margin=10.0)},
}
ROWS = ((0, 1), (3, 2))  # two documents to a row, the second row filled at its end


def row_samples(family: str):
    samples = SAMPLES[family]
    return [tuple(samples[i] for i in row) for row in ROWS]


def both(model, family: str) -> tuple[dict, dict]:
    """The samples padded, and in rows."""
    rows = row_samples(family)
    packed = packed_batch(model, rows)
    assert not bool(packed["position_ids"][:, -1].eq(packed["input_ids"].shape[1] - 1).any())
    return make_batch(model, tuple(x for row in rows for x in row)), packed


def assert_same(model, padded: dict, packed: dict) -> None:
    wanted, ours = model(**padded), model(**packed)
    assert wanted.parts.keys() == ours.parts.keys()
    torch.testing.assert_close(ours.loss, wanted.loss, rtol=1e-5, atol=0)
    for name, part in wanted.parts.items():
        torch.testing.assert_close(ours.parts[name], part, rtol=2e-5, atol=1e-7)
    assert_same_gradients(gradients(model, ours.loss), gradients(model, wanted.loss))


# a family for each way of reading attention, the objectives together in both
QUICK = (("qwen", "all"), ("llava", "all"), ("qwen", "visible"), ("llava", "gradcam"))


@pytest.mark.parametrize(
    ("family", "terms"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.long)
        for case in product(MODELS, OBJECTIVES)
    ],
)
def test_losses_and_gradients_are_those_of_the_padded_batch(family, terms):
    model = MODELS[family](attention="eager") if terms == "gradcam" else MODELS[family]()
    attach(model, **OBJECTIVES[terms]).train()
    assert_same(model, *both(model, family))
    detach(model)


def test_windows_end_at_the_start_of_a_document():
    layers = ["full_attention", "sliding_attention", "sliding_attention"]
    model = MODELS["qwen"](
        layer_types=layers, use_sliding_window=True, sliding_window=6, max_window_layers=1
    )
    attach(model, smam=Smam(), klal=Klal(), hist=Hist())
    assert_same(model, *both(model, "qwen"))
    detach(model)


@pytest.mark.parametrize("family", ["qwen", pytest.param("llava", marks=pytest.mark.long)])
def test_readings_are_those_of_each_document(model, family):
    """Maps, contributions, GradCAM and logits, on each row's own columns."""
    attach(model, smam=Smam(), klal=Klal())
    padded, packed = both(model, family)
    recorded = ("maps", "contributions", "gradcam", "logits")
    wanted, ours = (model(**x, gk_record=recorded) for x in (padded, packed))
    for name, kind in (("maps", "map"), ("contributions", "side"), ("gradcam", "side")):
        own, other = (
            on_columns(getattr(output, name), batch, f"gk_{kind}_position")
            for output, batch in ((wanted, padded), (ours, packed))
        )
        assert len(own) == len(other) > 0
        for x, y in zip(own, other, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)
    aligned = (x["gk_side_position"] >= 0 for x in (padded, packed))
    own, other = (x.side_logits[k] for x, k in zip((wanted, ours), aligned, strict=True))
    torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-4)


def on_columns(maps: Tensor, batch: dict, rows: str) -> list[Tensor]:
    """Of each row, what is not 0 or outside its document."""
    found = []
    for b, positions in enumerate(batch[rows]):
        columns = batch["gk_map_columns"][b]
        for r, position in enumerate(positions.tolist()):
            if position < 0:
                continue
            start = 0
            if "position_ids" in batch:
                start = position - int(batch["position_ids"][b, position])
            seen = (columns >= start) & (columns <= position)
            assert not bool(maps[b, r][~seen].any())
            found.append(maps[b, r][seen])
    return found


@pytest.mark.parametrize(
    "name", ["llama4", pytest.param("gemma4", marks=pytest.mark.long), "gemma3n"]
)
def test_windows_and_chunks_of_text_decoders(name):
    """Chunks count from a document's start, windows end there; keys shared by layers."""
    model = tiny_decoder(name)
    reason = packing_refusal(model)
    if name == "llama4" and reason is not None:
        assert "chunks" in reason  # transformers that does not count them so
        return
    attach(model, smam=Smam(weight=0.7), klal=Klal(weight=0.8))
    rows = row_samples("qwen")
    padded = token_batch(None, tuple(x for row in rows for x in row))
    assert_same(model, padded, packed_batch(model, rows))
    detach(model)


def test_image_tokens_that_see_one_another_are_refused(monkeypatch):
    """Their masks look an image up among the row's tokens, at its place in the document; `examine`
    finds that too."""
    if not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        pytest.skip("this transformers does not count from a document's start")
    model = gemma3_model()
    assert "see no later ones" in packing_refusal(model)
    monkeypatch.setattr("groundkern.hf.model.support._IMAGE_BLOCKS", ())
    assert packing_refusal(model) is None
    found = examine(model, gemma3_processor(), [Image.new("RGB", (90, 60))] * 2)
    assert "those of each alone" in found.packing


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "falcon_h1", "minimax_m3"])
def test_layers_that_carry_something_over_are_refused(name):
    model = attach(tiny_decoder(name))
    reason = packing_refusal(model)
    assert reason.startswith("`packing`: expected layers that keep the documents of a row apart")
    batch = packed_batch(model, row_samples("qwen"))
    with pytest.raises(ValueError, match="`packing`"):
        model(**batch)
    one = {n: x[:, :9] if n in ("input_ids", "position_ids") else x for n, x in batch.items()}
    rows = torch.tensor([[5, 7], [6, -1]])
    one = {n: x for n, x in one.items() if not n.startswith("gk_")} | {"gk_text_position": rows}
    assert bool(torch.isfinite(model(**one).loss))  # a document to a row
    detach(model)


def test_a_decoder_that_makes_its_masks_without_positions_is_refused():
    """gpt-oss up to transformers 5.23."""
    model = attach(tiny_decoder("gpt_oss"))
    packed = packed_batch(model, row_samples("qwen"))
    with pytest.raises(ValueError, match=r"`packing`.*masks are made by position_ids"):
        model(**packed)
    detach(model)


def test_routers_do_not_count_the_ends_of_rows():
    model = attach(build_moe("Qwen3MoeForCausalLM", vocab_size=512))
    rows = row_samples("qwen")
    padded = token_batch(None, tuple(x for row in rows for x in row))
    packed = packed_batch(model, rows)
    assert float(model(**packed).parts["router_aux"]) > 0.1
    assert_same(model, padded, packed)
    detach(model)


def test_doctor_compares_with_every_document_alone(qwen, monkeypatch):
    attach(qwen, smam=Smam())
    _, packed = both(qwen, "qwen")
    report = doctor(qwen, packed)
    assert report.packed < 1e-5 and report.of == "side tokens"
    assert doctor(qwen, make_batch(qwen, SAMPLES["qwen"])).packed is None


def test_a_model_that_doctor_found_wanting_is_refused_packed_rows(qwen, monkeypatch):
    attach(qwen, smam=Smam())
    _, packed = both(qwen, "qwen")
    with monkeypatch.context() as patch:
        makers = "transformers.masking_utils.find_packed_sequence_indices"
        patch.setattr(makers, lambda positions: None)
        with pytest.raises(ValueError, match=r"`packing`.*those of each alone"):
            doctor(qwen, packed)
    assert "packing" in vars(qwen)[FAILED]
    with pytest.raises(ValueError, match="`packing`"):
        qwen(**packed)
    assert "those of each alone" in packing_refusal(qwen)
    assert doctor(qwen, packed).packed < 1e-5
    assert packing_refusal(qwen) is None


def test_a_mask_that_lets_documents_meet_is_refused(model, family, monkeypatch):
    """As a decoder would make it that does not look at positions."""
    attach(model, klal=Klal())
    _, packed = both(model, family)
    monkeypatch.setattr(
        "transformers.masking_utils.find_packed_sequence_indices", lambda positions: None
    )
    with pytest.raises(ValueError, match="documents of a packed row apart"):
        model(**packed)
    assert APART not in vars(model)
    monkeypatch.setattr("groundkern.checks.values_visible", lambda *tensors: False)  # on a GPU
    for _ in range(2):
        with pytest.raises(ValueError, match="documents of a packed row apart"):
            model(**packed)


def test_a_gpu_looks_at_masks_once_for_an_attention_function(qwen, monkeypatch):
    attach(qwen, klal=Klal())
    _, packed = both(qwen, "qwen")
    monkeypatch.setattr("groundkern.checks.values_visible", lambda *tensors: False)
    looks = []
    monkeypatch.setattr(Documents, "refuse_leak", lambda self, mask: looks.append(mask))
    one = {"input_ids": torch.arange(20, 26)[None], "position_ids": torch.arange(6)[None]}
    qwen(**one, gk_text_position=torch.tensor([[2, 4]]))
    assert not looks  # a row that is one document says nothing of others
    for _ in range(2):
        qwen(**packed)
    assert len(looks) == 1
    attach(qwen, klal=Klal())
    qwen(**packed)
    assert len(looks) == 2


REFUSED = {
    "a mask": ("attention_mask", lambda b: torch.ones_like(b["input_ids"]), "packed documents"),
    "lengths of others": (
        "cu_seq_lens_q",
        lambda b: torch.tensor([0, 7, b["input_ids"].numel()]),
        "the documents of position_ids",
    ),
    "positions from 1": ("position_ids", lambda b: b["position_ids"] + 1, "count from 0"),
    "lengths alone": ("position_ids", None, "packed documents without them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_says_something_else_is_refused(qwen, case):
    name, make, message = REFUSED[case]
    attach(qwen)
    _, batch = both(qwen, "qwen")
    if make is None:
        del batch[name]
        batch["cu_seq_lens_q"] = torch.tensor([0, batch["input_ids"].numel()])
    else:
        batch[name] = make(batch)
    with pytest.raises(ValueError, match=message):
        qwen(**batch)


def test_a_document_of_one_token_beside_a_mask_is_refused(qwen):
    attach(qwen)
    batch = token_batch(None, (SAMPLES["qwen"][2],))
    positions = torch.arange(-1, batch["input_ids"].shape[1] - 1).clamp(min=0)[None]
    with pytest.raises(ValueError, match="positions that restart"):
        qwen(**batch, position_ids=positions)
    batch["attention_mask"][0, 0] = 0  # padding on the left
    assert bool(torch.isfinite(qwen(**batch, position_ids=positions).loss))


@pytest.mark.parametrize("name", ["gk_text_position", "gk_side_position", "gk_phrase_position"])
def test_rows_that_predict_the_next_document_are_refused(model, family, name):
    """As those of labels that were shifted after packing."""
    attach(model, klal=Klal())
    _, packed = both(model, family)
    packed[name][0, 0] = Documents(packed["position_ids"]).new[0].nonzero()[1, 0] - 1
    with pytest.raises(ValueError, match=f"`{name}`: expected rows that predict a token of their"):
        model(**packed)


def test_plain_packed_rows_are_kept_apart(model, family):
    """A cache hides the documents from transformers, and so do text positions alone (Qwen)."""
    attach(model)
    padded, packed = (plain_inputs(x) for x in both(model, family))
    keep = padded["attention_mask"].bool()
    wanted = model(**padded).logits[keep]
    ours = packed_inputs(model, packed)
    documents = Documents(packed["position_ids"])
    real = ~documents.padding(packed["input_ids"], torch.full((2, 1), -1))
    torch.testing.assert_close(model(**ours).logits[real], wanted, rtol=1e-4, atol=1e-4)
    assert packed_inputs(model, padded) is padded


def test_lengths_of_a_collator_and_given_positions_change_nothing(qwen):
    """What TRL and DataCollatorWithFlattening add, and positions with text first."""
    attach(qwen, smam=Smam())
    _, packed = both(qwen, "qwen")
    wanted = qwen(**packed).loss
    inputs, documents = with_documents(qwen, plain_inputs(packed))
    assert inputs["position_ids"].shape[0] == 4
    moved = bool((inputs["position_ids"][1:] != inputs["position_ids"][0]).any())
    older = not hasattr(qwen.model, "compute_3d_position_ids")  # looks for vision_start tokens
    assert moved or older
    added = {**documents.lengths, "seq_idx": documents.number.int()}
    assert torch.equal(qwen(**packed, **added).loss, wanted)
    given = {**packed, "position_ids": inputs["position_ids"]}
    assert torch.equal(qwen(**given).loss, wanted)


def test_own_positions_leave_no_trace(qwen):
    _, packed = both(qwen, "qwen")
    qwen.model.rope_deltas = kept = torch.ones(4, 1)
    with_documents(qwen, plain_inputs(packed))
    assert qwen.model.rope_deltas is kept


def test_flash_attention_is_given_the_documents(qwen):
    """Its packed kernel's lengths, for rows laid end to end; other functions are given nothing."""
    _, packed = both(qwen, "qwen")
    documents = Documents(packed["position_ids"])
    run = BodyRun(packed["input_ids"].shape[1], "auto", [], None, documents, True)
    assert run.main_mask("flash_attention_2", None, run.length) == (None, False)
    found = run.flash_lengths("flash_attention_2", None)
    ends = [len(x) for x in torch.split(documents.number.flatten(), documents.size[1])]
    assert sum(ends) == int(found["cu_seq_lens_q"][-1])
    lengths = found["cu_seq_lens_q"].diff().tolist()
    assert lengths == documents.number.flatten().bincount().tolist()
    assert max(lengths) <= found["max_length_q"] == packed["input_ids"].shape[1]
    mask = documents_mask(documents)
    assert run.flash_lengths("sdpa", mask) == {}
    assert run.main_mask("sdpa", mask, run.length).plain
    run = BodyRun(run.length, "auto", [], None, documents, True)
    with pytest.raises(ValueError, match="does not look at position_ids"):
        run.main_mask("sdpa", None, run.length)


def documents_mask(documents: Documents) -> Tensor:
    """bool [R, 1, S, S]: causal, inside of documents."""
    same = documents.number[:, :, None] == documents.number[:, None]
    return (same & torch.ones_like(same).tril())[:, None]


def test_documents_alone_and_back():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]])
    documents = Documents(positions)
    x = torch.arange(10).view(2, 5)
    alone = documents.unpack(x, -1)
    assert alone.tolist() == [[0, 1, 2, -1], [3, 4, -1, -1], [5, 6, 7, 8], [9, -1, -1, -1]]
    assert torch.equal(documents.pack(alone), x)
    assert documents.start.tolist() == [[0, 0, 0, 3, 3], [0, 0, 0, 0, 4]]
    assert documents.several and not Documents(positions[1:, :4]).several
    assert documents.lengths["cu_seq_lens_k"].tolist() == [0, 3, 5, 9, 10]


def test_padding_is_a_last_document_of_one_token_that_is_not_trained():
    documents = Documents(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]))
    ids = torch.tensor([[5, 6, 7, 9, 9], [5, 6, 7, 9, 8], [9, 9, 9, 9, 9]])
    none = torch.full((3, 1), -1)
    filled = [[False] * 3 + [True] * 2, [False] * 5, [False] * 5]
    assert documents.padding(ids, none).tolist() == filled
    trained = torch.tensor([[3], [-1], [-1]])
    assert not bool(documents.padding(ids, trained).any())


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_costs_the_device_no_wait_without_multimodal_positions(packed, monkeypatch):
    """What is read of values on a GPU: nothing, once the masks were seen to be right."""
    model = attach(MODELS["llava"](), klal=Klal())
    padded, rows = both(model, "llava")
    vars(model)[APART] = True
    monkeypatch.setattr("groundkern.checks.values_visible", lambda *tensors: False)
    for name in ("several", "size", "lengths"):
        wait = property(lambda self: pytest.fail("a wait"))
        monkeypatch.setattr(Documents, name, wait)
    request = Request.of(model, vars(model)["_groundkern"].objectives, rows if packed else padded)
    assert (request.documents is not None) is packed
    detach(model)
