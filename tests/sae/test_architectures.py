"""Standard, JumpReLU and Gated: steps by hand and against SAELens (if installed), normalisation
folded away, whole runs."""

import ast
import functools
import json

import pytest
import torch
from conftest import planted_tokens
from small import small
from source_tree import PROJECT, python_files

from fastsae.formats.load import load_sae
from fastsae.sae import products
from fastsae.sae.architectures import REGISTRY
from fastsae.sae.architectures.aligned import aligned
from fastsae.sae.architectures.jumprelu import Jump
from fastsae.sae.autoencoder import decode, encode, inference_form, new_sae, reference_step
from fastsae.sae.dense_step import dense_step
from fastsae.sae.initialisation import initialise
from fastsae.sae.normalisation import Normalisation, choose_normalisation
from fastsae.sae.sparse_step import sparse_step
from fastsae.settings.architectures import ARCHITECTURES, DENSE, FOLDER


def make(architecture, d=12, m=40, k=4, seed=0):
    torch.manual_seed(seed)
    sae = new_sae(
        {
            "input_dim": d,
            "m_total_neurons": m,
            "k_active_neurons": k,
            "aux_k": 0,
            "architecture": architecture,
        }
    ).eval()
    x = torch.randn(60, d) * torch.linspace(0.5, 3, d) + 1
    initialise(sae, x, seed, encoder_scale=None)
    with torch.no_grad():
        for name in ("neuron_bias", "gate_bias", "log_magnitude"):
            if hasattr(sae, name):
                getattr(sae, name).normal_(0, 0.3)
        sae.encoder.weight.add_(0.1 * torch.randn_like(sae.encoder.weight))
    return sae, x


def dense_features(sae, x):
    """By the definition of each architecture, as a dense matrix."""
    pre = (x - sae.input_bias) @ sae.encoder.weight.t()
    if sae.architecture == "gated":
        return (pre + sae.gate_bias > 0) * torch.relu(
            pre * sae.log_magnitude.exp() + sae.neuron_bias
        )
    pre = pre + sae.neuron_bias
    return pre * (pre > sae.threshold) if sae.architecture == "jumprelu" else torch.relu(pre)


@pytest.mark.parametrize("onednn", [True, False])
def test_a_product_has_the_gradients_of_torchs(onednn, monkeypatch):
    """Of both sides, or of one alone; the weight may be a transpose, as the decoder's is."""
    monkeypatch.setattr(products, "HAS_ONEDNN", onednn and products.HAS_ONEDNN)
    torch.manual_seed(0)
    sides = [torch.randn(9, 5), torch.randn(5, 7).t(), torch.randn(9, 7)]  # x, weight, gradient
    for needed in ([True, True], [True, False], [False, True]):
        x, weight = (t.clone().requires_grad_(n) for t, n in zip(sides, needed))
        expected = torch.nn.functional.linear(x, weight)
        found = products.product(x, weight)
        torch.testing.assert_close(found, expected)
        wanted = [t for t in (x, weight) if t.requires_grad]
        torch.testing.assert_close(
            torch.autograd.grad(found, wanted, sides[2]),
            torch.autograd.grad(expected, wanted, sides[2]),
        )


@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize("rows", [7, 30])
def test_blocks_of_a_batch_add_up_to_it(architecture, rows, monkeypatch):
    """Also where the last one is smaller; JumpReLU's aim is of each token, so it adds up too."""
    options = {"sparsity": 0.3, "bandwidth": 0.5, "target_l0": 4}
    results = []
    for size in (1000, rows):
        sae, x = make(architecture)
        monkeypatch.setattr("fastsae.sae.dense_step.BLOCK_ROWS", size)
        loss, fired = dense_step(sae, x, None, **options)
        results.append([loss, fired, *(p.grad for p in sae.parameters())])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "normalisation",
    [Normalisation(), Normalisation(None, 0.2), Normalisation(torch.arange(12.0), 3.0)],
    ids=["none", "norm", "both"],
)
@pytest.mark.parametrize("architecture", [*DENSE, "topk", "batchtopk"])
def test_the_saved_form_takes_raw_activations(architecture, normalisation):
    """Features of the form are those of the trained one over the scale, reconstructions are those
    of the trained one mapped back."""
    sae, x = make(architecture)
    if architecture == "batchtopk":
        sae.threshold.fill_(1.5)
    form = inference_form(sae, normalisation)
    raw = x / normalisation.scale + (0 if normalisation.mean is None else normalisation.mean)
    torch.testing.assert_close(normalisation(raw), x, rtol=1e-4, atol=1e-4)
    entries = encode(form, raw)
    found = torch.zeros(len(x), 40)
    found[entries.row, entries.column] = entries.value.detach()
    if architecture in DENSE:
        expected = dense_features(sae, x).detach()
    else:
        of_sae, expected = encode(sae, x), torch.zeros(len(x), 40)
        expected[of_sae.row, of_sae.column] = of_sae.value.detach()
    torch.testing.assert_close(found * normalisation.scale, expected, rtol=1e-3, atol=1e-4)
    reconstruction = expected @ sae.decoder.weight.detach().t() + sae.input_bias.detach()
    torch.testing.assert_close(
        normalisation(decode(form, entries)).detach(), reconstruction, rtol=1e-3, atol=1e-3
    )


def test_normalisation_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])  # lengths 5, 0, 10: mean 5
    norm = choose_normalisation("norm", x)
    assert norm.mean is None and norm.scale == pytest.approx(2**0.5 / 5)
    assert choose_normalisation("mean", x).mean.tolist() == [3, 4]
    both = choose_normalisation("both", x)  # centred: lengths 0, 5, 5
    assert both.scale == pytest.approx(2**0.5 / (10 / 3))


def test_jumprelu_gradients_by_hand():
    """Pre-activations 1.1, 2, 0.9 against a threshold of 1 with bandwidth 0.5: the first and third
    lie within 0.25 of it.

    Features 1.1, 2, 0; L0 of the tokens 1, 1, 0. With gradients 2 at each feature and 10 at each L0
    the threshold gets -(1 * 2 + 10) / 0.5 from each of the two, -48 in all; the pre-activations get
    2 where they fire.
    """
    pre = torch.tensor([[1.1], [2.0], [0.9]], requires_grad=True)
    threshold = torch.tensor([1.0], requires_grad=True)
    features, l0 = Jump.apply(pre, threshold, 0.5)
    assert features.flatten().tolist() == pytest.approx([1.1, 2.0, 0.0]) and l0.tolist() == [
        1,
        1,
        0,
    ]
    (2 * features.sum() + 10 * l0.sum()).backward()
    assert threshold.grad.item() == pytest.approx(-48)
    assert pre.grad.tolist() == [[2], [2], [0]]


def test_losses_by_hand():
    """Identity weights in two dimensions, the token (3, -1): features (3, 0), squared error 1.

    Standard: 1 + 5 * 3 = 16. JumpReLU, threshold 2: L0 = 1, so 1 + 5 * 1 = 6, and with target 3: 1
    + 5 * 2 / 3 * 4. Gated, gate_bias (-1, 0), magnitudes as they are: gates (2, 0), by_gates (2,
    0), so 1 + 5 * 2 + (1 + 1) = 13.
    """
    x, expected = (torch.tensor([[3.0, -1.0]]), {"standard": 16, "jumprelu": 6, "gated": 13})
    for architecture in DENSE:
        sae = new_sae(
            {
                "input_dim": 2,
                "m_total_neurons": 2,
                "k_active_neurons": 1,
                "aux_k": 0,
                "architecture": architecture,
            }
        )
        with torch.no_grad():
            sae.encoder.weight.copy_(torch.eye(2))
            sae.decoder.weight.copy_(torch.eye(2))
            if architecture == "gated":
                sae.gate_bias[0] = -1
            if architecture == "jumprelu":
                sae.threshold.fill_(2)
        options = {"sparsity": 5.0, "bandwidth": 0.1, "target_l0": None}
        loss, fired = dense_step(sae, x, None, **options)
        assert float(loss) == pytest.approx(expected[architecture]) and fired.tolist() == [
            True,
            False,
        ]
        if architecture == "jumprelu":
            assert float(
                dense_step(sae, x, None, **{**options, "target_l0": 3})[0]
            ) == pytest.approx(1 + 40 / 3)


def test_aligned_gradients_go_through_the_move():
    """The gradients of the moved rows, by HypotheSAEs' own loss, then autograd through the move."""
    sae, x = make("aligned")
    dead = torch.zeros(sae.m_total_neurons, dtype=torch.bool)
    step = REGISTRY["aligned"].around(functools.partial(sparse_step, aux_coef=1 / 32))
    kept = sae.encoder.weight.detach().clone()
    loss, fired = step(sae, x, dead)
    found = {name: value.grad.clone() for name, value in sae.named_parameters()}
    assert torch.equal(sae.encoder.weight, kept)  # the learned rows themselves

    rows = kept.clone().requires_grad_()
    columns = sae.decoder.weight.detach().clone().requires_grad_()
    moved = aligned(rows, columns)
    assert torch.allclose((moved * columns.t()).sum(1), torch.ones(sae.m_total_neurons))
    with torch.no_grad():
        sae.encoder.weight.copy_(moved)
    twin, fired_twin = reference_step(sae, x, dead, aux_coef=1 / 32)
    assert float(loss) == pytest.approx(float(twin), rel=1e-5) and torch.equal(fired, fired_twin)
    through = (moved * sae.encoder.weight.grad).sum() + (columns * sae.decoder.weight.grad).sum()
    through.backward()
    assert torch.allclose(found["encoder.weight"], rows.grad, atol=1e-6)
    assert torch.allclose(found["decoder.weight"], columns.grad, atol=1e-6)
    for name in ("input_bias", "neuron_bias"):
        assert torch.allclose(found[name], sae.get_parameter(name).grad, atol=1e-6)


def test_an_aligned_one_is_kept_as_the_batchtopk_one_that_it_equals(
    tmp_path, write_activations, run_main
):
    tokens, _ = planted_tokens(2000, 16, 24, 3)
    flags = [*SMALL, "--architecture", "aligned", "--n-epochs", 3, "--export", "saelens"]
    assert run_main("train_sae", *write_activations(tokens, [10] * 200), *flags) == 0
    path = next((tmp_path / "checkpoints" / "test").glob("SAE_*.pt"))
    sae, meta = load_sae(path)
    assert sae.architecture == "batchtopk" and meta["settings"]["ARCHITECTURE"] == "aligned"
    products = (sae.encoder.weight * sae.decoder.weight.t()).sum(1)
    assert torch.allclose(products, torch.ones(sae.m_total_neurons), atol=1e-5)
    card = (path.parent / "README.md").read_text()
    assert "batchtopk (trained as aligned)" in card
    assert list(path.parent.glob("*.saelens/sae_weights.safetensors"))


def peer(architecture, sae, *, target_l0=None):
    """SAELens' training module with our weights."""
    pytest.importorskip(
        "sae_lens",
        reason="sae-lens is not installed: pip install -r experiments/requirements-bench.txt",
    )
    from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig

    shape = {
        "d_in": 12,
        "d_sae": 40,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "device": "cpu",
    }
    if architecture == "standard":
        theirs = StandardTrainingSAE(StandardTrainingSAEConfig(**shape))
    elif architecture == "gated":
        theirs = GatedTrainingSAE(GatedTrainingSAEConfig(**shape))
    else:
        mode = (
            {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": target_l0}
            if target_l0
            else {}
        )
        theirs = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(**shape, jumprelu_bandwidth=0.7, **mode)
        )
    pairs = {
        "W_enc": sae.encoder.weight.t(),
        "W_dec": sae.decoder.weight.t(),
        "b_dec": sae.input_bias,
    }
    pairs |= (
        {"b_mag": sae.neuron_bias, "b_gate": sae.gate_bias, "r_mag": sae.log_magnitude}
        if architecture == "gated"
        else {"b_enc": sae.neuron_bias}
    )
    pairs |= {"threshold": sae.threshold} if architecture == "jumprelu" else {}
    for name, value in pairs.items():
        getattr(theirs, name).data = value.detach().clone().contiguous()
    return theirs, pairs


@pytest.mark.parametrize(
    ("architecture", "target_l0"),
    [("standard", None), ("jumprelu", None), ("jumprelu", 3.0), ("gated", None)],
)
def test_loss_and_gradients_equal_saelens(architecture, target_l0):
    sae, x = make(architecture)
    theirs, pairs = peer(architecture, sae, target_l0=target_l0)
    from sae_lens.saes.sae import TrainStepInput

    coefficient = {"l0" if architecture == "jumprelu" else "l1": 0.7}
    output = theirs.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients=coefficient,
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    output.loss.backward()
    loss, fired = dense_step(sae, x, None, sparsity=0.7, bandwidth=0.7, target_l0=target_l0)
    assert float(loss) == pytest.approx(float(output.loss), rel=1e-5)
    assert torch.equal(fired, (output.feature_acts > 0).any(0))
    ours = {
        "W_enc": sae.encoder.weight.grad.t(),
        "W_dec": sae.decoder.weight.grad.t(),
        "b_dec": sae.input_bias.grad,
    }
    ours |= (
        {
            "b_mag": sae.neuron_bias.grad,
            "b_gate": sae.gate_bias.grad,
            "r_mag": sae.log_magnitude.grad,
        }
        if architecture == "gated"
        else {"b_enc": sae.neuron_bias.grad}
    )
    ours |= {"threshold": sae.threshold.grad} if architecture == "jumprelu" else {}
    for name, found in ours.items():
        expected = getattr(theirs, name).grad
        # SAELens lets the penalty lengthen decoder rows; ours keep length 1, so only what turns
        # them counts
        if name == "W_dec":
            rows = sae.decoder.weight.t().detach()
            found, expected = (
                g - (g * rows).sum(1, keepdim=True) * rows for g in (found, expected)
            )
        # the paper freezes the decoder of the gates' reconstruction
        if architecture == "gated" and name in ("W_dec", "b_dec"):
            expected = expected - gates_decoder_gradient(sae, x)[name]
        assert (found - expected).norm() <= 2e-5 * expected.norm(), name


def gates_decoder_gradient(sae, x):
    rows = sae.decoder.weight.t().detach()
    opened = torch.relu((x - sae.input_bias) @ sae.encoder.weight.t() + sae.gate_bias).detach()
    error = 2 / len(x) * (opened @ rows + sae.input_bias.detach() - x)
    weight = opened.t() @ error
    return {"W_dec": weight - (weight * rows).sum(1, keepdim=True) * rows, "b_dec": error.sum(0)}


SMALL = small(m=48, k=3, max_norm_ratio=None, n_epochs=40, batch_size=256, learning_rate=0.003)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "flags",
    [
        ["standard", "--sparsity-coefficient", 0.5],
        ["jumprelu"],
        ["gated", "--sparsity-coefficient", 2.0],
        ["jumprelu", "fastsae.training.objective.JUMPRELU_LOSS=step", "--warmup-steps", 100],
        ["batchtopk"],
        ["aligned"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_architecture_trains_and_loads(tmp_path, write_activations, run_main, flags):
    tokens, _ = planted_tokens(6000, 32, 48, 3)
    assert (
        run_main(
            "train_sae", *write_activations(tokens, [10] * 600), *SMALL, "--architecture", *flags
        )
        == 0
    )
    folder = tmp_path / "checkpoints" / "test"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["normalized_mse"] < 0.4 and 1 < metrics["l0"] < 12
    sae, meta = load_sae(folder / metrics["checkpoint"])
    assert meta["settings"]["ARCHITECTURE"] == flags[0]
    x = torch.from_numpy(tokens)
    error = (decode(sae, encode(sae, x)) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert float(error) == pytest.approx(metrics["normalized_mse"], rel=0.3)


def test_hypothesaes_reads_a_standard_one(tmp_path, write_activations, run_main):
    import hypothesaes.sae as theirs

    tokens, _ = planted_tokens(1000, 16, 32, 3)
    assert (
        run_main(
            "train_sae",
            *write_activations(tokens, [10] * 100),
            *SMALL,
            "--architecture",
            "standard",
            "--n-epochs",
            2,
        )
        == 0
    )
    path = next((tmp_path / "checkpoints" / "test").glob("*.pt"))
    loaded, (ours, _) = theirs.load_model(str(path), device="cpu").eval(), load_sae(path)
    x = torch.from_numpy(tokens[:50])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(x)[0], decode(ours, encode(ours, x)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--architecture", "standard", "--matryoshka-prefixes", "64,256"], "MATRYOSHKA_PREFIXES"),
        (["--architecture", "relu"], "ARCHITECTURE"),
    ],
)
def test_contradictions_are_setting_errors(run_main, capsys, flags, name):
    with pytest.raises(SystemExit) as stopped:
        run_main("train_sae", *flags)
    assert stopped.value.code == 2 and f"error: {name}: " in capsys.readouterr().err


def test_every_architecture_is_entered_in_the_registry():
    """The file's name is the architecture's; what is read of it without torch is what it says."""
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "base"}
    assert files == set(ARCHITECTURES) == set(REGISTRY)
    for name, about in ARCHITECTURES.items():
        assert REGISTRY[name].about == about and about.name == name
        assert about.form in ARCHITECTURES and set(about.starts_from) <= set(ARCHITECTURES)


def test_nothing_but_its_own_file_names_an_architecture():
    """Outside its file an architecture's name is a word of another library's format, or the
    registry's; settings that only one has are named in upper case."""
    names = {"batchtopk", "jumprelu", "gated", "aligned"}
    found = {
        path
        for path in python_files("fastsae")
        for node in ast.walk(ast.parse((PROJECT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    own = {f"fastsae/sae/architectures/{name}.py" for name in ARCHITECTURES}
    registry = {"fastsae/settings/architectures.py"}
    formats = {path for path in found if path.startswith("fastsae/formats/readers/")}
    # USE_BATCH_TOPK says the same twice: none of these once it is gone
    twice = {"fastsae/settings/rules.py", "fastsae/formats/load.py", "fastsae/sae/autoencoder.py"}
    assert formats and registry | formats <= found - own <= registry | formats | twice
