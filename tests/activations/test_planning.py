"""The order in which examples go through the model on a GPU, and their way back into that of the
dataset."""

import numpy as np
import pytest

from fastsae.activations import compression, extraction, planning
from fastsae.activations.assembly import Assembly
from fastsae.activations.files import open_activations
from fastsae.data.tokenization import TokenTable
from fastsae.runtime import artifacts


def drawn(n, seed=0):
    """(n,) lengths of which some are equal."""
    return np.random.default_rng(seed).integers(1, 40, n)


def table_of(lengths):
    """Tokens that say their own row."""
    n = int(lengths.sum())
    kind = np.arange(n) % 3
    return TokenTable(
        np.arange(n, dtype=np.int32),
        kind.astype(np.uint8),
        kind.astype(np.uint8),
        lengths.astype(np.int32),
        np.arange(len(lengths), dtype=np.int32) + 100,
    )


def test_a_plan_by_hand():
    """Batches of 20 padded tokens: [9, 8] [7, 6] [5, 4, 3, 2] [1]; the third comes first."""
    lengths = np.array([1, 9, 2, 8, 3, 7, 4, 6, 5])
    plan = planning.plan_by_length(lengths, 20, chunk_tokens=30)
    assert lengths[plan.order].tolist() == [5, 4, 3, 2, 9, 8, 7, 6, 1]
    # 30 tokens of the longest two batches, and what is left
    assert plan.chunks == [(0, 4), (4, 8), (8, 9)]
    assert planning.efficiency(lengths, plan, 20) == 45 / (18 + 14 + 20 + 1)
    within = planning.plan_by_chunks(lengths, 18)
    assert within == (None, [(0, 4), (4, 8), (8, 9)])
    # [9, 8] [2, 1], [7, 6] [4, 3], [5]
    assert planning.efficiency(lengths, within, 20) == 45 / (18 + 4 + 14 + 8 + 5)


@pytest.mark.parametrize("window_tokens", [100, 700, 10**6])
@pytest.mark.parametrize("chunk_tokens", [1, 150, 10**6])
def test_every_example_once_and_chunks_within_a_window(window_tokens, chunk_tokens):
    lengths, batch_tokens = drawn(200), 80
    plan = planning.plan_by_length(lengths, batch_tokens, chunk_tokens, window_tokens)
    assert sorted(plan.order.tolist()) == list(range(200))
    assert [first for first, _ in plan.chunks] == [0, *(last for _, last in plan.chunks[:-1])]
    windows = extraction.split_chunks(lengths, window_tokens)
    for first, last in plan.chunks:
        here = plan.order[first:last]
        assert any(a <= here.min() and here.max() < b for a, b in windows)
        batches = extraction.split_batches(lengths[here], batch_tokens)
        assert lengths[here].sum() <= chunk_tokens or len(batches) == 1


def test_batches_are_mostly_tokens():
    """Of texts with a median of 60 and of 250 tokens, as on a GPU; 0.57 and 0.75 within chunks."""
    from experiments.benchmarks import feeding

    for median in feeding.MEDIANS:
        lengths = feeding.lengths_of(median, 20_000)
        plan = planning.plan_by_length(lengths, feeding.BATCH_TOKENS, 24_576)
        assert planning.efficiency(lengths, plan, feeding.BATCH_TOKENS) >= 0.97


def test_a_table_in_another_order():
    table, order = table_of(np.array([3, 1, 2])), np.array([2, 0, 1])
    found = planning.reordered(table, order)
    assert found.ids.tolist() == [4, 5, 0, 1, 2, 3] and found.lines.tolist() == [102, 100, 101]
    assert found.kind.tolist() == [1, 2, 0, 1, 2, 0] and found.lengths.tolist() == [2, 3, 1]


def test_moves_by_hand():
    moves = planning.Moves(np.array([2, 0, 1, 3]), np.array([3, 1, 2, 5]))
    # examples 2, 0, 1, 3 of 2, 3, 1, 5 rows; in the file they begin at 4, 0, 3, 6
    assert moves.runs(0, 2) == [(4, 2)]
    assert moves.runs(0, 5) == [(4, 2), (0, 3)]
    assert moves.runs(2, 9) == [(0, 4), (6, 5)]
    assert moves.rows_of_examples(0, 4).tolist() == [2, 3, 4, 5, 0, 1, 6, 7, 8, 9, 10]
    assert moves.rows_of_examples(1, 3).tolist() == [5, 0, 1]


META = artifacts.new_metadata("activations", {"LAYER_IDX": 2}, {})


@pytest.mark.parametrize("shards", [[(0, 30)], [(0, 4), (4, 19), (19, 30)]])
@pytest.mark.parametrize("storage_dtype", ["float16", "int8"])
def test_rows_come_back_into_the_order_of_the_dataset(tmp_path, shards, storage_dtype):
    """The same bytes as without another order, whatever the order in which chunks come."""
    lengths = drawn(30)
    table = table_of(lengths)
    rows = np.random.default_rng(1).standard_cauchy((len(table.ids), 3)).clip(-99, 99)
    rows = rows.astype(np.float16)
    calibration = compression.calibrate(rows, np.zeros(len(rows), np.uint8))
    calibration = calibration._replace(spread=calibration.spread / 50)  # some rows are exact
    plan = planning.plan_by_length(lengths, 60, 130, window_tokens=300)
    written = {}
    for name, order in (("moved", plan.order), ("plain", None)):
        moves = None if order is None else planning.Moves(order, lengths)
        ordered = table if order is None else planning.reordered(table, order)
        assembly = Assembly(
            tmp_path / name / "activations_layer2.npz",
            [0, *(int(table.starts[last]) for _, last in shards)],
            d_model=3,
            storage_dtype=storage_dtype,
            folder=tmp_path / name / ".parts-x",
            plan="p",
            fingerprint=META["fingerprint"],
            moves=moves,
        )
        chunks = [(0, 30)] if order is None else plan.chunks
        places = extraction.places_of(ordered, chunks)
        placed, notes = [], []
        for i, (first, n) in enumerate(places):
            assert order is None or not assembly.holds(first, n) or i
            values = rows[ordered.ids[first : first + n]]
            if storage_dtype == "int8":
                # one limit for all rows, as `pack` has it for those of a chunk
                packed = packed_alike(values, calibration)
                values = packed.codes
                notes.append(tmp_path / name / f"note-{i}.npz")
                artifacts.write_npz(notes[-1], compression.note_of(packed, 2, first))
            placed.append((first, n, assembly.place(first, values)))
            assert assembly.holds(first, n)
        checksums = assembly.checksums(placed[::-1])
        for number, (first, last) in enumerate(shards):
            a, b = int(table.starts[first]), int(table.starts[last])
            which = (a, b) if moves is None else moves.rows_of_examples(first, last)
            others = {
                "seq_lengths": table.lengths[first:last],
                "token_ids": table.ids[a:b],
                "token_kind": table.kind[a:b],
                "token_role": table.role[a:b],
                "example_ids": table.lines[first:last],
                "metadata": np.array(
                    artifacts.to_json({**META, "shard": number + 1, "n_shards": len(shards)})
                ),
            }
            if notes:
                others |= compression.noted_members(notes, places, 2, calibration, which)
                assert len(others["exact_rows"])
            assembly.finish(number, checksums[number], others)
        written[name] = [path.read_bytes() for path in sorted((tmp_path / name).glob("act*"))]
        found = open_activations(tmp_path / name / "activations_layer2.npz")
        assert storage_dtype == "int8" or np.array_equal(np.asarray(found["activations"][:]), rows)
    assert written["moved"] == written["plain"] and len(written["plain"]) == len(shards)


def packed_alike(values, calibration):
    """`pack` without its limit on the number of exact rows."""
    before, compression.EXACT_EVERY = compression.EXACT_EVERY, 1
    try:
        return compression.pack(values, calibration)
    finally:
        compression.EXACT_EVERY = before
