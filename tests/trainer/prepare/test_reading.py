"""Large JSON arrays element by element, pickles that may run nothing, joins on disk."""

import json
import os
import pickle

import pytest

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.reading import Table, json_array, plain_pickle


def file(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 16])
def test_elements_come_as_json_has_them(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("groundkern.trainer.prepare.reading._CHUNK", chunk)
    values = [1, -2.5e3, 'é☕ " ] ,', [], {}, [1, [2]], {"a": [1, {"b": None}]}, True, 12345, ""]
    other = {"before": values, "n": 7, "data": values, "after": [1]}
    for text in (json.dumps(values), json.dumps(values, indent=1, ensure_ascii=False)):
        assert list(json_array(file(tmp_path, text))) == values
        assert list(json_array(file(tmp_path, "\ufeff \n" + text + "\n"), "data")) == values
    assert list(json_array(file(tmp_path, json.dumps(other)), "data")) == values
    assert list(json_array(file(tmp_path, "[]"))) == []
    assert list(json_array(file(tmp_path, '{"a": 1, "data": [ ]}'), "data")) == []


def test_numbers_that_are_none_are_left_to_the_records(tmp_path):
    values = list(json_array(file(tmp_path, "[NaN, Infinity, 1]")))
    assert values[1:] == [float("inf"), 1]
    assert values[0] != values[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "a.json: character 5: expected ','"),
        ("[1 2]", "a.json: character 3: expected ','"),
        ("[1, }]", "a.json: character 4: expected JSON"),
        ('["abc', "a.json: character 1: expected JSON"),
        ("[" * 100_000, "a.json: character"),
        (b'["\xff"]', "expected UTF-8 text"),
    ],
)
def test_what_is_not_json_says_where(tmp_path, text, message):
    with pytest.raises(SampleError, match=r"a\.json") as caught:
        list(json_array(file(tmp_path, text)))
    assert message in str(caught.value)


@pytest.mark.parametrize(("text", "key"), [("{}", "data"), ("{}", None), ("3", "data"), ("", None)])
def test_a_file_without_the_array(tmp_path, text, key):
    with pytest.raises(ConfigError, match="array"):
        list(json_array(file(tmp_path, text), key))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(json_array(tmp_path / "none.json"))


def test_an_element_too_large_to_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("groundkern.trainer.prepare.reading.MAX_LINE", 100_000)
    path = file(tmp_path, json.dumps(["short", "x" * 400_000]))
    elements = json_array(path)
    assert next(elements) == "short"
    with pytest.raises(SampleError, match="values of at most 100000 characters"):
        next(elements)


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_pickle_may_hold_plain_values_of_either_python(tmp_path):
    values = [{"a": [1, 2.5, "é", None, True], "b": (1,)}, {1, 2}, frozenset([3]), 10**30]
    for protocol in range(6):
        path = tmp_path / f"{protocol}.p"
        path.write_bytes(pickle.dumps(values, protocol))
        if protocol < 2:  # sets are made by copyreg._reconstructor there
            path.write_bytes(pickle.dumps([values[0], values[3]], protocol))
        assert plain_pickle(path)[0] == values[0]
    python2 = b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsS'id'\np4\nI7\nsa."
    (tmp_path / "2.p").write_bytes(python2)
    assert plain_pickle(tmp_path / "2.p") == [{"sent": "caf\xe9", "id": 7}]


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_something_is_refused(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.p"
    path.write_bytes(pickle.dumps([1, Runs()], protocol))
    with pytest.raises(ConfigError, match=r"it would load (posix|nt)\.system"):
        plain_pickle(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"no pickle", pickle.dumps([1, 2])[:-3], b"\x80\x05P1\n."])
def test_a_damaged_pickle(tmp_path, data):
    (tmp_path / "bad.p").write_bytes(data)
    with pytest.raises(ConfigError, match="expected a pickle of plain values"):
        plain_pickle(tmp_path / "bad.p")


def test_a_table_keeps_order_and_tells_types_apart():
    table = Table()
    for key, value in ((2, "a"), ("2", "b"), (2, [1.5, None]), (1, {"x": 1})):
        table.add(key, value)
    assert table.get(2) == ["a", [1.5, None]]
    assert table.get("2") == ["b"]
    assert table.get(9) == []
    assert list(table.groups()) == [(2, ["a", [1.5, None]]), ("2", ["b"]), (1, [{"x": 1}])]
