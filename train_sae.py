"""Stage 2: train a sparse autoencoder on the tokens of stage 1 (HypotheSAEs' TopK / BatchTopK /
Matryoshka objective).

    python train_sae.py --m 512 --k 8 --matryoshka-prefixes 64,512
    python train_sae.py --seed 0,1,2 --k 4,8,16           # nine from one reading of the data

Reads `activations/activations_layer{LAYER_IDX}.npz`, or with ACTIVATIONS_PATH an array of another
program. Writes `checkpoints/<run>/SAE_....pt` (which
`hypothesaes.sae.load_model` reads), `metrics.json` with the final figures, `metrics.jsonl` with one
line per epoch, `training.png` with their curves, `README.md`, a model card, and with EXPORT folders
for other libraries; while it trains, `SAE_....resume.jsonl` with a line per epoch and
`SAE_....resume.pt`, from which the same command goes on after an interruption and ends in the same
bytes. Activations beyond BUFFER_TOKENS stay on the disk.
"""

from fastsae.runtime import early_stop, threads
from fastsae.settings import startup

if __name__ == "__main__":
    early_stop.listen()  # before anything else is loaded
    threads.share_cores()
    startup.explain_slips()  # of config.py, which is imported below

import shlex
import sys
from pathlib import Path

import config
from fastsae.activations import stream
from fastsae.runtime import artifacts, progress, ranks, stage, storage
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.runtime.stage import end, run_stage
from fastsae.training.limits import require_memory

# fmt: off
# Main settings:
ARCHITECTURE: str = "topk"    # how features become active; standard: ReLU and L1
M: int = 256                  # [1..2**26] features
K: int | tuple[int, ...] = 8  # [1..] active features per token; batchtopk: on average. Several
                              # values here, of SPARSITY_COEFFICIENT or SEED: an autoencoder for
                              # each combination, from one reading of the data
N_EPOCHS: int | None = None   # [1..] at most, see PATIENCE; none = by tokens and BATCH_SIZE: 30
                              # in the demo, at most 100
LEARNING_RATE: float | None = None  # (0..1e38] of Adam, at first; none = by M, BATCH_SIZE and the
                              # model's width, 0.004 in the demo

# Sparsity:
MATRYOSHKA_PREFIXES: str | tuple[int, ...] | None = "auto"  # lengths of nested prefixes of features
                                    # (arXiv 2503.17547), rising, the last = M; auto: M / 4 and M
                                    # for topk, batchtopk and aligned; none = no prefixes
SPARSITY_COEFFICIENT: float | tuple[float, ...] | None = None  # [0..1e38] weight of the penalty on
                                    # active features. standard, gated: of their L1, none = 5;
                                    # jumprelu: of (L0 - K) squared * 2 / K, none = 6; the others
                                    # have none
AUX_K: int | None = None            # [0..] dead features that try to explain what is left over;
                                    # none = 2 K, 0 = off
DEAD_AFTER_TOKENS: int | None = None  # [1..] training tokens without firing until a feature is
                                      # dead; none = by M, K, BATCH_SIZE
RESAMPLE_EVERY: int | None = None   # [1..] steps between fresh starts of dead features at badly
                                    # reconstructed tokens; none = never

# Optimiser:
PATIENCE: int = 5                   # [1..] epochs without a better validation loss (topk:
                                    # normalised MSE) before stopping
BATCH_SIZE: int = 512               # [2..] tokens per step
SELECT_DTYPE: str = "float32"       # {float32, bfloat16} bfloat16 picks the top K from a coarser
                                    # product: faster, their values stay float32
LR_SCHEDULE: str = "linear"         # {constant, linear, cosine} how LEARNING_RATE falls to 0 over
                                    # all steps
WARMUP_STEPS: int = 0               # [0..] steps over which it and SPARSITY_COEFFICIENT rise first
INIT_FROM: str | None = None        # autoencoder to go on from: a .pt, a folder of SAELens,
                                    # sparsify, ..., or saelens:RELEASE/ID; none = random

# Data:
NORMALIZE_ACTIVATIONS: str = "auto"  # {auto, none, mean, norm, both} mean: to 0; norm: mean length
                                     # to sqrt(d); auto: norm, for topk none
VALIDATION_FRACTION: float = 0.1     # (0..0.99] part of the examples (not of the tokens) that
                                     # chooses the best epoch
TEST_FRACTION: float = 0.1           # [0..0.98] part of the examples that decides nothing and gives
                                     # the reported figures; 0 = none
USE_TOKENS: str = "all"              # {all, all+prefix, content, assistant} all: but those that the
                                     # chat template puts before every example; all+prefix: these
                                     # too; content: not the template's; assistant: its own text
MAX_NORM_RATIO: float | None = 10.0  # (1..] leave out attention sinks: norms above this many times
                                     # the median; none = keep

# Output:
EXPORT: tuple[str, ...] | None = None  # {saelens, sparsify, dictionary_learning} also write folders
                                       # for these; works for a trained one too; none = no
LOGGER: str = "none"                   # {none, tensorboard, wandb} where the figures of each epoch
                                       # go as well
# fmt: on

# What decides an autoencoder, in the order in which it is recorded; SEED and INIT_SEED besides.
DECISIVE = (
    "ARCHITECTURE", "M", "K", "USE_MATRYOSHKA", "MATRYOSHKA_PREFIXES", "USE_BATCH_TOPK",
    "L1_COEFFICIENT", "JUMPRELU_LOSS", "L0_COEFFICIENT", "JUMPRELU_BANDWIDTH",
    "SPARSITY_WARMUP_STEPS", "NORMALIZE_ACTIVATIONS", "AUX_K", "AUX_COEF", "DEAD_AFTER_TOKENS",
    "RESAMPLE_EVERY", "N_EPOCHS", "PATIENCE", "BATCH_SIZE", "LEARNING_RATE", "LR_SCHEDULE",
    "LR_DECAY_FRACTION", "LR_WARMUP_STEPS", "INIT_DIRECTIONS", "INIT_CENTRE",
    "INIT_ENCODER_SCALE", "BUFFER_TOKENS", "CLIP_GRAD", "VALIDATION_FRACTION", "TEST_FRACTION",
    "MAX_TRAIN_TOKENS", "USE_TOKENS", "EXCLUDE_SHARED_PREFIX", "MAX_NORM_RATIO", "SELECT_DTYPE",
)  # fmt: skip


def main():
    settings = config.resolve(__file__)
    started = progress.start(quiet=settings.QUIET)
    settings.show()
    progress.step("waiting for the activations")
    source, parts = stream.opened(
        settings.activations_path, settings.STREAM_BYTES, stage.pipeline()
    )
    require_named_dataset(settings, source)

    progress.step("looking at what is there")
    # torch takes seconds to load, so only after the settings
    from fastsae.training.plans import make_plans

    plans = make_plans(settings, source, DECISIVE)
    if parts is not None:
        storage.claim(parts.trainer_lock, "--output-dir")
    storage.claim(settings.run_dir, "--run-name")
    todo = [
        plan
        for plan in plans
        if not artifacts.matches(plan.path, plan.metadata, artifacts.read_checkpoint_metadata)
    ]
    storage.require_writable(plan.path.with_suffix(".resume.jsonl") for plan in todo)

    wanted = {plan.path.name: plan.metadata["fingerprint"] for plan in plans}
    command = shlex.join(["python", *sys.argv])
    is_first = ranks.current().rank == 0
    if parts is not None and is_first:
        parts.join(wanted, command, todo=bool(todo), run=stage.pipeline())
    failed = train_all(todo, source, parts, settings) if todo else {}
    if parts is not None and is_first and todo:
        parts.end(wanted, command)
    trained = [plan for plan in plans if plan.path not in failed]
    if trained and is_first:
        if todo:  # not sooner: until a run has ended, the files of an earlier one stand together
            artifacts.write_settings(settings.run_dir / "metrics.json", settings)
        from fastsae.training import results

        metas = results.write_beside(trained, settings, several=len(plans) > 1)
        results.print_summary(trained[0], metas, started, "written" if todo else "unchanged")
    if failed:
        raise InputError(*failed.values())


def require_named_dataset(settings, source):
    """The run's folder has the name of a dataset unless RUN_NAME is set: refuse activations of
    another one."""
    if settings.ACTIVATIONS_PATH is not None:
        return
    named, used = settings.DATASET_PATH, source["dataset_path"]
    names = [config.run_name_of(path) for path in (named, used)]
    if named.startswith("hf:"):  # whose revision is pinned in the metadata only
        names = [name.partition("@")[0] for name in names]
    if settings.RUN_NAME is None and names[0] != names[1]:
        raise InputError(
            f"DATASET_PATH: {settings.activations_path} was made from {Path(used).name}, not from "
            f"{Path(named).name}. give --dataset-path {used}, or a name for the run with "
            "--run-name."
        )


def train_all(plans, source, parts, settings):
    """Open the activations of stage 1, say what is in them, and train the plans; of a stream they
    are the sample, and `parts` train.

    Returns {path: what to say} of those that came to no number.
    """
    from fastsae.lm.devices import choose_device
    from fastsae.lm.names import described
    from fastsae.runtime import distributed
    from fastsae.training.data import Tokens, print_split
    from fastsae.training.loop import train
    from fastsae.training.stream_loop import train_on_stream

    if source.get("foreign"):
        about = f"{source['n_examples']:,} rows of {source['d_model']:,} numbers"
    else:
        about = (
            f"{described(source['model_name'])}, layer {source['settings']['LAYER_IDX']}, "
            f"{source['n_examples']:,} examples"
        )
    print(f"activations: {about} of {source['dataset_path']}")
    progress.step("reading the activations")
    device = choose_device(settings.DEVICE)
    device = "cpu" if device == "mps" else device  # which has no sparse products
    require_memory(settings.M, source.get("d_model", 0), len(plans), device)
    distributed.start(device)
    if distributed.together():
        require_several_can(settings)
    tokens = Tokens(
        settings.activations_path,
        validation_fraction=settings.VALIDATION_FRACTION,
        test_fraction=settings.TEST_FRACTION,
        seed=settings.SEED,
        use=settings.USE_TOKENS,
        exclude_shared_prefix=settings.EXCLUDE_SHARED_PREFIX,
        max_norm_ratio=settings.MAX_NORM_RATIO,
        max_train_tokens=settings.MAX_TRAIN_TOKENS if parts is None else None,
    )
    if tokens.fingerprint != source["fingerprint"]:
        raise EnvironmentFailure(
            f"{settings.activations_path}: was replaced while this run began. run again."
        )
    print_split(
        tokens,
        settings.activations_path,
        settings.USE_TOKENS,
        settings.TEST_FRACTION,
        trained=None if parts is None else parts.in_words(),
    )
    if parts is not None:
        return train_on_stream(plans, tokens, parts, settings, device)
    return train(plans, tokens, settings, device)


def require_several_can(settings):
    """InputError for what works in one process only."""
    if settings.RESAMPLE_EVERY:
        raise InputError(
            "RESAMPLE_EVERY: looks at one process's tokens only. leave it out under torchrun, or "
            "train without torchrun."
        )


if __name__ == "__main__":
    end(run_stage(main))
