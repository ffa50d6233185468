"""Settings that several stages share, and the presets.

A setting is an UPPER_CASE constant at the top of a file: this one if several stages need it, else
the script's own. Its line says all there is to say of it: type, value, and in the comment its
limits (`[1..99]`, or a list of choices) and its meaning. Edit it there, with or without its type:
a number, a text, True, False, None or a tuple, also as `4 * 128`. Or override it for one run with
a flag: `--layer-idx 18`, `--no-quiet`, `--matryoshka-prefixes 64,256`, `--max-examples none`.
Files are read, not imported, so `run_pipeline.py` checks every stage's settings before anything
loads; `fastsae/settings/` is the reader.
"""

from pathlib import Path

from fastsae.settings import resolving
from fastsae.settings.declarations import read_settings
from fastsae.settings.flags import flag_name, parse_flags
from fastsae.settings.values import Settings, run_name_of

# fmt: off
# Main settings:
PRESET: str = "demo"           # which of the PRESETS below gives the settings without a value
OUTPUT_DIR: str | None = None  # folder for activations/, checkpoints/ and interpretations.*;
                               # none = the project's folder
# These five come from the preset. Write a value here (`LAYER_IDX = 18`) and it wins.
MODEL_NAME: str          # the embedded SmolLM2-135M-Instruct (4-bit Q4_1, dequantised), a hub id
                         # (owner/name, or owner/name@branch, @tag, @commit), a local folder or a
                         # .gguf file
LAYER_IDX: int | tuple[int, ...]  # [1..] residual stream after this many blocks, 1 to the model's
                         # number. Several: a file each in one pass; later stages take the first
DATASET_PATH: str        # file of JSON lines, CSV, Parquet, .txt, ... (docs/files.md), also
                         # compressed, a folder, or hf:owner/name:configuration:split

# Data:
MAX_LENGTH: int          # [2..] tokens kept of each example, its chat template included
LABEL_FIELD: str | None  # dataset field with a category, for category_auc; none = no labels
TEXT_FIELD: str = "text"           # dataset field or column that holds a plain text (one user
                                   # turn); another than text goes before messages. Of a .txt:
                                   # line or paragraph, what is a text
ACTIVATIONS_PATH: str | None = None  # stages 2 and 3: an array (rows, width) of another program, a
                                     # .npy, .npz or .npz:name, in place of stage 1's; none = those
MAX_EXAMPLES: int | None = None    # [2..] use only the first so many examples; none = all
MAX_TRAIN_TOKENS: int | None = None  # [2..] train on the first so many tokens only, in the order of
                                     # the data; none = all

# Model:
HOOK: str = "resid_post"           # {resid_post, resid_mid, attn_out, mlp_out} what is read: the
                                   # residual stream after the block or between its two parts, or
                                   # what attention or the MLP adds to it
CACHE_DIR: str | None = None       # where models are kept; none = FASTSAE_CACHE or
                                   # ~/.cache/fastsae, and the hub's own cache
DEVICE: str = "auto"               # auto, cuda, cuda:1, mps or cpu; auto takes the first of these
                                   # that is there

# Scale:
STREAM_BYTES: int | None = None    # [1..] train while activations are extracted, and delete them:
                                   # disk for parts that wait; none = all stay on the disk
BUFFER_TOKENS: int = 1_000_000     # [6..] kept in memory; more are mixed in a buffer of that
                                   # size as they are read. A part of a stream has a third of it

# Run:
RUN_NAME: str | None = None        # folder under checkpoints/; none = the dataset's name
SEED: int | tuple[int, ...] = 0    # [0..] of the split, the first weights and the data order.
                                   # Several: an autoencoder for each, whose first weights alone
                                   # differ
QUIET: bool = False                # print only warnings, errors and each stage's summary line;
                                   # no progress bars
# fmt: on

# Each sets at least what has no value above. Others may be added: a preset wins over a constant as
# it is shipped, a constant that was edited over the preset, a flag over both.
PRESETS = {
    "demo": {
        "MODEL_NAME": "SmolLM2-135M-Instruct",
        "LAYER_IDX": 12,
        "MAX_LENGTH": 512,
        "DATASET_PATH": "data/cognitive_actions.jsonl",
        "LABEL_FIELD": "cognitive_action",
    },
    # for one GPU of 80 GB; docs/scale.md has what it takes, and what changes for 24 GB
    "llama-3.1-8b": {
        "MODEL_NAME": "meta-llama/Llama-3.1-8B-Instruct",
        "LAYER_IDX": 12,
        "MAX_LENGTH": 8192,
        "DATASET_PATH": "dataset.jsonl",
        "LABEL_FIELD": None,
        "STORAGE_DTYPE": "int8",
        "M": 32_768,
        "K": 64,
        "BATCH_SIZE": 4096,
    },
}

PROJECT = Path(__file__).resolve().parent
STAGES = ("extract_activations.py", "train_sae.py", "interpret_sae.py")
__all__ = [
    "PRESETS",
    "PROJECT",
    "STAGES",
    "Settings",
    "flag_name",
    "parse_flags",
    "read_settings",
    "resolve",
    "run_name_of",
]


def resolve(*scripts, argv=None) -> Settings:
    """The settings of this file and of `scripts`; flags beat files, files beat the preset.

    Prints --help and exits 0, or prints every problem at once and exits 2.
    """
    return resolving.resolve(PROJECT, PRESETS, scripts, argv)
