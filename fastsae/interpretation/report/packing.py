"""The report's data in as few bytes as a page that opens from disk can have them: deflated JSON in
base64, the features in parts that the page unpacks when it shows them."""

import base64
import json
import zlib
from typing import Any

import numpy as np

from fastsae.runtime import storage

PART = 128  # features that are unpacked together


def pack(value: Any) -> str:
    """JSON of `value`, deflated, in base64: ASCII without <, > and &, so that no text of the
    dataset can end the block it stands in. ValueError for nan and infinity."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(storage.as_utf8(text), 9)).decode("ascii")


def number(value: Any, digits: int = 4) -> float | None:
    """A JSON number of few significant digits, or None for nothing."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.{digits}g}")
