"""Tokens that a feature promotes and suppresses: its decoder direction read through the model's final norm and unembedding."""
import json
from pathlib import Path

import numpy as np
import torch

from fastsae.token_text import visible

BLOCK = 256  # features at a time
HEAD = ("lm_head.weight",)
EMBEDDING = ("embed_tokens.weight", "wte.weight")
FINAL_NORM = ("model.norm.weight", "language_model.norm.weight", "transformer.ln_f.weight")
ONE_PLUS_WEIGHT = ("gemma", "gemma2", "gemma3", "gemma3_text", "qwen3_next")  # their norm multiplies by 1 + weight


def add_lens(rows, evidence, located, source, n_top, n_column):
    """Name in each row of a feature that fires the tokens it promotes and suppresses; {feature: ([(token, logit)], [...])}.

    `located` and `source` ({"revision", "cache_dir"}) say where the model's weights are; {} where they are not at hand.
    """
    unembedding, decoder = load_unembedding(located, **source), evidence.sae.decoder.weight.t()
    if unembedding is None or unembedding.shape[1] != decoder.shape[1]:
        return {}
    lens, sides = {}, promoted_and_suppressed(decoder, unembedding.to(decoder.device), n_top)
    for row in rows:
        if row["status"] != "dead":
            j = row["feature"]
            lens[j] = tuple([("".join(evidence.texts_of([t])), float(v)) for t, v in zip(ids[j], values[j])] for ids, values in sides)
            for name, side in zip(("promoted_tokens", "suppressed_tokens"), lens[j]):
                row[name] = ", ".join(f"'{visible(token.strip() or token)}'" for token, _ in side[:n_column])
    return lens


@torch.no_grad()
def promoted_and_suppressed(decoder_rows, unembedding, n_top):
    """(ids, values) of the n_top largest and of the n_top smallest logits of each feature, (M, n_top) each, strongest first.

    decoder_rows (M, d); unembedding (vocabulary, d) with the final norm's weights folded in: see `load_unembedding`.
    """
    up, down = ([], []), ([], [])
    for start in range(0, len(decoder_rows), BLOCK):
        logits = decoder_rows[start:start + BLOCK].float() @ unembedding.t()   # (block, vocabulary)
        for largest, (ids, values) in ((True, up), (False, down)):
            best = logits.topk(min(n_top, logits.shape[1]), dim=1, largest=largest)
            ids.append(best.indices.cpu().numpy())
            values.append(best.values.cpu().numpy())
    return tuple(tuple(np.concatenate(part) for part in side) for side in (up, down))


def load_unembedding(located, *, revision=None, cache_dir=None):
    """The unembedding (vocabulary, d) float32 times the final norm's weights, or None where the model's weights are not at hand.

    Reads these two tensors only, from a folder or the hub's local cache; nothing is downloaded.
    """
    folder = _folder(located, revision, cache_dir)
    if folder is None:
        return None
    files = _tensor_files(folder)
    head = _find(files, HEAD) or _find(files, EMBEDDING)  # tied models store no head of their own
    norm = _find(files, FINAL_NORM)
    if not head or not norm:
        return None
    scale = _read(files, norm).float()
    if _model_type(folder) in ONE_PLUS_WEIGHT:
        scale = scale + 1
    matrix = _read(files, head).float()
    return matrix * scale if matrix.shape[1] == len(scale) else None


def _model_type(folder):
    try:
        config = json.loads((folder / "config.json").read_text())
        return config.get("text_config", config).get("model_type", "")
    except (OSError, ValueError, AttributeError):
        return ""


def _folder(located, revision, cache_dir):
    path = Path(located)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return None
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(located, revision=revision or "main", local_files_only=True,
                                      cache_dir=str(Path(cache_dir) / "hub") if cache_dir else None))
    except (OSError, ValueError):  # not in the cache: the lens is an extra, the stage goes on without it
        return None


def _tensor_files(folder):
    """{tensor name: file} of a folder of safetensors."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    return found


def _find(files, endings):
    return next((name for ending in endings for name in files if name.endswith(ending) and "vision" not in name), None)


def _read(files, name):
    from safetensors import safe_open

    with safe_open(str(files[name]), "pt") as tensors:
        return tensors.get_tensor(name)
