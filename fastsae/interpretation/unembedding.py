"""From a residual stream to logits: the model's final norm and head as one matrix.

Every causal decoder ends in logits = scale * head(norm(x)), perhaps with a projection between, and
perhaps squeezed into a range. How exactly is found by trying: the end of the model is built with
small random weights, without its blocks, and compared with candidates.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsae.lm.decoders import decoder_stack
from fastsae.runtime.machine_errors import cause_in_machine

# other names of the head's tensor in files, from before transformers unified them
HEADS = ("lm_head", "embed_out", "output_projection")
PROJECTION = "project_out"  # between norm and head, where the embedding is narrower (OPT-350M)
VOCABULARY = 16  # of the model that is tried
HEAD_SIZE = 1e-3  # of its head's weights: a squeezed logit is then still linear


@dataclass(frozen=True)
class Form:
    """How logits follow from the stream: scale * head @ projection @ ((weight + offset) * x / size
    of x).

    `centred`: the norm subtracts the mean first, and the size is the standard deviation; else it is
    the root of the mean square. Names are those of tensors in the model; `weight` and `projection`
    are None where there is none. Biases are left out: they are the same for every direction.
    """

    head: str
    embedding: str
    weight: str | None
    projection: str | None
    offset: int
    centred: bool
    scale: float


def load_unembedding(
    located: Path | str, *, revision: str | None = None, cache_dir: Path | str | None = None
) -> torch.Tensor | None:
    """The matrix (vocabulary, d) float32 that gives a direction's logits, the final norm's weights
    and the head's scale folded in; None where the weights are not at hand.

    Logits are as they are before they are squeezed into a range (Gemma 2), which keeps their order.
    None too for a model that ends in another way than `Form` can say. Reads the tensors that it
    needs only, from a folder or the hub's local cache; nothing is downloaded.
    """
    folder = local_folder(located, revision, cache_dir)
    form = _form_in(folder) if folder is not None else None
    if folder is None or form is None:
        return None
    files = _tensor_files(folder)
    names = [form.head, *(f"{head}.weight" for head in HEADS), form.embedding]
    # tied models store no head of their own
    head = next((found for name in names if (found := _find(files, name))), None)
    wanted = [_find(files, name) for name in (form.weight, form.projection) if name]
    if head is None or None in wanted:
        return None
    return _folded(
        form,
        _read(files, head).float(),
        _read(files, _find(files, form.weight)).float() if form.weight else None,
        _read(files, _find(files, form.projection)).float() if form.projection else None,
    )


def _folded(form, head, weight, projection):
    """One matrix (vocabulary, d) of head (vocabulary, d_out), weight (d,) or None, and projection
    (d_out, d) or None; None where the shapes do not fit."""
    if projection is not None:
        head = head @ projection if head.shape[1] == len(projection) else None
    if head is None or (weight is not None and head.shape[1] != len(weight)):
        return None
    matrix = head if weight is None else head * (weight + form.offset)
    if form.centred:
        matrix = matrix - matrix.mean(1, keepdim=True)
    return matrix if form.scale == 1 else matrix * form.scale


def _form_in(folder):
    """The Form of the model in a folder; None for one that transformers does not know, or whose end
    is another."""
    from fastsae.lm.loading import load_config

    try:
        return form_of(load_config(str(folder), whole=True))
    # configurations and models raise what their authors chose; the lens is an extra, the stage
    # goes on without it
    except Exception:
        return None


@torch.no_grad()
def form_of(config: Any) -> Form | None:
    """How logits follow from the stream in the model of this configuration; None where no candidate
    gives the model's own logits. No weights are read."""
    model, decoder = _end_of_model(config)
    norm, head = decoder.norm, model.get_output_embeddings()
    if norm is None or not isinstance(head, torch.nn.Linear):
        return None
    extra = getattr(decoder.module, PROJECTION, None)
    names = {module: name for name, module in model.named_modules()}
    weight = getattr(norm, "weight", None)
    generator = torch.Generator().manual_seed(0)
    # (1, VOCABULARY, d), large beside any eps, and with a mean
    x = 100 * torch.randn(1, VOCABULARY, decoder.config.hidden_size, generator=generator) + 50
    logits = _logits_of(model, norm, x)
    for offset, centred in _candidates(weight is not None):
        form = Form(
            head=f"{names[head]}.weight",
            embedding=f"{names[model.get_input_embeddings()]}.weight",
            weight=None if weight is None else f"{names[norm]}.weight",
            projection=None if extra is None else f"{names[extra]}.weight",
            offset=offset,
            centred=centred,
            scale=1,
        )
        matrix = _folded(form, head.weight, weight, None if extra is None else extra.weight)
        found = sized(x, centred=centred) @ matrix.t()
        scale = float((found * logits).sum() / found.square().sum())
        if torch.allclose(logits, scale * found, rtol=0, atol=1e-3 * float(logits.abs().max())):
            # a factor of 1 is found up to rounding, and must not change what it multiplies
            return dataclasses.replace(form, scale=1 if abs(scale - 1) < 1e-3 else scale)
    return None


def sized(x: torch.Tensor, *, centred: bool) -> torch.Tensor:
    """x (..., d) divided by its size, as the norm of a `Form` does before its weights."""
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt()


def _candidates(has_weight: bool) -> Iterator[tuple[int, bool]]:
    """(offset, centred) of the norms there are."""
    for centred in (False, True):
        yield from ((offset, centred) for offset in ((0, 1) if has_weight else (0,)))


def _end_of_model(config):
    """(model, its Decoder) with random weights, without blocks and with few tokens."""
    import transformers

    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.vocab_size, text.pad_token_id = VOCABULARY, None
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    decoder = decoder_stack(model)
    decoder.keep_first(0)
    generator = torch.Generator().manual_seed(1)
    for module in (decoder.module, model.get_output_embeddings()):
        module.to_empty(device="cpu").float()
        for name, parameter in module.named_parameters():
            random = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(torch.zeros_like(random) if name.endswith("bias") else random)
    model.get_output_embeddings().weight.mul_(HEAD_SIZE)
    return model.eval(), decoder


def _logits_of(model, norm, x):
    """The model's own logits (1, tokens, vocabulary) of a stream x (1, tokens, d)."""
    hook = norm.register_forward_pre_hook(lambda _, arguments: (x, *arguments[1:]))
    try:
        return model(input_ids=torch.arange(x.shape[1])[None], use_cache=False).logits
    finally:
        hook.remove()


def local_folder(
    located: Path | str, revision: str | None, cache_dir: Path | str | None
) -> Path | None:
    """The folder of a model's weights: `located` itself, or that in the hub's local cache; None
    where there is none. Nothing is downloaded."""
    path = Path(located)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return None
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                str(located),
                revision=revision or "main",
                local_files_only=True,
                cache_dir=str(Path(cache_dir) / "hub") if cache_dir else None,
            )
        )
    # not in the cache: the lens is an extra, the stage goes on without it
    except (OSError, ValueError) as error:
        if cause := cause_in_machine(error, missing=False):
            raise cause from None
        return None


def _tensor_files(folder):
    """{tensor name: file} of a folder of safetensors."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    return found


def _find(files, name):
    """The tensor of a file that has a model's name, or most of its end: files can lack what the
    model's class puts before, as `transformer.`; None without one."""
    parts = name.split(".")
    best, most = None, min(1, len(parts) - 1)
    for each in files:
        theirs = each.split(".")
        shared = 0
        while shared < min(len(parts), len(theirs)) and parts[-1 - shared] == theirs[-1 - shared]:
            shared += 1
        if shared > most and not any(
            part.isdigit() or "vision" in part or "audio" in part for part in theirs
        ):
            best, most = each, shared
    return best


def _read(files, name):
    from safetensors import safe_open

    with safe_open(str(files[name]), "pt") as tensors:
        return tensors.get_tensor(name)
