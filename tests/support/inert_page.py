"""Whether an HTML page can do anything besides its own script."""

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


def assert_inert(text):
    """A report in which nothing acts but its own script; returns its `Tags`."""
    assert "data:image" not in text
    parsed = Tags(text)
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    assert (
        len(scripts) == 2
        and scripts[0] == {"type": "application/json", "id": "data"}
        and scripts[1] == {}
    )
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
        and report.csp_hash(parsed.scripts[1]) in policy
    )
    return parsed
