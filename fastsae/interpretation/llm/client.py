"""Asking a language model: an OpenAI-compatible chat endpoint or a local model, a journal of its
replies, bounded concurrency.

A failure is a reason, never a text. Every reply is journalled before it is used, so that a second
run asks only what is still open; a reply that was paid for and cannot be used counts as answered,
unless the user wants it asked again.
"""

import email.utils
import hashlib
import json
import os
import random
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from fastsae.interpretation.llm.bounded_http import (
    CUT_OFF,
    ExchangeFailed,
    Reply,
    post,
    tls_context,
)
from fastsae.interpretation.llm.replies import (
    MAX_TEXT,
    NoCompletion,
    cleaned,
    error_message,
    is_completion_type,
    one_line,
    read_completion,
)
from fastsae.runtime import artifacts, masking, progress
from fastsae.runtime.errors import InputError, StageError

LOCAL = "local:"
DEFAULT_URL = "https://api.openai.com/v1"
PASSING = (408, 409, 429)  # and 5xx: worth another try
# of a call that was not answered; none after a time-out, for that call may have been paid for
RETRIES = 3
# seconds before the second try, where the server names none; doubled for each further one
FIRST_WAIT = 0.5
# seconds that a call waits between its tries, in all; not asked again if it takes more
LONGEST_WAIT = 120
FATAL = (401, 403, 404)  # every further call would meet the same; redirects (3xx) too
MAX_MESSAGE = 80  # characters of a server's message in a status
# variable: header
ACCOUNT = {"OPENAI_ORG_ID": "OpenAI-Organization", "OPENAI_PROJECT_ID": "OpenAI-Project"}
STOP_SECONDS = 2  # for replies that are on their way when the run is stopped
BREAKER = 8  # so many failures in a row, and the rest is not asked
LOCAL_NEW_TOKENS = 160  # length of a local model's reply


def endpoint() -> tuple[str, str | None] | None:
    """(api_key, base_url) from the environment, or None when no endpoint is configured."""
    for name in (*masking.KEYS, *ACCOUNT):
        if not re.fullmatch("[ -~]*", os.environ.get(name, "").strip()):
            raise InputError(
                f"{name}: holds a line break, or a character that no key has. copy it again."
            )
    keys = [os.environ.get(name, "").strip() for name in masking.KEYS]
    key, base_url = keys[0] or keys[1], os.environ.get("OPENAI_BASE_URL", "").strip()
    if base_url:
        check_url(base_url)
    return (key or masking.NO_KEY, base_url or None) if key or base_url else None


def check_url(base_url: str) -> None:
    """Raise InputError for other than an http address; it is not shown, since it may hold a
    password."""
    remedy = "set it to an address such as http://localhost:8000/v1, or unset it."
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname, parts.port
        host = host and host.encode("ascii" if host.isascii() else "idna").decode()
    except ValueError:  # also of brackets without a partner
        raise InputError(f"OPENAI_BASE_URL: its host or port cannot be read. {remedy}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(
            f"OPENAI_BASE_URL: does not begin with http:// or https:// and a host. {remedy}"
        )
    if re.search(r"[^\w.:%-]", host):
        raise InputError(f"OPENAI_BASE_URL: its host holds a character that no host has. {remedy}")
    if port == 0:
        raise InputError(f"OPENAI_BASE_URL: there is no port 0. {remedy}")


def public_url(base_url: str | None) -> str | None:
    """A base URL without user, password and query, fit for files."""
    if not base_url:
        return None
    parts = urlsplit(base_url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"


def choose_backend(model: str, *, timeout: float, device: str, cache_dir: str | None = None) -> Any:
    """The interpreter that INTERPRETER_MODEL and the environment name; None without one."""
    if model.startswith(LOCAL):
        return LocalModel(model.removeprefix(LOCAL), device, cache_dir)
    found = endpoint()
    return ChatEndpoint(*found, model, timeout=timeout) if found else None


class CallFailed(Exception):
    """No reply came; `fatal` if every further call would fail alike."""

    def __init__(self, reason: str, fatal: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.fatal = reason, fatal


class ChatEndpoint:
    """Chat completions of an OpenAI-compatible server."""

    parallel = True

    def __init__(self, key: str, base_url: str | None, model: str, *, timeout: float) -> None:
        """timeout: seconds for the requests of one call, repeated ones included."""
        self.key, self.base_url, self.model, self.timeout = key, base_url, model, timeout
        # model, base URL and parameters: what a reply depends on besides the prompt
        self.scope = [model, public_url(base_url), {}]
        self.masked = masking.Masking([key, *masking.secrets_of_address(base_url)])
        self.tls: Any = None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where calls go."""
        parts = urlsplit(self.base_url or DEFAULT_URL)
        path = parts.path.rstrip("/") + "/chat/completions"
        return parts._replace(path=path, fragment="").geturl()

    def complete(self, prompt: str) -> tuple[str | None, str | None, dict[str, int]]:
        """(text or None, why there is none, usage) of one reply; raises CallFailed."""
        answer = self._answer(prompt)
        if not 200 <= answer.status < 300:
            raise CallFailed(self._refusal(answer), answer.status in FATAL or is_redirect(answer))
        kind = answer.headers.get("content-type", "")
        try:
            text, reason, usage = read_completion(answer.body, kind)
        except NoCompletion as error:
            problem = answer.trouble or self.masked.message(error.reason)[:MAX_MESSAGE]
            paid = is_completion_type(kind) if answer.trouble else error.paid
            if not paid or answer.trouble == CUT_OFF:
                raise CallFailed(problem) from None
            return None, f"unusable: {problem}", {"prompt_tokens": 0, "completion_tokens": 0}
        return (None if text is None else self.masked(text)), reason, usage

    def _answer(self, prompt: str) -> Reply:
        """The server's reply, asked for again after failures that pass; raises CallFailed.

        Nothing is asked again once a reply began, or after a time-out: it may have been paid for.
        """
        left, waited = self.timeout, 0.0
        body = {"messages": [{"role": "user", "content": prompt}], "model": self.model}
        for n_before in range(RETRIES + 1):
            started = time.monotonic()
            try:
                answer = self._post(body, left)
                seconds = seconds_to_wait(answer.status, answer.headers, n_before)
            except ExchangeFailed as error:
                answer, problem = None, error
                seconds = seconds_to_wait(503, {}, n_before) if error.again else None
            left -= time.monotonic() - started
            waited += seconds or 0
            if seconds is None or left <= 0 or waited > LONGEST_WAIT:
                break
            time.sleep(seconds)
        if answer is None:
            raise CallFailed(self.masked(cleaned(problem.reason)), problem.fatal)
        return answer

    def _post(self, body, seconds):
        if self.url.startswith("https:"):
            with self.lock:  # made once: it reads a file of certificates
                self.tls = self.tls or tls_context()
        content = json.dumps(body).encode()
        return post(self.url, self._headers(), content, seconds=seconds, tls=self.tls)

    def _headers(self):
        account = {header: os.environ.get(name, "").strip() for name, header in ACCOUNT.items()}
        return {
            "Authorization": f"Bearer {self.key}",
            "Content-Type": "application/json",
            "User-Agent": "fastsae",
            **{name: value for name, value in account.items() if value},
        }

    def _refusal(self, answer):
        """What a status other than success says, and what can be done about it."""
        if is_redirect(answer):
            return (
                f"HTTP {answer.status}: the server sends its clients to {self._place(answer)}, "
                "where nothing was sent. set OPENAI_BASE_URL to the right address"
            )
        message = self.masked.message(error_message(answer.body))
        return f"HTTP {answer.status} {message[:MAX_MESSAGE]}".strip()

    def _place(self, answer):
        """Where a redirect leads, without secrets."""
        try:
            place = public_url(urljoin(self.url, answer.headers.get("location", "")))
        except ValueError:
            return "an address that cannot be read"
        return ascii("".join(self.masked(cleaned(place or "")).split()))[1:-1][:MAX_MESSAGE]


def is_redirect(answer: Reply) -> bool:
    """Whether an answer sends the client to another address."""
    return 300 <= answer.status < 400


def seconds_to_wait(status: int, headers: dict[str, str], n_before: int) -> float | None:
    """Seconds before another try after a status and `n_before` earlier tries; None for no try."""
    again = status in PASSING or 500 <= status < 600
    if (order := headers.get("x-should-retry")) in ("true", "false") and status >= 400:
        again = order == "true"
    wanted = retry_after(headers)
    if not again or n_before >= RETRIES or wanted > LONGEST_WAIT:
        return None
    return wanted if wanted > 0 else FIRST_WAIT * 2**n_before * random.uniform(0.75, 1)


def retry_after(headers: dict[str, str]) -> float:
    """Seconds that a server asks its client to wait, 0 if it does not say."""
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / per_second)
        except (KeyError, ValueError):
            pass
    try:
        date = email.utils.parsedate_to_datetime(headers["retry-after"])
        return max(0.0, date.timestamp() - time.time())
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0.0


class LocalModel:
    """A model in this process, greedy decoding, one call at a time."""

    parallel = False

    def __init__(self, name: str, device: str, cache_dir: str | None = None) -> None:
        if not name:
            raise InputError(
                "INTERPRETER_MODEL: local: names no model. write for example "
                "local:SmolLM2-135M-Instruct."
            )
        self.model, self.device, self.cache_dir = LOCAL + name, device, cache_dir
        self.loaded: tuple[Any, Any] | None = None  # tokenizer, model
        self.scope = [self.model, None, {"max_new_tokens": LOCAL_NEW_TOKENS, "do_sample": False}]

    def complete(self, prompt: str) -> tuple[str | None, str | None, dict[str, int]]:
        """(text, why there is none, tokens used): the model's own continuation, greedy."""
        import torch

        tokenizer, model = self._load()
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"].to(self.device)
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if room and ids.shape[1] + LOCAL_NEW_TOKENS > room:
            return (
                None,
                f"the prompt of {ids.shape[1]} tokens does not fit",
                {"prompt_tokens": 0, "completion_tokens": 0},
            )
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=LOCAL_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or 0,
            )[0, ids.shape[1] :]
        usage = {"prompt_tokens": ids.shape[1], "completion_tokens": len(out)}
        text = tokenizer.decode(out, skip_special_tokens=True)
        return (text, None, usage) if text.strip() else (None, "empty", usage)

    def _load(self):
        if self.loaded is None:
            import torch

            from fastsae.lm import devices, loading

            name, self.device = self.model.removeprefix(LOCAL), devices.choose_device(self.device)
            dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
            try:
                model = loading.load_model(
                    name, cache_dir=self.cache_dir, dtype=dtype, device=self.device
                )
                tokenizer = loading.load_tokenizer(name, cache_dir=self.cache_dir)
            except StageError as error:
                raise type(error)(
                    str(error)
                    .replace("MODEL_NAME:", "INTERPRETER_MODEL:")
                    .replace("--model-name", "--interpreter-model local:...")
                ) from None
            if not tokenizer.chat_template:
                raise InputError(
                    f"INTERPRETER_MODEL: {name} has no chat template. choose an instruct model."
                )
            self.loaded = tokenizer, model
        return self.loaded


class Journal:
    """Replies on disk, one JSON line each, found by model, base URL, parameters and prompt."""

    def __init__(self, path: Path, scope: Sequence) -> None:
        self.path, self.scope, self.lock = path, scope, threading.Lock()
        lines = map(_checked, artifacts.read_lines(path))
        self.replies = {line["key"]: line for line in lines if line}

    def key(self, prompt: str) -> str:
        """sha256 (hex) of the scope and the prompt."""
        return hashlib.sha256(json.dumps([*self.scope, prompt]).encode()).hexdigest()

    def get(self, prompt: str) -> dict[str, Any] | None:
        """The journalled line of a prompt, {"reply", "unusable", ...}, or None."""
        return self.replies.get(self.key(prompt))

    def add(
        self,
        prompt: str,
        reply: str | None,
        unusable: str | None = None,
        usage: dict[str, int] | None = None,
    ) -> None:
        """Append a reply, or why there is none, to the file."""
        line = {
            "key": self.key(prompt),
            "model": self.scope[0],
            "reply": reply,
            "unusable": unusable,
            **(usage or {}),
        }
        with self.lock:
            artifacts.append_line(self.path, line)
            self.replies[line["key"]] = line


def _checked(line):
    """A journal's line fit for use, or None: it may be another program's, or edited by hand."""
    key, reply, unusable = (line.get(name) for name in ("key", "reply", "unusable"))
    if not isinstance(key, str) or not all(
        isinstance(text, str | None) for text in (reply, unusable)
    ):
        return None
    return {
        **line,
        "reply": reply and cleaned(reply)[:MAX_TEXT],
        "unusable": unusable and one_line(unusable),
    }


class Asker:
    """Asks prompts through a backend and a journal. `stop_reason` is set once nothing more should
    be asked."""

    def __init__(
        self, backend: Any, journal_path: Path, *, n_workers: int, retry_unusable: bool = False
    ) -> None:
        self.backend, self.n_workers, self.retry_unusable = (
            backend,
            n_workers if backend.parallel else 1,
            retry_unusable,
        )
        self.journal = Journal(journal_path, backend.scope)
        self.stop_reason: str | None = None
        self.failures_in_a_row, self.lock = 0, threading.Lock()
        self.spent = {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def open(
        self, prompts: Iterable[str], usable: Callable[[str], bool] = lambda reply: True
    ) -> list[str]:
        """Those of the prompts that are still to be asked, each once."""
        return [
            prompt for prompt in dict.fromkeys(prompts) if self.answered(prompt, usable) is None
        ]

    def answered(
        self, prompt: str, usable: Callable[[str], bool] = lambda reply: True
    ) -> dict[str, Any] | None:
        """The journalled line of a prompt that needs no (second) try, or None."""
        line = self.journal.get(prompt)
        if line is None or (
            self.retry_unusable and (line["reply"] is None or not usable(line["reply"]))
        ):
            return None
        return line

    def ask(
        self, prompts: Sequence[str], what: str, usable: Callable[[str], bool] = lambda reply: True
    ) -> dict[str, tuple[str | None, str | None]]:
        """{prompt: (reply or None, reason if None)}; `usable(reply)` says which replies need no
        second try."""
        failed, waiting = {}, self.open(prompts, usable)
        with progress.bar(len(waiting), what, "call") as bar:

            def work(prompt):
                reason = self._call(prompt)
                with self.lock:
                    if reason:
                        failed[prompt] = reason
                    spent = self.spent
                    bar.set_postfix_str(
                        f"{spent['prompt_tokens']:,} tokens in, {spent['completion_tokens']:,} out",
                        refresh=False,
                    )
                    bar.update()

            pool = ThreadPoolExecutor(self.n_workers)
            jobs = [pool.submit(work, prompt) for prompt in waiting]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                self.stop_reason = "interrupted"  # the calls still waiting return at once
                wait(jobs, timeout=STOP_SECONDS)
                raise
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        result: dict[str, tuple[str | None, str | None]] = {}
        for prompt in prompts:
            line = self.journal.get(prompt)
            if prompt in failed or line is None:
                result[prompt] = None, failed.get(prompt, "not asked")
            else:
                result[prompt] = line["reply"], line.get("unusable")
        return result

    def _call(self, prompt):
        """Ask one prompt and journal the reply; the reason if none came."""
        if self.stop_reason:
            return f"not asked: {self.stop_reason}"
        try:
            reply, unusable, usage = self.backend.complete(prompt)
            reply = None if reply is None else cleaned(reply)
        except CallFailed as error:
            return self._failed(one_line(error.reason), error.fatal)
        except (StageError, MemoryError, OSError):  # of a local model: every call would meet them
            raise
        except Exception as error:  # a bug costs this call, not the others' results
            return self._failed(f"a bug, {type(error).__name__} {_place_of(error)}")
        self.journal.add(prompt, reply, unusable, usage)
        with self.lock:
            self.failures_in_a_row = 0
            self.spent["calls"] += 1
            for name in ("prompt_tokens", "completion_tokens"):
                self.spent[name] += usage[name]
        return None

    def _failed(self, reason, fatal=False):
        with self.lock:
            self.failures_in_a_row += 1
            if fatal:
                self.stop_reason = reason
            elif self.failures_in_a_row >= BREAKER:
                self.stop_reason = (
                    f"{self.failures_in_a_row} calls in a row failed, the last with {reason}"
                )
        return f"failed: {reason}"


def _place_of(error):
    """The file and line where an exception was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"at {Path(frame.filename).name}:{frame.lineno}"
