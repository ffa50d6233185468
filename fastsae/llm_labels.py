"""Labels by a language model behind an OpenAI-compatible chat endpoint, with HypotheSAEs' prompts and parsing.

HypotheSAEs' own client speaks the Responses API, which many local servers lack, and turns failures into empty labels. Here the
prompts go through chat completions, a failure is a status and never a label, and every reply is journalled on arrival, so that
a second run asks only what is still open.
"""
import contextlib
import hashlib
import io
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from fastsae import artifacts

MAX_LABEL = 300


def endpoint():
    """(api_key, base_url) from the environment, or None when no endpoint is configured."""
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_KEY_SAE")
    base_url = os.environ.get("OPENAI_BASE_URL") or None
    return (key or "none", base_url) if key or base_url else None


class Journal:
    """Replies on disk, one JSON line each, found again by model, base URL and prompt."""

    def __init__(self, path, model, base_url):
        self.path, self.scope, self.lock = path, [model, base_url], threading.Lock()
        self.replies = {line["key"]: line["reply"] for line in artifacts.read_lines(path) if "key" in line}

    def key(self, prompt):
        return hashlib.sha256(json.dumps([*self.scope, prompt]).encode()).hexdigest()

    def get(self, prompt):
        return self.replies.get(self.key(prompt))

    def add(self, prompt, reply):
        with self.lock:
            self.replies[self.key(prompt)] = reply
            artifacts.append_line(self.path, {"key": self.key(prompt), "model": self.scope[0], "reply": reply})


class ChatLabeller:
    """Asks for one label per feature; `label_features` gives {feature: (label or None, status)}."""

    def __init__(self, key, base_url, model, journal_path, *, timeout, n_workers):
        import openai

        self.openai, self.key, self.model, self.n_workers = openai, key, model, n_workers
        self.client = openai.OpenAI(api_key=key, base_url=base_url, timeout=timeout, max_retries=3)
        self.journal = Journal(journal_path, model, base_url)
        self.stop_reason = None  # set by the first error that every further call would repeat

    def label_features(self, texts, pooled, features):
        from hypothesaes import NeuronInterpreter

        with contextlib.redirect_stdout(io.StringIO()):  # it prints a warning for every feature with few examples
            labeller, interpreter = self, NeuronInterpreter(interpreter_model=self.model)
            outcomes = []

            def execute(prompts, llm_kwargs, timeout):  # in place of HypotheSAEs' own calls; None prompts are dead features
                outcomes.extend(labeller._ask_all(interpreter, [p for p in prompts if p is not None]))
                return [label for label, _ in outcomes]

            interpreter._execute_prompts = execute
            answers = interpreter.interpret_neurons(texts, pooled, features)
        asked = iter(outcomes)
        return {feature: next(asked) if pooled[:, feature].max() > 0 else (None, "dead") for feature in answers}

    def _ask_all(self, interpreter, prompts):
        from tqdm import tqdm

        with ThreadPoolExecutor(self.n_workers) as pool:
            jobs = [pool.submit(self._ask, interpreter, prompt) for prompt in prompts]
            try:
                return [job.result() for job in tqdm(jobs, desc="labelling", unit="feature", mininterval=1, disable=None, file=sys.stderr)]
            except BaseException:
                self.stop_reason = "interrupted"  # the calls still waiting return at once
                raise

    def _ask(self, interpreter, prompt):
        """(label or None, status) for one prompt, from the journal if it was answered before."""
        reply = self.journal.get(prompt)
        if reply is None:
            if self.stop_reason:
                return None, f"not asked: {self.stop_reason}"
            try:
                answer = self.client.chat.completions.create(model=self.model, messages=[{"role": "user", "content": prompt}])
            except self.openai.APIStatusError as error:
                reason = f"HTTP {error.status_code} {self._without_key(error.message)[:80]}"
                if error.status_code in (400, 401, 403, 404, 422):
                    self.stop_reason = reason
                return None, f"failed: {reason}"
            except (self.openai.OpenAIError, ValueError) as error:  # no connection, time-out, a reply that is no JSON
                return None, f"failed: {type(error).__name__}"
            reply = self._content(answer)
            if reply is None:
                return None, "failed: the reply holds no finished text"
            self.journal.add(prompt, reply)
        label = parse_label(interpreter, reply)
        return (label, "ok") if label else (None, "failed: the reply is no label")

    @staticmethod
    def _content(answer):
        try:
            choice = answer.choices[0]
            unfinished = choice.finish_reason not in (None, "stop") or getattr(choice.message, "refusal", None)
            return None if unfinished else choice.message.content
        except (AttributeError, IndexError, TypeError):
            return None

    def _without_key(self, text):
        return " ".join(str(text).replace(self.key, "***").split())


def parse_label(interpreter, reply):
    """HypotheSAEs' parsing of a reply, or None if what is left cannot be a label (empty, markup, far too long)."""
    label = interpreter._parse_interpretation(reply)
    if not label or len(label) > MAX_LABEL or label.startswith(("<", "{", "```")):
        return None
    return label
