"""The table of stage 3 as a data frame. pandas is imported when it is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING

from fastsae.runtime.errors import EnvironmentFailure, InputError

if TYPE_CHECKING:
    import pandas

# of interpretations.csv; whatever else it has is a number. A column of words that is empty, or a
# label that reads "NA" or "007", would be guessed wrong.
WORDS = (
    "label",
    "label_source",
    "rule",
    "status",
    "top_tokens",
    *(f"top_example_{i}" for i in range(1, 6)),
    "best_category",
    "matryoshka_level",
    "promoted_tokens",
    "suppressed_tokens",
)


def read_table(path: str | Path) -> "pandas.DataFrame":
    """`interpretations.csv`, or the one in the folder `path`, one row per feature.

    `feature` is an int64, WORDS are texts, all others float64; an empty cell is a missing value.
    Raises InputError where there is no such file, EnvironmentFailure without pandas.
    """
    try:
        import pandas
    except ImportError:
        raise EnvironmentFailure(
            "read_table: pandas is not installed. run: pip install pandas, or read the file with "
            "Python's csv."
        ) from None
    path = Path(path)
    path = path / "interpretations.csv" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: not found. run interpret_sae.py, or give the path of its table.")
    types = {**dict.fromkeys(WORDS, "string"), "feature": "int64"}
    columns = pandas.read_csv(path, nrows=0).columns
    types = {name: types.get(name, "float64") for name in columns}
    return pandas.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])
