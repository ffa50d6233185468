"""Public functions of the packages say what they take and give: typed signatures and docstrings.

mypy checks the types that stand there; this test, that they stand there.
"""

import ast

import pytest
from source_tree import PROJECT, python_files


def shortcomings(source: str) -> list[str]:
    """`name: what is missing` of the public functions of a module, and of its public classes."""
    found = []

    def look(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                look(node.body, f"{node.name}.")
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            if any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list):
                continue  # the function itself, below, is looked at
            taken = node.args
            several = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]
            several += [one for one in (taken.vararg, taken.kwarg) if one]
            missing = [
                one.arg
                for one in several
                if one.annotation is None and one.arg not in ("self", "cls")
            ]
            missing += ["its result"] * (node.returns is None)
            missing += ["a docstring"] * (ast.get_docstring(node) is None)
            found.extend(f"{prefix}{node.name}: {what}" for what in missing)

    look(ast.parse(source).body, "")
    return found


@pytest.mark.parametrize("path", python_files("fastsae", "experiments/shared"))
def test_public_functions_have_types_and_docstrings(path):
    assert shortcomings((PROJECT / path).read_text(encoding="utf-8")) == []


def test_the_search_sees_what_is_missing():
    source = (
        "def whole(a: int, *, b: str) -> None:\n    'Says what it does.'\n"
        "def half(a: int, b, *c, **d):\n    pass\n"
        "def _private(a):\n    pass\n"
        "class Thing:\n"
        "    def __init__(self, a):\n        pass\n"
        "    def act(self) -> int:\n        return 1\n"
        "class _Inner:\n    def act(self):\n        pass\n"
    )
    missing = ["half: b", "half: c", "half: d", "half: its result", "half: a docstring"]
    assert shortcomings(source) == [*missing, "Thing.act: a docstring"]
