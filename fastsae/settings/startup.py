"""A slip in an edited constant is one line and exit code 2, not a traceback.

Nothing can be said of a syntax error in the very file that Python was told to run: Python reads it
first. `run_pipeline.py` reads the stages' files before it starts them. What this needs is imported
when there is something to say, since the first lines of a script are to be quick.
"""

import os
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FOLDERS = (PROJECT, os.path.join(PROJECT, "experiments", "studies"))


def explain_slips() -> None:
    """To be called before config.py is imported."""
    sys.excepthook = _hook


def _hook(kind: type[BaseException], error: BaseException, trace: object) -> None:
    from fastsae.settings.kinds import printable

    if place := place_of(error):
        what = error.msg if isinstance(error, SyntaxError) else str(error) or kind.__name__
        print(f"error: {place[0]}:{place[1]}: {printable(what)}. fix the line.", file=sys.stderr)
        sys.exit(2)
    sys.__excepthook__(kind, error, error.__traceback__)


def place_of(error: BaseException) -> tuple[str, int] | None:
    """(file name, line) if the error is a slip in a file that people edit, else None."""
    import traceback

    path: str | None
    if isinstance(error, SyntaxError):
        path, line = error.filename, error.lineno or 1
    else:
        frames = traceback.extract_tb(error.__traceback__)
        if not isinstance(error, Exception) or not frames or frames[-1].name != "<module>":
            return None
        path, line = frames[-1].filename, frames[-1].lineno or 1
    if not path or os.path.dirname(os.path.realpath(path)) not in map(os.path.realpath, FOLDERS):
        return None
    if not isinstance(error, SyntaxError) and not is_constant(path, line):
        return None
    return os.path.basename(path), line


def is_constant(path: str, line: int) -> bool:
    """Whether the statement at this line of a file sets or names UPPER_CASE constants."""
    import ast

    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in tree.body:
        if node.lineno <= line <= (node.end_lineno or node.lineno):
            names = [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
            return isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr)) and any(
                name.isupper() for name in names
            )
    return False
