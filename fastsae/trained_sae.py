"""A trained autoencoder in use: features of activations, reconstructions, and the features of a
text with its model run as in stage 1."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsae.activations.compression import computed_dtype
from fastsae.data.token_masks import chosen_tokens, usable_tokens
from fastsae.data.token_text import TokenTexts, visible
from fastsae.data.tokenization import (
    CONTENT,
    SHARED_PREFIX,
    TEMPLATE,
    ChatTokenizer,
    Example,
    Tokens,
)
from fastsae.formats import load
from fastsae.formats.load import (
    architecture_of,
    architecture_text,
    is_plain_text,
    nested_prefixes,
    target_k,
)
from fastsae.interpretation.tables import read_labels
from fastsae.lm.devices import choose_device
from fastsae.lm.loading import load_tokenizer
from fastsae.lm.names import described
from fastsae.lm.residual import ResidualModel
from fastsae.lm.sources import require_same
from fastsae.runtime.errors import InputError
from fastsae.sae import Autoencoder, autoencoder
from fastsae.sae.sparse_step import SparseActivations

N_TOP = 3  # features per token in a printed text


def load_sae(
    path: Path | str,
    *,
    model_name: str | None = None,
    layer: int | None = None,
    device: str = "cpu",
    cache_dir: str | None = None,
) -> "TrainedSae":
    """The autoencoder of a checkpoint (.pt), of a run's folder, or of a folder of another library
    (see `formats`), verified.

    model_name, layer: for those of other libraries, which may not name the first as the hub does,
    or the second at all. cache_dir: where the language model is kept, as CACHE_DIR of the scripts.
    Raises InputError or EnvironmentFailure, whose text says what to do.
    """
    # mps has no sparse products
    sae, meta = load.load_sae(path, "cpu" if device == "mps" else device)
    if "source" in meta:  # of another library
        source = meta["activations"]
        source["model_name"] = model_name or source["model_name"]
        source["settings"]["LAYER_IDX"] = source["settings"]["LAYER_IDX"] or layer
    return TrainedSae(sae, meta, device=device, cache_dir=cache_dir)


@dataclass(frozen=True)
class TokenFeatures:
    """One token of a text. `used`: whether training would use it (USE_TOKENS,
    EXCLUDE_SHARED_PREFIX, MAX_NORM_RATIO)."""

    token: str
    kind: str  # content, template or shared prefix
    used: bool
    features: list[tuple[int, float]]  # (feature, activation), strongest first

    def __repr__(self):
        return f"{visible(self.token)!r}: " + (
            ", ".join(f"{j} ({value:.2f})" for j, value in self.features) or "-"
        )


class TrainedSae:
    """`encode`, `decode` and `features_of`; `sae` is the HypotheSAEs module underneath, `meta` what
    its checkpoint says of itself."""

    def __init__(
        self, sae: Autoencoder, meta: dict, *, device: str = "cpu", cache_dir: str | None = None
    ) -> None:
        self.sae, self.meta, self.device, self.cache_dir = sae, meta, device, cache_dir
        self._reader: tuple[ChatTokenizer, ResidualModel, dict] | None = None

    @property
    def d(self) -> int:
        """Dimensions of an activation, d_in."""
        return self.sae.input_bias.numel()

    @property
    def n_features(self) -> int:
        """The number of features, d_sae."""
        return self.sae.m_total_neurons

    def encode(self, x: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Features (..., M) of activations x (..., d), array or tensor, as they come from the
        model."""
        # arrays of files are read-only
        x = torch.as_tensor(np.array(x) if isinstance(x, np.ndarray) else x).to(self.sae.input_bias)
        if x.shape[-1] != self.d:
            raise InputError(
                f"activations: are {x.shape[-1]} wide and this autoencoder takes {self.d}. "
                "check the model and the layer."
            )
        entries = autoencoder.encode(self.sae, x.reshape(-1, self.d))
        dense = torch.zeros(entries.n_rows, self.n_features, device=x.device)
        dense[entries.row.long(), entries.column.long()] = entries.value
        return dense.reshape(*x.shape[:-1], self.n_features)

    def decode(self, features: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Reconstructions (..., d) of features (..., M)."""
        features = torch.as_tensor(features).to(self.sae.input_bias)
        flat = features.reshape(-1, self.n_features)
        row, column = flat.nonzero(as_tuple=True)
        entries = SparseActivations(
            row.int(), column.int(), flat[row, column], len(flat), self.n_features
        )
        return autoencoder.decode(self.sae, entries).reshape(*features.shape[:-1], self.d)

    def features_of(self, text: str | list[dict], n_top: int = 5) -> list[TokenFeatures]:
        """The tokens of a text (one user turn), or of messages [{"role", "content"}, ...], with the
        `n_top` strongest features of each.

        Runs the model named in the checkpoint as stage 1 did: its chat template, its layer, its
        precision. The first call loads it.
        """
        tokens, activations = self.read(text)
        features = self.encode(activations)
        kinds = {CONTENT: "content", TEMPLATE: "template", SHARED_PREFIX: "shared prefix"}
        own, result = self.meta["settings"], []
        used, _ = usable_tokens(
            activations.float().norm(dim=1).numpy(force=True),
            tokens.kind,
            max_norm_ratio=None,
            exclude_shared_prefix=own.get("EXCLUDE_SHARED_PREFIX", True),
            max_norm=self.meta.get("max_norm"),
        )
        used &= chosen_tokens(own.get("USE_TOKENS", "all"), tokens.kind, tokens.role)  # (n_tokens,)
        for i, token in enumerate(TokenTexts(self.reader()[0].tokenizer)(tokens.ids)):
            value, which = features[i].topk(min(n_top, self.n_features))
            result.append(
                TokenFeatures(
                    token,
                    kinds[int(tokens.kind[i])],
                    bool(used[i]),
                    [(int(j), float(v)) for j, v in zip(which, value) if v > 0],
                )
            )
        return result

    def read(self, text: str | list[dict]) -> tuple[Tokens, torch.Tensor]:
        """(Tokens, activations (n_tokens, d)) of a text or of messages, rounded as the activations
        file stores them (to float16 where that has 8 bits)."""
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
        if not any(message["content"].strip() for message in messages):
            raise InputError("TEXT: is empty. give a sentence.")
        # bytes of a command line
        if any(re.search("[\ud800-\udfff]", message["content"]) for message in messages):
            raise InputError("TEXT: is not UTF-8. give it in that encoding.")
        tokenizer, model, source = self.reader()
        (tokens,) = tokenizer([Example(1, messages, is_text=isinstance(text, str))])
        # words that all examples began with are this text's own if it has others
        content = np.flatnonzero(tokens.kind == CONTENT)
        tokens.kind[: min(source.get("n_shared_prefix", 0), content[0] if len(content) else 0)] = (
            SHARED_PREFIX
        )
        (stream,) = model(torch.from_numpy(tokens.ids.astype(np.int64))[None]).values()
        return tokens, stream[0].to(
            getattr(torch, computed_dtype(source["settings"].get("STORAGE_DTYPE", "float32")))
        )

    def reader(self) -> tuple[ChatTokenizer, ResidualModel, dict[str, Any]]:
        """(tokenizer, model, metadata of the activations) that belong to this autoencoder; loaded
        once."""
        if self._reader is None:
            self._reader = self._load_model()
        return self._reader

    def _load_model(self):
        source = self.meta.get("activations") or {}
        settings = source.get("settings") or {}
        name, layer = source.get("model_name"), settings.get("LAYER_IDX")
        if not name or not layer:
            raise InputError(
                "this autoencoder does not name its model and layer. give them (--model-name, "
                "or model_name= and layer=), or call encode(activations)."
            )
        origin: dict[str, Any] = {
            "revision": source.get("model_revision"),
            "cache_dir": self.cache_dir,
        }
        if recorded := (source.get("inputs") or {}).get("model"):
            require_same(
                name,
                source.get("model_revision"),
                self.cache_dir,
                recorded,
                "give the one it was trained on",
            )
        is_text = is_plain_text(source)
        tokenizer = ChatTokenizer(
            load_tokenizer(name, **origin),
            special_tokens=not is_text,
            chat_template=settings.get("USE_CHAT_TEMPLATE", True) and not is_text,
            max_length=settings.get("MAX_LENGTH"),
            date=settings.get("TEMPLATE_DATE", ""),
            dataset_name="TEXT",
        )
        model = ResidualModel(
            name,
            layer,
            kind=settings.get("HOOK", "resid_post"),
            device=self.device,
            dtype=getattr(torch, source.get("compute_dtype", "float32")),
            **origin,
        )
        if model.d_model != self.d:
            raise InputError(
                f"{name}: is {model.d_model} wide and this autoencoder takes {self.d}. "
                "give the model it was trained on."
            )
        return tokenizer, model, source

    def __repr__(self):
        source, metrics = self.meta.get("activations") or {}, self.meta.get("metrics") or {}
        settings = self.meta.get("settings") or {"ARCHITECTURE": architecture_of(self.sae)}
        k = target_k(settings)
        what = (
            f"{architecture_text(settings)} autoencoder: "
            f"{self.n_features} features of {self.d} dimensions"
        )
        what += f", K = {k}" if k else ""
        if prefixes := nested_prefixes(settings):
            what += f", prefixes {', '.join(map(str, prefixes))}"
        layer = (source.get("settings") or {}).get("LAYER_IDX")
        where = f"layer {layer} of {described(source.get('model_name') or 'an unnamed model')}"
        figures = [
            f"{label} {metrics[name]:.3g}"
            for name, label in (
                ("normalized_mse", "normalised MSE"),
                ("l0", "L0"),
                ("dead_fraction", "dead"),
            )
            if name in metrics
        ]
        return "\n".join(filter(None, [what, where, ", ".join(figures)]))


def describe_text(
    text: str, path: Path | str, labels_path: Path | str, *, device: str, **options: Any
) -> str:
    """What the autoencoder at `path` is, and the strongest features of each token of a text, with
    their labels where there are any."""
    sae = load_sae(path, device=choose_device(device), **options)
    labels = read_labels(labels_path, sae.meta["fingerprint"])
    return f"{sae}\n{text_table(sae.features_of(text), labels)}"


def text_table(found: list[TokenFeatures], labels: dict[int, str], n_top: int = N_TOP) -> str:
    """Lines `token  feature  activation  label` of the tokens that training would use (if it uses
    none, of the text's own)."""
    used = [token for token in found if token.used] or [
        token for token in found if token.kind == "content"
    ]
    width = max((len(visible(token.token)) for token in used), default=0) + 2
    lines = [f"{'token':{width}} feature  activation  label"]
    for token in used:
        for i, (j, value) in enumerate(token.features[:n_top] or [(None, 0.0)]):
            name = repr(visible(token.token)) if i == 0 else ""
            lines.append(
                f"{name:{width}} {j:7}  {value:10.2f}  {visible(labels.get(j, ''))[:90]}".rstrip()
                if j is not None
                else name
            )
    return "\n".join(lines)
