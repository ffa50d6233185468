"""How often the host waits in a training step, counted on the pretended device: a script that
prints JSON, `python step_waits.py`."""

import functools
import json
import sys

import hypothesaes.sae  # noqa: F401  (looks for CUDA when it loads)
import kernel_twins
import torch
from pretended_cuda import pretended

from fastsae.sae import kernel_step
from fastsae.sae.sparse_step import sparse_step
from fastsae.training.run import TrainingRun

STEPS = 3  # that are counted, after one that warms up
SHAPE = {"input_dim": 12, "m_total_neurons": 64, "k_active_neurons": 4, "aux_k": 8}
VARIANTS = {
    "topk": {},
    "topk, prefixes": {"prefix_lengths": [16, 64]},
    "batchtopk": {"architecture": "batchtopk"},
    "batchtopk, prefixes": {"architecture": "batchtopk", "prefix_lengths": [16, 64]},
}


def counted(step, options, dead_after):
    """Host waits and calls to the device in one step of training, and the lines that wait; a kernel
    is one call."""
    with pretended() as machine:
        kernel_step.kernels = functools.partial(kernel_twins.launched, machine)
        x = torch.randn(40, SHAPE["input_dim"]).to("cuda")
        run = TrainingRun({**SHAPE, **options}, x, seed=0, device="cuda", learning_rate=0.01)
        for i in range(1 + STEPS):
            if i == 1:
                machine.waits.clear()
                machine.launches = 0
            run.step(
                functools.partial(step, aux_coef=0.1),
                x,
                learning_rate=0.01,
                dead_after=dead_after,
                clip_grad=1.0,
            )
        return {
            "waits_a_step": round(sum(machine.waits.values()) / STEPS, 2),
            "calls_a_step": round(machine.launches / STEPS),
            "where": sorted({f"{line} {name}" for line, name in machine.waits}),
        }


def main():
    """{variant: {step: what is counted}}, where no feature is dead and where some are."""
    found = {
        f"{variant}, {some}": {
            step.__name__: counted(step, options, dead_after)
            for step in (sparse_step, kernel_step.kernel_step)
        }
        for variant, options in VARIANTS.items()
        for dead_after, some in ((10**9, "none dead"), (10, "some dead"))
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
