"""Everything that changes while an autoencoder trains, so that a run can be written down at any
step and go on from there."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastsae.runtime import artifacts, distributed
from fastsae.runtime.errors import EnvironmentFailure
from fastsae.sae import Autoencoder
from fastsae.sae.autoencoder import inference_form, new_sae
from fastsae.sae.initialisation import initialise
from fastsae.sae.metrics import IN_ALL, evaluate
from fastsae.sae.normalisation import choose_normalisation
from fastsae.training.adam import Adam
from fastsae.training.data import Tokens
from fastsae.training.dead_features import considered


class TrainingRun:
    """An autoencoder with its optimizer, counters, history and best weights so far.

    `epoch` counts from 1 and `batch` is the number of batches done in it, `tokens_since_fired` (M,)
    counts tokens. The data order is a function of seed and epoch alone, so these place a run
    exactly. `start` goes to `initialise`.
    """

    def __init__(
        self,
        config: dict[str, Any],
        sample: torch.Tensor,
        *,
        seed: int,
        device: str | torch.device,
        learning_rate: float,
        normalise: str = "none",
        **start: Any,
    ) -> None:
        self.sae, sample = new_sae(config, device).eval(), sample.to(device)
        # a function of the sample, so it needs no saving
        self.normalisation = choose_normalisation(normalise, sample)
        initialise(self.sae, self.normalisation(sample), seed, **start)
        self.optimizer = Adam(self.sae.parameters(), learning_rate)
        self.tokens_since_fired = torch.zeros(
            config["m_total_neurons"], dtype=torch.long, device=device
        )
        self.loss_sum = torch.zeros((), device=device)  # over the tokens of this epoch
        self.epoch, self.batch, self.trained_tokens, self.seconds = 1, 0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        self.best_state: dict[str, torch.Tensor] | None = None
        self.of_stream: dict[str, Any] = {}  # what a stream adds to the state (stream_loop.py)
        self._since = time.perf_counter()

    def step(
        self,
        fill_gradients: Callable[..., tuple[torch.Tensor, ...]],
        x: torch.Tensor,
        *,
        learning_rate: float,
        dead_after: int,
        clip_grad: float | None,
    ) -> None:
        """One step on the batch x (B, d): `fill_gradients(sae, x, dead) -> (loss, fired)`, Adam,
        decoder rows kept at length 1.

        A feature is dead to it that has not fired for `dead_after` tokens; see `considered` for how
        many. A third value that `fill_gradients` returns is the squared norm of the gradients, and
        says that the decoder's only turns its directions already.
        """
        dead = considered(
            self.tokens_since_fired >= dead_after, self.epoch + self.batch, self.sae.aux_k or 0
        )
        loss, fired, *squared_norm = fill_gradients(self.sae, self.normalisation(x), dead)
        n_tokens = len(x)
        if distributed.together():
            squared_norm = []  # of this process's part only
            loss, fired = distributed.total(loss), distributed.anywhere(fired)
            n_tokens = int(distributed.total(torch.tensor([n_tokens])))
            for parameter in self.sae.parameters():
                distributed.total(parameter.grad)
        self.tokens_since_fired = torch.where(fired, 0, self.tokens_since_fired + n_tokens)
        if not squared_norm:
            self.sae.adjust_decoder_gradient_()  # keep only what turns the decoder's directions
        divisor = None
        if clip_grad is not None:  # as clip_grad_norm_ has it, in the pass of Adam
            norm = squared_norm[0].sqrt() if squared_norm else gradient_norm(self.sae)
            divisor = ((norm + 1e-6) / clip_grad).clamp_min(1.0)
        self.optimizer.learning_rate = learning_rate
        self.optimizer.step(divisor)
        self.sae.normalize_decoder_()
        self.loss_sum += loss * n_tokens
        self.trained_tokens += n_tokens
        self.batch += 1

    def result(self) -> Autoencoder:
        """The autoencoder in the form in which it is measured and saved: it takes activations as
        they are."""
        return inference_form(self.sae, self.normalisation)

    def best(self) -> Autoencoder:
        """The same of the weights that were best on validation; the run itself stays as it is."""
        sae = copy.deepcopy(self.sae)
        sae.load_state_dict(self.best_state)
        return inference_form(sae, self.normalisation)

    def elapsed(self) -> float:
        """Seconds of training, those before an interruption included."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        return self.seconds

    def end_epoch(self, line: dict[str, Any] | None) -> None:
        """Append the epoch's line to the history and keep the weights if they are the best on
        validation. Without a line (after most rounds of a stream) just go on to the next."""
        if line is not None:
            self.history.append(line)
            if best_epoch(self.history) == len(self.history):
                self.best_epoch = len(self.history)
                self.best_state = {
                    name: value.clone() for name, value in self.sae.state_dict().items()
                }
            self.loss_sum.zero_()
        self.epoch, self.batch = self.epoch + 1, 0

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the whole state; it takes the place of the one before when it is complete. Rank 0
        writes for all: theirs are equal."""
        if distributed.world()[0]:
            return
        plain = {
            name: getattr(self, name)
            for name in ("epoch", "batch", "trained_tokens", "history", "best_epoch", "of_stream")
        }
        artifacts.write_checkpoint(
            path,
            {
                "fingerprint": fingerprint,
                "plain": {**plain, "seconds": self.elapsed()},
                "sae": _contiguous(self.sae.state_dict()),
                "best_state": self.best_state and _contiguous(self.best_state),
                "optimizer": self.optimizer.state_dict(),
                "tokens_since_fired": self.tokens_since_fired,
                "loss_sum": self.loss_sum,
            },
            keep_old=False,
        )

    def resume(self, path: Path, fingerprint: str) -> bool:
        """Take over the state saved at `path` if it is of the same run; True if it was.

        Says so; also where the state is damaged, or of a run with other settings, whose place this
        run's state will take.
        """
        if not path.exists():
            return False
        try:
            state = artifacts.read_checkpoint(path)
            of_this_run = state["fingerprint"] == fingerprint
        except (EnvironmentFailure, KeyError, TypeError) as error:
            print(f"not continued: {error}")
            return False
        if not of_this_run:
            print(
                f"warning: {path} is of an unfinished run with other settings, and this run's "
                "state will take its place. stop now and move it away to keep it."
            )
            return False
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.loss_sum.copy_(state["loss_sum"])
        for name, value in state["plain"].items():
            setattr(self, name, value)
        self.best_state = state["best_state"] and {
            name: value.to(self.loss_sum.device) for name, value in state["best_state"].items()
        }
        self._since = time.perf_counter()
        print(f"going on in epoch {self.epoch}, after {self.trained_tokens:,} tokens")
        return True


@torch.no_grad()
def gradient_norm(sae: Autoencoder) -> torch.Tensor:
    """The length of all gradients together, 0-d."""
    gradients = [parameter.grad for parameter in sae.parameters()]
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))


def best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """The first epoch with the least validation loss (normalised MSE for the TopK family, whose
    number of features is given).

    Without the penalty in it, the best epoch of the others would be an early one that is hardly
    sparse.
    """
    return 1 + min(
        range(len(history)),
        key=lambda i: history[i].get("validation_loss", history[i]["normalized_mse"]),
    )


def final_metrics(
    sae: Autoencoder, tokens: Tokens, history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What metrics.json says, less the timing.

    The figures are of the test part, which decided nothing, on the tokens that training would use;
    `validation` gives the same of the part that chose the epoch. Without a test part they are
    of validation. `measured_on` says which. `with_prefix_and_sinks` is on all tokens of that part.
    """

    def measured(rows):
        return evaluate(sae, tokens.activations, rows, tokens.example, tokens.special)

    validation = measured(tokens.validation)
    metrics = measured(tokens.test) if tokens.has_test else dict(validation)
    everything = measured(tokens.all_test if tokens.has_test else tokens.all_validation)
    best = best_epoch(history)
    for figures in (metrics, validation):
        figures.pop("n_tokens")
    return {
        "measured_on": "test" if tokens.has_test else "validation",
        **metrics,
        "dead_fraction_training": history[best - 1]["dead_fraction_training"],
        "n_train_tokens": tokens.n_trained,
        "n_validation_tokens": len(tokens.validation),
        "n_test_tokens": len(tokens.test) if tokens.has_test else 0,
        "epochs": len(history),
        "best_epoch": best,
        "n_excluded_shared_prefix": tokens.n_prefix,
        "n_excluded_sinks": tokens.n_sinks,
        "max_norm": tokens.max_norm,
        "validation": validation,
        "with_prefix_and_sinks": {name: everything[name] for name in IN_ALL},
    }


def _contiguous(state):
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def learning_rate_factor(
    step: int, *, n_steps: int, warmup_steps: int, schedule: str, decay_fraction: float
) -> float:
    """What multiplies the learning rate at `step` (from 0) of `n_steps`: a linear warm-up, then
    constant, linear or cosine decay.

    The decay takes the last `decay_fraction` of all steps and ends near 0.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "constant":
        return warmup
    left = min(1.0, (n_steps - step) / (decay_fraction * n_steps))
    return warmup * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))
