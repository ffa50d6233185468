"""The project's Python files and what they import from each other, read as text: the ground of the
tests that guard the layout.

Everything here goes through sub-folders, and files are named by their path, so that a file which
moves into a package stays guarded.
"""

import ast
import functools
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def python_files(*folders: str, root: Path = PROJECT) -> list[str]:
    """Paths of the Python files below `folders`, relative to `root`; "." names those in `root`
    itself."""
    found = set()
    for folder in folders:
        paths = root.glob("*.py") if folder == "." else (root / folder).rglob("*.py")
        found |= {path.relative_to(root).as_posix() for path in paths}
    return sorted(found)


def module_name(path: str) -> str:
    """`fastsae/lm/hub.py` -> `fastsae.lm.hub`; a package is named by its folder."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, root: Path = PROJECT, top_level: bool = False) -> set[str]:
    """Full names of all that a file imports: modules, and `module.name` of from-imports. Inside
    functions too, unless `top_level`."""
    package = module_name(path).split(".")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    found = set()
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def module_graph(folder: str, root: Path = PROJECT) -> dict[str, set[str]]:
    """{module: modules of the same folder that it imports}, packages left out unless they hold code
    of their own."""
    files = {module_name(path): path for path in python_files(folder, root=root)}
    return {
        name: {
            found
            for found in imports(path, root)
            if found in files and found != name and not name.startswith(f"{found}.")
        }
        for name, path in files.items()
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other through their imports."""
    reached = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted({name} | {other for other in reached[name] if name in reached[other]}))
        for name in graph
    }
    return [list(group) for group in sorted(groups) if len(group) > 1]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def packages_of(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between packages: {package: packages it imports}; a module that stands in no package
    is one by itself."""

    def package(module):
        return module.split(".")[1] if "." in module else module

    found: dict[str, set[str]] = {package(module): set() for module in graph}
    for module, others in graph.items():
        found[package(module)] |= {package(other) for other in others} - {package(module)}
    return found


def floors(graph: dict[str, set[str]]) -> int:
    """The longest way down from one module to the next; a circle counts as one."""
    group = {name: name for name in graph}
    for names in circles(graph):
        group |= dict.fromkeys(names, names[0])
    below: dict[str, set[str]] = {name: set() for name in group.values()}
    for name, others in graph.items():
        below[group[name]] |= {group[other] for other in others} - {group[name]}

    @functools.cache
    def depth(name):
        return 1 + max(map(depth, below[name]), default=0)

    return max(map(depth, below))


def imports_in_functions(path: str, root: Path = PROJECT) -> int:
    """How many import statements a file has inside functions."""
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    statements = (ast.Import, ast.ImportFrom)
    return len(
        {each for node in functions for each in ast.walk(node) if isinstance(each, statements)}
    )


def main() -> None:
    """Print how `fastsae` stands: `python tests/support/source_tree.py [another checkout]`."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PROJECT
    modules = module_graph("fastsae", root)
    for name, graph in (("modules", modules), ("packages", packages_of(modules))):
        arrows = sum(map(len, graph.values()))
        print(
            f"{len(graph)} {name}: {floors(graph)} floors, {arrows} arrows, "
            f"{len(circles(graph))} circles"
        )
    files = python_files(".", "fastsae", root=root)
    print(
        f"{sum(path.count('/') == 1 for path in files)} files directly in fastsae/, "
        f"{sum(imports_in_functions(path, root) for path in files)} imports inside functions "
        f"of {len(files)} files, the scripts among them"
    )


if __name__ == "__main__":
    main()
