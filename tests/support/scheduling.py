"""Which tests run in one of several processes of pytest-xdist: those of a file, which share its
fixtures, and of all files those that use the forks of the tiny world.

The process that gives out the tests knows their names only, so their fixtures are read from the
files. (pytest-xdist's own groups, --dist loadgroup, have no effect with pytest 9.)
"""

import ast
import functools
from pathlib import Path

from source_tree import PROJECT

SHARED = ("tests/conftest.py", "tests/support/tiny_world.py")
# Those that take longest go first: a process that begins with one of them in the end would work
# long after the others.
LONG = (
    "tests/test_pipeline.py",
    "forks",
    "tests/guarantees/test_guarantees_process.py",
    "tests/activations/test_extraction_scale.py",
    "tests/training/test_training.py",
    "tests/studies/test_studies_fast.py",
)


def arguments(path: Path) -> dict[str, set[str]]:
    """{function: what it takes} of a file: of a test or a fixture its fixtures."""
    return {
        node.name: {each.arg for each in [*node.args.args, *node.args.kwonlyargs]}
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }


@functools.cache
def tests_with_forks(path: str) -> frozenset[str]:
    """The functions of a test file that use the fixture `forks`, themselves or through others."""
    found = functools.reduce(dict.__or__, (arguments(PROJECT / each) for each in (*SHARED, path)))
    users = {"forks"}
    while more := {name for name, takes in found.items() if takes & users} - users:
        users |= more
    return frozenset(users)


def group(nodeid: str) -> str:
    """What a test runs together with: `forks`, or the path of its file."""
    path, _, name = nodeid.partition("::")
    return "forks" if name.partition("[")[0] in tests_with_forks(path) else path


def rank(nodeid: str) -> int:
    """Its group's place in LONG, or after all of them."""
    name = group(nodeid)
    return LONG.index(name) if name in LONG else len(LONG)


def scheduler(config, log):
    """What gives out the tests, group by group, in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group(nodeid)

    return Groups(config, log)
