"""The same mathematics, faster on x86 processors: oneDNN's matrix products with packed weights, and
attention as plain products.

PyTorch hands float32 products to MKL, which holds back on processors that are not Intel's: 209
against 487 GFLOP/s on an AMD EPYC (experiments/results/bench_extract.json). oneDNN is part of
PyTorch's CPU builds; where it is not, nothing is replaced. The operators are those that
torch.compile itself emits for a frozen model.
"""

from typing import Any

import torch
from torch import nn

from fastsae.lm.checks import equal_up_to_rounding, sample_for
from fastsae.lm.decoders import Decoder, Enough, stream_of
from fastsae.lm.mapped_weights import clean_mappings, give_back
from fastsae.runtime.machine_errors import is_out_of_memory

LONGEST_PLAIN = 512  # tokens up to which attention as plain products beats the fused kernel
ACTIVATIONS = {  # transformers' class: oneDNN's name and algorithm
    "SiLU": ("swish", ""),
    "SiLUActivation": ("swish", ""),
    "GELUTanh": ("gelu", "tanh"),
}


def quicken(stack: Decoder) -> None:
    """Replace the linear layers, gated MLPs and attention of a decoder, in place, where that
    changes no result beyond rounding.

    Blocks built alike share a trial: a sample runs through the first of them before and after, and
    they stay as they were if the stream differs.
    """
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return
    if (
        any(p.dtype == torch.bfloat16 for p in stack.layers.parameters())
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return
    ids, verdicts, mappings = sample_for(stack.config), {}, clean_mappings()
    for number, block in enumerate(stack.layers):
        weights = list(block.parameters())
        built = tuple((name, type(module)) for name, module in block.named_modules())
        if built not in verdicts:
            verdicts[built] = _tried(stack, number, ids)
        elif verdicts[built]:
            replace_products(block)
        give_back(weights, mappings)
    if stack.config._attn_implementation == "sdpa":
        _try_plain_attention(stack, ids)


def replace_products(block: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put packed products in the place of a block's MLP and linear layers; [(parent, name, what was
    there)]."""
    replaced = []

    def put(parent, name, fast):
        replaced.append((parent, name, getattr(parent, name)))
        setattr(parent, name, fast)

    for name, module in list(block.named_children()):
        if GatedMlp.fits(module) and same_result(fast := GatedMlp(module), module):
            put(block, name, fast)
    for parent in list(block.modules()):
        for name, module in list(parent.named_children()):
            if PackedLinear.fits(module):
                put(parent, name, PackedLinear(module))
    return replaced


def _tried(stack, number, ids):
    """Whether block `number` computes the same with packed products, which it keeps if so."""
    expected = _output(stack, number, ids)
    replaced = replace_products(stack.layers[number])
    if _agrees(lambda: _output(stack, number, ids), expected):
        return True
    for parent, name, module in reversed(replaced):
        setattr(parent, name, module)
    return False


def _try_plain_attention(stack, ids):
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register("plain_products", plain_attention)
    AttentionMaskInterface.register("plain_products", sdpa_mask)
    last = len(stack.layers) - 1
    expected = _output(stack, last, ids)
    stack.config._attn_implementation = "plain_products"
    if not _agrees(lambda: _output(stack, last, ids), expected):
        stack.config._attn_implementation = "sdpa"


def _output(stack, number, ids):
    """The stream (batch, length, d_model) after block `number`, from 0."""
    seen = []

    def see(_, __, output):
        seen.append(stream_of(output))
        raise Enough

    # before the owner's hooks, which need not know of this run
    hook = stack.layers[number].register_forward_hook(see, prepend=True)
    try:
        with torch.inference_mode():
            stack.run(ids)
    finally:
        hook.remove()
    return seen[0]


def _agrees(output, expected):
    """Whether `output()` equals `expected` up to rounding; not if it raises."""
    try:
        return equal_up_to_rounding(output(), expected)
    # what a module raises that reads a weight in another way than by multiplying with it
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False


def packed(weight: torch.Tensor) -> torch.Tensor:
    """A linear layer's weight (out, in) in oneDNN's own layout."""
    # 1024: rows it is laid out for; any number works
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1024)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    algorithm: str = "",
) -> torch.Tensor:
    """activation(x (..., in) @ weight.T + bias), the weight packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


def product_with(
    x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor, operation: str
) -> torch.Tensor:
    """x @ weight.T, then added to or multiplied with `other`, in one pass."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, operation)


class PackedLinear(nn.Module):
    """nn.Linear, or GPT-2's Conv1D, for inference, its weight in oneDNN's own layout."""

    def __init__(self, linear: Any):
        super().__init__()
        self.weight = packed(linear.weight if type(linear) is nn.Linear else linear.weight.t())
        self.bias = None if linear.bias is None else linear.bias.detach()

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether it is a layer that is replaced."""
        from transformers.pytorch_utils import Conv1D

        return type(module) in (nn.Linear, Conv1D) and module.weight.dtype in (
            torch.float32,
            torch.bfloat16,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., out) of x (..., in)."""
        return product(x, self.weight, self.bias)


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) without a pass over memory of its own for the activation and the
    product; act: SiLU or GELU.

    The hidden units are sorted so that those that can grow largest come last. oneDNN adds up in
    that order, and once a massive value is in a sum, every later term is rounded to its size: in
    the model's own order the worst token's error against float64 is five times MKL's, in this order
    it is not larger.
    """

    def __init__(self, mlp: Any):
        super().__init__()
        # (hidden, d), (hidden, d), (d, hidden)
        gate, up, down = (
            linear.weight.detach() for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        order = (
            gate.float().norm(dim=1) * up.float().norm(dim=1) * down.float().norm(dim=0)
        ).argsort(stable=True)
        self.gate, self.up, self.down = (
            packed(gate[order]),
            packed(up[order]),
            packed(down[:, order]),
        )
        self.activation, self.algorithm = ACTIVATIONS[type(mlp.act_fn).__name__]

    @staticmethod
    def fits(mlp: Any) -> bool:
        """Whether the parts of `mlp` are those of such an MLP, and no others."""
        linears: list = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        act = getattr(mlp, "act_fn", None)  # some models name it otherwise; theirs stay as they are
        return (
            all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
            and {module for module in mlp.children()} == {*linears, act}
            and type(act).__name__ in ACTIVATIONS
            and mlp.gate_proj.weight.dtype in (torch.float32, torch.bfloat16)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) of x (..., d)."""
        # (..., hidden)
        gate = product(x, self.gate, activation=self.activation, algorithm=self.algorithm)
        return product(product_with(x, self.up, gate, "mul"), self.down)


def same_result(fast: nn.Module, mlp: Any, n_rows: int = 4) -> bool:
    """Whether `fast` gives what `mlp` does. A module with the right parts can still do more with
    them, as Gemma 3n's sparse ones."""
    weight = mlp.gate_proj.weight
    x = torch.randn(n_rows, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(
        weight.dtype
    )
    with torch.inference_mode():
        expected = mlp(x).float()
        error = (fast(x).float() - expected).norm(dim=1) / expected.norm(dim=1)
    return bool((error < (1e-4 if weight.dtype == torch.float32 else 0.05)).all())


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k' + causal mask) v by two batched products.

    query, key (batch, heads, tokens, d_head), value (batch, heads, tokens, d_value); returns
    (batch, tokens, heads, d_value).

    `attention_mask`: None for plain causal, or what transformers' sdpa_mask gives, equal for all
    rows of a batch without padding mask.
    """
    batch, heads, n_query, d_head = query.shape
    n_key = key.shape[2]
    special = options.get("softcap") is not None or options.get("position_bias") is not None
    additive = attention_mask is not None and attention_mask.dtype != torch.bool
    if n_key > LONGEST_PLAIN or special or additive:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    group = heads // key.shape[1]
    key, value = (
        t.repeat_interleave(group, 1).reshape(batch * heads, n_key, t.shape[-1])
        if group > 1
        else t.reshape(batch * heads, n_key, t.shape[-1])
        for t in (key, value)
    )
    if attention_mask is None:
        visible = torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query)
    else:
        visible = attention_mask[0, 0]
    hidden = torch.zeros(n_query, n_key, dtype=query.dtype).masked_fill_(~visible, float("-inf"))
    scores = torch.baddbmm(
        hidden,
        query.reshape(batch * heads, n_query, d_head),
        key.transpose(1, 2),
        # (batch * heads, n_query, n_key)
        alpha=d_head**-0.5 if scaling is None else scaling,
    )
    return torch.bmm(scores.softmax(-1), value).view(batch, heads, n_query, -1).transpose(
        1, 2
    ), None
