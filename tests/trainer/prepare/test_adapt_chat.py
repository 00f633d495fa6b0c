"""Every dialect of chat data to the exact sample, and what a record loses its place for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainer.prepare.reading_samples import picture, prepared, write

SLOT = {"type": "image"}


def text(said: str) -> dict:
    return {"type": "text", "text": said}


def user(*parts) -> dict:
    whole = isinstance(parts[0], str) and len(parts) == 1
    made = [part if isinstance(part, dict) else text(part) for part in parts]
    return {"role": "user", "content": parts[0] if whole else made}


def assistant(said: str, **more) -> dict:
    return {"role": "assistant", "content": said, **more}


ASKED, SAID = user(SLOT, "What is it?"), assistant("A cat.")
HUMAN = {"from": "human", "value": "<image>\nWhat is it?"}
GPT = {"from": "gpt", "value": "A cat."}
ONE = {"images": ["a.png"], "messages": [ASKED, SAID]}
PLAIN = {"images": [], "messages": [user("Hello?"), assistant("Hi.")]}
HELLO = {"role": "user", "content": "Hello?"}
HI = {"role": "assistant", "content": "Hi."}
QUESTION = {"role": "user", "content": "<image>What is it?"}
ANSWER = {"role": "assistant", "content": "A cat."}
PARTS = [{"type": "image"}, {"type": "text", "text": "What is it?"}]

# name: (record, sample)
RECORDS: dict[str, tuple[dict, dict]] = {
    "llava": (
        {"id": "7", "image": "a.png", "conversations": [HUMAN, GPT], "source": "x"},
        {"id": "7", "meta": {"source": "x"}, **ONE},
    ),
    "qwen_finetune_two_images": (
        {"image": ["a.png", "b.png"], "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhich?"}, GPT]},
        {"images": ["a.png", "b.png"], "messages": [user(SLOT, SLOT, "Which?"), SAID]},
    ),
    "qwen_vl_inline": (
        {"conversations": [{"from": "user", "value": "<img>a.png</img>\nWhat is it?"},
                           {"from": "assistant", "value": "A cat."}]},
        ONE,
    ),
    "sharegpt_tools": (
        {"conversations": [
            {"from": "human", "value": "Price?"},
            {"from": "function_call", "value": '{"name": "price"}'},
            {"from": "observation", "value": '{"price": 5}'},
            GPT], "system": "Be brief.", "tools": '[{"name": "price"}]'},
        {"tools": [{"name": "price"}], "images": [], "messages": [
            {"role": "system", "content": "Be brief."},
            user("Price?"),
            assistant('{"name": "price"}'),
            {"role": "tool", "content": '{"price": 5}'},
            SAID]},
    ),
    "llama_factory_messages": (
        {"messages": [QUESTION, ANSWER, {"role": "user", "content": "And this?<image>"}, ANSWER],
         "images": ["a.png", "b.png"]},
        {"images": ["a.png", "b.png"],
         "messages": [ASKED, SAID, user("And this?", SLOT), SAID]},
    ),
    "llama_factory_v1": (
        {"messages": [
            {"role": "user", "loss_weight": 0.0, "content": [
                {"type": "image_url", "value": "a.png"}, {"type": "text", "value": "What is it?"}]},
            {"role": "assistant", "loss_weight": 1.0,
             "content": [{"type": "text", "value": "A cat."}]}]},
        ONE,
    ),
    "one_image_without_placeholder": (
        {"messages": [{"role": "user", "content": "What is it?"}, ANSWER], "image": "a.png"},
        {"images": ["a.png"], "messages": [user("What is it?"), SAID]},
    ),
    "image_path": (
        {"messages": [QUESTION, ANSWER], "image_path": "a.png"},
        ONE,
    ),
    "openai": (
        {"messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}]},
            {"role": "assistant", "content": "A cat.", "weight": 1}]},
        {"images": ["a.png"], "messages": [
            {"role": "system", "content": "Be brief."}, user("What is it?", SLOT), SAID]},
    ),
    "openai_responses": (
        {"messages": [
            {"role": "user", "content": [{"type": "input_image", "image_url": "a.png"},
                                         {"type": "input_text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "A cat."}]}]},
        ONE,
    ),
    **{f"part_{name}": (
        {"messages": [{"role": "user", "content": [{"type": "image", name: "a.png"},
                                                   {"type": "text", "text": "What is it?"}]},
                      ANSWER]},
        ONE,
    ) for name in ("image", "url", "path")},
    "null_fields": (
        {"images": [{"path": "a.png", "bytes": None}], "messages": [
            {"role": "user", "content": [
                {"type": "image", "text": None, "image": None},
                {"type": "text", "text": "What is it?", "image": None}]},
            {"role": "assistant", "content": [
                {"type": "text", "text": "A cat.", "image": None}]}]},
        ONE,
    ),
    "trl_prompt_completion": (
        {"images": ["a.png"], "prompt": [{"role": "user", "content": PARTS}],
         "completion": [ANSWER]},
        ONE,
    ),
    "trl_prompt_with_answers": (
        {"prompt": [HELLO, HI, HELLO], "completion": [ANSWER]},
        {"images": [], "messages": [HELLO, {**HI, "train": False}, HELLO, ANSWER]},
    ),
    "trl_texts": ({"prompt": "Hello?", "completion": "Hi."}, PLAIN),
    "swift_query": (
        {"query": "<image>What is it?", "response": "A cat.", "images": ["a.png"],
         "history": [["Hello?", "Hi."]], "system": "Be brief."},
        {"images": ["a.png"], "messages": [
            {"role": "system", "content": "Be brief."}, user("Hello?"), assistant("Hi."),
            ASKED, SAID]},
    ),
    "swift_sharegpt": (
        {"conversation": [{"human": "Hello?", "assistant": "Hi."}], "system": "Be brief."},
        {"images": [], "messages": [{"role": "system", "content": "Be brief."}, HELLO, HI]},
    ),
    "alpaca": (
        {"instruction": "What is it?", "input": "Be brief.", "output": "A cat.",
         "images": ["a.png"], "history": []},
        {"images": ["a.png"], "messages": [user("What is it?\nBe brief."), SAID]},
    ),
    "vqa": (
        {"question_id": 7, "image": "a.png", "question": "What is it?", "answer": "A cat."},
        {"images": ["a.png"], "messages": [user("What is it?"), SAID], "meta": {"question_id": 7}},
    ),
    "columns": (  # how `datasets` keeps a list of objects, and texts of JSON
        {"messages": {"role": ["user", "assistant"], "content": ["Hello?", "Hi."]}}, PLAIN),
    "json_texts": ({"messages": json.dumps([HELLO, HI])}, PLAIN),
    "canonical": (
        {**ONE, "task": "pets", "answers": ["cat"], "regions": [
            {"text": "cat", "box": [1, 2, 3, 4]}]},
        {**ONE, "task": "pets", "answers": ["cat"], "regions": [
            {"text": "cat", "box": [1, 2, 3, 4]}]},
    ),
    "other_fields": (
        {"id": 3, "meta": {"a": 1}, "messages": [HELLO, HI], "split": "x", "n": None,
         "input": "kept"},
        {"id": 3, "meta": {"a": 1, "split": "x", "input": "kept"}, **PLAIN},
    ),
}  # fmt: skip


def run(folder: Path, *records, words=(), name="data.json"):
    for image in ("a.png", "b.png"):
        picture(folder / image, 200, 100)
    data = write(folder / name, list(records))
    return prepared(folder / "out.jsonl", "adapt", "chat", data, *words)


def test_every_dialect_in_one_file(tmp_path):
    records, wanted = zip(*RECORDS.values(), strict=True)
    status, samples, rejected = run(tmp_path, *records)
    assert (status, rejected) == (0, [])
    assert dict(zip(RECORDS, samples, strict=True)) == dict(zip(RECORDS, wanted, strict=True))


@pytest.mark.parametrize(
    ("flag", "on", "off"),
    [
        ("train", True, False),
        ("weight", 1, 0),
        ("loss_weight", 1.0, 0.0),
        ("loss_mask", 1, 0),
        ("loss", True, False),
        ("loss", None, False),
        ("loss_scale", 1.0, 0.0),
    ],
)
def test_which_turns_are_trained(tmp_path, flag, on, off):
    chat = [HELLO, {**HI, flag: off}, HELLO, {**HI, flag: on}]
    parts = {"role": "assistant", "content": [{**text("Hi."), flag: off}]}
    last = {"mask_history": True, "messages": [HELLO, HI, HELLO, HI]}
    other = {"messages": [HELLO, parts, HELLO, {**HI, "loss_weight": 1}]}
    status, samples, rejected = run(tmp_path, {"messages": chat}, last, other)
    assert (status, rejected) == (0, [])
    context = assistant("Hi.", train=False)
    assert [sample["messages"] for sample in samples] == [[HELLO, context, HELLO, HI]] * 3


def changed(**fields) -> dict:
    return {"messages": [HELLO, {**HI, **fields}]}


UNUSABLE = {
    "of the ten": (
        changed(weight=0.5),
        "messages[1]: `weight`: expected 0 or 1: a turn is trained",
    ),
    "never": (changed(weight=0), "`messages`: expected at least one assistant message to train on"),
    "user": (
        {"messages": [{**HELLO, "train": True}, HI]},
        "messages[0]: `train`: expected only answers to train on, got 1 for a message of user",
    ),
    "two minds": (changed(train=True, loss=0), "`train and loss`: expected one answer on whether"),
    "calls": (changed(tool_calls=[{"id": 1}]), "`tool_calls`: expected answers as text"),
    "thinks": (changed(reasoning_content="So."), "`reasoning_content`: expected answers as text"),
    "ranges": (changed(train_detail=[{}]), "`train_detail`: expected answers as text"),
    "no content": (changed(content=None), "messages[1].content: expected a text or a list of "),
    "another name": (
        {"messages": [HELLO, {"role": "assistant", "text": "Hi."}]},
        "messages[1].content: expected a text or a list of parts, got none",
    ),
    "role": (changed(role="narrator"), "messages[1]: `role`: expected one of system, developer"),
    "part": (
        changed(content=[{"type": "reasoning", "value": "So."}]),
        "messages[1].content[0]: `type`: expected text or image parts, got 'reasoning'",
    ),
    "number": (changed(content=5), "messages[1].content: expected a text or an object, got 5"),
    "video": ({"videos": ["a.mp4"], **changed()}, "`videos`: expected images and text only"),
    "too few": (
        {"messages": [QUESTION, HI], "images": ["a.png", "b.png"]},
        "`messages`: expected 2 placeholders, one for each of the record's images, got 1",
    ),
    "too many": (
        {"messages": [QUESTION, HI]},
        "`messages`: expected 0 placeholders, one for each of the record's images, got 1",
    ),
    "answer": (
        {"messages": [HELLO, {**HI, "content": "<image>"}], "images": ["a.png"]},
        "expected images as parts",
    ),
    "twice": (
        {"image": "a.png", "images": ["b.png"], **changed()},
        "`images`: expected one field with the images, got another one, `image`",
    ),
    "history": (
        {"query": "a", "response": "b", "history": [["a"]]},
        "`history[0]`: expected a question and an answer",
    ),
    "tools": ({"tools": "[", **changed()}, "`tools`: expected a list of JSON schemas"),
    "tool": ({"tools": [5], **changed()}, "`tools[0]`: expected an object, got 5"),
    "no messages": ({"messages": 5}, "`messages`: expected a list of messages, got 5"),
    "no chat": (
        {"caption": "a", "tags": "b"},
        "expected a chat of a known kind, got an object with caption, tags",
    ),
    "value": (5, "expected a chat of a known kind, got 5"),
}


def test_what_cannot_be_used_says_why(tmp_path):
    records = [record for record, _ in UNUSABLE.values()]
    status, samples, rejected = run(tmp_path, {"messages": [HELLO, HI]}, *records)
    assert (status, len(samples)) == (0, 1)
    reasons = dict(zip(UNUSABLE, rejected, strict=True))
    for i, (name, (_, reason)) in enumerate(UNUSABLE.items(), 1):
        assert reason in reasons[name]["reason"], name
        assert reasons[name]["where"] == f"data.json[{i}]"


class Twice(dict):
    """An object that has a name twice, once it is JSON."""

    def __init__(self) -> None:
        super().__init__(a=1)

    def items(self):
        return [("a", 1), ("a", 2)]


def test_a_file_that_is_no_chat_says_what_it_looks_like(tmp_path, capsys):
    for records, sentence in (
        ([{"caption": "a", "tags": "b", "image_path": "c", "split": None}],
         "data.json: a list of objects with caption, tags, image_path; expected one of: "
         "messages with role and content; conversations with from and value; "),
        (["a", "b"], "data.json: a list of values such as 'a'; expected one of: "),
        ([{}], "data.json: a list of objects with no fields; expected one of: "),
        ([], "data.json: no record that can be read; expected one of: "),
        ([Twice()], "that can be read (the first: data.json[0]: `a`: expected each name once"),
    ):  # fmt: skip
        assert run(tmp_path, *records)[0] == 2
        assert sentence in capsys.readouterr().err


CHOSEN = {
    "trl": {"prompt": "Hello?", "chosen": "Hi.", "rejected": "No."},
    "trl_implicit": {"chosen": [HELLO, HI], "rejected": [HELLO, ANSWER]},
    "trl_both": {"prompt": [HELLO], "chosen": [HELLO, HI], "rejected": [HELLO, ANSWER]},
    "trl_messages": {"prompt": [HELLO], "chosen": [HI], "rejected": [ANSWER]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hello?"}],
        "chosen": {"from": "gpt", "value": "Hi."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "alpaca": {"instruction": "Hello?", "input": "", "chosen": "Hi.", "rejected": "No."},
    "v1": {"chosen_messages": [HELLO, HI], "rejected_messages": [HELLO, ANSWER]},
    "swift": {"messages": [HELLO, HI], "rejected_response": "No."},
    "kto": {"messages": [HELLO, HI], "label": True},
    "kto_tag": {"prompt": "Hello?", "completion": "Hi.", "kto_tag": True},
}


def test_preferences_are_taken_only_on_request(tmp_path, capsys):
    bad = {"messages": [HELLO, HI], "label": False}
    for record in (*CHOSEN.values(), bad):
        assert run(tmp_path, record)[0] == 2
        assert (
            "data.json: a preference file (answers compared or judged)" in capsys.readouterr().err
        )
    words = ("--take-chosen",)
    status, samples, (lost,) = run(tmp_path, *CHOSEN.values(), bad, words=words)
    assert status == 0
    assert dict(zip(CHOSEN, samples, strict=True)) == dict.fromkeys(CHOSEN, PLAIN)
    assert lost["reason"] == "expected an answer to learn, got one that is judged bad"


def test_a_classification_label_is_no_preference(tmp_path):
    status, samples, _ = run(tmp_path, {"messages": [HELLO, HI], "label": 1})
    assert (status, samples) == (0, [{"meta": {"label": 1}, **PLAIN}])


def test_fields_that_nothing_reads_are_counted(tmp_path, capsys):
    named = {"messages": [{**HELLO, "name": "Ann", "time": 5}, {**HI, "time": None}]}
    assert run(tmp_path, named)[0] == 0
    assert "2  fields of messages that nothing here reads" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["lines", "data", "pretty", "marked", "blank"])
def test_json_of_every_shape(tmp_path, shape):
    records = [RECORDS["llava"][0], {"conversations": [GPT]}, 5]
    data = tmp_path / "data.json"
    picture(tmp_path / "a.png", 200, 100)
    lines = "\n".join(map(json.dumps, records)) + "\n"
    data.write_bytes(
        {
            "lines": lines.encode(),
            "blank": b"\n" + lines.replace("\n", "\n\n").encode(),
            "marked": b"\xef\xbb\xbf" + lines.encode(),
            "data": json.dumps({"version": 1, "data": records}).encode(),
            "pretty": json.dumps({"annotations": records, "n": [1]}, indent=2).encode(),
        }[shape]
    )
    status, samples, rejected = prepared(tmp_path / "out.jsonl", "adapt", "chat", data)
    assert (status, samples[0]) == (0, RECORDS["llava"][1])
    assert (len(samples), len(rejected)) == (2, 1)


def test_tables_with_bytes_and_nulls(tmp_path):
    datasets = pytest.importorskip("datasets")
    pixels = picture(tmp_path / "pixels.png", 20, 10).read_bytes()
    part = {"type": "text", "text": "What is it?", "image": None}
    rows = [
        {
            "id": f"{i}",
            "images": [{"bytes": pixels, "path": None}],
            "messages": [
                {"role": "user", "content": [{**part, "type": "image", "text": None}, part]},
                {"role": "assistant", "content": [{**part, "text": "A cat."}]},
            ],
        }
        for i in range(2)
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    for data in ("train.parquet", "saved"):
        out = tmp_path / data.partition(".")[0] / "made" / "out.jsonl"
        status, samples, rejected = prepared(out, "adapt", "chat", tmp_path / data)
        assert (status, rejected) == (0, [])
        names = [f"out_images/0000000{i}_0.png" for i in range(2)]
        assert samples == [{"id": f"{i}", **ONE, "images": [name]} for i, name in enumerate(names)]
        assert all((out.parent / name).read_bytes() == pixels for name in names)
