"""What features do: the model's next-token predictions with a feature taken out of its stream, or
added to it once more, beside random directions of equal length; and how a text then goes on.

A push along the stream turns it less than one across it, so a random direction is compared at the
same angle to the stream as the feature's (`turned`): else a feature, which by its rule points along
the stream, would differ from it by that alone.

A label says on which tokens a feature fires. That the model uses it is another claim, which only
the running model can show. `running.py` says when it runs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch

from fastsae.interpretation.probing import estimate
from fastsae.interpretation.tables import with_interval
from fastsae.intervention import Replacement, generate, next_token_losses, point_of, residual_stream
from fastsae.lm.hook_points import HookPoint
from fastsae.sae import Autoencoder
from fastsae.sae.autoencoder import encode

if TYPE_CHECKING:
    from fastsae.interpretation.evidence import Evidence

N_FEATURES = 8  # those with most evidence
N_PASSAGES = 2  # of each feature, from its strongest examples
BEFORE, AFTER = 32, 7  # tokens of a passage around the strongest one
N_RANDOM = 5  # random directions beside each feature
N_WRITTEN = 16  # tokens of a continuation
# tokens of a prompt: few lengths, so that prompts of one length go on together
PROMPT_TOKENS = (BEFORE + 1, 24, 16, 8, 4, 2)
BATCH_TOKENS = 1024
TINY = 1e-12  # nats; below it a divergence is rounding
REMOVED, ADDED, RANDOM, UNCHANGED = "removed", "added", "random", "unchanged"
SIGNS = {REMOVED: -1.0, ADDED: 1.0}
FIGURES = ("kl", "loss", "random_kl", "random_loss")  # of each


class Passage(NamedTuple):
    """A few tokens of an example around a feature's strongest one."""

    feature: int
    example: int
    start: int  # the place in the example of its first token
    ids: np.ndarray  # (n,) int
    usable: np.ndarray  # (n,) bool, the tokens that the autoencoder is meant for
    peak: int  # the place of the strongest token


def passages_of(evidence: "Evidence", features: Iterable[int]) -> list[Passage]:
    """At most N_PASSAGES of each feature, in different texts, the strongest first."""
    s, found = evidence.statistics, []
    ids = evidence.data["token_ids"]
    for feature in features:
        taken: set[int] = set()
        for example, peak in zip(s.top.example[feature].tolist(), s.top.position[feature].tolist()):
            if example < 0 or (text := int(evidence.text_numbers[example])) in taken:
                continue
            taken.add(text)
            first = int(evidence.offsets[example])
            start = max(first, first + peak - BEFORE)
            stop = min(int(evidence.offsets[example + 1]), first + peak + AFTER + 1)
            usable = s.kept[start:stop].copy()
            # a text that begins elsewhere has its attention sink there
            usable[0] &= start == first
            place = first + peak - start
            found.append(
                Passage(feature, example, start - first, np.asarray(ids[start:stop]), usable, place)
            )
            if len(taken) == N_PASSAGES:
                break
    return found


def activations_in(
    model: Any, sae: Autoencoder, at: int | HookPoint, passages: Sequence[Passage]
) -> list[np.ndarray]:
    """Of each passage, (n,) float32: the activation of its feature on its tokens; 0 on those that
    are not usable."""
    stream = residual_stream(model, at, [p.ids for p in passages], batch_tokens=BATCH_TOKENS)
    entries = encode(sae, stream.to(sae.input_bias.device))
    row, column = entries.row.cpu().numpy(), entries.column.cpu().numpy()
    lengths = [len(p.ids) for p in passages]
    feature = np.repeat([p.feature for p in passages], lengths)
    own = column == feature[row]
    found = np.zeros(len(feature), np.float32)
    found[row[own]] = entries.value.float().cpu().numpy()[own]
    found *= np.concatenate([p.usable for p in passages])
    return np.split(found, np.cumsum(lengths)[:-1])


@dataclass
class Fired:
    """The tokens of passages, one passage after the other, each up to the last token that follows
    one on which its feature fires; passages without such a token are left out."""

    ids: list[np.ndarray]  # of each passage
    value: np.ndarray  # (n_tokens,) float32, the activation of its passage's feature
    of: np.ndarray  # (n_tokens,) the number of that feature in `features`
    follows: np.ndarray  # (n_tokens,) bool, whether it follows a token on which the feature fires
    features: list[int]
    n_passages: np.ndarray  # (n_features,)

    @classmethod
    def of_passages(cls, passages: Sequence[Passage], values: Sequence[np.ndarray]) -> Self:
        """From passages and what `activations_in` gives of them."""
        ids, value, feature, follows = [], [], [], []
        for passage, found in zip(passages, values):
            fires = np.flatnonzero(found[:-1] > 0)
            if not len(fires):
                continue
            n = int(fires[-1]) + 2
            ids.append(passage.ids[:n])
            value.append(found[:n])
            feature.append(passage.feature)
            follows.append(np.concatenate([[False], found[: n - 1] > 0]))
        features, number = np.unique(np.array(feature, np.int64), return_inverse=True)
        return cls(
            ids,
            np.concatenate([*value, np.zeros(0, np.float32)]),
            np.repeat(number, [len(each) for each in ids]),
            np.concatenate([*follows, np.zeros(0, bool)]),
            features.tolist(),
            np.bincount(number, minlength=len(features)),
        )


def pushed(
    sign: float, value: np.ndarray, rows: torch.Tensor, units: torch.Tensor | None = None
) -> Replacement:
    """x + sign * f d: value (n_tokens,) the f of each token, rows (n_tokens, d) its d.

    With units (n_tokens, d), random directions of length 1, d is replaced by a vector of its length
    at the same angle to x: the stream is as long afterwards and has turned as far, but towards the
    random direction.
    """
    size = torch.as_tensor(value)

    def apply(x, token):
        token = token.cpu()
        wide, d = x.float(), rows[token].to(x.device)
        if units is not None:
            d = turned(d, wide, units[token].to(x.device))
        return x + (sign * size[token].to(x.device)[:, None] * d).to(x)

    return apply


def turned(d: torch.Tensor, x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """(n, d_model): vectors in the plane of each x and unit, as long as those of d and at their
    angles to x; all (n, d_model)."""
    along = torch.nn.functional.normalize(x, dim=1)
    share = (d * along).sum(1, keepdim=True)  # d's length along x
    across = unit - (along * unit).sum(1, keepdim=True) * along
    rest = (d.square().sum(1, keepdim=True) - share.square()).clamp_min(0).sqrt()
    return share * along + rest * torch.nn.functional.normalize(across, dim=1)


def changes(
    model: Any,
    sae: Autoencoder,
    at: int | HookPoint,
    passages: Sequence[Passage],
    directions: torch.Tensor,
    n_random: int = N_RANDOM,
) -> dict[int, dict[str, Any]]:
    """{feature: {"n_passages", "n_tokens", "removed", "added"}} of the features that fire in their
    passages.

    "removed" is x - f d_k on the tokens where the feature fires, "added" x + f d_k, each {"kl",
    "loss", "random_kl", "random_loss"}: means in nats over the tokens that follow one of those,
    "kl" from the prediction of the model as it is, "loss" above that model's; the lists are of
    n_random pushes that are as long and turn the stream as far, each towards one of directions (n,
    d), of length 1; every feature has others while there are enough.
    """
    fired = Fired.of_passages(passages, activations_in(model, sae, at, passages))
    if not fired.features:
        return {}
    rows = sae.decoder.weight.t()[fired.features].detach().float().cpu()[fired.of]  # (n_tokens, d)
    first = fired.of * n_random  # of a feature's directions
    units = [
        None,
        *(directions.float().cpu()[(first + i) % len(directions)] for i in range(n_random)),
    ]
    losses = next_token_losses(
        model,
        at,
        fired.ids,
        {
            f"{name} {i}": pushed(sign, fired.value, rows, unit)
            for name, sign in SIGNS.items()
            for i, unit in enumerate(units)
        },
        wanted=fired.follows,
        batch_tokens=BATCH_TOKENS,
    )
    result: dict[int, dict[str, Any]] = {}
    for number, feature in enumerate(fired.features):
        here = fired.follows & (fired.of == number)
        clean = losses["clean"].ce[here].astype(np.float64)
        result[feature] = {"n_passages": int(fired.n_passages[number]), "n_tokens": int(here.sum())}
        for name in SIGNS:
            found = [losses[f"{name} {i}"] for i in range(len(units))]
            kl, *random_kl = (float(each.kl[here].mean(dtype=np.float64)) for each in found)
            loss, *random_loss = (float((each.ce[here] - clean).mean()) for each in found)
            result[feature][name] = {
                "kl": kl,
                "loss": loss,
                "random_kl": random_kl,
                "random_loss": random_loss,
            }
    return result


def prompt_of(passage: Passage) -> Passage | None:
    """The passage up to its strongest token, as long as one of PROMPT_TOKENS; None for one token,
    which is nothing to go on from."""
    n = next((n for n in PROMPT_TOKENS if n <= passage.peak + 1), None)
    if n is None:
        return None
    part = slice(passage.peak + 1 - n, passage.peak + 1)
    usable = passage.usable[part].copy()
    usable[0] &= part.start == 0
    return passage._replace(
        start=passage.start + part.start, ids=passage.ids[part], usable=usable, peak=n - 1
    )


def continuations(
    model: Any,
    sae: Autoencoder,
    at: int | HookPoint,
    passages: Sequence[Passage],
    strength: Mapping[int, float],
    direction: torch.Tensor,
    stop_ids: Sequence[int],
) -> dict[int, dict[str, Any]]:
    """{feature: {"example", "start", "prompt", "unchanged", "removed", "added", "random"}}: how the
    model goes on, in token ids, from each feature's first passage, up to its strongest token.

    "removed": x - f d_k wherever the feature fires. "added": x + strength[k] d_k at the prompt's
    last token and at every token written; "random": direction (d,), of length 1, in the place of
    d_k, at its length.
    """
    prompts: dict[int, Passage] = {}
    for passage in passages:
        if passage.feature not in prompts and (prompt := prompt_of(passage)):
            prompts[passage.feature] = prompt
    result = {}
    for length in PROMPT_TOKENS:
        group = [prompt for prompt in prompts.values() if len(prompt.ids) == length]
        if not group:
            continue
        ids = torch.from_numpy(np.stack([p.ids for p in group]).astype(np.int64))
        written = generate(
            model,
            ids.repeat(4, 1),
            n_new=N_WRITTEN,
            stop_ids=stop_ids,
            layer=point_of(at),
            function=in_four_ways(sae, group, strength, direction),
        )
        for i, prompt in enumerate(group):
            result[prompt.feature] = {
                "example": prompt.example,
                "start": prompt.start,
                "prompt": prompt.ids.tolist(),
                **dict(zip((UNCHANGED, REMOVED, ADDED, RANDOM), written[i :: len(group)])),
            }
    return result


def in_four_ways(
    sae: Autoencoder,
    prompts: Sequence[Passage],
    strength: Mapping[int, float],
    direction: torch.Tensor,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function for `generate` on prompts of one length, all of them four times: unchanged,
    removed, added, random (see `continuations`)."""
    n, features = len(prompts), [p.feature for p in prompts]
    usable = torch.from_numpy(np.stack([p.usable for p in prompts]))  # (n, length)
    rows = sae.decoder.weight.t()[features].detach().float()  # (n, d)
    added = torch.tensor([strength[j] for j in features]).to(rows)[:, None] * rows
    random = added.norm(dim=1, keepdim=True) * direction.to(rows)

    def apply(stream):
        new, n_prompt = stream.clone(), usable.shape[1]
        # with a cache the tokens written come one at a time, else behind the prompt
        first = 0 if stream.shape[1] < n_prompt else n_prompt - 1
        n_written = stream.shape[1] - (n_prompt if first else 0)
        counts = torch.ones(n, n_written, dtype=torch.bool)
        counts = torch.cat([usable, counts], 1) if first else counts
        new[n : 2 * n] = without(sae, stream[n : 2 * n], features, counts)
        new[2 * n :, first:] += torch.cat([added, random]).to(new)[:, None]
        return new

    return apply


def without(
    sae: Autoencoder, stream: torch.Tensor, features: Sequence[int], usable: torch.Tensor
) -> torch.Tensor:
    """stream (n, length, d) less f d_k of the feature of each row, on its tokens that are usable
    (n, length)."""
    x = stream.flatten(0, 1).to(sae.input_bias.device).float()
    of = torch.tensor(features).repeat_interleave(stream.shape[1]).to(x.device)
    counts = usable.flatten().to(x.device)
    entries = encode(sae, x)
    entries = entries.keep((entries.column == of[entries.row]) & counts[entries.row])
    return (x - entries.times(sae.decoder.weight.t())).view(stream.shape).to(stream)


def summary(effects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `changes` gave over all features, of "removed" and "added" each: means in nats, of the
    random pushes too; how many times their divergence that of the features is (geometric mean with
    its 95 % interval over the features); and how many features are beyond all their random
    pushes."""
    n_random = len(effects[0][REMOVED]["random_kl"])
    parts: dict[str, Any] = {
        "n_features": len(effects),
        "n_tokens": sum(each["n_tokens"] for each in effects),
        "n_random": n_random,
        "n_beyond_by_chance": len(effects) / (n_random + 1),
    }
    for name in SIGNS:
        found = [each[name] for each in effects]
        logs = estimate(np.log([ratio(each) for each in found]), independent=True)
        assert logs is not None  # of logarithms of numbers above 0
        value, low, high = np.exp(logs).tolist()
        parts[name] = {
            **{key: float(np.mean([each[key] for each in found])) for key in FIGURES},
            "times_random": {"value": value, "interval": [low, high] if high < np.inf else None},
            "n_beyond": sum(each["kl"] > max(each["random_kl"]) for each in found),
        }
    return parts


def ratio(part: Mapping[str, Any]) -> float:
    """How many times the mean divergence of its random pushes that of "removed" or "added" is."""
    return max(part["kl"], TINY) / max(float(np.mean(part["random_kl"])), TINY)


def sentence(found: Mapping[str, Any] | None) -> str:
    """What `summary` says, for people; "" if it was not measured."""
    if not found or REMOVED not in found:
        return ""
    removed, added = found[REMOVED], found[ADDED]
    return (
        f"taken out where they fire, {found['n_features']} features change the next token "
        f"{times_random(removed)} times as much as random directions (KL {removed['kl']:.3f} nats "
        f"against {removed['random_kl']:.3f}), {removed['n_beyond']} of them more than each of "
        f"{found['n_random']} ({found['n_beyond_by_chance']:.1f} by chance); added once more, "
        f"{times_random(added)} times"
    )


def times_random(part: Mapping[str, Any]) -> str:
    """'6.3 [3.1, 12.5]' of a part of `summary`."""
    return with_interval(part["times_random"], 1)
