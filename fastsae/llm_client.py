"""Asking a language model: an OpenAI-compatible chat endpoint or a local model, a journal of its replies, bounded concurrency.

A failure is a reason, never a text. Every reply is journalled before it is used, so that a second run asks only what is still
open; a reply that was paid for and cannot be used counts as answered, unless the user wants it asked again.
"""
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from fastsae import artifacts, progress
from fastsae.errors import InputError

LOCAL = "local:"
FATAL = (401, 403, 404)   # every further call would meet the same
STOP_SECONDS = 2          # for replies that are on their way when the run is stopped
BREAKER = 8               # so many failures in a row, and the rest is not asked
LOCAL_NEW_TOKENS = 160    # length of a local model's reply


def endpoint() -> tuple[str, str | None] | None:
    """(api_key, base_url) from the environment, or None when no endpoint is configured."""
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_KEY_SAE")
    base_url = os.environ.get("OPENAI_BASE_URL") or None
    return (key or "none", base_url) if key or base_url else None


def public_url(base_url):
    """A base URL without user, password and query, fit for files."""
    if not base_url:
        return None
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"


def choose_backend(model, *, timeout, device):
    """The interpreter that INTERPRETER_MODEL and the environment name, or None when there is none."""
    if model.startswith(LOCAL):
        return LocalModel(model.removeprefix(LOCAL), device)
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
            answer = self.client.chat.completions.create(model=self.model, messages=[{"role": "user", "content": prompt}])
        except openai.APIStatusError as error:
            raise CallFailed(f"HTTP {error.status_code} {self.without_key(error.message)[:80]}", error.status_code in FATAL) from None
        except (openai.OpenAIError, ValueError) as error:  # no connection, time-out, a reply that is no JSON
            raise CallFailed(type(error).__name__) from None
        try:
            choice = answer.choices[0]
            text, reason, refusal = choice.message.content, choice.finish_reason, getattr(choice.message, "refusal", None)
        except (AttributeError, IndexError, TypeError):
            raise CallFailed("the reply is no chat completion") from None
        usage = {name: getattr(answer.usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens")}
        if refusal:
            return None, "refused", usage
        if reason not in (None, "stop"):
            return None, f"unfinished ({self.without_key(reason)[:30]})", usage
        if not isinstance(text, str) or not text.strip():
            return None, "empty", usage
        return self.without_key(text, keep_lines=True), None, usage

    def _openai(self):
        with self.lock:  # imported late and once: it takes a second
            import openai

            if self.client is None:
                self.client = openai.OpenAI(api_key=self.key, base_url=self.base_url, timeout=self.timeout, max_retries=3)
            return openai

    def without_key(self, text, keep_lines=False):
        text = str(text).replace(self.key, "***") if len(self.key) >= 8 else str(text)
        return text if keep_lines else " ".join(text.split())


class LocalModel:
    """A model in this process, greedy decoding, one call at a time."""

    parallel = False

    def __init__(self, name, device):
        if not name:
            raise InputError("INTERPRETER_MODEL: local: names no model. write for example local:SmolLM2-135M-Instruct.")
        self.model, self.device, self.loaded = LOCAL + name, device, None
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

            transformers, name = source._transformers(), self.model.removeprefix(LOCAL)
            located, self.device = source.locate(name), source.choose_device(self.device)
            options = source._gguf_options(transformers) if located.endswith(".gguf") else {}
            dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
            model = source._load(transformers.AutoModelForCausalLM.from_pretrained, located, name, dtype=dtype, **options)
            self.loaded = source.load_tokenizer(name), model.to(self.device).eval()
            if not self.loaded[0].chat_template:
                raise InputError(f"INTERPRETER_MODEL: {name} has no chat template. choose an instruct model.")
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
