"""What features do, beside a hand-made splice, on a model whose answers are known, and for random
directions in the place of features."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from fastsae import intervention
from fastsae.interpretation import effects, model_loss, running
from fastsae.interpretation.effects import SIGNS, Passage, changes, continuations
from fastsae.lm.hook_points import HookPoint
from fastsae.runtime import stops
from fastsae.runtime.errors import EnvironmentFailure
from fastsae.sae.autoencoder import new_sae

VOCABULARY = 60


def llama(d=16, n_layers=3, seed=0):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=d,
            intermediate_size=2 * d,
            num_hidden_layers=n_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            initializer_range=0.5,
        )
    ).eval()


def an_sae(encoder, decoder=None, threshold=0.0):
    """One that gives relu(x @ encoder.T) above a threshold; decoder rows as encoder's without
    any."""
    m, d = encoder.shape
    sae = new_sae(
        {"input_dim": d, "m_total_neurons": m, "k_active_neurons": 1, "use_batch_topk": True}
    )
    with torch.no_grad():
        sae.encoder.weight.copy_(encoder)
        sae.decoder.weight.copy_((encoder if decoder is None else decoder).t())
        sae.input_bias.zero_()
        sae.neuron_bias.zero_()
        sae.threshold.fill_(threshold)
    return sae.eval()


def some_passages(features, n=7, seed=0):
    generator = np.random.default_rng(seed)
    return [
        Passage(j, 0, 0, generator.integers(0, VOCABULARY, n), np.arange(n) > 0, n - 2)
        for j in features
        for _ in range(2)
    ]


def by_hand(model, module, ids, push):
    """(n, vocabulary) log-probabilities of one example alone, `push(x)` (n, d) being added to what
    the module gives."""

    def add(_, __, output):
        plain = output[0] if isinstance(output, tuple) else output
        new = plain + push(plain[0])
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(add)
    try:
        with torch.inference_mode():
            return model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["resid_post", "mlp_out"])
def test_changes_equal_a_splice_made_by_hand(kind):
    model, generator = llama(), torch.Generator().manual_seed(1)
    encoder, decoder, directions = (torch.randn(n, 16, generator=generator) for n in (3, 3, 4))
    directions = torch.nn.functional.normalize(directions, dim=1)
    sae, passages = an_sae(encoder, decoder, threshold=0.5), some_passages([0, 2], n=12)
    found = changes(model, sae, HookPoint(2, kind), passages, directions, 2)
    module = model.model.layers[1] if kind == "resid_post" else model.model.layers[1].mlp
    assert sorted(found) == [0, 2]
    for feature, effect in found.items():
        sums = {name: [] for name in ("removed", "added", "random")}
        for passage in passages:
            if passage.feature != feature:
                continue

            def push(x, sign, unit=None, feature=feature, usable=passage.usable):
                f = (x @ encoder[feature]) * torch.from_numpy(usable)
                f = torch.where(f > 0.5, f, 0)[:, None]
                d = decoder[feature].expand_as(x)
                if unit is not None:  # as long, and as near to x, in the plane of x and unit
                    length, away = d.norm(dim=1), (d * x).sum(1) / x.norm(dim=1)
                    plane = torch.stack([x, unit.expand_as(x)], dim=2)  # (n, d, 2)
                    axes = torch.linalg.qr(plane).Q
                    axes = axes * torch.stack(
                        [(axes[:, :, 0] * x).sum(1).sign(), (axes[:, :, 1] @ unit).sign()], 1
                    ).unsqueeze(1)
                    across = (length**2 - away**2).sqrt()
                    d = (axes @ torch.stack([away, across], 1)[:, :, None])[:, :, 0]
                return sign * f * d

            ids = passage.ids
            clean = by_hand(model, module, ids, lambda x: 0 * x)
            with torch.inference_mode():
                stream = intervention.residual_stream(model, HookPoint(2, kind), [ids])
            fires = np.flatnonzero((push(stream, 1).abs().sum(1) > 0)[:-1])
            ways = {
                "removed": lambda x: push(x, -1),
                "added": lambda x: push(x, 1),
                # feature 0 has the first two directions, feature 2 the others
                "random": lambda x, first=feature: push(x, -1, directions[first + 1]),
            }
            for name, way in ways.items():
                new = by_hand(model, module, ids, way)
                kl = (clean.exp() * (clean - new)).sum(1)[fires]
                loss = [float(clean[i, ids[i + 1]] - new[i, ids[i + 1]]) for i in fires]
                sums[name] += zip(kl.tolist(), loss)
        assert effect["n_tokens"] == len(sums["removed"]) > 2
        for name in ("removed", "added"):
            expected = np.mean(sums[name], axis=0)
            assert [effect[name]["kl"], effect[name]["loss"]] == pytest.approx(expected, abs=1e-4)
            assert effect[name]["kl"] > 0.01
        random = [effect["removed"][f"random_{each}"][1] for each in ("kl", "loss")]
        assert random == pytest.approx(np.mean(sums["random"], axis=0), abs=1e-4)


def test_a_turned_vector_is_as_long_and_as_far_from_the_stream():
    generator = torch.Generator().manual_seed(0)
    d, x = torch.randn(2, 50, 6, generator=generator)
    unit = torch.nn.functional.normalize(torch.randn(50, 6, generator=generator))
    new = effects.turned(d, x, unit)
    torch.testing.assert_close(new.norm(dim=1), d.norm(dim=1))
    torch.testing.assert_close((new * x).sum(1), (d * x).sum(1), atol=1e-4, rtol=1e-4)
    assert (torch.linalg.matrix_rank(torch.stack([new, x, unit], 1), tol=1e-3) == 2).all()


A, B, C = 1, 2, 3  # tokens


@pytest.fixture(scope="module")
def known():
    """A model whose blocks add nothing. Every token has 1 in the second dimension, A also 3 in the
    first; B is read from the first, C from the second."""
    model = llama(d=4)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, 1] = 1
        model.model.embed_tokens.weight[A, 0] = 3
        model.lm_head.weight.zero_()
        model.lm_head.weight[B, 0] = 5
        model.lm_head.weight[C, 1] = 5
    return model


def test_a_known_feature_writes_what_it_should(known):
    """From A the model writes B, else C. Without the feature it writes C at once, with it added B
    for ever; a direction that nothing reads changes nothing."""
    sae = an_sae(torch.eye(4)[:1])
    passages = [Passage(0, 5, 0, np.array([9, 9, A, 9]), np.array([False, True, True, True]), 2)]
    directions = torch.eye(4)[2:3]
    found = continuations(known, sae, 2, passages, {0: 3.0}, directions[0], [])[0]
    n = effects.N_WRITTEN
    assert (found["example"], found["start"], found["prompt"]) == (
        5,
        1,
        [9, A],
    )  # of 3 tokens 2 are a prompt
    assert found["unchanged"] == [B] + [C] * (n - 1) == found["random"]
    assert found["removed"] == [C] * n and found["added"] == [B] * n
    stopped = continuations(known, sae, 2, passages, {0: 3.0}, directions[0], [C])[0]
    assert stopped["removed"] == [C] and stopped["unchanged"] == [B, C]
    # one token is no beginning
    assert (
        continuations(known, sae, 2, [passages[0]._replace(peak=0)], {0: 1}, directions[0], [])
        == {}
    )


def test_a_model_without_a_cache_writes_the_same():
    """GPT-1 and Mamba give none: all tokens are read again for each that is written."""
    model, passages = llama(), some_passages([0, 1, 2], n=12)
    rows = torch.nn.functional.normalize(
        torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1
    )
    strength = dict.fromkeys(range(3), 2.0)
    given = (an_sae(rows[:3]), 2, passages, strength, rows[3], [])
    cached, plain = continuations(model, *given), type(model).forward

    def without_cache(self, *arguments, **options):
        out = plain(self, *arguments, **{**options, "past_key_values": None})
        return SimpleNamespace(logits=out.logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", without_cache)
        assert continuations(model, *given) == cached
    different = [each["added"] != each["unchanged"] for each in cached.values()]
    assert any(different) and any(e["removed"] != e["unchanged"] for e in cached.values())


def test_the_divergence_of_a_known_feature_by_hand(known):
    """After A, x = (3, 1): logits 5 x / rms. Without the feature (0, 1), added once more (6, 1);
    only what follows A counts, and an example that ends with it tells nothing."""
    sae, usable = an_sae(torch.eye(4)[:1]), np.ones(3, bool)
    passages = [
        Passage(0, 0, 0, np.array([9, A, C]), usable, 1),
        Passage(0, 1, 0, np.array([9, 9, A]), usable, 2),
    ]
    found = changes(known, sae, 1, passages, torch.eye(4)[2:3], 1)[0]

    def p(x, y):
        logits = np.zeros(VOCABULARY)
        logits[[B, C]] = 5 * np.array([x, y]) / np.sqrt((x * x + y * y) / 4 + 1e-6)
        return np.exp(logits) / np.exp(logits).sum()

    clean, without, twice = p(3, 1), p(0, 1), p(6, 1)
    assert (found["n_passages"], found["n_tokens"]) == (1, 1)
    for name, new in (("removed", without), ("added", twice)):
        assert found[name]["kl"] == pytest.approx((clean * np.log(clean / new)).sum(), rel=1e-4)
        assert found[name]["loss"] == pytest.approx(np.log(clean[C] / new[C]), rel=1e-4)
    # a push that nothing reads, as long and at the same angle to x
    (null,) = found["removed"]["random_kl"]
    angle = np.arctan2(1, 3)  # between x and the feature
    turned = 3 * np.cos(angle) / np.sqrt(10)  # of x, along itself
    rest = 3 * np.sin(angle)
    x, y = 3 * (1 - turned), 1 - turned
    logits = np.zeros(VOCABULARY)
    logits[[B, C]] = 5 * np.array([x, y]) / np.sqrt((x * x + y * y + rest * rest) / 4 + 1e-6)
    new = np.exp(logits) / np.exp(logits).sum()
    assert null == pytest.approx((clean * np.log(clean / new)).sum(), rel=1e-3)
    assert changes(known, sae, 1, passages[1:], torch.eye(4)[2:3]) == {}


def test_random_directions_as_features_are_as_strong_as_their_null(monkeypatch):
    """They fire where they point along the stream, so taking them out turns it further than a push
    of their length in any direction, and adding them turns it less: at the same angle they are
    equal."""

    def times_random(seed):
        rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))
        rows = torch.nn.functional.normalize(rows, dim=1)
        sae, passages = an_sae(rows[:32]), some_passages(range(32), n=10, seed=seed)
        found = changes(llama(seed=seed), sae, 2, passages, rows[32:], 3)
        assert len(found) > 28
        total = effects.summary(list(found.values()))
        assert total["n_beyond_by_chance"] == len(found) / 4
        return [[total[name]["times_random"]["value"], total[name]["n_beyond"]] for name in SIGNS]

    n_models = 3
    (removed, n_removed), (added, n_added) = np.mean(
        [times_random(i) for i in range(n_models)], axis=0
    )
    assert 0.9 < removed < 1.1 and 0.9 < added < 1.1
    assert 5 < n_removed < 11 and 5 < n_added < 11  # 8 by chance
    monkeypatch.setattr(effects, "turned", lambda d, x, unit: unit)
    (removed, _), (added, _) = np.mean([times_random(i) for i in range(n_models)], axis=0)
    assert removed > 1.1 and added < 0.9


def test_what_is_said_of_effects():
    part = {"kl": 0.4, "loss": 0.1, "random_kl": [0.1, 0.3], "random_loss": [0.0, 0.0]}
    one = {"n_passages": 1, "n_tokens": 3, "removed": part, "added": {**part, "kl": 0.2}}
    total = effects.summary([one, one])
    assert total["removed"]["times_random"] == {
        "value": pytest.approx(2),
        "interval": [pytest.approx(2), pytest.approx(2)],
    }
    assert (total["removed"]["n_beyond"], total["added"]["n_beyond"]) == (2, 0)
    assert effects.sentence(total) == (
        "taken out where they fire, 2 features change the next token 2.0 [2.0, 2.0] times as much "
        "as random directions (KL 0.400 nats against 0.200), 2 of them more than each of 2 (0.7 by "
        "chance); added once more, 1.0 [1.0, 1.0] times"
    )
    alone = effects.summary([one])
    assert alone["removed"]["times_random"]["interval"] is None
    assert "2.0 times as much" in effects.sentence(alone)
    assert effects.sentence({"not_measured": "why"}) == "" == effects.sentence(None)


def test_passages_lie_around_the_strongest_token_in_different_texts():
    from fastsae.interpretation.effects import AFTER, BEFORE, passages_of

    statistics = SimpleNamespace(
        top=SimpleNamespace(
            example=np.array([[2, 1, 0], [0, -1, -1]]), position=np.array([[50, 50, 3], [1, 0, 0]])
        ),
        kept=np.arange(165) % 55 > 0,
    )
    evidence = SimpleNamespace(
        statistics=statistics,
        data={"token_ids": np.arange(165)},
        offsets=np.array([0, 55, 110, 165]),
        text_numbers=np.array([0, 1, 1]),
    )
    found = passages_of(evidence, [0, 1])
    assert [(p.feature, p.example) for p in found] == [(0, 2), (0, 0), (1, 0)]
    far, near, _ = found
    assert far.ids.tolist() == list(range(160 - BEFORE, 165)) and far.ids[far.peak] == 160
    assert (far.start, near.start) == (50 - BEFORE, 0)
    assert not far.usable[0] and far.usable[1:].all()  # it begins within the text
    assert near.ids.tolist() == list(range(3 + AFTER + 1)) and near.peak == 3


@pytest.fixture
def stand_in(monkeypatch, tiny_llama):
    """What `running` asks of `Features`, the model being at hand."""
    monkeypatch.setattr(model_loss, "model_at_hand", lambda *_, **__: (object(), ""))
    return SimpleNamespace(
        settings=SimpleNamespace(RUN_MODEL=True, CACHE_DIR=None, DEVICE="cpu", SEED=0),
        source={"model_name": "m", "model_revision": None},
        untrained=SimpleNamespace(dictionaries=[1]),
        evidence=SimpleNamespace(sae=SimpleNamespace(input_dim=4)),
        run_table={},
    )


@pytest.mark.parametrize(
    "error, why",
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "was not enough memory"),
        (ValueError("a model's\nown"), "ValueError: a model's"),
    ],
)
def test_a_model_that_fails_costs_nothing_else(stand_in, monkeypatch, capsys, error, why):
    def fails(*_):
        raise error

    monkeypatch.setattr(running, "_effects", fails)
    monkeypatch.setattr(running, "_loss", lambda *_: {"ce": 1})
    running.add_what_the_model_tells(stand_in)
    assert stand_in.run_table["model_loss"] == {"ce": 1}
    assert why in stand_in.run_table["effects"]["not_measured"]
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("warning: the model could not be run: ")
    assert err.count("\n") == 1 and "--no-run-model" in err
    # a stop that a library made an error of ends the stage
    monkeypatch.setattr(stops, "raised", lambda: 15)
    with pytest.raises(type(error)):
        running.add_what_the_model_tells(stand_in)


def test_where_the_model_is_not_run(stand_in, monkeypatch, capsys):
    stand_in.settings.RUN_MODEL = False
    running.add_what_the_model_tells(stand_in)
    off = {"not_measured": "RUN_MODEL is off"}
    assert stand_in.run_table == {"model_loss": off, "effects": off}
    stand_in.settings.RUN_MODEL = True

    def refused(*_, **__):
        raise EnvironmentFailure("m: is damaged. fetch it again.")

    monkeypatch.setattr(model_loss, "model_at_hand", refused)
    running.add_what_the_model_tells(stand_in)
    assert "m: is damaged" in stand_in.run_table["effects"]["not_measured"]
    assert capsys.readouterr().err.startswith("warning: ")


def test_a_prompt_is_shown_without_the_prefix_that_all_examples_share():
    evidence = SimpleNamespace(
        data={"example_ids": np.array([4, 7])},
        own_start=lambda example: 2,
        texts_of=lambda ids: [f"<{i}>" for i in ids],
    )
    ways = {"unchanged": [5], "removed": [], "added": [6, 7], "random": [8]}
    for start, shown in (
        (0, "<2><3>"),
        (1, "<1><2><3>"),
        (2, "<0><1><2><3>"),
        (3, "… <0><1><2><3>"),
    ):
        found = running._as_text(
            {"example": 1, "start": start, "prompt": [0, 1, 2, 3], **ways}, evidence
        )
        assert found == {
            "line": 7,
            "prompt": shown,
            "unchanged": "<5>",
            "removed": "",
            "added": "<6><7>",
            "random": "<8>",
        }
