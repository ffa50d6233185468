"""What was probably meant by a flag or a constant that does not exist."""

import difflib

# Words of other programs and near misses that no part of the name gives away.
SYNONYMS = {
    "layer": "layer-idx",
    "model": "model-name",
    "model-path": "model-name",
    "lr": "learning-rate",
    "dataset": "dataset-path",
    "data": "dataset-path",
    "data-path": "dataset-path",
    "file": "dataset-path",
    "input": "dataset-path",
    "epochs": "n-epochs",
    "epoch": "n-epochs",
    "num-epochs": "n-epochs",
    "prefixes": "matryoshka-prefixes",
    "matryoshka": "matryoshka-prefixes",
    "use-matryoshka": "matryoshka-prefixes",
    "batch": "batch-size",
    "features": "m",
    "n-features": "m",
    "width": "m",
    "d-sae": "m",
    "n-latents": "m",
    "latents": "m",
    "dict-size": "m",
    "top-k": "k",
    "topk": "k",
    "k-active": "k",
    "output": "output-dir",
    "out": "output-dir",
    "out-dir": "output-dir",
    "name": "run-name",
    "run": "run-name",
    "label": "label-field",
    "labels": "label-field",
    "text-column": "text-field",
    "context": "max-length",
    "context-length": "max-length",
    "context-size": "max-length",
    "ctx-len": "max-length",
    "seq-len": "max-length",
    "max-seq-len": "max-length",
    "limit": "max-examples",
    "max-samples": "max-examples",
    "n-examples": "max-examples",
    "random-seed": "seed",
    "warmup": "warmup-steps",
    "lr-warmup": "warmup-steps",
    "l1-warm-up-steps": "warmup-steps",
    "scheduler": "lr-schedule",
    "l1": "sparsity-coefficient",
    "l1-coeff": "sparsity-coefficient",
    "l0": "sparsity-coefficient",
    "gpu": "device",
    "arch": "architecture",
    "llm": "interpreter-model",
    "interpreter": "interpreter-model",
    "sae": "sae-path",
    "checkpoint": "sae-path",
    "silent": "quiet",
    "format": "export",
    "dead": "dead-after-tokens",
    "normalize": "normalize-activations",
    "val-fraction": "validation-fraction",
    "prompt": "text",
    "target": "target-field",
    "cache": "cache-dir",
    "revision": "model-name",
}
MOST = 3  # names in one suggestion
CLOSE = 0.75  # of difflib's ratio: one slip in a short word, two or three in a long one


def nearest(word: str, names: list[str]) -> list[str]:
    """Up to three of `names` (`layer-idx`) that `word` could mean, the likeliest first.

    A word that is known means one name. Then come names that begin with it or with which it begins,
    names that share its words, and names that differ by slips of the hand.
    """
    word = word.strip("-").lower().replace("_", "-")
    if word in names:
        return [word]
    if SYNONYMS.get(word) in names:
        return [SYNONYMS[word]]
    begins = [name for name in names if name.startswith(word) and len(word) >= 2]
    longer = [name for name in names if word.startswith(name) and len(name) >= 4]
    parts = set(word.split("-"))
    whole = [name for name in names if parts <= set(name.split("-"))]
    slips = difflib.get_close_matches(word, names, n=MOST, cutoff=CLOSE)
    long_parts = {part for part in parts if len(part) >= 4}
    shared = [name for name in names if long_parts & set(name.split("-"))]
    for found in (begins, whole, [*longer, *slips], shared):
        if found:
            return sorted(found, key=lambda name: not_alike(word, name))[:MOST]
    return []


def not_alike(word: str, name: str) -> float:
    """How far a name is from a word, from 0 to 1, less where one begins with the other."""
    begins = word.startswith(name) or name.startswith(word)
    return 1 - difflib.SequenceMatcher(None, word, name).ratio() - 0.3 * begins


def nearest_name(name: str, names: list[str]) -> str | None:
    """The one of `names` (`LAYER_IDX`) that `name` is nearest to, or None if none is near."""
    flags = {each.lower().replace("_", "-"): each for each in names}
    found = nearest(name, list(flags))
    return flags[found[0]] if found else None


def listed(words: list[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
