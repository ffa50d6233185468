"""The dialogues of a block apart: block-diagonal attention, against dialogues run alone and against
whole blocks with a block-diagonal mask."""

import json

import numpy as np
import pytest
import torch

from fastsae.activations import extraction
from fastsae.data.tokenization import TokenTable, cut_apart, cut_blocks
from fastsae.lm import residual
from fastsae.runtime import artifacts
from fastsae.runtime.errors import InputError

LENGTHS = np.array([7, 12, 30, 5, 18, 9], np.int32)  # 81 tokens
BLOCK = 20
# of the examples and of the blocks together, the last token left over
EDGES = [0, 7, 19, 20, 40, 49, 54, 60, 72, 80]


@pytest.fixture
def table():
    generator = np.random.default_rng(0)
    ids = generator.integers(20, 512, LENGTHS.sum()).astype(np.int32)
    kind = (np.arange(len(ids)) % 3).astype(np.uint8)
    return TokenTable(ids, kind, kind[::-1].copy(), LENGTHS, np.arange(1, 7, dtype=np.int32))


@pytest.fixture
def model(tmp_path):
    """(folder, the whole model) of a config class, random."""

    def make(config_name, **options):
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, config_name)(vocab_size=512, **options)
        made = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(3)
        made.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model"), made.eval()

    return make


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}


def rows_of(folder, apart):
    forward = extraction.Forward(
        residual.ResidualModel(folder, 2, dtype=torch.float32),
        apart,
        n_shared=0,
        batch_tokens=64,
        storage_dtype="float32",
        dataset_name="d",
    )
    return forward.chunk(0, len(apart.lengths), lambda n: None)[2]


def alone(model, table):
    """The stream of each example of the table, run alone through the whole model."""
    rows = []
    for ids in np.split(table.ids, table.starts[1:-1]):
        with torch.inference_mode():
            out = model(torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True)
        rows.append(out.hidden_states[2][0].numpy())
    return np.concatenate(rows)


def masked(model, blocks, apart):
    """The stream of each whole block with a block-diagonal mask of the parts in it."""
    part = np.repeat(np.arange(len(apart.lengths)), apart.lengths)
    rows = []
    for first in blocks.starts[:-1]:
        here = slice(int(first), int(first) + BLOCK)
        sees = np.tril(part[here, None] == part[None, here])
        mask = torch.from_numpy(np.where(sees, 0.0, -np.inf).astype(np.float32))
        ids = torch.from_numpy(blocks.ids[here].astype(np.int64))
        with torch.inference_mode():
            out = model(
                ids[None],
                attention_mask=mask[None, None],
                position_ids=torch.arange(BLOCK)[None],
                output_hidden_states=True,
            )
        rows.append(out.hidden_states[2][0].numpy())
    return np.concatenate(rows)


def error(found, expected):
    return float(
        (np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()
    )


def test_blocks_are_cut_where_dialogues_and_blocks_begin(table):
    blocks, rest = cut_blocks(table, BLOCK)
    apart, same_rest = cut_apart(table, BLOCK)
    assert rest == same_rest == 1
    assert apart.starts.tolist() == EDGES
    assert apart.positions.tolist() == [0, 7, 19, 0, 0, 9, 14, 0, 12]
    assert apart.lines.tolist() == [1, 1, 1, 2, 3, 3, 3, 4, 4]
    for name in ("ids", "kind", "role"):
        assert (getattr(apart, name) == getattr(blocks, name)).all()
    assert cut_apart(table, BLOCK, own_positions=True)[0].positions is None


@pytest.mark.parametrize("kind, options", [("LlamaConfig", LLAMA), ("GPT2Config", GPT2)])
def test_apart_equals_the_dialogues_alone_and_the_block_diagonal_mask(model, table, kind, options):
    folder, whole = model(kind, **options)
    blocks, _ = cut_blocks(table, BLOCK)
    in_block, _ = cut_apart(table, BLOCK)
    from_zero, _ = cut_apart(table, BLOCK, own_positions=True)
    found, as_alone = rows_of(folder, in_block), rows_of(folder, from_zero)
    assert error(as_alone, alone(whole, from_zero)) <= 1e-5
    assert error(found, masked(whole, blocks, in_block)) <= 1e-5
    # where dialogues see each other the stream is another one
    assert error(found, rows_of(folder, blocks)) > 0.1
    # rotary positions are relative, a table of positions is not
    difference = error(found, as_alone)
    assert difference <= 1e-5 if kind == "LlamaConfig" else difference > 0.1


def test_a_model_without_positions_is_refused(model, table):
    folder, _ = model("BloomConfig", hidden_size=32, n_layer=3, n_head=4)
    apart, _ = cut_apart(table, BLOCK)
    with pytest.raises(InputError, match=r"^DIALOGUES_IN_BLOCKS: .* takes no positions\. choose"):
        rows_of(folder, apart)
    rows_of(folder, cut_apart(table, BLOCK, own_positions=True)[0])


def test_positions_count_towards_the_models_length(model, table):
    folder, _ = model("GPT2Config", **{**GPT2, "n_positions": 19})
    blocks, _ = cut_blocks(table, 20)
    parts, _ = cut_apart(table, 20)
    assert parts.lengths.max() == blocks.lengths.max() == 20  # one part is a whole block
    short = TokenTable(
        table.ids[:40], table.kind[:40], table.role[:40], np.full(4, 10), np.arange(1, 5)
    )
    with pytest.raises(InputError, match="has 20 tokens, and this model has 19 positions"):
        rows_of(folder, cut_apart(short, 20)[0])
    rows_of(folder, cut_apart(short, 20, own_positions=True)[0])


def test_the_stage_records_how_dialogues_stood_in_their_blocks(tmp_path, run_main, tiny_llama):
    rows = [{"text": "The bread rose twice while rain fell. " * n} for n in (1, 3, 2, 4)]
    dataset = tmp_path / "texts.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset-path", dataset, "--model-name", tiny_llama, "--layer-idx", 1]
    flags += ["--block-length", 32, "--label-field", "none", "--device", "cpu"]
    made = {}
    for name in ("joined", "apart", "apart, positions from 0"):
        folder = tmp_path / name[:5] / str(len(name))
        constant = f"fastsae.data.reading.DIALOGUES_IN_BLOCKS={name}"
        assert run_main("extract_activations", *flags, "--output-dir", folder, constant) == 0
        path = folder / "activations" / "activations_layer1.npz"
        made[name] = artifacts.read_npz(path, made_by="the test")
    about = {name: json.loads(str(data["metadata"])) for name, data in made.items()}
    recorded = [each["settings"].get("DIALOGUES_IN_BLOCKS") for each in about.values()]
    assert recorded == [None, "apart", "apart, positions from 0"]
    assert len({each["fingerprint"] for each in about.values()}) == 3
    joined, apart = made["joined"], made["apart"]
    assert (joined["token_ids"] == apart["token_ids"]).all()
    assert (joined["seq_lengths"] == 32).all() and apart["seq_lengths"].max() <= 32
    sums = np.bincount(apart["example_ids"], apart["seq_lengths"])
    assert (sums[1:] == 32).all()


def test_a_stream_refuses_it(tmp_path, run_main, tiny_llama, capsys):
    dataset = tmp_path / "texts.jsonl"
    dataset.write_text('{"text": "The bread rose twice while rain fell."}\n' * 8)
    flags = ["--dataset-path", dataset, "--model-name", tiny_llama, "--layer-idx", 1]
    flags += ["--block-length", 16, "--label-field", "none", "--device", "cpu"]
    flags += ["--stream-bytes", 1_000_000, "--output-dir", tmp_path]
    constant = "fastsae.data.reading.DIALOGUES_IN_BLOCKS=apart"
    assert run_main("extract_activations", *flags, constant) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: STREAM_BYTES: ") and said.endswith("leave it out.\n")
