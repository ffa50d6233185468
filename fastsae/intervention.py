"""The whole model with its residual stream after one layer replaced: what that does to its losses,
and to the text it writes.

`at` is a layer, counted as LAYER_IDX counts: the stream after so many blocks; or a `HookPoint`, for
what there is in a block. Several examples go
through the model together, padded on the right; attention is causal, so none of them sees another
or its padding. Works on any model that `decoder_stack` knows.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from fastsae.activations.extraction import split_batches
from fastsae.lm.decoders import decoder_stack, stream_of, with_stream
from fastsae.lm.hook_points import HookPoint
from fastsae.lm.places import place_of
from fastsae.runtime.machine_errors import is_out_of_memory
from fastsae.sae import Autoencoder
from fastsae.sae.autoencoder import decode, encode

# rows of logits that are turned into losses at a time: 64 x 49,152 floats are 13 MB
LOGIT_ROWS = 64
N_COMPARED = 32  # places at which a model that begins later has to give the same logits
# what can take the stream's place: (x (n, d_model), token (n,)) -> (n, d_model)
Replacement: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Losses:
    """Of every token of the examples, one after the other; NaN for the first of each, which nothing
    predicts."""

    ce: np.ndarray  # (n_tokens,) float32, -log p(token | those before it), nats
    # (n_tokens,) float32, KL(unpatched || patched) of the distributions that predict the token,
    # nats
    kl: np.ndarray


def point_of(at: int | HookPoint) -> HookPoint:
    """The hook point that a layer stands for, or the one given."""
    return at if isinstance(at, HookPoint) else HookPoint(at)


@contextlib.contextmanager
def replaced(
    model: Any, at: int | HookPoint, function: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Within, what there is at the hook point is what `function` makes of it, (batch, length,
    d_model) both. InputError where this model has no such place."""
    decoder, point = decoder_stack(model), point_of(at)
    place = place_of(decoder, point.block, point.kind)
    handle = place.hook(decoder.layers[point.block], function)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def continued(model: Any, layer: int, stream: torch.Tensor, output: Any = None) -> Iterator[None]:
    """Within, the first `layer` blocks do not run: what they would have given is `stream` (batch,
    length, d_model), in the form of `output` if blocks return more than the stream.

    Not for models in which later blocks read more of the earlier ones than the stream; see
    `can_continue`.
    """
    blocks = decoder_stack(model).layers[:layer]
    for block in blocks:
        block.forward = lambda *_, **__: with_stream(output, stream)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def constantly(stream: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function for `replaced` that gives this stream whatever there was."""
    return lambda _: stream


def can_continue(
    model: Any, layer: int, ids: torch.Tensor, output: Any, logits: torch.Tensor, rows: torch.Tensor
) -> bool:
    """Whether the model gives the same `logits` (n, vocabulary) for ids (batch, length), at the
    places that `rows` (batch, length) names, when its first `layer` blocks are skipped and `output`
    stands for what they return."""
    try:
        with continued(model, layer, stream_of(output), output):
            found = logits_at(model, ids, rows)
    # what a block's author chose to raise where an earlier one left nothing behind
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    return torch.allclose(found.float(), logits.float(), rtol=1e-2, atol=1e-2)


@contextlib.contextmanager
def returned(model: Any, block: int, outputs: list[Any]) -> Iterator[None]:
    """Within, whatever the block of this index, from 0, returns is added to `outputs`."""
    handle = (
        decoder_stack(model)
        .layers[block]
        .register_forward_hook(lambda _, __, output: outputs.append(output))
    )
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def next_token_losses(
    model: Any,
    at: int | HookPoint,
    examples: Sequence[np.ndarray],
    replacements: Mapping[str, Replacement],
    *,
    wanted: np.ndarray | None = None,
    batch_tokens: int = 1024,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Losses]:
    """{name: Losses} of the model as it is, under "clean", and with each of `replacements` in the
    place of the residual stream.

    examples: a list of (length,) int arrays of token ids. replacements: {name: function},
    `function(x, token)` -> (n, d_model) for the stream x (n, d_model) of the real tokens of a
    batch; token (n,) numbers them through all examples. wanted (n_tokens,) bool: the tokens whose
    losses are asked for, all without it; the others' are NaN, and take no time in the model's head.
    `batch_tokens` bounds a batch's padded tokens; the logits of those wanted, (n, vocabulary), are
    held three times. `progress(n)` is called with the tokens done.
    """
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in examples])])
    point = point_of(at)
    flags = torch.ones(int(starts[-1]), dtype=torch.bool)
    if wanted is not None:
        flags = torch.as_tensor(wanted, dtype=torch.bool)
    kept: list[torch.Tensor] = []  # (batch, length, d_model)
    outputs: list[Any] = []  # of the block
    skips = None  # whether blocks before the layer can be skipped: found with the first batch
    result = {
        name: Losses(*(np.full(starts[-1], np.nan, np.float32) for _ in range(2)))
        for name in ("clean", *replacements)
    }

    def keep(stream):
        kept.append(stream.clone())  # what is below a block can be changed in place
        return stream

    for batch in split_batches([len(ids) for ids in examples], batch_tokens):
        ids, real, token = padded(examples, batch, starts, model.device)
        rows, predicted = places_before(real, token, flags)
        following = ids[:, 1:][rows[:, :-1]]  # (n,) the ids of the tokens wanted
        if not len(predicted):
            continue
        with replaced(model, at, keep), returned(model, point.block, outputs):
            clean = logits_at(model, ids, rows)
        stream, output = kept.pop(), outputs.pop()
        if skips is None:
            some = torch.linspace(0, len(clean) - 1, min(len(clean), N_COMPARED)).long()
            places = torch.zeros_like(rows)
            places[tuple(rows.nonzero()[some].t())] = True
            skips = point.kind == "resid_post" and can_continue(
                model, point.layer, ids, output, clean[some], places
            )
        clean = clean.float().log_softmax(-1)  # (n, vocabulary)
        write_losses(result["clean"], clean, clean, following, predicted)
        for name, function in replacements.items():
            new = stream.clone()
            new[real] = function(stream[real], token).to(stream.dtype)
            with (
                continued(model, point.layer, new, output)
                if skips
                else replaced(model, at, constantly(new))
            ):
                logits = logits_at(model, ids, rows)
            write_losses(result[name], clean, logits, following, predicted)
            del logits
        if progress:
            progress(len(token))
    return result


def places_before(
    real: torch.Tensor, token: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, np.ndarray]:
    """(rows (batch, longest) bool, predicted (n,)): the places from which the tokens of a batch
    are predicted that `wanted` (n_tokens,) names, and the numbers of these tokens, in one order.

    real, token: of `padded`. The first token of an example is predicted from nowhere.
    """
    number = torch.full(real.shape, -1, device=real.device)
    number[real] = token
    after = number[:, 1:]
    chosen = (after >= 0) & wanted.to(real.device)[after.clamp_min(0)]
    rows = torch.zeros_like(real)
    rows[:, :-1] = chosen
    return rows, after[chosen].cpu().numpy()


@contextlib.contextmanager
def head_given(model: Any, choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within, the model's head is given `choose(x)` instead of x (batch, length, d_model), where it
    is a module."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(
        lambda _, arguments: (choose(arguments[0]), *arguments[1:]) if arguments else None
    )
    try:
        yield
    finally:
        handle.remove()


def logits_at(model: Any, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(n, vocabulary) logits at the n places of ids (batch, length) that rows, a bool of the same
    shape, names. The model's head sees only these, where it is a module that sees (batch, length,
    d_model)."""

    def named(x):
        return x[rows][None] if x.shape[:2] == rows.shape else x

    with head_given(model, named):
        logits = model(input_ids=ids, use_cache=False).logits
    # where the two shapes are one, all places are named
    return logits[rows] if logits.shape[:2] == rows.shape else logits[0]


def padded(
    examples: Sequence[np.ndarray], batch: Sequence[int], starts: np.ndarray, device: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids (batch, longest) int64, real (batch, longest) bool, token (n_real,) int64) of the
    examples numbered in `batch`."""
    longest = max(len(examples[i]) for i in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.long)
    real = torch.zeros((len(batch), longest), dtype=torch.bool)
    for row, i in enumerate(batch):
        ids[row, : len(examples[i])] = torch.from_numpy(np.asarray(examples[i], np.int64))
        real[row, : len(examples[i])] = True
    token = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in batch])
    return ids.to(device), real.to(device), token.to(device)


def write_losses(
    losses: Losses,
    clean: torch.Tensor,
    logits: torch.Tensor,
    following: torch.Tensor,
    predicted: np.ndarray,
) -> None:
    """Put the losses of a batch where its tokens are: clean (n, vocabulary) log-probabilities,
    logits of the same shape, following (n,) and predicted (n,) the ids and the numbers of the
    tokens that they are about."""
    for first in range(0, len(predicted), LOGIT_ROWS):
        rows = slice(first, first + LOGIT_ROWS)
        before = clean[rows]
        after = before if logits is clean else logits[rows].float().log_softmax(-1)
        place = predicted[rows]
        losses.ce[place] = -after.gather(1, following[rows, None])[:, 0].cpu().numpy()
        losses.kl[place] = (
            0 if after is before else (before.exp() * (before - after)).sum(1).cpu().numpy()
        )


def loss_recovered(clean: float, spliced: float, ablated: float) -> float:
    """(ablated - spliced) / (ablated - clean) of three mean losses: 1 if nothing is lost, 0 if it
    is no better than the ablation."""
    return (ablated - spliced) / (ablated - clean)


# Replacements


def only(where: np.ndarray, function: Replacement) -> Replacement:
    """`function` on the tokens where `where` (n_tokens,) is true; the others stay as they are."""
    flags = torch.as_tensor(where)

    def apply(x, token):
        chosen = flags[token.cpu()].to(x.device)
        if not bool(chosen.any()):
            return x
        new = x.clone()
        new[chosen] = function(x[chosen], token[chosen]).to(x.dtype)
        return new

    return apply


def reconstruction(sae: Autoencoder) -> Replacement:
    """The autoencoder's reconstruction, in float32 on its own device."""

    def apply(x, token):
        wide = x.to(sae.input_bias.device).float()
        return decode(sae, encode(sae, wide)).to(x)

    return apply


def constant(vector: Any) -> Replacement:
    """The same vector (d_model,) for every token: zeros, or the mean."""
    return lambda x, token: torch.as_tensor(vector).to(x).expand_as(x)


def without_feature(sae: Autoencoder, feature: int) -> Replacement:
    """x - f_k d_k: the stream without what feature k adds to it, and with all that the autoencoder
    does not explain."""

    def apply(x, token):
        wide = x.to(sae.input_bias.device).float()
        entries = encode(sae, wide)
        return (wide - entries.keep(entries.column == feature).times(sae.decoder.weight.t())).to(x)

    return apply


# The stream itself, and text


class _Seen(Exception):
    pass


@torch.inference_mode()
def residual_stream(
    model: Any, at: int | HookPoint, examples: Sequence[np.ndarray], *, batch_tokens: int = 1024
) -> torch.Tensor:
    """(n_tokens, d_model) float32 on the CPU: what there is at the hook point, later blocks left
    out."""
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in examples])])
    rows: torch.Tensor | None = None
    seen = []

    def see(stream):
        seen.append(stream)
        raise _Seen

    for batch in split_batches([len(ids) for ids in examples], batch_tokens):
        ids, real, token = padded(examples, batch, starts, model.device)
        with replaced(model, at, see), contextlib.suppress(_Seen):
            model(input_ids=ids, use_cache=False)
        part = seen.pop()[real].float().cpu()
        rows = torch.empty((int(starts[-1]), part.shape[1])) if rows is None else rows
        rows[token.cpu()] = part
    assert rows is not None
    return rows


def steering(
    direction: Any, alphas: Any, *, answer_only: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function for `replaced`: z + alpha * direction, one alpha for each row of the batch (FAST,
    section on steering).

    direction (d_model,). With `answer_only` the prompt stays as it is but for its last token, which
    the answer's first comes from; only for models with a key-value cache, see `generate`.
    """
    direction, alphas = torch.as_tensor(direction), torch.as_tensor(alphas, dtype=torch.float32)

    def apply(stream):
        # (batch, 1, d_model)
        push = (alphas.to(stream.device)[:, None, None] * direction.to(stream.device).float()).to(
            stream.dtype
        )
        if not answer_only or stream.shape[1] == 1:
            return stream + push
        return torch.cat([stream[:, :-1], stream[:, -1:] + push], 1)

    return apply


def stop_ids_of(model: Any, tokenizer: Any) -> list[int]:
    """The ids of the tokens that end an answer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return [each for each in {*several, tokenizer.eos_token_id} if each is not None]


@torch.inference_mode()
def generate(
    model: Any,
    prompts: torch.Tensor,
    *,
    n_new: int,
    stop_ids: Sequence[int],
    layer: int | HookPoint | None = None,
    function: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[list[int]]:
    """Greedy continuations of prompts (batch, length): a list of lists of token ids, one per row.

    A row ends with the first of `stop_ids`, which it keeps, or after `n_new` tokens. `function`, as
    for `replaced`, acts on the stream after `layer` blocks of every forward pass: on the prompt,
    then on each token written; of a model that gives no key-value cache (Mamba, RWKV), on all that
    there is each time.
    """
    ids, cache = prompts.to(model.device), None
    written, running = [[] for _ in prompts], [True] * len(prompts)
    steered: contextlib.AbstractContextManager = contextlib.nullcontext()
    if function is not None:
        assert layer is not None  # the layer that `function` acts on
        steered = replaced(model, layer, function)
    with steered, head_given(model, lambda x: x[:, -1:] if x.ndim == 3 else x):
        for _ in range(n_new):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", None)
            best = out.logits[:, -1].float().argmax(-1)  # (batch,)
            for row, token in enumerate(best.tolist()):
                if running[row]:
                    written[row].append(token)
                    running[row] = token not in stop_ids
            if not any(running):
                break
            ids = best[:, None] if cache is not None else torch.cat([ids, best[:, None]], 1)
    return written
