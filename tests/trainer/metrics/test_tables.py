"""Tables as models write them, and RMS-F1 against DePlot's own test cases."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundkern.trainer.metrics.tables import (
    Table,
    number_set_similarity,
    parse_table,
    table_f1,
    table_scores,
)

quick = settings(max_examples=60, deadline=None, derandomize=True)

# deplot/metrics_test.py
TARGET = "title | my table\nyear | argentina | brazil\n1999 | 200 | 158\n"
TRANSPOSED = "title | my table\ncountry | 1999\nargentina | 200\nbrazil | 158\n"
PREDICTION = "title | my table\nyear | argentina | brazil\n1999 | 202 | 0\n"


def test_deplot_s_entries():
    assert dict(parse_table(TARGET).entries()) == {
        "title": "my table",
        "1999 argentina": "200",
        "1999 brazil": "158",
    }


@pytest.mark.parametrize("gold", [TARGET, TRANSPOSED])
def test_deplot_s_precision_recall_and_f1(gold):
    # 1 of the title and .99 of Argentina, of 3 entries
    assert table_scores(PREDICTION, gold) == pytest.approx((1.99 / 3,) * 3)


def test_deplot_s_datapoint_is_off_by_a_hundredth():
    table = "year | argentina\n1999 | {}"
    assert table_f1(table.format(202), table.format(200)) == pytest.approx(0.99)


def test_deplot_s_number_sets():
    assert number_set_similarity("0.5 | foo | 0.6", "0.5 | foo | 0.6") == 1
    assert number_set_similarity("0.5 | foo | 0.6", "baz | foo | 0.4") == pytest.approx(0.875)


EXPECTED = Table(None, ("year", "new york", "rome"), (("1999", "1,200", ""), ("2000", "3", "x y")))


@pytest.mark.parametrize(
    "text",
    [
        "Year | New York | Rome\n1999 | 1,200 |\n2000 | 3 | x y",
        "Year | New York | Rome <0x0A> 1999 | 1,200 |  <0x0A> 2000 | 3 | x y",
        "Year | New York | Rome<br>1999 | 1,200 | <br/>2000 | 3 | x y",
        "Year|New York|Rome\r\n1999|1,200|\r\n2000|3|x y\r\n",
        "| Year | New York | Rome |\n|---|---:|:-:|\n| 1999 | 1,200 | |\n| 2000 | 3 | x y |",
        "|Year|New York|Rome|\n|-|-|-|\n|1999|1,200||\n|2000|3|x y|",
        "Here it is:\n\n```markdown\n| Year | New York | Rome |\n| --- | --- | --- |\n"
        "| 1999 | 1,200 | |\n| 2000 | 3 | x y |\n```",
        "Year | New York | Rome\n--- | --- | ---\n1999 | 1,200 | \n2000 | 3 | x y",
        '```csv\nYear,New York,Rome\n1999,"1,200",\n2000,3,x y\n```',
        "Year;New York;Rome\n1999;1,200;\n2000;3;x y",
        "Year\tNew York\tRome\n1999\t1,200\t\n2000\t3\tx y",
    ],
)
def test_every_form_of_a_table(text):
    table = parse_table(text)
    filled = tuple((*row, "")[:3] for row in table.rows)
    assert table._replace(rows=filled) == EXPECTED


def test_titles_corners_and_pipes_of_cells():
    assert parse_table("TITLE | a | b\nx | y\n1 | 2").title == "a | b"
    assert parse_table(" | a | b\n1 | 2 | 3").headers == ("", "a", "b")
    assert parse_table("a | b\nx|y | 2").rows == (("x|y", "2"),)
    assert parse_table("| a | b |\n|---|---|\n| x\\|y | 2 |").rows == (("x|y", "2"),)
    assert parse_table("| a | b |\n| 1 | x\\|").rows == (("1", "x|"),)  # no pipe at the end
    assert parse_table("") == Table(None, (), ())
    assert parse_table("no table") == Table(None, ("no table",), ())


def test_headers_that_are_nearly_right_count_by_their_similarity():
    gold = "year | argentina\n1999 | 200"  # the key "1999 argentina" has 14 characters
    assert table_f1("year | argentino\n1999 | 200", gold) == pytest.approx(13 / 14)
    assert table_f1("year | brazil\n1999 | 200", gold) == 0.5  # 7 edits of 14; a half is kept
    assert table_f1("year | peru\n1999 | 200", gold) == 0


def test_rows_and_columns_may_be_in_any_order():
    gold = "year | a | b\n1999 | 1 | 2\n2000 | 3 | 4"
    assert table_f1("year | b | a\n2000 | 4 | 3\n1999 | 2 | 1", gold) == 1
    assert table_f1("of | 1999 | 2000\na | 1 | 3\nb | 2 | 4", gold) == 1


def test_numbers_count_up_to_an_error_of_a_tenth_and_texts_up_to_a_half():
    gold = "k | v\nrow | 100"
    values = {"100": 1, "95": 0.95, "109": 0.91, "110": 0, "90": 0, "-100": 0}
    for value, expected in values.items():
        assert table_f1(f"k | v\nrow | {value}", gold) == pytest.approx(expected)
    assert table_f1("k | v\nrow | abcx", "k | v\nrow | abcd") == 0.75
    assert table_f1("k | v\nrow | 100x", gold) == 0.75  # one of them a text


def test_a_missing_cell_costs_recall_and_one_too_many_precision():
    gold, less = "k | a | b\nr | 1 | 2", "k | a\nr | 1"
    assert table_scores(less, gold) == pytest.approx((1, 0.5, 2 / 3))
    assert table_scores(gold, less) == pytest.approx((0.5, 1, 2 / 3))


def test_f1_is_the_harmonic_mean_and_not_the_recall_as_in_deplot_s_code():
    scores = table_scores("k | a | b\nr | 1 | 2", "k | a\nr | 1")
    assert scores.f1 == pytest.approx(2 * 0.5 / 1.5)
    assert scores.f1 != scores.recall


@pytest.mark.parametrize(
    ("predicted", "gold"), [("0.0", "0"), ("1,234", "1234"), ("$5", "5"), ("\u22125", "-5")]
)
def test_numbers_that_are_texts_in_deplot_s_code(predicted, gold):
    table = "k | v\nrow | {}"
    assert table_f1(table.format(predicted), table.format(gold)) == 1


def test_percent_is_a_hundredth_as_in_deplot_s_code():
    table = "k | v\nrow | {}"
    assert table_f1(table.format("50%"), table.format("0.5")) == 1
    assert table_f1(table.format("50%"), table.format("50")) == 0


def test_a_row_that_is_repeated_costs_precision_which_it_does_not_in_deplot_s_code():
    scores = table_scores("k | v\nr | 1\nr | 1\nr | 1", "k | v\nr | 1")
    assert scores == pytest.approx((1 / 3, 1, 0.5))


def test_of_the_same_key_twice_the_nearer_value_is_taken():
    gold = "k | v\nr | 1\nr | 2"
    assert table_f1("k | v\nr | 2\nr | 1", gold) == 1


def test_no_table():
    assert table_scores("nothing", TARGET) == (1, 0, 0)
    assert table_scores(TARGET, "nothing") == (0, 1, 0)
    assert table_scores("a", "b") == (1, 1, 1)
    assert table_f1(TARGET, []) == 0
    assert table_f1(TARGET, ["nothing", TARGET]) == 1


def test_a_gold_zero_of_a_number_set_fits_just_zero():
    assert number_set_similarity("0", "0") == 1
    assert number_set_similarity("5", "0") == 0
    assert number_set_similarity("", "") == number_set_similarity("a", "b") == 1
    assert number_set_similarity("", "1") == number_set_similarity("1", "") == 0


cells = st.one_of(st.text(max_size=6), st.sampled_from(["1", "0", "-2.5", "5%", "|", " | ", "\n"]))
texts = st.lists(
    st.one_of(cells, st.sampled_from([" | ", "\n", "<0x0A>", "|---|", ",", '"', "title | "])),
    max_size=14,
).map("".join)


@quick
@given(texts, texts)
def test_every_text_has_values_from_0_to_1(predicted, gold):
    for value in (*table_scores(predicted, gold), number_set_similarity(predicted, gold)):
        assert 0 <= value <= 1 + 1e-12


@quick
@given(texts)
def test_the_same_table_is_right(text):
    assert table_f1(text, text) == pytest.approx(1)
    assert number_set_similarity(text, text) == pytest.approx(1)


def test_a_model_that_repeats_itself_takes_no_minute():
    table_f1("k | v\n" + "row | 1\n" * 1500, "k | v\n" + "row | 1\n" * 50)
