"""interpretations.html: one file that explains the features to people, opens from disk, and asks
for nothing else.

The page is a Jinja2 template (report.html.j2) with its style and script inlined; charts.svg.j2
draws the charts. Its data are packed blocks (packing.py): one from which the script builds the
first page and the list, and one for every 128 features, unpacked when one of them is opened; so a
report of many thousand features opens at once. The run page is written here. A content security
policy allows this style and this script by their hashes and nothing else, so that no text of the
dataset could act even if it were not escaped.
"""

import base64
import hashlib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsae.data.token_text import seen_values, with_text
from fastsae.data.tokenization import ROLES
from fastsae.interpretation.effects import SIGNS
from fastsae.interpretation.report.overview import (
    category_name,
    commonest,
    evidence_of,
    first_page,
    is_plain,
)
from fastsae.interpretation.report.packing import PART, number, pack
from fastsae.interpretation.report.terms import TERMS
from fastsae.interpretation.tables import by_language_model

if TYPE_CHECKING:
    import jinja2

    from fastsae.interpretation.evidence import Evidence

FOLDER = Path(__file__).parent
# tokens of an example that the report holds; longer ones are cut around the place shown
DIALOGUE_TOKENS = 1024
# tokens of all examples in a report, after which fewer are held of each, but no fewer than
# LEAST_TOKENS: 6.5 million are about 18 MB
BUDGET, LEAST_TOKENS = 6_500_000, 40
SNIPPET = (8, 12)  # tokens before and after the strongest one in the list
PROMPT_SHOWN = 90  # characters before a continuation
N_FOUND, N_PROMOTED = 8, 10  # promoted tokens that the search finds, and that the panel shows
JUDGED = ("detection", "fuzzing", "intruder")  # a language model's tests of its labels
KIND_LETTERS = "ctp"  # content, chat template, prefix shared by all examples
# the page's script, in the order in which its files run
SCRIPTS = ("page.js", "snippets.js", "list.js", "panel.js", "overview.js", "routes.js")
# of `run_page.describe_run`, as it stands in the page
SAID = ("title", "subtitle", "story", "verdict", "notice", "grids", "tables")


def render(
    evidence: "Evidence",
    rows: Sequence[Mapping[str, Any]],
    shown: Sequence[int],
    lens: Mapping[int, tuple],
    run: Mapping[str, Any],
) -> str:
    """The report as text.

    rows: one dict per feature (all of them); shown: numbers of the features to include; lens:
    {feature: (promoted, suppressed)} of [(token, value)]; run: what the run page says, see
    `run_page.describe_run`.
    """
    from markupsafe import Markup

    style = (FOLDER / "report.css").read_text(encoding="utf-8")
    script = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    template = templates().get_template("report.html.j2")
    alive = [rows[j] for j in shown if rows[j]["status"] != "dead"]
    index, parts = report_data(evidence, rows, shown, lens, run["chance"], run["field"])
    index["overview"] = first_page(rows, shown, run["field"], run["table"])
    return template.render(
        **{name: run[name] for name in SAID},
        charts=[chart for chart in run["charts"] if chart],
        terms=TERMS,
        style=Markup(style),
        script=Markup(script),
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
        field=run["field"],
        has_auc=_any(alive, "category_auc"),
        has_score=_any(alive, "score"),
        has_llm=any(by_language_model(row) for row in alive),
        has_dead=len(alive) < len(shown),
        levels=[
            (level, level) for level in sorted({row["matryoshka_level"] for row in alive} - {""})
        ],
        categories=[
            (name, name)
            for name in sorted({category_name(row["best_category"], run["field"]) for row in alive})
            if name
        ],
        data=Markup(pack(index)),
        parts=map(Markup, map(pack, parts)),
    )


def _any(rows, column):
    """Whether a column has something in any of the rows."""
    return any(row.get(column) not in (None, "") for row in rows)


def templates() -> "jinja2.Environment":
    """The templates beside this module; whatever they are given is escaped."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def template_sha256() -> str:
    """Checksum of the report's templates, style and script; new ones make the report anew."""
    files = sorted(file for file in FOLDER.iterdir() if file.suffix in (".j2", ".css", ".js"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def csp_hash(text: str) -> str:
    """A text's hash as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def report_data(
    evidence: "Evidence",
    rows: Sequence[Mapping[str, Any]],
    shown: Sequence[int],
    lens: Mapping[int, tuple],
    chance: float | None = None,
    field: str | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the script needs at once: a short dict per feature and the texts of all tokens; what it
    needs of the features that are opened: dialogues and details, in parts of PART features)."""
    examples = evidence.shown_examples(shown)
    values = evidence.token_values([(j, example) for j in shown for _, example, _ in examples[j]])
    near, together = evidence.neighbours(shown), evidence.coactive(shown)
    strings = Strings()
    common = commonest(evidence.names, evidence.statistics.name_count)
    length = dialogue_length(evidence, shown, examples)
    index, parts = [], []
    for start in range(0, len(shown), PART):
        dialogues, features = Dialogues(evidence, strings, length), []
        for j in shown[start : start + PART]:
            entries = [
                dialogues.entry(quantile, example, peak, *values[j, example])
                for quantile, example, peak in examples[j]
            ]
            promoted = lens.get(j, ([], []))
            index.append(
                {
                    **index_data(evidence, rows[j], promoted, chance, field, common),
                    "snippet": dialogues.snippet(entries[0], rows[j]["max_activation"])
                    if entries
                    else None,
                }
            )
            features.append(
                feature_data(evidence, rows[j], entries, promoted, near[j], together[j])
            )
        for dialogue in dialogues.list:
            dialogue["label"] = category_name(dialogue["label"], field)
        parts.append({"dialogues": dialogues.list, "features": features})
    return {"chance": chance, "per_part": PART, "strings": strings.list, "features": index}, parts


def dialogue_length(
    evidence: "Evidence", shown: Sequence[int], examples: Mapping[int, Sequence[tuple]]
) -> int:
    """Tokens that the report holds of an example: DIALOGUE_TOKENS, or fewer where that would be
    more than BUDGET in all."""
    lengths = np.minimum(evidence.data["seq_lengths"], DIALOGUE_TOKENS)
    n_tokens = n_places = 0
    for start in range(0, len(shown), PART):
        part = np.unique([e for j in shown[start : start + PART] for _, e, _ in examples[j]])
        n_tokens += int(lengths[part.astype(np.int64)].sum())
        n_places += len(part)
    if n_tokens <= BUDGET:
        return DIALOGUE_TOKENS
    return int(np.clip(BUDGET // n_places, LEAST_TOKENS, DIALOGUE_TOKENS))


def index_data(
    evidence: "Evidence",
    row: Mapping[str, Any],
    lens: Sequence,
    chance: float | None,
    field: str | None,
    common: Container[str],
) -> dict[str, Any]:
    """What the list shows of a feature, and what it is found and ordered by.

    common: see `overview.commonest`.
    """
    j = row["feature"]
    tokens = evidence.top_tokens[j]
    names = [name for name, _ in tokens] + [text.strip() for text, _ in lens[0][:N_FOUND]]
    return {
        "id": j,
        "label": row["label"],
        "byLlm": by_language_model(row),
        "rule": row.get("rule"),
        "ruleF1": number(row.get("label_f1")),
        "status": row["status"],
        "dead": row["status"] == "dead",
        "density": number(row["density"]),
        "mass": number(evidence.statistics.total[j]),
        "level": row["matryoshka_level"],
        "category": category_name(row["best_category"], field),
        "auc": number(row["category_auc"]),
        "score": row["score"],
        "scoreName": row.get("score_name"),
        "f1": number(row["fidelity_f1"]),
        "detection": number(row.get("detection_auc")),
        "evidence": number(evidence_of(row, chance), 3),
        "plain": is_plain(tokens, row["special_token_share"], common),
        "words": " ".join(names),
    }


def feature_data(
    evidence: "Evidence",
    row: Mapping[str, Any],
    entries: list[dict[str, Any]],
    lens: Sequence,
    near: Sequence,
    together: Sequence,
) -> dict[str, Any]:
    """What the panel shows of a feature besides `index_data`."""
    s, j = evidence.statistics, row["feature"]
    histogram, end = s.histogram.bars(j)
    return {
        "source": row["label_source"],
        "protocol": row.get("label_protocol"),
        "max": number(row["max_activation"]),
        "mean": number(s.total[j] / max(s.count[j], 1)),
        "rulePrecision": number(row.get("label_precision")),
        "ruleRecall": number(row.get("label_recall")),
        "precision": number(row.get("fidelity_precision")),
        "recall": number(row.get("fidelity_recall")),
        "held": row.get("n_held_out"),
        "judged": [
            [kind, number(row[f"judged_{kind}"])]
            for kind in JUDGED
            if row.get(f"judged_{kind}") is not None
        ],
        "special": number(row["special_token_share"] or 0),
        "tokens": pairs(evidence.top_tokens[j]),
        "groups": token_groups(s.kind_role_mass[j]),
        "histogram": histogram.tolist(),
        "histogramEnd": number(end),
        "examples": entries,
        "promoted": pairs(lens[0][:N_PROMOTED]),
        "suppressed": pairs(lens[1][:N_PROMOTED]),
        "lensChance": [number(row.get(f"{side}_chance"), 3) for side in ("promoted", "suppressed")],
        "effects": effects_data(row.get("effects")),
        "near": pairs(near),
        "together": pairs(together),
    }


def effects_data(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the panel shows of `effects.changes` and `effects.continuations`; None where the model
    was not run for a feature."""
    if found is None:
        return None
    written = found["continuations"]
    if written and len(written["prompt"]) > PROMPT_SHOWN:
        written = {**written, "prompt": f"… {written['prompt'][-PROMPT_SHOWN:]}"}
    return {
        "tokens": found["n_tokens"],
        "passages": found["n_passages"],
        **{
            name: {
                "kl": number(found[name]["kl"], 3),
                "loss": number(found[name]["loss"], 2),
                "random": number(np.mean(found[name]["random_kl"]), 3),
                "randomLoss": number(np.mean(found[name]["random_loss"]), 2),
            }
            for name in SIGNS
        },
        "written": written,
    }


def token_groups(kind_role_mass: np.ndarray) -> list[list]:
    """[[name, share], ...] of a feature's activation: content by role, the template's own tokens,
    the shared prefix."""
    total = max(kind_role_mass.sum(), 1e-30)
    content = [
        (f"{role} text" if role != "none" else "plain text", kind_role_mass[0, i])
        for i, role in enumerate(ROLES)
    ]
    parts = [
        *content,
        ("chat template", kind_role_mass[1].sum()),
        ("shared prefix", kind_role_mass[2].sum()),
    ]
    return [
        [name, number(mass / total)]
        for name, mass in sorted(parts, key=lambda part: -part[1])
        if mass > 0
    ]


def pairs(items: Sequence[tuple]) -> list[list]:
    """[[name, JSON number], ...] of (name, number) pairs."""
    return [[name, number(value, 3)] for name, value in items]


class Strings:
    """Texts of tokens, each once and numbered: `list`."""

    def __init__(self) -> None:
        self.list: list[str] = []
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number of a text."""
        if text not in self.numbers:
            self.numbers[text] = len(self.list)
            self.list.append(text)
        return self.numbers[text]


class Dialogues:
    """The examples that a part of the report shows, each once: `list`; of longer ones `length`
    tokens around what is shown."""

    def __init__(
        self, evidence: "Evidence", strings: Strings, length: int = DIALOGUE_TOKENS
    ) -> None:
        self.evidence, self.strings, self.length = evidence, strings, length
        self.list: list[dict[str, Any]] = []
        self.places: dict[tuple[int, int], tuple[int, int, int]] = {}

    def entry(
        self,
        quantile: float | None,
        example: int,
        peak: int,
        positions: np.ndarray,
        values: np.ndarray,
    ) -> dict[str, Any]:
        """An example of a feature as report.js reads it.

        peak: the token of the largest activation; positions, values: all tokens where it fires.
        """
        texts = self.evidence.token_texts(example)
        seen, activations = seen_values(texts, positions, values)
        place, start, stop = self.place(example, peak := int(with_text(texts)[peak]))
        inside = (seen >= start) & (seen < stop)
        return {
            "quantile": quantile,
            "dialogue": place,
            "peak": peak - start,
            "top": number(activations.max(initial=0), 3),
            "at": (seen[inside] - start).tolist(),
            "values": [number(v, 3) for v in activations[inside]],
        }

    def snippet(self, entry: Mapping[str, Any], largest: float) -> dict[str, Any]:
        """The few tokens around an entry's peak that the list shows, those without shading joined:
        {"texts", "shares" of the largest activation in percent, "kinds", "peak": its number}."""
        dialogue, peak = self.list[entry["dialogue"]], entry["peak"]
        share = {
            position: max(1, round(100 * value / largest))
            for position, value in zip(entry["at"], entry["values"])
            if value
        }
        first = max(0, peak - SNIPPET[0])
        while first < peak and dialogue["kinds"][first] == "p":
            first += 1  # the prefix that all examples share says nothing
        texts: list[str] = []
        shares: list[int] = []
        kinds = ""
        for i in range(first, min(len(dialogue["ids"]), peak + SNIPPET[1] + 1)):
            text, kind = self.strings.list[dialogue["ids"][i]], dialogue["kinds"][i]
            alone = i in share or i == peak
            if i == peak:
                place = len(texts)
            if texts and not alone and not shares[-1] and kinds[-1] == kind and i - 1 != peak:
                texts[-1] += text
            else:
                texts.append(text)
                shares.append(share.get(i, 0))
                kinds += kind
        return {"texts": texts, "shares": shares, "kinds": kinds, "peak": place}

    def place(self, example: int, peak: int) -> tuple[int, int, int]:
        """(number in `list`, first token, token after the last) of the example, or of the part of a
        long one that holds `peak`."""
        length, kept = int(self.evidence.data["seq_lengths"][example]), self.length
        part = 0 if length <= kept else peak // (kept // 2)
        if (example, part) not in self.places:
            start = max(0, min(part * (kept // 2) - kept // 4, length - kept))
            stop = min(length, start + kept)
            self.places[example, part] = len(self.list), start, stop
            offset = self.evidence.offsets[example]
            source = self.evidence.examples[example]
            texts = self.evidence.token_texts(example)[start:stop]
            self.list.append(
                {
                    "line": source.line,
                    "label": source.label,
                    "ids": [self.strings.number(text) for text in texts],
                    "kinds": "".join(
                        KIND_LETTERS[k]
                        for k in self.evidence.data["token_kind"][offset + start : offset + stop]
                    ),
                    "cut": start > 0,
                    "cutEnd": stop < length,
                }
            )
        return self.places[example, part]
