"""What a language model's reply says: a label, a score with a name, yes or no; or nothing that can
be used."""

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

MAX_LABEL = 300  # characters
MAX_ANSWER = 20_000  # characters after the thinking; a longer answer follows no form
MAX_TEXT = 200_000  # characters of a reply that are kept
MOST_TOKENS = 10**9  # of one call; a larger count is none
JOINERS = "\u200c\u200d"  # invisible, but part of how Persian, Hindi and emoji are written
UNFINISHED = ("length", "max_tokens", "content_filter", "tool_calls", "function_call")  # others end

VERDICT = re.compile(r"score is[\W_]*\[\[\s*([1-5])\s*\]\][\W_]*feature name is[^\w\[]*\[\[", re.I)
ANNOUNCED = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|here|the feature|feature|label|answer)\b"
    r"""[^:"“]*:\s*)(?=\S)""",
    re.I,
)
NOTHING = re.compile(
    r"(?:none|null|nothing|n\s*/?\s*a|(?:there (?:is|are|seems to be|appears to be) )?no "
    r"(?:(?:clear|common|obvious|consistent|single|shared)\s)*"
    r"(?:features?|patterns?)(?: to be found| here)?)\W*",
    re.I,
)
REFUSAL = re.compile(
    r"""(?:(?:unfortunately|(?:my\s)?apologies)\W+(?:but\s)?)?(?:
    (?:(?:(?:i['’]?m|i\sam)\s(?:\w+\s)?)?sorry)\s*(?:[,.!;:–—-]|but\b|i\b|$)|as\san\sai\b|
    (?:i|we)['’]?(?:m|re)?\s(?:(?:am|was|are|were)\s)?
    (?:can['’]t|cannot|can\snot|could\snot|couldn['’]t|won['’]t|unable|not\sable|(?:do\snot|don['’]t)\s(?:see|find))\b|
    (?:it\sis\s)?(?:cannot|can['’]t|unable\sto|not\spossible\sto)\s(?:identify|determine|find)\b)""",
    re.I | re.X,
)
ANSWER_LINE = re.compile(r"^[\W_]*(?:final )?answer[*_]*\s*:(.*)$", re.I | re.M)
NO_PATTERN = re.compile(
    r"(?:do not|don['’]t|does not|doesn['’]t) (?:appear to |seem to )?"
    r"(?:share|have) (?:an?|any) (?:\w+ )?(?:pattern|feature)"
    r"|\bi (?:cannot|can['’]t|could not) (?:identify|determine)",
    re.I,
)


def cleaned(text: str) -> str:
    """The text as it may stand in files and on terminals.

    Lines end with a newline. Control characters and invisible ones, such as those that turn the
    direction of writing, are left out; halves of surrogate pairs become U+FFFD.
    """
    if text.isprintable():
        return text
    text = re.sub("\r\n?|[\x85\u2028\u2029]", "\n", text)
    return "".join(map(_kept, text))


def _kept(character):
    if character.isprintable() or character in "\n\t" + JOINERS:
        return character
    if character.isspace():
        return " "
    return "\ufffd" if unicodedata.category(character) == "Cs" else ""


def one_line(text: str) -> str:
    """The text as `cleaned`, with one space in place of white space."""
    return " ".join(cleaned(text).split())


class NoCompletion(Exception):
    """A reply other than a chat completion. `paid`: it may have been paid for all the same."""

    def __init__(self, reason: str, *, paid: bool) -> None:
        super().__init__(reason)
        self.reason, self.paid = reason, paid


def read_completion(
    body: bytes, content_type: str
) -> tuple[str | None, str | None, dict[str, int]]:
    """(text or None, why there is none, tokens used) of a chat completion; raises NoCompletion.

    What is meant as JSON, or as a stream of events, and cannot be read counts as paid for, and so
    does a reply with choices or with tokens it took. A page of a proxy does not.
    """
    answer = _json(body, content_type)
    used = answer.get("usage") if isinstance(answer, dict) else None
    used = used if isinstance(used, dict) else {}
    usage = {name: as_count(used.get(name)) for name in ("prompt_tokens", "completion_tokens")}
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        problem = "the reply is not a chat completion"
        if isinstance(answer, dict) and answer.get("error"):
            problem = f"the reply is an error: {error_message(body)}"
        raise NoCompletion(problem, paid=bool(choices or usage["completion_tokens"]))
    reason, text = choice.get("finish_reason"), cleaned(joined(message.get("content")))
    if message.get("refusal"):
        return None, "refused", usage
    if isinstance(reason, str) and reason.lower() in UNFINISHED:
        return None, f"unfinished ({reason.lower()})", usage
    if len(text) > MAX_TEXT:
        return None, f"unusable: longer than {MAX_TEXT:,} characters", usage
    return (text, None, usage) if text.strip() else (None, "empty", usage)


def _json(body, content_type):
    try:
        return json.loads(body.decode("utf-8-sig", "replace"), strict=False, parse_int=_integer)
    except RecursionError:
        problem = "the reply's JSON is nested too deeply"
    except ValueError:
        problem = "the reply is not JSON" if body.strip() else "the reply is empty"
    raise NoCompletion(problem, paid=is_completion_type(content_type) and bool(body.strip()))


def is_completion_type(content_type: str) -> bool:
    """Whether a Content-Type is one that chat completions have, unlike a proxy's pages."""
    return content_type.partition(";")[0].strip().lower().endswith(("json", "event-stream"))


def _integer(digits):
    """An integer; one of more digits than Python converts is a number all the same."""
    return int(digits) if len(digits) < 40 else float("inf")


def error_message(body: bytes) -> str:
    """What the body of a failure says, in one line."""
    text = body[:MAX_ANSWER].decode("utf-8", "replace")
    try:
        answer = json.loads(text, strict=False, parse_int=_integer)
    except (ValueError, RecursionError):
        return one_line(text)
    for name in ("error", "message", "detail"):
        answer = answer.get(name, answer) if isinstance(answer, dict) else answer
    return one_line(answer if isinstance(answer, str) else text)


def joined(content: Any) -> str:
    """The text of a message whose content is a text or a list of parts; "" if it is neither."""
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(
        part["text"]
        for part in parts
        if isinstance(part, dict)
        and isinstance(part.get("text"), str)
        and part.get("type", "text") in ("text", "output_text")
    )


def as_count(value: Any) -> int:
    """A count of tokens as a server gave it; 0 if it is none."""
    try:
        count = int(value)
    except (TypeError, ValueError, OverflowError):
        return 0
    return count if 0 < count <= MOST_TOKENS else 0


def without_thinking(reply: str) -> str | None:
    """The reply after its <think> part; None if there is no more, or far too much."""
    if "</think" in reply:
        reply = re.split(r"</think(?:ing)?>", reply)[-1]
    elif "<think" in reply:
        return None
    return reply.strip() if len(reply) <= MAX_ANSWER else None


def parse_label(reply: str) -> str | None:
    """The label of a contrastive reply, or None if there is none (empty, markup, far too long, a
    preamble, a refusal).

    It is what the first quoted line says, or the first line, whose quotation mark the prompt may
    have opened.
    """
    lines = [_bare(line) for line in (without_thinking(reply) or "").split("\n") if line.strip()]
    if not lines or lines[0].startswith(("<", "{")):
        return None
    quoted = (
        []
        if re.fullmatch('[^"“]+["”]', lines[0])
        else [
            line
            for line in lines
            if re.fullmatch('["“].*["”][.]?', line) and not re.search('["”] *:', line)
        ]
    )
    line = quoted[0] if quoted else lines[0]
    label = re.sub(r"^\s*-?\s*", "", _unquoted(line.removesuffix(".") if quoted else line)).strip()
    if (
        not label
        or len(label) > MAX_LABEL
        or label.startswith(("<", "{", "```"))
        or label.endswith(":")
        or NOTHING.fullmatch(label)
        or REFUSAL.match(label)
        or NO_PATTERN.search(label)
    ):
        return None
    return label


def _bare(line):
    """A line without list mark, emphasis and an announcement of what follows."""
    line = re.sub(r"^(?:[-•]\s*|\*\s+|\d{1,2}[.)]\s+)(?=\S)", "", line.strip())
    for _ in range(2):
        line = re.sub(r"^(\*\*|__|\*|`)(?!\1)(.+)\1$", r"\2", line).strip()
        line = ANNOUNCED.sub("", line)
    return line


def _unquoted(line):
    """A line without the quotation marks around it, or the one at its end whose partner the prompt
    wrote."""
    # not: "a" or "b"
    if line.startswith(('"', "“")) and not re.match(r'["“][^"”]*[^\s"”]["”](?=[\s,;])', line):
        return line[1:].removesuffix('"').removesuffix("”")
    return line[:-1] if line.endswith(('"', "”")) and len(re.findall('["“”]', line)) % 2 else line


def parse_fast(reply: str) -> tuple[int, str] | None:
    """(score, name) of a FAST reply, or None: the score must be one whole number from 1 to 5.

    The line that the prompt asks for counts, the last one for the name; all of them must agree on
    the score. Without such a line all pairs in double brackets must be the same.
    """
    reply = without_thinking(reply) or ""
    verdicts = [(match[1], _to_closing(reply[match.end() :])) for match in VERDICT.finditer(reply)]
    if verdicts and len({score for score, _ in verdicts}) > 1:
        return None
    if not verdicts:
        found = [part.strip() for part in re.findall(r"\[\[((?:(?!\[\[).)*?)\]\]", reply, re.S)]
        verdicts = list(zip(found[::2], found[1::2]))
        if not verdicts or len(found) % 2 or len(set(verdicts)) > 1:
            return None
    score, name = verdicts[-1]
    name = " ".join(name.split())
    if (
        not re.fullmatch("[1-5]", score)
        or not name
        or name in ("NAME", "...", "…")
        or len(name) > MAX_LABEL
        or name.startswith("<")
    ):
        return None
    return int(score), name


def _to_closing(text):
    """The text up to the ]] that closes a [[ before it; "" if there is none."""
    depth = 1
    for match in re.finditer(r"\[\[|\]\]", text):
        depth += 1 if match[0] == "[[" else -1
        if not depth:
            name, rest = text[: match.start()], text[match.end() :]
            return (
                name + "]" if rest.startswith("]") and name.count("[") > name.count("]") else name
            )
    return ""


def parse_yes_no(reply: str) -> bool | None:
    """True, False, or None if the reply begins with neither yes nor no."""
    match = re.match(
        r"[\W_]*(?:(?:output|answer|response)[^\w:]*:[\W_]*)?(yes|no)\b(?![\s\"'”)*]*(?:/|or\b))",
        without_thinking(reply) or "",
        re.I,
    )
    return match and match[1].lower() == "yes"


def parse_numbers(reply: str) -> frozenset[int] | None:
    """The numbers that the last line `Answer: ...` of a reply names, empty for "none"; None if
    there is no such line, and the reply is not such a list itself, or it says anything else."""
    text = without_thinking(reply) or ""
    found = ANSWER_LINE.findall(text)
    listed = (found[-1] if found else text).strip(" \t*_`[]().\n").lower()
    if re.fullmatch("none(?: of (?:them|the passages|these))?|0", listed):
        return frozenset()
    if not re.fullmatch(r"(?:passages?\s+)?\d{1,2}(?:\s*(?:,|and|&|,\s*and)\s*\d{1,2})*", listed):
        return None
    numbers = frozenset(map(int, re.findall(r"\d+", listed)))
    return None if 0 in numbers else numbers


def fits(parse: Callable[[str], Any]) -> Callable[[str], bool]:
    """A test of replies: whether there is something to `parse`."""
    return lambda reply: parse(reply) is not None
