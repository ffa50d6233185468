"""What the model's loss owes to single features: each taken out of the residual stream (z - f_k
d_k), where it fires and elsewhere."""

import numpy as np

from experiments.shared.statistics import bootstrap_counts, interval_of_finite
from experiments.shared.subjects import example_ids, some_dialogues, usable_tokens_of
from fastsae.data.tokenization import SHARED_PREFIX

N_BOOTSTRAP = 1000


def ablation(subject, model, settings, features, *, n_others, n_examples):
    """{n_examples, features: [...]} for `features` and for `n_others` random features that fire on
    the held-out examples.

    Losses count the tokens after the shared prefix. A feature's own effect sits in the examples
    where it fires; in the others the stream is not touched, so any change there would be an error
    of ours.
    """
    from fastsae.intervention import next_token_losses, only, residual_stream, without_feature
    from fastsae.sae.autoencoder import encode

    table = some_dialogues(subject, settings, n_examples, held_out=True)
    examples, sae = example_ids(table), subject.sae
    stream = residual_stream(model, subject.point, examples)
    usable = usable_tokens_of(subject, stream, table)
    entries = encode(sae, stream[usable].to(sae.input_bias.device))
    token, column = np.flatnonzero(usable)[entries.row.cpu().numpy()], entries.column.cpu().numpy()
    alive = np.setdiff1d(np.unique(column), features)
    at_random = np.sort(np.random.default_rng(settings.SEED).permutation(alive)[:n_others]).tolist()
    replacements = {k: only(usable, without_feature(sae, k)) for k in [*features, *at_random]}
    losses = next_token_losses(model, subject.point, examples, replacements)
    example = np.repeat(np.arange(len(examples)), table.lengths)
    counted = (table.kind != SHARED_PREFIX) & ~np.isnan(losses["clean"].ce)
    rows = []
    for k in replacements:
        fires = np.zeros(len(table.ids), bool)
        fires[token[column == k]] = True
        change = losses[k].ce.astype(np.float64) - losses["clean"].ce
        rows.append(
            {
                "feature": int(k),
                "by_lot": k in at_random,
                **effect(change, losses[k].kl, fires, counted, example, settings.SEED),
            }
        )
    return {"n_examples": len(examples), "n_tokens": int(counted.sum()), "features": rows}


def effect(change, kl, fires, counted, example, seed):
    """Mean change of the loss (nats a token, with an interval over examples) in the examples where
    the feature fires, and elsewhere.

    All arguments (n_tokens,): the change, the KL, where the feature fires, which tokens count, and
    each one's example.
    """
    n_examples = int(example[-1]) + 1
    in_firing = (np.bincount(example, fires, minlength=n_examples) > 0)[example]  # (n_tokens,)
    follows = np.concatenate([[False], fires[:-1]])  # predicted from a token on which it fires

    def mean(rows):
        return float(change[rows].mean()) if rows.any() else None

    here = counted & in_firing
    sums, counts = (
        np.bincount(example[here], change[here], minlength=n_examples),
        np.bincount(example[here], minlength=n_examples),
    )
    draws = bootstrap_counts(n_examples, N_BOOTSTRAP, seed)
    with np.errstate(invalid="ignore"):
        means = (draws @ sums) / (draws @ counts)
    return {
        "share_of_examples": float(np.mean(np.bincount(example, fires, minlength=n_examples) > 0)),
        "share_of_tokens": float(fires.mean()),
        "change_where_it_fires": mean(here),
        "interval": interval_of_finite(means),
        "change_after_a_firing_token": mean(here & follows),
        "change_elsewhere": mean(counted & ~in_firing),
        "kl_where_it_fires": float(kl[here].mean()) if here.any() else None,
    }
