"""Where in a language model activations are read, and what each library calls that place. The hook
itself is placed by `residual.ResidualModel`.

LAYER_IDX counts the blocks that have run, from 1: the residual stream after 12 blocks is layer 12.
Libraries count blocks from 0: the same stream is what block 11 gives.

    layer 12    hidden_states[12]           transformers (the last layer's is normed there;
                                            Mamba and RWKV: 11)
                model.layers.11             transformers, the module whose output it is
                blocks.11.hook_resid_post   TransformerLens and SAELens
                blocks.12.hook_resid_pre    the same tensor, before the next block
                layers.11                   sparsify, the folder's name
                11-NAME                     Neuronpedia, the source's name
                layer_11                    Gemma Scope, a folder's name
                activations_layer12         files of this project
"""

import re
from dataclasses import dataclass, field
from typing import Self

from fastsae.settings.values import activations_stem

BLOCKS = "model.layers"  # where Llama's blocks are in transformers; other families' elsewhere
# families (Mamba, RWKV) whose hidden_states begin after the first block, without the embedding
WITHOUT_EMBEDDING = ("backbone.layers", "rwkv.blocks")


@dataclass(frozen=True)
class Kind:
    """What a kind of hook point is called in TransformerLens, in a block of Llama in transformers,
    and in a sentence about a block."""

    transformer_lens: str
    module: str  # below the block, "" is the block itself
    is_input: bool  # whether it is what the module reads, rather than what it gives
    text: str


KINDS = {
    "resid_post": Kind("hook_resid_post", "", False, "the residual stream after block {}"),
    "resid_mid": Kind(
        "hook_resid_mid",
        "post_attention_layernorm",
        True,
        "the residual stream in block {}, between attention and MLP",
    ),
    "attn_out": Kind(
        "hook_attn_out",
        "self_attn",
        False,
        "what attention adds to the residual stream in block {}",
    ),
    "mlp_out": Kind(
        "hook_mlp_out", "mlp", False, "what the MLP adds to the residual stream in block {}"
    ),
}
# modules below a block that are read as a kind, where a name is all there is
MODULES = {"self_attn": "attn_out", "attn": "attn_out", "attention": "attn_out", "mlp": "mlp_out"}
GEMMA_SCOPE = {"res": "resid_post", "mlp": "mlp_out"}  # in its repositories' names


@dataclass(frozen=True)
class HookPoint:
    """The residual stream after `layer` blocks, 0 being the embedding before any block; or another
    kind of place in the last of these blocks.

    `blocks`: the address of the blocks in transformers, as `transformer.h` in GPT-2; `module`: that
    of the place below its block, None for Llama's. Raises ValueError for a negative layer or an
    unknown kind.
    """

    layer: int
    kind: str = "resid_post"
    blocks: str = field(default=BLOCKS, compare=False)
    module: str | None = field(default=None, compare=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.layer < 0:
            raise ValueError(f"layer: expected 0 or more, got {self.layer}")

    @property
    def block(self) -> int:
        """The index, from 0, of the block that gives the stream. ValueError for the embedding."""
        if self.layer == 0:
            raise ValueError("layer 0 is the embedding, which no block gives")
        return self.layer - 1

    @property
    def hidden_states_index(self) -> int:
        """The index in what transformers gives with `output_hidden_states=True`."""
        return self.layer - (self.blocks in WITHOUT_EMBEDDING)

    @property
    def transformer_lens(self) -> str:
        """The hook's name in TransformerLens and SAELens."""
        return f"blocks.{self.block}.{KINDS[self.kind].transformer_lens}"

    @property
    def sparsify(self) -> str:
        """The module's name below the base model, which sparsify names its folders by."""
        return self.hugging_face.partition(".")[2]

    @property
    def dictionary_learning(self) -> str:
        """The name of the place in dictionary_learning's config.json, beside the block's index."""
        if self.kind == "resid_post":
            return f"resid_post_layer_{self.block}"
        return self.transformer_lens if self.is_input else self.hugging_face

    @property
    def hugging_face(self) -> str:
        """The module in transformers whose output it is, or its input where `is_input` says so."""
        below = KINDS[self.kind].module if self.module is None else self.module
        return f"{self.blocks}.{self.block}{'.' * bool(below)}{below}"

    @property
    def is_input(self) -> bool:
        """Whether it is what its module reads, rather than what it gives."""
        return KINDS[self.kind].is_input

    @property
    def text(self) -> str:
        """The place in words."""
        return KINDS[self.kind].text.format(self.block)

    def neuronpedia_source(self, name: str) -> str:
        """The name on Neuronpedia of a source of the set `name`."""
        return f"{self.block}-{name}"

    @property
    def file_stem(self) -> str:
        """The name, without its ending, of files of its activations."""
        return activations_stem(self.layer, self.kind)

    @classmethod
    def of_block(cls, block: int) -> Self:
        """The stream that the block of this index, from 0, gives."""
        return cls(block + 1)

    @classmethod
    def of_activations(cls, metadata: dict) -> Self:
        """Where activations with this metadata were read. ValueError where they do not say."""
        layer = metadata["settings"]["LAYER_IDX"]
        if layer is None:
            raise ValueError("LAYER_IDX: expected a layer, got None")
        return cls(
            layer,
            metadata["settings"].get("HOOK", "resid_post"),
            metadata.get("blocks", BLOCKS),
            metadata.get("hook_module"),
        )

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """From the name of a hook (TransformerLens, SAELens) or a module (transformers, sparsify);
        None if it is none of the kinds."""
        if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", name):
            return cls(int(found[1]))
        for kind, about in KINDS.items():
            if found := re.fullmatch(rf"blocks\.(\d+)\.{about.transformer_lens}", name):
                return cls(int(found[1]) + 1, kind)
        found = re.fullmatch(r"(?:[A-Za-z_]\w*\.)*(?:layers|h|blocks)[._](\d+)(?:\.(\w+))?", name)
        if not found or (found[2] and found[2] not in MODULES):
            return None
        if found[2]:
            return cls(int(found[1]) + 1, MODULES[found[2]], module=found[2])
        return cls.of_block(int(found[1]))

    @classmethod
    def of_gemma_scope(cls, path: str) -> Self | None:
        """From the path of a file of Gemma Scope, in which `layer_20` is block 20 and the
        repository's name ends in the kind; None without a layer. ValueError for another kind of
        place: attention's heads before their projection, or transcoders."""
        layers = re.findall(r"layer_(\d+)", path)
        sites = re.findall(r"gemma-scope-[\w.]+-[a-z]+-(\w+)", path)
        kind = GEMMA_SCOPE.get(sites[-1]) if sites else "resid_post"
        if kind is None:
            raise ValueError(sites[-1])
        return cls(int(layers[-1]) + 1, kind) if layers else None
