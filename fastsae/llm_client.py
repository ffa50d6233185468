"""Asking a language model: an OpenAI-compatible chat endpoint or a local model, a journal of its replies, bounded concurrency.

A failure is a reason, never a text. Every reply is journalled before it is used, so that a second run asks only what is still
open; a reply that was paid for and cannot be used counts as answered, unless the user wants it asked again.
"""
import email.utils
import hashlib
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from fastsae import artifacts, progress
from fastsae.errors import InputError, StageError

LOCAL = "local:"
DEFAULT_URL = "https://api.openai.com/v1"
UNFINISHED = ("length", "max_tokens", "content_filter", "tool_calls", "function_call")  # finish reasons; other servers' others are ends
PASSING = (408, 409, 429)  # and 5xx: worth another try
RETRIES = 3               # of a call that was not answered; none after a time-out, for that call may have been paid for
FIRST_WAIT = 0.5          # seconds before the second try, where the server names none; doubled for each further one
LONGEST_WAIT = 120        # seconds; a server that wants more is not asked again
FATAL = (401, 403, 404)   # every further call would meet the same
STOP_SECONDS = 2          # for replies that are on their way when the run is stopped
BREAKER = 8               # so many failures in a row, and the rest is not asked
LOCAL_NEW_TOKENS = 160    # length of a local model's reply


def endpoint() -> tuple[str, str | None] | None:
    """(api_key, base_url) from the environment, or None when no endpoint is configured."""
    key, other_key, base_url = (os.environ.get(name, "").strip() for name in ("OPENAI_API_KEY", "OPENAI_KEY_SAE", "OPENAI_BASE_URL"))
    key = key or other_key
    if base_url:
        check_url(base_url)
    return (key or "none", base_url or None) if key or base_url else None


def check_url(base_url):
    """Raise InputError for what is no http address; the address is not shown, for it may hold a password."""
    remedy = "set it to an address such as http://localhost:8000/v1, or unset it."
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname, parts.port
    except ValueError:  # also of brackets without a partner
        raise InputError(f"OPENAI_BASE_URL: its host or port cannot be read. {remedy}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"OPENAI_BASE_URL: does not begin with http:// or https:// and a host. {remedy}")
    if port == 0:
        raise InputError(f"OPENAI_BASE_URL: there is no port 0. {remedy}")


def public_url(base_url):
    """A base URL without user, password and query, fit for files."""
    if not base_url:
        return None
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"


def choose_backend(model, *, timeout, device, cache_dir=None):
    """The interpreter that INTERPRETER_MODEL and the environment name, or None when there is none."""
    if model.startswith(LOCAL):
        return LocalModel(model.removeprefix(LOCAL), device, cache_dir)
    found = endpoint()
    return ChatEndpoint(*found, model, timeout=timeout) if found else None


class CallFailed(Exception):
    """No reply came; `fatal` if every further call would fail alike."""

    def __init__(self, reason, fatal=False):
        super().__init__(reason)
        self.reason, self.fatal = reason, fatal


class ChatEndpoint:
    """Chat completions of an OpenAI-compatible server."""

    parallel = True

    def __init__(self, key, base_url, model, *, timeout):
        self.key, self.base_url, self.model, self.timeout = key, base_url, model, timeout
        self.client: Any = None
        self.scope = [model, public_url(base_url), {}]  # model, base URL and parameters: what a reply depends on besides the prompt
        self.lock = threading.Lock()

    def complete(self, prompt):
        """(text or None, why there is none, usage) of one reply; raises CallFailed."""
        openai = self._openai()
        try:
            answer = self._create(openai, prompt)
        except openai.APIStatusError as error:
            raise CallFailed(f"HTTP {error.status_code} {self.without_key(error.message)[:80]}", error.status_code in FATAL) from None
        except (openai.OpenAIError, ValueError) as error:  # no connection, time-out, a reply that is no JSON
            raise CallFailed(type(error).__name__) from None
        try:
            choice = answer.choices[0]
            text, reason, refusal = choice.message.content, choice.finish_reason, getattr(choice.message, "refusal", None)
        except (AttributeError, IndexError, TypeError):
            raise CallFailed("the reply is no chat completion") from None
        usage = {name: as_count(getattr(answer.usage, name, None)) for name in ("prompt_tokens", "completion_tokens")}
        text = joined(text)
        if refusal:
            return None, "refused", usage
        if str(reason).lower() in UNFINISHED:
            return None, f"unfinished ({reason.lower()})", usage
        if not text.strip():
            return None, "empty", usage
        return self.without_key(text, keep_lines=True), None, usage

    def _create(self, openai, prompt):
        """The server's answer, asked for again after failures that pass."""
        for n_before in range(RETRIES + 1):
            try:
                return self.client.chat.completions.create(model=self.model, messages=[{"role": "user", "content": prompt}])
            except openai.APITimeoutError:
                raise
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                seconds = seconds_to_wait(error, n_before)
                if seconds is None:
                    raise
            time.sleep(seconds)

    def _openai(self):
        with self.lock:  # imported late and once: it takes a second
            import openai

            if self.client is None:
                self.client = openai.OpenAI(api_key=self.key, base_url=self.base_url or DEFAULT_URL, timeout=self.timeout,
                                            max_retries=0)  # `_create` does it
            return openai

    def without_key(self, text, keep_lines=False):
        text = str(text).replace(self.key, "***") if len(self.key) >= 8 else str(text)
        return text if keep_lines else " ".join(text.split())


def seconds_to_wait(error, n_before):
    """Seconds before another try after an `openai` error and `n_before` earlier ones; None if there should be none."""
    status, headers = getattr(error, "status_code", None), getattr(getattr(error, "response", None), "headers", {})
    wanted = retry_after(headers)
    again = status is None or status in PASSING or status >= 500
    if (order := headers.get("x-should-retry")) in ("true", "false"):
        again = order == "true"
    if not again or n_before >= RETRIES or wanted > LONGEST_WAIT:
        return None
    return wanted if wanted > 0 else FIRST_WAIT * 2 ** n_before * random.uniform(0.75, 1)


def retry_after(headers):
    """Seconds that a server asks its client to wait, 0 if it does not say."""
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / per_second)
        except (KeyError, ValueError):
            pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0.0


def joined(content):
    """The text of a message whose content is a text or a list of parts; "" if it is neither."""
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)
                   and part.get("type", "text") in ("text", "output_text"))


def as_count(value):
    """A count of tokens as a server gave it; 0 if it is none."""
    try:
        return max(0, int(value))
    except (TypeError, ValueError, OverflowError):
        return 0


class LocalModel:
    """A model in this process, greedy decoding, one call at a time."""

    parallel = False

    def __init__(self, name, device, cache_dir=None):
        if not name:
            raise InputError("INTERPRETER_MODEL: local: names no model. write for example local:SmolLM2-135M-Instruct.")
        self.model, self.device, self.cache_dir, self.loaded = LOCAL + name, device, cache_dir, None
        self.scope = [self.model, None, {"max_new_tokens": LOCAL_NEW_TOKENS, "do_sample": False}]

    def complete(self, prompt):
        import torch

        tokenizer, model = self._load()
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt",
                                            return_dict=True)["input_ids"].to(self.device)
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if room and ids.shape[1] + LOCAL_NEW_TOKENS > room:
            return None, f"the prompt of {ids.shape[1]} tokens does not fit", {"prompt_tokens": 0, "completion_tokens": 0}
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LOCAL_NEW_TOKENS, do_sample=False,
                                 pad_token_id=tokenizer.pad_token_id or 0)[0, ids.shape[1]:]
        usage = {"prompt_tokens": ids.shape[1], "completion_tokens": len(out)}
        text = tokenizer.decode(out, skip_special_tokens=True)
        return (text, None, usage) if text.strip() else (None, "empty", usage)

    def _load(self):
        if self.loaded is None:
            import torch

            from fastsae import language_model as source

            name, self.device = self.model.removeprefix(LOCAL), source.choose_device(self.device)
            dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
            try:
                model = source.load_model(name, cache_dir=self.cache_dir, dtype=dtype, device=self.device)
                tokenizer = source.load_tokenizer(name, cache_dir=self.cache_dir)
            except StageError as error:
                raise type(error)(str(error).replace("MODEL_NAME:", "INTERPRETER_MODEL:").replace(
                    "--model-name", "--interpreter-model local:...")) from None
            if not tokenizer.chat_template:
                raise InputError(f"INTERPRETER_MODEL: {name} has no chat template. choose an instruct model.")
            self.loaded = tokenizer, model
        return self.loaded


class Journal:
    """Replies on disk, one JSON line each, found again by model, base URL, parameters and prompt."""

    def __init__(self, path, scope):
        self.path, self.scope, self.lock = path, scope, threading.Lock()
        self.replies = {line["key"]: line for line in artifacts.read_lines(path) if "key" in line}

    def key(self, prompt):
        return hashlib.sha256(json.dumps([*self.scope, prompt]).encode()).hexdigest()

    def get(self, prompt):
        """The journalled line of a prompt, {"reply", "unusable", ...}, or None."""
        return self.replies.get(self.key(prompt))

    def add(self, prompt, reply, unusable=None, usage=None):
        line = {"key": self.key(prompt), "model": self.scope[0], "reply": reply, "unusable": unusable, **(usage or {})}
        with self.lock:
            artifacts.append_line(self.path, line)
            self.replies[line["key"]] = line


class Asker:
    """Asks prompts through a backend and a journal. `stop_reason` is set once nothing more should be asked."""

    def __init__(self, backend, journal_path, *, n_workers, retry_unusable=False):
        self.backend, self.n_workers, self.retry_unusable = backend, n_workers if backend.parallel else 1, retry_unusable
        self.journal = Journal(journal_path, backend.scope)
        self.stop_reason, self.failures_in_a_row, self.lock = None, 0, threading.Lock()
        self.spent = {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def open(self, prompts, usable=lambda reply: True):
        """Those of the prompts that are still to be asked, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if self.answered(prompt, usable) is None]

    def answered(self, prompt, usable=lambda reply: True):
        """The journalled line of a prompt that needs no (second) try, or None."""
        line = self.journal.get(prompt)
        if line is None or (self.retry_unusable and (line["reply"] is None or not usable(line["reply"]))):
            return None
        return line

    def ask(self, prompts, what, usable=lambda reply: True):
        """{prompt: (reply or None, reason if None)}; `usable(reply)` tells which replies need no second try."""
        failed, waiting = {}, self.open(prompts, usable)
        with progress.bar(len(waiting), what, "call") as bar:
            def work(prompt):
                reason = self._call(prompt)
                with self.lock:
                    if reason:
                        failed[prompt] = reason
                    spent = self.spent
                    bar.set_postfix_str(f"{spent['prompt_tokens']:,} tokens in, {spent['completion_tokens']:,} out", refresh=False)
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
        result = {}
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
        except CallFailed as error:
            with self.lock:
                self.failures_in_a_row += 1
                if error.fatal:
                    self.stop_reason = error.reason
                elif self.failures_in_a_row >= BREAKER:
                    self.stop_reason = f"{self.failures_in_a_row} calls in a row failed, the last with {error.reason}"
            return f"failed: {error.reason}"
        self.journal.add(prompt, reply, unusable, usage)
        with self.lock:
            self.failures_in_a_row = 0
            self.spent["calls"] += 1
            for name in ("prompt_tokens", "completion_tokens"):
                self.spent[name] += usage[name]
        return None
