"""What the readers of foreign autoencoders build on: their tensors and settings, checked as they
are taken out, and the form they get.

Only safetensors, .npz without pickles and `torch.load(weights_only=True)` are used. Every tensor
must be known, of the right shape and finite, and every setting of its type; else one line names the
file and the key.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastsae.lm.hook_points import HookPoint
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.runtime.storage import from_json
from fastsae.sae import Autoencoder
from fastsae.sae.architectures import gated
from fastsae.sae.autoencoder import new_sae

T = TypeVar("T", int, float, str, bool, list, dict)

# what `data.token_masks.chosen_tokens` takes
TOKENS_USED = ("all", "content", "assistant")
# active features where a format does not say how many, until they are counted
ASSUMED_K = 32


@dataclass
class Parts:
    """features = activation(w_enc (x - b_dec) + b_enc), reconstruction = features @ w_dec + b_dec,
    all float32 on the CPU.

    w_enc and w_dec (M, d); b_enc (M,); b_dec (d,); architecture topk (the k largest, ReLU),
    batchtopk (above the 0-d threshold), standard (ReLU) or jumprelu (above the threshold (M,));
    `about`: where it comes from, as far as the files say.
    """

    w_enc: torch.Tensor
    w_dec: torch.Tensor
    b_enc: torch.Tensor
    b_dec: torch.Tensor
    architecture: str
    threshold: torch.Tensor | None = None
    k: int | None = None
    prefixes: list | None = None
    about: dict = field(default_factory=dict)

    def as_module(self, device: str = "cpu") -> Autoencoder:
        """The autoencoder that this project would have trained, for inference."""
        m, d = self.w_enc.shape
        sae = new_sae(
            {
                "input_dim": d,
                "m_total_neurons": m,
                "k_active_neurons": self.k or min(m, ASSUMED_K),
                "prefix_lengths": self.prefixes,
                "architecture": self.architecture,
            },
            device,
        ).eval()
        values = {
            "encoder.weight": self.w_enc,
            "decoder.weight": self.w_dec.t(),
            "input_bias": self.b_dec,
            "neuron_bias": self.b_enc,
            "threshold": sae.threshold if self.threshold is None else self.threshold,
        }
        sae.load_state_dict(values)
        return sae

    def centre_input(self) -> "Parts":
        """From w_enc x + b_enc, without b_dec in front, to the form above."""
        self.b_enc = (self.b_enc.double() + self.w_enc.double() @ self.b_dec.double()).float()
        return self

    def unit_rows(self) -> "Parts":
        """Decoder rows of length 1, their lengths moved into the features. For topk this can change
        which are the k largest."""
        length = torch.linalg.vector_norm(self.w_dec, dim=1).clamp_min(1e-8)  # (M,)
        self.w_enc, self.w_dec, self.b_enc = (
            self.w_enc * length[:, None],
            self.w_dec / length[:, None],
            self.b_enc * length,
        )
        if self.threshold is not None and self.threshold.ndim:
            self.threshold = self.threshold * length
        return self

    def apply_gates(self, gate_bias: torch.Tensor, log_magnitude: torch.Tensor) -> None:
        """A gated encoder as the JumpReLU one it equals; `b_enc` is its b_mag."""
        self.w_enc, self.threshold = gated.as_jumprelu(
            self.w_enc, self.b_enc, gate_bias, log_magnitude
        )
        self.architecture = gated.ARCHITECTURE.about.form

    def require_k(self, where: Path) -> None:
        """InputError that names the file `where` if k is not from 1 to M."""
        if self.k is None or not 1 <= self.k <= len(self.w_enc):
            raise InputError(
                f"{where}: k {self.k} is not from 1 to {len(self.w_enc)}. "
                "get another copy of the file."
            )


class Tensors:
    """The tensors of a file by name, handed out once each with their shapes checked."""

    def __init__(self, path: Path, values: dict[str, torch.Tensor]):
        self.path, self.values = path, dict(values)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, name: str, *shape: int | None) -> torch.Tensor:
        """float32 tensor `name`; a None in `shape` is any size. InputError if it is missing, of
        another shape or not finite."""
        if name not in self.values:
            raise InputError(
                f"{self.path}: {name} is missing; "
                f"there are {', '.join(sorted(self.values)) or 'no tensors'}. "
                "give the folder that the library wrote."
            )
        value = self.values.pop(name)
        if value.ndim != len(shape) or any(
            want is not None and want != size for want, size in zip(shape, value.shape)
        ):
            wanted = tuple("any" if size is None else size for size in shape)
            raise InputError(
                f"{self.path}: {name} has shape {tuple(value.shape)}, not {wanted}. "
                "the file is not what its config says."
            )
        value = value.to(torch.float32).contiguous()
        if not bool(value.isfinite().all()):
            raise InputError(
                f"{self.path}: {name} holds NaN or infinity. get another copy of the file."
            )
        return value

    def drop(self, *names: str) -> None:
        """Leave out tensors that inference does not use."""
        for name in names:
            self.values.pop(name, None)

    def finish(self) -> None:
        """InputError if a tensor was not taken: it may change what the autoencoder computes."""
        if self.values:
            raise InputError(
                f"{self.path}: {', '.join(sorted(self.values))}: "
                "unknown, so the autoencoder cannot be read faithfully. "
                "convert it with SAELens and save it there."
            )


class Config:
    """A JSON file's object; values are read with their type."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path, self.values = path, values

    @overload
    def get(self, name: str, kind: type[T], default: T) -> T: ...
    @overload
    def get(self, name: str, kind: type[T], default: None = None) -> T | None: ...

    def get(self, name: str, kind: type[T], default: T | None = None) -> T | None:
        """The value of type `kind`, or `default` where it is left out or null; a whole float counts
        as an int. InputError if it is of another type."""
        value = self.values.get(name)
        if value is None:
            return default
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        wrong = (
            isinstance(value, bool)
            and kind is not bool
            or isinstance(value, float)
            and not math.isfinite(value)
        )
        if wrong or not isinstance(value, kind):
            raise InputError(
                f"{self.path}: {name}: expected {kind.__name__}, got {str(value)[:60]!r}. "
                "get another copy of the file."
            )
        return value

    def need(self, name: str, kind: type[T]) -> T:
        """The value, which must be there."""
        value = self.get(name, kind)
        if value is None:
            raise InputError(
                f"{self.path}: {name} is missing. give the folder that the library wrote."
            )
        return value

    def refuse(self, name: str, why: str) -> NoReturn:
        """InputError that shows the value."""
        raise InputError(f"{self.path}: {name} {str(self.values.get(name))[:60]!r} {why}.")


def read_config(path: Path) -> Config:
    """`Config` of a JSON file, which must hold an object."""
    try:
        values = from_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: not found. give the folder that the library wrote.") from None
    except ValueError:
        raise EnvironmentFailure(f"{path}: is not JSON. get another copy.") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no object. give the folder that the library wrote.")
    return Config(path, values)


def read_safetensors(path: Path) -> Tensors:
    """`Tensors` of a safetensors file. InputError if there is none, EnvironmentFailure if it is
    damaged."""
    if not Path(path).is_file():
        raise InputError(f"{path}: not found. give the folder that the library wrote.")
    try:
        return Tensors(path, load_file(path))
    except SafetensorError as error:
        raise EnvironmentFailure(
            f"{path}: damaged ({str(error)[:100]}). get another copy."
        ) from None


def place_of_hook(name: str | None, where: Path) -> dict[str, Any]:
    """{"layer", "kind", "hook_module"} of a hook's name, {"layer": None} if there is no name.
    InputError if it is a place that is not read here."""
    if not name:
        return {"layer": None}
    if hook_point := HookPoint.parse(name):
        return about_place(hook_point)
    raise InputError(
        f"{where}: was trained on {name[:80]!r}, not on the residual stream or what attention or "
        "MLP add to it. choose another autoencoder."
    )


def about_place(hook_point: HookPoint | None) -> dict[str, Any]:
    """What `Parts.about` says of a place: LAYER_IDX, and HOOK and a module where they differ from
    the stream after a block."""
    if hook_point is None:
        return {"layer": None}
    kind = {} if hook_point.kind == "resid_post" else {"kind": hook_point.kind}
    module = {} if hook_point.module is None else {"hook_module": hook_point.module}
    return {"layer": hook_point.layer, **kind, **module}


def about_tokens(config: Config) -> dict[str, Any]:
    """{"tokens": ...} of what an export of this project says in its metadata of the tokens it is
    for; {} of others' files, whose formats have no place for it."""
    values = config.values.get("metadata")
    if not isinstance(values, dict) or "fastsae_tokens" not in values:
        return {}
    metadata = Config(config.path, values)
    use = metadata.get("fastsae_use_tokens", str, "all")
    if use not in TOKENS_USED:
        metadata.refuse("fastsae_use_tokens", f"is none of {', '.join(TOKENS_USED)}")
    prefix = metadata.get("fastsae_shared_prefix_tokens", int)
    bound = metadata.get("fastsae_max_norm", float)
    return {"tokens": {"max_norm": bound, "use": use, "exclude_shared_prefix": prefix is not None}}


def refuse_other_inputs(cfg: Config) -> None:
    """Refuse inputs that are changed token by token, or by numbers that are not in the folder."""
    kind = cfg.values.get("normalize_activations")
    if kind in ("expected_average_only_in", True, "covariance_whitening"):
        cfg.refuse(
            "normalize_activations",
            "needs numbers that are not in the folder. "
            "load it with SAELens' from_pretrained, which folds "
            "them into the weights, and save it with save_model",
        )
    if kind not in (None, False, "none"):
        cfg.refuse(
            "normalize_activations",
            "scales each token by its own norm, which no linear encoder holds. "
            "choose another autoencoder",
        )
    if cfg.get("reshape_activations", str, "none") != "none":
        cfg.refuse(
            "reshape_activations",
            "is for attention heads, not for the residual stream. choose another autoencoder",
        )
    if cfg.values.get("transcode") or cfg.values.get("skip_connection"):
        cfg.refuse(
            "transcode" if cfg.values.get("transcode") else "skip_connection",
            "makes it a transcoder. choose an autoencoder",
        )


def prefixes_of(
    widths: list[int] | None, m: int, where: Path, name: str = "matryoshka_widths"
) -> list[int] | None:
    """Matryoshka prefixes from a list of lengths, the whole appended where it is left out; None
    without any."""
    if not widths:
        return None
    widths = [*widths, m] if widths[-1] != m else list(widths)
    if not all(isinstance(n, int) and n > 0 for n in widths) or any(
        a >= b for a, b in zip(widths, widths[1:])
    ):
        raise InputError(
            f"{where}: {name} {str(widths)[:60]} do not rise to {m}. get another copy of the file."
        )
    return widths
