"""A stage as one of several processes on the pretended device: `python pretended_rank.py SCRIPT
FLAGS`. Gloo takes NCCL's part, for the numbers lie on the CPU."""

import importlib
import sys
from pathlib import Path

import hypothesaes.sae  # noqa: F401  (looks for CUDA when it loads)
import torch.distributed as dist
import transformers  # noqa: F401
from pretended_cuda import pretended

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main():
    """Run the stage; its exit code is this process's."""
    from fastsae.runtime.stage import end, run_stage

    start = dist.init_process_group
    dist.init_process_group = lambda backend, **options: start("gloo", **options)
    script = sys.argv.pop(1)
    with pretended() as machine:
        code = run_stage(importlib.import_module(script).main)
        print(f"on cuda:{machine.current} of {machine.visible}, {machine.launches} launches")
    end(code)


if __name__ == "__main__":
    main()
