"""Whether a report can do anything besides its own script, and what its packed data are."""

import base64
import json
import re
import zlib
from html.parser import HTMLParser

from fastsae.interpretation.report import report


class Tags(HTMLParser):
    """All start tags with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self.inside = None


def unpack(text):
    """What `packing.pack` was given."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


def read_report(text):
    """The data of a report in one piece: each feature with its details, and all dialogues."""
    index, *parts = [unpack(packed) for packed in Tags(text).scripts[:-1]]
    dialogues, details = [], []
    for part in parts:
        for feature in part["features"]:
            for example in feature["examples"]:
                example["dialogue"] += len(dialogues)
        details += part["features"]
        dialogues += part["dialogues"]
    features = [{**entry, **more} for entry, more in zip(index["features"], details, strict=True)]
    return {**index, "features": features, "dialogues": dialogues}


def assert_inert(text):
    """A report in which nothing acts but its own script; returns its `Tags`."""
    assert "data:image" not in text
    parsed = Tags(text)
    *blocks, script = [attributes for tag, attributes in parsed.tags if tag == "script"]
    names = ["data", *(f"part-{i}" for i in range(len(blocks) - 1))]
    assert blocks == [{"type": "text/plain", "id": name} for name in names] and script == {}
    assert all(re.fullmatch("[A-Za-z0-9+/=]*", packed) for packed in parsed.scripts[:-1])
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "div",
        "h1",
        "h2",
        "p",
        "nav",
        "a",
        "button",
        "main",
        "section",
        "span",
        "ul",
        "li",
        "dl",
        "dt",
        "dd",
        "mark",
        "label",
        "input",
        "select",
        "option",
        "ol",
        "article",
        "figure",
        "figcaption",
        "b",
        "svg",
        "line",
        "text",
        "rect",
        "polyline",
        "details",
        "summary",
        "table",
        "tr",
        "th",
        "td",
        "noscript",
        "script",
    }
    assert {tag for tag, _ in parsed.tags} <= allowed
    for tag, attributes in parsed.tags:
        active = ("src", "srcset", "style", "action", "formaction")
        assert not [name for name in attributes if name.startswith("on") or name in active], (
            tag,
            attributes,
        )
        assert attributes.get("href", "#") in ("#", "#features", "#run"), attributes
    policy = next(
        a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert (
        policy.startswith("default-src 'none'")
        and "unsafe" not in policy
        and report.csp_hash(parsed.scripts[-1]) in policy
    )
    return parsed
