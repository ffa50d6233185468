"""Tables of Apache Arrow: Parquet, Arrow and Feather files, a folder of Parquet tables, one that
the datasets library saved. Only the columns that are asked for are read, a few rows at a time.

By the optional package pyarrow.
"""

import contextlib
import json
from collections.abc import Iterator

from fastsae.data.readers import Row, Source
from fastsae.data.readers.folder_digests import files_of, unchanged
from fastsae.data.rows import shown
from fastsae.runtime.errors import EnvironmentFailure, InputError

ROWS_AT_ONCE = 256
DIALOGUES = ("messages", "conversations")
# besides its own, what pyarrow raises where names, numbers or lengths make no sense
OF_DAMAGE = (ValueError, KeyError, TypeError, ArithmeticError, EOFError, OSError)
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
BUFFER = 1 << 20  # bytes read of a column at a time


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Iterator[Row]]:
    """The rows, numbered from 1, over all files of a folder."""
    pyarrow = _pyarrow(source.path)
    with unchanged(source.path, source.sha256):
        yield _rows(source, pyarrow)


def _pyarrow(path):
    try:
        import pyarrow
    except ImportError:
        raise EnvironmentFailure(
            f"DATASET_PATH: {path}: Parquet and Arrow tables need the pyarrow package. "
            "run: pip install pyarrow."
        ) from None
    return pyarrow


def _rows(source, pyarrow):
    number, paths = 0, files_of(source.path)
    if not paths:
        raise InputError(
            f"{source.path}: its state.json names no tables that are there. save the dataset again."
        )
    for path in paths:
        try:
            with open(path, "rb") as file:
                for batch, names in _batches(path, file, source):
                    for row in _as_rows(batch, names):
                        number += 1
                        yield Row(number, row)
        except (pyarrow.ArrowException, *OF_DAMAGE) as error:
            if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
                raise
            what = shown((str(error) or type(error).__name__).splitlines()[0], 120)
            raise InputError(
                f"{path}: is damaged or cut off ({what.rstrip('.')}). copy or make it again."
            ) from None


def _batches(path, file, source):
    """Yield (some rows of the columns asked for, {column: names of its numbers})."""
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"PAR1"):
        from pyarrow import parquet

        table = parquet.ParquetFile(
            file, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True
        )
        schema = table.schema_arrow
        columns = _columns(path, schema, source)
        found = table.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False)
    else:
        from pyarrow import ipc

        if start.startswith(b"ARROW1"):
            table = ipc.open_file(file)
            found = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            _require_end(path, file)
            table = found = ipc.open_stream(file)
        schema = table.schema
        columns = _columns(path, schema, source)
    names = _class_names(schema)
    for batch in found:
        batch = batch.select(columns)
        for first in range(0, batch.num_rows, ROWS_AT_ONCE):
            yield batch.slice(first, ROWS_AT_ONCE), names


def _require_end(path, file):
    """InputError for a stream that was cut off between two of its parts, which neither says."""
    file.seek(-len(END_OF_STREAM), 2)
    if file.read() != END_OF_STREAM:
        raise InputError(
            f"{path}: is damaged or cut off (its end is missing). copy or make it again."
        )
    file.seek(0)


def _columns(path, schema, source):
    """The columns to read; InputError unless one of them can hold a text."""
    from pyarrow import types

    wanted = (source.text_field, *DIALOGUES, "system", source.label_field)
    columns = [name for name in dict.fromkeys(wanted) if name in schema.names]
    doubled = [name for name in columns if schema.names.count(name) > 1]
    if doubled:
        raise InputError(f"{path}: has several columns {doubled[0]}. give them different names.")
    texts = [name for name in (source.text_field, *DIALOGUES) if name in columns]
    if not texts:
        listed = ", ".join(shown(name) for name in schema.names[:8])
        raise InputError(
            f"{path}: has no column {source.text_field}, messages or conversations (its columns: "
            f"{listed[:300] or 'none'}). name the column of the texts with --text-field."
        )
    kind = schema.field(texts[0]).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if texts == [source.text_field] and not (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_null(kind)
    ):
        raise InputError(
            f"{path}: its column {texts[0]} is {str(kind)[:60]}, not text. name another with "
            "--text-field."
        )
    return columns


def _as_rows(batch, names):
    """The rows of a batch as dicts, or ValueErrors; class labels by their names."""
    if _is_utf8(batch):
        rows = batch.to_pylist()
    else:
        rows = [_one(batch.slice(i, 1)) for i in range(batch.num_rows)]
    for row in rows:
        if isinstance(row, dict):
            for column, words in names.items():
                value = row.get(column)
                if isinstance(value, int) and 0 <= value < len(words):
                    row[column] = words[value]
        yield row


def _is_utf8(batch):
    """Whether its texts are UTF-8. ArrowInvalid for other damage: unchecked, a bad offset would be
    followed into memory that is not the table's."""
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        return False
    return True


def _one(batch):
    if not _is_utf8(batch):
        return ValueError("holds text that is not UTF-8. write the table anew.")
    return batch.to_pylist()[0]


def _class_names(schema):
    """{column: names of its numbers} of the ClassLabels that the datasets library notes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
    return {
        name: words
        for name, words in found.items()
        if isinstance(words, list) and all(isinstance(word, str) for word in words)
    }
