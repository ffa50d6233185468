"""Stage 2: train a sparse autoencoder on the tokens of stage 1 (HypotheSAEs' TopK / BatchTopK / Matryoshka objective).

    python train_sae.py --m 512 --k 8 --matryoshka-prefixes 64,512

Reads `activations/activations_layer{LAYER_IDX}.npz`. Writes `checkpoints/<run>/SAE_....pt` (which `hypothesaes.sae.load_model`
reads), `metrics.json` with the final figures, and `metrics.jsonl` with one line per epoch. The activations must fit in memory.
"""
import json
import math
import sys
import time

import numpy as np

import config
from fastsae import artifacts
from fastsae.errors import InputError, run_stage

M: int = 256                                       # features
K: int = 8                                         # active features per token
USE_MATRYOSHKA: bool = True                        # nested prefixes of features, coarse to fine (arXiv 2503.17547)
MATRYOSHKA_PREFIXES: tuple[int, ...] = (64, 256)   # lengths of the prefixes, rising, the last = M
USE_BATCH_TOPK: bool = False                       # K active features per token on average over a batch, not in each token
AUX_K: int | None = None                           # dead features that try to explain what is left over; none = 2 K, 0 = off
AUX_COEF: float = 0.03125                          # weight of that loss
DEAD_AFTER_STEPS: int = 256                        # steps without firing after which a feature counts as dead
N_EPOCHS: int = 100                                # at most; see PATIENCE
PATIENCE: int = 5                                  # epochs without a better validation normalised MSE before stopping
BATCH_SIZE: int = 512                              # tokens per step
LEARNING_RATE: float = 5e-4                        # of Adam
CLIP_GRAD: float | None = 1.0                      # bound of the gradient's norm; none = no bound
VALIDATION_FRACTION: float = 0.1                   # part of the examples (not of the tokens) kept for validation
EXCLUDE_SHARED_PREFIX: bool = True                 # leave out the tokens that the chat template puts before every example
MAX_NORM_RATIO: float | None = 10.0                # leave out attention sinks: norms above this many times the median; none = keep
ENGINE: str = "sparse"                             # sparse: from the active features only; reference: HypotheSAEs' dense code

NOT_DECISIVE = ("ENGINE",)
INIT_SAMPLE = 32768  # tokens whose median initialises b_dec


def main():
    settings = config.resolve(__file__)
    settings.show()
    source = artifacts.read_npz_metadata(settings.activations_path)
    prefixes = list(settings.MATRYOSHKA_PREFIXES) if settings.USE_MATRYOSHKA else None
    own = [name for name, file in settings.owner.items() if file == "train_sae.py" and name not in NOT_DECISIVE]
    metadata = artifacts.new_metadata("sae", settings.select([*own, "SEED"]), {"activations": source["fingerprint"]}, activations=source)

    from fastsae.autoencoder import checkpoint_name  # after the settings: loading torch takes seconds

    path = settings.run_dir / checkpoint_name(settings.M, settings.K, prefixes)
    metrics_path = settings.run_dir / "metrics.json"
    if artifacts.matches(path, metadata, artifacts.read_checkpoint_metadata):
        point_to(metrics_path, path)
        return

    print(f"activations: {source['model_name']}, layer {source['settings']['LAYER_IDX']}, {source['n_examples']:,} examples of "
          f"{source['dataset_path']}")
    tokens = Tokens(settings)
    print(f"training on {len(tokens.train):,} tokens, validating on {len(tokens.validation):,} of {int(tokens.is_validation.sum())} other "
          f"examples; left out: {tokens.n_prefix:,} of the shared prefix, {tokens.n_sinks:,} attention sinks")
    sae, history, timing = train(tokens, prefixes, settings)
    metrics = final_metrics(sae, tokens, history)
    metadata.update(max_norm=tokens.max_norm, validation_examples=np.flatnonzero(tokens.is_validation).tolist(), metrics=metrics)

    from fastsae.autoencoder import save_sae

    save_sae(path, sae, metadata)
    artifacts.write_json(metrics_path, {"checkpoint": path.name, **metrics, **timing})
    report(metrics, timing, settings)
    print(f"wrote {path}")


class Tokens:
    """The activations of stage 1 and which of their rows train and validate."""

    def __init__(self, settings):
        import torch

        from fastsae.tokens import split_examples, token_norms, usable_tokens

        data = artifacts.read_npz(settings.activations_path, made_by="extract_activations.py")
        lengths, kind = data["seq_lengths"], data["token_kind"]
        norms = token_norms(data["activations"])
        if not np.isfinite(norms).all():
            raise InputError(f"{settings.activations_path}: token {int(np.argmin(np.isfinite(norms)))} holds NaN or infinity. "
                             "delete the file and run extract_activations.py with --dtype float32.")
        usable, self.max_norm = usable_tokens(norms, kind, exclude_shared_prefix=settings.EXCLUDE_SHARED_PREFIX,
                                              max_norm_ratio=settings.MAX_NORM_RATIO)
        in_prefix, _ = usable_tokens(norms, kind, exclude_shared_prefix=settings.EXCLUDE_SHARED_PREFIX, max_norm_ratio=None)
        self.n_prefix, self.n_sinks = int((~in_prefix).sum()), int((in_prefix & ~usable).sum())
        self.activations = torch.from_numpy(data["activations"])              # (n_tokens, d)
        self.example = np.repeat(np.arange(len(lengths)), lengths)            # (n_tokens,)
        self.special = kind != 0                                              # (n_tokens,) written by the chat template
        self.is_validation = split_examples(len(lengths), settings.VALIDATION_FRACTION, settings.SEED)
        for_validation = self.is_validation[self.example]
        self.train, self.validation = np.flatnonzero(usable & ~for_validation), np.flatnonzero(usable & for_validation)
        self.all_validation = np.flatnonzero(for_validation)
        if len(self.train) < 2 or len(self.validation) < 2:
            raise InputError(f"VALIDATION_FRACTION: {len(self.train)} tokens are left for training and {len(self.validation)} for "
                             "validation. give more examples, or longer ones.")


def train(tokens, prefixes, settings):
    """(the best autoencoder on validation, one dict per epoch, timing)."""
    import torch
    from tqdm import tqdm

    from fastsae.autoencoder import initialise, new_sae, reference_step
    from fastsae.language_model import choose_device
    from fastsae.metrics import evaluate
    from fastsae.sparse_step import sparse_step

    device = choose_device(settings.DEVICE)
    step = reference_step if settings.ENGINE == "reference" or device == "mps" else sparse_step  # mps has no sparse products
    sae = new_sae({"input_dim": tokens.activations.shape[1], "m_total_neurons": settings.M, "k_active_neurons": settings.K,
                   "aux_k": 2 * settings.K if settings.AUX_K is None else settings.AUX_K, "prefix_lengths": prefixes,
                   "dead_neuron_threshold_steps": settings.DEAD_AFTER_STEPS, "use_batch_topk": settings.USE_BATCH_TOPK}, device).eval()
    sample = np.random.default_rng(settings.SEED).permutation(tokens.train)[:INIT_SAMPLE]
    initialise(sae, tokens.activations[np.sort(sample)].float().to(device), settings.SEED)
    optimizer = torch.optim.Adam(sae.parameters(), lr=settings.LEARNING_RATE, fused=device != "mps")
    steps_since_fired = torch.zeros(settings.M, dtype=torch.long, device=device)

    history, best = [], None
    started, trained = time.perf_counter(), 0
    with tqdm(total=settings.N_EPOCHS, unit="epoch", desc="training", mininterval=1, disable=None) as bar:
        for epoch in range(1, settings.N_EPOCHS + 1):
            loss_sum = torch.zeros((), device=device)
            for rows in epoch_batches(tokens.train, settings.BATCH_SIZE, settings.SEED, epoch):
                x = tokens.activations[rows].to(device).float()  # (batch, d)
                loss, fired = step(sae, x, steps_since_fired > settings.DEAD_AFTER_STEPS, aux_coef=settings.AUX_COEF)
                steps_since_fired = torch.where(fired, 0, steps_since_fired + 1)
                sae.adjust_decoder_gradient_()  # keep only what turns the decoder's directions: their length stays 1
                if settings.CLIP_GRAD is not None:
                    torch.nn.utils.clip_grad_norm_(sae.parameters(), settings.CLIP_GRAD)
                optimizer.step()
                sae.normalize_decoder_()
                loss_sum += loss * len(rows)
                trained += len(rows)
            result = evaluate(sae, tokens.activations, tokens.validation, tokens.example, tokens.special)
            history.append({"epoch": epoch, "loss": float(loss_sum) / len(tokens.train), "normalized_mse": result["normalized_mse"],
                            "l0": result["l0"], "dead_fraction": float((steps_since_fired > settings.DEAD_AFTER_STEPS).double().mean())})
            if not math.isfinite(history[-1]["loss"] + result["normalized_mse"]):
                raise InputError(f"LEARNING_RATE: the loss is no number after epoch {epoch}. lower --learning-rate.")
            artifacts.write_text(settings.run_dir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
            bar.update()
            bar.set_postfix({name: f"{history[-1][name]:.4g}" for name in ("loss", "normalized_mse", "dead_fraction")})
            if best is None or result["normalized_mse"] < history[best["epoch"] - 1]["normalized_mse"]:
                best = {"epoch": epoch, "state": {name: value.clone() for name, value in sae.state_dict().items()}}
            elif epoch - best["epoch"] >= settings.PATIENCE:
                break
    seconds = time.perf_counter() - started
    sae.load_state_dict(best["state"])
    timing = {"seconds": round(seconds, 2), "tokens_per_second": round(trained / seconds, 1), "device": device}
    return sae, history, timing


def epoch_batches(rows, batch_size, seed, epoch):
    """The rows in an order that only (seed, epoch) decides, cut into batches; a last row left alone joins the batch before."""
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    ends = list(range(batch_size, len(order), batch_size)) + [len(order)]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:  # one row has no variance to normalise its loss by
        del ends[-2]
    return np.split(order, ends[:-1])


def final_metrics(sae, tokens, history):
    """What metrics.json says, less the timing: on the validation tokens used, and on all of them, prefix and sinks included."""
    from fastsae.metrics import evaluate

    metrics = evaluate(sae, tokens.activations, tokens.validation, tokens.example, tokens.special)
    n_validation = metrics.pop("n_tokens")
    everything = evaluate(sae, tokens.activations, tokens.all_validation, tokens.example, tokens.special)
    best_epoch = min(history, key=lambda line: line["normalized_mse"])["epoch"]
    return {**metrics, "dead_fraction_training": history[best_epoch - 1]["dead_fraction"],
            "n_train_tokens": len(tokens.train), "n_validation_tokens": n_validation, "epochs": len(history), "best_epoch": best_epoch,
            "n_excluded_shared_prefix": tokens.n_prefix, "n_excluded_sinks": tokens.n_sinks, "max_norm": tokens.max_norm,
            "with_prefix_and_sinks": {name: everything[name] for name in
                                      ("mse", "normalized_mse", "explained_variance", "l0", "mse_special_tokens", "n_tokens")}}


def report(metrics, timing, settings):
    print(f"epochs: {metrics['epochs']}, best {metrics['best_epoch']}; {timing['seconds']} s, {timing['tokens_per_second']:,.0f} tokens/s "
          f"({timing['device']})")
    prefixes = ", ".join(f"{end} features {value:.3f}" for end, value in metrics["prefix_normalized_mse"].items())
    print(f"validation: normalised MSE {metrics['normalized_mse']:.4f} ({prefixes}), L0 {metrics['l0']:.2f}, "
          f"dead {100 * metrics['dead_fraction']:.1f} %, MSE {metrics['mse']:.4g}")
    if metrics["normalized_mse"] >= 1:
        print("warning: normalised MSE is not below 1: worse than the mean activation. train longer, or raise --k or --m.")
    if abs(metrics["l0"] - settings.K) > 0.25 * settings.K:
        print(f"warning: L0 {metrics['l0']:.2f} is not near K = {settings.K}. with BatchTopK train longer; else lower --k.")
    if metrics["dead_fraction"] > 0.05:
        print("warning: over 5 % of the features are dead. lower --m, raise --aux-k, or give more data.")


def point_to(metrics_path, path):
    """Let metrics.json speak of the checkpoint at `path` (the one that stage 3 reads) if it speaks of another one."""
    try:
        named = json.loads(metrics_path.read_text()).get("checkpoint")
    except (OSError, ValueError, AttributeError):
        named = None
    if named != path.name:
        metrics = artifacts.read_checkpoint_metadata(path)["metrics"]
        artifacts.write_json(metrics_path, {"checkpoint": path.name, **metrics})


if __name__ == "__main__":
    sys.exit(run_stage(main))
