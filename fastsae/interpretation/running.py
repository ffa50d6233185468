"""What only the running model tells of a run, where its weights are at hand: what it loses with the
reconstruction in place of its stream, and what its clearest features do.

An extra: where the model cannot be run, or fails while it runs, the stage goes on without it.
"""

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastsae.interpretation import effects, model_loss
from fastsae.interpretation.nulls import KINDS
from fastsae.intervention import stop_ids_of
from fastsae.lm.hook_points import HookPoint
from fastsae.runtime import progress, stops
from fastsae.runtime.machine_errors import is_out_of_memory

if TYPE_CHECKING:
    from fastsae.interpretation.features import Features

PARTS = ("model_loss", "effects")  # of the run table


def add_what_the_model_tells(features: "Features") -> None:
    """Put PARTS into the run table, each with its figures or {"not_measured": why}, and `effects`
    and two of their figures into the rows of the features with most evidence."""
    why_not = "" if features.settings.RUN_MODEL else "RUN_MODEL is off"
    if not why_not and not features.untrained.dictionaries:
        why_not = "there are no tokens for it"
    found: dict[str, dict[str, Any]] = {}
    if not why_not:
        found, why_not = _attempted(lambda: _run(features))
    for part in PARTS:
        features.run_table[part] = found.get(part) or {"not_measured": why_not}


def _run(features):
    """({part: figures}, "") or ({}, why not)."""
    settings, source = features.settings, features.source
    progress.step("loading the model")
    model, why_not = model_loss.model_at_hand(
        source["model_name"],
        revision=source["model_revision"],
        cache_dir=settings.CACHE_DIR,
        device=settings.DEVICE,
        width=features.evidence.sae.input_dim,
    )
    if model is None:
        return {}, why_not
    found = {}
    for part, measure in zip(PARTS, (_loss, _effects)):
        figures, why_not = _attempted(functools.partial(_measured, measure, features, model))
        found[part] = figures or {"not_measured": why_not or "there are no tokens for it"}
    return found, ""


def _measured(measure, features, model):
    return measure(features, model), ""


def _attempted(run: Callable[[], tuple[dict, str]]) -> tuple[dict, str]:
    """What `run()` gives; ({}, why), and a line that says so, where the model fails."""
    try:
        return run()
    # whatever a model's author chose to raise, and what a device does: the result is worth more
    except Exception as error:
        if stops.raised() is not None:  # a library made this error of the stop
            raise
        why = "there was not enough memory" if is_out_of_memory(error) else _in_one_line(error)
        print(
            f"warning: the model could not be run: {why}. the report goes without what it would "
            "tell; --no-run-model leaves it out.",
            file=sys.stderr,
        )
        return {}, why


def _in_one_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {lines[0][:200]}' if lines else ''}"


def _loss(features, model):
    evidence, meta = features.evidence, features.sae_meta
    own = meta.get("test_examples") or meta.get("validation_examples")
    candidates = own or range(len(evidence.data["seq_lengths"]))
    spans = model_loss.some_held_out(evidence.data, candidates, features.settings.SEED)
    if not spans:
        return {}
    progress.step("running the model with the reconstruction in place of its stream")
    return {
        "held_out": own is not None,
        **model_loss.measure(
            model,
            evidence.sae,
            HookPoint.of_activations(features.source),
            evidence.data,
            evidence.statistics.kept,
            spans,
            features.untrained.dictionaries[0].input_bias,
            features.settings.SEED,
        ),
    }


def _effects(features, model):
    evidence, at = features.evidence, HookPoint.of_activations(features.source)
    s = evidence.statistics
    passages = effects.passages_of(evidence, features.clearest(effects.N_FEATURES))
    drawn = [each for each in features.untrained.dictionaries if each.kind == KINDS[1]]
    directions = drawn[0].encoder.weight
    if not passages:
        return {}
    progress.step("running the model with features taken out and added")
    found = effects.changes(model, evidence.sae, at, passages, directions)
    written = effects.continuations(
        model,
        evidence.sae,
        at,
        [passage for passage in passages if passage.feature in found],
        {j: float(s.total[j] / s.count[j]) for j in found},
        directions[0],
        stop_ids_of(model, evidence.tokenizer),
    )
    for feature, effect in found.items():
        going_on = written.get(feature)
        features.rows[feature].update(
            kl_removed=effect[effects.REMOVED]["kl"],
            kl_random=sum(effect[effects.REMOVED]["random_kl"]) / effects.N_RANDOM,
            effects={**effect, "continuations": going_on and _as_text(going_on, evidence)},
        )
    return effects.summary(list(found.values())) if found else {}


def _as_text(written, evidence):
    """The texts of a prompt, without the prefix that all examples share, and of what follows it."""
    example = written["example"]
    own = evidence.own_start(example) - written["start"]
    cut = "… " if own < 0 else ""
    ways = (effects.UNCHANGED, *effects.SIGNS, effects.RANDOM)
    return {
        "line": int(evidence.data["example_ids"][example]),
        "prompt": cut + "".join(evidence.texts_of(written["prompt"])[max(0, own) :]),
        **{name: "".join(evidence.texts_of(written[name])) for name in ways},
    }
