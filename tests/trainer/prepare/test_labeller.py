"""The labeller of `prepare marks`, and the chat client, against a local endpoint."""

import base64
import io
import json
import os
import signal

import pytest
from PIL import Image

from groundkern.trainer.prepare.marks.drawing import draw_marks
from groundkern.trainer.prepare.marks.labeller import BadMarks, Mark, parse_marks
from groundkern.trainer.program import main
from tests.trainer.prepare.endpoint import KEY, completion, serving

ANSWER = "Germany sold 12 units."
MARKED = "<MARK 1>Germany</MARK> sold <MARK 2>12</MARK> units."
WORDS = [{"text": "Germany", "box": [10, 10, 60, 20]}, {"text": "12.0", "box": [10, 60, 30, 70]}]


def test_marks_are_read_and_taken_out():
    reply = "\n<MARK 1, 3>Germany</MARK> sold <MARK 2>12</MARK> units. \n"
    marks = parse_marks(reply, f" {ANSWER}", {"1", "2", "3"})
    assert marks == [Mark(1, 8, ("1", "3")), Mark(14, 16, ("2",))]
    assert parse_marks(ANSWER, ANSWER, {"1"}) == []
    assert parse_marks("<MARK 1,1>a</MARK>", "a", {"1"}) == [Mark(0, 1, ("1",))]


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("<MARK 9>Germany</MARK> sold 12 units.", "ids of regions that are there, got 9"),
        ("<MARK 01>Germany</MARK> sold 12 units.", "got 01"),
        ("<MARK 1>Germany sold <MARK 2>12</MARK></MARK> units.", "before the next mark"),
        ("<MARK 1>Germany sold 12 units.", "stays open"),
        ("Germany</MARK> sold 12 units.", "before </MARK>, got none"),
        ("<MARK 1></MARK>Germany sold 12 units.", "a phrase within"),
        ("<mark 1>Germany</mark> sold 12 units.", "written <MARK ID>"),
        ("<MARK>Germany</MARK> sold 12 units.", "before </MARK>"),
        ("<MARK one>Germany sold 12 units.", "written <MARK ID>"),
        ("<MARK 1>Germany</MARK> sold 12 unit.", "'.' in place of 's.' at character 20"),
        ("<MARK 1>Germany</MARK>", "the answer itself"),
        ("Here you are: <MARK 1>Germany</MARK> sold 12 units.", "the answer itself"),
        ("", "the answer itself"),
    ],
)
def test_a_reply_that_is_not_the_answer_with_valid_marks(reply, why):
    with pytest.raises(BadMarks, match="expected ") as error:
        parse_marks(reply, ANSWER, {"1", "2"})
    assert why in str(error.value)


def test_masks_are_see_through_and_numbered():
    image = Image.new("RGB", (400, 200), "white")
    image.putpixel((120, 60), (0, 0, 0))
    drawn = draw_marks(image, {"1": (100, 50, 200, 80), "2": (0, 100, 400, 120)}, alpha=0.5)
    assert drawn.size == image.size
    over_paper, over_ink = drawn.getpixel((150, 60)), drawn.getpixel((120, 60))
    assert over_paper != (255, 255, 255) and sum(over_ink) < sum(over_paper)
    assert drawn.getpixel((300, 20)) == (255, 255, 255)
    left_of_box = drawn.crop((80, 50, 99, 80)).getcolors()
    assert len(left_of_box) > 1, "the number"
    assert draw_marks(image, {}, max_side=100).size == (100, 50)


@pytest.fixture
def make(tmp_path):
    """Writes samples and gives the command that labels them."""
    pytest.importorskip("openai", reason="needs the package openai")

    def command(*answers, words=WORDS, **options):
        Image.new("RGB", (100, 100), "white").save(tmp_path / "a.png")
        lines = [
            {
                "images": ["a.png"],
                "messages": [
                    {"role": "user", "content": "How many?"},
                    {"role": "assistant", "content": answer},
                ],
                "words": words,
            }
            for answer in answers
        ]
        path = tmp_path / "samples.jsonl"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if not path.exists() or path.read_text() != text:  # a rerun compares the file's time
            path.write_text(text)
        more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [
            "prepare", "marks", str(path), "--output", str(tmp_path / "out.jsonl"),
            "--by", "model", "--model", "tiny", "--workers", "1",
            *(word.replace("_", "-") for word in more),
        ]  # fmt: skip

    return command


def outcome(tmp_path):
    """(regions of each sample, reasons of the rejected)."""
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    rejected = tmp_path / "out.jsonl.rejected.jsonl"
    reasons = rejected.read_text().splitlines() if rejected.exists() else []
    return [json.loads(line)["regions"] for line in lines], [
        json.loads(r)["reason"] for r in reasons
    ]


def test_a_sample_is_asked_with_masks_and_labelled(make, tmp_path, monkeypatch, capsys):
    with serving(lambda _: MARKED, monkeypatch) as server:
        assert main(make(ANSWER, price_in=2, price_out=10)) == 0
    regions, _ = outcome(tmp_path)
    assert regions == [
        [
            {"text": "Germany", "box": [10.0, 10.0, 60.0, 20.0]},
            {"text": "12", "box": [10.0, 60.0, 30.0, 70.0]},
        ]
    ]
    (request,) = server.requests
    picture, text = request["messages"][1]["content"]
    data = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (100, 100)
    assert "1: Germany\n2: 12.0" in text["text"] and "How many?" in text["text"]
    assert request["model"] == "tiny" and request["temperature"] == 0
    assert server.sent[0]["authorization"] == f"Bearer {KEY}"
    shown = capsys.readouterr()
    assert "1  requests, 100 tokens in, 10 out, cost 0.0003, this run" in shown.out
    everything = (
        shown.out
        + shown.err
        + "".join(
            path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()
        )
    )
    assert KEY not in everything and server.url not in everything


def test_what_was_answered_is_not_asked_again(make, tmp_path, monkeypatch, capsys):
    with serving(lambda _: MARKED, monkeypatch) as server:
        assert main(make(ANSWER, ANSWER)) == 0
        assert len(server.requests) == 1
        assert main([*make(ANSWER, ANSWER), "--overwrite"]) == 0
        assert len(server.requests) == 1
        assert "0  requests" in capsys.readouterr().out
        assert main([*make(ANSWER), "--overwrite", "--alpha", "0.5"]) == 0
        assert len(server.requests) == 2, "another picture is another question"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_errors_are_retried(make, tmp_path, monkeypatch, status):
    answers = iter([(status, {"error": {"message": "busy"}})] * 2 + [MARKED])
    with serving(lambda _: next(answers), monkeypatch) as server:
        assert main(make(ANSWER)) == 0
    assert len(server.requests) == 3 and len(outcome(tmp_path)[0][0]) == 2


@pytest.mark.parametrize(
    "reply",
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}),
        (404, {"error": {"message": "no such model"}}),
        (500, {"error": {"message": "down"}}),
        (200, b"<html>a proxy</html>"),
        (200, {"choices": []}),
        (200, [1]),
    ],
)
def test_an_endpoint_that_does_not_serve_stops_the_run(make, tmp_path, monkeypatch, capsys, reply):
    works = iter([MARKED])
    with serving(lambda _: next(works, reply), monkeypatch):
        assert main(make(ANSWER, "12 units", max_retries=1)) == 1
    error = capsys.readouterr().err
    assert "the endpoint failed" in error and "continues from here" in error
    assert KEY not in error
    assert not (tmp_path / "out.jsonl").exists(), "nothing is taken for finished"
    with serving(lambda _: "<MARK 2>12</MARK> units", monkeypatch) as server:
        assert main(make(ANSWER, "12 units", max_retries=0)) == 0
    assert len(server.requests) == 1, "the first sample is kept"
    regions, rejected = outcome(tmp_path)
    assert [len(each) for each in regions] == [2, 1] and not rejected


def test_a_refused_request_rejects_its_sample(make, tmp_path, monkeypatch):
    answers = iter([(400, {"error": {"message": "too long"}}), MARKED])
    with serving(lambda _: next(answers), monkeypatch):
        assert main(make("12 units", ANSWER)) == 0
    regions, rejected = outcome(tmp_path)
    assert len(regions) == 1 and len(rejected) == 1
    assert "messages[1]" in rejected[0] and "too long" in rejected[0]


def test_garbage_is_asked_again_with_the_reason_and_then_rejected(make, tmp_path, monkeypatch):
    with serving(lambda _: "I see a chart.", monkeypatch) as server:
        assert main(make(ANSWER, attempts=3)) == 0
    assert outcome(tmp_path)[0] == [] and "the answer itself" in outcome(tmp_path)[1][0]
    assert [len(request["messages"]) for request in server.requests] == [2, 4, 6]
    assert "That does not fit" in server.requests[1]["messages"][3]["content"]


def test_a_better_second_reply_counts(make, tmp_path, monkeypatch):
    answers = iter(["sorry", MARKED])
    with serving(lambda _: next(answers), monkeypatch):
        assert main(make(ANSWER)) == 0
    assert len(outcome(tmp_path)[0][0]) == 2


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_half_an_answer_is_rejected_counted_and_not_cached(
    make, tmp_path, monkeypatch, finish, capsys
):
    with serving(lambda _: (200, completion(MARKED, finish)), monkeypatch) as server:
        assert main(make(ANSWER)) == 0
        assert main([*make(ANSWER), "--overwrite"]) == 0
    assert len(server.requests) == 2 and "no whole answer" in outcome(tmp_path)[1][0]
    assert "2  requests, 200 tokens in" in capsys.readouterr().out


def test_a_mark_on_other_text_is_dropped_unless_wanted(make, tmp_path, monkeypatch, capsys):
    wrong = "<MARK 2>Germany</MARK> sold <MARK 2>12</MARK> units."
    with serving(lambda _: wrong, monkeypatch):
        assert main(make(ANSWER)) == 0
        assert [r["text"] for r in outcome(tmp_path)[0][0]] == ["12"]
        assert "1  marks of the model dropped" in capsys.readouterr().out
        assert main([*make(ANSWER), "--any-text", "--overwrite"]) == 0
        assert [r["text"] for r in outcome(tmp_path)[0][0]] == ["Germany", "12"]


def test_what_is_not_worth_asking(make, tmp_path, monkeypatch):
    with serving(lambda _: MARKED, monkeypatch) as server:
        assert main(make("an <MARK 1> in it", ANSWER, max_regions=1)) == 0
        assert "without <MARK" in outcome(tmp_path)[1][0]
        assert "at most 1 text regions" in outcome(tmp_path)[1][1]
        assert (
            main([*make(ANSWER, words=[{"text": "--", "box": [0, 0, 5, 5]}]), "--overwrite"]) == 0
        )
        assert outcome(tmp_path)[0] == [[]], "no text, no question"
    assert not server.requests


def test_missing_settings_are_said(make, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(make(ANSWER)) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err
    command = make(ANSWER)
    del command[command.index("--model") : command.index("--model") + 2]
    assert main(command) == 2
    assert "--model" in capsys.readouterr().err


def test_ctrl_c_and_the_same_command_again(make, tmp_path, monkeypatch, capsys):
    answers = [f"{n} units" for n in range(12, 20)]

    def interrupt(request):
        if len(server.requests) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return request["messages"][1]["content"][1]["text"].splitlines()[-1]

    with serving(interrupt, monkeypatch) as server:
        assert main(make(*answers)) == 130
        assert "continues from there" in capsys.readouterr().err
        asked = len(server.requests)
        assert asked < len(answers)
        assert main(make(*answers)) == 0
        assert len(server.requests) <= len(answers) + 1, "at most the interrupted one twice"
    assert len(outcome(tmp_path)[0]) == len(answers)


def test_workers_ask_at_once_and_share_the_cache(make, tmp_path, monkeypatch):
    answers = [f"{n} units" for n in range(12, 18)]
    text = lambda request: request["messages"][1]["content"][1]["text"].splitlines()[-1]  # noqa: E731
    with serving(text, monkeypatch) as server:
        command = make(*answers)
        command[command.index("--workers") + 1] = "2"
        assert main(command) == 0
        assert len(server.requests) == len(answers)
    assert len(outcome(tmp_path)[0]) == len(answers)
    used = (tmp_path / "out.jsonl.cache" / "usage.jsonl").read_text().splitlines()
    assert [json.loads(line)["requests"] for line in used] == [1] * len(answers)
