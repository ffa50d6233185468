"""What transformers loads: with no code that comes with a model, and with failures as one line that
says what to do."""

import contextlib
import errno
import io
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fastsae.lm.names import EMBEDDED
from fastsae.runtime.errors import EnvironmentFailure, InputError
from fastsae.runtime.machine_errors import cause_in_machine

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


def quiet_transformers() -> ModuleType:
    """The module `transformers`, imported on first use, without its bars and warnings."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers

    transformers.logging.set_verbosity_error()
    # it reports every retry of a hub that cannot be reached
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return transformers


def gguf_options(transformers: ModuleType) -> dict[str, Any]:
    """Options of `from_pretrained` for .gguf files: transformers >= 5.20 keeps their weights packed
    unless asked to dequantise, earlier versions always dequantise."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def hub_options(revision: str | None, cache_dir: str | None) -> dict[str, str | None]:
    """Options of `from_pretrained` for models on the hub."""
    return {
        "revision": revision or "main",
        "cache_dir": str(Path(cache_dir) / "hub") if cache_dir else None,
    }


def read_pretrained(loader: Callable, located: str, name: str, **options: Any) -> Any:
    """What `loader`, a `from_pretrained`, makes of the folder, .gguf file or hub id `located`.

    Its failures become InputError or EnvironmentFailure, one line that names the model as the user
    did, `name`. Running out of memory stays the RuntimeError that it is.
    """
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
                f"MODEL_NAME: {name} is gated. accept its licence on its hub page, "
                "then run: hf auth login."
            ) from None
        if isinstance(error, RuntimeError) and (
            "OutOfMemory" in chain[0] or "not enough memory" in brief
        ):
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentFailure(
                f"MODEL_NAME: {name} could not be stored ({brief}). "
                "free some space, or set --cache-dir."
            ) from None
        if isinstance(error, ImportError):
            raise EnvironmentFailure(
                f"MODEL_NAME: {name} needs a package that is missing ({brief}). pip install it."
            ) from None
        if cause := cause_in_machine(error, missing=False):
            raise cause from None
        if set(NETWORK_ERRORS) & set(chain) and not path.exists():
            raise EnvironmentFailure(
                f"MODEL_NAME: {name} is not in the local cache and the hub cannot be reached. "
                f"connect, give a local folder with --model-name, or use {EMBEDDED}."
            ) from None
        raise InputError(
            f"MODEL_NAME: {name} could not be loaded ({brief}). "
            "give a hub id, a folder with a causal decoder, or a .gguf file."
        ) from None
