"""A chat endpoint on loopback that answers from a list or by a function, and a real model to stand
behind it."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Endpoint(ThreadingHTTPServer):
    """Answers with `reply(prompt)`, or from a list of (status, body[, headers]), the last one again
    and again.

    A body is a dict, a string sent as HTML, or None to close the connection without a word; a
    status of 0 waits for `body` seconds.
    """

    daemon_threads = True

    def __init__(self, replies: Iterable[tuple] = (), reply: Callable[[str], Any] | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.reply = list(replies), reply
        self.requests, self.lock = [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """As OPENAI_BASE_URL names it."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def prompts(self) -> list[str]:
        """The prompts of all requests so far, in their order."""
        return [body["messages"][0]["content"] for _, _, body in self.requests]

    def close(self) -> None:
        """End the server."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that were killed."""


class Handler(BaseHTTPRequestHandler):
    """One request to an `Endpoint`."""

    server: Endpoint

    def do_POST(self) -> None:
        """Note the request, and answer as the endpoint says."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers["Authorization"], body))
            if self.server.reply is None:
                replies = self.server.replies
                status, reply, *headers = replies.pop(0) if len(replies) > 1 else replies[0]
            else:
                status, reply, headers = 200, None, []
        if self.server.reply is not None:
            reply = self.server.reply(body["messages"][0]["content"])
        if status == 0:
            time.sleep(reply)
            reply = None
        if reply is None:
            self.close_connection = True
            return
        content = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/json" if not isinstance(reply, str) else "text/html"
        )
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers[0] if headers else {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


def completion(
    text: str, finish_reason: str = "stop", usage: tuple[int, int] = (0, 0), **message: Any
) -> dict[str, Any]:
    """A reply of a chat endpoint; `message` are further fields of the assistant's message."""
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "usage": {
            "prompt_tokens": usage[0],
            "completion_tokens": usage[1],
            "total_tokens": sum(usage),
        },
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
    }


class RealModel:
    """Greedy replies of a real model, with the last prompt's cache kept, so that prompts with a
    common beginning are cheap.

    Where a prompt asks for FAST's verdict, the reply is decoded under that form, as servers with
    structured output do: the model chooses the score among 1 to 5 and writes the name.
    """

    def __init__(
        self, name: str = "SmolLM2-135M-Instruct", new_tokens: int = 16, dtype: str = "float32"
    ):
        import torch
        from transformers import DynamicCache

        from fastsae.interpretation.llm.client import LocalModel

        self.tokenizer, self.model = LocalModel(name, "cpu")._load()
        self.model.to(getattr(torch, dtype))
        n = self.model.get_output_embeddings().weight.shape[0]
        self.letters = torch.tensor(
            [bool(re.fullmatch(" ?[a-z]+", self.tokenizer.decode([token]))) for token in range(n)]
        )
        self.new_tokens, self.lock = new_tokens, threading.Lock()
        self.ids, self.cache = [], DynamicCache()

    def __call__(self, prompt: str) -> dict[str, Any]:
        with self.lock:
            ids = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            n_prompt = len(ids)
            if "[[SCORE]]" in prompt:
                ids = ids + self._encode("My final verdict score is: [[")
                logits, choices = self._logits(ids), [self._encode(d)[0] for d in "12345"]
                ids = (
                    ids
                    + [max(choices, key=lambda token: float(logits[token]))]
                    + self._encode("]], feature name is [[")
                )
            out = []
            while len(out) < self.new_tokens:
                logits = self._logits(ids + out)
                # a name of two tokens at least, of small letters
                if ids[n_prompt:] and len(out) < 2:
                    logits = logits.masked_fill(~self.letters, float("-inf"))
                token = int(logits.argmax())
                if token == self.tokenizer.eos_token_id or (
                    ids[n_prompt:] and re.search(r"[\]\n]", self.tokenizer.decode([token]))
                ):
                    break
                out.append(token)
            text = self.tokenizer.decode(ids[n_prompt:] + out, skip_special_tokens=True) + (
                "]]" if ids[n_prompt:] else ""
            )
            return completion(text, usage=(n_prompt, len(ids) - n_prompt + len(out)))

    def _encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _logits(self, ids):
        import torch
        from transformers import DynamicCache

        common = 0
        for a, b in zip(self.ids, ids[:-1]):
            if a != b:
                break
            common += 1
        if not common:
            self.cache = DynamicCache()
        elif common < len(self.ids):
            self.cache.crop(common - len(self.ids))
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([ids[common:]]),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.ids = list(ids)
        return out.logits[0, -1]
