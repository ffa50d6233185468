"""A step of training in one of several processes: `python parallel_steps.py BATCH OUT`, with the
environment that torchrun would set."""

import os
import sys
from unittest import mock

import kernel_twins
import torch

from fastsae.runtime import distributed as parallel
from fastsae.sae import kernel_step
from fastsae.sae.dense_step import dense_step
from fastsae.sae.sparse_step import sparse_step
from fastsae.training.run import TrainingRun


def steps(batch, out):
    """One step of each variant with this process's share of a batch: gradients, losses, counters of
    all processes together, saved by the first."""
    x, configs = torch.load(batch)
    found = {}
    for variant, config in configs.items():
        run = TrainingRun(config, x, seed=0, device="cpu", learning_rate=1e-3)
        run.tokens_since_fired[::3] = 1000
        rows, dead = x[parallel.share(len(x))], run.tokens_since_fired > 10
        if variant in ("jumprelu", "gated"):
            loss, fired = dense_step(run.sae, rows, dead, sparsity=0.1, bandwidth=0.5, target_l0=4)
        elif variant.startswith("kernels"):
            with mock.patch.object(kernel_step, "kernels", kernel_twins.launched):
                loss, fired, _ = kernel_step.kernel_step(run.sae, rows, dead, aux_coef=0.3)
        else:
            loss, fired = sparse_step(run.sae, rows, dead, aux_coef=0.3)
        found[variant] = {n: parallel.total(p.grad).clone() for n, p in run.sae.named_parameters()}
        found[variant] |= {
            "loss": parallel.total(loss),
            "fired": parallel.anywhere(fired),
            "threshold of the step": run.sae.threshold.detach(),
        }
    if parallel.world()[0] == 0:
        torch.save(found, out)


if __name__ == "__main__":
    parallel.start("cpu")
    steps(*sys.argv[1:])
    os._exit(0)  # see the end of train_sae.py
