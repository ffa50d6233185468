"""How the tests are run: in how many processes, which points, and what is said of them."""

import os
import subprocess
import sys
from types import SimpleNamespace

import conftest
import pytest
import scheduling

ARGUMENTS = pytest.Config.ArgsSource


def configured(source=ARGUMENTS.TESTPATHS, cores=2, worker=False, monkeypatch=None, **options):
    """pytest's options after `pytest_cmdline_main`, as pytest-xdist then reads them."""
    plain = {"numprocesses": None, "keyword": "", "usepdb": False, "collectonly": False}
    config = SimpleNamespace(
        option=SimpleNamespace(**plain | {"dist": "no"} | options),
        args_source=source,
        ArgsSource=ARGUMENTS,
    )
    if worker:
        config.workerinput = {}
    monkeypatch.setattr(conftest.sampling, "cores", lambda: set(range(cores)))
    conftest.pytest_cmdline_main(config)
    return config.option


@pytest.mark.parametrize("cores, expected", [(1, None), (2, 2), (3, 3), (64, 4)])
def test_the_whole_suite_runs_on_all_cores(monkeypatch, cores, expected):
    option = configured(cores=cores, monkeypatch=monkeypatch)
    assert option.numprocesses == expected


@pytest.mark.parametrize(
    "given",
    [
        {"source": ARGUMENTS.ARGS},
        {"source": ARGUMENTS.INVOCATION_DIR},
        {"keyword": "resampling"},
        {"usepdb": True},
        {"collectonly": True},
        {"worker": True},
    ],
    ids=str,
)
def test_anything_else_runs_in_one_process(monkeypatch, given):
    assert configured(monkeypatch=monkeypatch, **given).numprocesses is None


@pytest.mark.parametrize("n", [0, 7])
def test_a_number_that_is_given_stays(monkeypatch, n):
    assert configured(numprocesses=n, monkeypatch=monkeypatch).numprocesses == n


def test_it_runs_without_pytest_xdist(monkeypatch):
    config = SimpleNamespace(option=SimpleNamespace())  # its options are not there
    monkeypatch.setattr(conftest.sampling, "cores", lambda: {0, 1})
    conftest.pytest_cmdline_main(config)
    assert vars(config.option) == {}


def test_what_all_processes_tried_is_added_up(monkeypatch):
    monkeypatch.setattr(conftest, "COUNTS", {"kill points": [1, 10]})
    monkeypatch.setattr(conftest, "LEFT_OUT", {})
    for tried in ([{"kill points": [2, 20], "bits": [3, 3]}, {"test_a": (1, 4)}], [{}, {}]):
        conftest.pytest_testnodedown(SimpleNamespace(workeroutput={"tried": tried}))
    conftest.pytest_testnodedown(SimpleNamespace())  # one that died
    assert conftest.COUNTS == {"kill points": [3, 30], "bits": [3, 3]}
    assert conftest.LEFT_OUT == {"test_a": (1, 4)}


def test_the_tests_of_a_file_stay_together_and_so_do_those_of_the_tiny_world(request):
    """As pytest sees their fixtures."""
    for item in request.session.items:
        path = item.nodeid.partition("::")[0]
        expected = "forks" if "forks" in item.fixturenames else path
        assert scheduling.group(item.nodeid) == expected, item.nodeid
    some = {
        "tests/guarantees/test_guarantees_llm.py::test_an_attack_ends_in_whole_tables[nested JSON]",
        "tests/test_docs_commands.py::test_the_command_does_what_it_says[a-b]",
        "tests/activations/test_extraction_scale.py::test_kills_at_random_times_change_no_byte",
    }
    assert {scheduling.group(each) for each in some} == {"forks"}
    scale = "tests/activations/test_extraction_scale.py"
    assert scheduling.group(f"{scale}::test_shards_by_hand") == scale


def test_the_longest_go_first_and_the_others_in_their_order():
    names = [f"tests/{path}.py::test_a" for path in ("test_docs", "test_pipeline", "test_config")]
    assert sorted(names, key=scheduling.rank) == [names[1], names[0], names[2]]
    assert all(name == "forks" or (conftest.PROJECT / name).exists() for name in scheduling.LONG)


def test_several_processes_set_up_a_file_once(tmp_path):
    """As pytest-xdist gives them out: of two files with a fixture each, in two processes."""
    pytest.importorskip("xdist")
    fixture = "import os, pytest\n@pytest.fixture(scope='module')\ndef mine():\n"
    tests = "".join(f"def test_{i}(mine): pass\n" for i in range(6))
    for name in ("one", "two"):
        text = f"{fixture}    open(f'{name}-{{os.getpid()}}', 'w')\n{tests}"
        (tmp_path / f"test_{name}.py").write_text(text)
    (tmp_path / "conftest.py").write_text(
        "import pathlib, scheduling\n"
        "scheduling.PROJECT, scheduling.SHARED = pathlib.Path(__file__).parent, ()\n"
        "def pytest_xdist_make_scheduler(config, log): return scheduling.scheduler(config, log)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2"]
    env = {**os.environ, "PYTHONPATH": str(conftest.PROJECT / "tests" / "support")}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 0 and "12 passed" in done.stdout, done.stdout + done.stderr
    assert len(list(tmp_path.glob("one-*"))) == len(list(tmp_path.glob("two-*"))) == 1


def test_the_quick_run_comes_to_every_point(monkeypatch):
    """At even distances, or the first, the last and one of each kind; over the days, all."""
    monkeypatch.setattr(conftest.sampling, "exhaustive", False)
    seen, kinds = set(), ["write", "link"] * 10
    for day in range(20):
        monkeypatch.setattr(conftest.sampling, "day", day)
        chosen = conftest.sampling.points(range(100), 7)
        assert len(chosen) == 7 and chosen == sorted(chosen)
        of_kinds = conftest.sampling.points(range(20), kinds=kinds)
        assert {0, 19} <= set(of_kinds) and {kinds[i] for i in of_kinds} == set(kinds)
        seen |= {("even", i) for i in chosen} | {("kind", i) for i in of_kinds}
    assert {i for way, i in seen if way == "kind"} == set(range(20))
    assert len({i for way, i in seen if way == "even"}) >= 98
    monkeypatch.setattr(conftest.sampling, "exhaustive", True)
    assert conftest.sampling.points(range(100), 7) == list(range(100))
