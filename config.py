"""Settings that several stages share, the presets, and the one reader of settings and --flags.

A setting is an annotated UPPER_CASE constant at the top of a file: this one if several stages need it, else the script's own.
Edit it there, or override it for one run with a flag: `--layer-idx 18`, `--no-use-matryoshka`, `--matryoshka-prefixes 64,256`,
`--max-examples none`. Files are read, not imported, so `run_pipeline.py` checks every stage's settings before anything loads.
"""
import ast
import difflib
import io
import math
import operator
import os
import re
import sys
import textwrap
import tokenize
from pathlib import Path
from types import MappingProxyType

PRESET: str = "demo"                # which of the PRESETS below gives the settings declared without a value
OUTPUT_DIR: str | None = None       # folder for activations/, checkpoints/ and interpretations.*; none = the project's folder
RUN_NAME: str | None = None         # folder under checkpoints/; none = the dataset's name
MODEL_REVISION: str | None = None   # branch, tag or commit of a hub model; none = its default
CACHE_DIR: str | None = None        # where models are kept; none = FASTSAE_CACHE or ~/.cache/fastsae, and the hub's own cache
TEXT_FIELD: str = "text"            # dataset field that holds a plain text (one user turn); another than text goes before messages
MAX_EXAMPLES: int | None = None     # use only the first so many examples; none = all
DEVICE: str = "auto"                # auto, cuda, cuda:1, mps or cpu; auto takes the first of these that is there
PRINT_SETTINGS: bool = True         # say which settings are in force and where each came from
QUIET: bool = False                 # print only warnings, errors and the summary line of each stage; no progress bars
SEED: int = 0                       # of the split, the initial weights and the data order

# The preset gives these. Write a value here (`LAYER_IDX: int = 18`) and it wins over the preset.
MODEL_NAME: str                     # the embedded SmolLM2-135M-Instruct, a hub id, a local folder or a .gguf file
LAYER_IDX: int                      # residual stream after this many blocks, 1 to the model's number of blocks
MAX_LENGTH: int                     # tokens kept of each example, its chat template included
DATASET_PATH: str                   # JSONL file (or JSON array) with text, messages or conversations; hf:owner/name; .txt for blocks
LABEL_FIELD: str | None             # dataset field with a category, for category_auc; none = no labels

PRESETS = {
    "demo": {
        "MODEL_NAME": "SmolLM2-135M-Instruct",
        "LAYER_IDX": 12,
        "MAX_LENGTH": 512,
        "DATASET_PATH": "data/cognitive_actions.jsonl",
        "LABEL_FIELD": "cognitive_action",
    },
    "llama-3.1-8b": {
        "MODEL_NAME": "meta-llama/Llama-3.1-8B-Instruct",
        "LAYER_IDX": 12,
        "MAX_LENGTH": 8192,
        "DATASET_PATH": "dataset.jsonl",
        "LABEL_FIELD": None,
    },
}

PROJECT = Path(__file__).resolve().parent
STAGES = ("extract_activations.py", "train_sae.py", "interpret_sae.py")
PATH_SETTINGS = ("DATASET_PATH", "OUTPUT_DIR", "CACHE_DIR", "INIT_FROM", "SAE_PATH")
HELP_WIDTH, HELP_COLUMN = 100, 32
EXIT_CODES = """exit codes: 0 done; 1 a bug; 2 bad input or setting; 3 disk, network, rights or a damaged file;
            4 done, with features unlabelled; 130, 143 interrupted"""


def run_name_of(dataset_path):
    """The name of a run on a dataset: its file's, or a hub dataset's with its revision."""
    name = Path(dataset_path).name
    return name.rpartition(".")[0] if name.endswith((".jsonl", ".json", ".txt")) else name


class Settings:
    """The resolved settings of one run, frozen: `settings.M`, `settings.source["M"]`, `settings.values`."""

    def __init__(self, values, source, owner):
        self.__dict__.update(values=MappingProxyType(values), source=MappingProxyType(source), owner=MappingProxyType(owner))

    def __getattr__(self, name):
        if name in self.__dict__["values"]:
            return self.values[name]
        raise AttributeError(name)

    def __setattr__(self, name, value):
        raise AttributeError(f"settings are frozen; give --{flag_name(name)} instead")

    def replace(self, **values):
        """These settings with other `values`, for one of several autoencoders."""
        return Settings({**self.values, **values}, self.source, self.owner)

    def select(self, names):
        """The named settings as a JSON-able dict."""
        return {name: list(v) if isinstance(v := self.values[name], tuple) else v for name in names}

    @property
    def output_dir(self):
        return Path(self.OUTPUT_DIR) if self.OUTPUT_DIR else PROJECT

    @property
    def activations_path(self):
        return self.output_dir / "activations" / f"activations_layer{self.LAYER_IDX}.npz"

    @property
    def run_dir(self):
        return self.output_dir / "checkpoints" / (self.RUN_NAME or run_name_of(self.DATASET_PATH))

    def flags_for(self, script):
        """The flags of this run that `script` understands, as command-line arguments."""
        return [f"--{'' if value else 'no-'}{flag_name(name)}" if isinstance(value, bool) else f"--{flag_name(name)}={_as_typed(value)}"
                for name, value in self.values.items() if self.source[name] == "flag" and self.owner[name] in ("config.py", script)]

    def show(self):
        """Print every setting with where it came from, a few lines in all, unless PRINT_SETTINGS is off."""
        if self.PRINT_SETTINGS and not self.QUIET:
            print(self.describe(), flush=True)

    def describe(self):
        groups = {}
        for name, value in self.values.items():
            groups.setdefault(self.source[name], []).append(f"{name}={_as_typed(value)}")
        order = sorted(groups, key=lambda source: (source != "flag", not source.startswith("preset"), source))
        return "\n".join(textwrap.fill(f"{source}: {', '.join(groups[source])}", 150, initial_indent="settings from ",
                                       subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
                         for source in order)


def quiet_if_unread(main):
    """Call `main()`; a reader of our output that leaves early, as `head` does, is no error."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def resolve(*scripts, argv=None):
    """Settings of config.py and of `scripts`, with flags, preset and files applied in that order of precedence.

    Prints --help and exits 0, or prints every problem at once and exits 2.
    """
    declared = {}
    for path in (Path(__file__), *map(Path, scripts)):
        declared.update(read_settings(path))
    own = [Path(path) for path in scripts if len(scripts) == 1 or Path(path).name not in STAGES]
    script = own[-1] if own else PROJECT / "run_pipeline.py"
    given, problems = parse_flags(declared, sys.argv[1:] if argv is None else argv, script)
    unread = {problem.split(":")[0] for problem in problems}  # flags whose value is wrong: no other value stands in for them
    preset_name = given.get("PRESET", declared["PRESET"]["value"])
    if not isinstance(preset_name, str) or preset_name not in PRESETS:
        problems.append(f"PRESET: there is no preset {preset_name!r}. choose {' or '.join(PRESETS)}.")
        preset_name = "demo"
    preset = PRESETS[preset_name]
    values, source = {}, {}
    for name, setting in declared.items():
        if name in given:
            values[name], source[name] = given[name], "flag"
        elif setting["has_value"]:
            values[name], source[name] = setting["value"], setting["file"]
        else:
            values[name], source[name] = preset[name], f"preset {preset_name}"
        if name in PATH_SETTINGS and isinstance(values[name], str) and values[name] and not values[name].startswith("hf:"):
            base = Path.cwd() if source[name] == "flag" else PROJECT  # flags are relative to where the user is, files to the project
            values[name] = os.path.join(base, os.path.expanduser(values[name]))
    wrong = {name: setting for name, setting in declared.items() if not _has_type(values[name], setting["type"])}
    problems += [f"{name}: {values[name]!r} is no {setting['type']}. " + ("give another value." if source[name] == "flag" else
                 f"mend it in {setting['file']}.") for name, setting in wrong.items()]
    problems += check_values({name: value for name, value in values.items() if name not in wrong and name not in unread})
    if problems:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    return Settings(values, source, {name: setting["file"] for name, setting in declared.items()})


def read_settings(path):
    """{NAME: {type, value, has_value, comment, file}} of the annotated UPPER_CASE constants of a file, without running it."""
    comments = {}
    with tokenize.open(path) as file:
        source = file.read()
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        print(f"error: {Path(path).name}:{error.lineno}: {error.msg}. mend the line.", file=sys.stderr)
        sys.exit(2)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    settings = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and re.fullmatch("[A-Z][A-Z0-9_]*", node.target.id):
            settings[node.target.id] = {
                "type": ast.unparse(node.annotation), "has_value": node.value is not None,
                "value": _constant(node.value, path) if node.value is not None else None,
                "comment": comments.get(node.end_lineno or 0, ""), "file": Path(path).name}
    return settings


def _constant(node, path):
    try:
        return ast.literal_eval(node)
    except ValueError:
        print(f"error: {Path(path).name}:{node.lineno}: a setting must be a plain value. write the result, not the sum.", file=sys.stderr)
        sys.exit(2)


def flag_name(name):
    return name.lower().replace("_", "-")


def parse_flags(declared, argv, script):
    """({NAME: value} of the flags in `argv`, problems). `--help` lists every setting and exits.

    `--name value`, `--name=value`, and `--name` or `--no-name` for a bool. A flag whose value cannot be read is left out and its
    name is in `problems`.
    """
    names = {f"--{flag_name(name)}": name for name in declared}
    switches = {f"{prefix}{flag_name(name)}": (name, prefix == "--")
                for name, setting in declared.items() if setting["type"] == "bool" for prefix in ("--", "--no-")}
    given, problems, words = {}, [], list(argv)
    while words:
        flag, joined, text = words.pop(0).partition("=")
        if flag in ("-h", "--help"):
            sys.exit(quiet_if_unread(lambda: print(help_text(declared, script))))
        followed = bool(words) and not words[0].startswith("--") and not joined  # `-1` is a value
        if flag in switches and joined:
            problems.append(f"command line: {flag} takes no value. give {flag}, or --no-{flag.removeprefix('--').removeprefix('no-')}.")
        elif flag in switches:
            name, given[name] = switches[flag]
        elif flag not in names:
            near = difflib.get_close_matches(f"--{flag.lstrip('-').lower().replace('_', '-')}", [*names, *switches], n=1, cutoff=0.8)
            problems.append(f"{flag}: no such setting. " + (f"perhaps {near[0]} is meant; --help lists all." if near else
                                                            "see --help for all of them."))
            if flag.startswith("--") and followed:
                words.pop(0)
        else:
            name, example = names[flag], f"for example {flag} {_example_of(declared[names[flag]])}."
            if not joined and not followed:
                problems.append(f"{name}: no value is given. {example}")
                continue
            text = text if joined else words.pop(0)
            try:
                given[name] = parse_value(text, declared[name]["type"])
            except ValueError:
                problems.append(f"{name}: {text!r} is no {declared[name]['type']}. {example}")
    return given, problems


def help_text(declared, script):
    """What `--help` prints: the first sentence and the examples of the script's docstring, every setting, the exit codes."""
    about = ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8"))) or ""
    lines = [f"usage: python {os.path.relpath(script, PROJECT)} [--setting value ...]", "",
             *textwrap.wrap(" ".join(about.split("\n\n")[0].split()), HELP_WIDTH)]
    for name, setting in declared.items():
        if (heading := f"settings of {setting['file']}:") not in lines:
            lines += ["", heading]
        kind = re.sub(r"tuple\[(\w+), \.\.\.\]", r"\1,\1,...", setting["type"]).replace(" | None", "|none")
        flag = f"  --{flag_name(name)} " + (f"| --no-{flag_name(name)}" if kind == "bool" else kind.upper().replace("NONE", "none"))
        defaults = {"": setting["value"]} if setting["has_value"] else {f"{preset}: ": PRESETS[preset][name] for preset in PRESETS}
        default = "; ".join(f"{preset}{_as_typed(value)}" for preset, value in defaults.items())
        if len(flag) > HELP_COLUMN - 2:
            lines, flag = [*lines, flag], ""
        lines.append(textwrap.fill(f"{setting['comment']} [{default}]", HELP_WIDTH, initial_indent=flag.ljust(HELP_COLUMN),
                                   subsequent_indent=" " * HELP_COLUMN, break_on_hyphens=False))
    examples = [line for line in about.split("\n") if line.startswith("    ")]
    return "\n".join([*lines, "", "Edit a setting at the top of its file, or give its flag for one run. Tuples take commas.", "",
                      "examples:", *(line[2:] for line in examples), "", EXIT_CODES])


def _as_typed(value):
    """A default in the form in which a flag takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)


def _example_of(setting):
    value = setting["value"]
    examples = {"int": "8", "float": "0.5", "tuple[int, ...]": "8,16", "tuple[float, ...]": "0.5,2", "tuple[str, ...]": "saelens"}
    return ",".join(map(str, value)) if isinstance(value, tuple) else examples.get(setting["type"].removesuffix(" | None"), value)


def parse_value(text, kind):
    """A flag's text as a value of the annotated type `kind`; ValueError if it is none."""
    if kind.endswith(" | None"):
        if text.lower() == "none":
            return None
        kind = kind.removesuffix(" | None")
    if kind.startswith("tuple["):
        return tuple(parse_value(part, _inner(kind)) for part in text.split(","))
    return {"int": int, "float": float, "str": str}[kind](text)


def _inner(kind):
    return kind.removeprefix("tuple[").removesuffix(", ...]")


def _has_type(value, kind):
    if kind.endswith(" | None"):
        return value is None or _has_type(value, kind.removesuffix(" | None"))
    if kind.startswith("tuple["):
        return isinstance(value, (tuple, list)) and all(_has_type(v, _inner(kind)) for v in value)
    if kind == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return type(value).__name__ == kind


def _each(value):
    """The values of a setting that may be none, one or several."""
    return () if value is None else value if isinstance(value, (tuple, list)) else (value,)


AT_LEAST = {"LAYER_IDX": 1, "MAX_LENGTH": 2, "MAX_EXAMPLES": 2, "SEED": 0, "BATCH_TOKENS": 1, "CHUNK_TOKENS": 1, "SHARD_BYTES": 1,
            "BLOCK_LENGTH": 2, "DEDUP_NGRAM": 0, "M": 1, "K": 1, "AUX_K": 0, "AUX_COEF": 0, "DEAD_AFTER_TOKENS": 1, "BATCH_SIZE": 2,
            "N_EPOCHS": 1, "PATIENCE": 1, "N_TOP_NEURONS": 0, "N_LLM_WORKERS": 1, "LR_WARMUP_STEPS": 0, "SPARSITY_WARMUP_STEPS": 0,
            "BUFFER_TOKENS": 6, "MAX_TRAIN_TOKENS": 2, "L1_COEFFICIENT": 0, "L0_COEFFICIENT": 0, "RESAMPLE_EVERY": 1, "SEEDS": 0,
            "K_LIST": 1, "L1_COEFFICIENT_LIST": 0, "N_REPORT_FEATURES": 1, "N_SCORED_FEATURES": 0, "N_FIDELITY_EXAMPLES": 0,
            "N_HYPOTHESES": 1, "TEST_FRACTION": 0}
ABOVE = {"LEARNING_RATE": 0, "CLIP_GRAD": 0, "MAX_NORM_RATIO": 1, "VALIDATION_FRACTION": 0, "LLM_TIMEOUT": 0, "SAVE_EVERY": 0,
         "LR_DECAY_FRACTION": 0, "INIT_ENCODER_SCALE": 0, "JUMPRELU_BANDWIDTH": 0}
AT_MOST = {"SEED": 2 ** 63 - 1, "SEEDS": 2 ** 63 - 1, "VALIDATION_FRACTION": 0.99, "TEST_FRACTION": 0.98, "LR_DECAY_FRACTION": 1}
CHOICES = {"DTYPE": ("auto", "float32", "bfloat16", "float16"), "STORAGE_DTYPE": ("float16", "float32"), "PROCESSING": ("example", "block"),
           "POOLING": ("max", "mean"), "ENGINE": ("sparse", "reference"),
           "SELECT_DTYPE": ("float32", "bfloat16"), "LR_SCHEDULE": ("constant", "linear", "cosine"),
           "ARCHITECTURE": ("topk", "batchtopk", "standard", "jumprelu", "gated"), "JUMPRELU_LOSS": ("target", "step"),
           "LOGGER": ("none", "tensorboard", "wandb"), "USE_TOKENS": ("all", "content", "assistant"),
           "NORMALIZE_ACTIVATIONS": ("auto", "none", "mean", "norm", "both"),
           "INIT_DIRECTIONS": ("mixed", "xavier", "kaiming", "orthogonal", "data"), "INIT_CENTRE": ("median", "mean", "geometric_median"),
           "EXPORT": ("saelens", "sparsify"),
           "LLM_PROTOCOL": ("both", "contrastive", "fast"), "SELECTION_METHOD": ("separation_score", "correlation", "lasso")}


def check_values(values):
    """Every impossible value or combination among `values`, one line each with its remedy; names that are left out pass."""
    problems = []

    def require(ok, name, what, remedy):
        if not ok:
            problems.append(f"{name}: {what}. {remedy}.")

    for table, ok, wrong, right in ((AT_LEAST, operator.ge, "below {}", "{} or more"), (AT_MOST, operator.le, "above {}", "{} or less"),
                                   (ABOVE, operator.gt, "not above {}", "more than {}")):
        for name, bound in table.items():
            for value in _each(values.get(name)):
                require(ok(value, bound), name, f"{value} is {wrong.format(bound)}", f"give {right.format(bound)}")
    for name, allowed in CHOICES.items():
        for value in _each(values.get(name)):
            require(value in allowed, name, f"{value!r} is unknown", f"choose {', '.join(allowed)}")
    if "DEVICE" in values:
        require(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", values["DEVICE"]), "DEVICE", f"{values['DEVICE']!r} is unknown",
                "choose auto, cpu, mps, cuda or cuda:0")
    if values.get("RUN_NAME") is not None:
        require(re.fullmatch(r"[\w.=+-]*[\w=+-]", values["RUN_NAME"]), "RUN_NAME", f"{values['RUN_NAME']!r} is no folder name",
                "use letters, digits and . _ = + -")
    check_paths(values, require)
    check_extraction(values, require)
    check_features(values, require)
    check_interpretation(values, require)
    return problems


def check_paths(values, require):
    if {"BATCH_TOKENS", "POOLING"} & set(values) and "DATASET_PATH" in values and values.get("TEXT") is None:  # stages that read it
        from_hub = values["DATASET_PATH"].startswith("hf:")
        require(from_hub or os.path.isfile(values["DATASET_PATH"]), "DATASET_PATH", f"{values['DATASET_PATH']} is no file",
                "give your data with --dataset-path FILE.jsonl")
    for name in ("OUTPUT_DIR", "CACHE_DIR"):
        require(values.get(name) != "", name, "is empty", f"name a folder, or leave --{flag_name(name)} out")
        nearest = values.get(name) or "/"
        while not os.path.lexists(nearest) and os.path.dirname(nearest) != nearest:
            nearest = os.path.dirname(nearest)
        require(os.path.isdir(nearest), name, f"{nearest} is no folder", f"choose another --{flag_name(name)}")


def check_extraction(values, require):
    """LAYERS, and what a plain text can be used for."""
    if values.get("LAYERS") is not None:
        layers = values["LAYERS"]
        require(len(layers) > 0 and min(layers) >= 1 and len(set(layers)) == len(layers), "LAYERS",
                f"{layers} are not different layers from 1 on", "give for example --layers 12,18")
    if {"PROCESSING", "DEDUP_NGRAM", "DATASET_PATH"} <= set(values) and values["DATASET_PATH"].endswith(".txt"):
        require(values["PROCESSING"] == "block", "PROCESSING", "a .txt has no examples", "add --processing block")
        require(values["DEDUP_NGRAM"] == 0, "DEDUP_NGRAM", "a .txt has no examples to drop", "set it to 0")


def check_features(values, require):
    """M, K, AUX_K and the prefixes against each other."""
    if not {"M", "K", "AUX_K", "USE_MATRYOSHKA", "MATRYOSHKA_PREFIXES"} <= set(values):
        return
    held_out = values.get("VALIDATION_FRACTION", 0) + values.get("TEST_FRACTION", 0)
    require(held_out < 1, "TEST_FRACTION", f"with VALIDATION_FRACTION it is {held_out:g}, and nothing is left to train on",
            "lower --test-fraction")
    m, prefixes = values["M"], values["MATRYOSHKA_PREFIXES"]
    for name in ("K", "K_LIST"):
        k = max(_each(values.get(name)), default=0)
        require(k <= m, name, f"{k} active features of only M={m}", f"lower --{flag_name(name)} or raise --m to at least {k}")
    for name in ("SEEDS", "K_LIST", "L1_COEFFICIENT_LIST"):
        several = values.get(name)
        require(several is None or 0 < len(several) == len(set(several)), name, f"{several} are not different values",
                "name each once, or give none")
    require(values.get("SELECT_DTYPE") != "bfloat16" or (values.get("ARCHITECTURE") == "topk" and not values.get("USE_BATCH_TOPK")),
            "SELECT_DTYPE", "only topk can choose from bfloat16", "set it to float32, or give --architecture topk")
    require((values["AUX_K"] or 0) <= m, "AUX_K", f"{values['AUX_K']} is more than M={m}", "lower --aux-k")
    dense = values.get("ARCHITECTURE") in ("standard", "jumprelu", "gated")
    require(not (dense and values["USE_MATRYOSHKA"]), "USE_MATRYOSHKA", f"{values.get('ARCHITECTURE')} has no prefixes",
            "give --no-use-matryoshka, or --architecture topk")
    require(not (dense and values.get("USE_BATCH_TOPK")), "USE_BATCH_TOPK", f"{values.get('ARCHITECTURE')} picks no largest K",
            "give --no-use-batch-topk, or --architecture batchtopk")
    by_l1 = values.get("ARCHITECTURE") in ("standard", "gated")
    for name, plays_a_part in (("L1_COEFFICIENT_LIST", by_l1), ("K_LIST", not by_l1)):
        require(plays_a_part or not values.get(name), name, f"{values.get('ARCHITECTURE')} does not use it, so all would be alike",
                "leave it out, or give another --architecture")
    require(not (values.get("INIT_FROM") and values.get("SEEDS")), "SEEDS", "all would start alike, from INIT_FROM",
            "leave one of the two out")
    other = "batchtopk" if values.get("USE_BATCH_TOPK") else values.get("ARCHITECTURE")
    require("sparsify" not in _each(values.get("EXPORT")) or other == "topk", "EXPORT", f"sparsify holds topk only, not {other}",
            "leave sparsify out, or give --architecture topk")
    if values["USE_MATRYOSHKA"] and not dense:
        rising = len(prefixes) > 0 and prefixes[0] >= 1 and all(a < b for a, b in zip(prefixes, prefixes[1:]))
        require(rising, "MATRYOSHKA_PREFIXES", f"{prefixes} do not rise from 1 or more", "give for example 64,256")
        require(not rising or prefixes[-1] == m, "MATRYOSHKA_PREFIXES", f"the last of {prefixes} is not M={m}",
                f"give for example --matryoshka-prefixes {max(1, m // 4)},{m}, or --no-use-matryoshka")


def check_interpretation(values, require):
    """The rules of stage 3's own settings."""
    if {"TARGET_VALUE", "TARGET_FIELD", "LABEL_FIELD"} <= set(values):
        require(not values["TARGET_VALUE"] or values["TARGET_FIELD"] or values["LABEL_FIELD"], "TARGET_VALUE",
                "no field is named that could have it", "name one with --target-field")
    for name in ("TEXT", "DRY_RUN"):
        require(not (values.get("QUIET") and values.get(name)), name, "QUIET hides what it prints", "leave out --quiet")
    n, name = values.get("N_FIDELITY_EXAMPLES") or 0, values.get("NEURONPEDIA_SET")
    require(n <= 0 or n >= 6, "N_FIDELITY_EXAMPLES", f"{n} are too few to test a label", "give 6 or more, or 0 for no test")
    require(name is None or re.fullmatch(r"[\w.-]*\w", name), "NEURONPEDIA_SET", f"{name!r} is no name of a set",
            "use letters, digits and . _ -")
