"""The report: nothing in it acts or asks for anything, and in a real browser it opens from disk,
sorts, filters and stays quiet."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import WORDS, put_activations
from inert_page import Tags, assert_inert, read_report, unpack

from fastsae.interpretation import effects, running
from fastsae.interpretation.report import charts, overview, packing, report
from fastsae.interpretation.report.run_page import (
    describe_run,
    left_out,
    who_labelled,
    worth_charts,
    worth_grids,
)

HOSTILE = (
    '<img src="http://evil.example/x.png" onerror="document.title=\'pwned\'">',
    "</script><script>document.title='pwned'</script>",
    "{{ 7 * 7 }} ${7*7} `x`",
    "'\"><svg onload=alert(1)>",
    "\u2028\u2029 <!-- --> ]]> &lt;b&gt; javascript:alert(1)",
    '=HYPERLINK("http://evil")',
)


@pytest.fixture
def hostile(tmp_path, planted, run_main, smol_tokenizer):
    """A report of the planted autoencoder on texts, labels and file names that would like to be
    code."""
    generator, ids, lengths, rows = np.random.default_rng(0), [], [], []
    old = np.load(tmp_path / "activations" / "activations_layer12.npz")["activations"]
    for i in range(120):
        text = HOSTILE[i % len(HOSTILE)]
        rows.append({"text": text, "category": HOSTILE[i % 3]})
        tokens = smol_tokenizer(text, add_special_tokens=False)["input_ids"][:10]
        ids += tokens
        lengths.append(len(tokens))
    dataset = tmp_path / "planted.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    put_activations(
        tmp_path,
        old[generator.permutation(len(old))[: len(ids)]],
        lengths,
        dataset=dataset,
        token_ids=ids,
    )
    assert (
        run_main(
            "train_sae",
            *planted,
            "--m",
            20,
            "--k",
            2,
            "--matryoshka-prefixes",
            "8,20",
            "--n-epochs",
            2,
        )
        == 0
    )
    assert run_main("interpret_sae", *planted) == 0
    return tmp_path / "interpretations.html"


def test_the_story_says_what_was_done():
    """An autoencoder without a fixed K, imported, nothing left out; a language model that was asked
    in vain."""
    from types import SimpleNamespace

    statistics = SimpleNamespace(
        kept=np.ones(4, bool),
        n_kept=4,
        count=np.array([4, 4, 3]),
        norms=np.arange(1.0, 5),
        density=np.ones(3),
    )
    about = {
        "settings": {"K": 64, "EXCLUDE_SHARED_PREFIX": True},
        "max_norm": 9.0,
        "source": {"format": "SAELens"},
        "fingerprint": "f",
        "metrics": {},
    }
    source = {
        "model_name": "m",
        "settings": {"LAYER_IDX": 1},
        "dataset_path": "d.jsonl",
        "inputs": {"dataset": "x"},
        "fingerprint": "g",
    }
    features = SimpleNamespace(
        evidence=SimpleNamespace(statistics=statistics, examples=[1, 2]),
        sae_meta=about,
        source=source,
        categories=None,
        category_chance=lambda: None,
        comparison=None,
        run_table={},
        rows=[{"status": "llm label unusable", "label_source": "rule"}] * 3,
        summary=lambda: {
            "n_features": 3,
            "n_dead": 0,
            "n_with_rule": 2,
            "n_rule_tested": 3,
            "mean_label_f1": 0.5,
            "mean_label_f1_other_rule": 0.25,
            "n_detection": 1,
            "mean_detection_auc": 0.875,
            "mean_detection_auc_random": 0.625,
        },
    )
    metadata = {
        "settings": {"llm": {"INTERPRETER_MODEL": "gpt"}},
        "checkpoint": "c",
        "fingerprint": "h",
        "versions": {},
    }
    run = describe_run(features, metadata, [], {}, 3)
    assert (
        "as a sum of about 2.75 of 3 features" in run["story"]
        and "The figures count 4 tokens. gpt was asked" in run["story"]
    )
    assert run["story"].endswith(
        "gpt was asked and gave no usable label: every label is a rule, found on half of the "
        "texts and tested on the other."
    )
    # no norm lies beyond 9
    assert "line" not in run["charts"][0].note and "bound" not in svg(run["charts"][0])
    assert run["tables"][0][1] == "On tokens of this dataset, drawn at random."
    labels = {name: entries for name, _, entries, _ in run["tables"]}["What the labels are worth"]
    assert [value for _, value in labels] == ["2 of 3", "0.500", "0.250", "0.875", "0.625"]
    del about["source"]
    about.update(metrics={"l0": 1234.4}, max_norm=3.5)
    statistics.n_kept = 3
    metadata["settings"]["llm"] = None
    run = describe_run(features, metadata, [], {}, 3)
    assert (
        "about 1,234 of" in run["story"]
        and "1 are left out, the prefix that all examples share and attention sinks."
        in run["story"]
    )
    assert (
        "No language model was asked: every" in run["story"]
        and "not trained on" in run["tables"][0][1]
    )
    assert "beyond the line" in run["charts"][0].note and ">bound<" in svg(run["charts"][0])


def test_what_the_features_are_worth_is_on_the_page():
    def each(value):
        return {"value": value, "interval": [value - 0.1, value + 0.1]}

    sources = {"features": each(0.75), "random tokens": each(0.5)}
    probing = {
        "n_categories": 3,
        "n_examples": 40,
        "n_splits": 5,
        "auc_bound": 0.8,
        "sparse_probing": {"1": sources, "16": sources},
        "dense_probing": sources,
        "n_above_auc_bound": sources,
        "added_by_training": {"random tokens": {"1": each(0.25), "16": each(0.25)}},
    }
    loss = {
        "held_out": True,
        "n_examples": 2,
        "n_tokens": 10,
        "ce": {"clean": 2, "spliced": 2.5, "mean": 5, "zero": 6},
        "kl": {"spliced": 0.5, "mean": 3, "zero": 4},
        "recovered": {"zero": each(0.875), "mean": each(0.8)},
    }
    seeds = {"n_seeds": 2, "features": {"mean_max_cosine": 0.9, "found_in_all": 0.5}}
    table = {
        "probing": probing,
        "model_loss": loss,
        "effects": effects.summary([an_effect(1.5)] * 2),
        "seed_stability": seeds,
    }
    (chart,) = worth_charts(table)
    # from 0.5 to 1: half of the width, and from 0.65 to 0.85 the interval
    bars = [mark for mark in chart.marks if mark.tag == "rect"]
    assert bars[0].width == pytest.approx(0.5 * (charts.WIDTH - 2)) and bars[0].cool
    assert bars[1].width == 1.5 and not bars[1].cool
    line = next(mark for mark in chart.marks if mark.tag == "line" and mark.kind == "guide")
    assert (line.x1, line.x2) == pytest.approx((0.3 * (charts.WIDTH - 2), 0.7 * (charts.WIDTH - 2)))
    worth, counts, model, done, stable = worth_grids(table)
    assert worth["head"] == ["", "1 column", "16 columns", "all columns"]
    assert worth["rows"][0] == ["the features"] + ["0.750 ±0.100"] * 3
    assert len(counts["rows"]) == 2 and model["rows"][1] == ["the reconstruction", "2.500", "0.500"]
    assert done["rows"][0] == [
        "taken out",
        "1.500 (0.500)",
        "+0.500 (-0.250)",
        "3.0 [3.0, 3.0]",
        "2 of 2",
    ]
    assert stable["rows"] == [["the features", "0.900", "50"]]
    assert worth_charts({}) == [] == worth_grids({"model_loss": {"not_measured": "why"}})


def test_what_is_left_out_and_who_labelled():
    def said(n, max_norm, use):
        return left_out(
            {"settings": {"EXCLUDE_SHARED_PREFIX": True, "USE_TOKENS": use}, "max_norm": max_norm},
            n,
        )

    assert (
        said(0, 9.0, "content") == ""
        and said(1200, None, "all") == "; 1,200 are left out, the prefix that all examples share"
    )
    assert said(5, 9.0, "assistant") == (
        "; 5 are left out, the prefix that all examples share, attention sinks and all but the "
        "assistant's text"
    )
    assert who_labelled(
        [{"label_source": "gpt"}, {"label_source": "rule"}], {"INTERPRETER_MODEL": "gpt"}
    ).startswith("1 labels were")


def test_numbers_keep_their_digits():
    assert [report.number(x) for x in (0.000123456, 12.3456, 0, None, float("inf"))] == [
        0.0001235,
        12.35,
        0,
        None,
        None,
    ]


def test_the_report_holds_no_code_but_its_own(hostile):
    text = hostile.read_text(encoding="utf-8")
    assert_inert(text)
    data = read_report(text)
    assert len(data["features"]) == 20
    shown = "".join(data["strings"][i] for i in data["dialogues"][0]["ids"])
    assert any(text.startswith(shown[:8]) for text in HOSTILE)


def test_packed_data_survive_hostile_text():
    value = {"text": "".join(HOSTILE), "n": [1, None]}
    assert unpack(packing.pack(value)) == value and re.fullmatch(
        "[A-Za-z0-9+/=]+", packing.pack(value)
    )
    with pytest.raises(ValueError):
        packing.pack(float("nan"))


def test_a_number_as_category_carries_its_field():
    for value in ("1", "3.5", "-2e3", "true", "No"):
        assert overview.category_name(value, "steps") == f"steps = {value}"
    assert overview.category_name("river 1", "steps") == "river 1"
    assert overview.category_name("1", None) == "1" and overview.category_name(None, "a") == ""


def test_what_a_feature_that_means_something_is():
    names, counts = ["the", "of", "river", ".", "⏎"], [40, 30, 30, 90, 10]
    common = overview.commonest(names, counts)
    assert common == {"the", ".", "⏎"}  # 30 of 100 words are reached with the first
    assert overview.commonest([*names, "7"], [*counts, 900]) == common  # numbers are no words
    assert overview.is_plain([("the", 0.3), ("river", 0.2)], 0.0, common)
    assert not overview.is_plain([("the", 0.1), ("river", 0.3)], 0.0, common)
    assert overview.is_plain([("river", 1.0)], 0.6, common)
    assert not overview.is_plain([], None, common)
    row = {"label_source": "rule", "label_f1": 0.6, "fidelity_f1": 0.9, "category_auc": 0.85}
    assert overview.evidence_of(row, None) == 0.6
    assert overview.evidence_of(row, 0.7) == pytest.approx((0.6 + 0.5) / 2)
    assert overview.evidence_of({**row, "category_auc": 0.6}, 0.7) == pytest.approx(0.3)
    assert overview.evidence_of({**row, "label_source": "gpt"}, None) == 0.9


def probed(one, many):
    """A run table whose features differ from random tokens by these (value, low, high)."""

    def found(value, low, high):
        return {"value": value, "interval": [low, high]}

    return {
        "probing": {
            "n_categories": 4,
            "sparse_probing": {
                "1": {"features": found(0.7, 0.6, 0.8)},
                "16": {"features": found(0.9, 0.8, 1.0)},
            },
            "added_by_training": {"random tokens": {"1": found(*one), "16": found(*many)}},
        }
    }


def test_whether_a_run_is_good_is_said_beside_its_nulls():
    counts = {
        "n_features": 10,
        "n_dead": 1,
        "n_with_rule": 8,
        "mean_label_f1": 0.5,
        "mean_label_f1_other_rule": 0.02,
        "mean_detection_auc": 0.8,
        "mean_detection_auc_random": 0.6,
    }
    metrics = {"normalized_mse": 0.3, "test": {}}

    def said(added, **more):
        return overview.verdict(metrics, {**counts, **more}, added)

    first, second, third = said(probed((0.1, 0.05, 0.15), (-0.1, -0.2, -0.01)))
    assert first[1] == "partly" and "30 % of the variance" in first[2]  # a tenth is dead
    assert second[1] == "partly" and second[2].endswith(
        "apart with an AUC of 0.90, by 16 random tokens in their place more (difference -0.10 "
        "±0.10); by one feature with 0.70, by one random token less (difference +0.10 ±0.05)."
    )
    assert third[1] == "partly" and "8 of 9 features have a rule" in third[2]
    assert said(probed((0.1, -0.1, 0.3), (0, -0.1, 0.1)))[1][1] == "no"
    assert said(probed((0.1, 0.05, 0.2), (0.1, 0.01, 0.2)), n_dead=0)[1][1] == "yes"
    # without categories random directions are the null, which is the weaker one
    assert said({})[1][1] == "partly" and "of a random direction with 0.60" in said({})[1][2]
    assert said({}, mean_detection_auc=0.64)[1][1] == "no"
    assert [entry[1] for entry in overview.verdict({}, {"n_features": 1, "n_dead": 0}, {})] == [
        "unknown"
    ] * 3


def test_long_dialogues_are_cut_around_what_is_shown():
    from types import SimpleNamespace

    evidence = SimpleNamespace(
        data={"seq_lengths": [3000], "token_kind": np.zeros(3000, int)},
        offsets=[0, 3000],
        token_texts=lambda e: ["x"] * 3000,
        examples=[SimpleNamespace(line=1, label=None)],
    )
    for length in (48, 1024):
        dialogues = report.Dialogues(evidence, report.Strings(), length)
        for peak in (0, 511, 1500, 2999):
            _, start, stop = dialogues.place(0, peak)
            assert start <= peak < stop and stop - start == length


def svg(chart):
    """A chart as the report has it."""
    return str(report.templates().get_template("charts.svg.j2").module.svg(chart))


def test_charts_are_well_formed():
    from xml.etree import ElementTree

    made = [
        charts.bars(
            "<t>",
            "n",
            [0, 3, 1],
            ["a", None, "<b>"],
            shown=["", "3", "1"],
            cool={1},
            outline=[1, 2, 3],
        ),
        charts.log_bars("t", "n", [1.0, 10, 10, 500], guide=100, guide_name="bound"),
        charts.log_bars("t", "n", [5.0]),
        charts.curves("t", "n", [("a", [3.0, 1.0]), ("b", [4.0, 2.0])]),
    ]
    for chart in made:
        ElementTree.fromstring(svg(chart))
    assert charts.log_bars("t", "n", [0.0]) is None
    assert "&lt;t&gt;" in svg(made[0]) and ">&lt;b&gt;</text>" in svg(made[0])


def test_where_a_bar_and_its_texts_stand():
    """Two bars of 2 and 4 in a plot of 380 x 150 that begins at (40, 20)."""
    made = charts.bars("t", "n", [2, 4], ["a", None], shown=["two", "four"], cool={1})
    assert made.marks == [
        charts.Line(40, 170, 420, 170),
        charts.Text(34, 18, "4", "end"),
        charts.Bar(pytest.approx(55.2), 95.0, pytest.approx(159.6), 75.0, cool=False),
        charts.Text(135.0, 185, "a"),
        charts.Text(135.0, 90.0, "two", key=True),
        charts.Bar(pytest.approx(245.2), 20.0, pytest.approx(159.6), 150.0, cool=True),
        charts.Text(325.0, 15.0, "four", key=True),
    ]
    assert '<rect class="bar cool" x="245.2" y="20.0" width="159.6" height="150.0"' in svg(made)


@pytest.fixture
def browser(tmp_path_factory):
    """Debian's chromium under selenium; the tests that need it say so where it is absent."""
    webdriver = pytest.importorskip(
        "selenium.webdriver",
        reason="no selenium here (pip install selenium): the report is not tried in a browser",
    )
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromedriver here: the report is not tried in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "window-size=1300,900",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )
    yield driver
    driver.quit()


def requested(driver):
    """URLs of all requests since the last call, but for the browser's own pages."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    # none of these leaves the browser
    return [url for url in urls if not url.startswith(("chrome:", "about:", "data:"))]


def visit(driver, url):
    """Load a page of the report anew and wait until it shows what it unpacks."""
    driver.get("about:blank")
    driver.get(url)
    wait(driver, "return document.body.dataset.ready")


def wait(driver, script):
    """Wait until `script` returns something true, 10 s at most."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 10, poll_frequency=0.02).until(lambda d: d.execute_script(script))


def ids(driver):
    return driver.execute_script(
        "return [...document.querySelectorAll('.row')].map(r => Number(r.dataset.id))"
    )


def choose(driver, name, value):
    driver.execute_script(
        "const s = document.getElementsByName(arguments[0])[0]; s.value = arguments[1]; "
        "s.dispatchEvent(new Event('change'))",
        name,
        value,
    )


def an_effect(kl):
    """What `effects.changes` gives, with continuations that would like to be code."""
    part = {"kl": kl, "loss": 0.5, "random_kl": [0.25, 0.75], "random_loss": [-0.5, 0.0]}
    ways = ("prompt", "unchanged", "removed", "added", "random")
    return {
        "n_passages": 2,
        "n_tokens": 7,
        "removed": part,
        "added": {**part, "kl": 0.25},
        "continuations": {"line": 3, **dict(zip(ways, HOSTILE))},
    }


def test_in_a_browser(planted, run_main, tmp_path, browser, monkeypatch):
    """Opens from file://, asks for nothing, reports no error; sorting, search, filters, deep links,
    keys and themes work."""

    def told(features):
        for row in features.rows:
            row["effects"] = an_effect(1.5) if row["label"].startswith("“river”") else None

    monkeypatch.setattr(running, "add_what_the_model_tells", told)
    assert run_main("interpret_sae", *planted) == 0
    url = (tmp_path / "interpretations.html").as_uri()
    requested(browser)
    visit(browser, f"{url}#features")
    assert browser.execute_script("return Number(document.body.dataset.ready)") < 1000
    everything = ids(browser)
    rows = {
        row["feature"]: row
        for row in map(
            json.loads, (tmp_path / "interpretations.jsonl").read_text().strip("\n").split("\n")[1:]
        )
    }
    assert sorted(everything) == [j for j, row in rows.items() if row["status"] != "dead"]
    # the list opens on what has most evidence: the four planted words, each a category's own
    assert {rows[j]["best_category"] for j in everything[:4]} == {f"cat_{word}" for word in WORDS}
    browser.execute_script(
        "const s = $('order'); s.value = 'auc'; s.dispatchEvent(new Event('change'))"
    )
    # features without a category come last
    aucs = [rows[j]["category_auc"] or 0 for j in ids(browser)]
    assert aucs == sorted(aucs, reverse=True)
    browser.find_element("css selector", "[data-sort=density]").click()
    densities = [rows[j]["density"] for j in ids(browser)]
    assert densities == sorted(densities, reverse=True)
    browser.find_element("css selector", "[data-sort=density]").click()
    assert [rows[j]["density"] for j in ids(browser)] == sorted(densities)
    search = browser.find_element("id", "search")
    search.send_keys("river")
    wait(browser, "return reading.done")
    told = browser.execute_script(
        "return [...document.querySelectorAll('.row')].map(r => Boolean(r.querySelector('.found')))"
    )
    names = ("label", "top_tokens", "best_category", "promoted_tokens")
    assert [not any("river" in str(rows[j][name]) for name in names) for j in ids(browser)] == told
    assert sorted(told) == told and not told[0] and told[-1]  # in an example only: these come last
    search.send_keys(" nowhere")
    assert ids(browser) == []
    search.send_keys("\ue00c")  # Escape
    assert len(ids(browser)) == len(everything)
    choose(browser, "category", "cat_apple")
    assert ids(browser) == [j for j in ids(browser) if rows[j]["best_category"] == "cat_apple"]
    choose(browser, "auc", "0.9")
    assert len(ids(browser)) == 1 and rows[ids(browser)[0]]["category_auc"] >= 0.9
    choose(browser, "category", ""), choose(browser, "auc", ""), choose(browser, "dead", "dead")
    assert {rows[j]["status"] for j in ids(browser)} == {"dead"}
    choose(browser, "dead", "")
    river = next(j for j, row in rows.items() if row["label"].startswith("“river”"))
    visit(browser, f"{url}#feature={river}")
    marks = browser.execute_script(
        "return [...document.querySelectorAll('#panel .example mark.peak')].map(m => m.textContent)"
    )
    assert len(marks) >= 5 and set(marks) == {"river"}
    panel = browser.find_element("id", "panel").text
    assert "Without it the next token changes 3.00 times as much" in panel
    assert "The loss there changes by +0.50 nats, by random pushes -0.25." in panel
    ways = browser.find_elements("css selector", ".ways dd")
    assert [way.text for way in ways] == [
        text.replace("\u2028\u2029", "").strip() for text in HOSTILE[1:5]
    ]
    browser.find_element("css selector", "#panel .example button").click()
    assert browser.find_element("css selector", "#panel .tokens.whole mark").text == "river"
    shown = browser.execute_script("return state.shown")
    browser.find_element("tag name", "body").send_keys("\ue015")  # arrow down
    wait(browser, f"return state.open !== {river}")
    assert (
        browser.execute_script("return state.open")
        == shown[min(shown.index(river) + 1, len(shown) - 1)]
    )
    browser.find_element("tag name", "body").send_keys("\ue013")  # arrow up
    assert browser.execute_script("return [state.open, location.hash]")[1].startswith("#feature=")
    before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    browser.find_element("id", "theme").click()
    assert (
        browser.execute_script("return getComputedStyle(document.body).backgroundColor") != before
    )
    names = {" ": "␠", "\ufe0f": "U+FE0F", " \n": "␠⏎", "a b": "a b", "e\u0301": "e\u0301"}
    assert names == {
        text: browser.execute_script("return nameOf(arguments[0])", text) for text in names
    }
    other = next(j for j in everything if j != river)
    visit(browser, f"{url}#feature={other}")
    assert "What it does" not in browser.find_element("id", "panel").text  # the model was not run
    visit(browser, f"{url}#run")
    assert (
        browser.find_element("id", "run-page").is_displayed()
        and len(browser.find_elements("css selector", ".charts svg")) >= 3
    )
    visit(browser, f"{url}#feature=99999")
    assert "not in this report" in browser.find_element("id", "panel").text
    assert not [
        entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ]
    assert [url for url in requested(browser) if not url.startswith("file://")] == []


def test_the_first_page_and_its_terms_in_a_browser(planted, run_main, tmp_path, browser):
    """Categories with their best features; every term says what it means by keyboard and by tap;
    the strongest token of a row is never cut off."""
    assert run_main("interpret_sae", *planted) == 0
    url = (tmp_path / "interpretations.html").as_uri()
    visit(browser, url)
    page = browser.find_element("id", "overview")
    assert page.is_displayed() and "cat_river" in page.text and "Is this run good?" in page.text
    # a grade colours the edge of its sentence, not the text's ground
    grounds = browser.execute_script(
        "return ['yes', 'partly', 'no'].map(grade => { const li = $('overview').querySelector("
        "'.verdict li'); li.className = grade; return getComputedStyle(li).backgroundColor; })"
    )
    assert grounds == ["rgba(0, 0, 0, 0)"] * 3
    best = browser.execute_script(
        "return [...document.querySelectorAll('.categories li')]"
        ".map(li => [li.children[0].textContent, li.children[3].textContent])"
    )
    assert len(best) == 4
    assert all(category[4:] in label for category, label in best)  # “river” for cat_river
    term, tip = (
        "document.querySelector('#overview [data-term=auc]')",
        "document.querySelector('.tip')",
    )
    browser.execute_script(f"{term}.focus()")
    shown = browser.execute_script(f"return {tip}.hidden ? '' : {tip}.textContent")
    assert shown == browser.execute_script(
        f"return document.getElementById({term}.getAttribute('aria-describedby')).textContent"
    )
    browser.find_element("tag name", "body").send_keys("\ue00c")  # Escape
    assert browser.execute_script(f"return {tip}.hidden")
    browser.execute_script(f"{term}.click()")
    assert not browser.execute_script(f"return {tip}.hidden")
    assert (
        browser.execute_script(
            "return [...document.querySelectorAll('[data-term]')].filter("
            "term => !document.getElementById(term.getAttribute('aria-describedby'))).length"
        )
        == 0
    )
    for width in (390, 1300):
        browser.set_window_size(width, 900)
        visit(browser, f"{url}#features")
        assert browser.execute_script(
            "return [...document.querySelectorAll('.row .snippet')].map(node => {"
            " const peak = node.querySelector('.peak'), text = document.createRange();"
            " text.selectNodeContents(peak);"
            " const [a, b, c] = [node, peak, text].map(x => x.getBoundingClientRect());"
            " return b.left >= a.left && b.right <= a.right + 1 && c.width <= b.width + 1;"
            "}).every(Boolean)"
        )
    assert unnamed(browser) == []


def unnamed(driver):
    """Controls and pictures that a screen reader could not name."""
    return driver.execute_script(
        "return [...document.querySelectorAll('a, button, select, input, svg, [role=img]')]"
        ".filter(node => !(node.getAttribute('aria-label') || node.textContent.trim()"
        " || node.labels?.length)).map(node => node.outerHTML)"
    )


def test_small_numbers_and_states_in_a_browser(planted, run_main, tmp_path, browser):
    assert run_main("interpret_sae", *planted) == 0
    path = tmp_path / "interpretations.html"
    text = path.read_text(encoding="utf-8")
    blocks = Tags(text).scripts[:2]
    index, part = map(unpack, blocks)
    alive = [i for i, f in enumerate(index["features"]) if not f["dead"]][:2]
    small, asked = (index["features"][i] for i in alive)
    dead = next(f for f in index["features"] if f["dead"])
    details = part["features"][alive[0]]
    for example in details["examples"]:
        example.update(top=example["top"] / 200, values=[v / 200 for v in example["values"]])
    details.update(max=0.0298, mean=0.0251, histogramEnd=0.0301)
    asked.update(status="llm label unusable", label="x")
    for block, changed in zip(blocks, (index, part)):
        text = text.replace(block, packing.pack(changed))
    path.write_text(text, encoding="utf-8")
    visit(browser, f"{path.as_uri()}#feature={small['id']}")
    text = browser.find_element("id", "panel").text
    assert (
        "0.0298" in text
        and "mean 0.0251" in text
        and "0.0301" in text
        and "no language model was asked" in text
    )
    shown = float(browser.find_element("css selector", "#panel .example header b").text)
    assert shown == pytest.approx(details["examples"][0]["top"], rel=0.01)
    assert (
        browser.find_element("css selector", "#panel .example .tokens").get_attribute("dir")
        == "auto"
    )
    visit(browser, f"{path.as_uri()}#feature={asked['id']}")
    text = browser.find_element("id", "panel").text
    assert (
        "A rule, found on half of the texts. On the other half it has F1 1.00 for “fires above"
        in text
        and "llm label unusable." in text
        and "was asked" not in text
    )
    visit(browser, f"{path.as_uri()}#feature={dead['id']}")
    assert (
        "did not fire on any of the tokens counted here" in browser.find_element("id", "panel").text
    )


def test_hostile_texts_are_inert_in_a_browser(hostile, browser):
    requested(browser)
    visit(browser, hostile.as_uri())
    assert "pwned" not in browser.title
    for j in ids(browser):
        visit(browser, f"{hostile.as_uri()}#feature={j}")
    planted = "#panel img, #panel script, #list img, #list script, #panel svg[onload]"
    assert browser.execute_script(f"return document.querySelectorAll('{planted}').length") == 0
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [url for url in requested(browser) if not url.startswith("file://")] == []
    # they are there, as text
    assert re.search(r"onerror|script", browser.find_element("id", "features").text)


def test_fits_a_phone_and_prints(planted, run_main, tmp_path, browser):
    assert run_main("interpret_sae", *planted) == 0
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    url = (tmp_path / "interpretations.html").as_uri()
    for place in ("", "#feature=1", "#run"):
        visit(browser, url + place)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, place
    assert len(browser.execute_cdp_cmd("Page.printToPDF", {})["data"]) > 5000
