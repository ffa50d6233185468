"""How the tests are run: in how many processes, which points, and what is said of them."""

from types import SimpleNamespace

import conftest
import pytest

ARGUMENTS = pytest.Config.ArgsSource


def configured(source=ARGUMENTS.TESTPATHS, cores=2, worker=False, monkeypatch=None, **options):
    """pytest's options after `pytest_cmdline_main`, as pytest-xdist then reads them."""
    plain = {"numprocesses": None, "keyword": "", "usepdb": False, "collectonly": False}
    config = SimpleNamespace(
        option=SimpleNamespace(**plain | {"dist": "no", "loadscopereorder": True} | options),
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
    assert option.dist == ("loadgroup" if expected else "no")


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


def test_the_tests_of_a_file_stay_together_and_so_do_those_of_the_tiny_world():
    def item(path, *fixtures):
        return SimpleNamespace(path=SimpleNamespace(stem=path), fixturenames=fixtures)

    world = [item("test_guarantees_kill", "forks"), item("test_docs_commands", "tiny", "forks")]
    others = [item("test_pipeline"), item("test_tables", "tmp_path"), item("test_docs")]
    assert {conftest._group(each) for each in world} == {"world"}
    assert [conftest._group(each) for each in others] == [each.path.stem for each in others]
    # the longest first, the others in their order
    ordered = sorted([*others[::-1], *world], key=conftest._rank)
    assert [each.path.stem for each in ordered[:1]] == ["test_pipeline"]
    assert [each.path.stem for each in ordered[-2:]] == ["test_docs", "test_tables"]
    known = {path.stem for path in (conftest.PROJECT / "tests").rglob("test_*.py")}
    assert set(conftest.LONG) <= known | {"world"}


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
