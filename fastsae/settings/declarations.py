"""Reading the constants at the top of a file without running it.

A setting is an UPPER_CASE constant: one that `shipped.json` lists, annotated or not, or any other
that is annotated. Whatever else could be meant as a setting is refused rather than ignored.
"""

import ast
import functools
import io
import json
import operator
import re
import sys
import tokenize
from pathlib import Path
from typing import Any, NamedTuple

from fastsae.settings import kinds
from fastsae.settings.suggestions import nearest_name

SHIPPED = Path(__file__).with_name("shipped.json")  # {file: {NAME: {type, default, by_preset}}}
CORE = (
    "config.py",
    "extract_activations.py",
    "train_sae.py",
    "interpret_sae.py",
    "run_pipeline.py",
)
CONSTANT = r"[A-Z][A-Z0-9_]*"
LARGEST_EXPONENT = 64
ARITHMETIC: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Source(NamedTuple):
    """What a Python file says, read once."""

    tree: ast.Module
    comments: dict[int, str]  # by line
    hidden: list[tuple[str, int]]  # (name, line) set other than by a plain assignment at the margin
    read: set[str]  # names that it reads


class NotPlain(Exception):
    """An expression whose value is not known without running it."""


@functools.cache
def shipped() -> dict[str, dict[str, dict[str, Any]]]:
    """{file name: {NAME: {"type", "default", "by_preset"}}} as the project ships them."""
    return json.loads(SHIPPED.read_text(encoding="utf-8"))


def home_of(name: str) -> str | None:
    """The file, config.py or a stage's, that a setting belongs in."""
    return next((file for file in CORE if name in shipped().get(file, {})), None)


def refuse(problems: list[str]) -> None:
    """If there are problems print each on a line and end with exit code 2."""
    for problem in problems:
        print(f"error: {kinds.printable(problem)}", file=sys.stderr)
    if problems:
        sys.exit(2)


def read_settings(path: str | Path) -> dict[str, dict[str, Any]]:
    """{NAME: {type, value, has_value, comment, file, line}} of the settings of a file.

    Prints every line that cannot be read as a setting and exits 2.
    """
    settings, problems = settings_in(path)
    refuse(problems)
    return settings


def settings_in(path: str | Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(settings as `read_settings` gives them, problems) of a file."""
    file = Path(path).name
    try:
        source = read_source(path)
    except SyntaxError as error:
        return {}, [f"{file}:{error.lineno or 1}: {error.msg}. fix the line."]
    known = shipped().get(file, {})
    settings, problems, unread = {}, [], []
    for name, annotation, value, node in assignments(source.tree):
        if name not in known and annotation is None and name not in settings:
            continue
        setting = settings.setdefault(
            name,
            {
                "type": known[name]["type"] if name in known else ast.unparse(annotation),
                "annotation": None,
                "has_value": False,
                "value": None,
                "comment": "",
                "file": file,
                "line": node.lineno,
            },
        )
        setting["annotation"] = ast.unparse(annotation) if annotation else setting["annotation"]
        setting["comment"] = source.comments.get(node.end_lineno) or setting["comment"]
        if not kinds.is_known(setting["type"]):
            problems.append(
                f"{file}:{node.lineno}: {name} has the type {setting['type']}. "
                "use int, float, bool, str, tuple[int, ...], or one of these | None."
            )
            setting["type"] = "str | None"
            unread.append(name)
        elif value is not None:
            try:
                plain = plain_value(value)
                setting.update(value=plain, has_value=True, line=node.lineno)
            except NotPlain as error:
                problems.append(
                    f"{file}:{node.lineno}: {name} must be a plain value, "
                    f"not {error}. write the value itself."
                )
                unread.append(name)
    for name in unread:  # no other value stands in for it
        settings[name].update(has_value=True, value=None, unread=True)
    for setting in settings.values():
        if kinds.has_type(setting["value"], setting["type"]):
            setting["value"] = kinds.as_type(setting["value"], setting["type"])
    problems += [
        f"{file}:{line}: {name} is set in a way that is not seen, as files are read "
        f"without being run. write `{name} = value` on a line of its own, not indented."
        for name, line in source.hidden
        if name in settings or name in known
    ]
    if file in shipped():
        problems += missing(settings, known, file) + strangers(source, path)
    return settings, problems


def read_source(path: str | Path) -> Source:
    """What a Python file says; SyntaxError whatever is wrong with it."""
    try:
        with tokenize.open(path) as file:
            return look_at(file.read())
    except UnicodeDecodeError:
        raise SyntaxError("the file is not UTF-8 text", (str(path), 1, 0, "")) from None
    except (ValueError, RecursionError, MemoryError) as error:
        what = str(error) or "nested too deeply"
        raise SyntaxError(what, (str(path), 1, 0, "")) from None


@functools.lru_cache(maxsize=64)
def look_at(text: str) -> Source:
    """What the text of a Python file says."""
    tree = ast.parse(text)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    return Source(tree, comments, hidden_bindings(tree), names_read(tree))


def assignments(tree: ast.Module):
    """(NAME, annotation or None, value or None, statement) of each constant set at the margin.

    `A, B = 1, 2` and `A = B = 8` give two each.
    """
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if re.fullmatch(CONSTANT, node.target.id):
                yield node.target.id, node.annotation, node.value, node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for name, value in pairs(target, node.value):
                    if re.fullmatch(CONSTANT, name):
                        yield name, None, value, node


def pairs(target: ast.expr, value: ast.expr):
    """(name, its value) of an assignment, through tuples on both sides."""
    several = (ast.Tuple, ast.List)
    if isinstance(target, ast.Name):
        yield target.id, value
    elif (
        isinstance(target, several)
        and isinstance(value, several)
        and len(target.elts) == len(value.elts)
        and not any(isinstance(each, ast.Starred) for each in (*target.elts, *value.elts))
    ):
        for left, right in zip(target.elts, value.elts):
            yield from pairs(left, right)


def plain_value(node: ast.expr) -> Any:
    """The value of a literal, a tuple or list of them, or arithmetic on numbers (`4 * 128`)."""
    try:
        return evaluated(node)
    except (ArithmeticError, RecursionError):
        raise NotPlain(f"`{kinds.shown(ast.unparse(node))[1:-1]}`, which has no result") from None


def evaluated(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(evaluated(each) for each in node.elts)
    if isinstance(node, ast.UnaryOp) and type(node.op) in ARITHMETIC:
        return ARITHMETIC[type(node.op)](number(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = number(node.left), number(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > LARGEST_EXPONENT:
            raise OverflowError
        return ARITHMETIC[type(node.op)](left, right)
    raise NotPlain(f"`{kinds.shown(ast.unparse(node))[1:-1]}`")


def number(node: ast.expr) -> int | float:
    """The value of an operand; NotPlain if it is no number."""
    value = evaluated(node)
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or (isinstance(value, int) and value.bit_length() > 4096)
    ):
        raise NotPlain(f"`{kinds.shown(ast.unparse(node))[1:-1]}`")
    return value


def hidden_bindings(tree: ast.Module) -> list[tuple[str, int]]:
    """(name, line) wherever one is set other than by a plain assignment at the margin."""
    found = []
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            seen = {name for target in targets for name, _ in pairs(target, node.value or target)}
            found += [each for each in bindings(node) if each[0] not in seen]
        else:
            found += bindings(node)
    return found


def bindings(node: ast.AST):
    """(name, line) of what a statement binds in the module, functions with `global` included."""
    if isinstance(node, SCOPES):
        yield node.name, node.lineno
        for inner in ast.walk(node):
            if isinstance(inner, ast.Global):
                yield from ((name, inner.lineno) for name in inner.names)
        return
    if isinstance(node, ast.comprehension):  # its variables are its own
        yield from (each for child in (node.iter, *node.ifs) for each in bindings(child))
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
        yield node.id, node.lineno
    elif isinstance(node, ast.alias):
        yield node.asname or node.name.partition(".")[0], node.lineno
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name, node.lineno
    for child in ast.iter_child_nodes(node):
        yield from bindings(child)


def snapshot(paths: list[Path], preset: dict[str, Any]) -> str:
    """The text of `shipped.json` for these files; `preset` has what they give no value."""
    files = []
    for path in paths:
        lines = []
        for name, setting in settings_in(path)[0].items():
            about = {
                "type": setting["annotation"] or setting["type"],
                "default": setting["value"] if setting["has_value"] else preset[name],
                "by_preset": not setting["has_value"],
            }
            lines.append(f"  {json.dumps(name)}: {json.dumps(about)}")
        files.append(f" {json.dumps(path.name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(files) + "\n}\n"


def missing(settings: dict, known: dict, file: str) -> list[str]:
    """A line for each setting that the file ships with and that is no longer in it."""
    return [
        f"{file}: {name} is missing. write `{name}: {about['type']} = "
        f"{kinds.shown(default_of(about))}` at its top."
        for name, about in known.items()
        if name not in settings
    ]


def default_of(about: dict[str, Any]) -> Any:
    """The default of an entry of `shipped.json`, which has lists for tuples."""
    return kinds.as_type(about["default"], about["type"])


def strangers(source: Source, path: str | Path) -> list[str]:
    """A line for each constant that was meant as a setting and would be ignored.

    It is one of another file, or in lower case, or no setting at all and read nowhere.
    """
    file, problems = Path(path).name, []
    known = shipped().get(file, {})
    for name, line in names_set(source.tree):
        home = home_of(name.upper()) if file in CORE else file * (name.upper() in known)
        if name in known or (name != name.upper() and not home):
            continue
        if home and (name == name.upper() or name not in source.read):
            what = f"{name} is not read as a setting"
            remedy = f"write {name.upper()} in {home}"
        elif name in source.read or read_elsewhere(name, path):
            continue
        else:
            what = f"{name} is no setting, and nothing reads it"
            near = nearest_name(name, list(known))
            remedy = f"perhaps {near} is meant" if near else "remove it"
        problems.append(f"{file}:{line}: {what}. {remedy}.")
    return problems


def names_set(tree: ast.Module):
    """(name, line) of each plain assignment at the margin."""
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name, _ in pairs(target, node.value or target):
                    if re.fullmatch(CONSTANT, name.upper()):
                        yield name, node.lineno


def names_read(tree: ast.Module) -> set[str]:
    """The names that a file reads: as variables, attributes (`settings.M`) or strings (`"M"`)."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


def read_elsewhere(name: str, path: str | Path) -> bool:
    """Whether another file of the folder, or the package, has the name."""
    word = re.compile(rf"\b{re.escape(name)}\b")
    return any(
        word.search(other.read_text(encoding="utf-8", errors="replace"))
        for other in Path(path).parent.glob("*.py")
        if other.name != Path(path).name
    )
