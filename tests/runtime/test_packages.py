"""Parts of a package are imported without the rest of it, and the package is whole for whoever uses
it afterwards."""

import ast
import importlib
import sys

import pytest
from conftest import PROJECT
from source_tree import python_files

from fastsae.runtime.packages import postpone_init

INIT = """
from .light import VALUE
from .pick import pick
import {other}
__all__ = ["VALUE", "pick"]
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose __init__ imports `other`, and gives a function the name of its module."""

    def make(other="sys"):
        folder = tmp_path / "a_large_package"
        folder.mkdir()
        (folder / "__init__.py").write_text(INIT.format(other=other))
        (folder / "light.py").write_text("VALUE = object()\n")
        (folder / "pick.py").write_text("def pick(): return 'picked'\n")
        monkeypatch.syspath_prepend(tmp_path)
        return folder

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "a_large_package"]:
        del sys.modules[name]


def initialised():
    return "pick" in vars(sys.modules["a_large_package"])


def test_a_part_comes_without_the_package(package):
    package()
    postpone_init("a_large_package")
    light = importlib.import_module("a_large_package.light")
    whole = importlib.import_module("a_large_package")
    assert not hasattr(whole, "__wrapped__") and not initialised()  # inspect asks such things
    assert whole.__file__.endswith("__init__.py") and whole.__spec__.name == "a_large_package"
    assert whole.VALUE is light.VALUE and initialised()  # one class, not two of that name
    assert whole.light is light


@pytest.mark.parametrize("part_first", [False, True])
def test_the_package_is_what_it_is_without(package, part_first):
    package()
    plain = importlib.import_module("a_large_package")
    expected = {name: type(value) for name, value in vars(plain).items()}
    for name in [name for name in sys.modules if name.startswith("a_large_package")]:
        del sys.modules[name]
    postpone_init("a_large_package")
    if part_first:  # the import binds the module, then __init__ the function of the same name
        importlib.import_module("a_large_package.pick")
    found = {}
    exec("from a_large_package import *", found)
    assert found["pick"]() == "picked" and "VALUE" in found
    later = importlib.import_module("a_large_package")
    assert {name: type(value) for name, value in vars(later).items()} == expected
    with pytest.raises(AttributeError):
        _ = later.nothing


def test_a_package_that_cannot_be_imported_says_so_each_time(package):
    package(other="no_such_module_of_all")
    postpone_init("a_large_package")
    whole = importlib.import_module("a_large_package")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_of_all"):
            _ = whole.other


def test_what_is_imported_or_not_installed_stays(package):
    package()
    plain = importlib.import_module("a_large_package")
    postpone_init("a_large_package")
    assert sys.modules["a_large_package"] is plain
    postpone_init("no_such_module_of_all")
    assert "no_such_module_of_all" not in sys.modules


def hasty(source):
    """Functions that import of hypothesaes before they postpone the rest of it."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            postponed = [
                call.lineno for call in calls if ast.unparse(call) == "postpone_init('hypothesaes')"
            ]
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hypothesaes"):
                    if min(postponed, default=node.lineno) >= node.lineno:
                        found.append(function.name)
    return found


def test_no_stage_waits_for_what_it_does_not_need():
    texts = [(PROJECT / path).read_text() for path in python_files("fastsae")]
    assert sum("from hypothesaes." in text for text in texts) >= 3
    assert [name for text in texts for name in hasty(text)] == []
    assert hasty("def f():\n    from hypothesaes.sae import A\n") == ["f"]
