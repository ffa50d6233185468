"""What stands beside a checkpoint: figures and curves; and TensorBoard or Weights & Biases if asked
for."""

import importlib.util
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsae.runtime import artifacts, storage
from fastsae.runtime.errors import EnvironmentFailure, InputError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def write_beside(path: Path, meta: Mapping[str, Any], beside: Callable[[str], Path]) -> None:
    """What stands beside the checkpoint at `path`, where it is of another one or of an earlier
    time; an unfinished state goes.

    `beside(name)` is the path of metrics.json and the like.
    """
    write_if_different(beside("metrics.json"), {"checkpoint": path.name, **meta["metrics"]})
    curves, history = beside("metrics.jsonl"), meta.get("history", [])
    if history and not (curves.exists() and curves.read_bytes() == lines_of(history).encode()):
        write_figure(beside("training.png"), history)
        artifacts.write_text(curves, lines_of(history))
    storage.remove(path.with_suffix(".resume.jsonl"))
    if of_other_settings(path.with_suffix(".resume.pt"), meta["fingerprint"]):
        print(
            f"unfinished: {path.with_suffix('.resume.pt')} is of a run with other settings. "
            "its command goes on from it; or delete it."
        )
        return
    storage.remove(path.with_suffix(".resume.pt"))


def of_other_settings(state_path: Path, fingerprint: str) -> bool:
    """Whether the state of an unfinished run is whole, and of another run than the one with this
    fingerprint."""
    try:
        return (
            state_path.exists()
            and artifacts.read_checkpoint(state_path)["fingerprint"] != fingerprint
        )
    except (EnvironmentFailure, KeyError, TypeError):
        return False


def lines_of(history: Sequence[Mapping[str, Any]]) -> str:
    """JSON lines, one for each epoch of the history."""
    return "".join(json.dumps(line) + "\n" for line in history)


def write_if_different(metrics_path: Path, figures: Mapping[str, Any]) -> None:
    """Write `figures` to metrics.json unless they are there: it may speak of another checkpoint, or
    of an older one."""
    right = json.loads(artifacts.to_json(figures))
    try:
        found = artifacts.from_json(metrics_path.read_bytes())
        same = all(found.get(name) == value for name, value in right.items())
    except (OSError, ValueError, AttributeError):
        same = False
    if not same:
        artifacts.write_json(metrics_path, right)


def write_figure(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """The curves of `history` (one dict per epoch) as a PNG: loss, normalised MSE of each prefix,
    L0, dead features."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no {path.name}: matplotlib is not installed. pip install matplotlib.")
        return
    from matplotlib.figure import Figure

    epochs = [line["epoch"] for line in history]
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flatten()
    panels[0].plot(epochs, [line["loss"] for line in history], label="training")
    if "validation_loss" in history[0]:
        panels[0].plot(epochs, [line["validation_loss"] for line in history], label="validation")
    for end in history[0]["prefix_normalized_mse"]:
        panels[1].plot(
            epochs,
            [line["prefix_normalized_mse"][end] for line in history],
            label=f"{end} features",
        )
    panels[2].plot(epochs, [line["l0"] for line in history])
    panels[3].plot(epochs, [100 * line["dead_fraction_training"] for line in history])
    for panel, title in zip(
        panels, ("loss", "normalised MSE, validation", "L0, validation", "dead features, %")
    ):
        panel.set_title(title)
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=0) if title != "loss" else None
    for panel in panels[:2]:
        panel.legend(frameon=False)
    for panel in panels[2:]:
        panel.set_xlabel("epoch")
    save_figure(path, figure)


def save_figure(path: Path, figure: Any) -> None:
    """A matplotlib figure as a PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    with artifacts.committed(path) as file:
        file.write(content.getvalue())


def open_logger(
    name: str, folder: Path, run_name: str, settings: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], Any]:
    """A function that takes the line of an epoch; `name` is none, tensorboard or wandb. InputError
    if that is not installed."""
    if name == "none":
        return lambda line: None
    if importlib.util.find_spec(PACKAGES[name]) is None:
        raise InputError(
            f"LOGGER: {name} is not installed. pip install {PACKAGES[name]}, or give --logger none."
        )
    if name == "wandb":
        import wandb

        storage.make_folder(folder)
        try:
            run = wandb.init(
                project="fastsae",
                name=run_name,
                dir=folder,
                config=dict(settings),
                reinit="create_new",
            )
        except wandb.Error as error:
            what = str(error).splitlines()[0].rstrip(".")
            raise InputError(
                f"LOGGER: wandb: {what}. run `wandb login`, or set WANDB_MODE=offline."
            ) from None
        return lambda line: run.log(_flat(line), step=line["epoch"])
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard" / run_name)

    def log(line):
        for key, value in _flat(line).items():
            writer.add_scalar(key, value, line["epoch"])
        writer.flush()

    return log


def _flat(line):
    flat = {f"normalized_mse/{end}": value for end, value in line["prefix_normalized_mse"].items()}
    return {
        **flat,
        **{
            name: value
            for name, value in line.items()
            if isinstance(value, (int, float)) and name != "epoch"
        },
    }
