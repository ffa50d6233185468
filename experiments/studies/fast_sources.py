"""What fast_factors reads: dialogues that train, those that are held out, two plain texts, and
their activations in each way of reading them."""

import itertools
from pathlib import Path

import numpy as np

import config
from experiments.shared import fast_measures, heldout
from experiments.shared.fast_tokens import Tested, Tokens
from experiments.shared.sweeps import MODEL_SETTINGS, listed, passed_on, run_many

APART = "fastsae.data.reading.DIALOGUES_IN_BLOCKS=apart"
FROM_ZERO = f"{APART}, positions from 0"
TEXTS = ("own text", "manual")  # read in whole blocks; they have no openings
N_POSITION_BLOCKS = 2  # held out, on which positions in the block and from 0 are compared
SPARE = 1.03  # more tokens than are trained on, for the sinks that are dropped


def write_datasets(settings, work):
    """{name: path} of the dialogues that train, those that are held out, a few of these, the two
    plain texts and the labelled texts."""
    from fastsae.data.datasets import read_dataset
    from fastsae.data.token_masks import text_numbers
    from fastsae.data.tokenization import (
        CONTENT,
        SHARED_PREFIX,
        TEMPLATE_DATE,
        ChatTokenizer,
        mark_shared_prefix,
        tokenise,
    )
    from fastsae.lm.loading import load_tokenizer
    from fastsae.runtime import artifacts
    from fastsae.runtime.errors import InputError

    names = ("training", "held_out", "few")
    paths = {name: work / f"{name}.jsonl" for name in names}
    paths |= {name: work / f"{name.replace(' ', '_')}.txt" for name in TEXTS}
    demo = config.PROJECT / "data" / "cognitive_actions.jsonl"
    paths["labelled"] = Path(settings.LABELLED_PATH) if settings.LABELLED_PATH else demo
    examples = read_dataset(
        settings.DATASET_PATH, text_field=settings.TEXT_FIELD, max_examples=settings.MAX_EXAMPLES
    )
    tokenizer = load_tokenizer(
        settings.MODEL_NAME, revision=settings.MODEL_REVISION, cache_dir=settings.CACHE_DIR
    )
    table = tokenise(examples, ChatTokenizer(tokenizer, date=TEMPLATE_DATE))
    mark_shared_prefix(table)
    # copies of a dialogue count once, or some would be held out and trained on
    _, first = np.unique(text_numbers(table.ids, table.starts), return_index=True)
    usable = first[table.lengths[first] <= settings.BLOCK_LENGTH]
    order = np.random.default_rng(settings.SEED).permutation(np.sort(usable))
    n_held_out = min(settings.HELD_OUT, len(order) // 3)
    if n_held_out < 2:
        raise InputError(
            f"DATASET_PATH: {settings.DATASET_PATH} has {len(order)} dialogues of at most "
            f"{settings.BLOCK_LENGTH} tokens; at least 6 are needed. give more data."
        )
    held_out, rest = np.sort(order[:n_held_out]), order[n_held_out:]
    needed = settings.TRAIN_TOKENS * SPARE + settings.BLOCK_LENGTH

    def with_tokens(counted):
        per_dialogue = np.add.reduceat(counted.astype(np.int64), table.starts[:-1])[rest]
        return np.sort(rest[: int(np.searchsorted(np.cumsum(per_dialogue), needed)) + 1])

    training = with_tokens(table.kind != SHARED_PREFIX)
    ends = np.cumsum(table.lengths[held_out])
    few = held_out[: int(np.searchsorted(ends, N_POSITION_BLOCKS * settings.BLOCK_LENGTH)) + 1]
    for name, chosen in (("training", training), ("held_out", held_out), ("few", few)):
        rows = (heldout.as_row(examples[i], None, settings.TEXT_FIELD) for i in chosen)
        artifacts.write_text(paths[name], "".join(rows))
    contents = (
        "\n\n".join(message["content"] for message in examples[i].messages)
        for i in with_tokens(table.kind == CONTENT)
    )
    artifacts.write_text(paths["own text"], "\n\n".join(contents))
    artifacts.write_text(paths["manual"], manual(settings, tokenizer, int(needed)))
    return paths


def manual(settings, tokenizer, n_tokens):
    """The beginning of PLAIN_TEXT, or of Python's manual, of about so many tokens."""
    if settings.PLAIN_TEXT:
        text = Path(settings.PLAIN_TEXT).read_text("utf-8")
    else:
        from pydoc_data import topics

        text = "\n\n".join(topics.topics.values())
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = offsets["offset_mapping"]
    return text[: ends[n_tokens][1]] if len(ends) > n_tokens else text


def extract(settings, work, datasets):
    """One pass of the model over each dataset in each way of reading it, all layers at once."""
    block = ["--block-length", settings.BLOCK_LENGTH]
    alone = ["--max-length", settings.BLOCK_LENGTH]
    parts = {
        "alone": ("training", alone),
        "apart": ("training", [*block, APART]),
        "whole": ("training", block),
        "held_out_alone": ("held_out", alone),
        "held_out_whole": ("held_out", block),
        "in_block": ("few", [*block, APART]),
        "from_0": ("few", [*block, FROM_ZERO]),
        **{text: (text, block) for text in TEXTS},
        "labelled": ("labelled", alone),
    }
    if not settings.FEATURE_SEEDS:
        del parts["labelled"]
    passed = passed_on(settings, [name for name in MODEL_SETTINGS if name != "MAX_LENGTH"])
    common = [*passed, "--layer-idx", listed(settings.LAYERS), "--label-field=none"]
    run_many(
        "extract_activations.py",
        [
            [
                *common,
                "--storage-dtype=float16",
                "--output-dir",
                work / folder.replace(" ", "_"),
                "--dataset-path",
                datasets[name],
                *flags,
            ]
            for folder, (name, flags) in parts.items()
        ],
    )


def activations(work, folder, layer):
    """The file of a source's activations at a layer."""
    name = f"activations_layer{layer}.npz"
    return work / folder.replace(" ", "_") / "activations" / name


def sources(work, layer):
    """{source: Tokens} to train on at a layer; of dialogues the tokens that whole blocks have."""
    alone = activations(work, "alone", layer)
    n = len(Tokens(activations(work, "whole", layer), alone).ids)
    found = {
        name: Tokens(activations(work, name, layer), alone, n) for name in fast_measures.ATTENTION
    }
    return found | {text: Tokens(activations(work, text, layer)) for text in TEXTS}


def fewest_tokens(settings, work):
    """The tokens that every source has at every layer, with openings and sinks and without."""
    return min(
        int(tokens.allowed(openings=bool(openings), sinks=bool(sinks)).sum())
        for layer in settings.LAYERS
        for tokens in sources(work, layer).values()
        for openings, sinks in itertools.product((0, 1), (0, 1))
    )


def tested_at(settings, work, layer, tokenizer):
    """{how the held-out dialogues are read: Tested} of a layer, of the tokens in whole blocks."""
    alone = activations(work, "held_out_alone", layer)
    whole = Tested(activations(work, "held_out_whole", layer), alone, None, tokenizer)
    return {"alone": Tested(alone, alone, len(whole.ids), tokenizer), "whole": whole}
