"""CSV for spreadsheets of any country: no cell of theirs begins with a formula, and the text can be
had back."""

import csv
import io
import random
import re
import unicodedata

import pytest

from fastsae.interpretation import tables

FORMULAS = [
    '=HYPERLINK("http://evil")',
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "＝1+1",
    "＋1",
    "－1",
    "＠SUM(1)",
    "﹢1",
    "﹦1",
    "\u22121+1",
]
BEFORE = [
    "",
    " ",
    "\u00a0",
    "\u3000",
    "\ufeff",
    "\u200b",
    "\u2060",
    '"',
    "'",
    "“",
    "\t",
    "\n",
    "\r",
    "\x00",
    "\x1c",
    "\x85",
    '" \ufeff"',
    "\u202e",
]
CELL = re.compile(r'"((?:[^"]|"")*)"?')


def written(*texts):
    return tables.csv_text([dict(enumerate(texts))], range(len(texts)))


def cells(text, separators):
    """Cells as a careless program reads them: cut at any of `separators` outside quotes that begin
    a cell."""
    found, at = [], 0
    while at < len(text):
        cell = ""
        if opened := CELL.match(text, at):
            cell, at = opened[1].replace('""', '"'), opened.end()
        rest = re.compile(f"[^{separators}\n]*").match(text, at)
        found.append(cell + rest[0])
        at = rest.end() + 1
    return found


def is_formula(cell):
    """Whether the first character that counts would begin a formula."""
    for character in cell:
        if unicodedata.category(character)[0] in "CZM" or character in "\"'“”":
            if character == "'":
                return False  # a spreadsheet's mark for text
            continue
        return unicodedata.normalize("NFKC", character) in ("=", "+", "-", "@", "\u2212")
    return False


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(
    "cut", ["", "hello;", "hello\t", "hello\n", "hello|", 'a "quoted"; ', "a, b;", '";"']
)
def test_no_cell_begins_with_a_formula(formula, cut):
    for before in BEFORE:
        text = written(f"{cut}{before}{formula}", "b")
        for separators in (",", ";", "\t", "|", ",;\t"):
            assert not [cell for cell in cells(text, separators) if is_formula(cell)], (
                text,
                separators,
            )


def test_the_text_comes_back_but_for_the_guard():
    random.seed(0)
    alphabet = ["=", "-", ";", ",", "\t", "\n", '"', "'", " ", "a", "\u200b", "＝", "|"]
    texts = ["".join(random.choices(alphabet, k=random.randrange(9))) for _ in range(3000)]
    read = list(csv.reader(io.StringIO(written(*texts), newline="")))[1]
    for text, found in zip(texts, read, strict=True):
        guarded = tables.BEFORE_FORMULA.sub("'", text)
        assert found == guarded and len(guarded) - len(text) <= 1 + sum(map(text.count, ";\t\n|"))
        if not any(character in text for character in "=-＝") and not text.startswith(("\t", "\n")):
            assert found == text


def test_ordinary_labels_stay_as_they_are():
    for text in (
        "mentions bread; the rest follows",
        "a well-known fact",
        "x = y",
        "me@example.org",
        "1, -2",
        "a | b",
        "größe",
        "C++",
    ):
        assert tables.BEFORE_FORMULA.sub("'", text) == text
    assert next(csv.reader(io.StringIO(written(-0.5, 3, None, True)), ["-"]))  # numbers are no text
    assert written(-0.5, 3, None).splitlines()[1] == "-0.5,3,"


def test_the_guard_takes_time_linear_in_the_text():
    for text in (" " * 300_000, "\t" * 300_000, ';"' * 150_000, "\u200b;" * 150_000):
        assert len(tables.BEFORE_FORMULA.sub("'", text)) <= len(text) + 1
