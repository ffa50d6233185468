"""The streaming statistics against their dense twin, and the parts made from them against answers
worked out by hand."""

import numpy as np
import pytest
import torch
from scipy import sparse

from fastsae.data import token_text
from fastsae.interpretation import statistics
from fastsae.interpretation.evidence import Evidence, level_name
from fastsae.interpretation.logit_lens import chance_logits, promoted_and_suppressed
from fastsae.interpretation.statistics import (
    Histogram,
    LargestExamples,
    PairSums,
    collect,
    random_keys,
)
from fastsae.sae.autoencoder import new_sae


def made_up(n_examples=40, d=12, m=20, k=3, seed=0, batch_topk=False):
    """(sae, arrays of an activations file) with examples of 1 to 30 tokens, all kinds and roles,
    and two sinks."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 31, n_examples).astype(np.int32)
    n = int(lengths.sum())
    sae = new_sae(
        {
            "input_dim": d,
            "m_total_neurons": m,
            "k_active_neurons": k,
            "prefix_lengths": [5, m],
            "use_batch_topk": batch_topk,
        },
        "cpu",
    )
    with torch.no_grad():
        for parameter, scale in (
            (sae.encoder.weight, 1),
            (sae.neuron_bias, 0.1),
            (sae.input_bias, 0.1),
        ):
            parameter.copy_(torch.from_numpy(generator.standard_normal(parameter.shape) * scale))
        sae.neuron_bias[m - 1] = -100  # a feature that never fires
        sae.threshold.fill_(1.5)
    x = generator.standard_normal((n, d)).astype(np.float16)
    x[[5, n // 2]] *= 100
    kind = generator.integers(0, 3, n).astype(np.uint8)
    kind[0] = 0
    return sae.eval(), {
        "activations": x,
        "seq_lengths": lengths,
        "token_kind": kind,
        "token_role": generator.integers(0, 5, n).astype(np.uint8),
        "token_ids": generator.integers(0, 9, n).astype(np.int32),
    }


def dense(sae, data, max_norm):
    """The slow twin: everything from one (n_tokens, M) matrix."""
    x = data["activations"].astype(np.float32)
    norms = np.linalg.norm(x, axis=1)
    keep = (norms <= max_norm) & (data["token_kind"] != 2)
    features = sae.get_activations(torch.from_numpy(x), show_progress=False)
    features[~keep] = 0
    example = np.repeat(np.arange(len(data["seq_lengths"])), data["seq_lengths"])
    return features, keep, example, norms


def test_tokens_that_training_left_out_are_left_out_here():
    """USE_TOKENS = assistant: the features of other tokens were never fitted to anything."""
    sae, data = made_up()
    s = collect(
        sae,
        data["activations"],
        data["seq_lengths"],
        data["token_kind"],
        data["token_role"],
        data["token_ids"],
        9,
        max_norm=30,
        use="assistant",
    )
    _, keep, _, _ = dense(sae, data, 30)
    expected = keep & (data["token_kind"] == 0) & (data["token_role"] == 3)
    np.testing.assert_array_equal(s.kept, expected)
    assert s.n_kept == expected.sum() > 0


def test_examples_without_a_kept_token_are_no_evidence():
    """Half of the examples have no assistant's text: as rows of zeros they would tell their
    category from any other."""
    from fastsae.interpretation.categories import add_categories

    sae, data = made_up(n_examples=400)
    half, ends = np.arange(400) % 2, np.cumsum(data["seq_lengths"])
    data["token_kind"][:] = 0
    data["token_role"] = np.repeat(np.where(half, 3, 0), data["seq_lengths"]).astype(np.uint8)
    data["activations"][ends[0] : ends[1]] = 1000  # all of example 1 are sinks
    s = collect(
        sae,
        data["activations"],
        data["seq_lengths"],
        data["token_kind"],
        data["token_role"],
        data["token_ids"],
        9,
        max_norm=300,
        use="assistant",
    )
    assert (
        s.pooled_examples.tolist() == list(range(3, 400, 2))
        and s.pooled_max.shape[0] == s.pooled_mean.shape[0] == 199
    )
    rows = [{"status": "ok"} for _ in range(s.m)]
    # one category is left
    assert add_categories(rows, s, [("other", "assistant")[h] for h in half], "max", 0) is None


@pytest.mark.parametrize("batch_topk", [False, True])
@pytest.mark.parametrize("block_tokens", [7, 64, 8192])
def test_streaming_equals_dense(monkeypatch, block_tokens, batch_topk):
    monkeypatch.setattr(statistics, "BLOCK_TOKENS", block_tokens)
    sae, data = made_up(batch_topk=batch_topk)
    s = collect(
        sae,
        data["activations"],
        data["seq_lengths"],
        data["token_kind"],
        data["token_role"],
        data["token_ids"],
        9,
        max_norm=30,
        n_top=4,
        n_sampled=6,
    )
    features, keep, example, norms = dense(sae, data, 30)
    fires = features > 0
    assert s.n_kept == keep.sum() and 0 < (~keep & (norms > 30)).sum()
    np.testing.assert_array_equal(s.kept, keep)
    np.testing.assert_allclose(s.norms, norms, rtol=1e-5)
    np.testing.assert_array_equal(s.count, fires.sum(0))
    np.testing.assert_allclose(s.total, features.sum(0), rtol=1e-4)
    np.testing.assert_allclose(s.maximum, features.max(0), rtol=1e-4)
    np.testing.assert_array_equal(
        s.together.sums.toarray(), fires.T.astype(int) @ fires.astype(int)
    )
    one_hot = np.eye(9)[data["token_ids"]]
    np.testing.assert_allclose(
        s.name_mass.sums.toarray(), features.T @ one_hot, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(s.name_count, one_hot[keep].sum(0))
    for kind in range(3):
        for role in range(5):
            chosen = (data["token_kind"] == kind) & (data["token_role"] == role)
            np.testing.assert_allclose(
                s.kind_role_mass[:, kind, role], features[chosen].sum(0), rtol=1e-4, atol=1e-5
            )
    check_examples(s, features, keep, example)
    check_histograms(s, features)
    assert s.count[-1] == 0 and (s.top.example[-1] == -1).all()


def check_examples(s, features, keep, example):
    n_examples = example.max() + 1
    pooled = np.stack([features[example == i].max(0) for i in range(n_examples)])
    means = np.stack(
        [
            features[example == i].sum(0) / max(keep[example == i].sum(), 1)
            for i in range(n_examples)
        ]
    )
    heard = [i for i in range(n_examples) if keep[example == i].any()]
    assert s.pooled_examples.tolist() == heard
    np.testing.assert_allclose(s.pooled_max.toarray(), pooled[heard], rtol=1e-4)
    np.testing.assert_allclose(s.pooled_mean.toarray(), means[heard], rtol=1e-4, atol=1e-6)
    for j in range(s.m):
        order = [i for i in np.argsort(-pooled[:, j], kind="stable") if pooled[i, j] > 0]
        top = [i for i in s.top.example[j] if i >= 0]
        assert top == order[:4]
        np.testing.assert_allclose(s.top.value[j][: len(top)], pooled[top, j], rtol=1e-4)
        for i, position in zip(top, s.top.position[j]):
            inside = features[example == i, j]
            assert inside[position] == inside.max()
        fired = np.flatnonzero(pooled[:, j] > 0)
        drawn = fired[np.argsort(-random_keys(fired, np.full(len(fired), j), 0))][:6]
        assert [i for i in s.sample.example[j] if i >= 0] == drawn.tolist()


def check_histograms(s, features):
    for j in range(s.m):
        values = features[features[:, j] > 0, j]
        counts, end = s.histogram.bars(j)
        assert counts.sum() == len(values) and (not len(values) or values.max() <= end * (1 + 1e-6))
        if len(values):
            assert (
                counts[-1] > 0
                and 16 < len(counts) <= 32
                and end / 2 ** np.ceil(np.log2(values.max())) > 0.5
            )
            np.testing.assert_array_equal(counts, np.histogram(values, len(counts), (0, end))[0])


def test_histogram_doubles_by_hand():
    """0.3 fixes the range at 0.5; 3 widens it to 4, eight times: the old bins 38 and 39 fall into
    bin 4 of 64."""
    histogram = Histogram(1)
    for value in (0.3, 0.31, 3.0):
        maximum = np.array([value], np.float32)
        histogram.add(np.array([0]), maximum, maximum)
    assert histogram.counts[0, 4] == 2 and histogram.counts[0, 48] == 1
    assert histogram.bars(0)[1] == pytest.approx(3.125)


def test_kept_examples_stay_within_their_places():
    generator = np.random.default_rng(1)
    kept, everything = LargestExamples(3, 2), []
    for block in range(10):
        feature, key = generator.integers(0, 3, 8), generator.random(8) + 1e-3
        example = np.arange(8) + 8 * block
        kept.offer(feature, key, example, example % 5, key)
        everything += list(zip(feature, key, example))
    for j in range(3):
        best = sorted((-key, example) for feature, key, example in everything if feature == j)[:2]
        assert kept.example[j].tolist() == [example for _, example in best] and kept.key.shape == (
            3,
            2,
        )


def test_pairs_are_cut_to_the_largest(monkeypatch):
    """100 others with sums 1 to 100 and room for 16 after a cut: the 16 largest stay, whatever the
    order of arrival."""
    monkeypatch.setattr(statistics, "PAIR_LIMIT", 30)
    sums = PairSums(1, 100)
    other = np.random.default_rng(0).permutation(100)
    sums.add_entries(np.zeros(100, np.int64), other, (other + 1).astype(np.float32))
    sums.fold()
    assert sorted(sums.sums.indices) == list(range(84, 100)) and not sums.exact


def test_memory_does_not_grow_with_tokens_times_features(monkeypatch):
    monkeypatch.setattr(statistics, "POOLED_ENTRIES", 200)
    sae, data = made_up(n_examples=100)
    s = collect(
        sae,
        data["activations"],
        data["seq_lengths"],
        data["token_kind"],
        data["token_role"],
        data["token_ids"],
        9,
    )
    assert len(s.pooled_examples) == 10 == s.pooled_max.shape[0]  # 200 entries / 20 features
    features, _, example, _ = dense(sae, data, np.inf)
    for row, i in enumerate(s.pooled_examples):
        np.testing.assert_allclose(
            s.pooled_max[row].toarray()[0], features[example == i].max(0), rtol=1e-4
        )


def test_characteristic_tokens_by_hand():
    """Token b carries 4 of 5 of the activation but is 1 of 4 of the tokens: 0.8 log(0.8 / 0.25) is
    the largest term."""
    rows = token_text.characteristic_tokens(
        sparse.csr_matrix([[1.0, 4.0, 0.0]]), np.array([2, 1, 1]), ["a", "b", "c"], 5
    )
    assert rows == [[("b", pytest.approx(0.8))]]  # a has share 0.2, below its base rate 0.5


def test_token_names_merge_case_and_spaces(smol_tokenizer):
    ids = smol_tokenizer(" We we\nWe <|im_end|>", add_special_tokens=False)["input_ids"]
    numbers, names = token_text.token_names(smol_tokenizer, np.array(ids))
    shown = [names[i] for i in numbers]
    assert shown.count("we") == 3 and "⏎" in shown and "<|im_end|>" in shown


def test_token_texts_join_to_the_whole(smol_tokenizer):
    text = "naïve 🦜🦜 test\n\tČech 日本語 end"
    ids = smol_tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_text.TokenTexts(smol_tokenizer)(ids)
    assert "".join(texts) == text and len(texts) == len(ids) and "" in texts
    cut = token_text.TokenTexts(smol_tokenizer)(
        ids[: ids.index(next(i for i, t in zip(ids, texts) if "🦜" in t)) + 1]
    )
    assert cut[-1] == "\ufffd"  # half a character stays one visible mark


def test_excerpt_marks_the_strongest_token(smol_tokenizer):
    ids = smol_tokenizer(
        "The old clock in the hall struck nine and nobody moved", add_special_tokens=False
    )["input_ids"]
    texts = token_text.TokenTexts(smol_tokenizer)(ids)
    assert token_text.excerpt(texts, 2, width=3) == "The old «clock» in the hall…"
    assert token_text.excerpt(texts, 2, start=1, width=3) == "old «clock» in the hall…"


def test_a_peak_inside_a_character_is_seen_on_the_character(smol_tokenizer):
    """A parrot is several tokens; its text stands at the first of them, and so does what fires on
    the others."""
    ids = smol_tokenizer("a 🦜 b", add_special_tokens=False)["input_ids"]
    texts = token_text.TokenTexts(smol_tokenizer)(ids)
    first = next(i for i, text in enumerate(texts) if "🦜" in text)
    last = first + texts[first + 1 :].count("")
    assert (
        last > first
        and token_text.excerpt(texts, last) == token_text.excerpt(texts, first) == "a «🦜» b"
    )
    positions, values = token_text.seen_values(
        texts, np.array([0, first, last]), np.array([1.0, 2.0, 3.0])
    )
    assert positions.tolist() == [0, first] and values.tolist() == [1, 3]


def test_report_and_batches_show_that_peak_too(smol_tokenizer):
    from types import SimpleNamespace

    from fastsae.data.tokenization import Example
    from fastsae.interpretation import neuronpedia
    from fastsae.interpretation.report import report

    sae, data = made_up()
    ids = smol_tokenizer("a 🦜", add_special_tokens=False)["input_ids"]
    data["token_ids"] = np.resize(np.array(ids, np.int32), len(data["token_ids"]))
    examples = [
        Example(i + 1, [{"role": "user", "content": "x"}], True)
        for i in range(len(data["seq_lengths"]))
    ]
    evidence = Evidence(
        sae,
        data,
        examples,
        smol_tokenizer,
        {"max_norm": None, "exclude_shared_prefix": True},
        n_top=5,
    )
    rows = [
        {**row, **dict.fromkeys(("best_category", "category_auc", "score", "fidelity_f1"))}
        for row in evidence.rows(3)
    ]
    index, (shown,) = report.report_data(evidence, rows, [0, 1, 2], {})
    n_moved = 0
    for j, feature in zip([0, 1, 2], shown["features"], strict=True):
        for example, (_, number, peak) in zip(
            feature["examples"], evidence.shown_examples([j])[j], strict=True
        ):
            place = shown["dialogues"][example["dialogue"]]["ids"]
            assert index["strings"][place[example["peak"]]] and example["peak"] in example["at"]
            assert example["values"][example["at"].index(example["peak"])] == example["top"]
            n_moved += peak != example["peak"]
            where, strengths = evidence.token_values([(j, number)])[j, number]
            batch = neuronpedia.activation(evidence, j, None, number, peak, where, strengths)
            assert batch["tokens"][int(np.argmax(batch["values"]))]
    assert n_moved
    evidence.token_values = lambda pairs: {
        pair: (np.zeros(0, np.int64), np.zeros(0, np.float32)) for pair in pairs
    }
    _, (silent,) = report.report_data(evidence, rows, [0], {})
    assert silent["features"][0]["examples"][0]["top"] == 0
    nothing = SimpleNamespace(
        token_texts=lambda e: ["a"],
        statistics=SimpleNamespace(
            maximum=np.ones(1), sample=SimpleNamespace(value=np.ones((1, 1)))
        ),
    )
    # a rounded-away encoding
    assert neuronpedia.activation(nothing, 0, None, 0, 0, np.zeros(0, int), np.zeros(0))[
        "values"
    ] == [0]


def test_levels_by_hand():
    assert [level_name(j, [4, 8, 16]) for j in (0, 3, 4, 8, 15)] == [
        "coarse",
        "coarse",
        "level 2",
        "fine",
        "fine",
    ]
    assert level_name(0, None) == "" and level_name(0, [16]) == ""


def test_promoted_tokens_stand_out_from_random_mixes_of_the_features():
    """Of other mixes a few reach beyond the bound; a feature that is one token's direction does; a
    shift of all logits alike changes nothing; the bound grows with the feature's length."""
    generator = torch.Generator().manual_seed(3)
    unembedding = torch.randn(500, 16, generator=generator)
    rows = torch.randn(40, 16, generator=generator)
    rows[0], rows[2] = 3 * unembedding[7], 2 * rows[1]
    bounds = chance_logits(rows, unembedding)
    logits = rows @ unembedding.t()
    assert logits[0].max() > bounds[0, 0] and logits[0].argmax() == 7
    assert torch.allclose(bounds[2], 2 * bounds[1])
    mixes = torch.randn(400, 40, generator=generator) @ rows
    reach = (bounds[0, 0] - bounds[0, 1]) / 2 / rows[0].norm()
    centred = (unembedding - unembedding.mean(0)) @ (mixes / mixes.norm(dim=1, keepdim=True)).t()
    assert 0.01 < (centred.amax(0) > reach).float().mean() < 0.12
    shifted = chance_logits(rows, unembedding + rows[5])
    assert torch.allclose(shifted - bounds, (rows @ rows[5])[:, None].expand(-1, 2), atol=1e-3)


def test_logit_lens_by_hand():
    decoder, unembedding = (
        torch.tensor([[1.0, 0.0], [0.0, -2.0]]),
        torch.tensor([[3.0, 1.0], [0.0, 5.0], [-1.0, 0.0]]),
    )
    (up, up_value), (down, down_value) = promoted_and_suppressed(decoder, unembedding, 2)
    assert up.tolist() == [[0, 1], [2, 0]] and up_value.tolist() == [[3, 0], [0, -2]]
    assert down.tolist() == [[2, 1], [1, 0]] and down_value.tolist() == [[-1, 0], [-10, -2]]


def test_unembedding_folds_the_final_norm(tmp_path):
    import json

    from safetensors.torch import save_file

    from fastsae.interpretation.logit_lens import load_unembedding

    embedding, norm = torch.arange(6.0).reshape(3, 2), torch.tensor([2.0, 10.0])
    save_file(
        {"model.embed_tokens.weight": embedding, "model.norm.weight": norm},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert load_unembedding(str(tmp_path)).tolist() == (embedding * norm).tolist()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    assert load_unembedding(str(tmp_path)).tolist() == (embedding * (norm + 1)).tolist()
    assert load_unembedding(str(tmp_path / "nothing.gguf")) is None


def test_evidence_of_neighbours_and_values(smol_tokenizer):
    from fastsae.data.tokenization import Example

    sae, data = made_up()
    examples = [
        Example(i + 1, [{"role": "user", "content": "x"}], True)
        for i in range(len(data["seq_lengths"]))
    ]
    evidence = Evidence(
        sae,
        data,
        examples,
        smol_tokenizer,
        {"max_norm": 30, "exclude_shared_prefix": True},
        n_top=3,
    )
    features, _, example, _ = dense(sae, data, 30)
    shown = evidence.shown_examples([0, 1, 2])
    found = evidence.token_values([(j, e) for j in shown for _, e, _ in shown[j]])
    for (j, e), (positions, values) in found.items():
        inside = features[example == e, j]
        np.testing.assert_array_equal(positions, np.flatnonzero(inside))
        np.testing.assert_allclose(values, inside[positions], rtol=1e-4)
    for j, entries in shown.items():
        assert [q for q, _, _ in entries[:3]] == [None] * 3 and len(
            {e for _, e, _ in entries}
        ) == len(entries)
        ordinary = [features[example == e, j].max() for q, e, _ in entries if q is not None]
        assert ordinary == sorted(ordinary, reverse=True)
    unit = (sae.decoder.weight / sae.decoder.weight.norm(dim=0)).detach().numpy().T
    cosine = unit @ unit.T - 3 * np.eye(20)
    near = evidence.neighbours(list(range(20)))
    assert all(
        near[j][0][0] == cosine[j].argmax()
        and near[j][0][1] == pytest.approx(cosine[j].max(), abs=1e-5)
        for j in range(20)
    )
    fires = features > 0
    jaccard = [
        (fires[:, 0] & fires[:, i]).sum() / max((fires[:, 0] | fires[:, i]).sum(), 1)
        for i in range(1, 20)
    ]
    assert evidence.coactive([0])[0][0] == (
        int(np.argmax(jaccard)) + 1,
        pytest.approx(max(jaccard)),
    )
