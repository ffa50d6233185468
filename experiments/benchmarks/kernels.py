"""What can be known of the kernels of training without a GPU.

    pip install triton                                     # for `registers` only
    python -m experiments.benchmarks.kernels --part registers
    python -m experiments.benchmarks.kernels --part waits
    python -m experiments.benchmarks.kernels --part candidates --output-dir .

`registers` compiles each kernel for an H100 (sm_90), at the shapes of large models: registers a
thread, bytes spilled to memory, shared memory, loads by width in bits. One that spills is an error.
`waits` counts, on the pretended device of the tests, how often the host waits in a step, and the
calls that go to the device; a kernel is one call. `candidates` takes a run's autoencoder and asks
of how many tokens the K largest features of the float32 product are not all among the candidates,
the largest of the bfloat16 product. Writes experiments/results/kernels.json, one part at a time.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from experiments.shared.provenance import PROJECT, RESULTS, environment, write_result

CAPABILITY = 90  # of an H100
D = (1024, 2048, 4096, 8192)
SELECTED = ((16_384, 48), (65_536, 48), (65_536, 96), (131_072, 96))  # M, candidates
AUX = (8192, 64)
PARTS = ("registers", "waits", "candidates")
FACTORS = (1, 1.25, 1.5, 2)  # candidates a needed feature


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--output-dir", type=Path, default=PROJECT, help="of the run, candidates")
    args = parser.parse_args()
    path = RESULTS / "kernels.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result = {part: result.get(part) for part in PARTS}
    result[args.part] = {
        "registers": registers,
        "waits": waits,
        "candidates": lambda: candidates(args.output_dir),
    }[args.part]()
    print(json.dumps(result[args.part], indent=1))
    write_result("kernels", {}, result)
    spilled = [
        each["kernel"]
        for each in (result["registers"] or {}).get("kernels", ())
        if each["spilled_bytes"]
    ]
    if spilled:
        sys.exit(f"error: {', '.join(spilled)} spill registers")


def registers(d_values=D, selected=SELECTED):
    """What each kernel uses of the device."""
    import triton

    return {
        "capability": CAPABILITY,
        "triton": triton.__version__,
        "kernels": [usage(*each) for each in compiled(d_values, selected)],
    }


def compiled(d_values, selected):
    """(name, kernel, {argument: type}, {constant: value}, warps) of everything to compile."""
    import triton

    from fastsae.sae import kernels

    for d in d_values:
        width = min(kernels.SLICE, triton.next_power_of_2(d))
        for levels in (1, 2, 5):
            sizes = {"L": levels, "D": width, "U": kernels.AT_ONCE}
            yield f"errors d={d} levels={levels}", kernels._errors, FLOATS, sizes, width // 256
        sizes = kernels._whole_row(d)
        warps = sizes.pop("num_warps")
        for name in ("_dots", "_segments", "_weight_gradients"):
            yield f"{name[1:]} d={d}", getattr(kernels, name), FLOATS, sizes, warps
    for kind, shapes in (("bf16", selected), ("fp32", (AUX,))):
        for m, k in shapes:
            sizes = kernels._groups(m, k)
            warps = sizes.pop("num_warps")
            types = {**FLOATS, "pre": f"*{kind}"}
            yield f"largest {kind} M={m} k={k}", kernels._largest, types, sizes, warps
    sizes = dict(kernels.BLOCK)
    warps = sizes.pop("num_warps")
    yield "products_of", kernels._products_of, FLOATS, sizes, warps


# the types of arguments; all others are float32 matrices
FLOATS = {
    **dict.fromkeys(("d", "m", "k", "n", "size", "n_main", "segment", "n_features"), "i32"),
    **dict.fromkeys(
        ("first", "last", "column", "columns", "n_columns", "feature", "parts"), "*i32"
    ),
    **dict.fromkeys(("pointers", "row", "gradient_row", "part_fired"), "*i32"),
    "to_fired": "*i1",
}


def usage(name, kernel, types, constants, warps):
    """What one compiled kernel uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = [each for each in kernel.arg_names if each not in constants]
    signature = {each: types.get(each, "*fp32") for each in arguments}
    if "largest" in name:
        signature["out"] = "*i32"
    # as Triton compiles at a call: aligned pointers, d and M divisible by 16
    aligned = [
        i
        for i, each in enumerate(kernel.arg_names)
        if each in signature and (signature[each][0] == "*" or each in ("d", "m"))
    ]
    source = ASTSource(
        fn=kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    built = triton.compile(
        source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": max(1, warps)}
    )
    resources, assembly = dumped(triton, built.asm["cubin"])
    return {
        "kernel": name,
        "warps": max(1, warps),
        "registers": number(r"REG:(\d+)", resources),
        "spilled_bytes": number(r"LOCAL:(\d+)", resources)
        + 4 * len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        "shared_bytes": built.metadata.shared,
        "loads_by_bits": dict(
            sorted(Counter(map(bits, re.findall(r"\bLDG(?:STS)?\.(\S+)", assembly))).items())
        ),
        "atomics": len(re.findall(r"\b(?:ATOMG?|RED)\b", assembly)),
    }


def bits(modifiers):
    """The width of a load from its modifiers, `E.128.CONSTANT`."""
    found = re.search(r"\b[US]?(128|64|16|8)\b", modifiers)
    return int(found[1]) if found else 32


def number(pattern, text):
    """The number that a pattern finds, which must be there."""
    found = re.search(pattern, text)
    assert found, pattern
    return int(found[1])


def dumped(triton, cubin):
    """(resources, assembly) of a binary, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )


def waits():
    """What the tests' own script counts in a step of each kind."""
    script = PROJECT / "tests" / "support" / "step_waits.py"
    done = subprocess.run(
        [sys.executable, script], env=environment(), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def candidates(folder):
    """Of how many tokens of the run in `folder` one of the K features is not among so many
    candidates."""
    import numpy as np
    import torch

    from fastsae.formats.load import load_sae
    from fastsae.runtime import artifacts
    from fastsae.sae.kernel_step import n_candidates

    (metrics,) = (folder / "checkpoints").glob("*/metrics.json")
    sae, meta = load_sae(metrics.parent / json.loads(metrics.read_text())["checkpoint"])
    data = artifacts.read_npz(
        next((folder / "activations").glob("activations_layer*.npz")),
        made_by="extract_activations.py",
    )
    n_tokens = len(data["activations"])
    k = sae.k_active_neurons
    in_a_step = n_candidates(k)
    exact = dict.fromkeys(sorted({*(round(factor * k) for factor in FACTORS), in_a_step}), 0)
    weight, bias = sae.encoder.weight.detach(), sae.neuron_bias.detach()
    for rows in np.array_split(np.arange(n_tokens), -(-n_tokens // 4096)):
        x = torch.from_numpy(data["activations"][rows]).float() - sae.input_bias.detach()
        best = torch.addmm(bias, x, weight.t()).topk(k, dim=1).indices
        coarse = torch.addmm(bias.bfloat16(), x.bfloat16(), weight.bfloat16().t()).float()
        for n in exact:
            among = torch.zeros(coarse.shape, dtype=torch.bool)
            among.scatter_(1, coarse.topk(n, dim=1).indices, True)
            exact[n] += int(among.gather(1, best).all(1).sum())
    return {
        "model": meta["activations"]["model_name"],
        "M": sae.m_total_neurons,
        "K": k,
        "n_tokens": n_tokens,
        "candidates_in_a_step": in_a_step,
        "tokens_with_another_choice": {str(n): n_tokens - found for n, found in exact.items()},
    }


if __name__ == "__main__":
    main()
