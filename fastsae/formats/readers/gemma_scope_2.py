"""Gemma Scope 2, on Gemma 3: params.safetensors, JumpReLU without b_dec in front, with a
config.json beside it that names the place (where it is missing, the folders' names do)."""

import os
import re
from pathlib import Path

from fastsae.formats.parts import Config, Parts, about_place, read_config, read_safetensors
from fastsae.formats.readers.gemma_scope import parts_of
from fastsae.lm.hook_points import HookPoint
from fastsae.runtime.errors import InputError

NOT_READ = re.compile(r"transcoder|clt|attn_out")  # in the folders' names
# what Gemma 3's MLP adds to the stream, after the norm behind it
MLP = "post_feedforward_layernorm"


def read(path: Path) -> Parts:
    """`Parts` of params.safetensors with its config.json."""
    config_path = path.with_name("config.json")
    config = read_config(config_path) if config_path.is_file() else Config(config_path, {})
    where = os.path.abspath(path)
    if config.get("architecture", str, "jump_relu") != "jump_relu":
        config.refuse("architecture", "is not jump_relu. choose another autoencoder")
    place = _place(config, where)
    parts = parts_of(read_safetensors(path), "w_enc", "w_dec")
    parts.about = {
        "format": "gemma scope 2",
        **about_place(place),
        "hook_name": config.get("hf_hook_point_in", str),
        "model_name": _model(config.get("model_name", str)),
    }
    return parts.centre_input()


def _place(config, where):
    """The HookPoint; None where nothing says the layer."""
    hook = config.get("hf_hook_point_in", str)
    if config.values.get("hf_hook_point_out") or (not hook and NOT_READ.search(_folders(where))):
        raise _refused(where, hook or "a transcoder or attention's heads")
    if not hook:
        if not (found := re.findall(r"layer_(\d+)", where)):
            return None
        is_mlp = "mlp_out" in _folders(where)
        hook = f"model.layers.{found[-1]}{f'.{MLP}' * is_mlp}.output"
    name = hook.removesuffix(".output")
    if name.endswith(f".{MLP}") and (block := HookPoint.parse(name.removesuffix(f".{MLP}"))):
        return HookPoint(block.layer, "mlp_out", module=MLP)
    if name == hook or (place := HookPoint.parse(name)) is None:
        raise _refused(where, hook)
    return place


def _folders(where):
    return "/".join(Path(where).parts[-4:-1])


def _refused(where, hook):
    return InputError(
        f"{where}: was trained on {hook[:80]}, not on the residual stream or what the MLP adds to "
        "it. choose one of resid_post or mlp_out."
    )


def _model(name):
    """The hub's name of a model as the configs spell it (gemma-v3-1b-pt)."""
    if name is None:
        return None
    name = name.replace("-v3", "-3")
    return name if "/" in name else f"google/{name}"
