"""How large a report of many features is, and how soon a browser shows it from disk.

    python -m experiments.benchmarks.large_report             # 16,384 features, a minute
    python -m experiments.benchmarks.large_report --features 2000 --keep /tmp/large.html

The run is generated: as many texts as wanted, cut from the demo, and features that fire at
random words of theirs with the figures, neighbours and promoted tokens that a real run has. It
needs Debian's chromium and chromium-driver and selenium. Writes
experiments/results/large_report.json.
"""

import argparse
import json
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from experiments.shared.browser import READY, open_browser, wait
from experiments.shared.provenance import PROJECT, commit, machine, write_result
from fastsae.interpretation.report import report

N_QUANTILES = 5


class Generated:
    """What a report reads of a run, made up: `report.render` takes it for an Evidence."""

    def __init__(self, n_features: int, n_examples: int, seed: int) -> None:
        self.random = random = np.random.default_rng(seed)
        lines = (PROJECT / "data" / "cognitive_actions.jsonl").read_text("utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        words = [word for text in texts for word in re.findall(r" ?\w+|[^\w]", text)]
        lengths = random.integers(20, 400, n_examples)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        starts = random.integers(0, len(words) - 400, n_examples)
        self.words = [words[a : a + n] for a, n in zip(starts, lengths)]
        self.data = {"seq_lengths": lengths, "token_kind": np.zeros(self.offsets[-1], np.uint8)}
        self.examples = [
            SimpleNamespace(line=i + 1, label=f"category {i % 40}") for i in range(n_examples)
        ]
        common = Counter(word.strip().lower() for word in words).most_common()
        self.names = [name for name, _ in common]
        counts = np.array([n for _, n in common])
        vocabulary = len(self.names)
        self.top_tokens = [
            [(self.names[i], 0.5**k) for k, i in enumerate(of, 1)]
            for of in random.integers(0, vocabulary, (n_features, 8))
        ]
        self.statistics = SimpleNamespace(
            total=random.exponential(1000, n_features),
            count=random.integers(20, 5000, n_features),
            kind_role_mass=random.random((n_features, 3, 5)),
            histogram=SimpleNamespace(
                bars=lambda j: (np.geomspace(3000, 1, 24).astype(int) + j % 50, 64.0)
            ),
            name_count=counts,
        )
        self.n_features = n_features

    def token_texts(self, example: int) -> list[str]:
        """The words of an example."""
        return self.words[example]

    def shown_examples(self, features: Any) -> dict[int, list[tuple]]:
        """Five strongest examples of each feature and five others, each with a place."""
        shown = {}
        for j in features:
            chosen = self.random.integers(0, len(self.examples), 5 + N_QUANTILES)
            ranks = [None] * 5 + [0.9, 0.7, 0.5, 0.3, 0.1]
            shown[j] = [
                (rank, int(e), int(self.random.integers(0, len(self.words[e]))))
                for rank, e in zip(ranks, chosen)
            ]
        self.places = {(j, e): p for j in shown for _, e, p in shown[j]}
        return shown

    def token_values(self, pairs: Any) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
        """The place shown and about four others of each pair, with strengths."""
        found = {}
        for j, e in pairs:
            others = self.random.integers(0, len(self.words[e]), 4)
            places = np.unique([self.places[j, e], *others])
            found[j, e] = places, self.random.uniform(1, 40, len(places)).astype(np.float32)
        return found

    def neighbours(self, features: Any) -> dict[int, list[tuple[int, float]]]:
        """Six others of each feature."""
        drawn = self.random.integers(0, self.n_features, (len(features), 6))
        return {j: [(int(o), 0.5) for o in others] for j, others in zip(features, drawn)}

    coactive = neighbours

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the tables, as far as the report reads them."""
        random = self.random
        return [
            {
                "feature": j,
                "label": " or ".join(f"“{name}”" for name, _ in self.top_tokens[j][:4]),
                "label_source": "rule",
                "rule": "a rule",
                "label_f1": float(random.random()),
                "label_precision": float(random.random()),
                "label_recall": float(random.random()),
                "detection_auc": float(random.random()),
                "status": "ok",
                "density": float(random.exponential(0.002)),
                "max_activation": 40.0,
                "best_category": f"category {j % 40}" if j % 3 else "",
                "category_auc": float(random.uniform(0.6, 1)) if j % 3 else None,
                "score": None,
                "fidelity_f1": None,
                "special_token_share": 0.0,
                "matryoshka_level": "fine",
            }
            for j in range(self.n_features)
        ]

    def lens(self) -> dict[int, tuple]:
        """Twenty tokens that each feature promotes, and twenty that it suppresses."""
        found = {}
        for j in range(self.n_features):
            drawn = self.random.integers(0, len(self.names), (2, 20))
            values = np.sort(self.random.uniform(0.5, 2, (2, 20)))[:, ::-1].tolist()
            found[j] = tuple(
                [(self.names[i], v) for i, v in zip(of, side)] for of, side in zip(drawn, values)
            )
        return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=16384)
    parser.add_argument("--examples", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where the report is kept")
    args = parser.parse_args()
    made = Generated(args.features, args.examples, args.seed)
    started = time.perf_counter()
    about = dict.fromkeys(("title", "subtitle", "story"), "a generated run")
    text = report.render(
        made,  # type: ignore[arg-type]  # all that is read of it is there
        made.rows(),
        range(args.features),
        made.lens(),
        {
            **about,
            "verdict": [(name, "yes", "Generated.") for name in ("first", "second", "third")],
            "notice": None,
            "tables": [],
            "grids": [],
            "charts": [],
            "chance": 0.6,
            "field": "category",
            "table": {},
        },
    )
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        path = args.keep or Path(folder) / "report.html"
        path.write_text(text, encoding="utf-8")
        result = {
            "megabytes": round(path.stat().st_size / 1e6, 1),
            "seconds_to_make": round(seconds, 1),
            **in_a_browser(path, args.features),
        }
    print(json.dumps(result))
    about = {"commit": commit(), **machine()}
    write_result(
        "large_report", {k: v for k, v in vars(args).items() if k != "keep"}, {**result, **about}
    )


def in_a_browser(path: Path, n_features: int) -> dict[str, float]:
    """Seconds from opening the file until its first page stands, and until other things do."""
    browser = open_browser()
    try:
        found: dict[str, float] = {}
        url = path.resolve().as_uri()
        for name, place in (("overview", ""), ("list", "#features")):
            browser.get("about:blank")
            started = time.perf_counter()
            browser.get(url + place)
            wait(browser, READY)
            found[f"seconds_to_{name}"] = round(time.perf_counter() - started, 2)
            paints = "return performance.getEntriesByType('paint').map(e => e.startTime)"
            if first := browser.execute_script(paints):
                found[f"seconds_to_first_paint_{name}"] = round(min(first) / 1e3, 2)
        for name, act, until in (
            (
                "open_a_feature",
                "location.hash = '#feature=9000'",
                "document.body.dataset.open == 9000",
            ),
            ("search_labels", SEARCH, "state.shown.length < features.length"),
            ("search_all_texts", "0", "reading.done"),
        ):
            act = act.replace("9000", str(n_features // 2))
            started = time.perf_counter()
            browser.execute_script(act)
            wait(browser, f"return {until.replace('9000', str(n_features // 2))}")
            found[f"seconds_to_{name}"] = round(time.perf_counter() - started, 2)
        return found
    finally:
        browser.quit()


SEARCH = "$('search').value = 'station'; $('search').dispatchEvent(new Event('input'))"


if __name__ == "__main__":
    main()
