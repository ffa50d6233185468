"""Where in a language model activations are read, and what each library calls that place. The hook
itself is placed by `residual.ResidualModel`.

LAYER_IDX counts the blocks that have run, from 1: the residual stream after 12 blocks is layer 12.
Libraries count blocks from 0: the same stream is what block 11 gives.

    layer 12    hidden_states[12]           transformers (the last layer's is normed there)
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
from typing import Any, Self

from fastsae.settings.values import activations_stem

BLOCKS = "model.layers"  # where Llama's blocks are in transformers; other families' elsewhere


@dataclass(frozen=True)
class Kind:
    """What a kind of hook point is called in TransformerLens, and in a block of transformers."""

    transformer_lens: str
    module: str  # below the block, "" is the block itself


# another kind is a row here, and a branch where `file_stem` and `parse` tell kinds apart
KINDS = {"resid_post": Kind(transformer_lens="hook_resid_post", module="")}


@dataclass(frozen=True)
class HookPoint:
    """The residual stream after `layer` blocks; 0 is the embedding, before any block.

    `blocks`: the address of the blocks in transformers, as `transformer.h` in GPT-2. Raises
    ValueError for a negative layer or an unknown kind.
    """

    layer: int
    kind: str = "resid_post"
    blocks: str = field(default=BLOCKS, compare=False)

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
        return self.layer

    @property
    def transformer_lens(self) -> str:
        """The hook's name in TransformerLens and SAELens."""
        return f"blocks.{self.block}.{KINDS[self.kind].transformer_lens}"

    @property
    def sparsify(self) -> str:
        """The module's name below the base model, which sparsify names its folders by."""
        return self.hugging_face.partition(".")[2]

    @property
    def hugging_face(self) -> str:
        """The module in transformers whose output it is."""
        below = KINDS[self.kind].module
        return f"{self.blocks}.{self.block}{'.' * bool(below)}{below}"

    def neuronpedia_source(self, name: str) -> str:
        """The name on Neuronpedia of a source of the set `name`."""
        return f"{self.block}-{name}"

    @property
    def file_stem(self) -> str:
        """The name, without its ending, of files of its activations."""
        return activations_stem(self.layer)

    def module_in(self, stack: Any) -> Any:
        """The module whose output it is, in a `residual.decoder_stack`."""
        module = stack.layers[self.block]
        below = KINDS[self.kind].module
        return module.get_submodule(below) if below else module

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
        return cls(layer, blocks=metadata.get("blocks", BLOCKS))

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """From the name of a hook (TransformerLens, SAELens) or a module (transformers, sparsify);
        None if it is not the residual stream."""
        if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", name):
            block = int(found[1])
            return cls.of_block(block) if found[2] == "post" else cls(block)
        if found := re.fullmatch(r"(?:[A-Za-z_]\w*\.)*(?:layers|h|blocks)[._](\d+)", name):
            return cls.of_block(int(found[1]))
        return None

    @classmethod
    def of_gemma_scope(cls, path: str) -> Self | None:
        """From the path of a file of Gemma Scope, in which `layer_20` is block 20; None without
        one."""
        found = re.findall(r"layer_(\d+)", path)
        return cls.of_block(int(found[-1])) if found else None
