"""The README.md of a run's folder, as the Hugging Face hub reads it: a YAML header, figures, and
how to load the autoencoders.

Names of models and datasets are other people's text. In the header they are JSON strings, which
YAML reads literally; in the page they stand in code spans, in which neither Markdown nor HTML means
anything. No such name goes into a table or a command.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsae.formats.export import FORMATS, dataset_name, folder_of
from fastsae.formats.load import (
    architecture_text,
    is_plain_text,
    meant_tokens,
    nested_prefixes,
    target_k,
    trained_architecture,
    with_chat_template,
)
from fastsae.lm.hook_points import HookPoint
from fastsae.lm.names import described, hub_id, weights_note
from fastsae.runtime import artifacts
from fastsae.runtime.storage import as_utf8
from fastsae.sae.metrics import measured_on
from fastsae.settings.architectures import ARCHITECTURES

METRICS = (
    ("normalized_mse", "normalised MSE"),
    ("explained_variance", "explained variance"),
    ("l0", "L0"),
    ("dead_fraction", "dead features"),
    ("cosine_similarity", "cosine similarity"),
    ("mse", "MSE (FAST, eq. 7)"),
)

MEASURED = {
    "test": "On {0[n_test_tokens]:,} tokens of test examples, "
    "which decided neither the weights nor the best epoch.",
    "validation": "On {0[n_validation_tokens]:,} tokens of validation examples: "
    "not trained on, but they chose the best epoch.",
}


def write_card(folder: Path, metas: dict[Path, dict]) -> None:
    """Write README.md for checkpoints {path: metadata}, all of one run, unless somebody has worked
    on the one that is there."""
    text = as_utf8(card(list(metas.items()))).decode()  # as it is read back
    path = folder / "README.md"
    found = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    if found is not None and not is_as_written(found):
        print(f"{path}: was edited, and is left as it is. move it away to have one written.")
        return
    if found and has_run_table(folder, metas.values()):
        text = with_worth(text, worth_in(found))
    text = signed(text)
    if found != text:
        artifacts.write_text(path, text)


def has_run_table(folder: Path, metas: Iterable[dict]) -> bool:
    """Whether stage 3 has put figures of one of these autoencoders into the run's metrics.json."""
    try:
        table = artifacts.from_json((folder / "metrics.json").read_bytes())["run_table"]
        return table["autoencoder"] in [meta["fingerprint"] for meta in metas]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def add_run_table(folder: Path, table: Mapping[str, Any], worth: Sequence[str]) -> None:
    """Put the figures of stage 3 into a run's metrics.json, and `worth`, lines of Markdown about
    them, into its README.md unless somebody has worked on that."""
    path = folder / "metrics.json"
    figures = artifacts.from_json(path.read_bytes())
    if figures.get("run_table") != json.loads(artifacts.to_json(table)):
        artifacts.write_json(path, {**figures, "run_table": table})
    card_path = folder / "README.md"
    found = card_path.read_text(encoding="utf-8", errors="replace") if card_path.exists() else ""
    if is_as_written(found):
        text = signed(with_worth(SIGNATURE.sub("", found, count=1), worth))
        if text != found:
            artifacts.write_text(card_path, text)


WORTH, LOADING = "## What the features are worth", "## How to load"


def worth_in(text: str) -> list[str]:
    """The lines under WORTH of a card; [] where it has none."""
    lines = text.split("\n")
    if WORTH not in lines:
        return []
    return lines[lines.index(WORTH) + 2 : lines.index(LOADING) - 1]


def with_worth(text: str, worth: Sequence[str]) -> str:
    """A card with these lines under WORTH, in the place of those that it has."""
    lines = text.split("\n")
    if WORTH in lines:
        del lines[lines.index(WORTH) : lines.index(LOADING)]
    place = lines.index(LOADING)
    lines[place:place] = [WORTH, "", *worth, ""] if worth else []
    return "\n".join(lines)


def is_as_written(text: str) -> bool:
    """Whether a card's text is what this project wrote."""
    return bool(SIGNATURE.search(text)) and text == signed(SIGNATURE.sub("", text, count=1))


# a comment of the header
SIGNATURE = re.compile(r"^# as written by train_sae\.py: [0-9a-f]{64}\n", re.M)


def signed(text: str) -> str:
    """A card with the checksum of the rest in its header, by which an edited one is known."""
    return text.replace(
        "---\n",
        f"---\n# as written by train_sae.py: {hashlib.sha256(text.encode()).hexdigest()}\n",
        1,
    )


def place(point: HookPoint) -> str:
    """What an autoencoder reads, and what libraries call it."""
    if point.kind == "resid_post":
        return (
            f"the residual stream after {point.layer} blocks "
            f"(`hidden_states[{point.hidden_states_index}]`, in TransformerLens "
            f"`{point.transformer_lens}`)"
        )
    side = "what" if point.is_input else "the output of"
    reads = " reads" if point.is_input else ""
    return (
        f"{point.text}, counted from 0 ({side} `{point.hugging_face}`{reads} in transformers, "
        f"in TransformerLens `{point.transformer_lens}`)"
    )


def card(entries: list[tuple[Path, dict]]) -> str:
    """The text for [(a checkpoint's path, its metadata)], of one model, layer and dataset."""
    source = entries[0][1]["activations"]
    hook_point, model = HookPoint.of_activations(source), source["model_name"]
    layer = hook_point.layer
    title = "Sparse autoencoder" if len(entries) == 1 else f"{len(entries)} sparse autoencoders"
    return "\n".join(
        [
            "---",
            *header(entries),
            "---",
            "",
            f"# {title} of {code(described(model))}, layer {layer}",
            "",
            f"Reads {place(hook_point)} as it is: scale and mean are part of the weights.",
            "",
            *([f"The model's weights: {code(note)}.", ""] if (note := weights_note(model)) else []),
            *provenance(entries[0][1]),
            "",
            "## Which tokens it is for",
            "",
            meant_tokens(entries[0][1])["tokens"],
            "",
            "## Figures",
            "",
            *figures(entries),
            "",
            "## How to load",
            "",
            *loading(entries),
            "",
            "## Settings of the training",
            "",
            "```json",
            json.dumps(settings_of(entries[0][1]), indent=1),
            "```",
            "",
            "## Before publishing",
            "",
            "Nothing is uploaded by itself. "
            "State a `license:` in the header above, and mind that the `.pt` files "
            "hold the paths of your data. In this folder:",
            "",
            "```bash",
            'hf upload your-name/your-sae . . --exclude "*.resume.pt" --exclude "*.jsonl" '
            '--exclude "*.log" --exclude "*.old-*" --exclude ".*"',
            "```",
            "",
        ]
    )


def header(entries: list[tuple[Path, dict]]) -> list[str]:
    """Lines of YAML; every value that is not of this project is a JSON string."""
    source = entries[0][1]["activations"]
    base, dataset = hub_id(source["model_name"]), source["dataset_path"]
    exported = any(folder_of(path, "saelens").is_dir() for path, _ in entries)
    lines = ["library_name: saelens"] if exported else []
    lines += [
        "tags:",
        "- sparse-autoencoder",
        "- mechanistic-interpretability",
        *(["- saelens"] if exported else []),
    ]
    if base:
        lines += [f"base_model: {quoted(base)}"]
    if dataset.startswith("hf:"):
        lines += ["datasets:", f"- {quoted(dataset_name(dataset))}"]
    lines += ["model-index:"]
    for path, meta in entries:
        lines += [
            f"- name: {quoted(path.stem)}",
            "  results:",
            "  - task:",
            "      type: feature-extraction",
            "    dataset:",
            f"      name: {quoted(dataset_name(dataset))}",
            f"      type: {quoted(dataset_name(dataset))}",
            f"      split: {measured_on(meta['metrics'])}",
            "    metrics:",
        ]
        for name, shown in METRICS:
            lines += [
                f"    - type: {name}",
                f"      name: {quoted(shown)}",
                f"      value: {json.dumps(meta['metrics'][name])}",
            ]
    return lines


def provenance(meta: Mapping[str, Any]) -> list[str]:
    """What it was trained on: model, place, data and which tokens."""
    source, settings = meta["activations"], meta["activations"]["settings"]
    with_template = with_chat_template(source) and not is_plain_text(source)
    rendered = "with the model's chat template" if with_template else "without chat template"
    how = (
        "joined and cut into blocks"
        if settings.get("PROCESSING") == "block"
        else "each alone in the model (FAST, [arXiv 2506.07691](https://arxiv.org/abs/2506.07691))"
    )
    left_out = (
        ["the prefix that all examples share"]
        if meta["settings"].get("EXCLUDE_SHARED_PREFIX")
        else []
    )
    left_out += (
        [f"tokens with a norm above {meta['max_norm']:.4g} (attention sinks)"]
        if meta.get("max_norm") is not None
        else []
    )
    return [
        f"- Data: {source['n_examples']:,} examples of "
        f"{code(dataset_name(source['dataset_path']))}, {how}, {rendered}; "
        f"{meta['metrics']['n_train_tokens']:,} tokens for training.",
        f"- Left out of training: {' and '.join(left_out) or 'nothing'}.",
        f"- Dataset sha256 `{source['inputs']['dataset'][:64]}`; versions: "
        f"{', '.join(f'{name} {version}' for name, version in meta['versions'].items())}.",
    ]


def figures(entries: list[tuple[Path, dict]]) -> list[str]:
    """A table of what was measured on held-out examples; all names in it are this project's."""
    lines = [
        "| file | architecture | M | K | " + " | ".join(shown for _, shown in METRICS) + " |",
        "|---" * (len(METRICS) + 4) + "|",
    ]
    for path, meta in entries:
        s = meta["settings"]
        prefixes = ", prefixes " * bool(nested_prefixes(s)) + ", ".join(
            map(str, nested_prefixes(s))
        )
        lines.append(
            f"| `{path.name}` | {architecture_text(s)}{prefixes} | {s['M']} | {target_k(s) or ''} "
            "| " + " | ".join(f"{meta['metrics'][name]:.4g}" for name, _ in METRICS) + " |"
        )
    metrics = entries[0][1]["metrics"]
    kinds = sorted({trained_architecture(meta["settings"]) for _, meta in entries})
    return [
        *lines,
        "",
        f"{MEASURED[measured_on(metrics)].format(metrics)} Normalised MSE is the squared "
        "error over the variance about the mean.",
        "",
        *(f"{kind}: {ARCHITECTURES[kind].does}." for kind in kinds),
    ]


def loading(entries: list[tuple[Path, dict]]) -> list[str]:
    """Code for each library that can hold the architecture faithfully."""
    path, meta = entries[0]
    kind = trained_architecture(meta["settings"])
    layer = HookPoint.of_activations(meta["activations"]).sparsify
    saelens, sparsify, dictionary = (folder_of(path, name).name for name in FORMATS)
    lines = [
        "With this project:",
        *block_of(
            "from fastsae import load_sae",
            "",
            f'sae = load_sae("{path.name}")',
            "features = sae.encode(activations)  # (n, M) of (n, d)",
            "reconstruction = sae.decode(features)",
            'sae.features_of("Where did I leave the key?")',
        ),
    ]
    lines += with_export(
        path,
        "saelens",
        "SAELens",
        "from sae_lens import SAE",
        "",
        f'sae = SAE.load_from_disk("{saelens}")',
        "features = sae.encode(activations)",
    )
    if ARCHITECTURES[kind].sparsify:
        lines += with_export(
            path,
            "sparsify",
            "sparsify",
            "from sparsify import SparseCoder",
            "",
            f'sae = SparseCoder.load_from_disk("{sparsify}/{layer}")',
            "top_acts, top_indices, _ = sae.encode(activations)",
        )
        lines += [
            "sparsify with a CUDA build of PyTorch on a machine without a GPU: "
            "set `SPARSIFY_DISABLE_TRITON=1` before it is "
            "imported, or its decoder fails.",
            "",
        ]
    if ARCHITECTURES[kind].dictionary_learning:
        lines += with_export(
            path,
            "dictionary_learning",
            "dictionary_learning",
            "from dictionary_learning.utils import load_dictionary",
            "",
            f'sae, config = load_dictionary("{dictionary}", device="cpu")',
            "features = sae.encode(activations)",
        )
    if ARCHITECTURES[ARCHITECTURES[kind].form].in_hypothesaes:
        lines += [
            "With HypotheSAEs (it unpickles: only for files you trust):",
            *block_of(
                "from hypothesaes.sae import load_model",
                "",
                f'sae = load_model("{path.name}").eval()',
                "reconstruction, info = sae(activations)",
            ),
        ]
    return lines


def with_export(path: Path, kind: str, name: str, *code_lines: str) -> list[str]:
    """Code for a library, or where its export is not there how to have it written."""
    if folder_of(path, kind).is_dir():
        return [f"With {name}:", *block_of(*code_lines)]
    return [
        f"With {name}: the same training command with `--export {kind}` writes what it reads, "
        "without training again.",
        "",
    ]


def block_of(*lines: str) -> list[str]:
    """A block of Python code."""
    return ["", "```python", *lines, "```", ""]


def settings_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a training, texts in one printable line each."""
    return {
        name: clean(value) if isinstance(value, str) else value
        for name, value in meta["settings"].items()
    }


def clean(text: Any) -> str:
    """One line of at most 200 characters that print: no control, no direction marks, no halves of
    characters."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:200]


def quoted(text: Any) -> str:
    """A JSON string, which YAML reads as a string whatever is in it."""
    return json.dumps(clean(text), ensure_ascii=False)


def code(text: Any) -> str:
    """A code span; a backtick, which could end it, becomes an apostrophe."""
    return f"`{clean(text).replace('`', chr(39)).strip() or '?'}`"
