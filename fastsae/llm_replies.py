"""What a language model's reply says: a label, a score with a name, yes or no; or nothing that can be used."""
import re

MAX_LABEL = 300   # characters

VERDICT = re.compile(r"score is[\W_]*\[\[\s*([1-5])\s*\]\][\W_]*feature name is[^\w\[]*\[\[", re.I)
ANNOUNCED = re.compile(r"""^(?:(?:sure|certainly|of course|okay|here|the feature|feature|label|answer)\b[^:"“]*:\s*)(?=\S)""", re.I)
NOTHING = re.compile(r"(?:none|null|nothing|n\s*/?\s*a|(?:there (?:is|are|seems to be|appears to be) )?no "
                     r"(?:(?:clear|common|obvious|consistent|single|shared)\s)*(?:features?|patterns?)(?: to be found| here)?)\W*", re.I)
REFUSAL = re.compile(r"""(?:(?:unfortunately|(?:my\s)?apologies)\W+(?:but\s)?)?(?:
    (?:(?:(?:i['’]?m|i\sam)\s(?:\w+\s)?)?sorry)\s*(?:[,.!;:–—-]|but\b|i\b|$)|as\san\sai\b|
    (?:i|we)['’]?(?:m|re)?\s(?:(?:am|was|are|were)\s)?
    (?:can['’]t|cannot|can\snot|could\snot|couldn['’]t|won['’]t|unable|not\sable|(?:do\snot|don['’]t)\s(?:see|find))\b|
    (?:it\sis\s)?(?:cannot|can['’]t|unable\sto|not\spossible\sto)\s(?:identify|determine|find)\b)""", re.I | re.X)
NO_PATTERN = re.compile(r"(?:do not|don['’]t|does not|doesn['’]t) (?:appear to |seem to )?(?:share|have) (?:an?|any) (?:\w+ )?"
                        r"(?:pattern|feature)|\bi (?:cannot|can['’]t|could not) (?:identify|determine)", re.I)


def without_thinking(reply):
    """The reply after its <think> part; None if that part is all there is."""
    if "</think" in reply:
        return re.split(r"</think(?:ing)?>", reply)[-1].strip()
    return None if "<think" in reply else reply.strip()


def parse_label(reply):
    """The label of a contrastive reply, or None if there is none (empty, markup, far too long, a preamble, a refusal).

    It is what the first quoted line says, or the first line, whose quotation mark the prompt may have opened.
    """
    lines = [_bare(line) for line in (without_thinking(reply) or "").split("\n") if line.strip()]
    if not lines or lines[0].startswith(("<", "{")):
        return None
    quoted = [] if re.fullmatch('[^"“]+["”]', lines[0]) else [line for line in lines if re.fullmatch('["“].*["”][.]?', line)
                                                              and not re.search('["”] *:', line)]
    line = quoted[0] if quoted else lines[0]
    label = re.sub(r"^\s*-?\s*", "", _unquoted(line.removesuffix(".") if quoted else line)).strip()
    if (not label or len(label) > MAX_LABEL or label.startswith(("<", "{", "```")) or label.endswith(":") or NOTHING.fullmatch(label)
            or REFUSAL.match(label) or NO_PATTERN.search(label)):
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
    """A line without the quotation marks around it, or the one at its end whose partner the prompt wrote."""
    if line.startswith(('"', "“")) and not re.match(r'["“][^"”]*[^\s"”]["”](?=[\s,;])', line):  # not: "a" or "b"
        return line[1:].removesuffix('"').removesuffix("”")
    return line[:-1] if line.endswith(('"', "”")) and len(re.findall('["“”]', line)) % 2 else line


def parse_fast(reply):
    """(score, name) of a FAST reply, or None: the score must be one whole number from 1 to 5.

    The line that the prompt asks for counts, the last one for the name; all of them must agree on the score. Without such a line all
    pairs in double brackets must be the same.
    """
    reply = without_thinking(reply) or ""
    verdicts = [(match[1], _to_closing(reply[match.end():])) for match in VERDICT.finditer(reply)]
    if verdicts and len({score for score, _ in verdicts}) > 1:
        return None
    if not verdicts:
        found = [part.strip() for part in re.findall(r"\[\[((?:(?!\[\[).)*?)\]\]", reply, re.S)]
        verdicts = list(zip(found[::2], found[1::2]))
        if not verdicts or len(found) % 2 or len(set(verdicts)) > 1:
            return None
    score, name = verdicts[-1]
    name = " ".join(name.split())
    if not re.fullmatch("[1-5]", score) or not name or name in ("NAME", "...", "…") or len(name) > MAX_LABEL or name.startswith("<"):
        return None
    return int(score), name


def _to_closing(text):
    """The text up to the ]] that closes a [[ before it; "" if there is none."""
    depth = 1
    for match in re.finditer(r"\[\[|\]\]", text):
        depth += 1 if match[0] == "[[" else -1
        if not depth:
            name, rest = text[:match.start()], text[match.end():]
            return name + "]" if rest.startswith("]") and name.count("[") > name.count("]") else name
    return ""


def parse_yes_no(reply):
    """True, False, or None if the reply begins with neither yes nor no."""
    match = re.match(r"[\W_]*(?:(?:output|answer|response)[^\w:]*:[\W_]*)?(yes|no)\b(?![\s\"'”)*]*(?:/|or\b))",
                     without_thinking(reply) or "", re.I)
    return match and match[1].lower() == "yes"


def fits(parse):
    """A test of replies: whether there is something to `parse`."""
    return lambda reply: parse(reply) is not None
