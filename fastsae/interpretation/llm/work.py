"""What the language model is asked of the features of a run, and what becomes of its answers."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from fastsae.interpretation.features import Features
from fastsae.interpretation.llm.client import Asker, ChatEndpoint
from fastsae.interpretation.llm.labels import Labelling, plain_text
from fastsae.interpretation.llm.shown import Shown
from fastsae.settings.values import Settings


def plan_work(
    features: Features, backend: Any, labelled: Iterable[int], settings: Settings
) -> Labelling:
    """The work of labelling these features, and of scoring a random sample of those that fire.

    backend: what `choose_backend` gave; None in a dry run without a key.
    """
    asker = Asker(
        backend or ChatEndpoint("none", None, settings.INTERPRETER_MODEL, timeout=1),
        settings.run_dir / "llm_replies.jsonl",
        n_workers=settings.N_LLM_WORKERS,
        retry_unusable=settings.RETRY_UNUSABLE,
    )
    alive = [row["feature"] for row in features.rows if row["status"] != "dead"]
    sample = [alive[i] for i in np.random.default_rng((settings.SEED, 4)).permutation(len(alive))]
    asked = settings.N_TOP_NEURONS > 0  # else a dry run has nothing to count
    texts = [plain_text(example) for example in features.examples]
    return Labelling(
        Shown(features.evidence, texts, settings.SEED),
        asker,
        protocol=settings.LLM_PROTOCOL,
        labelled=list(dict.fromkeys(labelled)) if asked else [],
        candidates=sample,
        n_scored=settings.N_SCORED_FEATURES if asked else 0,
        n_fidelity=settings.N_FIDELITY_EXAMPLES,
        n_judged=settings.N_JUDGED_EXAMPLES,
        rules={row["feature"]: row["rule"] for row in features.rows if row["rule"]},
    )


def add_labels(rows: list[dict[str, Any]], work: Labelling) -> list[float]:
    """Ask, and put labels, scores and validation into the rows of the features asked about.

    Returns the scores of the random sample.
    """
    for j, result in work.run().items():
        row, problems = rows[j], result.pop("problems")
        row.update(result)
        if "label" in result:
            row["label_source"] = work.asker.backend.model
        if problems:
            row["status"] = f"llm {'; '.join(problems)}"
    return [rows[j]["score"] for j in work.scored if rows[j]["score"] is not None]
