"""The rules of `prepare phrases`, case by case: what real answers have beyond plain captions."""

from __future__ import annotations

import json

import pytest

from groundkern.trainer.prepare.phrases.command import Finder
from groundkern.trainer.prepare.phrases.composites import composites
from groundkern.trainer.prepare.phrases.language import language_of, script_of
from groundkern.trainer.prepare.phrases.rules import is_date, noun_phrases
from groundkern.trainer.program import main
from tests.trainer.prepare.test_phrases import spoken, write


def heads(text):
    """Phrases with their heads, as "a red *hat*"."""
    return [phrase.removesuffix(head) + f"*{head}*" for phrase, head in spoken(text)]


CASES = {
    "contractions": [
        ("It's a dog.", ["a *dog*"]),
        ("It\u2019s a dog.", ["a *dog*"]),
        ("They're cats, aren't they?", ["*cats*"]),
        ("There's a hat on the bed.", ["a *hat*", "the *bed*"]),
        ("We've got two options.", ["two *options*"]),
        ("He'll open the door.", ["the *door*"]),
        ("I don't see any people.", ["any *people*"]),
        ("Drivers shouldn't park here.", ["*Drivers*"]),
        ("The boy who's waving is my brother.", ["The *boy*", "my *brother*"]),
        ("What's on the table?", ["the *table*"]),
    ],
    "possessives": [
        ("the dog's bone", ["the dog's *bone*"]),
        ("the dog\u2019s bone", ["the dog\u2019s *bone*"]),
        ("The dog's barking at the moon.", ["The *dog*", "the *moon*"]),
        ("The dog's wagging tail is long.", ["The dog's wagging *tail*"]),
        ("The cup's on the shelf.", ["The *cup*", "the *shelf*"]),
        ("the boys' red jackets", ["the boys' red *jackets*"]),
        ("James's car", ["James's *car*"]),
        ("someone's hand", ["someone's *hand*"]),
    ],
    "dates": [
        ("Sales rose in July.", ["*Sales*"]),
        ("It opens on Monday.", []),
        ("since last Friday", []),
        ("on Tuesday, 14 May 2024", []),
        ("on 5 june", []),
        ("in the 1920s", []),
        ("the March figures", ["the March *figures*"]),
        ("a Monday morning", ["a Monday *morning*"]),
        ("The band will march.", ["The *band*"]),
        ("Sept. 3 and Oct. 4", []),
    ],
    "adverbs": [
        ("However, the line falls.", ["the *line*"]),
        ("Therefore the bar is red.", ["the *bar*"]),
        ("Then, the man leaves.", ["the *man*"]),
        ("Overall, the photo is dark.", ["the *photo*"]),
        ("the overall score", ["the overall *score*"]),
        ("A child is also there.", ["A *child*"]),
        ("Meanwhile, a cat sleeps.", ["a *cat*"]),
        ("In contrast, the bus is empty.", ["the *bus*"]),
        ("As a result, prices rose.", ["*prices*"]),
    ],
    "hyphens": [
        ("a well-known actor", ["a well-known *actor*"]),
        ("the x-axis", ["the *x-axis*"]),
        ("a half-eaten apple", ["a half-eaten *apple*"]),
        ("a ten-year-old girl", ["a ten-year-old *girl*"]),
    ],
    "units": [
        ("about 750 ml of water", ["about 750 *ml*", "*water*"]),
        ("25 \u00b0C", ["25 *\u00b0C*"]),
        ("a limit of 50 km/h", ["a *limit*", "50 *km/h*"]),
        ("19 % VAT", ["19 % *VAT*"]),
        ("It rose by 12%.", ["*12%*"]),
        ("about $3 million", ["about $3 *million*"]),
        ("It costs \u20ac1,250.00.", ["*\u20ac1,250.00*"]),
        ("The room measures 3 m.", ["The *room*", "3 *m*"]),
    ],
    "abbreviations": [
        ("fruit, e.g. apples", ["*fruit*", "*apples*"]),
        ("Dr. Smith's office", ["Dr. Smith's *office*"]),
        ("the U.S. flag", ["the U.S. *flag*"]),
        ("St. James Avenue", ["St. James *Avenue*"]),
        ("cats, dogs, etc.", ["*cats*", "*dogs*"]),
    ],
    "lists": [
        ("- A blue mug\n- Two pencils", ["A blue *mug*", "Two *pencils*"]),
        ("1. **The title**\n2. The legend", ["The *title*", "The *legend*"]),
        ("* Width: 20 cm", ["*Width*", "20 *cm*"]),
        ("A red car\nTwo dogs", ["A red *car*", "Two *dogs*"]),
        ("a red\ncar", ["a red\n*car*"]),
        ("# Summary\nThe hat", ["*Summary*", "The *hat*"]),
    ],
    "quotes": [
        ('the "Stop" sign', ['the "Stop" *sign*']),
        ("the 'Save' button", ["the 'Save' *button*"]),
        ("the `main` function", ["the `main` *function*"]),
        ("The sign says 'Exit now'.", ["The *sign*"]),
        ("\u201cHello\u201d is on the wall", ["the *wall*"]),
    ],
    "verbs": [
        ("You can see a boat.", ["a *boat*"]),
        ("The label lists sugar and salt.", ["The *label*", "*sugar*", "*salt*"]),
        ("The scene conveys a calm mood.", ["The *scene*", "a calm *mood*"]),
        ("the company sales figures", ["the company sales *figures*"]),
        ("Profits peaked and dropped again.", ["*Profits*"]),
        ("A hill is partly covered by snow.", ["A *hill*", "*snow*"]),
        ("It is taller than Italy.", ["*Italy*"]),
        ("the number of visitors", ["the *number*", "*visitors*"]),
    ],
}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [pytest.param(*case, id=f"{kind}-{case[0][:24]}") for kind in CASES for case in CASES[kind]],
)
def test_phrases(text, wanted):
    assert heads(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It's a sunny day and the dog is barking.", []),
        ("It's a sunny day and the dog's barking.", []),
        ("A man and a woman are there.", ["A man and a woman"]),
        ("a lamp, a vase and some books, on a shelf", ["a lamp, a vase and some books"]),
        ("- a dog\n- a cat", []),
    ],
)
def test_composites(text, wanted):
    assert [text[a:b] for a, b in composites(text, noun_phrases(text))] == wanted


@pytest.mark.parametrize("text", ["last Monday", "May 5", "the 14th of July", "Sept. 3", "2 june"])
def test_dates(text):
    assert is_date(text)


@pytest.mark.parametrize(
    "text", ["a march", "the Monday meeting", "3 apples", "may", "the sun", ""]
)
def test_no_dates(text):
    assert not is_date(text)


JAPANESE, CHINESE = "\u72ac\u3068\u732b\u304c\u3044\u308b", "\u4e00\u53ea\u72d7"
RUSSIAN = "\u041a\u043e\u0448\u043a\u0430 \u0441\u043f\u0438\u0442"


@pytest.mark.parametrize(
    ("text", "script"),
    [
        (JAPANESE, "Japanese"),
        (CHINESE, "Chinese"),
        (RUSSIAN, "Cyrillic"),
        ("\uac1c\uac00 \uc788\ub2e4", "Korean"),
        ("\u0643\u0644\u0628", "Arabic"),
        ("\u0e2b\u0e21\u0e32", "Thai"),
        ("\u12cd\u123b", "of another script"),
        ("A caf\u00e9 na\u00efve \u0153uvre", None),
        (f"The sign says {CHINESE}.", None),
        ("\uff21\uff22\uff23", None),
        ("12 \u2192 3", None),
        ("", None),
    ],
)
def test_scripts(text, script):
    assert script_of(text) == script


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Der Hund und die Katze sind auf dem Sofa.", "German"),
        ("Le chien et le chat sont sur la table.", "French"),
        ("El perro y el gato est\u00e1n en la mesa con un ni\u00f1o.", "Spanish"),
        ("The die is cast in the van de Graaf lab.", None),
        ("Le Chien restaurant in Paris, a place with a view of the sea.", None),
        ("Hund, Katze, Maus", None),  # nothing tells
        ("", None),
    ],
)
def test_languages(text, language):
    assert language_of(text) == language


def test_what_the_rules_do_not_know_is_left_as_it_was_and_counted(tmp_path, capsys):
    """A mixed file loses no sample: English turns get phrases, others none, each is told."""
    german = "Der Hund und die Katze sind auf dem Sofa."
    command = write(tmp_path, "A dog.", JAPANESE, RUSSIAN, german)
    assert main([*command, "--by", "rules"]) == 0
    made = json.loads((tmp_path / "out.jsonl").read_text())
    assert made["phrases"][0] == {"text": "A dog", "turn": 0, "subject": "dog"}
    assert {phrase["turn"] for phrase in made["phrases"]} == {0, 3}
    shown = capsys.readouterr().out
    for name in ("Japanese", "Cyrillic"):
        told = f"1  answers left without phrases: `rules` knows English, these are {name} (--by"
        assert told in shown
    assert "1  answers that look German: rules knows English" in shown


def test_a_model_is_asked_whatever_the_language():
    assert Finder("model").unread(JAPANESE) is None
    assert Finder("rules").unread(JAPANESE) == "Japanese"
