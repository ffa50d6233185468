"""Rules in the words of a reader: "“the” after prepositions; months"."""

from fastsae.data.token_text import visible
from fastsae.interpretation.rules import Rule

LONGEST = 60  # characters of a category's name that are written out

MODIFIERS = {
    "previous": "after {}",
    "previous class": "after {}",
    "previous shape": "after {}",
    "recent": "shortly after {}",
    "sentence": "with {} before it in the sentence",
    "sentence place": "{} of a sentence",
    "turn place": "{} of a turn",
    "inside": "inside {}",
    "role": "in the {}'s text",
    "category": "in texts of category {}",
    "position in word": "(later part of a word)",
}
SHAPES = {
    "capitalised": "capitalised words",
    "lower case": "words in lower case",
    "capitals": "words in capitals",
    "number": "numbers",
    "symbol": "symbols",
    "line break": "line breaks",
    "space": "spaces",
    "part of a character": "parts of a character",
    "letters without case": "letters without case",
}
SHOWN = {
    "\ufffd": "a part of a character",
    "␠": "a lone space",
    "⏎": "a line break",
    "⏎⏎": "an empty line",
}


def in_words(rule: Rule) -> str:
    """A rule in words: "the numbers after “page”; months"."""
    return "; ".join(
        " ".join([_noun(*one[0]), *(_modifier(*condition) for condition in one[1:])])
        for one in rule["any"]
    )


def _noun(name, values):
    if name in ("token", "class", "shape", "quotation"):
        return _listed(name, values)
    if name.endswith("place"):
        said = _modifier(name, values)
        return said.replace("as ", "the ", 1).replace("among the first", "one of the first", 1)
    noun = {
        "forms": "forms of {}",
        "word": "the last part of {}",
        "begins": "words beginning with {}",
        "ends": "words ending in {}",
        "position in word": "later parts of words",
        "template": "tokens of the chat template",
        "inside": "text inside {}",
        "role": "the {}'s text",
        "category": "texts of category {}",
    }.get(name)
    return (noun or "anything " + MODIFIERS[name]).format(_listed(name, values))


def _modifier(name, values):
    if name == "shape" and values[0] in ("capitalised", "lower case", "capitals"):
        return {"capitalised": "(capitalised)", "lower case": "(lower case)"}.get(
            values[0], "(in capitals)"
        )
    return MODIFIERS.get(name, "({})").format(_listed(name, values))


def _listed(name, values):
    if name.endswith("place"):
        return _places(sorted(map(int, values)))
    shown = [SHOWN.get(value) or _quoted(name, value) for value in values]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _places(places):
    """ "as 1st token", "among the first 3 tokens", "as 2nd to 5th token"."""
    first, last = places[0], places[-1]
    if len(places) > 1 and first == 1 and last == len(places):
        return f"among the first {last} tokens"
    words = [{1: "1st", 2: "2nd", 3: "3rd"}.get(place, f"{place}th") for place in places]
    if len(places) > 2 and last - first == len(places) - 1:
        return f"as {words[0]} to {words[-1]} token"
    return f"as {' or '.join(words)} token"


def _quoted(name, value):
    if name in ("class", "previous class", "inside", "role", "quotation"):
        return value
    if name in ("shape", "previous shape"):
        return SHAPES.get(value, value)
    if name == "ends":
        return f"“-{value}”"
    shown = visible(value)
    return f"“{shown}”" if len(shown) <= LONGEST else f"“{shown[:LONGEST]}…”"
