"""Tokens that a feature promotes and suppresses: its decoder direction read through the model's
final norm and unembedding."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastsae.data.token_text import visible
from fastsae.runtime.machine_errors import cause_in_machine

if TYPE_CHECKING:
    from fastsae.interpretation.evidence import Evidence

BLOCK = 256  # features at a time
HEAD = ("lm_head.weight",)
EMBEDDING = ("embed_tokens.weight", "wte.weight")
FINAL_NORM = ("model.norm.weight", "language_model.norm.weight", "transformer.ln_f.weight")


def add_lens(
    rows: list[dict[str, Any]],
    evidence: "Evidence",
    located: Path | str,
    source: Mapping[str, Any],
    n_top: int,
    n_column: int,
) -> dict[int, tuple]:
    """Name in each row of a feature that fires the tokens it promotes and suppresses; {feature:
    ([(token, logit)], [...])}.

    `located` and `source` ({"revision", "cache_dir"}) say where the model's weights are; {} where
    they are not at hand.
    """
    unembedding, decoder = load_unembedding(located, **source), evidence.sae.decoder.weight.t()
    if unembedding is None or unembedding.shape[1] != decoder.shape[1]:
        return {}
    lens, sides = {}, promoted_and_suppressed(decoder, unembedding.to(decoder.device), n_top)
    for row in rows:
        if row["status"] != "dead":
            j = row["feature"]
            lens[j] = tuple(
                [("".join(evidence.texts_of([t])), float(v)) for t, v in zip(ids[j], values[j])]
                for ids, values in sides
            )
            for name, side in zip(("promoted_tokens", "suppressed_tokens"), lens[j]):
                row[name] = ", ".join(
                    f"'{visible(token.strip() or token)}'" for token, _ in side[:n_column]
                )
    return lens


@torch.no_grad()
def promoted_and_suppressed(
    decoder_rows: torch.Tensor, unembedding: torch.Tensor, n_top: int
) -> tuple:
    """(ids, values) of the n_top largest and of the n_top smallest logits of each feature, (M,
    n_top) each, strongest first.

    decoder_rows (M, d); unembedding (vocabulary, d) with the final norm's weights folded in: see
    `load_unembedding`.
    """
    up, down = ([], []), ([], [])
    for start in range(0, len(decoder_rows), BLOCK):
        block = decoder_rows[start : start + BLOCK].float()
        logits = block @ unembedding.t()  # (block, vocabulary)
        for largest, (ids, values) in ((True, up), (False, down)):
            best = logits.topk(min(n_top, logits.shape[1]), dim=1, largest=largest)
            ids.append(best.indices.cpu().numpy())
            values.append(best.values.cpu().numpy())
    return tuple(tuple(np.concatenate(part) for part in side) for side in (up, down))


def load_unembedding(
    located: Path | str, *, revision: str | None = None, cache_dir: Path | str | None = None
) -> torch.Tensor | None:
    """The unembedding (vocabulary, d) float32 times the final norm's weights, or None where the
    model's weights are not at hand.

    None too unless the final norm is an RMSNorm: one that subtracts the mean or adds a bias does
    not fold into the matrix like this. Reads these two tensors only, from a folder or the hub's
    local cache; nothing is downloaded.
    """
    folder = _folder(located, revision, cache_dir)
    if folder is None:
        return None
    files = _tensor_files(folder)
    head = _find(files, HEAD) or _find(files, EMBEDDING)  # tied models store no head of their own
    norm = _find(files, FINAL_NORM)
    if not head or not norm:
        return None
    offset = norm_offset(_final_norm(folder))
    if offset is None:
        return None
    scale = _read(files, norm).float() + offset
    matrix = _read(files, head).float()
    return matrix * scale if matrix.shape[1] == len(scale) else None


@torch.no_grad()
def norm_offset(norm: Any) -> int | None:
    """0 where a module computes x / rms(x) * weight, 1 where it computes x / rms(x) * (1 + weight),
    found by trying; else None."""
    if (
        norm is None
        or [name for name, _ in norm.named_parameters()] != ["weight"]
        or list(norm.buffers())
    ):
        return None
    norm = copy.deepcopy(norm).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(norm.weight.shape, generator=generator)
    norm.weight.copy_(weight)
    # large beside any eps, and with a mean
    x = 100 * torch.randn(4, len(weight), generator=generator) + 50
    found, normed = norm(x), x / x.square().mean(1, keepdim=True).sqrt()
    return next(
        (
            offset
            for offset in (0, 1)
            if torch.allclose(found, normed * (weight + offset), rtol=1e-3, atol=1e-3)
        ),
        None,
    )


def _final_norm(folder):
    """The module of the model's final norm, without its values; None for a model that transformers
    does not know or that has none."""
    import transformers

    from fastsae.lm.loading import load_config
    from fastsae.lm.residual import decoder_stack

    try:
        config = load_config(str(folder))
        with torch.device("meta"):
            return decoder_stack(transformers.AutoModelForCausalLM.from_config(config)).norm
    # configurations raise what their authors chose; the lens is an extra, the stage goes on without
    # it
    except Exception:
        return None


def _folder(located, revision, cache_dir):
    path = Path(located)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return None
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                located,
                revision=revision or "main",
                local_files_only=True,
                cache_dir=str(Path(cache_dir) / "hub") if cache_dir else None,
            )
        )
    # not in the cache: the lens is an extra, the stage goes on without it
    except (OSError, ValueError) as error:
        if cause := cause_in_machine(error, missing=False):
            raise cause from None
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
    return next(
        (
            name
            for ending in endings
            for name in files
            if name.endswith(ending) and "vision" not in name
        ),
        None,
    )


def _read(files, name):
    from safetensors import safe_open

    with safe_open(str(files[name]), "pt") as tensors:
        return tensors.get_tensor(name)
