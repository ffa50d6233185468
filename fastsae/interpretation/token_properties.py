"""What can be said of a token from itself and from what stands before it: its text, its word, its
place, the words before it.

Each statement is a *condition*, a property with a value: ("token", "of"), ("begins", "m"),
("previous shape", "number"). Nothing looks at what follows a token, since a causal model has not
read it. `condition_table` holds which conditions are true of which tokens as a sparse table, from
which `rules` finds labels; the same table made of a new text says where a rule fires there.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastsae.data.token_text import visible
from fastsae.data.tokenization import CONTENT, ROLES

RECENT = 6  # tokens before the previous one that count as shortly before
SENTENCE_REACH = 32  # tokens back in the sentence that are looked at
MAX_WORD = 24  # characters of a word that are kept
# first tokens of a sentence, and of a turn, that are told apart
SENTENCE_PLACES, TURN_PLACES = 5, 8
LONGEST_END = 4  # letters of an ending
LONGEST_START = 3  # letters of a beginning

# Closed classes of English words, as a reader would name them. Languages without such words lose
# only these conditions.
WORD_CLASSES = {
    "months": "january february march april may june july august september october november "
    "december",
    "days of the week": "monday tuesday wednesday thursday friday saturday sunday",
    "numbers in words": "zero one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty "
    "seventy eighty ninety hundred thousand million billion dozen half",
    "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth last",
    "first-person pronouns": "i me my mine myself we us our ours ourselves",
    "second-person pronouns": "you your yours yourself yourselves",
    "third-person pronouns": "he him his himself she her hers herself they them their theirs "
    "themselves it its itself",
    "possessives": "my your his her its our their whose",
    "articles": "a an the",
    "demonstratives": "this that these those",
    "prepositions": "of in on at by for with about against between into through during before "
    "after above below to from up down over under near behind beside across along around toward "
    "towards within without upon onto off out past",
    "conjunctions": "and or but nor so yet because although though while if unless until since "
    "when where whereas whether than as",
    "forms of to be": "am is are was were be been being",
    "forms of to have": "have has had having",
    "modal verbs": "can could may might must shall should will would",
    "question words": "who whom whose what which when where why how",
    "negations": "no not none never nothing nobody neither nor nowhere without cannot n't",
    "words of quantity": "all any both each every few many more most much several some less least "
    "enough",
    "words of frequency": "always usually often sometimes rarely seldom never again once twice",
    "units of time": "second seconds minute minutes hour hours day days week weeks month months "
    "year years decade century morning evening night afternoon",
    "family members": "mother father mom mum dad brother sister son daughter aunt uncle cousin "
    "grandmother grandfather grandma wife husband parents child children baby family nephew niece",
    "colours": "red orange yellow green blue purple violet pink brown black white grey gray",
    "parts of the body": "head face eyes eye hand hands arm arms leg legs foot feet back shoulder "
    "shoulders chest heart stomach mouth lips finger fingers thumb knee knees neck hair skin",
    "verbs of thinking": "think thought know knew known believe believed remember remembered "
    "realize realized realise realised wonder wondered understand understood decide decided "
    "imagine imagined consider considered guess suppose notice noticed",
    "verbs of saying": "say says said tell tells told ask asks asked answer answered reply replied "
    "explain explained speak spoke talk talked whisper whispered",
}
# forms that no ending tells: base, then its forms
IRREGULAR = """
be am is are was were been being|have has had having|do does did done doing
go goes went gone going|come came|say said|see saw seen|take took taken|get got gotten|make made
know knew known|think thought|tell told|find found|give gave given|feel felt|leave left
keep kept|hold held|stand stood|hear heard|sit sat|run ran|write wrote written|lose lost
bring brought|buy bought|pay paid|meet met|speak spoke spoken|begin began begun
break broke broken|fall fell fallen|send sent|build built|spend spent|lie lay lain
rise rose risen|sleep slept|eat ate eaten|teach taught|catch caught|choose chose chosen
drive drove driven|wear wore worn|grow grew grown|draw drew drawn|show showed shown|mean meant
win won|sell sold|forget forgot forgotten|understand understood|wake woke woken|fly flew flown
throw threw thrown|ring rang rung|sing sang sung|swim swam swum|lead led|child children|man men
woman women|foot feet|tooth teeth|person people
"""
BASE_OF = {
    form: forms.split()[0]
    for forms in IRREGULAR.strip().replace("\n", "|").split("|")
    for form in forms.split()
}
# "for" is no form of "fore"
WITHOUT_FORMS = {
    word
    for name in ("prepositions", "conjunctions", "articles", "question words", "demonstratives")
    for word in WORD_CLASSES[name].split()
}
CLASSES_OF_WORD: dict[str, list[str]] = {}
for _name, _words in WORD_CLASSES.items():
    for _word in _words.split():
        CLASSES_OF_WORD.setdefault(_word, []).append(_name)

QUOTES, OPENING, CLOSING = '"“”«»', "([{", ")]}"
LETTERS = re.compile(r"[^\W\d_]+")
PIECE = "\ufffd"


@dataclass(frozen=True)
class TokenRun:
    """Tokens of examples one after the other, as much as properties need of them.

    texts: the distinct texts of tokens; text (n,): which of them each token has; example (n,): the
    number of its example, ascending; kind, role (n,): as in the activations file; category: of
    each example number, None where it has none.
    """

    texts: Sequence[str]
    text: np.ndarray
    example: np.ndarray
    kind: np.ndarray
    role: np.ndarray
    category: Sequence[str | None]

    @classmethod
    def of_texts(
        cls,
        texts: Sequence[str],
        *,
        kind: Sequence[int] | None = None,
        role: Sequence[int] | None = None,
        category: str | None = None,
    ) -> "TokenRun":
        """One example from the texts of its tokens, spaces before words included.

        kind, role: (n,) as in the activations file; None = content of no role.
        """
        distinct, text = np.unique(np.asarray(texts, object), return_inverse=True)
        n = len(texts)
        return cls(
            [str(t) for t in distinct],
            text.astype(np.int64),
            np.zeros(n, np.int64),
            np.zeros(n, np.int64) if kind is None else np.asarray(kind, np.int64),
            np.zeros(n, np.int64) if role is None else np.asarray(role, np.int64),
            [category],
        )


class ConditionTable:
    """Which conditions hold of which tokens.

    names: of each condition, (property, value); indices, indptr: the numbers of the conditions of
    token i are indices[indptr[i] : indptr[i + 1]], each once, ascending.
    """

    def __init__(
        self, names: Sequence[tuple[str, str]], indices: np.ndarray, indptr: np.ndarray
    ) -> None:
        self.names, self.indices, self.indptr = names, indices, indptr

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def rows(self, tokens: np.ndarray) -> "ConditionTable":
        """The table of some tokens only, in the order given."""
        lengths = np.diff(self.indptr)[tokens]
        return ConditionTable(
            self.names,
            self.indices[spans(self.indptr[tokens], lengths)],
            np.concatenate([[0], np.cumsum(lengths)]),
        )

    @functools.cached_property
    def number_of(self) -> dict[tuple[str, str], int]:
        """{`key` of a condition: its number}."""
        return {key(*name): i for i, name in enumerate(self.names)}

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """(n_conditions,) of how many tokens each holds."""
        return np.bincount(self.indices, minlength=len(self.names))

    @functools.cached_property
    def _by_condition(self):
        token = np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.indptr))
        order = np.argsort(self.indices, kind="stable")
        return token[order], np.concatenate([[0], np.cumsum(self.counts)])

    def tokens(self, condition: int) -> np.ndarray:
        """The tokens of which a condition holds, ascending."""
        token, start = self._by_condition
        return token[start[condition] : start[condition + 1]]

    def conditions(self, tokens: np.ndarray) -> np.ndarray:
        """The numbers of the conditions of these tokens, one after the other."""
        return self.indices[spans(self.indptr[tokens], np.diff(self.indptr)[tokens])]


def key(name: str, value: str) -> tuple[str, str]:
    """What two conditions have in common that are the same: of forms of a word any will do."""
    return name, stem(value) if name == "forms" else value


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... for lengths[0] numbers, then those of the next."""
    offset = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + offset


def condition_table(run: TokenRun, least: int = 1) -> ConditionTable:
    """The conditions that hold of at least so many tokens of a run.

    Memory: about 25 numbers of 4 bytes a token, and six times as much while it is made.
    """
    columns = Columns(run)
    names: list[tuple[str, str]] = []
    rows, numbers = [], []
    for property_name, values, row, code in columns.all():
        rows.append(row.astype(np.int32))
        numbers.append((code + len(names)).astype(np.int32))
        names += [(property_name, value) for value in values]
    row, number = np.concatenate(rows), np.concatenate(numbers)
    often = np.bincount(number, minlength=len(names)) >= least
    renumbered = np.cumsum(often) - 1
    row, number = row[often[number]], renumbered[number[often[number]]]
    names = [name for name, keep in zip(names, often) if keep]
    flat = np.sort(row.astype(np.int64) * len(names) + number)
    flat = flat[np.diff(flat, prepend=-1) > 0]  # a word that came before twice counts once
    counts = np.bincount(flat // max(len(names), 1), minlength=len(run.text))
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return ConditionTable(names, (flat % max(len(names), 1)).astype(np.int32), indptr)


class Columns:
    """The properties of a run's tokens, each as (name, values, tokens, (number of the value))."""

    def __init__(self, run: TokenRun) -> None:
        self.run = run
        self.n = len(run.text)
        texts = list(run.texts)
        bare = [text.strip() for text in texts]
        self.names, self.name_of_text = numbered(
            [visible(b.lower() or t) for b, t in zip(bare, texts)]
        )
        self.bare = bare
        self.name = self.name_of_text[run.text]  # (n,)
        self.shapes, shape_of_text = numbered([shape(text) for text in texts])
        self.shape = shape_of_text[run.text]
        self.previous = self._previous()
        self.continues = self._continues()
        self.sentence = self._sentences()

    def all(self) -> Iterator[tuple[str, list[str], np.ndarray, np.ndarray]]:
        """Yield (property, values, tokens (nnz,), numbers of values (nnz,)) of every property."""
        everywhere = np.arange(self.n)
        yield "token", self.names, everywhere, self.name
        yield "shape", self.shapes, everywhere, self.shape
        yield "class", *self._by_text(lambda bare: CLASSES_OF_WORD.get(bare.lower(), []))
        begin = ~self.continues
        yield "forms", *self._forms()
        yield "begins", *self._by_text(beginnings, begin)
        yield "ends", *self._by_text(endings)
        yield "word", *self._words()
        yield (
            "position in word",
            ["later part"],
            np.flatnonzero(self.continues),
            np.zeros(int(self.continues.sum()), np.int64),
        )
        before = np.flatnonzero(self.previous >= 0)
        before = before[self._read(before, self.previous[before])]
        earlier = self.previous[before]
        yield "previous", self.names, before, self.name[earlier]
        yield "previous shape", self.shapes, before, self.shape[earlier]
        values, rows, codes = self._by_text(lambda bare: CLASSES_OF_WORD.get(bare.lower(), []))
        yield "previous class", values, *self._moved(rows, codes)
        yield "recent", self.names, *self._recent()
        yield "sentence", self.names, *self._earlier_in_sentence()
        yield "sentence place", *self._places(self.sentence, SENTENCE_PLACES)
        yield "turn place", *self._places(self._turns(), TURN_PLACES)
        inside = self._inside()
        yield "inside", *inside
        yield "quotation", *self._quotation_marks(inside[1][inside[2] == 0])
        content = np.flatnonzero((self.run.kind == CONTENT) & (self.run.role > 0))
        yield "role", list(ROLES), content, self.run.role[content]
        template = np.flatnonzero(self.run.kind != CONTENT)
        yield "template", ["token"], template, np.zeros(len(template), np.int64)
        categories, of_example = numbered([c or "" for c in self.run.category])
        category = of_example[self.run.example]
        known = np.flatnonzero(np.array([bool(c) for c in categories])[category])
        yield "category", categories, known, category[known]

    def _by_text(
        self, values_of: Callable[[str], Sequence[str]], where: np.ndarray | None = None
    ) -> tuple[list[str], np.ndarray, np.ndarray]:
        """(values, tokens, numbers) of a property that a token's own text decides."""
        lists = [values_of(text) for text in self.bare]
        values, flat = numbered([value for one in lists for value in one])
        lengths = np.array([len(one) for one in lists], np.int64)
        start = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.flatnonzero(
            lengths[self.run.text] if where is None else (lengths[self.run.text] > 0) & where
        )
        of = self.run.text[tokens]
        return values, np.repeat(tokens, lengths[of]), flat[spans(start[of], lengths[of])]

    def _forms(self):
        """Words of which other forms are there too, all under the commonest of these."""
        families: dict[str, dict[str, int]] = {}
        for bare, count in zip(self.bare, np.bincount(self.run.text, minlength=len(self.bare))):
            if one := stem(bare):
                family = families.setdefault(one, {})
                family[bare.lower()] = family.get(bare.lower(), 0) + int(count)
        commonest = {
            one: [max(family, key=lambda word: (family[word], word))]
            for one, family in families.items()
        }
        return self._by_text(lambda bare: commonest.get(stem(bare), []))

    def _moved(self, rows, codes):
        """Entries of tokens, given to the tokens that follow them."""
        following = np.full(self.n, -1, np.int64)
        there = np.flatnonzero(self.previous >= 0)
        following[self.previous[there]] = there
        keep = (following[rows] >= 0) & self._read(following[rows], rows)
        return following[rows[keep]], codes[keep]

    def _read(self, tokens, earlier):
        """Whether a reader would name earlier tokens as what stands before: not the template's
        before a text, which begins there for a reader."""
        return (self.run.kind[earlier] == CONTENT) | (self.run.kind[tokens] != CONTENT)

    def _previous(self):
        """(n,) the token before each in its example, -1 for the first."""
        previous = np.arange(-1, self.n - 1)
        if self.n:
            previous[np.flatnonzero(np.diff(self.run.example, prepend=-1))] = -1
        return previous

    def _flag(self, test):
        """(n,) bool: a test of the token's own text."""
        return np.array([bool(test(text)) for text in self.run.texts], bool)[self.run.text]

    def _continues(self):
        """(n,) bool: the token goes on with the word that the token before it began."""
        joins = self._flag(lambda t: re.match(r"[^\W_]|['’][^\W\d_]", t))
        open_end = self._flag(lambda t: re.search(r"[^\W_]$|[^\W_]['’]$", t))
        same_kind = self.run.kind == self.run.kind[self.previous]
        return joins & (self.previous >= 0) & open_end[self.previous] & same_kind

    def _sentences(self):
        """(n,) ascending numbers of sentences. One begins with an example, a turn, a line, and
        after a full stop that a space follows."""
        line = self._flag(lambda t: "\n" in t)
        stop = self._flag(lambda t: re.search(r"[.!?…。！？]['\"”’)\]*_]*\s*$", t))
        spaced = self._flag(lambda t: t[:1].isspace())
        closing = self._flag(lambda t: re.fullmatch(r"['\"”’)\]*_]+", t))
        ended = stop.copy()
        for i in np.flatnonzero(closing & (self.previous >= 0)):  # a quotation mark after a stop
            ended[i] = ended[self.previous[i]]
        wide = self._flag(lambda t: re.search("[。！？]$", t))
        p = self.previous
        starts = (p < 0) | line[p] | (ended[p] & (spaced | wide[p]))
        starts |= (self.run.role != self.run.role[p]) | (self.run.kind != self.run.kind[p])
        return np.cumsum(starts)

    def _turns(self):
        """(n,) numbers of stretches of one role and kind; the shared prefix ends one too."""
        p = self.previous
        changed = (self.run.role != self.run.role[p]) | (self.run.kind != self.run.kind[p])
        return np.cumsum((p < 0) | changed)

    def _places(self, group, n):
        """The first n tokens of each group, numbered from 1; white space does not count."""
        counted = ~self._flag(lambda t: not t.strip())
        start = np.flatnonzero(np.diff(group, prepend=-1))
        total = np.cumsum(counted)
        base = np.repeat(total[start] - counted[start], np.diff(np.append(start, self.n)))
        place = total - base
        rows = np.flatnonzero(counted & (place <= n) & (self.run.kind == CONTENT))
        return [str(i) for i in range(1, n + 1)], rows, place[rows] - 1

    def _words(self):
        """The word up to a token that goes on with it, in lower case."""
        rows = np.flatnonzero(self.continues)
        so_far: dict[int, str] = {}
        found = []
        for i in rows.tolist():
            before = so_far.get(i - 1) or self.bare[self.run.text[i - 1]].lower()
            so_far[i] = (before + self.bare[self.run.text[i]].lower())[-MAX_WORD:]
            found.append(so_far[i])
        values, codes = numbered(found)
        return values, rows, codes

    def _recent(self):
        """The names two to RECENT tokens back."""
        rows, codes = [], []
        for lag in range(2, RECENT + 1):
            at = np.arange(lag, self.n)
            at = at[self.run.example[at] == self.run.example[at - lag]]
            at = at[self._read(at, at - lag)]
            rows.append(at)
            codes.append(self.name[at - lag])
        return np.concatenate(rows), np.concatenate(codes)

    def _earlier_in_sentence(self):
        """The names before a token in its sentence."""
        rows, codes = [], []
        for lag in range(1, SENTENCE_REACH + 1):
            at = np.arange(lag, self.n)
            at = at[self.sentence[at] == self.sentence[at - lag]]
            at = at[self._read(at, at - lag)]
            rows.append(at)
            codes.append(self.name[at - lag])
        return np.concatenate(rows), np.concatenate(codes)

    def _inside(self):
        """Tokens after an opening quotation mark or bracket of their line, before its end."""
        quote = self._count(lambda t: sum(t.count(q) for q in QUOTES))
        depth = self._count(lambda t: sum(t.count(o) for o in OPENING) - sum(map(t.count, CLOSING)))
        line = np.cumsum((self.previous < 0) | self._flag(lambda t: "\n" in t))
        start = np.flatnonzero(np.diff(line, prepend=-1))
        sizes = np.diff(np.append(start, self.n))
        inside = []
        for step in (quote, depth):
            total = np.cumsum(step) - step  # before the token
            inside.append(total - np.repeat(total[start], sizes))
        rows = [np.flatnonzero(inside[0] % 2 == 1), np.flatnonzero(inside[1] > 0)]
        codes = [np.full(len(r), i) for i, r in enumerate(rows)]
        return ["quotation marks", "brackets"], np.concatenate(rows), np.concatenate(codes)

    def _quotation_marks(self, inside):
        """Opening and closing quotation marks; inside: the tokens before which one is open."""
        is_inside = np.zeros(self.n, bool)
        is_inside[inside] = True
        double = self._flag(lambda t: any(q in t for q in QUOTES))
        p = self.previous
        gap = (p < 0) | self._flag(lambda t: re.search(r"[\s(\[{]$", t))[p]
        single = self._flag(lambda t: re.fullmatch(r"\s*['‘]", t))
        spaced = self._flag(lambda t: t[:1].isspace()) | gap
        after_stop = self._flag(lambda t: re.search(r"[.,;:!?…]['’]\s*$", t))
        opening = (double & ~is_inside) | (single & spaced)
        closing = (double & is_inside) | after_stop
        rows = [np.flatnonzero(opening), np.flatnonzero(closing)]
        codes = [np.full(len(r), i) for i, r in enumerate(rows)]
        names = ["opening quotation marks", "closing quotation marks"]
        return names, np.concatenate(rows), np.concatenate(codes)

    def _count(self, count):
        """(n,) a count in the token's own text."""
        return np.array([count(text) for text in self.run.texts], np.int64)[self.run.text]


def numbered(values: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(distinct values in the order they come, (n,) number of each one's value)."""
    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)
    return list(numbers), codes


def shape(text: str) -> str:
    """What a token looks like: one word for its characters and their case."""
    bare = text.strip()
    if PIECE in text:
        return "part of a character"
    if not bare:
        return "line break" if "\n" in text else "space"
    if "\n" in text and not any(c.isalnum() for c in bare):
        return "punctuation with a line break"
    if bare.isdigit() or re.fullmatch(r"\d[\d.,]*", bare):
        return "number"
    if not any(c.isalnum() for c in bare):
        return "punctuation" if all(c in ".,;:!?'\"()[]{}-–—…“”‘’/*_" for c in bare) else "symbol"
    letters = [c for c in bare if c.isalpha()]
    if not letters:
        return "number"
    if not any(c.isupper() or c.islower() for c in letters):
        return "letters without case"
    if letters[0].isupper():
        return "capitals" if len(letters) > 1 and bare.isupper() else "capitalised"
    return "lower case"


def beginnings(bare: str) -> list[str]:
    """The first letters of a word, 1 to LONGEST_START of them, in lower case."""
    found = LETTERS.match(bare)
    word = found.group().lower() if found else ""
    return [word[:n] for n in range(1, min(len(word), LONGEST_START) + 1)]


def endings(bare: str) -> list[str]:
    """The last letters of a token, 2 to LONGEST_END of them, where it is longer than these."""
    word = bare.lower()
    if not LETTERS.fullmatch(word):
        return []
    return [word[-n:] for n in range(2, min(len(word) - 1, LONGEST_END) + 1)]


def stem(word: str) -> str:
    """What the forms of an English word have in common: its base less plural, -ed, -ing, a doubled
    consonant and a last e; "" for what is no word of three letters or more."""
    word = word.lower()
    if len(word) < 3 or not LETTERS.fullmatch(word) or word in WITHOUT_FORMS:
        return ""
    word = BASE_OF.get(word, word)
    for ending, instead, least in (
        ("ies", "y", 5),
        ("ied", "y", 5),
        ("ing", "", 6),
        ("ed", "", 5),
        ("s", "", 4),
    ):
        rest = word.removesuffix(ending)
        if (
            rest != word
            and len(word) >= least
            and re.search("[aeiouy]", rest + instead)
            and rest[-1] != "s"
        ):
            word = rest + instead
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiou":
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word
