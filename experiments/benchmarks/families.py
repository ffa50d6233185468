"""What is read of every model family beside what transformers gives: tiny models with random
weights, batches and the shared prefix, lengths from 1 to 600, the first, a middle and the last
layer; and the logit lens beside the model's own logits.

    python -m experiments.benchmarks.families      # a minute on two cores

Writes experiments/results/families.json and the table in docs/models.md.
"""

import json
import tempfile
from typing import Any

import torch

from experiments.shared import families
from experiments.shared.families import FAMILIES
from experiments.shared.provenance import PROJECT, RESULTS, write_result
from fastsae.lm import places, residual
from fastsae.lm.decoders import decoder_stack
from fastsae.lm.hub import quiet_transformers

RESULT = RESULTS / "families.json"
PAGE = PROJECT / "docs" / "models.md"
LAYERS = (1, 2, 4)
LENGTHS = {"alone": [1, 3, 40, 257, 600], "with a prefix": [9, 30, 55, 600]}


def main() -> None:
    quiet_transformers()
    rows = {}
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measured(family, folder)
        print(f"{name}: {rows[name]['largest_error']:.1e}", flush=True)
    settings = {"layers": LAYERS, "lengths": LENGTHS, "dtype": "float32"}
    write_result("families", settings, {"families": rows})
    page = PAGE.read_text(encoding="utf-8")
    begin, end = page.index("| family |"), page.index("<!-- end of families -->")
    PAGE.write_text(f"{page[:begin]}{table()}{page[end:]}", encoding="utf-8")


def measured(family: families.Family, folder: str) -> dict[str, Any]:
    """The row of one family."""
    model = families.build(family, folder)
    fast = residual.ResidualModel(folder, LAYERS, dtype=torch.float32)
    alone = families.compare(model, fast, family, LENGTHS["alone"], 0)
    shared = families.compare(model, fast, family, LENGTHS["with a prefix"], families.N_SHARED)
    lens = families.lens_error(model, folder)
    return {
        "models": family.models,
        "class": type(model).__name__,
        "blocks": fast.stack.path,
        "reuses": shared.n_prefix > 0,
        "kernels": families.uses_kernels(fast),
        "lens": lens is not None,
        "lens_error": lens,
        "places": sorted(places.places_in(decoder_stack(model), 1)),
        "largest_error": max(alone.largest_error, shared.largest_error),
    }


def table() -> str:
    """The families as Markdown."""
    lines = [
        "| family | for example | blocks | prefix once | packed products | lens | parts "
        "| difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in json.loads(RESULT.read_text())["families"].items():
        flags = ("yes" if row[key] else "no" for key in ("reuses", "kernels", "lens"))
        parts = {3: "all", 2: "no `resid_mid`", 0: "none"}[len(row["places"])]
        lines.append(
            f"| {name} | {row['models']} | `{row['blocks']}` | {' | '.join(flags)} "
            f"| {parts} | {row['largest_error']:.0e} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
