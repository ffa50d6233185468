"""What stage 3 says of its rows at the end, and when its outputs count as up to date."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROJECT

from fastsae.interpretation import outputs, tables
from fastsae.interpretation.llm.work import add_labels
from fastsae.runtime import progress


def row(feature, status="ok", source="rule", **more):
    return {"feature": feature, "status": status, "label_source": source, **more}


ROWS = [
    row(0, source="gpt"),
    row(1, "dead", ""),
    row(2, "llm label timeout"),
    row(3, "llm validation timeout", "gpt"),
]


def test_what_the_language_model_left_open(capsys):
    assert outputs.exit_code(ROWS[:2]) == 0 and capsys.readouterr().err == ""
    assert outputs.exit_code(ROWS) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "incomplete: 2 features, 1 of them without an LLM's label "
        "(llm label timeout; llm validation timeout). "
    )


@pytest.mark.parametrize(
    "rows, given, status",
    [(ROWS, None, "incomplete"), (ROWS[:2], None, "written"), (ROWS, "unchanged", "unchanged")],
)
def test_the_summary_counts_the_rows(monkeypatch, tmp_path, rows, given, status):
    said = {}
    monkeypatch.setattr(progress, "summary", lambda *_, **figures: said.update(figures))
    outputs.print_summary(tmp_path, rows, 0.0, given)
    n_by_llm = 2 if len(rows) == 4 else 1
    assert said == {
        "status": status,
        "n_features": len(rows),
        "n_dead": 1,
        "n_labelled_by_llm": n_by_llm,
    }


def test_up_to_date_only_while_every_file_is_as_written(tmp_path, capsys):
    about = {"fingerprint": "f" * 64, "settings": {}, "inputs": {}}
    texts = {outputs.CSV: "a,b\n", outputs.HTML: "<html>"}

    def written(complete=True):
        found = {**about, "complete": complete}
        tables.write_outputs(tmp_path, texts, tmp_path / outputs.JSONL, ROWS, found)

    assert not outputs.up_to_date(tmp_path, about)
    written()
    assert outputs.up_to_date(tmp_path, about) and outputs.read_rows(tmp_path) == ROWS
    assert not outputs.up_to_date(tmp_path, {**about, "fingerprint": "0" * 64})
    (tmp_path / outputs.HTML).write_text("<html> edited")
    capsys.readouterr()
    assert not outputs.up_to_date(tmp_path, about)
    assert "interpretations.html: was changed by hand or is missing" in capsys.readouterr().out
    written(complete=False)
    capsys.readouterr()
    assert not outputs.up_to_date(tmp_path, about)
    assert "some features are unlabelled" in capsys.readouterr().out


def test_answers_go_into_the_rows_asked_about():
    rows = [row(j, label="tokens", score=None) for j in range(3)]
    outcome = {
        0: {"label": "rivers", "score": 4, "problems": []},
        2: {"score": 2, "problems": ["label timeout", "validation timeout"]},
    }
    work = SimpleNamespace(
        run=lambda: outcome,
        scored=[2, 1],
        asker=SimpleNamespace(backend=SimpleNamespace(model="gpt")),
    )
    assert add_labels(rows, work) == [2]
    assert rows == [
        row(0, source="gpt", label="rivers", score=4),
        row(1, label="tokens", score=None),
        row(2, "llm label timeout; validation timeout", label="tokens", score=2),
    ]


def test_the_script_loads_no_torch_before_there_is_work():
    code = "import sys, interpret_sae; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_a_number_as_category_is_printed_with_its_field(capsys):
    row = {"feature": 0, "label": "“how”", "label_f1": 0.9, "label_source": "rule"}
    row |= {"best_category": "2", "category_auc": 0.77}
    features = SimpleNamespace(
        rows=[row],
        settings=SimpleNamespace(LABEL_FIELD="steps"),
        summary=lambda: {"n_features": 1, "n_dead": 0},
        clearest=lambda n: [0],
        comparison=None,
        run_table={},
        categories=None,
        examples=[],
    )
    outputs.print_results(features, None, Path("out"))
    assert "  0: “how”, F1 0.90 (steps = 2, AUC 0.77)" in capsys.readouterr().out.splitlines()
