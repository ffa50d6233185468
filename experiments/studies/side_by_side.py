"""The steering study's questions, and its answers as people read them: a Markdown file, an HTML
file and a figure of the curves."""

import html
import json
import re
from pathlib import Path

from experiments.shared.provenance import write_figure
from fastsae.runtime import artifacts
from fastsae.runtime.errors import InputError

# A word that a right answer holds, where there is one; the others are open.
PROMPTS = (
    ("What is the capital of France?", "Paris"),
    ("What is two plus two?", "four|4"),
    ("Which planet do we live on?", "Earth"),
    ("How can I fall asleep more easily?", None),
    ("What do bees make?", "honey"),
    ("In which season does snow usually fall?", "winter"),
    ("Write a short note to thank a neighbour for watering my plants.", None),
    ("What is the opposite of hot?", "cold"),
    ("How many days are there in a week?", "seven|7"),
    ("What do we call frozen water?", "ice"),
    ("Explain in two sentences why the sky is blue.", "light"),
    ("Give me a recipe for a simple soup.", None),
)
N_SHOWN = 6  # questions whose answers are shown; the figures count all
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 "
    "1rem;color:#222;background:#fff}"
    "table{border-collapse:collapse;width:100%;margin:0 0 1.5rem}th,td{border:1px solid "
    "#ccc;padding:.3rem .6rem;vertical-align:top;"
    "text-align:left}td.n{text-align:right;white-space:nowrap}td.t{white-space:pre-wrap;overflow-wrap:anywhere}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}th,td{border-color:#444}}"
)


def read_prompts(path):
    """[(question, expected word or None)] of a JSONL file, or the ones above."""
    if path is None:
        return list(PROMPTS)
    prompts = []
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):  # noqa: B007 (the handlers name it)
            row = json.loads(line)
            prompts.append((row["text"], row.get("expected")))
    except FileNotFoundError:
        raise InputError(f"PROMPTS: {path} is not a file. give a JSONL file.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f'{path}:{number}: is no object with a text. write {{"text": ...}}.'
        ) from None
    if not prompts:
        raise InputError(f"PROMPTS: {path} is empty. write a question per line.")
    return prompts


def write(path, results, prompts, unsteered, result):
    """`<path>.md` and `<path>.html`: for each direction and question, the answer at each alpha."""
    how = (
        f"Greedy answers of {result['autoencoder']['model']} with alpha times a direction of "
        "length 1 added to its residual stream "
        f"after layer {result['autoencoder']['layer']}, whose mean norm is "
        f"{result['mean_norm']:.1f}. Cut after "
        f"{result['n_new_tokens']} tokens; \u2026 marks a cut."
    )
    shown = list(enumerate(zip(prompts[:N_SHOWN], unsteered)))
    tables = [
        (
            f"{r['name']} ({r['how']})",
            [
                (question, rows_of(r["answers"][i], plain, result["alphas"]))
                for i, ((question, _), plain) in shown
            ],
        )
        for r in results
    ]
    artifacts.write_text(path.with_suffix(".md"), markdown(how, tables))
    artifacts.write_text(path.with_suffix(".html"), page(how, tables))
    print(f"wrote {path.with_suffix('.md')} and {path.with_suffix('.html')}")


def rows_of(answers, plain, alphas):
    """[(alpha, text)] of one question, the unsteered answer first; answers that equal it are said
    to."""
    return [
        ("unsteered", _shown(plain)),
        *(
            (f"{alpha:g}", "(as unsteered)" if a["ids"] == plain["ids"] else _shown(a))
            for alpha, a in zip(alphas, answers)
        ),
    ]


def _shown(answer):
    return (answer["text"].strip() or "(no text)") + ("" if answer["stopped"] else " \u2026")


def markdown(how, tables):
    lines = ["# Steering, side by side", "", how]
    for title, questions in tables:
        lines += ["", f"## {_cell(title)}"]
        for question, rows in questions:
            lines += [
                "",
                f"### {_cell(question)}",
                "",
                "| alpha | answer |",
                "|---:|---|",
                *(f"| {a} | {_cell(text)} |" for a, text in rows),
            ]
    return "\n".join(lines) + "\n"


def _cell(text):
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def page(how, tables):
    """One file without scripts or links; everything a model wrote is escaped."""
    parts = []
    for title, questions in tables:
        parts.append(f"<h2>{html.escape(title)}</h2>")
        for question, rows in questions:
            cells = "".join(
                f"<tr><td class=n>{html.escape(a)}</td><td class=t>{html.escape(text)}</td></tr>"
                for a, text in rows
            )
            parts.append(
                f"<h3>{html.escape(question)}</h3><table><tr><th>alpha</th><th>answer</th></tr>{cells}</table>"
            )
    policy = (
        "<meta http-equiv=Content-Security-Policy "
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8>{policy}<title>Steering, side by "
        f"side</title><style>{STYLE}</style>"
        f"<h1>Steering, side by side</h1><p>{html.escape(how)}</p>{''.join(parts)}</html>\n"
    )


def draw(path, result):
    """The curves over alpha, a line per direction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flatten()
    shown = (
        ("perplexity", "perplexity of the answers, unsteered model"),
        ("repetition", "repeated token triples, share"),
        ("changed", "answers that differ from the unsteered, share"),
        ("expected_word", "answers that hold the expected word, share"),
    )
    for target in result["targets"]:
        style = (
            {"color": "#999", "lw": 1} if target["feature"] is None else {"lw": 2, "marker": "o"}
        )
        for panel, (name, _) in zip(panels, shown):
            values = [point[name] for point in target["curves"]]
            if None not in values:
                panel.plot(result["alphas"], values, label=target["name"], **style)
    for panel, (name, title) in zip(panels, shown):
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        if result["unsteered"][name] is not None and name != "changed":
            panel.axhline(result["unsteered"][name], color="black", lw=0.6, ls=":")
        panel.set_yscale("log") if name == "perplexity" else panel.set_ylim(-0.03, 1.03)
    norm = result["mean_norm"]
    for panel in panels[:2]:
        top = panel.secondary_xaxis("top", functions=(lambda a: a / norm, lambda a: a * norm))
        top.set_xlabel("alpha over the mean norm of the stream")
    for panel in panels[2:]:
        panel.set_xlabel("alpha")
    panels[0].legend(frameon=False, fontsize=8)
    write_figure(path, figure)
