"""The report's first page and the order of its features: what the data's features are about, which
of them have most evidence, and whether the run is good, each beside its null."""

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from fastsae.interpretation.report.packing import number
from fastsae.interpretation.tables import by_language_model
from fastsae.sae.metrics import measured_on

PLAIN_SHARE = 1 / 3  # of a feature's activation on punctuation, commonest words or chat template
COMMON = 0.3  # share of all word tokens that the commonest words make up
CLEAR_F1, SOME_F1 = 0.7, 0.3  # a label that holds well, and one that holds at all
# of a verdict: normalised MSE, share of dead features, mean F1 of the rules: (yes, partly)
GOOD_MSE, GOOD_DEAD, GOOD_F1 = (0.4, 0.7), (0.05, 0.2), (0.6, 0.4)
NUMERAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|true|false|yes|no|none|null", re.I)


def category_name(value: Any, field: str | None) -> str:
    """A category as people read it: a number or a yes says nothing without its field's name."""
    text = "" if value is None else str(value)
    return f"{field} = {text}" if field and NUMERAL.fullmatch(text.strip()) else text


def commonest(names: Sequence[str], counts: Sequence[int] | np.ndarray) -> set[str]:
    """The names of tokens that are no words, and of the commonest words: those that together are
    COMMON of all word tokens. Numbers are neither: in texts about maths they would be the commonest
    words, and “of” a rare one."""
    words = [i for i, name in enumerate(names) if any(map(str.isalpha, name))]
    ordered = sorted(words, key=lambda i: -counts[i])
    seen, total = 0, sum(counts[i] for i in words)
    found = {name for name in names if not any(map(str.isalnum, name))}
    for i in ordered:
        if seen >= COMMON * total:
            break
        seen += counts[i]
        found.add(names[i])
    return found


def is_plain(
    tokens: Sequence[tuple[str, float]], special_share: float | None, common: Container[str]
) -> bool:
    """Whether a feature fires mostly on punctuation, the commonest words or the chat template.

    tokens: its characteristic tokens with their shares of its activation; common: see `commonest`.
    """
    if (special_share or 0) >= PLAIN_SHARE:
        return True
    total = sum(share for _, share in tokens)
    return sum(share for name, share in tokens if name in common) >= PLAIN_SHARE * total > 0


def evidence_of(row: Mapping[str, Any], chance: float | None) -> float:
    """How much is known to hold of a feature, 0 to 1: its label's F1, or with categories in the
    data (`chance` is not None) the mean of that and of its category's AUC, put at 0 for `chance`
    and at 1 for 1; all on texts not used to find them."""
    claim = row.get("fidelity_f1") if by_language_model(row) else row.get("label_f1")
    if chance is None:
        return claim or 0.0
    chance, auc = min(max(chance, 0.5), 0.99), row.get("category_auc")
    return ((claim or 0.0) + (0.0 if auc is None else max((auc - chance) / (1 - chance), 0.0))) / 2


def in_order(
    rows: Sequence[Mapping[str, Any]],
    top_tokens: Sequence[Sequence[tuple[str, float]]],
    common: Container[str],
    chance: float | None,
) -> list[int]:
    """Numbers of the features that fire, those with most evidence first and plain ones last: the
    order of the report's list.

    top_tokens: of every feature, see `is_plain`; common: see `commonest`; chance: see
    `evidence_of`.
    """

    def place(row):
        plain = is_plain(top_tokens[row["feature"]], row["special_token_share"], common)
        # rounded as in the report
        return plain, -(number(evidence_of(row, chance), 3) or 0), row["feature"]

    alive = [row for row in rows if row["status"] != "dead"]
    return [row["feature"] for row in sorted(alive, key=place)]


def clearest(rows: Sequence[Mapping[str, Any]], order: Sequence[int], n: int) -> list[int]:
    """The first n features of `in_order`, one for each category: those of the first page. Where
    there are fewer, the rest in their order."""
    taken: set[str] = set()
    first, others = [], []
    for feature in order:
        category = rows[feature]["best_category"]
        (others if category and category in taken else first).append(feature)
        taken.add(category)
    return [*first, *others][:n]


def first_page(
    rows: Sequence[Mapping[str, Any]],
    shown: Sequence[int],
    field: str | None,
    table: Mapping[str, Any],
) -> dict[str, Any]:
    """What report.js draws on the first page: the categories, best first, each with its best
    feature, and how many features have a label that holds.

    table: `Features.run_table`.
    """
    alive = [row for row in rows if row["status"] != "dead"]
    claims = [
        row.get("fidelity_f1") if by_language_model(row) else row.get("label_f1") for row in alive
    ]
    n_clear = sum((f1 or 0) >= CLEAR_F1 for f1 in claims)
    n_some = sum(SOME_F1 <= (f1 or 0) < CLEAR_F1 for f1 in claims)
    return {
        "field": field,
        "categories": _categories(rows, set(shown), field, table.get("probing")),
        "kinds": [
            ["clear", n_clear],
            ["partly", n_some],
            ["none", len(alive) - n_clear - n_some],
            ["dead", len(rows) - len(alive)],
        ],
    }


def _categories(rows, shown, field, probing):
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        name = row["best_category"]
        if name and row["category_auc"] > best.get(name, {"category_auc": 0})["category_auc"]:
            best[name] = row
    probed = (probing or {}).get("per_category", {})
    found = []
    for name in {*best, *probed}:
        one = probed.get(name, {}).get("1", {})
        row = best.get(name)
        auc = one.get("features")
        if auc is None:
            auc = None if row is None else round(row["category_auc"], 4)
        if auc is not None:
            found.append(
                {
                    "name": category_name(name, field),
                    "auc": auc,
                    "random": one.get("random tokens"),
                    "feature": row["feature"] if row and row["feature"] in shown else None,
                }
            )
    return sorted(found, key=lambda entry: (-entry["auc"], entry["name"]))


def verdict(
    metrics: Mapping[str, Any], counts: Mapping[str, Any], table: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Whether the run is good: [(question, yes/partly/no/unknown, a sentence)], three of them.

    metrics: of the checkpoint; counts: `Features.summary`; table: `Features.run_table`.
    """
    return [_rebuilds(metrics, counts, table), _adds(counts, table), _reads(counts)]


def _rebuilds(metrics, counts, table):
    question = "Does it keep what the model had?"
    mse = metrics.get("normalized_mse")
    dead = counts["n_dead"] / max(counts["n_features"], 1)
    if mse is None:
        return question, "unknown", "The error of the rebuilt states was not measured."
    grade = max(_grade(mse, *GOOD_MSE), _grade(dead, *GOOD_DEAD))
    kept = ""
    if "recovered" in (loss := table.get("model_loss") or {}):
        share = 100 * loss["recovered"]["mean"]["value"]
        kept = (
            f"; with them in its place the model keeps {share:.0f} % of what the state gives its "
        )
        kept += "predictions over the mean state"
    sentence = (
        f"The states rebuilt from the features miss {100 * mse:.0f} % of the variance on "
        f"{measured_on(metrics)} examples (the mean state would miss all of it), and "
        f"{100 * dead:.0f} % of the features are dead{kept}."
    )
    return question, GRADES[grade], sentence


def _adds(counts, table):
    question = "Did training add anything?"
    if probing := table.get("probing"):
        added = probing["added_by_training"].get("random tokens") or {}
        known = {k: found for k, found in added.items() if found}
        if known:
            one, many = next(iter(known)), list(known)[-1]
            better = sum(known[k]["interval"][0] > 0 for k in (one, many))
            features = {k: probing["sparse_probing"][k]["features"]["value"] for k in (one, many)}
            sentence = (
                f"By its {many} best features the {probing['n_categories']} categories are told "
                f"apart with an AUC of {features[many]:.2f}, by {many} random tokens in their "
                f"place {_beside(known[many])}; by one feature with {features[one]:.2f}, by one "
                f"random token {_beside(known[one])}."
            )
            return question, ("no", "partly", "yes")[better], sentence
    if counts.get("mean_detection_auc") is not None:
        found, chance = counts["mean_detection_auc"], counts["mean_detection_auc_random"]
        sentence = (
            f"Five examples of a feature tell where else it fires with an AUC of {found:.2f}, of a "
            f"random direction with {chance:.2f}; there are no categories on which to compare with "
            "random tokens, which come nearer to trained features."
        )
        # partly at most: random tokens reach about as much as features do (docs/measured.md)
        return question, GRADES[1 if found - chance > 0.05 else 2], sentence
    return question, "unknown", "The data have no categories to compare on."


def _reads(counts):
    question = "Can its features be read?"
    f1 = counts.get("mean_label_f1")
    if f1 is None:
        return question, "unknown", "No feature fires often enough for a rule to be tested."
    detection = ""
    if counts.get("mean_detection_auc") is not None:
        detection = (
            f"; five examples tell where else one fires with an AUC of "
            f"{counts['mean_detection_auc']:.2f} (random directions "
            f"{counts['mean_detection_auc_random']:.2f})"
        )
    sentence = (
        f"{counts['n_with_rule']:,} of {counts['n_features'] - counts['n_dead']:,} features have a "
        f"rule, and on other texts the mean F1 is {f1:.2f} (another feature's rule: "
        f"{counts['mean_label_f1_other_rule']:.2f}){detection}."
    )
    return question, GRADES[_grade(-f1, *(-bound for bound in GOOD_F1))], sentence


GRADES = ("yes", "partly", "no")


def _grade(value, good, fair):
    """The number in GRADES of a figure that should be small."""
    return 0 if value <= good else 1 if value <= fair else 2


def _beside(found):
    """'less (difference 0.02 ±0.01)', said of the null that a difference with its interval is
    above."""
    low, high = found["interval"]
    word = "less" if low > 0 else "more" if high < 0 else "as well"
    return f"{word} (difference {found['value']:+z.2f} ±{(high - low) / 2:.2f})"
