"""All three stages on a pretended CUDA device: nothing crosses devices unasked, and nothing is read
before it has arrived."""

import functools
import itertools
import json
import shutil
import sys

import hypothesaes.sae  # noqa: F401  (before the mode is entered)
import numpy as np
import pytest
import torch
import transformers
from conftest import planted_tokens
from pretended_cuda import Refused, device_of, pretended

from fastsae import load_sae
from fastsae.activations import extraction, work
from fastsae.interpretation.llm import client
from fastsae.lm import devices
from fastsae.runtime import distributed
from fastsae.runtime.errors import InputError
from fastsae.sae import initialisation
from fastsae.sae.autoencoder import new_sae, reference_step
from fastsae.sae.dense_step import dense_step
from fastsae.sae.initialisation import initialise
from fastsae.sae.sparse_step import sparse_step
from fastsae.training import loop
from fastsae.training.run import TrainingRun

WORDS = (
    "the bread rose twice while rain fell and we chose a longer road home past seven "
    "quiet houses".split()
)
TRAINING = [
    "--m",
    24,
    "--k",
    2,
    "--n-epochs",
    2,
    "--batch-size",
    64,
    "--dead-after-tokens",
    190,
    "--max-norm-ratio",
    "none",
    "--learning-rate",
    0.01,
]
VARIANTS = {
    "topk": ["--matryoshka-prefixes=none"],
    "matryoshka": ["--matryoshka-prefixes", "8,24"],
    "batchtopk": [
        "--architecture",
        "batchtopk",
        "--matryoshka-prefixes",
        "8,24",
        "--resample-every",
        5,
    ],
    "bfloat16": [
        "--matryoshka-prefixes=none",
        "--select-dtype",
        "bfloat16",
        "fastsae.training.objective.INIT_ENCODER_SCALE=1",
    ],
    "reference": ["--matryoshka-prefixes=none", "fastsae.training.objective.ENGINE=reference"],
    "standard": [
        "--architecture",
        "standard",
        "--matryoshka-prefixes=none",
        "--resample-every",
        5,
        "--sparsity-coefficient",
        0.1,
    ],
    "jumprelu": ["--architecture", "jumprelu", "--matryoshka-prefixes=none", "--resample-every", 5],
    "gated": [
        "--architecture",
        "gated",
        "--matryoshka-prefixes=none",
        "--buffer-tokens",
        300,
        "--sparsity-coefficient",
        0.1,
    ],
}
# by stage 3 as well: the two ways in which features are chosen, topk apart
READ = ("batchtopk", "jumprelu")
SHAPE = {"input_dim": 12, "m_total_neurons": 30, "k_active_neurons": 3, "aux_k": 6}


@pytest.fixture(scope="module")
def small(tmp_path_factory, smol_tokenizer):
    """A folder with a tiny model and a dataset, and the flags that name them."""
    folder = tmp_path_factory.mktemp("pretended")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            pad_token_id=2,
        )
    ).save_pretrained(folder / "model")
    smol_tokenizer.save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    (folder / "texts.jsonl").write_text(
        "".join(
            json.dumps({"text": " ".join(random.choice(WORDS, 3 + i % 9)), "topic": f"t{i % 3}"})
            + "\n"
            for i in range(30)
        )
    )
    return folder, [
        "--dataset-path",
        folder / "texts.jsonl",
        "--model-name",
        folder / "model",
        "--layer-idx",
        1,
        "--run-name",
        "r",
    ]


@pytest.fixture
def run_stages(small, run_main, capsys, monkeypatch):
    """Run all stages, or those named, into a folder; every one must end with 0."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its figure takes longer than a tiny run

    def run(
        out,
        device,
        training=(),
        stages=("extract_activations", "train_sae", "interpret_sae"),
        extraction=("--dtype", "float32"),
    ):
        flags = [*small[1], "--device", device, "--output-dir", out]
        own = {
            "extract_activations": [
                "--batch-tokens",
                200,
                "fastsae.activations.extraction.CHUNK_TOKENS=400",
                *extraction,
            ],
            "train_sae": [*TRAINING, *(training or VARIANTS["matryoshka"])],
            "interpret_sae": [
                "--n-top-neurons",
                0,
                "--label-field",
                "topic",
                "--target-value",
                "t1",
            ],
        }
        for script in stages:
            shared = [*flags[:2], *flags[4:]] if script == "train_sae" else flags
            assert run_main(script, *shared, *own[script]) == 0, capsys.readouterr().err
        return out

    return run


@pytest.fixture
def cpu(tmp_path, small, run_stages):
    """A copy of what all stages give on the CPU."""
    if not (small[0] / "cpu").exists():
        run_stages(small[0] / "cpu", "cpu")
    return shutil.copytree(small[0] / "cpu", tmp_path / "cpu")


@pytest.fixture
def extracted(tmp_path, cpu):
    """A copy of what stage 1 gives on the CPU."""
    return shutil.copytree(cpu / "activations", tmp_path / "extracted" / "activations").parent


def rows_of(folder):
    return np.load(folder / "activations" / "activations_layer1.npz")["activations"].astype(
        np.float64
    )


def trained(folder):
    """(metrics, checkpoint's path) of a run."""
    metrics = json.loads((folder / "checkpoints" / "r" / "metrics.json").read_text())
    return metrics, folder / "checkpoints" / "r" / metrics["checkpoint"]


def distance(a, b):
    """The largest relative difference of a row; NaN where a row holds one."""
    return float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())


@pytest.mark.parametrize("device", ["auto", "cuda:1"])
def test_all_stages_give_what_the_cpu_gives(tmp_path, cpu, run_stages, device):
    with pretended() as machine:
        there = run_stages(tmp_path / "there", device)
    assert (
        machine.launches > 1000
        and machine.current == int(device == "cuda:1")
        and not any(machine.coming)
    )
    assert distance(rows_of(there), rows_of(cpu)) < 2e-3
    (found, _), (expected, _) = trained(there), trained(cpu)
    assert found["device"] == f"cuda:{machine.current}"
    assert found["normalized_mse"] == pytest.approx(expected["normalized_mse"], abs=0.03)
    for name in ("interpretations.html", "interpretations.csv", "interpretations.jsonl"):
        assert (there / name).exists()
    # stage 3 goes on without what a model that fails would tell: it did not
    with (there / "interpretations.jsonl").open() as lines:
        table = json.loads(next(lines))["run_table"]
    assert table["effects"]["n_features"] > 0 and "recovered" in table["model_loss"]


def test_the_defaults_of_precision(tmp_path, cpu, run_stages):
    """bfloat16 on CUDA, in several layers' worth of batches, prefix and all; within the rounding of
    it."""
    with pretended():
        there = run_stages(
            tmp_path / "there", "cuda", stages=["extract_activations"], extraction=[]
        )
    assert (
        json.loads((there / "activations" / "activations_layer1.json").read_text())["compute_dtype"]
        == "bfloat16"
    )
    assert distance(rows_of(there), rows_of(cpu)) < 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_trains_and_is_read(tmp_path, extracted, run_stages, variant):
    shutil.copytree(extracted, tmp_path / "there")
    expected = trained(run_stages(extracted, "cpu", VARIANTS[variant], ["train_sae"]))[0]
    stages = ["train_sae", "interpret_sae"] if variant in READ else ["train_sae"]
    with pretended():
        there = run_stages(tmp_path / "there", "cuda", VARIANTS[variant], stages)
    found, path = trained(there)
    assert found["normalized_mse"] == pytest.approx(expected["normalized_mse"], rel=0.1, abs=0.03)
    assert torch.load(path, weights_only=True)["state_dict"]["encoder.weight"].device.type == "cpu"


@pytest.mark.parametrize("variant", ["batchtopk", "gated"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path, extracted, run_stages, run_main, small, monkeypatch, variant
):
    for name in ("whole", "stopped"):
        shutil.copytree(extracted, tmp_path / name)
    step, n_steps = loop.one_step, []

    def stop_at_5(*arguments):
        n_steps.append(1)
        if len(n_steps) == 5:
            monkeypatch.setattr(loop, "stop_asked", lambda: True)
        step(*arguments)

    with pretended():
        expected = trained(
            run_stages(tmp_path / "whole", "cuda", VARIANTS[variant], ["train_sae"])
        )[1]
        with monkeypatch.context() as patch:
            patch.setattr(loop, "one_step", stop_at_5)
            flags = [
                *small[1][:2],
                *small[1][4:],
                "--device",
                "cuda",
                "--output-dir",
                tmp_path / "stopped",
            ]
            assert run_main("train_sae", *flags, *TRAINING, *VARIANTS[variant]) == 130
        monkeypatch.setattr(loop, "stop_asked", lambda: False)
        assert list((tmp_path / "stopped").rglob("*.resume.pt")) and len(n_steps) == 5
        found = trained(run_stages(tmp_path / "stopped", "cuda", VARIANTS[variant], ["train_sae"]))[
            1
        ]
    assert found.read_bytes() == expected.read_bytes()


def test_in_python_on_cuda(cpu):
    path = trained(cpu)[1]
    expected = load_sae(path).features_of("the bread rose twice")
    x = rows_of(cpu)[:5].astype(np.float32)
    with pretended():
        for device in ("cuda", "cuda:1"):
            sae = load_sae(path, device=device)
            found = sae.features_of("the bread rose twice")
            features = sae.encode(x)
            assert device_of(features).type == "cuda" and device_of(
                sae.decode(features)
            ) == device_of(features)
            with pytest.raises(Refused, match="to numpy"):
                features.numpy()
            for there, here in zip(found, expected):
                assert (there.token, there.used, len(there.features)) == (
                    here.token,
                    here.used,
                    len(here.features),
                )


# Each bug, put back, is seen


def test_a_device_without_a_number_is_seen(
    tmp_path, extracted, run_main, small, monkeypatch, capsys
):
    """As stage 2 did: `cuda` itself was made the current device."""
    monkeypatch.setattr(devices, "choose_device", lambda setting: torch.cuda.set_device("cuda"))
    with pretended():
        assert (
            run_main(
                "train_sae",
                *small[1][:2],
                *small[1][4:],
                "--output-dir",
                extracted,
                *TRAINING,
                *VARIANTS["topk"],
            )
            == 1
        )
    assert "Expected a torch.device with a specified index" in capsys.readouterr().err


def test_an_event_of_another_device_is_seen(tmp_path, cpu, run_stages, monkeypatch):
    """As stage 1 did: the event went with the current device, which nobody had set."""

    def copied(self):
        event = torch.cuda.Event()
        event.record()
        return event

    monkeypatch.setattr(devices, "choose_device", lambda setting: setting)
    with pretended():
        # whatever the current device is
        good = run_stages(tmp_path / "good", "cuda:1", stages=["extract_activations"])
        assert distance(rows_of(good), rows_of(cpu)) < 2e-3
        monkeypatch.setattr(extraction.Forward, "_copied", copied)
        good = run_stages(tmp_path / "0", "cuda:0", stages=["extract_activations"])
        assert distance(rows_of(good), rows_of(cpu)) < 2e-3
        with pytest.raises(AssertionError):  # NaN among the norms, or in the rows
            bad = run_stages(tmp_path / "1", "cuda:1", stages=["extract_activations"])
            assert distance(rows_of(bad), rows_of(cpu)) < 2e-3


def test_rows_of_the_prefix_that_are_on_their_way_are_seen(tmp_path, cpu, run_stages, monkeypatch):
    stored = extraction.stored
    monkeypatch.setattr(extraction, "stored", lambda *arguments, pin: stored(*arguments, pin=True))
    with pretended(), pytest.raises(AssertionError):
        bad = run_stages(tmp_path / "0", "cuda:0", stages=["extract_activations"])
        assert distance(rows_of(bad), rows_of(cpu)) < 2e-3


def planted_mismatches(x):
    yield lambda: x + torch.ones(4)
    yield lambda: torch.ones(4)[torch.zeros(2, dtype=torch.long, device="cuda")]
    yield lambda: x.numpy()
    yield lambda: np.asarray(x)
    yield lambda: torch.from_numpy(np.ones(4, np.float32)) * x
    yield lambda: torch.cat([x, torch.ones(4)])
    yield lambda: x.index_add(0, torch.zeros(4, dtype=torch.long), x)
    yield lambda: torch.ones(4) * x.sum()
    yield lambda: x + torch.ones(4, device="cuda:1")
    yield lambda: torch.randn(4, device="cuda", generator=torch.Generator())
    yield lambda: torch.ones(4, device="cuda:2")
    yield lambda: torch.nn.Linear(4, 4)(x)


def test_planted_mismatches_are_refused():
    with pretended():
        x = torch.ones(4, device="cuda")
        for mismatch in planted_mismatches(x):
            with pytest.raises((Refused, TypeError)):
                mismatch()
        # scalars and indices of the CPU's are fine
        assert float((x * torch.tensor(2.0) + x[torch.tensor([1])]).sum()) == 12.0


def test_a_mismatch_in_a_step_is_refused():
    with pretended():
        run = TrainingRun(SHAPE, torch.randn(40, 12), seed=0, device="cuda", learning_rate=0.01)
        with pytest.raises(Refused, match="two devices|same device"):
            run.step(
                functools.partial(sparse_step, aux_coef=0.0),
                torch.randn(40, 12),
                learning_rate=0.01,
                dead_after=10,
                clip_grad=1.0,
            )


# Deterministic mode, waits, and devices that are not there


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("centre", "directions"),
    list(
        itertools.product(
            ["median", "mean", "geometric_median"],
            ["xavier", "kaiming", "orthogonal", "data", "mixed"],
        )
    ),
)
def test_every_start_in_deterministic_mode(deterministic, centre, directions):
    x = torch.from_numpy(planted_tokens(60, 12, 30, 3)[0])
    here = new_sae(SHAPE)
    initialise(here, x, 3, centre=centre, directions=directions, encoder_scale=None)
    with pretended():
        there = new_sae(SHAPE, "cuda")
        initialise(there, x.to("cuda"), 3, centre=centre, directions=directions, encoder_scale=None)
        for name, value in there.state_dict().items():
            torch.testing.assert_close(value.cpu(), here.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_steps_in_deterministic_mode(deterministic):
    steps = {
        "topk": functools.partial(sparse_step, aux_coef=0.1),
        "batchtopk": functools.partial(sparse_step, aux_coef=0.1),
        **{
            name: functools.partial(dense_step, sparsity=0.1, bandwidth=0.5, target_l0=None)
            for name in ("standard", "jumprelu", "gated")
        },
    }
    for name, step in steps.items():
        with pretended():
            x = torch.randn(40, 12).to("cuda")
            run = TrainingRun(
                {**SHAPE, "architecture": name}, x, seed=0, device="cuda", learning_rate=0.01
            )
            for _ in range(2):
                run.step(step, x, learning_rate=0.01, dead_after=40, clip_grad=1.0)
            assert bool(run.loss_sum.isfinite())


def test_the_median_that_deterministic_mode_refuses_is_seen(deterministic, monkeypatch):
    monkeypatch.setattr(initialisation, "median", lambda x: x.median(dim=0).values)
    with (
        pretended(),
        pytest.raises(Refused, match="median does not have a deterministic implementation"),
    ):
        initialise(new_sae(SHAPE, "cuda"), torch.randn(40, 12).to("cuda"), 0)


@pytest.mark.parametrize("n", [1, 2, 40, 41])
def test_the_median_is_one_number_on_every_device(n):
    x = torch.randn(n, 700, generator=torch.Generator().manual_seed(n)).round(decimals=1)
    with pretended():
        found = initialisation.median(x.to("cuda")).cpu()
    assert torch.equal(found, x.median(dim=0).values)


@pytest.mark.parametrize(
    ("name", "options", "bound"),
    [
        ("topk", {}, 2),
        ("matryoshka", {"prefix_lengths": [10, 30]}, 3),
        ("batchtopk", {"architecture": "batchtopk"}, 6),
    ],
)
def test_how_often_the_host_waits_in_a_step(name, options, bound):
    """The present code's figures: to be lowered with it."""
    with pretended() as machine:
        x = torch.randn(40, 12).to("cuda")
        run = TrainingRun({**SHAPE, **options}, x, seed=0, device="cuda", learning_rate=0.01)
        for _ in range(2):
            machine.waits.clear()
            run.step(
                functools.partial(sparse_step, aux_coef=0.1),
                x,
                learning_rate=0.01,
                dead_after=10**9,
                clip_grad=1.0,
            )
    assert sum(machine.waits.values()) <= bound, machine.waits


@pytest.mark.parametrize("flags", [[], ["--no-use-chat-template"]], ids=["prefix", "no prefix"])
def test_no_batch_of_stage_1_waits_for_the_device(tmp_path, small, run_stages, monkeypatch, flags):
    """Overflow and norms are read one batch late, and no pass looks for packed sequences."""
    waits, run_model = [], work.Work.run_model

    def watched(self, world):
        assert bool(self.forward.n_prefix) == (not flags)
        before = machine.waits.copy()
        run_model(self, world)
        waits.append(machine.waits - before)

    monkeypatch.setattr(work.Work, "run_model", watched)
    with pretended() as machine:
        run_stages(tmp_path, "cuda", stages=["extract_activations"], extraction=flags)
    assert waits == [{}]


def test_the_reference_step_runs():
    with pretended():
        x, dead = torch.randn(40, 12).to("cuda"), (torch.arange(30) < 3).to("cuda")
        sae = new_sae(SHAPE, "cuda").eval()
        initialise(sae, x, 0)
        loss, fired = reference_step(sae, x, dead, aux_coef=0.1)
        other, _ = sparse_step(sae, x, dead, aux_coef=0.1)
        assert (
            float(loss) == pytest.approx(float(other), rel=1e-4) and device_of(fired).type == "cuda"
        )


@pytest.mark.parametrize(
    ("setting", "local_rank", "expected"),
    [
        ("auto", None, "cuda:0"),
        ("cuda", None, "cuda:0"),
        ("cuda:1", None, "cuda:1"),
        ("cuda:01", None, "cuda:1"),
        ("cuda", 1, "cuda:1"),
        ("auto", 1, "cuda:1"),
        ("cuda", 3, "cuda:1"),
        ("cuda:0", 1, "cuda:0"),
        ("cpu", 1, "cpu"),
    ],
)
def test_each_process_of_a_machine_has_its_device(monkeypatch, setting, local_rank, expected):
    """Counted among the devices that it sees: a job system may show each process one only."""
    if local_rank is not None:
        for name, value in (
            ("RANK", local_rank),
            ("WORLD_SIZE", 4),
            ("LOCAL_RANK", local_rank),
            ("LOCAL_WORLD_SIZE", 4),
        ):
            monkeypatch.setenv(name, str(value))
    with pretended() as machine:
        assert devices.choose_device(setting) == expected
        assert machine.current == int(expected == "cuda:1")
        distributed.torch.cuda.set_device(0)


@pytest.mark.parametrize("setting", ["cuda:2", "cuda:99999999999999999999"])
def test_a_device_beyond_those_seen(setting):
    with (
        pretended(),
        pytest.raises(
            InputError,
            match=f"^DEVICE: {setting} is not available here; PyTorch sees 2 CUDA devices, counted",
        ),
    ):
        devices.choose_device(setting)


def test_a_device_that_cannot_be_used(outcome, monkeypatch):
    def refuse(device):
        raise RuntimeError(
            "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors "
            "might be ..."
        )

    with pretended():
        monkeypatch.setattr(torch.cuda, "set_device", refuse)
        code, lines = outcome(lambda: devices.choose_device("auto"))
    assert code == 3 and lines == [
        "error: DEVICE: cuda:0 cannot be used (CUDA error: all CUDA-capable devices are busy "
        "or unavailable). "
        "look at nvidia-smi, choose another --device, or --device cpu."
    ]


def test_other_ways_in(tmp_path, cpu, extracted, small, run_stages, run_main, capsys):
    """--text, a local interpreter, training that starts from an autoencoder, loading others'
    formats."""
    path = trained(cpu)[1]
    flags = [*small[1], "--device", "auto"]
    with pretended() as machine:
        assert (
            run_main("interpret_sae", *flags, "--output-dir", cpu, "--text", "the bread rose") == 0
        )
        assert "bread" in capsys.readouterr().out.split("activation  label")[1]
        backend = client.choose_backend(f"local:{small[0] / 'model'}", timeout=1, device="cuda:1")
        text, status, usage = backend.complete("What is bread?")
        assert (
            (text is None) == (status is not None)
            and usage["prompt_tokens"] > 3
            and backend.device == "cuda:1"
        )
        assert machine.current == 1
        there = run_stages(
            extracted,
            "cuda",
            [*VARIANTS["matryoshka"], "--init-from", path, "--export", "saelens"],
            ["train_sae"],
        )
        assert trained(there)[0]["normalized_mse"] < 1
        (exported,) = (there / "checkpoints" / "r").rglob("cfg.json")
        sae = load_sae(exported.parent, device="cuda")
        assert device_of(sae.encode(np.ones((2, 8), np.float32))).type == "cuda"
