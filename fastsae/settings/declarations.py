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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastsae.settings import kinds
from fastsae.settings.architectures import ARCHITECTURES, FORMER_SWITCHES
from fastsae.settings.limits import Limits, limits_of
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
REGISTERED = {"ARCHITECTURE": Limits(choices=tuple(ARCHITECTURES))}  # not on the setting's line
# {what has all values of a setting that may have several: the setting}
SEVERAL = {
    "LAYERS": "LAYER_IDX",
    "SEEDS": "SEED",
    "K_LIST": "K",
    "SPARSITY_COEFFICIENT_LIST": "SPARSITY_COEFFICIENT",
}
# {former setting: (the one in its place, what to give it for example)}
RENAMED: dict[str, tuple[str, Any]] = {
    "K_LIST": ("K", (8, 16)),
    "L1_COEFFICIENT_LIST": ("SPARSITY_COEFFICIENT", (1.0, 5.0)),
    "L1_COEFFICIENT": ("SPARSITY_COEFFICIENT", 5.0),
    "L0_COEFFICIENT": ("SPARSITY_COEFFICIENT", 6.0),
    "SEEDS": ("SEED", (0, 1)),
    "LAYERS": ("LAYER_IDX", (12, 18)),
    "PROCESSING": ("BLOCK_LENGTH", 2048),
    "USE_MATRYOSHKA": ("MATRYOSHKA_PREFIXES", "auto"),
    "NO_USE_MATRYOSHKA": ("MATRYOSHKA_PREFIXES", None),
    "LR_WARMUP_STEPS": ("WARMUP_STEPS", 100),
    "SPARSITY_WARMUP_STEPS": ("WARMUP_STEPS", 100),
    "EXCLUDE_SHARED_PREFIX": ("USE_TOKENS", "all"),
    "NO_EXCLUDE_SHARED_PREFIX": ("USE_TOKENS", "all+prefix"),
    "MODEL_REVISION": ("MODEL_NAME", "owner/name@main"),
    "NEURONPEDIA_MODEL": ("NEURONPEDIA_SET", "model/set"),
    "PRINT_SETTINGS": ("QUIET", True),
    **{name: ("ARCHITECTURE", now) for name, now in FORMER_SWITCHES.items()},
}
# {former setting: the file whose constant it is now}
CONSTANTS = {
    "TEMPLATE_DATE": "fastsae/data/tokenization.py",
    "CHUNK_TOKENS": "fastsae/activations/extraction.py",
    "SHARD_BYTES": "fastsae/activations/extraction.py",
    "AUX_COEF": "fastsae/training/objective.py",
    "JUMPRELU_BANDWIDTH": "fastsae/training/objective.py",
    "LR_DECAY_FRACTION": "fastsae/training/objective.py",
    "INIT_DIRECTIONS": "fastsae/training/objective.py",
    "INIT_CENTRE": "fastsae/training/objective.py",
    "INIT_ENCODER_SCALE": "fastsae/training/objective.py",
    "ENGINE": "fastsae/training/objective.py",
    "JUMPRELU_LOSS": "fastsae/training/objective.py",
    "CLIP_GRAD": "fastsae/training/objective.py",
    "SAVE_EVERY": "fastsae/training/loop.py",
    "POOLING": "fastsae/interpretation/features.py",
    "TARGET_POOLING": "fastsae/interpretation/features.py",
}
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
GROUP = re.compile(r"# ([A-Z][\w, ]*):")  # a line at the margin, above the settings it heads
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Source(NamedTuple):
    """What a Python file says, read once."""

    tree: ast.Module
    comments: dict[int, str]  # by line; indented comment lines go on with the one above
    groups: dict[int, str]  # headings of the settings below them, by line
    hidden: list[tuple[str, int]]  # (name, line) set other than by a plain assignment at the margin
    read: set[str]  # names that it reads

    def group_at(self, line: int) -> str:
        """The heading above a line; empty if there is none."""
        above = [at for at in self.groups if at < line]
        return self.groups[max(above)] if above else ""


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
    """{NAME: {type, value, has_value, comment, limits, group, file, line}} of a file's settings.

    Prints every line that cannot be read as a setting and exits 2.
    """
    settings, problems = settings_in(path)
    refuse(problems)
    return settings


def settings_in(
    path: str | Path, *, as_written: bool = False
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(settings as `read_settings` gives them, problems) of a file.

    Limits and groups are those that `shipped.json` has, or `as_written` in the file's comments.
    """
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
                "limits": Limits(),
                "group": "",
                "file": file,
                "line": node.lineno,
            },
        )
        setting["annotation"] = ast.unparse(annotation) if annotation else setting["annotation"]
        if comment := source.comments.get(node.end_lineno):
            setting["limits"], setting["comment"] = limits_of(comment)
        setting["group"] = source.group_at(node.lineno)
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
    finish(settings, {} if as_written else known, unread)
    problems += [
        f"{file}:{line}: {name} is set in a way that is not seen, as files are read "
        f"without being run. write `{name} = value` on a line of its own, not indented."
        for name, line in source.hidden
        if name in settings or name in known
    ]
    if file in shipped():
        problems += missing(settings, known, file) + strangers(source, path)
    return settings, problems


def finish(settings: dict, known: dict, unread: list[str]) -> None:
    """Put in what an edited line may have lost, and each value in its one form."""
    for name, setting in settings.items():
        if name in known:
            setting["limits"] = limits_from(known[name])
            setting["group"] = known[name].get("group", "")
        if name in REGISTERED:
            setting["limits"] = REGISTERED[name]
        if name in unread:  # no other value stands in for it
            setting.update(has_value=True, value=None, unread=True)
        if kinds.has_type(setting["value"], setting["type"]):
            setting["value"] = kinds.as_type(setting["value"], setting["type"])


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
    comments, groups = comments_in(text)
    return Source(tree, comments, groups, hidden_bindings(tree), names_read(tree))


def comments_in(text: str) -> tuple[dict[int, str], dict[int, str]]:
    """({line: comment}, {line: heading}) of a file's text."""
    comments: dict[int, str] = {}
    groups: dict[int, str] = {}
    first = last = 0  # lines of the comment that the next one may go on with
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, column = token.start
        words = token.string.lstrip("# ").rstrip()
        alone = token.line.lstrip().startswith("#")
        if alone and column == 0:
            if heading := GROUP.match(token.string):
                groups[line] = heading[1]
        elif alone and last == line - 1:
            comments[first] += f" {words}"
            last = line
        else:
            comments[line] = words
            first = last = line
    return comments, groups


def assignments(tree: ast.Module) -> Iterator[tuple[str, Any, Any, Any]]:
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


def pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
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
    """`plain_value`, in which a result that cannot be is an ArithmeticError."""
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
    """The value of an operand; NotPlain if it is not a number."""
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


def bindings(node: ast.AST) -> Iterator[tuple[str, int]]:
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
        for name, setting in settings_in(path, as_written=True)[0].items():
            about: dict[str, Any] = {
                "type": setting["annotation"] or setting["type"],
                "default": setting["value"] if setting["has_value"] else preset[name],
                "by_preset": not setting["has_value"],
            }
            if setting["group"]:
                about["group"] = setting["group"]
            if (limits := differing(setting["limits"])) and name not in REGISTERED:
                about["limits"] = limits
            lines.append(f"  {json.dumps(name)}: {json.dumps(about)}")
        files.append(f" {json.dumps(path.name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(files) + "\n}\n"


def differing(limits: Limits) -> dict[str, Any]:
    """What `shipped.json` says of limits: those that there are."""
    return {
        name: value
        for name, value in limits._asdict().items()
        if value != Limits._field_defaults[name]
    }


def limits_from(about: dict[str, Any]) -> Limits:
    """The limits in an entry of `shipped.json`."""
    limits = about.get("limits", {})
    return Limits(**{**limits, "choices": tuple(limits.get("choices", ()))})


def shipped_limits() -> dict[str, Limits]:
    """{NAME: limits} of all settings of config.py and the stages."""
    found = {
        name: limits_from(about) for file in CORE for name, about in shipped().get(file, {}).items()
    }
    return {**found, **REGISTERED}


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
        if file in CORE and (remedy := instead_of(name)):
            problems.append(f"{file}:{line}: {name} is not a setting any more. {remedy}.")
            continue
        home = home_of(name.upper()) if file in CORE else file * (name.upper() in known)
        if name in known or (name != name.upper() and not home):
            continue
        if home and (name == name.upper() or name not in source.read):
            what = f"{name} is not read as a setting"
            remedy = f"write {name.upper()} in {home}"
        elif name in source.read or read_elsewhere(name, path):
            continue
        else:
            what = f"{name} is not a setting, and nothing reads it"
            near = nearest_name(name, list(known))
            remedy = f"perhaps {near} is meant" if near else "remove it"
        problems.append(f"{file}:{line}: {what}. {remedy}.")
    return problems


def instead_of(name: str) -> str | None:
    """What to write in a file in place of a former setting; None of any other name."""
    if name in RENAMED and not name.startswith("NO_"):
        now, example = RENAMED[name]
        return f"write for example {now} = {example!r} in {home_of(now)}"
    return f"edit the constant in {CONSTANTS[name]}" if name in CONSTANTS else None


def names_set(tree: ast.Module) -> Iterator[tuple[str, int]]:
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
