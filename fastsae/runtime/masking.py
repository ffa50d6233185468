"""Keeps the API key and the passwords of addresses out of files and off screens.

A long secret is masked wherever it stands. A short one can be part of ordinary words, so it is
masked as a word of its own; one of up to three letters, or three digits, only behind "Bearer",
"key:" and the like.
"""

import base64
import html
import json
import os
import re
from collections.abc import Iterable
from urllib.parse import quote, quote_plus, unquote, urlsplit

MASK = "***"
LONG = 8  # characters of a secret that is masked within words too
NO_KEY = "none"  # sent as key where there is none; no secret
KEYS = ("OPENAI_API_KEY", "OPENAI_KEY_SAE")
ADDRESSES = (
    "OPENAI_BASE_URL",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
)
BEHIND = r"""((?:bearer|basic)\s+|(?:key|token|password|authorization)["']?\s*[:=]\s*["']?)"""


class Masking:
    """Replaces secrets in texts, as they are and as servers encode them."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self.secrets = sorted(
            {secret for secret in secrets if secret and secret != NO_KEY}, key=len, reverse=True
        )
        forms = sorted(
            {form for secret in self.secrets for form in forms_of(secret)}, key=len, reverse=True
        )
        anywhere = [re.escape(form) for form in forms if _is_long(form)]
        words = [
            rf"(?<![^\W_]){re.escape(form)}(?![^\W_])"
            for form in forms
            if not _is_long(form) and not _is_ordinary(form)
        ]
        ordinary = [re.escape(form) for form in forms if _is_ordinary(form)]
        self.plain = re.compile("|".join([*anywhere, *words]), re.I) if anywhere or words else None
        self.behind = (
            re.compile(rf"{BEHIND}(?:{'|'.join(ordinary)})(?![^\W_])", re.I) if ordinary else None
        )
        short = [re.escape(secret) for secret in self.secrets if len(secret) < LONG]
        self.short = (
            re.compile(rf"(?<![^\W_])(?:{'|'.join(short)})(?![^\W_])", re.I) if short else None
        )

    def __call__(self, text: str) -> str:
        """The text with *** in place of the secrets."""
        if self.plain:
            text = self.plain.sub(MASK, text)
        return self.behind.sub(rf"\1{MASK}", text) if self.behind else text

    def message(self, text: str) -> str:
        """A server's message, masked; "" if a short secret stands in it as a word."""
        return "" if self.short and self.short.search(text) else self(text)


def _is_long(form):
    """Whether a form may be replaced within words: long, or no part of a natural word."""
    return len(form) >= LONG or (len(form) >= 4 and not form.isalpha() and not form.isdigit())


def _is_ordinary(form):
    return len(form) < 4 and (form.isalpha() or form.isdigit())


def forms_of(secret: str) -> set[str]:
    """The secret as it is, and encoded for URLs, JSON, HTML, as hexadecimal digits and base64."""
    raw = secret.encode("utf-8", "surrogatepass")
    forms = {
        secret,
        quote(secret, safe=""),
        quote_plus(secret),
        "".join(f"%{byte:02x}" for byte in raw),
        raw.hex(),
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        html.escape(secret),
        html.escape(secret, False),
    }
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        forms |= {encode(raw).decode(), encode(raw).decode().rstrip("=")}
        for n_before in range(3):  # within a longer text: the digits that depend on the secret only
            digits = encode(b"\0" * n_before + raw).decode().rstrip("=")
            core = digits[(0, 2, 3)[n_before] : len(digits) - ((n_before + len(raw)) % 3 != 0)]
            if len(core) >= 6:
                forms.add(core)
    return forms


def secrets_of_address(address: str | None) -> list[str]:
    """Password, user with password, and values of the query of an address."""
    try:
        parts = urlsplit(address or "")
        values = [
            value
            for name, _, value in (pair.partition("=") for pair in parts.query.split("&"))
            if re.search("key|token|secret|sig|pass|auth|code|cred", name, re.I)
        ]
        password, user = parts.password, parts.username or ""
    except ValueError:
        return [address or ""]  # it cannot be read: all of it
    found = [unquote(value) for value in values] + values
    if password:
        found += [password, unquote(password), f"{unquote(user)}:{unquote(password)}"]
    elif user:
        found += [user, f"{unquote(user)}:"]
    return [value for value in found if value]


def of_environment() -> Masking:
    """The masking of what the environment holds: keys, and the passwords of addresses."""
    keys = [os.environ.get(name, "") for name in KEYS]
    addresses = [os.environ.get(name, "") for name in ADDRESSES]
    return Masking(
        [
            *keys,
            *(key.strip() for key in keys),
            *(s for address in addresses for s in secrets_of_address(address)),
        ]
    )
