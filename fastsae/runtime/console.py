"""stdout and stderr of a stage: one print is one line, nothing in it acts on a terminal, and no
failure to print ends the work.

What is printed holds names, labels and messages that others wrote. Whoever prints passes a whole
line to `print`; here, at the one place where it goes out, everything in it that could begin another
line or reach the terminal as a command becomes visible.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

# Control characters but the tab, line and paragraph separators, what turns or hides text, and
# halves of surrogate pairs.
UNSAFE = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufeff\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
NAMES = {"\n": "\\n", "\r": "\\r"}
OF_BARS = re.compile("\n*(\x1b\\[A)*")  # how tqdm moves between its lines
IMPORTANT = ("summary: ", "warning: ")


class OwnLine(str):
    """A line that may begin with `summary: `. Whatever else is printed may not hold that."""


def shown(text: str) -> str:
    """The text in one line, with escapes such as `\\x1b` and `\\n` for what would act on a terminal
    or begin a line."""
    return UNSAFE.sub(_escape, text)


def _escape(found: re.Match) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return NAMES.get(found[0]) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


class Console:
    """Stands for `stream`, sys.stdout or sys.stderr (None if closed). Each `write` is part of one
    line, as `print` makes them.

    quiet: only warnings and summaries go out. failure: the OSError or ValueError that ended
    printing; None while it works, and where the reader left, as `| head` does.
    """

    def __init__(self, stream: Any, *, quiet: bool = False, bars: bool = False) -> None:
        self.quiet, self._bars, self._line = quiet, bars, ""
        self.failure: OSError | ValueError | None = None
        if stream is None:
            stream, self.failure = open(os.devnull, "w", encoding="utf-8"), OSError("closed")
        self.was_closed, self._stream = self.failure is not None, stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Print `text`, made harmless; its length, whether or not it could be printed."""
        if self._bars and (text.startswith("\r") or OF_BARS.fullmatch(text)):
            self._send("write", text[:1] + self._safe(text[1:]) if text.startswith("\r") else text)
            return len(text)
        line, end = (text[:-1], "\n") if text.endswith("\n") else (text, "")
        if text.strip("\n"):
            line = self._safe(line)
            line = line if isinstance(text, OwnLine) else line.replace("summary: ", "summary\\x3a ")
        if not self.quiet:
            self._send("write", line + end)
        else:
            self._line += line
            if end and (isinstance(text, OwnLine) or self._line.startswith(IMPORTANT)):
                self._send("write", self._line + end)
            self._line = "" if end else self._line
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """`write` of each of the lines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Print what is buffered."""
        self._send("flush")

    def _safe(self, text):
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return shown(text).encode(encoding, "backslashreplace").decode(encoding)

    def _send(self, action, *text):
        """Call the stream's `action`; if it cannot print, note why and print no more."""
        try:
            getattr(self._stream, action)(*text)
        # the disk is full, or nobody reads; ValueError: the stream is closed
        except (OSError, ValueError) as error:
            if not isinstance(error, BrokenPipeError):
                self.failure = error
            self._stop_printing()

    def _stop_printing(self):
        try:  # at the handle itself: the stream holds text that it would try to write once more
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, self._stream.fileno())
            os.close(handle)
            self._stream.flush()
        except (OSError, ValueError, AttributeError):  # a stream without a handle
            self._stream = open(os.devnull, "w", encoding="utf-8")


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Within, sys.stdout and sys.stderr are Consoles; a stage may put something in their place."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr, bars=True)
    ours = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for console in ours:
            console.flush()
        sys.stdout, sys.stderr = before


def open_closed_handles() -> None:
    """/dev/null at each of the handles 0 to 2 that is closed, or the next file opened would get
    what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle == number:
                os.set_inheritable(number, True)
            else:
                os.dup2(handle, number)
                os.close(handle)
