"""The README and docs/: links, anchors, names of files, tests and settings, the README's length."""

import json
import re

import pytest
from conftest import PROJECT
from source_tree import python_files

import config

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
DIALECT = re.compile(
    r"\bby lot\b|\bmend|\btold\b|\btakes? its leave\b"
    r"|(?<!there )\bis no (int|float|bool|number|file|setting)\b",
    re.I,
)


@pytest.mark.parametrize("path", python_files(".", "fastsae", "experiments"))
def test_messages_and_comments_are_in_plain_english(path):
    """Lists of words apart, in which a verb is one of many."""
    text = (PROJECT / path).read_text("utf-8")
    found = {match[0] for match in DIALECT.finditer(text)}
    assert path.endswith("token_properties.py") or found <= {"told"}


def prose(text: str) -> str:
    """A page without its code blocks and without what a script writes into it."""
    text = re.sub(r"<!-- \w+: written by .*?<!-- end -->", "", text, flags=re.S)
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def broken_links(path, text: str) -> list[str]:
    """Relative links of a page whose file or heading does not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if name and not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(text if not name else target.read_text("utf-8")):
            broken.append(link)
    return broken


def declared_settings() -> set[str]:
    """Names of all settings of config.py and of the stages."""
    return {
        name
        for file in ("config.py", *config.STAGES)
        for name in config.read_settings(PROJECT / file)
    }


def unknown_settings(text: str, declared: set[str]) -> set[str]:
    """Words in code type that look like settings or flags, and are none."""
    constants = set(re.findall(r"`([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|[MK])(?: = [^`]*)?`", text))
    flags = {
        flag.replace("-", "_").upper()
        for code in re.findall(r"`([^`\n]*)`", text)
        if not re.match(r"(git|pip|ruff|python3? -m|torchrun|hf) ", code)
        for flag in re.findall(r"(?<![\w-])--(?:no-)?([a-z][\w-]*)", code)
    }
    return (constants | flags) - declared - OTHERS


OTHERS = {  # variables of the environment, constants of modules, flags of other programs
    *("OPENAI_API_KEY", "OPENAI_KEY_SAE", "OPENAI_BASE_URL", "HTTPS_PROXY", "SSL_CERT_FILE"),
    *("WORLD_SIZE", "LOCAL_RANK", "FASTSAE_CACHE", "FASTSAE_RESULTS", "SPARSIFY_DISABLE_TRITON"),
    *("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "KMP_BLOCKTIME"),
    *("HELP", "HELP_ALL", "CHECK", "QUICK", "EXHAUSTIVE"),
}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    assert broken_links(path, path.read_text("utf-8")) == []


def test_a_broken_link_is_found():
    page = "# One\n[a](glossary.md) [b](no.md) [c](glossary.md#no) [d](#one) [e](#two)"
    assert broken_links(PROJECT / "docs" / "x.md", page) == ["no.md", "glossary.md#no", "#two"]


def test_every_page_is_reached_from_the_readme():
    readme = PAGES[0].read_text("utf-8")
    assert not [path.name for path in PAGES[1:] if f"](docs/{path.name})" not in readme]


def test_the_readme_is_one_page():
    text = PAGES[0].read_text("utf-8")
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 14_000


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_settings_named_in_the_pages_exist(path):
    assert not unknown_settings(path.read_text("utf-8"), declared_settings())


def test_an_unknown_setting_is_found():
    text = (
        "`LAYER_INDEX` `LAYER_IDX = 3` `--layer-index 3` `--no-quiet` `K` `pip install --no-deps`"
    )
    assert unknown_settings(text, {"LAYER_IDX", "QUIET", "K"}) == {"LAYER_INDEX"}


def test_files_and_tests_named_in_the_pages_exist():
    names = {path.name for path in (PROJECT / "tests").rglob("*.py")}
    missing = []
    for path in PAGES:
        for code in re.findall(r"`([^`\n]+)`", prose(path.read_text("utf-8"))):
            if re.fullmatch(r"(fastsae|tests|experiments|docs|data|\.ci)/[\w./-]+", code):
                if not (PROJECT / code).exists() and not (PROJECT / "fastsae" / code).exists():
                    missing.append((path.name, code))
            elif re.fullmatch(r"test_\w+" if path.stem != "guarantees" else r"(test)?_\w+", code):
                if (
                    f"{code if code.startswith('test') else 'test_guarantees' + code}.py"
                    not in names
                ):
                    missing.append((path.name, code))
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_are_in_plain_english_and_narrow(path):
    text = prose(path.read_text("utf-8"))
    assert not DIALECT.findall(text)
    wide = [line for line in text.splitlines() if len(line) > 100 and "|" not in line]
    assert not wide


def test_the_demo_is_as_quick_as_the_readme_says():
    demo = json.loads((PROJECT / "experiments" / "results" / "demo.json").read_text("utf-8"))
    stages = [demo["seconds"][name] for name in config.STAGES]
    assert "two minutes" in PAGES[0].read_text("utf-8") and sum(stages) < 120


def test_what_the_guide_for_additions_names_is_in_the_code():
    guide = (
        (PROJECT / "docs" / "contributing.md").read_text("utf-8").partition("## Where to look")[2]
    )
    code = "\n".join(
        (PROJECT / path).read_text("utf-8") for path in python_files("fastsae", "tests")
    )
    names = set(re.findall(r"`([A-Za-z_]\w{2,})(?:\(.*?\))?`", guide)) - {"pytest"}
    assert len(names) >= 15
    assert not [name for name in names if not re.search(rf"\b{name}\b", code)]


def test_generated_figures_and_tables_are_up_to_date():
    from experiments.pages import numbers

    stale = [path.name for path, text in numbers.pages().items() if path.read_text("utf-8") != text]
    assert not stale, "run python -m experiments.pages.numbers"


def test_a_generated_figure_that_was_edited_is_found():
    from experiments.pages import numbers

    text = PAGES[0].read_text("utf-8")
    assert numbers.written(text) == text
    edited = text.replace("active features per token and", "active features per token, and")
    assert edited != text and numbers.written(edited) == text
