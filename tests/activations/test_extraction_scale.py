"""Stage 1 beyond one file on one process: layers, prefix, blocks, duplicates, hub data, shards,
damage, kills, torchrun."""

import json
import sys
import types

import numpy as np
import pytest
import sampling
import torch
from conftest import PROJECT
from tiny_world import torchrun

import extract_activations
from fastsae.activations import extraction, files as activations_file
from fastsae.data import datasets
from fastsae.data.datasets import Deduplicator, Example, stream_examples, stream_text
from fastsae.data.tokenization import CONTENT, ChatTokenizer, TokenTable, cut_blocks, tokenise
from fastsae.lm import cpu_kernels, residual
from fastsae.runtime import artifacts
from fastsae.runtime.errors import EnvironmentFailure, InputError

WORDS = (
    "the bread rose twice while rain fell and we chose a longer road home past seven "
    "quiet houses".split()
)


@pytest.fixture
def dataset(tmp_path):
    """40 texts of different lengths."""
    generator = np.random.default_rng(0)
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": " ".join(generator.choice(WORDS, 3 + i % 9))}) + "\n"
            for i in range(40)
        )
    )
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smol_tokenizer):
    """Folders with small random models and the embedded model's tokenizer."""

    def make(config_name="LlamaConfig", **options):
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, config_name)(
            **{
                "vocab_size": 49152,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "pad_token_id": 2,
                **options,
            }
        )
        folder = tmp_path_factory.mktemp("model")
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        smol_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def llama(tiny):
    return tiny()


@pytest.fixture
def extract(tmp_path, run_main, dataset, llama):
    def run(*flags, out="out", data=dataset, model=llama):
        return run_main(
            "extract_activations",
            "--dataset-path",
            data,
            "--output-dir",
            tmp_path / out,
            "--model-name",
            model,
            "--device",
            "cpu",
            "--layer-idx",
            2,
            "fastsae.activations.extraction.CHUNK_TOKENS=200",
            "--storage-dtype",
            "float32",
            *flags,
        )

    return run


def activations_of(folder, layer=2):
    return activations_file.open_activations(
        folder / "activations" / f"activations_layer{layer}.npz"
    )


def relative_errors(found, expected):
    found, expected = (
        torch.as_tensor(a if torch.is_tensor(a) else np.array(a)).double()
        for a in (found, expected)
    )
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).numpy()


# One pass, several layers


def test_layers_of_one_pass_are_those_of_single_runs(tmp_path, extract, monkeypatch, capsys):
    assert extract("--layer-idx", "3,1", out="both") == 0
    for layer in (1, 3):
        assert extract("--layer-idx", layer, out=f"one{layer}") == 0
        path = f"activations/activations_layer{layer}.npz"
        assert (tmp_path / "both" / path).read_bytes() == (
            tmp_path / f"one{layer}" / path
        ).read_bytes()
    capsys.readouterr()
    assert extract("--layer-idx", "1,2,3", out="both") == 0  # only the missing one is computed
    out = capsys.readouterr().out
    assert out.count("up to date") == 2 and out.count("wrote") == 1
    assert extract("--layer-idx", 3, out="both") == 0 and "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("layers", ["0,1", "2,2"])
def test_impossible_layers(extract, layers, capsys):
    with pytest.raises(SystemExit, match="2"):
        extract("--layer-idx", layers)
    assert "error: LAYER_IDX: " in capsys.readouterr().err
    assert extract("--layer-idx", "2,4") == 2


# Exactness of the shortcuts


@pytest.mark.parametrize(
    "config_name, options",
    [
        ("LlamaConfig", {}),
        ("Qwen2Config", {}),
        ("Qwen3Config", {}),
        ("MistralConfig", {}),
        ("MistralConfig", {"sliding_window": 9}),
        ("MistralConfig", {"sliding_window": 27}),
        ("LlamaConfig", {"attention_bias": True}),
        ("LlamaConfig", {"hidden_act": "gelu"}),
    ],
)
def test_shared_prefix_and_cpu_kernels_equal_the_whole_model_one_at_a_time(
    tmp_path, tiny, extract, config_name, options
):
    folder = tiny(config_name, **options)
    assert extract(model=folder) == 0
    data = activations_of(tmp_path / "out")
    assert json.loads(str(data["metadata"]))["n_shared_prefix"] == 24
    twin = residual.ResidualModel(str(folder), 2, dtype=torch.float32, exact_twin=True)
    examples = np.split(data["token_ids"], np.cumsum(data["seq_lengths"])[:-1])
    rows = [twin(torch.tensor(ids[None].astype(np.int64)))[2][0] for ids in examples]
    assert relative_errors(data["activations"], torch.cat(rows)).max() <= 1e-5


@pytest.mark.parametrize(
    "dtype, bound, median", [(torch.float32, 1e-5, 2e-6), (torch.bfloat16, 0.2, 0.02)]
)
def test_fast_path_of_the_embedded_model(smol_tokenizer, dtype, bound, median):
    """In bfloat16 one rounding is 0.4 %, and twelve blocks of them move a token by about 1 %, a
    near-sink by up to 20 %."""
    examples = list(stream_examples(PROJECT / "data" / "cognitive_actions.jsonl", max_examples=8))
    table = tokenise(examples, ChatTokenizer(smol_tokenizer, max_length=512))
    fast, twin = (
        residual.ResidualModel("SmolLM2-135M-Instruct", (6, 12), dtype=dtype, exact_twin=exact)
        for exact in (False, True)
    )
    forward = extraction.Forward(
        fast, table, n_shared=24, batch_tokens=600, storage_dtype="float32", dataset_name="d"
    )
    found = forward.chunk(0, 8, lambda n: None)
    ids = np.split(table.ids, np.cumsum(table.lengths)[:-1])
    for layer in (6, 12):
        expected = torch.cat(
            [twin(torch.tensor(i[None].astype(np.int64)))[layer][0].float() for i in ids]
        )
        errors = relative_errors(found[layer], expected)
        assert errors.max() <= bound and np.median(errors) <= median, (
            layer,
            errors.max(),
            np.median(errors),
        )


def test_plain_attention_by_hand_and_against_sdpa():
    module = types.SimpleNamespace(num_key_value_groups=2, is_causal=True)
    one = torch.ones(1, 1, 2, 4)
    value = torch.tensor([[1.0], [3.0]]).expand(2, 4)[None, None]
    out, _ = cpu_kernels.plain_attention(
        types.SimpleNamespace(), one, one, value, None, scaling=0.5
    )
    # the first sees itself, the second both alike
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([1.0, 2.0]))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 7, 8, generator=generator) for heads in (4, 2, 2))
    out, _ = cpu_kernels.plain_attention(module, query, key, value, None, scaling=8**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-6)


def test_batches_are_halved_when_memory_runs_out(llama, smol_tokenizer, dataset, capsys):
    table = tokenise(stream_examples(dataset), ChatTokenizer(smol_tokenizer, max_length=512))
    model = residual.ResidualModel(str(llama), 2, dtype=torch.float32)

    def forward(call, budget=400):
        limited = types.SimpleNamespace(layers=(2,), d_model=32, device="cpu", dtype=torch.float32)
        limited = type(
            "Limited",
            (),
            {
                **vars(limited),
                "__call__": lambda self, ids, *_: call(ids),
                "require_length": lambda self, n: None,
            },
        )()
        return extraction.Forward(
            limited,
            table,
            n_shared=0,
            batch_tokens=budget,
            storage_dtype="float32",
            dataset_name="d",
        )

    def at_most_150(ids):
        if ids.numel() > 150:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return model(ids)

    whole, limited = forward(model), forward(at_most_150)
    assert (
        relative_errors(
            limited.chunk(0, 40, lambda n: None)[2], whole.chunk(0, 40, lambda n: None)[2]
        ).max()
        <= 1e-5
    )
    assert capsys.readouterr().out.splitlines() == [
        "out of memory: BATCH_TOKENS 400 -> 200",
        "out of memory: BATCH_TOKENS 200 -> 100",
    ]

    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    ):

        def never(ids, error=error):
            raise error

        with pytest.raises(
            EnvironmentFailure, match="^MAX_LENGTH: an example of .* lower --max-length"
        ):
            forward(never).chunk(0, 40, lambda n: None)

    def wrong(ids):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        forward(wrong).chunk(0, 40, lambda n: None)


def test_parts_stay_small():
    assert extraction.chunk_tokens_for(65536, 576, 1, "float16") == 65536
    assert (
        extraction.chunk_tokens_for(65536, 4096, 3, "float16") * 4096 * 3 * 2
        <= extraction.PART_BYTES
    )


# Shards and the mapped reader
SHARDS = "fastsae.activations.extraction.SHARD_BYTES=60000"


def test_shards_hold_what_one_file_holds(tmp_path, extract, capsys):
    assert extract() == 0 and extract(SHARDS, out="shards") == 0
    whole, shards = activations_of(tmp_path / "out"), activations_of(tmp_path / "shards")
    files = sorted((tmp_path / "shards" / "activations").glob("*.npz"))
    assert len(files) > 2 and files[0].name == f"activations_layer2-00001-of-{len(files):05}.npz"
    assert isinstance(whole["activations"], np.memmap) and len(shards["activations"]) == len(
        whole["activations"]
    )
    for name in ("seq_lengths", "token_ids", "token_kind", "token_role", "example_ids"):
        assert np.array_equal(whole[name], shards[name])
    n = len(whole["activations"])
    rows = np.random.default_rng(0).integers(-n, n, 500)
    mask = np.arange(n) % 3 == 0
    for index in (rows, mask, slice(5, n, 7), slice(None), 17, np.array([], int)):
        assert np.array_equal(shards["activations"][index], whole["activations"][index])
    one = artifacts.read_npz(files[1], made_by="the test")  # each is complete in itself
    assert one["seq_lengths"].sum() == len(one["activations"]) == len(one["token_ids"])
    capsys.readouterr()
    assert extract(SHARDS, out="shards") == 0 and "up to date" in capsys.readouterr().out
    # the old shards are set aside ...
    assert extract(SHARDS, "--max-examples", 30, out="shards") == 0
    assert (
        list((tmp_path / "shards" / "activations").glob("*.old-1.npz"))
        and len(activations_of(tmp_path / "shards")["activations"]) < n
    )
    capsys.readouterr()
    assert extract(SHARDS, "--max-examples", 30, out="shards") == 0
    assert "up to date" in capsys.readouterr().out  # ... and count no more
    activations_file.find_shards(tmp_path / "shards" / "activations" / "activations_layer2.npz")[
        1
    ].unlink()
    with pytest.raises(InputError, match="not found"):
        activations_of(tmp_path / "shards")
    assert extract("--layer-idx", 2, "--dedup-ngram", 3, out="out") == 0
    assert (tmp_path / "out" / "activations" / "activations_layer2.old-1.npz").exists()


def test_shards_by_hand():
    assert extraction.split_shards([4, 4, 4, 20, 1], 8) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert extraction.split_shards([4, 4], 100) == [(0, 2)]


def test_a_mapped_file_is_checked(tmp_path):
    path = tmp_path / "a.npz"
    rows = np.arange(3000, dtype=np.float16).reshape(1000, 3)
    artifacts.write_npz(path, {"x": np.arange(5), "activations": rows})
    mapped = activations_file.map_member(path, "activations")
    assert np.array_equal(mapped, rows) and mapped.offset % 64 == 0 and not mapped.flags.writeable
    whole = path.read_bytes()
    at = whole.index(rows.tobytes())
    for position in (at, at + 1234, at + rows.nbytes - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(EnvironmentFailure, match="damaged or foreign"):
            activations_file.map_member(path, "activations")
    path.write_bytes(whole[:-400])
    with pytest.raises(EnvironmentFailure, match="damaged or foreign"):
        activations_file.map_member(path, "activations")
    np.savez_compressed(path, activations=rows)
    with pytest.raises(EnvironmentFailure, match="compressed"):
        activations_file.map_member(path, "activations")


# Blocks, duplicates, data from elsewhere


def test_blocks_by_hand():
    table = TokenTable(
        np.arange(11, dtype=np.int32),
        np.zeros(11, np.uint8),
        np.zeros(11, np.uint8),
        np.array([4, 7], np.int32),
        np.array([1, 2], np.int32),
    )
    blocks, rest = cut_blocks(table, 5)
    assert (blocks.ids.tolist(), blocks.lengths.tolist(), blocks.lines.tolist(), rest) == (
        list(range(10)),
        [5, 5],
        [1, 2],
        1,
    )


def test_block_mode_joins_the_examples(tmp_path, extract, llama):
    assert extract() == 0 and extract("--block-length", 64, out="blocks") == 0
    single, blocks = activations_of(tmp_path / "out"), activations_of(tmp_path / "blocks")
    n = len(blocks["token_ids"])
    assert set(blocks["seq_lengths"]) == {64} and np.array_equal(
        blocks["token_ids"], single["token_ids"][:n]
    )
    assert len(single["token_ids"]) - n < 64
    metadata = json.loads(str(blocks["metadata"]))
    assert (
        metadata["settings"]["PROCESSING"] == "block"
        and metadata["settings"]["BLOCK_LENGTH"] == 64
        and metadata["n_shared_prefix"] == 0
    )
    assert metadata["n_left_over"] == len(single["token_ids"]) - n
    assert metadata["fingerprint"] != json.loads(str(single["metadata"]))["fingerprint"]
    model = residual.ResidualModel(str(llama), 2, dtype=torch.float32, exact_twin=True)
    expected = model(torch.tensor(blocks["token_ids"][64:128][None].astype(np.int64)))[2][0]
    assert relative_errors(blocks["activations"][64:128], expected).max() <= 1e-5
    assert extract("--block-length", 10_000) == 2


def test_a_plain_text_in_blocks(tmp_path, extract, smol_tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "PIECE_CHARACTERS", 200)
    text = (
        "".join(f"{' '.join(WORDS[i % 5 :])}.\n" for i in range(30))
        + "An <|im_start|> in the text.\n"
    )
    path = tmp_path / "corpus.txt"
    path.write_text(text)
    assert "".join(e.messages[0]["content"] for e in stream_text(path)) == text
    assert extract("--block-length", 50, data=path) == 0
    data = activations_of(tmp_path / "out")
    decoded = smol_tokenizer.decode(data["token_ids"])
    assert text.startswith(decoded) and len(text) - len(decoded) < 400
    assert (data["token_kind"] == CONTENT).all() and smol_tokenizer.convert_tokens_to_ids(
        "<|im_start|>"
    ) not in data["token_ids"]
    assert extract(data=path, out="texts") == 0
    assert "texts: one a line" in capsys.readouterr().out
    texts = activations_of(tmp_path / "texts")
    assert texts["example_ids"].tolist() == list(range(1, 32)) and (texts["token_role"] == 2).any()


def test_duplicates_by_hand():
    def example(text):
        return Example(1, [{"role": "user", "content": text}])

    words = [f"w{i}" for i in range(60)]
    seen = Deduplicator(20)
    assert seen.is_new(example(" ".join(words[:30])))
    assert seen.is_new(example(" ".join(words[11:30] + ["x"])))  # 19 words in common
    assert not seen.is_new(example("y " + " ".join(words[10:30]).upper()))  # 20
    assert seen.is_new(example(" ".join(words[30:50])))
    # across turns, too
    assert not seen.is_new(
        Example(
            1,
            [
                {"role": "user", "content": " ".join(words[30:40])},
                {"role": "assistant", "content": " ".join(words[40:50])},
            ],
        )
    )
    assert seen.is_new(example("too short")) and seen.is_new(example("too short"))
    assert seen.n_dropped == 2


def test_deduplication_equals_a_plain_search():
    generator = np.random.default_rng(0)
    texts = [list(generator.choice(WORDS[:6], 12)) for _ in range(400)]
    seen, kept, plain = Deduplicator(5), set(), []
    for text in texts:
        grams = {tuple(text[i : i + 5]) for i in range(8)}
        plain.append(not grams & kept)
        kept |= grams if plain[-1] else set()
    assert [
        seen.is_new(Example(1, [{"role": "user", "content": " ".join(t)}])) for t in texts
    ] == plain
    assert 0 < sum(plain) < 400 and sum(map(len, seen.runs)) == len(kept)


def test_dropped_examples_are_counted_and_lines_kept(tmp_path, extract, dataset, capsys):
    lines = dataset.read_text().splitlines()
    dataset.write_text("\n".join([lines[0], lines[8], lines[8], lines[17]]) + "\n")
    assert extract("--dedup-ngram", 8) == 0
    data = activations_of(tmp_path / "out")
    assert (
        data["example_ids"].tolist() == [1, 2, 4]
        and "1 duplicates dropped" in capsys.readouterr().out
    )
    kept = datasets.read_dataset(dataset, only_lines=data["example_ids"])
    assert [e.line for e in kept] == [1, 2, 4]


def test_hub_datasets(tmp_path, extract, monkeypatch, capsys):
    import huggingface_hub

    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}?"},
                {"role": "assistant", "content": "Yes."},
            ]
        }
        for i in range(6)
    ]
    calls = []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, **options: calls.append((name, options)) or iter(rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "dataset_info",
        lambda self, name, **options: types.SimpleNamespace(sha="abc123"),
    )
    assert extract("--max-examples", 4, data="hf:owner/name") == 0
    assert calls == [("owner/name", {"revision": "abc123", "split": "train", "streaming": True})]
    data = activations_of(tmp_path / "out")
    assert (
        len(data["seq_lengths"]) == 4
        and json.loads(str(data["metadata"]))["inputs"]["dataset"] == "hf:owner/name@abc123"
    )

    def unreachable(self, name, **options):
        raise ConnectionError("no route")

    capsys.readouterr()
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    assert (
        extract(data="hf:owner/name") == 3
        and "the hub cannot be reached" in capsys.readouterr().err
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "dataset_info",
        lambda self, name, **options: types.SimpleNamespace(sha="def"),
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert extract(data="hf:owner/name", out="other") == 3
    assert (
        capsys.readouterr().err
        == "error: DATASET_PATH: hf:owner/name@def needs the datasets package. run: pip "
        "install datasets.\n"
    )


# Kills and several processes


@pytest.mark.sampled
def test_kills_at_random_times_change_no_byte(tmp_path, dataset, tiny_llama, forks):
    flags = ["--dataset-path", dataset, "--model-name", tiny_llama, "--layer-idx", "2"]
    done = forks[0].run(
        "experiments.benchmarks.kill_extraction",
        "--kills",
        3 if sampling.exhaustive else 1,
        *flags,
        "--chunk-tokens",
        200,
        output=tmp_path / "none",
        bare=True,
    )
    assert done["code"] == 0, done["err"]
    assert done["out"].startswith("identical after ")


CHUNKS = "fastsae.activations.extraction.CHUNK_TOKENS=200"
SHARED = ["--device", "cpu", "--layer-idx", 2, CHUNKS, "--storage-dtype", "float32"]


def test_two_processes_write_what_one_writes(tmp_path, extract, dataset, llama):
    assert extract() == 0
    flags = [*SHARED, "--dataset-path", dataset, "--model-name", llama]
    done = torchrun("extract_activations", *flags, output=tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1 and done.stdout.count("settings: ") == 1
    one, two = (
        (tmp_path / out / "activations" / "activations_layer2.npz").read_bytes()
        for out in ("out", "two")
    )
    assert one == two
    assert (
        json.loads((tmp_path / "two" / "activations" / "activations_layer2.json").read_text())[
            "n_processes"
        ]
        == 2
    )
    assert not list((tmp_path / "two" / "activations").glob(".parts*"))


def test_what_one_process_cannot_do_stops_all_with_one_message(
    tmp_path, dataset, tiny_llama, two_processes
):
    dataset.write_text(dataset.read_text() + '{"text": 7}\n')
    flags = [*SHARED, "--dataset-path", dataset, "--model-name", tiny_llama]
    code, err = two_processes("extract_activations", *flags, output=tmp_path / "two")
    assert code != 0
    assert [line for line in err.splitlines() if line.startswith(("error", "stopped"))] == [
        f"error: {dataset}:41: text is int, not text. write a JSON string."
    ]


def test_the_parts_decide_nothing_about_another_plan(tmp_path, extract, monkeypatch):
    monkeypatch.setattr(extract_activations.storage, "remove", lambda folder: None)
    assert extract() == 0
    (folder,) = (tmp_path / "out" / "activations").glob(".parts-*")
    n = len(list(folder.glob("part-*")))
    assert n > 1
    (tmp_path / "out" / "activations" / "activations_layer2.npz").unlink()
    assert extract("--batch-tokens", 100) == 0 and len(list(folder.glob("part-*"))) == 2 * n
