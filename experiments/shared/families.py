"""Model families as tiny models with random weights, and how far what is read of them lies from
what transformers itself gives.

`FAMILIES` is what docs/models.md lists, what tests/lm/test_families.py tries, and what
experiments/benchmarks/families.py measures. A family stands for a class of transformers with the
options that change how it computes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fastsae.activations import extraction
from fastsae.data.tokenization import CONTENT, TEMPLATE, TokenTable, mark_shared_prefix
from fastsae.interpretation.unembedding import form_of, load_unembedding, sized
from fastsae.lm import cpu_kernels, residual
from fastsae.lm.decoders import decoder_stack

N_BLOCKS = 4
VOCABULARY = 512
N_SHARED = 8  # tokens of the prefix that examples share
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 2,
}
# what a configuration calls the range that logits are squeezed into
CAPS = ("final_logit_softcapping", "logits_soft_cap")
# of configurations that count heads in another way
NO_HEAD_DIM = ("head_dim", "num_key_value_heads")


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, and what is known of it.

    `without`: names of SIZES that its configuration does not take. `reuses`: whether a prefix that
    examples share runs once. `shift`: how far the index in hidden_states lies below the layer, 1
    where transformers leaves the embedding out.
    """

    config: str
    models: str  # well-known ones, for the table
    options: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    reuses: bool = True
    shift: int = 0
    gain: float = 3  # of the matrices' start values


MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

FAMILIES = {
    "Llama": Family("LlamaConfig", "Llama 2 and 3, SmolLM2, TinyLlama, Vicuna"),
    "Llama 4": Family("Llama4TextConfig", "Llama 4", {**EXPERTS, "num_local_experts": 4}),
    "Mistral": Family("MistralConfig", "Mistral 7B", {"sliding_window": 12}),
    "Mixtral": Family("MixtralConfig", "Mixtral", {"num_local_experts": 4}),
    "Ministral": Family(
        "MinistralConfig", "Ministral", {"sliding_window": 12, "layer_types": MIXED["layer_types"]}
    ),
    "Qwen 2": Family("Qwen2Config", "Qwen 1.5, 2 and 2.5"),
    "Qwen 2 MoE": Family(
        "Qwen2MoeConfig", "Qwen1.5-MoE", {**EXPERTS, "shared_expert_intermediate_size": 32}
    ),
    "Qwen 3": Family("Qwen3Config", "Qwen 3"),
    "Qwen 3 MoE": Family("Qwen3MoeConfig", "Qwen3-30B-A3B", EXPERTS),
    "Qwen 3 Next": Family(
        "Qwen3NextConfig",
        "Qwen3-Next",
        {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 32},
        reuses=False,
    ),
    "Qwen 3.5": Family("Qwen3_5TextConfig", "Qwen 3.5", DELTA, reuses=False),
    "Gemma": Family("GemmaConfig", "Gemma"),
    "Gemma 2": Family("Gemma2Config", "Gemma 2", {"sliding_window": 12}),
    "Gemma 3": Family("Gemma3TextConfig", "Gemma 3", {**MIXED, "sliding_window": 12}),
    "VaultGemma": Family("VaultGemmaConfig", "VaultGemma", {**MIXED, "sliding_window": 12}),
    "RecurrentGemma": Family(
        "RecurrentGemmaConfig",
        "RecurrentGemma",
        {"block_types": ["recurrent", "attention"], "lru_width": 32},
        reuses=False,
    ),
    "GPT-2": Family("GPT2Config", "GPT-2, DialoGPT", without=NO_HEAD_DIM),
    "GPT-BigCode": Family("GPTBigCodeConfig", "StarCoder", without=NO_HEAD_DIM),
    "GPT-Neo": Family(
        "GPTNeoConfig",
        "GPT-Neo",
        {"attention_types": [[["global", "local"], 2]], "window_size": 12},
        without=NO_HEAD_DIM,
    ),
    "GPT-NeoX": Family("GPTNeoXConfig", "Pythia, GPT-NeoX, Dolly", without=NO_HEAD_DIM),
    "GPT-NeoX, in sequence": Family(
        "GPTNeoXConfig", "RedPajama-INCITE", {"use_parallel_residual": False}, without=NO_HEAD_DIM
    ),
    "GPT-J": Family("GPTJConfig", "GPT-J", {"rotary_dim": 4}, without=NO_HEAD_DIM),
    "CodeGen": Family("CodeGenConfig", "CodeGen", {"rotary_dim": 4}, without=NO_HEAD_DIM),
    "GPT-OSS": Family("GptOssConfig", "gpt-oss", {"num_local_experts": 4, "sliding_window": 12}),
    "GPT-1": Family("OpenAIGPTConfig", "GPT (2018)", without=NO_HEAD_DIM, reuses=False),
    "OPT": Family(
        "OPTConfig", "OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}, without=NO_HEAD_DIM
    ),
    "OPT, norm after": Family(
        "OPTConfig",
        "OPT-350M",
        {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        without=NO_HEAD_DIM,
    ),
    "BLOOM": Family("BloomConfig", "BLOOM, BLOOMZ", without=NO_HEAD_DIM),
    "MPT": Family("MptConfig", "MPT", {"max_seq_len": 1024}, without=NO_HEAD_DIM),
    "Falcon": Family("FalconConfig", "Falcon 7B", without=NO_HEAD_DIM),
    "Falcon, new decoder": Family(
        "FalconConfig",
        "Falcon 40B",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        without=NO_HEAD_DIM,
    ),
    "Falcon, ALiBi": Family(
        "FalconConfig",
        "Falcon-RW",
        {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
        without=NO_HEAD_DIM,
    ),
    "Phi": Family("PhiConfig", "Phi 1, 1.5 and 2", without=NO_HEAD_DIM),
    "Phi 3": Family("Phi3Config", "Phi 3 and 4", without=NO_HEAD_DIM),
    "Phi MoE": Family("PhimoeConfig", "Phi-3.5-MoE", {"num_local_experts": 4}),
    "StarCoder 2": Family("Starcoder2Config", "StarCoder 2", without=NO_HEAD_DIM),
    "StableLM": Family("StableLmConfig", "StableLM 2", without=("head_dim",)),
    "Persimmon": Family("PersimmonConfig", "Persimmon", without=NO_HEAD_DIM),
    "Nemotron": Family("NemotronConfig", "Minitron, Nemotron-4"),
    "OLMo": Family("OlmoConfig", "OLMo", without=NO_HEAD_DIM),
    "OLMo 2": Family("Olmo2Config", "OLMo 2", without=NO_HEAD_DIM),
    "OLMo 3": Family(
        "Olmo3Config",
        "OLMo 3",
        {"sliding_window": 12, "layer_types": MIXED["layer_types"]},
        without=NO_HEAD_DIM,
    ),
    "OLMoE": Family("OlmoeConfig", "OLMoE", EXPERTS, without=NO_HEAD_DIM),
    "Cohere": Family("CohereConfig", "Command R, Aya 23", {"logit_scale": 0.25}),
    "Cohere 2": Family(
        "Cohere2Config",
        "Command R7B, Aya Expanse",
        {"sliding_window": 12, "layer_types": MIXED["layer_types"]},
    ),
    "Granite": Family(
        "GraniteConfig",
        "Granite 3",
        {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    ),
    "Granite MoE": Family(
        "GraniteMoeConfig", "Granite 3 MoE", {"num_local_experts": 4, "logits_scaling": 4.0}
    ),
    "GLM 4": Family("Glm4Config", "GLM 4"),
    "GLM": Family("GlmConfig", "GLM 4 9B"),
    "DeepSeek 2": Family("DeepseekV2Config", "DeepSeek V2", {**ROUTED, **LATENT}, ("head_dim",)),
    "DeepSeek 3": Family(
        "DeepseekV3Config", "DeepSeek V3 and R1", {**ROUTED, **LATENT}, ("head_dim",)
    ),
    "EXAONE 4": Family("Exaone4Config", "EXAONE 4"),
    "Ernie 4.5": Family("Ernie4_5Config", "Ernie 4.5"),
    "SmolLM 3": Family("SmolLM3Config", "SmolLM 3"),
    "Helium": Family("HeliumConfig", "Helium"),
    "Apertus": Family("ApertusConfig", "Apertus"),
    "MiniCPM 3": Family("MiniCPM3Config", "MiniCPM 3", LATENT),
    "Gemma 4": Family(
        "Gemma4TextConfig",
        "Gemma 4",
        {
            **MIXED,
            "sliding_window": 12,
            "num_experts": None,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "global_head_dim": 8,
        },
        gain=2,
    ),
    "Arcee": Family("ArceeConfig", "AFM"),
    "BitNet": Family("BitNetConfig", "BitNet b1.58", without=("head_dim",)),
    "FlexOLMo": Family("FlexOlmoConfig", "FlexOLMo", EXPERTS, without=("head_dim",)),
    "HyperCLOVA X": Family("HyperCLOVAXConfig", "HyperCLOVA X SEED", {"logits_scaling": 0.25}),
    "Jais 2": Family("Jais2Config", "Jais 2"),
    "JetMoE": Family(
        "JetMoeConfig",
        "JetMoE",
        {"num_local_experts": 4, "kv_channels": 8},
        without=("num_attention_heads", "head_dim"),
    ),
    "NanoChat": Family("NanoChatConfig", "NanoChat"),
    "XGLM": Family(
        "XGLMConfig",
        "XGLM",
        {"d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4},
        without=("hidden_size", "num_hidden_layers", "num_attention_heads", *NO_HEAD_DIM),
    ),
    "BioGPT": Family("BioGptConfig", "BioGPT", without=NO_HEAD_DIM),
    "CTRL": Family("CTRLConfig", "CTRL", {"dff": 64}, without=NO_HEAD_DIM),
    "Mamba": Family("MambaConfig", "Mamba", without=NO_HEAD_DIM, reuses=False, shift=1, gain=2),
    "Mamba 2": Family(
        "Mamba2Config",
        "Mamba 2",
        {"num_heads": 8, "n_groups": 2, "state_size": 16, "chunk_size": 16},
        without=("num_key_value_heads", "num_attention_heads"),
        reuses=False,
        shift=1,
    ),
    "Falcon Mamba": Family(
        "FalconMambaConfig", "Falcon Mamba", without=NO_HEAD_DIM, reuses=False, shift=1
    ),
    "RWKV": Family("RwkvConfig", "RWKV 4", without=NO_HEAD_DIM, reuses=False, shift=1),
    "Jamba": Family(
        "JambaConfig",
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8},
        without=("head_dim",),
        reuses=False,
    ),
    "Falcon H1": Family(
        "FalconH1Config",
        "Falcon H1",
        {
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_ssm": 32,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
            "lm_head_multiplier": 0.5,
        },
        reuses=False,
    ),
    "LFM 2": Family(
        "Lfm2Config", "LFM 2", {"layer_types": ["conv", "full_attention"] * 2}, ("head_dim",), False
    ),
    "MiniMax": Family(
        "MiniMaxConfig", "MiniMax 01", {"num_local_experts": 4, "block_size": 16}, reuses=False
    ),
    "Nemotron H": Family(
        "NemotronHConfig",
        "Nemotron 3 Nano",
        {
            "layers_block_type": ["mamba", "attention", "mamba", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
        without=("num_hidden_layers",),
        reuses=False,
    ),
}


def build(family: Family, folder: Path | str) -> Any:
    """A tiny model of the family, saved in `folder` and read back as a user's would be.

    Its norms and biases are far from 1 and 0, so that a part that is left out shows.
    """
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name not in family.without}
    config = getattr(transformers, family.config)(**{**sizes, **family.options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(family.gain)
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def table_of(lengths: Sequence[int], n_shared: int) -> TokenTable:
    """Examples of random tokens of these lengths, the first `n_shared` of them the same in all."""
    random = np.random.default_rng(0)
    ids = [
        np.concatenate(
            [np.arange(10, 10 + n_shared), random.integers(20, VOCABULARY, n - n_shared)]
        )
        for n in lengths
    ]
    kind = [
        np.repeat(np.array([TEMPLATE, CONTENT], np.uint8), [n_shared, n - n_shared])
        for n in lengths
    ]
    flat = np.concatenate(ids).astype(np.int32)
    return TokenTable(
        flat,
        np.concatenate(kind),
        np.zeros(len(flat), np.uint8),
        np.array(lengths, np.int32),
        np.arange(1, len(lengths) + 1, dtype=np.int32),
    )


@dataclass
class Compared:
    """What was read beside what transformers gives: the largest relative difference of a token."""

    largest_error: float
    n_prefix: int  # tokens that ran once


def compare(
    model: Any,
    fast: residual.ResidualModel,
    family: Family,
    lengths: Sequence[int],
    n_shared: int,
    states_of: Callable[[np.ndarray], Mapping[int, torch.Tensor]] | None = None,
) -> Compared:
    """Batches of padded examples, with the prefix where it is reused, against the whole model on
    each example alone, at the layers of `fast`.

    states_of: what the whole model gives for an example (length,), {layer: (1, length, d_model)};
    by default its `hidden_states`.
    """
    table = table_of(lengths, n_shared)
    forward = extraction.Forward(
        fast,
        table,
        n_shared=mark_shared_prefix(table),
        batch_tokens=max(120, *lengths),
        storage_dtype="float32",
        dataset_name="made up",
    )
    found = forward.chunk(0, len(lengths), lambda _: None)
    expected: dict[int, list[np.ndarray]] = {layer: [] for layer in fast.layers}
    for ids in np.split(table.ids, np.cumsum(table.lengths)[:-1]):
        states = states_of(ids) if states_of else hidden_states(model, ids)
        shift = 0 if states_of else family.shift
        for layer, rows in expected.items():
            rows.append(states[layer - shift][0].numpy())
    errors = [largest_error(found[layer], np.concatenate(expected[layer])) for layer in fast.layers]
    return Compared(max(errors), forward.n_prefix)


@torch.inference_mode()
def hidden_states(model: Any, ids: np.ndarray) -> tuple[torch.Tensor, ...]:
    """What transformers gives for one example (length,); the last as the module after the last
    block reads it, for transformers gives it normed."""
    decoder = decoder_stack(model)
    after = decoder.norm or getattr(decoder.module, "project_out", None)
    read: list[torch.Tensor] = []
    hook = after and after.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    try:
        states = model(
            torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True
        ).hidden_states
    finally:
        if hook:
            hook.remove()
    return (*states[:-1], read[-1] if read else states[-1])


def largest_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of a row (n, d), relative to the row."""
    difference = np.linalg.norm(found - expected, axis=1)
    return float((difference / np.linalg.norm(expected, axis=1)).max())


@torch.inference_mode()
def lens_error(model: Any, folder: Path | str) -> float | None:
    """How far the logit lens of a stream is from the model's own logits, relative to their spread;
    None for a model without a lens.

    Biases are the same for every stream, so differences from the first token's are compared.
    """
    form, matrix = form_of(model.config), load_unembedding(folder)
    if form is None or matrix is None:
        return None
    ids = np.arange(20, 40)
    stream = hidden_states(model, ids)[-1][0]
    logits = model(torch.tensor(ids[None])).logits[0].double()
    cap = next((cap for name in CAPS if (cap := getattr(model.config, name, None))), None)
    logits = cap * torch.atanh(logits / cap) if cap else logits
    found = sized(stream, centred=form.centred).double() @ matrix.t().double()
    logits, found = logits - logits[:1], found - found[:1]
    return float((logits - found).abs().max() / logits.abs().max())


def uses_kernels(fast: residual.ResidualModel) -> bool:
    """Whether oneDNN's products took the place of any module."""
    kinds = (cpu_kernels.PackedLinear, cpu_kernels.GatedMlp)
    return any(isinstance(module, kinds) for module in fast.stack.module.modules())
