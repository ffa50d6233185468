"""What the model loses when its residual stream is replaced by the autoencoder's reconstruction, on
a few held-out examples: loss recovered and KL divergence, against zeros and the mean in its place.

Only where the model's weights are on this machine and not large; `studies/loss_recovered.py`
measures the same on as many examples as wanted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsae.data.tokenization import SHARED_PREFIX
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.sae import Autoencoder

if TYPE_CHECKING:
    import torch

    from fastsae.lm.hook_points import HookPoint

TOKENS = 512  # of held-out examples, in all
EXAMPLE_TOKENS = 512  # of an example at most, from its beginning
BATCH_TOKENS = 256  # their logits are held three times
MODEL_BYTES = 1 << 30  # of weights on disk; a larger model runs on a GPU only
N_RESAMPLED = 1000  # bootstrap resamples of the examples
REPLACED = ("spliced", "zero", "mean")


def weights_on_disk(located: Path | str, *, revision: str | None, cache_dir: str | None) -> int:
    """Bytes of a model's weights on this machine, 0 where they are not here; nothing is
    downloaded."""
    from fastsae.interpretation.unembedding import local_folder

    folder = local_folder(located, revision, cache_dir)
    if folder is None:
        return 0
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def model_at_hand(
    name: str, *, revision: str | None, cache_dir: str | None, device: str, width: int
) -> tuple[Any, str]:
    """(the whole model, "") or (None, why it is not run here).

    width: dimensions of the stream that the autoencoder takes.
    """
    from fastsae.lm import devices, loading
    from fastsae.lm.residual import decoder_stack
    from fastsae.lm.sources import model_source

    n_bytes = weights_on_disk(model_source(name, cache_dir), revision=revision, cache_dir=cache_dir)
    if not n_bytes:
        return None, "the model's weights are not on this machine"
    device = devices.choose_device(device)
    if device == "cpu" and n_bytes > MODEL_BYTES:
        return None, f"the model has {n_bytes / 1e9:.1f} GB, which is slow without a GPU"
    hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    try:
        if loading.load_config(name, **hub).hidden_size != width:
            return None, "the activations are not of the model's own stream"
        dtype = devices.choose_dtype("auto", device)
        model = loading.load_model(name, **hub, device=device, dtype=dtype)
        stack = decoder_stack(model)
    except (InputError, EnvironmentFailure) as error:  # an extra: the stage goes on without it
        return None, str(error)
    if device == "cpu":
        from fastsae.lm.cpu_kernels import quicken

        copy_the_rest(model, stack.layers)
        quicken(stack)
    return model, ""


def copy_the_rest(model: Any, blocks: Any) -> None:
    """Put every parameter but the blocks' matrices into memory of its own. These are about to be
    packed; then nothing holds the weights' file, which is mapped, in memory."""
    from fastsae.lm.mapped_weights import clean_mappings, give_back

    matrices = {id(each) for each in blocks.parameters() if each.ndim > 1}
    mappings = clean_mappings()
    for parameter in model.parameters():
        if id(parameter) not in matrices:
            mapped, parameter.data = parameter.data, parameter.data.clone()
            give_back([mapped], mappings)


def some_held_out(
    data: Mapping[str, Any], candidates: Sequence[int], seed: int
) -> list[tuple[int, int]]:
    """[(first token, token after the last)] of random examples among `candidates`, of about TOKENS
    tokens in all."""
    offsets = np.concatenate([[0], np.cumsum(data["seq_lengths"], dtype=np.int64)])
    chosen, n = [], 0
    for i in np.random.default_rng((seed, 9)).permutation(np.asarray(candidates, np.int64)):
        length = min(int(offsets[i + 1] - offsets[i]), EXAMPLE_TOKENS, TOKENS - n)
        if length > 1:
            chosen.append((int(offsets[i]), int(offsets[i]) + length))
            n += length
        if n >= TOKENS:
            break
    return chosen


def measure(
    model: Any,
    sae: Autoencoder,
    at: "int | HookPoint",
    data: Mapping[str, Any],
    kept: np.ndarray,
    spans: Sequence[tuple[int, int]],
    mean: "torch.Tensor",
    seed: int,
) -> dict[str, Any]:
    """Losses in nats with what there is at a layer, or a hook point, as it is ("clean") and
    replaced.

    data: the members of an activations file; kept (n_tokens,) bool: the tokens that are replaced,
    all others stay; spans: of `some_held_out`; mean (d,): what stands for the mean. The losses are
    of the tokens after the shared prefix. Intervals are of a bootstrap over the examples.
    """
    import torch

    from fastsae import intervention
    from fastsae.intervention import constant, only, reconstruction

    rows = np.concatenate([np.arange(*span) for span in spans])
    usable = kept[rows]
    functions = (reconstruction(sae), constant(torch.zeros_like(mean)), constant(mean))
    losses = intervention.next_token_losses(
        model,
        at,
        [np.asarray(data["token_ids"][slice(*span)]) for span in spans],
        {name: only(usable, function) for name, function in zip(REPLACED, functions)},
        batch_tokens=BATCH_TOKENS,
    )
    example = np.repeat(np.arange(len(spans)), [stop - start for start, stop in spans])
    # nothing predicts the first token of an example
    counted = (data["token_kind"][rows] != SHARED_PREFIX) & ~np.isnan(losses["clean"].ce)
    return summarise(
        {name: each.ce[counted] for name, each in losses.items()},
        {name: losses[name].kl[counted] for name in REPLACED},
        example[counted],
        seed,
    )


def summarise(
    ce: Mapping[str, np.ndarray], kl: Mapping[str, np.ndarray], example: np.ndarray, seed: int
) -> dict[str, Any]:
    """Means of losses {name: (n,)} over tokens of examples (n,), and loss recovered against both
    ablations with its interval."""
    from fastsae.intervention import loss_recovered

    numbers, of = np.unique(example, return_inverse=True)
    sums = {name: np.bincount(of, each.astype(np.float64)) for name, each in ce.items()}
    n = len(numbers)
    draws = np.random.default_rng((seed, 10)).multinomial(n, np.full(n, 1 / n), N_RESAMPLED)

    def recovered(of_examples, ablation):
        total = {name: of_examples @ each for name, each in sums.items()}
        with np.errstate(divide="ignore", invalid="ignore"):
            return loss_recovered(total["clean"], total["spliced"], total[ablation])

    return {
        "n_examples": n,
        "n_tokens": len(example),
        "ce": {name: float(each.mean(dtype=np.float64)) for name, each in ce.items()},
        "kl": {name: float(each.mean(dtype=np.float64)) for name, each in kl.items()},
        "recovered": {
            ablation: {
                "value": float(recovered(np.ones(n), ablation)),
                "interval": np.quantile(recovered(draws, ablation), (0.025, 0.975)).tolist(),
            }
            for ablation in ("zero", "mean")
        },
    }
