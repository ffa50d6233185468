"""The relations between settings, and what single ones must be besides their limits.

All are checked before anything loads. The names that a rule needs may be absent: a stage knows only
its own settings and the shared ones.
"""

import os
import re
from collections.abc import Callable
from typing import Any

from fastsae.settings.architectures import ARCHITECTURES, DENSE
from fastsae.settings.dataset_names import HUB, SAMPLE_BY, TEXT, is_plain_text
from fastsae.settings.declarations import SEVERAL, shipped_limits
from fastsae.settings.flags import flag_name
from fastsae.settings.folders import folder_advice, folder_format
from fastsae.settings.kinds import AUTO, shown
from fastsae.settings.limits import Limits, each, problems_with
from fastsae.settings.values import LONGEST_NAME, foreign_file

FEATURES = {"M", "K", "AUX_K", "MATRYOSHKA_PREFIXES"}
HUB_REVISION = re.compile(r"([\w.-]+/[\w.-]+)@([\w./-]+)")

Require = Callable[[Any, str, str, str], None]  # (what must hold, NAME, what is wrong, remedy)


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with what follows from them, under the names by which results record it.

    Of several values LAYERS, SEEDS and the like have all, and the setting itself the first.
    """
    values = dict(values)
    for several, name in SEVERAL.items():
        value = values.get(name)
        if isinstance(value, tuple):
            values[name] = value[0] if value else None
        if name in values:
            values.setdefault(several, value if isinstance(value, tuple) else None)
    if "MODEL_NAME" in values:
        found = HUB_REVISION.fullmatch(str(values["MODEL_NAME"]))
        if found:
            values["MODEL_NAME"], values["MODEL_REVISION"] = found.groups()
        values.setdefault("MODEL_REVISION", None)
    if "DEDUP_NGRAM" in values:
        values.setdefault("PROCESSING", "block" if values.get("BLOCK_LENGTH") else "example")
    if "NEURONPEDIA_SET" in values:
        model, slash, name = str(values["NEURONPEDIA_SET"]).rpartition("/")
        if slash:
            values["NEURONPEDIA_MODEL"], values["NEURONPEDIA_SET"] = model, name
        values.setdefault("NEURONPEDIA_MODEL", None)
    return complete_training(values) if {"ARCHITECTURE", *FEATURES} <= set(values) else values


def complete_training(values: dict[str, Any]) -> dict[str, Any]:
    """The part of `complete` that only stage 2 needs: what follows from ARCHITECTURE and M."""
    architecture, m = values["ARCHITECTURE"], values["M"]
    values["USE_BATCH_TOPK"] = architecture == "batchtopk"
    if values["MATRYOSHKA_PREFIXES"] == AUTO:
        nested = (m // 4, m) if m >= 4 else (m,)
        values["MATRYOSHKA_PREFIXES"] = None if architecture in DENSE else nested
    values["USE_MATRYOSHKA"] = values["MATRYOSHKA_PREFIXES"] is not None
    if "WARMUP_STEPS" in values:
        for name in ("LR_WARMUP_STEPS", "SPARSITY_WARMUP_STEPS"):
            values[name] = values["WARMUP_STEPS"]
    if "USE_TOKENS" in values:
        values.setdefault("EXCLUDE_SHARED_PREFIX", values["USE_TOKENS"] != "all+prefix")
        values["USE_TOKENS"] = values["USE_TOKENS"].removesuffix("+prefix")
    for each_about in ARCHITECTURES.values():
        if each_about.coefficient:
            values[each_about.coefficient] = each_about.weight
    about = ARCHITECTURES.get(architecture)
    if about and about.coefficient:
        given = values.get("SPARSITY_COEFFICIENT")
        weight = about.weight if given is None else given
        values["SPARSITY_COEFFICIENT"] = values[about.coefficient] = weight
    return values


def check_values(values: dict[str, Any], limits: dict[str, Limits] | None = None) -> list[str]:
    """Every impossible value or combination among `values`, one line each with its remedy.

    `limits` are those of each setting, by default as shipped.
    """
    limits = shipped_limits() if limits is None else limits
    problems = [
        problem
        for name, value in values.items()
        for own in [SEVERAL.get(name, name) if name not in limits else name]
        if own in limits  # what follows from others is recorded, not given
        for problem in problems_with(own, value, limits[own])
    ]

    def require(ok: Any, name: str, what: str, remedy: str) -> None:
        if not ok:
            problems.append(f"{name}: {what}. {remedy}.")

    if "DEVICE" in values:
        require(
            re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", values["DEVICE"]),
            "DEVICE",
            f"{shown(values['DEVICE'])} is unknown",
            "choose auto, cpu, mps, cuda or cuda:0",
        )
    if values.get("RUN_NAME") is not None:
        require(
            re.fullmatch(r"[\w.=+-]*[\w=+-]", values["RUN_NAME"]),
            "RUN_NAME",
            f"{shown(values['RUN_NAME'])} cannot be a folder's name",
            "use letters, digits and . _ = + -",
        )
    for name in ("RUN_NAME", "NEURONPEDIA_SET"):
        length = len(str(values.get(name) or "").encode(errors="replace"))
        require(
            length <= LONGEST_NAME,
            name,
            f"{length} bytes are too long for a folder's name",
            f"give at most {LONGEST_NAME}",
        )
    check_several(values, limits, require)
    check_paths(values, require)
    check_extraction(values, require)
    if FEATURES <= set(values):
        check_features(values, require)
        check_architecture(values, require)
    check_interpretation(values, require)
    return list(dict.fromkeys(problems))


def check_several(values: dict[str, Any], limits: dict[str, Limits], require: Require) -> None:
    """Several values of one setting differ."""
    for several, name in SEVERAL.items():
        found = values.get(several)
        require(
            not isinstance(found, tuple) or 0 < len(found) == len(set(found)),
            several if several in limits else name,
            f"{found} are not different values",
            "name each once",
        )


def check_paths(values: dict[str, Any], require: Require) -> None:
    """The dataset is there, and outputs go to a folder."""
    reads_it = {"BATCH_TOKENS", "N_TOP_NEURONS"} & set(values) and values.get("TEXT") is None
    if reads_it and "DATASET_PATH" in values and values.get("ACTIVATIONS_PATH") is None:
        path = values["DATASET_PATH"]
        what, remedy = "is not a file", "give your data with --dataset-path FILE.jsonl"
        there = path.startswith(HUB) or os.path.isfile(path)
        if os.path.isdir(path):
            there = folder_format(path) is not None
            what, remedy = ("", "") if there else folder_advice(path)
        require(there, "DATASET_PATH", f"{path} {what}", remedy)
    check_foreign(values, require)
    for name in ("OUTPUT_DIR", "CACHE_DIR"):
        require(
            values.get(name) != "",
            name,
            "is empty",
            f"name a folder, or leave --{flag_name(name)} out",
        )
        nearest = values.get(name) or "/"
        while not os.path.lexists(nearest) and os.path.dirname(nearest) != nearest:
            nearest = os.path.dirname(nearest)
        require(
            os.path.isdir(nearest),
            name,
            f"{nearest} is not a folder",
            f"choose another --{flag_name(name)}",
        )


def check_foreign(values: dict[str, Any], require: Require) -> None:
    """An array of another program is there, and asked of the stages that can use it."""
    path = values.get("ACTIVATIONS_PATH")
    if path is None:
        return
    require(
        os.path.isfile(foreign_file(path)[0]),
        "ACTIVATIONS_PATH",
        f"{path} is not a file",
        "give a .npy or .npz with an array (rows, width)",
    )
    require(
        "BATCH_TOKENS" not in values,
        "ACTIVATIONS_PATH",
        "stage 1 makes activations and reads none",
        "give it to train_sae.py and interpret_sae.py",
    )
    require(
        values.get("STREAM_BYTES") is None,
        "STREAM_BYTES",
        "an array of another program is no stream",
        "leave it out",
    )
    for name in ("TARGET_FIELD", "TARGET_VALUE", "NEURONPEDIA_SET"):
        require(
            values.get(name) is None,
            name,
            "needs texts, and an array of another program has none",
            "leave it out",
        )
    require(
        not values.get("EXPORT"),
        "EXPORT",
        "other libraries name the place in a model, which an array does not",
        "leave --export out",
    )


def check_extraction(values: dict[str, Any], require: Require) -> None:
    """What a plain text can be used for."""
    if not is_plain_text(values.get("DATASET_PATH", "")):
        return
    if {"PROCESSING", "DEDUP_NGRAM"} <= set(values) and values["PROCESSING"] == "block":
        require(
            values["DEDUP_NGRAM"] == 0,
            "DEDUP_NGRAM",
            "a .txt in blocks has no examples to drop",
            "set it to 0",
        )
    if {"BATCH_TOKENS", "N_TOP_NEURONS"} & set(values):
        require(
            values["TEXT_FIELD"] in (TEXT, *SAMPLE_BY),
            "TEXT_FIELD",
            f"a .txt has no field {shown(values['TEXT_FIELD'])}",
            "set --text-field line or paragraph, or leave it out",
        )


def check_features(values: dict[str, Any], require: Require) -> None:
    """M, K, AUX_K, the prefixes and the lists of several autoencoders against each other."""
    held_out = values.get("VALIDATION_FRACTION", 0) + values.get("TEST_FRACTION", 0)
    require(
        held_out < 1 or values["VALIDATION_FRACTION"] > 0.99,
        "TEST_FRACTION",
        f"with VALIDATION_FRACTION it is {held_out:g}, and nothing is left to train on",
        "lower --test-fraction",
    )
    m, prefixes = values["M"], values["MATRYOSHKA_PREFIXES"]
    k = max(each(values.get("K_LIST") or values["K"]), default=0)
    require(
        k <= m,
        "K",
        f"{shown(k)} active features of only M={shown(m)}",
        f"lower --k or raise --m to at least {shown(k)}",
    )
    require(
        (values["AUX_K"] or 0) <= m,
        "AUX_K",
        f"{shown(values['AUX_K'])} is more than M={shown(m)}",
        "lower --aux-k",
    )
    require(
        not (values.get("INIT_FROM") and values.get("SEEDS")),
        "SEED",
        "all would start alike, from INIT_FROM",
        "leave one of the two out",
    )
    if values.get("ARCHITECTURE") not in DENSE and prefixes is not None:
        rising = (
            len(prefixes) > 0
            and prefixes[0] >= 1
            and all(a < b for a, b in zip(prefixes, prefixes[1:]))
        )
        require(
            rising or m < 1,
            "MATRYOSHKA_PREFIXES",
            f"{prefixes} do not rise from 1 or more",
            "give for example 64,256, or auto for a quarter of M and M",
        )
        require(
            not rising or prefixes[-1] == m,
            "MATRYOSHKA_PREFIXES",
            f"the last of {prefixes} is not M={shown(m)}",
            f"give for example {max(1, m // 4)},{shown(m)}, or auto for these two",
        )


def check_architecture(values: dict[str, Any], require: Require) -> None:
    """What only some architectures have."""
    architecture = values.get("ARCHITECTURE")
    require(
        architecture not in DENSE or values["MATRYOSHKA_PREFIXES"] is None,
        "MATRYOSHKA_PREFIXES",
        f"{architecture} has no prefixes",
        "give --matryoshka-prefixes none, or --architecture topk",
    )
    require(
        values.get("SELECT_DTYPE") != "bfloat16" or architecture == "topk",
        "SELECT_DTYPE",
        "only topk can choose from bfloat16",
        "set it to float32, or give --architecture topk",
    )
    about = ARCHITECTURES.get(str(architecture))
    penalised = about is not None and about.coefficient is not None
    by_k = about is not None and about.aims_at_k
    for name, plays_a_part in (("SPARSITY_COEFFICIENT_LIST", penalised), ("K_LIST", by_k)):
        require(
            plays_a_part or not values.get(name),
            SEVERAL[name],
            f"{architecture} does not use it, so all would be alike",
            "give one value, or another --architecture",
        )
    require(
        "sparsify" not in each(values.get("EXPORT")) or architecture == "topk",
        "EXPORT",
        f"sparsify holds topk only, not {architecture}",
        "leave sparsify out, or give --architecture topk",
    )
    require(
        "sparsify" not in each(values.get("EXPORT")) or values.get("HOOK") != "resid_mid",
        "EXPORT",
        "sparsify names its folders by modules' outputs, and resid_mid is none",
        "leave sparsify out",
    )


def check_interpretation(values: dict[str, Any], require: Require) -> None:
    """The rules of stage 3's own settings."""
    if {"TARGET_VALUE", "TARGET_FIELD", "LABEL_FIELD"} <= set(values):
        require(
            not values["TARGET_VALUE"] or values["TARGET_FIELD"] or values["LABEL_FIELD"],
            "TARGET_VALUE",
            "no field is named that could have it",
            "name one with --target-field",
        )
    for name in ("TEXT", "DRY_RUN"):
        require(
            not (values.get("QUIET") and values.get(name)),
            name,
            "QUIET hides what it prints",
            "leave out --quiet",
        )
    names = [values.get("NEURONPEDIA_MODEL"), values.get("NEURONPEDIA_SET")]
    for name in ("N_FIDELITY_EXAMPLES", "N_JUDGED_EXAMPLES"):
        n = values.get(name) or 0
        require(
            n <= 0 or n >= 6,
            name,
            f"{n} are too few to test a label",
            "give 6 or more, or 0 for no test",
        )
    require(
        all(name is None or re.fullmatch(r"[\w.-]*\w", name) for name in names),
        "NEURONPEDIA_SET",
        f"{shown('/'.join(filter(None, names)))} cannot be the name of a set",
        "use letters, digits and . _ -, and one / after the model's id",
    )
