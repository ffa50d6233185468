"""Autoencoders of this project and of other libraries, and whether they fit activations: what
stages and experiments ask of a checkpoint.

Importing this module loads no torch, so that an up-to-date run ends quickly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsae.data.token_masks import chosen_tokens, token_norms, usable_tokens
from fastsae.formats.source import Source, locate
from fastsae.lm.hook_points import HookPoint
from fastsae.lm.names import described, short_name
from fastsae.runtime import artifacts
from fastsae.runtime.errors import InputError
from fastsae.settings import dataset_names
from fastsae.settings.architectures import ARCHITECTURES

MAX_NORM_RATIO = 10.0  # as train_sae.py leaves attention sinks out
MEASURED_TOKENS = 32768


def start_of(init_from: str | None, output: str | Path) -> Source | None:
    """The autoencoder that INIT_FROM stands for when `output` is to be written; None if it is not
    set, InputError where it holds none.

    `output` itself, or its folder (whose metrics.json will name it), stands for what `output` was
    made from, as long as that lies in the folder (a checkpoint that is written again is kept as
    `.old-n.pt`): so the same command means the same when it is given again, and stops neither
    itself nor starts from its own result.
    """
    if not init_from:
        return None
    found, output = Path(init_from), Path(output)
    own = found.resolve() in (output.resolve(), output.parent.resolve())
    if not own or not output.is_file():
        return locate(found)
    made_from = artifacts.read_checkpoint_metadata(output)["inputs"].get("init_from")
    for file in sorted(output.parent.glob("*.pt")) if made_from else []:
        if not file.name.endswith(".resume.pt") and locate(file).sha256() == made_from:
            print(f"INIT_FROM: {output.name} was made from {file.name}, which is taken again")
            return locate(file)
    return locate(found)


def load_sae(path: str | Path, device: str = "cpu") -> tuple[Any, dict]:
    """(sae, meta) of a checkpoint of this project, verified, or of an autoencoder of another
    library.

    `path` is a .pt, a run's folder under checkpoints/, or what `source.locate` knows. Raises
    EnvironmentFailure if a file is damaged, InputError if it is missing or holds what this project
    cannot compute exactly.
    """
    return locate(path).load(device)


def architecture_of(sae: Any) -> str:
    """What the module computes, by its name in the registry.

    The answer lies in the module: `new_sae` and `load_sae` put it there. A saved one computes the
    `form` of what it was trained as: `trained_architecture` says that, `architecture_text` both.
    """
    return sae.architecture


def trained_architecture(settings: Mapping[str, Any]) -> str:
    """The architecture that a training's settings name; USE_BATCH_TOPK makes topk batchtopk."""
    return "batchtopk" if settings.get("USE_BATCH_TOPK") else settings.get("ARCHITECTURE", "topk")


def architecture_text(settings: Mapping[str, Any]) -> str:
    """What an autoencoder trained with `settings` computes, and as what it was trained if that
    differs."""
    trained = trained_architecture(settings)
    return ARCHITECTURES[trained].text if trained in ARCHITECTURES else trained


def nested_prefixes(settings: Mapping[str, Any]) -> list[int]:
    """The Matryoshka prefixes of a training with `settings`; [] without any."""
    prefixes = settings.get("MATRYOSHKA_PREFIXES") if settings.get("USE_MATRYOSHKA", True) else None
    return list(prefixes) if prefixes and len(prefixes) > 1 else []


def target_k(settings: Mapping[str, Any]) -> int | None:
    """How many features per token the training aimed at; None where nothing fixes their number."""
    about = ARCHITECTURES.get(trained_architecture(settings))
    if about is None:
        return settings.get("K")
    by_target = about.picks_k or settings.get("JUMPRELU_LOSS", "target") == "target"
    return settings.get("K") if about.aims_at_k and by_target else None


def check_fit(
    path: str | Path,
    sae: Any,
    meta: Mapping[str, Any],
    activations_path: str | Path,
    activations_meta: Mapping[str, Any],
    d: int,
    setting: str,
) -> None:
    """InputError, which names `setting`, if `sae` does not belong to these activations
    (n_tokens, d) by width or layer; a line where it names another model."""
    layer = activations_meta["settings"]["LAYER_IDX"]
    problems = []
    if sae.input_dim != d:
        problems.append(
            f"{setting}: {path} takes activations of {sae.input_dim} dimensions, "
            f"{activations_path} has {d}. "
            "give an autoencoder of this model, or extract with the model it was trained on."
        )
    its_layer = meta["activations"]["settings"]["LAYER_IDX"]
    if None not in (its_layer, layer) and its_layer != layer:
        problems.append(
            f"{setting}: {path} was trained after {its_layer} blocks, "
            f"{activations_path} holds layer {layer}. "
            f"give --layer-idx {its_layer} here and to extract_activations.py."
        )
    if None not in (its_layer, layer):
        problems += _other_place(path, meta["activations"], activations_path, activations_meta)
    if problems:
        raise InputError(*problems)
    its_model, model = meta["activations"].get("model_name"), activations_meta["model_name"]
    if its_model and model and short_name(its_model) != short_name(model):
        print(
            f"note: {path} was trained on {short_name(its_model)}; "
            f"the activations are of {short_name(described(model))}."
        )
    if its_layer is None and layer is not None:
        print(f"note: {path} does not say which layer it was trained on; taken for layer {layer}.")


def _other_place(path, source, activations_path, activations_meta):
    """[what to say] where an autoencoder and activations are of different kinds of hook point."""
    its, other = HookPoint.of_activations(dict(source)), HookPoint.of_activations(activations_meta)
    if its.kind != other.kind:
        return [
            f"HOOK: {path} was trained on {its.kind}, {activations_path} holds {other.kind}. "
            f"give --hook {its.kind} here and to extract_activations.py."
        ]
    if its.module and other.module and its.module != other.module:
        return [
            f"HOOK: {path} was trained on what {its.module} gives, {activations_path} holds what "
            f"{other.module} gives, which is what this model adds to its stream. choose another."
        ]
    return []


def is_plain_text(source: dict) -> bool:
    """Whether the activations are of a .txt in blocks, which has no turns and so no chat template,
    whatever USE_CHAT_TEMPLATE says."""
    in_blocks = (source.get("settings") or {}).get("PROCESSING", "block") == "block"
    return in_blocks and dataset_names.is_plain_text(source.get("dataset_path") or "")


def with_chat_template(source: dict) -> bool:
    """Whether the texts of the activations went through the model's chat template."""
    asked = (source.get("settings") or {}).get("USE_CHAT_TEMPLATE", True)
    return asked and source.get("has_chat_template", True)


def meant_tokens(meta: dict) -> dict[str, Any]:
    """Which tokens the autoencoder is for, as exports say it: no format that others read has a
    mask.

    {max_norm, shared_prefix_tokens, use_tokens, tokens: a sentence}; None where there is no bound.
    """
    settings, source = meta["settings"], meta["activations"]
    prefix = source.get("n_shared_prefix") if settings.get("EXCLUDE_SHARED_PREFIX") else None
    use, max_norm = settings.get("USE_TOKENS", "all"), meta.get("max_norm")
    left_out = (
        [f"the first {prefix} tokens of each example (the prefix that all share)"] if prefix else []
    )
    left_out += (
        [f"tokens whose activation has a norm above {max_norm:.6g} (attention sinks)"]
        if max_norm
        else []
    )
    left_out += [f"all tokens but those of kind {use!r}"] if use != "all" else []
    sentence = "It is for all tokens."
    if left_out:
        sentence = (
            f"It was not trained on {', '.join(left_out)}. No mask is part of this format: "
            "leave these tokens out when you "
            "encode activations or build dashboards. "
            "There, most features above a threshold or ReLU fire without meaning, "
            "and strongest of all tokens."
        )
    return {
        "max_norm": max_norm,
        "shared_prefix_tokens": prefix,
        "use_tokens": use,
        "tokens": sentence,
    }


def fit(
    path: str | Path,
    sae: Any,
    meta: dict,
    activations_path: str | Path,
    activations_meta: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Check an autoencoder against activations (`data`, the members of their file), measure it
    there, and complete `meta` by that.

    max_norm and K are found where the files do not say them, and metrics where there are none: over
    at most MEASURED_TOKENS random tokens, those that training would use. Returns the metrics.
    Raises InputError if it does not fit.
    """
    import numpy as np

    from fastsae.data.tokenization import CONTENT
    from fastsae.sae.metrics import evaluate

    check_fit(
        path,
        sae,
        meta,
        activations_path,
        activations_meta,
        data["activations"].shape[1],
        "SAE_PATH",
    )
    own = meta["settings"]
    keep, meta["max_norm"] = usable_tokens(
        token_norms(data["activations"]),
        data["token_kind"],
        exclude_shared_prefix=own["EXCLUDE_SHARED_PREFIX"],
        max_norm_ratio=MAX_NORM_RATIO if "source" in meta else None,
        max_norm=meta["max_norm"],
    )
    rows = np.flatnonzero(
        keep & chosen_tokens(own.get("USE_TOKENS", "all"), data["token_kind"], data["token_role"])
    )
    if not len(rows):
        raise InputError(
            f"SAE_PATH: {path} was trained on tokens of other norms than those here. "
            "give one of this model and layer."
        )
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MEASURED_TOKENS])
    example = np.repeat(np.arange(len(data["seq_lengths"])), data["seq_lengths"])
    metrics = evaluate(
        sae, data["activations"], rows, example, np.asarray(data["token_kind"]) != CONTENT
    )
    _print_fit(path, sae, metrics)
    meta["metrics"] = meta["metrics"] or {**metrics, "n_validation_tokens": metrics["n_tokens"]}
    if meta["settings"]["K"] is None:
        sae.k_active_neurons = meta["settings"]["K"] = min(
            sae.m_total_neurons, max(1, round(metrics["l0"]))
        )
    return metrics


def _print_fit(path: str | Path, sae: Any, metrics: Mapping[str, Any]) -> None:
    print(
        f"{path} ({architecture_of(sae)}, {sae.m_total_neurons:,} features): "
        f"normalised MSE {metrics['normalized_mse']:.4f}, "
        f"L0 {metrics['l0']:.1f} on {metrics['n_tokens']:,} tokens"
    )
    if metrics["normalized_mse"] >= 1:
        print(
            "warning: normalised MSE is not below 1: worse than the mean activation. "
            "is it of this model, layer and scale?"
        )
