"""RANK, WORLD_SIZE and their twins: which sets count, what is refused, and what is said of whom one
waits for."""

import ast
import os
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist
from conftest import PROJECT

from fastsae.activations import extraction
from fastsae.runtime import distributed, ranks
from fastsae.runtime.errors import EnvironmentFailure, InputError, Terminated
from fastsae.runtime.ranks import Ranks
from fastsae.runtime.stage import run_stage

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
REFUSED = [
    ({"RANK": "1"}, "WORLD_SIZE"),
    ({"RANK": "0"}, "WORLD_SIZE"),
    ({"WORLD_SIZE": "2"}, "RANK"),
    ({"WORLD_SIZE": "1"}, "RANK"),
    ({"LOCAL_RANK": "0"}, "RANK"),
    ({"LOCAL_WORLD_SIZE": "1"}, "RANK"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
    ({"RANK": "7", "WORLD_SIZE": "2"}, "RANK"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK"),
    ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK"),
    ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK"),
    *(
        ({**TORCHRUN, name: text}, name)
        for name in TORCHRUN
        for text in (
            "",
            " ",
            "abc",
            "-1",
            "1.5",
            "1 ",
            "+1",
            "1_0",
            "0x1",
            "\u0661",
            "1\n",
            "1" * 30,
            "nan",
            "\x1b[2J",
        )
    ),
]


def use(monkeypatch, **environment):
    for name in (*ranks.NAMES, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)


@pytest.mark.parametrize(("environment", "named"), REFUSED)
def test_half_a_set_and_nonsense_are_refused(environment, named):
    with pytest.raises(InputError) as error:
        ranks.current(environment)
    text = str(error.value)
    assert (
        text.startswith(f"{named}: ")
        and f"(unset {' '.join(n for n in ranks.NAMES if n in environment)})." in text
    )
    assert text.isascii() and text.isprintable()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks(0, 1, 0, 1)),
        (TORCHRUN, Ranks(5, 8, 1, 4)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Ranks(3, 4, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Ranks(0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Ranks(3, 4, 1, 2)),
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "OMPI_COMM_WORLD_RANK": "1"},
            Ranks(0, 1, 0, 1),
        ),
    ],
)
def test_whole_sets_count(environment, expected):
    assert ranks.current(environment) == expected


@pytest.mark.parametrize("script", ["extract_activations", "train_sae", "interpret_sae"])
@pytest.mark.parametrize(
    "environment", [{"RANK": "1"}, {"RANK": "abc", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "2"}]
)
def test_every_stage_refuses_in_one_line(
    tmp_path, monkeypatch, run_main, capsys, script, environment
):
    use(monkeypatch, **environment)
    assert run_main(script, "--output-dir", tmp_path) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ") and "unset" in err
    assert list(tmp_path.iterdir()) == []


def test_the_pipeline_and_stage_3_are_one_process_work(tmp_path, monkeypatch, run_main, capsys):
    use(monkeypatch, RANK="1", WORLD_SIZE="2")
    assert run_main("interpret_sae", "--output-dir", tmp_path) == 2
    assert capsys.readouterr().err == (
        "error: WORLD_SIZE: 2 processes were started, but interpret_sae.py is the work of one. "
        "start it once, without torchrun.\n"
    )
    use(monkeypatch, RANK="0", WORLD_SIZE="2")
    done = subprocess.run(
        [sys.executable, PROJECT / "run_pipeline.py", "--output-dir", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr == (
        "error: WORLD_SIZE: 2 processes were started, but run_pipeline.py is the work of one. "
        "give torchrun the stages one by one.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_reads_the_variables():
    """Every other file asks `ranks`, so that all stages mean the same by them.

    But for one that may import nothing yet: it compares a text, and decides whose message is heard.
    """
    for path in [*PROJECT.glob("*.py"), *(PROJECT / "fastsae").glob("*.py")]:
        names = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant)
        }
        assert path.name in ("ranks.py", "early_stop.py") or not names & set(ranks.NAMES), path


def test_listed():
    assert [ranks.listed(some) for some in ([1], {2, 1}, [3, 1, 2])] == [
        "rank 1",
        "ranks 1 and 2",
        "ranks 1, 2 and 3",
    ]
    assert ranks.listed(range(64)).endswith("9, 10 and 53 others")


def test_rank_0_says_for_whose_parts_it_waits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranks.Waiting, "FIRST_WORD", 0.0)
    use(monkeypatch, RANK="0", WORLD_SIZE="3")
    paths, done = {i: tmp_path / f"part-{i}" for i in (1, 2, 4, 5)}, []
    paths[1].touch()
    paths[4].touch()
    monkeypatch.setattr(extraction.time, "sleep", lambda _: (paths[2].touch(), paths[5].touch()))
    extraction.await_parts(dict(paths), [10, 1, 2, 10, 4, 5], extraction.World(), done.append)
    assert capsys.readouterr().err == "waiting for rank 2 to write 2 more parts.\n" and sorted(
        done
    ) == [1, 2, 4, 5]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, "MASTER_ADDR"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"}, "MASTER_PORT"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "MASTER_PORT"),
    ],
)
def test_training_needs_a_place_to_meet(monkeypatch, outcome, environment, named):
    use(monkeypatch, RANK="0", WORLD_SIZE="2", **environment)
    code, lines = outcome(lambda: distributed.start("cpu"))
    assert (code, len(lines)) == (2, 1) and lines[0].startswith(f"error: {named}: ")


def test_training_says_for_whom_it_waits(monkeypatch, capsys):
    """Rank 0 for ranks 1 and 2, then for rank 2 alone, until that comes as well."""
    use(monkeypatch, RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    monkeypatch.setattr(ranks.Waiting, "FIRST_WORD", 0.0)
    monkeypatch.setattr(ranks.Waiting, "EVERY", 0.0)
    others = iter([1, 2])

    def come(_):
        store.set(f"here/{next(others)}", "")

    stores = distributed._store
    store = stores(0, 3)
    monkeypatch.setattr(distributed, "_store", lambda rank, size: store)
    monkeypatch.setattr(distributed.time, "sleep", come)
    assert distributed._meet(0, 3) is store
    assert capsys.readouterr().err.splitlines() == [
        "waiting for ranks 1 and 2 of 3 to start this stage.",
        "waiting for rank 2 of 3 to start this stage.",
    ]


def test_who_never_comes_is_named(monkeypatch):
    monkeypatch.setattr(distributed, "_store", lambda rank, size: dist.HashStore())
    monkeypatch.setattr(distributed, "PATIENCE", distributed.timedelta(0))
    with pytest.raises(EnvironmentFailure, match="^WORLD_SIZE: rank 1 of 2 did not come"):
        distributed._meet(0, 2)


def test_other_ranks_wait_for_rank_0_to_answer(monkeypatch, capsys):
    """A listener that opens late is found, and its absence is said."""
    monkeypatch.setattr(ranks.Waiting, "FIRST_WORD", 0.0)
    port, opened = int(free_port()), []
    monkeypatch.setattr(
        distributed.time,
        "sleep",
        lambda _: opened or opened.append(socket.create_server(("127.0.0.1", port))),
    )
    distributed._await_answer("127.0.0.1", port)
    opened[0].close()
    assert (
        capsys.readouterr().err
        == f"waiting for rank 0 to answer at 127.0.0.1:{port} (Connection refused).\n"
    )
    monkeypatch.setattr(distributed, "PATIENCE", distributed.timedelta(0))
    with pytest.raises(EnvironmentFailure, match="^MASTER_ADDR: no answer from 127.0.0.1"):
        distributed._await_answer("127.0.0.1", port)


def test_processes_that_share_a_cuda_device_are_refused(monkeypatch):
    """NCCL would end with a page of its own."""
    store = dist.HashStore()
    monkeypatch.setattr(
        distributed.torch.cuda,
        "get_device_properties",
        lambda device: type("P", (), {"uuid": "GPU-1"}),
    )
    for rank, other in ((0, "GPU-2"), (1, "GPU-1")):
        store.set("device/2", f"{os.uname().nodename} GPU-3")
        store.set(f"device/{1 - rank}", f"{os.uname().nodename} {other}")
        if rank == 0:
            distributed.say_device(store, 0, "cuda:0")
            distributed.require_own_device(store, 0, 3, "cuda:0")
            continue
        with pytest.raises(
            InputError, match="^DEVICE: ranks 0 and 1 would train on the same GPU, cuda:0"
        ):
            distributed.say_device(store, 1, "cuda:0")
            distributed.require_own_device(store, 1, 3, "cuda:0")


def test_a_stop_is_left_to_all_where_others_wait(monkeypatch):
    from fastsae.runtime import stops

    monkeypatch.setitem(stops._waiting, "asked", 15)
    with pytest.raises(Terminated):
        stops.stop_if_asked()
    monkeypatch.setitem(stops._waiting, "joined", True)
    stops.stop_if_asked()
    assert run_stage(lambda: None) == 0
