"""The residual stream of a model up to one layer or several."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastsae.lm.checks import move, require_causal
from fastsae.lm.hook_points import HookPoint
from fastsae.lm.loading import load_model
from fastsae.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

    # keys and values of a layer, each (1, n_heads, length, d_head)
    Prefix = list[tuple[torch.Tensor, torch.Tensor]]


def decoder_stack(model: "torch.nn.Module") -> Any:
    """The module that holds `layers` and `norm`: the one place that knows what the parts of a
    Llama-type model are called. InputError where there is none."""
    for path in ("model", "model.language_model", "language_model", "language_model.model", ""):
        module: Any = model
        for part in filter(None, path.split(".")):
            module = getattr(module, part, None)
        if hasattr(module, "layers") and hasattr(module, "norm"):
            return module
    raise InputError(
        f"MODEL_NAME: {type(model).__name__} is not built like Llama "
        "(no `layers` and `norm` found). choose a Llama-type model."
    )


class ResidualModel:
    """A model's blocks up to the highest of `layers`; `model(ids)` gives the residual stream after
    each of them.

    Raises InputError for a model whose stream is not where it is looked for, or that is not causal.
    `exact_twin` leaves transformers' own kernels in place: the slow twin that tests and the
    benchmark compare with.
    """

    def __init__(
        self,
        name: str,
        layers: int | Iterable[int],
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        device: str = "cpu",
        dtype: "torch.dtype",
        exact_twin: bool = False,
    ):
        import torch

        model = load_model(name, revision=revision, cache_dir=cache_dir, dtype=dtype)
        self.revision = getattr(model.config, "_commit_hash", None)
        self.layers = (layers,) if isinstance(layers, int) else tuple(layers)
        stack = decoder_stack(model)
        # later blocks, the final norm and the head never run
        stack.layers = stack.layers[: max(self.layers)]
        stack.norm = torch.nn.Identity()  # otherwise the last hidden state is normed
        self.stack = stack.eval()
        self.device, self.dtype = "cpu", dtype
        self.d_model = model.config.get_text_config().hidden_size
        self._streams = {}
        for layer in self.layers:
            HookPoint(layer).module_in(stack).register_forward_hook(
                lambda _, __, out, layer=layer: self._streams.update(
                    {layer: out[0] if isinstance(out, tuple) else out}
                )
            )
        if device != "cpu":
            move(self, device)
        require_causal(self, name)
        if device == "cpu" and not exact_twin:
            from fastsae.lm.cpu_kernels import quicken

            quicken(stack)

    def __call__(
        self, ids: "torch.Tensor", prefix: "Prefix | None" = None
    ) -> "dict[int, torch.Tensor]":
        """(batch, length) int tensor, padded on the right with any id -> {layer: (batch, length,
        d_model)} on the device.

        No attention mask is needed: attention is causal, so no real token ever sees the padding
        that follows it. `prefix`, from `read_prefix`, stands before every row.
        """
        import torch

        with torch.inference_mode():
            cache = (
                None
                if prefix is None
                else self._cache(
                    [
                        (k.expand(len(ids), -1, -1, -1), v.expand(len(ids), -1, -1, -1))
                        for k, v in prefix
                    ]
                )
            )
            self.stack(
                input_ids=ids.to(self.device, non_blocking=True),
                past_key_values=cache,
                use_cache=cache is not None,
            )
            streams, self._streams = self._streams, {}
            return streams

    def read_prefix(self, ids: "torch.Tensor") -> "tuple[Prefix | None, dict[int, torch.Tensor]]":
        """((length,) int tensor) -> (what `__call__` takes as `prefix`, {layer: (length,
        d_model)}).

        The first is None where the prefix cannot be reused: a layer's attention window is shorter,
        or a layer is not attention.
        """
        import torch

        with torch.inference_mode():
            cache = self._cache([])
            # linear attention keeps a state instead
            if not all(hasattr(layer, "keys") for layer in cache.layers):
                return None, {}
            self.stack(input_ids=ids[None].to(self.device), past_key_values=cache, use_cache=True)
            streams, self._streams = self._streams, {}
            kept = [(layer.keys, layer.values) for layer in cache.layers[: len(self.stack.layers)]]
            whole = all(keys.shape[-2] == len(ids) for keys, _ in kept)
            return kept if whole else None, {layer: stream[0] for layer, stream in streams.items()}

    def _cache(self, keys_and_values):
        from transformers import DynamicCache

        cache = DynamicCache(config=self.stack.config)
        for i, (keys, values) in enumerate(keys_and_values):
            cache.update(keys, values, i)
        return cache
