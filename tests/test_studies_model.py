"""The model with its residual stream replaced, against a hand-made splice, and the studies built on it."""
import numpy as np
import pytest
import torch
from conftest import PROJECT

from fastsae import intervention, language_model
from fastsae.autoencoder import new_sae
from fastsae.initialisation import initialise

TEXTS = ["The bread rose twice before noon.", "Seven times eight is fifty-six.", "Why does the tap drip only at night?"]


@pytest.fixture(scope="session")
def whole_model():
    return language_model.load_model("SmolLM2-135M-Instruct", dtype=torch.float32)


@pytest.fixture(scope="session")
def examples(smol_tokenizer):
    return [np.array(smol_tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=True, return_dict=False))
            for text in TEXTS]


@pytest.fixture(scope="session")
def some_sae():
    """An untrained TopK autoencoder for the embedded model: good enough to splice in."""
    sae = new_sae({"input_dim": 576, "m_total_neurons": 64, "k_active_neurons": 4})
    initialise(sae, 10 * torch.randn(256, 576, generator=torch.Generator().manual_seed(0)), 0)
    return sae.eval()


def by_hand(model, ids, layer, replace):
    """Losses of one example: its first blocks, `replace`, then the later blocks, norm and head called one by one."""
    ids, stack = torch.tensor(ids)[None], model.model
    with torch.inference_mode():
        position = torch.arange(ids.shape[1])[None]
        x = stack.embed_tokens(ids)
        rotary = stack.rotary_emb(x, position)
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        for i, block in enumerate(stack.layers):
            x = replace(x) if i == layer else x
            x = block(x, attention_mask=mask, position_embeddings=rotary, position_ids=position)
            x = x[0] if isinstance(x, tuple) else x
        x = replace(x) if layer == len(stack.layers) else x
        return torch.nn.functional.cross_entropy(model.lm_head(stack.norm(x))[0, :-1], ids[0, 1:], reduction="none").numpy()


@pytest.mark.parametrize("layer", [1, 12, 30])
def test_a_splice_equals_one_made_by_hand(whole_model, examples, some_sae, layer):
    functions = {"spliced": intervention.reconstruction(some_sae), "zero": intervention.constant(torch.zeros(576))}
    found = intervention.next_token_losses(whole_model, layer, examples, functions)
    for name, function in functions.items():
        expected = np.concatenate([np.concatenate([[np.nan], by_hand(whole_model, ids, layer, lambda x: function(x[0], None)[None])])
                                   for ids in examples])
        np.testing.assert_allclose(found[name].ce, expected, atol=1e-5, rtol=1e-5)
    assert (found["spliced"].ce[1:9] != found["clean"].ce[1:9]).all()


def test_identity_gives_exactly_the_models_own_loss(whole_model, examples):
    found = intervention.next_token_losses(whole_model, 12, examples, {"identity": lambda x, token: x}, batch_tokens=1)
    np.testing.assert_array_equal(found["identity"].ce, found["clean"].ce)
    assert np.nanmax(np.abs(found["identity"].kl)) == 0
    starts = np.cumsum([0, *map(len, examples)])
    for i, ids in enumerate(examples):
        with torch.inference_mode():
            own = whole_model(torch.tensor(ids)[None], labels=torch.tensor(ids)[None]).loss
        assert np.isnan(found["clean"].ce[starts[i]])
        assert np.nanmean(found["clean"].ce[starts[i]:starts[i + 1]]) == pytest.approx(float(own), abs=1e-5)


def test_batches_change_nothing_and_only_the_chosen_tokens_are_replaced(whole_model, examples):
    starts = np.cumsum([0, *map(len, examples)])
    where = np.zeros(starts[-1], bool)
    where[starts[1] + 20] = True  # one token of the second example: what comes before it, and the other examples, cannot change
    zero = {"zero": intervention.only(where, intervention.constant(np.zeros(576, np.float32)))}
    together, alone = (intervention.next_token_losses(whole_model, 12, examples, zero, batch_tokens=n) for n in (1024, 1))
    for name in ("clean", "zero"):
        np.testing.assert_allclose(together[name].ce, alone[name].ce, atol=1e-4)
        np.testing.assert_allclose(together[name].kl, alone[name].kl, atol=1e-4)
    changed = np.flatnonzero(np.nan_to_num(alone["zero"].kl) > 1e-6)
    assert changed.min() == starts[1] + 21 and changed.max() < starts[2]
    assert (alone["zero"].kl[changed] > 0).all()


def test_the_stream_is_the_hidden_state(whole_model, examples):
    found = intervention.residual_stream(whole_model, 12, examples, batch_tokens=64)
    with torch.inference_mode():
        expected = torch.cat([whole_model(torch.tensor(ids)[None], output_hidden_states=True).hidden_states[12][0] for ids in examples])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


def test_loss_recovered_by_hand():
    assert intervention.loss_recovered(2.0, 2.5, 4.0) == 0.75
    assert intervention.loss_recovered(2.0, 2.0, 4.0) == 1 and intervention.loss_recovered(2.0, 5.0, 4.0) == -0.5


def test_ablation_takes_away_one_feature_only(some_sae):
    from fastsae.autoencoder import encode

    x = 10 * torch.randn(50, 576, generator=torch.Generator().manual_seed(1))
    entries = encode(some_sae, x)
    feature = int(entries.column[0])
    dense = torch.zeros(50, 64).index_put_((entries.row.long(), entries.column.long()), entries.value)
    expected = x - dense[:, feature, None] * some_sae.decoder.weight[:, feature]
    found = intervention.without_feature(some_sae, feature)(x, None)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[dense[:, feature] == 0], x[dense[:, feature] == 0]) and not torch.equal(found, x)


def test_greedy_text_equals_transformers_and_alpha_0_changes_no_token(whole_model, examples):
    prompt = torch.tensor(examples[2])[None]
    with torch.inference_mode():
        expected = whole_model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=2)
    expected = expected[0, prompt.shape[1]:].tolist()
    direction = torch.nn.functional.normalize(torch.randn(576, generator=torch.Generator().manual_seed(0)), dim=0)
    steered = intervention.steering(direction, [0.0, 200.0])
    plain, = intervention.generate(whole_model, prompt, n_new=24, stop_ids=[2])
    zero, strong = intervention.generate(whole_model, prompt.expand(2, -1), n_new=24, stop_ids=[2], layer=12, function=steered)
    assert plain == zero == expected and strong != zero


def test_steering_adds_alpha_times_the_direction():
    stream, direction = torch.zeros(2, 3, 4), torch.tensor([1.0, 0, 0, 2])
    everywhere = intervention.steering(direction, [0.0, 5.0])(stream)
    assert torch.equal(everywhere[0], stream[0]) and torch.equal(everywhere[1], (5 * direction).expand(3, 4))
    answer = intervention.steering(direction, [0.0, 5.0], answer_only=True)(stream)
    assert torch.equal(answer[1, :2], stream[1, :2]) and torch.equal(answer[1, 2], 5 * direction)
