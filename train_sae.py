"""Stage 2: train a sparse autoencoder on the tokens of stage 1 (HypotheSAEs' TopK / BatchTopK / Matryoshka objective).

    python train_sae.py --m 512 --k 8 --matryoshka-prefixes 64,512
    python train_sae.py --seeds 0,1,2 --k-list 4,8,16          # nine autoencoders from one reading of the data

Reads `activations/activations_layer{LAYER_IDX}.npz`. Writes `checkpoints/<run>/SAE_....pt` (which `hypothesaes.sae.load_model`
reads), `metrics.json` with the final figures, `metrics.jsonl` with one line per epoch, `training.png` with their curves,
`README.md`, a model card, and with EXPORT folders for other libraries; while it trains, `SAE_....resume.jsonl` with a line per epoch
and `SAE_....resume.pt`, from which the same command goes on after an interruption and ends in the same bytes. Activations
beyond BUFFER_TOKENS stay on the disk.
"""
from fastsae.runtime import early_stop
from fastsae.settings import startup

if __name__ == "__main__":
    early_stop.listen()  # before anything else is loaded
    startup.explain_slips()  # of config.py, which is imported below

import itertools
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import config
from fastsae.activations.files import read_metadata
from fastsae.data.token_masks import TEST, VALIDATION
from fastsae.runtime import artifacts, progress, storage
from fastsae.runtime.errors import EnvironmentFailure, InputError, Terminated
from fastsae.runtime.stage import end, run_stage
from fastsae.runtime.stops import deferred_stop, stop, stop_asked
from fastsae.training.limits import no_finite_loss, require_memory

ARCHITECTURE: str = "topk"                         # topk, batchtopk, standard (ReLU and L1), jumprelu or gated
M: int = 256                                       # features
K: int = 8                                         # active features per token
USE_MATRYOSHKA: bool | None = None                 # nested prefixes of features (arXiv 2503.17547); none = on for topk and batchtopk
MATRYOSHKA_PREFIXES: tuple[int, ...] | None = None  # lengths of the prefixes, rising, the last = M; none = M / 4 and M
USE_BATCH_TOPK: bool | None = None                 # K active features per token on average over a batch; none = as ARCHITECTURE says
L1_COEFFICIENT: float = 5.0                        # standard and gated: weight of the sum of a token's features
JUMPRELU_LOSS: str = "target"                      # target: (L0 - K) squared * 2 / K; step: L0 itself
L0_COEFFICIENT: float = 6.0                        # jumprelu: weight of that
JUMPRELU_BANDWIDTH: float = 1.0                    # width around its threshold in which a pre-activation moves the threshold
SPARSITY_WARMUP_STEPS: int = 0                     # steps over which L1_COEFFICIENT and L0_COEFFICIENT rise from 0
NORMALIZE_ACTIVATIONS: str = "auto"                # none, mean (to 0), norm (mean length to sqrt(d)), both; auto: norm, for topk none
AUX_K: int | None = None                           # dead features that try to explain what is left over; none = 2 K, 0 = off
AUX_COEF: float = 0.03125                          # weight of that loss
DEAD_AFTER_TOKENS: int | None = None               # training tokens without firing until a feature is dead; none = by M, K, BATCH_SIZE
RESAMPLE_EVERY: int | None = None                  # steps between fresh starts of dead features at badly reconstructed tokens; none = never
N_EPOCHS: int = 100                                # at most; see PATIENCE
PATIENCE: int = 5                                  # epochs without a better validation loss (topk: normalised MSE) before stopping
BATCH_SIZE: int = 512                              # tokens per step
LEARNING_RATE: float = 5e-4                        # of Adam
LR_SCHEDULE: str = "constant"                      # constant, linear or cosine: how it falls over the last LR_DECAY_FRACTION of the steps
LR_DECAY_FRACTION: float = 0.2                     # part of N_EPOCHS over which the learning rate falls
LR_WARMUP_STEPS: int = 0                           # steps over which it rises first
INIT_DIRECTIONS: str = "mixed"                     # decoder rows at the start: xavier, kaiming, orthogonal, data, mixed (leaning to tokens)
INIT_CENTRE: str = "median"                        # b_dec at the start: median, mean or geometric_median of a sample
INIT_ENCODER_SCALE: float | None = None            # encoder rows at the start / decoder rows; none = by least squares; HypotheSAEs: 1
BUFFER_TOKENS: int = 1_000_000                     # kept in memory; beyond, they are mixed in a buffer of that size as they are read
CLIP_GRAD: float | None = 1.0                      # bound of the gradient's norm; none = no bound
VALIDATION_FRACTION: float = 0.1                   # part of the examples (not of the tokens) that chooses the best epoch
TEST_FRACTION: float = 0.1                         # part of the examples that decides nothing and gives the reported figures; 0 = none
MAX_TRAIN_TOKENS: int | None = None                # train on the first so many tokens only, in the order of the file; none = all
USE_TOKENS: str = "all"                            # all; content: not the chat template's; assistant: the assistant's own text
EXCLUDE_SHARED_PREFIX: bool = True                 # leave out the tokens that the chat template puts before every example
MAX_NORM_RATIO: float | None = 10.0                # leave out attention sinks: norms above this many times the median; none = keep
ENGINE: str = "sparse"                             # sparse: from the active features only; reference: HypotheSAEs' dense code
SELECT_DTYPE: str = "float32"                      # bfloat16 picks the top K from a coarser product: faster, their values stay float32
SEEDS: tuple[int, ...] | None = None               # several autoencoders from one reading of the data, by the seed of their first weights
K_LIST: tuple[int, ...] | None = None              # the same for several K ...
L1_COEFFICIENT_LIST: tuple[float, ...] | None = None  # ... and for several L1_COEFFICIENT; all combinations are trained
INIT_FROM: str | None = None                       # autoencoder to go on from: a .pt, or a folder of SAELens, sparsify, ...; none = random
EXPORT: tuple[str, ...] | None = None              # also write folders for saelens, sparsify; works for a trained one too; none = no
SAVE_EVERY: float = 60.0                           # seconds between saves of an unfinished run, the most that a kill loses
LOGGER: str = "none"                               # none, tensorboard or wandb: where the figures of each epoch go as well

NOT_DECISIVE = ("ENGINE", "SAVE_EVERY", "LOGGER", "SEEDS", "K_LIST", "L1_COEFFICIENT_LIST", "EXPORT", "INIT_FROM")
INIT_SAMPLE = 32768  # tokens from which centre, directions, encoder scale and normalisation start


def main():
    settings = config.resolve(__file__)
    started = progress.start(quiet=settings.QUIET)
    settings.show()
    source = read_metadata(settings.activations_path)
    require_named_dataset(settings, source)
    from fastsae.runtime import distributed  # after the settings: loading torch takes seconds
    from fastsae.sae.metrics import measured_on
    from fastsae.training import monitoring

    progress.step("looking at what is there")
    plans = make_plans(settings, source)
    storage.claim(settings.run_dir, "--run-name")
    todo = [each for each in plans if not artifacts.matches(each.path, each.metadata, artifacts.read_checkpoint_metadata)]
    storage.require_writable(each.path.with_suffix(".resume.jsonl") for each in todo)
    failed = train_all(todo, source, settings) if todo else {}
    plans = [each for each in plans if each.path not in failed]
    if plans and distributed.world()[0] == 0:
        metas = {each.path: artifacts.read_checkpoint_metadata(each.path) for each in plans}  # once: reading checks every byte
        for each in plans:
            monitoring.write_beside(each.path, metas[each.path], each.beside)
        if len(plans) + len(failed) > 1:
            monitoring.write_if_different(settings.run_dir / "metrics.json", json.loads(plans[0].beside("metrics.json").read_text()))
            print(f"stage 3 reads {plans[0].path.name}, the first of {len(plans)}")
        hand_over(metas, settings)
        metrics = metas[plans[0].path]["metrics"]
        progress.summary("train_sae", plans[0].path, started, status="written" if todo else "unchanged", n_autoencoders=len(plans),
                         measured_on=measured_on(metrics),
                         **{name: metrics[name] for name in ("normalized_mse", "l0", "dead_fraction", "epochs")})
    if failed:
        raise InputError(*failed.values())


def require_named_dataset(settings, source):
    """The run's folder has the name of a dataset unless RUN_NAME is set: refuse activations of another one."""
    named, used = settings.DATASET_PATH, source["dataset_path"]
    of_hub = named.startswith("hf:")  # whose revision is pinned in the metadata only
    names = [config.run_name_of(path).partition("@")[0] if of_hub else config.run_name_of(path) for path in (named, used)]
    if settings.RUN_NAME is None and names[0] != names[1]:
        raise InputError(f"DATASET_PATH: {settings.activations_path} was made from {Path(used).name}, not from {Path(named).name}. give "
                         f"--dataset-path {used}, or a name for the run with --run-name.")


def hand_over(metas, settings):
    """What others need of the autoencoders {path: metadata}: folders for other libraries, and the model card."""
    from fastsae.formats.export import bring_up_to_date
    from fastsae.formats.model_card import write_card

    for path in metas:
        bring_up_to_date(path, settings.EXPORT or ())
    write_card(settings.run_dir, metas)


def train_all(plans, source, settings):
    """Open the activations of stage 1, say what is in them, and train; returns as `train`."""
    from fastsae.lm.devices import choose_device
    from fastsae.lm.names import described
    from fastsae.runtime import distributed
    from fastsae.training.data import Tokens

    print(f"activations: {described(source['model_name'])}, layer {source['settings']['LAYER_IDX']}, {source['n_examples']:,} examples of "
          f"{source['dataset_path']}")
    progress.step("reading the activations")
    device = choose_device(settings.DEVICE)
    device = "cpu" if device == "mps" else device  # which has no sparse products
    require_memory(settings.M, source.get("d_model", 0), len(plans), device)
    distributed.start(device)
    for name, refused in (("RESAMPLE_EVERY", settings.RESAMPLE_EVERY), ("ENGINE", settings.ENGINE == "reference")):
        if refused and distributed.together():
            raise InputError(f"{name}: looks at one process's tokens only. leave it out under torchrun, or train without torchrun.")
    tokens = Tokens(settings.activations_path, validation_fraction=settings.VALIDATION_FRACTION, test_fraction=settings.TEST_FRACTION,
                    seed=settings.SEED, use=settings.USE_TOKENS, exclude_shared_prefix=settings.EXCLUDE_SHARED_PREFIX,
                    max_norm_ratio=settings.MAX_NORM_RATIO, max_train_tokens=settings.MAX_TRAIN_TOKENS)
    if tokens.fingerprint != source["fingerprint"]:
        raise EnvironmentFailure(f"{settings.activations_path}: was replaced while this run began. run again.")
    print_split(tokens, settings)
    return train(plans, tokens, settings, device)


def print_split(tokens, settings):
    """Which tokens are for what, and which are left out."""
    filtered = f", {tokens.n_filtered:,} tokens that are not {settings.USE_TOKENS}" if tokens.n_filtered else ""
    print(f"training on {len(tokens.train):,} tokens; validating on {len(tokens.validation):,} of {len(tokens.examples_of(VALIDATION))} "
          f"other examples, testing on {len(tokens.test):,} of {len(tokens.examples_of(TEST))}; left out: {tokens.n_prefix:,} of the "
          f"shared prefix, {tokens.n_sinks:,} attention sinks{filtered}")
    if settings.TEST_FRACTION and not tokens.has_test:
        print(f"warning: {settings.activations_path} has too few different texts for a test part of TEST_FRACTION "
              f"{settings.TEST_FRACTION}: the figures are of the validation examples, which also choose the best epoch.")


class Plan(NamedTuple):
    """One autoencoder to train: its own settings, where it goes, its metadata, whether the pass trains others too."""
    settings: config.Settings
    path: Path
    metadata: dict
    start: Path | None  # what INIT_FROM stands for here
    several: bool

    def beside(self, name):
        """The path of metrics.json and the like: that of the run, or the checkpoint's own where a pass trains several."""
        return self.path.with_suffix(f".{name}") if self.several else self.path.with_name(name)


def make_plans(settings, source):
    """A Plan for each of SEEDS x K_LIST x L1_COEFFICIENT_LIST, or the one that the settings without lists describe."""
    from fastsae.formats.load import content_sha256, start_of
    from fastsae.sae.autoencoder import checkpoint_name
    from fastsae.training.dead_features import tokens_until_dead

    own = [name for name, file in settings.owner.items() if file == "train_sae.py" and name not in NOT_DECISIVE]
    plans = []
    for seed, k, l1 in itertools.product(settings.SEEDS or [settings.SEED], settings.K_LIST or [settings.K],
                                         settings.L1_COEFFICIENT_LIST or [settings.L1_COEFFICIENT]):
        dead_after = settings.DEAD_AFTER_TOKENS or tokens_until_dead(settings.M, k, settings.BATCH_SIZE)
        one = settings.replace(K=k, L1_COEFFICIENT=l1, DEAD_AFTER_TOKENS=dead_after)
        name = checkpoint_name(one.M, k, list(one.MATRYOSHKA_PREFIXES) if one.USE_MATRYOSHKA else None, one.ARCHITECTURE)
        l1_name = f"_L1={l1:g}" if float(f"{l1:g}") == l1 else f"_L1={l1!r}"
        name = name.removesuffix(".pt") + l1_name * bool(settings.L1_COEFFICIENT_LIST) + f"_seed={seed}" * bool(settings.SEEDS)
        path = settings.run_dir / f"{name}.pt"
        start = start_of(settings.INIT_FROM, path)
        inputs = {"activations": source["fingerprint"], **({"init_from": content_sha256(start)} if start else {})}
        metadata = artifacts.new_metadata("sae", {**one.select([*own, "SEED"]), "INIT_SEED": seed}, inputs, activations=source)
        plans.append((one, path, metadata, start))
    return [Plan(*each, several=len(plans) > 1) for each in plans]


def train(plans, tokens, settings, device):
    """Train all `plans` from one reading of the data; each is written as soon as it is finished.

    Returns {path: what to say} of those that came to no number.
    """
    from fastsae.runtime import distributed
    from fastsae.training.data import TrainingRows

    sample = tokens.rows(np.sort(np.random.default_rng(settings.SEED).permutation(tokens.train)[:INIT_SAMPLE]))  # (n, d)
    runs, failed = [start_run(each, tokens, sample, device) for each in plans], {}
    distributed.wait_for_all()  # until all have read the states that rank 0 may soon remove
    data = TrainingRows(tokens.activations, tokens.train, batch_size=settings.BATCH_SIZE, buffer_tokens=settings.BUFFER_TOKENS,
                        seed=settings.SEED)
    n_batches = data.n_batches()
    last_save, stopping = time.monotonic(), False
    bar = progress.bar(settings.N_EPOCHS, "training", "epoch", at_most=True, initial=min(run.epoch for run in runs) - 1)
    with deferred_stop(), bar:
        try:
            while runs := write_finished(runs, tokens, device):
                epoch, first = min((run.epoch, run.batch) for run in runs)  # where the one that is furthest behind goes on
                for batch, x in enumerate(data.batches(epoch, first), first):  # (batch, d)
                    x = x.to(device)
                    for run in runs:
                        if (run.epoch, run.batch) == (epoch, batch):
                            one_step(run, x, (epoch - 1) * n_batches + batch, n_batches)
                    bar.part((batch + 1) / n_batches)
                    if stopping := distributed.anywhere(stop_asked()):
                        stop()
                    if time.monotonic() - last_save > settings.SAVE_EVERY:
                        save(runs)
                        last_save = time.monotonic()
                for run in [run for run in runs if run.epoch == epoch]:
                    try:
                        run.log(end_epoch(run, tokens))
                    except InputError as error:  # the others go on
                        runs.remove(run)
                        failed[run.plan.path] = str(error)
                bar.update()
                if runs:
                    bar.set_postfix({name: f"{runs[0].history[-1][name]:.4g}" for name in
                                     ("loss", "normalized_mse", "dead_fraction_training")})
        except (KeyboardInterrupt, Terminated):
            if stopping or stop_asked():  # between steps, or while measuring, which changes nothing of the runs
                save(runs)
            raise
    return failed


def write_finished(runs, tokens, device):
    """Write the runs whose training is over; returns the others."""
    for run in runs:
        if is_over(run):
            finish(run, tokens, device)
    return [run for run in runs if not is_over(run)]


def save(runs):
    for run in runs:
        run.save(run.state_path, run.plan.metadata["fingerprint"])


def start_run(plan, tokens, sample, device):
    """The TrainingRun of a plan at its start, which looks at a sample of the tokens, or where an earlier process left it."""
    from fastsae.training import fine_tuning, objective
    from fastsae.training.monitoring import of_other_settings, open_logger
    from fastsae.training.run import TrainingRun

    settings = plan.settings
    run = TrainingRun(objective.sae_config(tokens.activations.shape[1], settings.values), sample, seed=plan.metadata["settings"]["INIT_SEED"],
                      device=device, learning_rate=settings.LEARNING_RATE, normalise=objective.normalisation(settings.values),
                      directions=settings.INIT_DIRECTIONS, centre=settings.INIT_CENTRE, encoder_scale=settings.INIT_ENCODER_SCALE)
    if plan.start:
        fine_tuning.begin(run, plan.start, plan.metadata["inputs"]["init_from"], settings.activations_path,
                          plan.metadata["activations"], tokens.examples_of(TEST))
    run.plan, run.state_path = plan, plan.path.with_suffix(".resume.pt")
    run.log = open_logger(settings.LOGGER, settings.run_dir, plan.path.stem, settings.values)
    if run.restore(run.state_path, plan.metadata["fingerprint"]):
        print(f"going on in epoch {run.epoch}, after {run.trained_tokens:,} tokens")
    elif of_other_settings(run.state_path, plan.metadata["fingerprint"]):
        print(f"warning: {run.state_path} is of an unfinished run with other settings, and this run's state will take its place. stop "
              "now and move it away to keep it.")
    return run


def one_step(run, x, n_done, n_batches):
    """One step of `run` on the batch x, after `n_done` others; an epoch has `n_batches`."""
    from fastsae.training.objective import step_function
    from fastsae.training.resampling import resample
    from fastsae.training.run import learning_rate_factor

    settings = run.plan.settings
    factor = learning_rate_factor(n_done, n_steps=settings.N_EPOCHS * n_batches, schedule=settings.LR_SCHEDULE,
                                  warmup_steps=settings.LR_WARMUP_STEPS, decay_fraction=settings.LR_DECAY_FRACTION)
    run.step(step_function(settings.values, n_done), x, learning_rate=settings.LEARNING_RATE * factor,
             dead_after=settings.DEAD_AFTER_TOKENS, clip_grad=settings.CLIP_GRAD)
    if settings.RESAMPLE_EVERY and (n_done + 1) % settings.RESAMPLE_EVERY == 0:
        resample(run, x, dead_after=settings.DEAD_AFTER_TOKENS, seed=settings.SEED + n_done)


def is_over(run):
    return run.epoch > run.plan.settings.N_EPOCHS or run.epoch - (run.best_epoch or run.epoch) > run.plan.settings.PATIENCE


def finish(run, tokens, device):
    """Write the best weights on validation, their figures (of the test part) and curves."""
    from fastsae.runtime import distributed
    from fastsae.sae.autoencoder import save_sae
    from fastsae.training.monitoring import write_beside
    from fastsae.training.run import final_metrics

    seconds = run.elapsed()
    timing = {"seconds": round(seconds, 2), "device": device}
    if not run.plan.several:  # else these are the seconds of the whole pass
        timing["tokens_per_second"] = round(run.trained_tokens / seconds, 1)
    if distributed.world()[0]:
        return
    plan, sae = run.plan, run.best()
    metrics = final_metrics(sae, tokens, run.history)
    history = json.loads(json.dumps(run.history))  # the same objects, hence bytes, whether the run was interrupted or not
    save_sae(plan.path, sae, {**plan.metadata, "max_norm": tokens.max_norm, "metrics": metrics,
                              "history": history, "validation_examples": tokens.examples_of(VALIDATION),
                              "test_examples": tokens.examples_of(TEST)})
    artifacts.write_json(plan.beside("metrics.json"), {"checkpoint": plan.path.name, **metrics, **timing})
    write_beside(plan.path, {**plan.metadata, "metrics": metrics, "history": history}, plan.beside)
    print_results(metrics, timing, plan.settings)
    print(f"wrote {plan.path}")


def end_epoch(run, tokens):
    """Measure on validation, note it down, keep the best weights; an epoch without a finite loss ends the run. Returns its line."""
    from fastsae.runtime import distributed
    from fastsae.training import monitoring

    line = distributed.from_rank_0(lambda: epoch_line(run, tokens, run.plan.settings))
    if not math.isfinite(line["loss"] + line["normalized_mse"]):
        settings, of = run.plan.settings, run.plan.path.name if run.plan.several else ""
        raise no_finite_loss(settings.values, settings.defaults, run.epoch, of)
    run.end_epoch(line)
    if distributed.world()[0] == 0:
        # not metrics.jsonl: until this run has ended, an earlier one's files stand together
        artifacts.write_text(run.plan.path.with_suffix(".resume.jsonl"), monitoring.lines_of(run.history))
    return line


def epoch_line(run, tokens, settings):
    """What metrics.jsonl says of an epoch."""
    from fastsae.sae.dense_step import validation_loss
    from fastsae.sae.metrics import evaluate
    from fastsae.training import objective

    result = evaluate(run.result(), tokens.activations, tokens.validation, tokens.example, tokens.special)
    line = {"epoch": run.epoch, "loss": float(run.loss_sum) / len(tokens.train), "normalized_mse": result["normalized_mse"],
            "prefix_normalized_mse": result["prefix_normalized_mse"], "l0": result["l0"],
            "dead_fraction_training": float((run.tokens_since_fired >= settings.DEAD_AFTER_TOKENS).double().mean())}
    if not objective.about(settings.values).picks_k:
        blocks = (run.normalisation(tokens.rows(rows).to(run.loss_sum.device)) for rows in
                  np.array_split(tokens.validation, -(-len(tokens.validation) // 4096)))
        line["validation_loss"] = validation_loss(run.sae, blocks, **objective.penalty(settings.values))
    return line


def print_results(metrics, timing, settings):
    from fastsae.formats.load import target_k

    print(f"epochs: {metrics['epochs']}, best {metrics['best_epoch']}; {timing['seconds']} s"
          + (f", {timing['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in timing else "") + f" ({timing['device']})")
    prefixes = ", ".join(f"{end} features {value:.3f}" for end, value in metrics["prefix_normalized_mse"].items())
    print(f"{metrics['measured_on']}: normalised MSE {metrics['normalized_mse']:.4f} ({prefixes}), L0 {metrics['l0']:.2f}, "
          f"dead {100 * metrics['dead_fraction']:.1f} %, MSE {metrics['mse']:.4g}"
          + (f"; validation: normalised MSE {metrics['validation']['normalized_mse']:.4f}" if metrics["measured_on"] == "test" else ""))
    if metrics["normalized_mse"] >= 1:
        print("warning: normalised MSE is not below 1: worse than the mean activation. train longer, or raise --k or --m.")
    if target_k(settings.values) and abs(metrics["l0"] - settings.K) > 0.25 * settings.K:
        print(f"warning: L0 {metrics['l0']:.2f} is not near K = {settings.K}. with BatchTopK or JumpReLU train longer; else lower --k.")
    if metrics["dead_fraction"] > 0.05:
        print("warning: over 5 % of the features are dead. lower --m, raise --aux-k, or give more data.")


if __name__ == "__main__":
    end(run_stage(main))
