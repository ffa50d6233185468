"""Feature files for Neuronpedia's batch upload (`POST /api/feature/upload-batch`), checked against
the limits it sets.

Its rules as of 20 August 2026: no token is an empty string, a method's name must be one of its own
(null here), a model's name is not empty (null without a model), an index is at most 10,000,000, and
a feature has an activation of a token at least. The model and the source set must exist there
before a batch is sent.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsae.data.token_text import seen_values
from fastsae.interpretation.tables import by_language_model
from fastsae.lm.hook_points import HookPoint
from fastsae.lm.names import short_name
from fastsae.runtime import artifacts, storage

if TYPE_CHECKING:
    from fastsae.interpretation.evidence import Evidence

BATCH = 128  # features per file
MAX_TOKENS = 1024  # per activation
N_LOGITS = 20
MAX_INDEX = 10_000_000
# a token that is a later piece of a character: its first piece shows the character and has the
# value
PIECE = "\ufffd"
NUMBER, TEXT, NULL = {"type": "number"}, {"type": "string", "minLength": 1}, {"type": "null"}
LOGITS = {
    "type": "array",
    "maxItems": N_LOGITS,
    "items": {
        "type": "object",
        "required": ["token", "value"],
        "properties": {"token": TEXT, "value": NUMBER},
    },
}
SCHEMA = {  # JSON Schema; `check` knows the few words used here
    "type": "object",
    "required": ["modelId", "source", "features"],
    "properties": {
        "modelId": {"type": "string", "minLength": 1},
        "source": {"type": "string", "pattern": r"^\d+-[\w.-]+$"},
        "features": {
            "type": "array",
            "maxItems": BATCH,
            "items": {
                "type": "object",
                "required": [
                    "index",
                    "density",
                    "topLogits",
                    "bottomLogits",
                    "explanations",
                    "activations",
                ],
                "properties": {
                    "index": {"type": "integer", "minimum": 0, "maximum": MAX_INDEX},
                    "density": {"type": "number", "minimum": 0, "maximum": 1},
                    "topLogits": LOGITS,
                    "bottomLogits": LOGITS,
                    "explanations": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["text", "methodName", "modelName"],
                            "properties": {
                                "text": {"type": "string", "minLength": 1, "maxLength": 512},
                                "methodName": NULL,
                                "modelName": {"type": ["string", "null"], "minLength": 1},
                            },
                        },
                    },
                    "activations": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": [
                                "tokens",
                                "values",
                                "quantileMin",
                                "quantileMax",
                                "quantileFraction",
                            ],
                            "properties": {
                                "tokens": {
                                    "type": "array",
                                    "minItems": 1,
                                    "maxItems": MAX_TOKENS,
                                    "items": TEXT,
                                },
                                "values": {
                                    "type": "array",
                                    "minItems": 1,
                                    "maxItems": MAX_TOKENS,
                                    "items": NUMBER,
                                },
                                "quantileMin": NUMBER,
                                "quantileMax": NUMBER,
                                "quantileFraction": NUMBER,
                            },
                        },
                    },
                },
            },
        },
    },
}
TYPES: dict = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def check(value: Any, schema: dict = SCHEMA, where: str = "batch") -> None:
    """Raise ValueError, saying where, if `value` breaks the schema."""

    def require(ok, what):
        if not ok:
            raise ValueError(f"{where}: {what}")

    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    kind = next(
        (kind for kind in kinds if isinstance(value, TYPES[kind]) and not isinstance(value, bool)),
        None,
    )
    require(kind, f"expected {' or '.join(kinds)}, got {str(value)[:40]!r}")
    if kind == "null":
        return
    if kind == "object":
        require(
            set(schema["required"]) == set(value),
            f"has the fields {sorted(value)}, not {sorted(schema['required'])}",
        )
        for name, part in schema["properties"].items():
            check(value[name], part, f"{where}.{name}")
    elif kind == "array":
        require(
            schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)),
            f"has {len(value)} items",
        )
        for i, item in enumerate(value):
            check(item, schema["items"], f"{where}[{i}]")
    elif kind == "string":
        require(
            schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)),
            f"has {len(value)} characters",
        )
        require(
            re.search(schema.get("pattern", ""), value),
            f"{value!r} does not match {schema.get('pattern')}",
        )
    else:
        require(
            np.isfinite(value)
            and schema.get("minimum", value) <= value <= schema.get("maximum", value),
            f"{value} is out of range",
        )


def write_batches(
    folder: Path | str,
    evidence: "Evidence",
    rows: Sequence[Mapping[str, Any]],
    lens: Mapping[int, tuple],
    *,
    model_id: str,
    hook_point: HookPoint,
    name: str,
) -> list[Path]:
    """Write `batch-000.json`, ... for all features that fire, and return their paths."""
    alive = [row["feature"] for row in rows if row["status"] != "dead"]
    source = hook_point.neuronpedia_source(name)
    paths = []
    if beyond := [j for j in alive if j > MAX_INDEX]:
        print(
            f"warning: {len(beyond):,} features beyond number {MAX_INDEX:,} are left out: "
            "Neuronpedia takes none."
        )
        alive = [j for j in alive if j <= MAX_INDEX]
    for start in range(0, len(alive), BATCH):
        chosen = alive[start : start + BATCH]
        examples = evidence.shown_examples(chosen)
        values = evidence.token_values(
            [(j, example) for j in chosen for _, example, _ in examples[j]]
        )
        # a feature without an activation would be refused
        batch = {
            "modelId": model_id,
            "source": source,
            "features": [
                feature(evidence, rows[j], examples[j], values, lens.get(j, ([], [])))
                for j in chosen
                if examples[j]
            ],
        }
        check(batch)
        paths.append(Path(folder) / source / f"batch-{start // BATCH:03}.json")
        artifacts.write_text(
            paths[-1], json.dumps(batch, ensure_ascii=False, allow_nan=False) + "\n"
        )
    # of an earlier run with more features that fire
    for left in set((Path(folder) / source).glob("batch-*.json")) - set(paths):
        storage.remove(left)
    return paths


def feature(
    evidence: "Evidence",
    row: Mapping[str, Any],
    examples: Sequence[tuple],
    values: Mapping[tuple[int, int], tuple],
    lens: Sequence,
) -> dict[str, Any]:
    """One feature as SCHEMA has it."""
    j = row["feature"]
    # what a language model wrote has its name
    source = str(row["label_source"] or "").removeprefix("local:")
    model = short_name(source) if by_language_model(row) else None
    label = row["label"] or ""
    explanation = {"text": shortened(label), "methodName": None, "modelName": model or None}
    return {
        "index": j,
        "density": row["density"],
        "topLogits": logits(lens[0]),
        "bottomLogits": logits(lens[1]),
        "explanations": [explanation] if label.strip() else [],
        "activations": [
            activation(evidence, j, *example, *values[j, example[1]]) for example in examples
        ],
    }


def shortened(label: str, n: int = 512) -> str:
    """The label in at most n UTF-16 units, which is how JavaScript counts characters."""
    return label.encode("utf-16-le", "replace")[: 2 * n].decode("utf-16-le", "ignore")


def logits(tokens: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """The first N_LOGITS (token, logit) pairs as SCHEMA has them."""
    return [{"token": token or PIECE, "value": figure(value)} for token, value in tokens[:N_LOGITS]]


def figure(value: float) -> float:
    """A number with six significant digits."""
    return float(f"{value:.6g}")


def activation(
    evidence: "Evidence",
    j: int,
    quantile: float | None,
    example: int,
    peak: int,
    positions: np.ndarray,
    strengths: np.ndarray,
) -> dict[str, Any]:
    """One example, cut to MAX_TOKENS around its strongest token. The quantile interval is the tenth
    of the feature's range that holds its maximum; its fraction, the share of the sampled firing
    examples in that tenth.
    """
    texts = evidence.token_texts(example)
    left = max(0, min(peak - MAX_TOKENS // 2, len(texts) - MAX_TOKENS))
    dense = np.zeros(len(texts))
    positions, strengths = seen_values(texts, positions, strengths)
    dense[positions] = strengths
    largest, width = float(strengths.max(initial=0)), float(evidence.statistics.maximum[j]) / 10
    tenth = min(int(largest / width), 9)
    sampled = evidence.statistics.sample.value[j]
    sampled = sampled[sampled > 0]
    inside = (np.minimum((sampled / width).astype(int), 9) == tenth).mean()
    return {
        "tokens": [text or PIECE for text in texts[left : left + MAX_TOKENS]],
        "values": [figure(v) for v in dense[left : left + MAX_TOKENS]],
        "quantileMin": figure(tenth * width),
        "quantileMax": figure((tenth + 1) * width),
        "quantileFraction": round(float(inside), 4),
    }
