"""The residual stream of a model up to one layer or several, or what a block adds to it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastsae.lm.checks import (
    equal,
    equal_up_to_rounding,
    move,
    require_causal,
    require_chain,
    sample_ids,
)
from fastsae.lm.decoders import Enough, decoder_stack
from fastsae.lm.hook_points import BLOCKS, HookPoint
from fastsae.lm.loading import load_model
from fastsae.lm.places import place_of
from fastsae.runtime.errors import InputError
from fastsae.runtime.machine_errors import is_out_of_memory

if TYPE_CHECKING:
    import torch

    # keys and values of a layer, each (1, n_heads, length, d_head)
    Prefix = list[tuple[torch.Tensor, torch.Tensor]]


class ResidualModel:
    """A model's blocks up to the highest of `layers`; `model(ids)` gives the residual stream after
    each of them, or of another `kind` of hook point what there is in the last of these blocks.

    Raises InputError for a model whose stream is not where it is looked for, or that is not causal.
    `exact_twin` reads the whole model and leaves transformers' own kernels in place: the slow twin
    that tests and the benchmark compare with.
    """

    def __init__(
        self,
        name: str,
        layers: int | Iterable[int],
        *,
        kind: str = "resid_post",
        revision: str | None = None,
        cache_dir: str | None = None,
        device: str = "cpu",
        dtype: "torch.dtype",
        exact_twin: bool = False,
    ):
        self.layers = (layers,) if isinstance(layers, int) else tuple(layers)
        model = load_model(
            name,
            revision=revision,
            cache_dir=cache_dir,
            dtype=dtype,
            # the block after the last one is tried too: it shows that the stream goes on
            n_blocks=None if exact_twin else max(self.layers) + 1,
        )
        self.revision = getattr(model.config, "_commit_hash", None)
        self.stack = decoder_stack(model)
        self.stack.module.eval()
        self.device, self.dtype = "cpu", dtype
        self.d_model = self.stack.config.hidden_size
        self.kind = kind
        self._streams: dict[int, torch.Tensor] = {}
        require_chain(self.stack, max(self.layers), sample_ids(self), name)
        # later blocks, the final norm and the head never run
        self.stack.keep_first(max(self.layers))
        self.places = {
            layer: place_of(self.stack, HookPoint(layer).block, kind) for layer in self.layers
        }
        handles = self._hooks()
        self.keeps_nothing = False  # whether a cache that keeps nothing stands in for none
        if device != "cpu":
            move(self, device)
            self.keeps_nothing = device.startswith("cuda") and self._agrees_with_empty_cache()
        require_causal(self, name)
        if device == "cpu" and not exact_twin:
            from fastsae.lm.cpu_kernels import quicken

            for handle in handles:
                handle.remove()
            quicken(self.stack)
            self._hooks()  # on the modules that are there now

    def _hooks(self):
        def seeing(layer):
            def see(stream):
                # what is below a block can be changed in place when it is added
                self._streams[layer] = stream if self.kind == "resid_post" else stream.clone()
                if layer == max(self.layers):
                    raise Enough

            return see

        return [
            place.hook(self.stack.layers[layer - 1], seeing(layer))
            for layer, place in self.places.items()
        ]

    def __call__(
        self,
        ids: "torch.Tensor",
        prefix: "Prefix | None" = None,
        first: "torch.Tensor | None" = None,
    ) -> "dict[int, torch.Tensor]":
        """(batch, length) int tensor, padded on the right with any id -> {layer: (batch, length,
        d_model)} on the device.

        No attention mask is needed: attention is causal, so no real token ever sees the padding
        that follows it. `prefix`, from `read_prefix`, stands before every row. `first` (batch,)
        int64: the position of each row's first token, where it is not 0 (or that after the prefix).
        """
        import torch

        with torch.inference_mode():
            cache = None
            if prefix is not None:
                rows = (len(ids), -1, -1, -1)
                cache = self._cache([(k.expand(rows), v.expand(rows)) for k, v in prefix])
            elif self.keeps_nothing:
                cache = empty_cache(self.stack.config)
            positions = None
            if first is not None:
                positions = (first[:, None] + torch.arange(ids.shape[1])).to(self.device)
            self.stack.run(ids.to(self.device, non_blocking=True), cache, positions)
            streams, self._streams = self._streams, {}
            return streams

    def require_positions(self) -> None:
        """InputError if the model cannot be told its tokens' positions."""
        if not self.stack.takes("position_ids"):
            raise InputError(
                f"DIALOGUES_IN_BLOCKS: {type(self.stack.module).__name__} takes no positions. "
                "choose joined, or apart, positions from 0."
            )

    def _agrees_with_empty_cache(self):
        """Whether streams come out the same, to the bit, with a cache that keeps nothing."""
        if not self.stack.takes("past_key_values"):
            return False
        ids = sample_ids(self)
        expected = self(ids)
        self.keeps_nothing = True
        try:
            found = self(ids)
        # what a model's author chose to raise at a cache that is not its own
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False
        finally:
            self.keeps_nothing = False
            self._streams = {}
        return all(equal(found.get(layer), stream) for layer, stream in expected.items())

    def where(self, layer: int) -> dict[str, str]:
        """Where a layer's hook is in the model, for metadata: "blocks" where these are not as in
        Llama, and "hook_module" where it is below a block."""
        blocks = {} if self.stack.path == BLOCKS else {"blocks": self.stack.path}
        module = self.places[layer].module
        return {**blocks, **({"hook_module": module} if module else {})}

    def require_length(self, n_tokens: int) -> None:
        """InputError if the model cannot read `n_tokens` tokens in a row: its positions are a
        table, and end before."""
        longest = self.stack.table_length()
        if longest is None and n_tokens > (self._promised_length() or n_tokens):
            longest = self._promised_length()
            try:
                self(sample_ids(self)[:1, :1].expand(1, n_tokens))
                return
            except (IndexError, RuntimeError, ValueError) as error:
                if is_out_of_memory(error):
                    return  # whoever runs the batches says so, with what helps
        if longest is not None and n_tokens > longest:
            raise InputError(
                f"MAX_LENGTH: an example has {n_tokens} tokens, and this model has {longest} "
                f"positions. give --max-length {longest} or less."
            )

    def _promised_length(self):
        names = ("max_position_embeddings", "max_seq_len", "n_positions")
        return next((n for name in names if (n := getattr(self.stack.config, name, None))), None)

    def read_prefix(self, ids: "torch.Tensor") -> "tuple[Prefix | None, dict[int, torch.Tensor]]":
        """((length,) int tensor) -> (what `__call__` takes as `prefix`, {layer: (length,
        d_model)}).

        The first is None, and the other empty, where the prefix cannot be reused: a layer's
        attention window is shorter, a layer keeps a state rather than keys and values, or the model
        has a cache of its own. Tried on a sample, for a cache can look right and lack something.
        """
        try:
            prefix, streams = self._prefix_in_cache(ids)
            return (prefix, streams) if self._reusable(ids, prefix) else (None, {})
        # what a model's author chose to raise at a cache that is not its own
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None, {}

    def _prefix_in_cache(self, ids):
        import torch

        with torch.inference_mode():
            cache = self._cache([])
            self.stack.run(ids[None].to(self.device), cache)
            streams, self._streams = self._streams, {}
            kept = [(layer.keys, layer.values) for layer in cache.layers[: len(self.stack.layers)]]
            return kept, {layer: stream[0] for layer, stream in streams.items()}

    def _reusable(self, ids, prefix):
        """Whether every layer kept the whole prefix, and tokens after it come out as without
        reuse."""
        import torch

        if not self.stack.takes("past_key_values") or any(
            keys.shape[-2] != len(ids) for keys, _ in prefix
        ):
            return False
        more = sample_ids(self).to(ids.device)
        whole = torch.cat([ids.expand(len(more), -1), more], 1)
        reused, expected = self(more, prefix), self(whole)
        return all(
            equal_up_to_rounding(reused[layer], stream[:, len(ids) :])
            for layer, stream in expected.items()
        )

    def _cache(self, keys_and_values):
        from transformers import DynamicCache

        cache = DynamicCache(config=self.stack.config)
        for i, (keys, values) in enumerate(keys_and_values):
            cache.update(keys, values, i)
        return cache


def empty_cache(config: Any) -> Any:
    """A cache of keys and values that keeps none, for models on CUDA.

    Without a cache transformers looks, in every pass, whether sequences are packed, and the host
    waits for the answer. With one it makes the same mask, or none, from lengths alone.
    """
    from transformers import DynamicCache

    class EmptyCache(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            return key_states, value_states

    return EmptyCache(config=config)
