"""interpretations.html: one file that explains the features to people, opens from disk, and asks
for nothing else.

The page is a Jinja2 template (report.html.j2) with its style and script inlined; charts.svg.j2
draws the charts. Its data are one JSON block from which the script builds index and feature panel;
the run page is written here. A content security policy allows this style and this script by their
hashes and nothing else, so that no text of the dataset could act even if it were not escaped.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsae.data.token_text import seen_values, with_text
from fastsae.data.tokenization import ROLES
from fastsae.interpretation.tables import by_language_model

if TYPE_CHECKING:
    import jinja2

    from fastsae.interpretation.evidence import Evidence

FOLDER = Path(__file__).parent
# tokens of an example that the report holds; longer ones are cut around the place shown
DIALOGUE_TOKENS = 1024
KIND_LETTERS = "ctp"  # content, chat template, prefix shared by all examples


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

    style, script = (
        (FOLDER / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    template = templates().get_template("report.html.j2")
    alive = [rows[j] for j in shown if rows[j]["status"] != "dead"]
    has = {
        name: any(row.get(key) not in (None, "") for row in alive)
        for name, key in (
            ("has_auc", "category_auc"),
            ("has_score", "score"),
            ("levels", "matryoshka_level"),
        )
    }
    order = "score" if has["has_score"] else "auc" if has["has_auc"] else "mass"
    return template.render(
        title=run["title"],
        subtitle=run["subtitle"],
        story=run["story"],
        notice=run["notice"],
        grids=run["grids"],
        tables=run["tables"],
        charts=[chart for chart in run["charts"] if chart],
        style=Markup(style),
        script=Markup(script),
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
        has_auc=has["has_auc"],
        has_score=has["has_score"],
        has_llm=any(by_language_model(row) for row in alive),
        has_dead=len(alive) < len(shown),
        levels=[
            (level, level) for level in sorted({row["matryoshka_level"] for row in alive} - {""})
        ],
        categories=[(c, c) for c in sorted({row["best_category"] for row in alive} - {""})],
        data=Markup(embed(report_data(evidence, rows, shown, lens, order, run["chance"]))),
    )


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


def embed(value: Any) -> str:
    """JSON that is safe inside a <script> block: no <, >, & and no line separators that old parsers
    take for line ends."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def report_data(
    evidence: "Evidence",
    rows: Sequence[Mapping[str, Any]],
    shown: Sequence[int],
    lens: Mapping[int, tuple],
    order: str,
    chance: Any,
) -> dict[str, Any]:
    """What the script works from: token texts, the dialogues that are shown, and one dict per
    feature."""
    examples = evidence.shown_examples(shown)
    values = evidence.token_values([(j, example) for j in shown for _, example, _ in examples[j]])
    near, together = evidence.neighbours(shown), evidence.coactive(shown)
    dialogues = Dialogues(evidence)
    features = []
    for j in shown:
        entries = []
        for quantile, example, peak in examples[j]:
            texts = evidence.token_texts(example)
            positions, activations = seen_values(texts, *values[j, example])
            place, start, stop = dialogues.place(example, peak := int(with_text(texts)[peak]))
            inside = (positions >= start) & (positions < stop)
            entries.append(
                {
                    "quantile": quantile,
                    "dialogue": place,
                    "peak": peak - start,
                    "top": number(activations.max(initial=0)),
                    "at": (positions[inside] - start).tolist(),
                    "values": [number(v) for v in activations[inside]],
                }
            )
        features.append(
            feature_data(evidence, rows[j], entries, lens.get(j, ([], [])), near[j], together[j])
        )
    return {
        "sort": order,
        "chance": chance,
        "strings": dialogues.strings,
        "dialogues": dialogues.list,
        "features": features,
    }


def feature_data(
    evidence: "Evidence",
    row: Mapping[str, Any],
    entries: list[dict[str, Any]],
    lens: Sequence,
    near: Sequence,
    together: Sequence,
) -> dict[str, Any]:
    """One feature as report.js reads it."""
    s, j = evidence.statistics, row["feature"]
    histogram, end = s.histogram.bars(j)
    by_llm = by_language_model(row)
    return {
        "id": j,
        "label": row["label"],
        "source": row["label_source"],
        "byLlm": by_llm,
        "protocol": row.get("label_protocol"),
        "status": row["status"],
        "dead": row["status"] == "dead",
        "density": number(row["density"]),
        "max": number(row["max_activation"]),
        "mean": number(s.total[j] / max(s.count[j], 1)),
        "mass": number(s.total[j]),
        "level": row["matryoshka_level"],
        "category": row["best_category"],
        "auc": number(row["category_auc"]),
        "aucMean": number(row.get("category_auc_mean")),
        "score": row["score"],
        "scoreName": row.get("score_name"),
        "f1": number(row["fidelity_f1"]),
        "rule": row.get("rule"),
        "ruleF1": number(row.get("label_f1")),
        "detection": number(row.get("detection_auc")),
        "rulePrecision": number(row.get("label_precision")),
        "ruleRecall": number(row.get("label_recall")),
        "precision": number(row.get("fidelity_precision")),
        "recall": number(row.get("fidelity_recall")),
        "held": row.get("n_held_out"),
        "special": number(row["special_token_share"] or 0),
        "tokens": [[name, number(share)] for name, share in evidence.top_tokens[j]],
        "groups": token_groups(s.kind_role_mass[j]),
        "histogram": histogram.tolist(),
        "histogramEnd": number(end),
        "examples": entries,
        "promoted": pairs(lens[0]),
        "suppressed": pairs(lens[1]),
        "near": pairs(near),
        "together": pairs(together),
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
    return [[name, number(value)] for name, value in items]


def number(value: Any, digits: int = 4) -> float | None:
    """A JSON number of few significant digits, or None for nothing."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.{digits}g}")


class Dialogues:
    """The examples that the report shows, each once, their tokens' texts numbered in `strings`."""

    def __init__(self, evidence: "Evidence") -> None:
        self.evidence, self.list, self.strings, self.places, self.numbers = evidence, [], [], {}, {}

    def place(self, example: int, peak: int) -> tuple[int, int, int]:
        """(number in `list`, first token, token after the last) of the example, or of the part of a
        long one that holds `peak`."""
        length = int(self.evidence.data["seq_lengths"][example])
        part = 0 if length <= DIALOGUE_TOKENS else peak // (DIALOGUE_TOKENS // 2)
        if (example, part) not in self.places:
            start = max(
                0,
                min(part * (DIALOGUE_TOKENS // 2) - DIALOGUE_TOKENS // 4, length - DIALOGUE_TOKENS),
            )
            stop = min(length, start + DIALOGUE_TOKENS)
            self.places[example, part] = len(self.list), start, stop
            offset = self.evidence.offsets[example]
            source = self.evidence.examples[example]
            texts = self.evidence.token_texts(example)[start:stop]
            self.list.append(
                {
                    "line": source.line,
                    "label": source.label,
                    "ids": [self._string(text) for text in texts],
                    "kinds": "".join(
                        KIND_LETTERS[k]
                        for k in self.evidence.data["token_kind"][offset + start : offset + stop]
                    ),
                    "cut": start > 0,
                    "cutEnd": stop < length,
                }
            )
        return self.places[example, part]

    def _string(self, text):
        if text not in self.numbers:
            self.numbers[text] = len(self.strings)
            self.strings.append(text)
        return self.numbers[text]
