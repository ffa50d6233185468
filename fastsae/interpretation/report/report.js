"use strict";
// The report's behaviour. Everything that came from the data is put into the page as text, never as markup.
const started = performance.now();
const data = JSON.parse(document.getElementById("data").textContent);
const features = data.features, byId = new Map(features.map(f => [f.id, f]));
const $ = id => document.getElementById(id);
const state = { sort: data.sort, down: true, shown: [], open: null };
const WINDOW = 26;  // tokens on each side of the strongest one, before "whole text"

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined && child !== false));
  return node;
}

function drawing(tag, properties, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const percent = x => x === 0 ? "0 %" : x < 0.001 ? `${(100 * x).toPrecision(1)} %` : `${(100 * x).toFixed(x < 0.1 ? 1 : 0)} %`;
const round = (x, digits = 2) => x === null || x === undefined ? "–" : x.toFixed(digits);
const figure = x => x === 0 ? "0" : Math.abs(x) < 999.5 ? x.toPrecision(3) : Math.round(x).toLocaleString("en");  // of any scale
const visible = text => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍");

// A label, with the held-out F1 of one that is a rule.
function labelNodes(f) {
  if (f.byLlm || f.dead) return [labelOf(f)];
  if (!f.rule) return [make("span", { class: "mixed" }, labelOf(f))];
  const figure = f.ruleF1 === null ? null
    : make("small", { class: "claim number", title: "F1 of this rule on texts it was not found on" }, ` F1 ${round(f.ruleF1)}`);
  return [make("span", { dir: "auto" }, visible(f.label)), figure].filter(Boolean);
}

const labelOf = f => f.label || (f.dead ? "never fires here" : "no label");

// Texts with their activations

function tokenNode(text, kind, value, max, isPeak, breaks) {
  let inner = text;
  if (kind === "t" || kind === "p") inner = text.trim() ? make("span", { class: "special" }, visible(text)) : newlines(text, breaks);
  else if (/[\n\t\r]/.test(text)) inner = newlines(text, breaks);
  if (!value) return kind === "p" && typeof inner !== "string" ? make("span", { class: "out" }, inner) : inner;
  const space = typeof inner === "string" && text.trim() ? /^ */.exec(text)[0] : "";  // shade the word, not the gap before it
  const node = make("mark", { class: isPeak ? "peak" : null, "data-value": value, "data-text": text },
    text === " " ? "␠" : space ? text.slice(space.length) : inner);
  node.style.setProperty("--a", Math.min(1, value / max).toFixed(3));
  node.dataset.share = Math.round(100 * value / max);
  if (!space) return node;
  const both = document.createDocumentFragment();
  both.append(space, node);
  return both;
}

function newlines(text, breaks) {
  const node = make("span");
  for (const part of text.split(/([\n\t\r])/)) {
    if (!part) continue;
    if (/[\n\t\r]/.test(part)) node.append(make("span", { class: "newline" }, visible(part)), part === "\n" && breaks ? "\n" : "");
    else node.append(part);
  }
  return node;
}

function tokens(feature, example, { width = WINDOW, whole = false, className = "tokens" } = {}) {
  const dialogue = data.dialogues[example.dialogue], n = dialogue.ids.length;
  const values = new Map(example.at.map((position, i) => [position, example.values[i]]));
  let first = 0, last = n;
  if (!whole) {
    first = Math.max(0, example.peak - width); last = Math.min(n, example.peak + width + 1);
    while (first < example.peak && dialogue.kinds[first] === "p") first++;  // the prefix that all examples share says nothing
  }
  const node = make(whole ? "div" : "p", { class: whole ? className + " whole" : className, dir: "auto" });
  if (first > 0 || dialogue.cut) node.append("… ");
  for (let i = first; i < last; i++)
    node.append(tokenNode(data.strings[dialogue.ids[i]], dialogue.kinds[i], values.get(i), feature.max, i === example.peak, whole));
  if (last < n || dialogue.cutEnd) node.append(" …");
  return node;
}

// Index

function row(f) {
  const example = f.examples[0];
  const label = make("div", { class: `label${f.byLlm ? " by-llm" : ""}`, title: f.label }, ...labelNodes(f));
  return make("li", {}, make("a", { class: `row${f.dead ? " dead" : ""}`, href: `#feature=${f.id}`, "data-id": f.id },
    make("span", { class: "id number" }, String(f.id), make("span", { class: "under" }, f.level)),
    make("div", {}, label, example ? tokens(f, example, { width: 9, className: "snippet" }) : null),
    make("span", { class: "figure number right of-density" }, percent(f.density)),
    make("span", { class: "figure number right of-auc", title: f.category }, round(f.auc),
      make("span", { class: "under" }, f.category || "")),
    make("span", { class: "figure right of-score" }, f.score ? dots(f.score) : "–",
      make("span", { class: "under number" }, f.f1 === null ? "" : `F1 ${round(f.f1)}`))));
}

function dots(score) {
  return make("span", { class: "dots", title: `${score} of 5`, "aria-label": `score ${score} of 5` },
    "●".repeat(score), make("i", {}, "●".repeat(5 - score)));
}

const FILTERS = {
  score: (f, v) => f.score !== null && f.score >= +v,
  density: (f, v) => { const [low, high] = v.split(":").map(Number); return f.density > low && f.density <= high; },
  auc: (f, v) => f.auc !== null && f.auc >= +v,
  category: (f, v) => f.category === v,
  level: (f, v) => f.level === v,
  source: (f, v) => (v === "llm") === f.byLlm,
  dead: (f, v) => v === "all" || f.dead,
};
const ORDER = {
  id: f => -f.id, label: f => f.label.toLowerCase(), density: f => f.density, auc: f => f.auc ?? -1,
  score: f => (f.score ?? 0) + (f.f1 ?? 0) / 10, mass: f => f.mass,
};

function refresh() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const active = [...document.querySelectorAll(".filters select")].filter(s => s.value);
  document.querySelectorAll(".filters select").forEach(s => s.classList.toggle("set", Boolean(s.value)));
  const showDead = active.some(s => s.name === "dead");
  const key = ORDER[state.sort], sign = (state.down ? 1 : -1) * (state.sort === "label" ? -1 : 1);
  const found = features.filter(f => (showDead || !f.dead) && active.every(s => FILTERS[s.name](f, s.value))
    && words.every(word => f.haystack.includes(word)));
  found.sort((a, b) => { const x = key(a), y = key(b); return x < y ? sign : x > y ? -sign : a.id - b.id; });
  state.shown = found.map(f => f.id);
  $("list").replaceChildren(...found.map(f => f.row ??= row(f)));
  $("none").hidden = found.length > 0;
  $("count").textContent = `${found.length.toLocaleString("en")} of ${features.length.toLocaleString("en")} features`;
  for (const button of document.querySelectorAll(".heads button")) {
    const on = button.dataset.sort === state.sort;
    button.setAttribute("aria-pressed", on);
    button.textContent = button.dataset.name + (on ? (state.down ? " ↓" : " ↑") : "");
  }
  markOpen();
}

function markOpen() {
  for (const node of document.querySelectorAll(".row[aria-current]")) node.removeAttribute("aria-current");
  byId.get(state.open)?.row?.firstChild.setAttribute("aria-current", "true");
}

// Feature panel

function bars(items, className, far, scale) {
  const top = scale ?? Math.max(...items.map(([, value]) => Math.abs(value)), 1e-9);
  return make("ul", { class: `bars ${className}` }, ...items.map(([what, value]) => {
    const bar = make("span", { class: "bar" });
    bar.style.width = `${Math.max(1, 100 * Math.abs(value) / top)}%`;
    return make("li", {}, make("span", { class: "what", title: what, dir: "auto" }, visible(what).replace(/^ $/, "␠")), bar,
      make("span", { class: "far number" }, far(value)));
  }));
}

function links(items, far) {
  return make("ul", { class: "bars links" }, ...items.map(([id, value]) => {
    const other = byId.get(id);
    const name = `${id} ${other ? labelOf(other) : ""}`;
    const link = other ? make("a", { href: `#feature=${id}`, title: name }, name) : make("span", {}, `${id} (in the table only)`);
    return make("li", {}, link, make("span", { class: "far number" }, far(value)));
  }));
}

function histogram(f) {
  const w = 640, h = 96, n = f.histogram.length, top = Math.max(...f.histogram), step = w / n;
  const picture = drawing("svg", { viewBox: `0 0 ${w} ${h + 18}`, role: "img", "aria-label": "histogram of activations" });
  f.histogram.forEach((count, i) => {
    const height = count ? Math.max(1.5, h * count / top) : 0;
    const bar = drawing("rect", { class: "bar", x: i * step + 1, y: h - height, width: Math.max(1, step - 2), height, rx: 1.5 });
    const [from, to] = [i, i + 1].map(edge => figure(edge * f.histogramEnd / n));
    bar.append(drawing("title", {}, `${from} to ${to}: ${count.toLocaleString("en")} tokens`));
    picture.append(bar);
  });
  picture.append(drawing("line", { class: "axis", x1: 0, x2: w, y1: h, y2: h }));
  for (const [part, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]])
    picture.append(drawing("text", { x: part * w, y: h + 14, "text-anchor": anchor }, figure(part * f.histogramEnd)));
  return picture;
}

function exampleNode(f, example) {
  const dialogue = data.dialogues[example.dialogue];
  const body = make("div", {}, tokens(f, example));
  const button = make("button", { type: "button", onclick: () => {
    const open = button.textContent === "whole text";
    body.replaceChildren(tokens(f, example, { whole: open }));
    button.textContent = open ? "less" : "whole text";
    if (open) body.querySelector(".peak")?.scrollIntoView({ block: "nearest" });
  } }, "whole text");
  const rank = example.quantile === null ? null : make("span", {}, `${100 * example.quantile}th percentile`);
  return make("section", { class: "example" }, make("header", {}, make("b", { class: "number" }, figure(example.top)), rank,
    make("span", {}, `row ${dialogue.line}${dialogue.label ? " · " + dialogue.label : ""}`), button), body);
}

function fact(name, value, note) {
  return make("div", {}, make("dt", {}, name), make("dd", { class: "number" }, value, note ? make("small", {}, note) : null));
}

function worth(f) {
  if (f.ruleF1 === null) return "It was not tested, for the feature does not fire strongly in the other half.";
  return `On the other half it has F1 ${round(f.ruleF1)} for “fires above 0.3 of its maximum” ` +
    `(precision ${round(f.rulePrecision)}, recall ${round(f.ruleRecall)}).`;
}

function origin(f) {
  const node = make("p", { class: "origin" });
  if (f.dead) node.append("This feature did not fire on any of the tokens counted here.");
  else if (f.byLlm) node.append(`Label by ${f.source}${f.protocol ? `, ${f.protocol} protocol` : ""}. `,
    f.f1 === null ? "Not validated on held-out examples." :
      `Validated on ${f.held} held-out examples: F1 ${round(f.f1)} (precision ${round(f.precision)}, recall ${round(f.recall)}).`);
  const asked = f.byLlm || f.status.startsWith("llm") ? "" : "; no language model was asked";
  if (!f.dead && f.rule) node.append(f.byLlm ? `As a rule: ${visible(f.rule)}. ` : `A rule, found on half of the texts${asked}. `, worth(f));
  else if (!f.dead) node.append("No simple rule tells where it fires: read its examples.");
  if (f.scoreName && f.scoreName !== f.label) node.append(` The scoring model calls it “${f.scoreName}”.`);
  if (f.status !== "ok" && !f.dead) node.append(make("span", { class: "bad" }, ` ${f.status}.`));
  return node;
}

function panel(f) {
  const i = state.shown.indexOf(f.id), [before, after] = i < 0 ? [] : [state.shown[i - 1], state.shown[i + 1]];
  const go = (id, text) => id === undefined ? null : make("a", { href: `#feature=${id}` }, text);
  const groups = [["Strongest examples", "the fuller the colour, the stronger; hover for the value", f.examples.filter(e => e.quantile === null)],
    ["Ordinary examples", "at five percentiles of its strongest activation per example", f.examples.filter(e => e.quantile !== null)]];
  $("panel").replaceChildren(
    make("div", { class: "crumbs" }, make("a", { class: "back", href: "#" }, "← all"),
      make("span", {}, `Feature ${f.id}${f.level ? " · " + f.level : ""}`),
      make("span", { class: "step" }, go(before, "↑ previous"), go(after, "↓ next"))),
    make("h2", {}, ...labelNodes(f)), origin(f),
    ...(f.dead ? [] : [
      make("dl", { class: "facts" }, fact("fires on", percent(f.density), "of the tokens"),
        fact("strongest", figure(f.max), `mean ${figure(f.mean)}`),
        f.score ? fact("LLM score", dots(f.score), `${f.score} of 5`) : null,
        f.auc === null ? null : fact(`AUC for ${f.category}`, round(f.auc), data.chance ? `by chance up to ${round(data.chance)}` : null),
        f.detection === null ? null : fact("found from five examples", round(f.detection), "AUC, among the same tokens; by chance 0.5"),
        fact("on template tokens", percent(f.special), "of its activation")),
      ...groups.filter(([, , list]) => list.length).flatMap(([name, note, list]) =>
        [make("h3", {}, name, make("small", {}, note)), ...list.map(e => exampleNode(f, e))]),
      make("div", { class: "two" },
        make("div", {}, make("h3", {}, "Characteristic tokens", make("small", {}, "share of its activation")), bars(f.tokens, "", percent)),
        make("div", {}, make("h3", {}, "Where it fires", make("small", {}, "share of its activation")), bars(f.groups, "", percent, 1))),
      make("h3", {}, "Activations", make("small", {}, "tokens by strength, where it fires")), histogram(f),
      f.promoted.length ? make("div", { class: "two" },
        make("div", {}, make("h3", {}, "Promotes", make("small", {}, "next tokens, logit lens")), bars(f.promoted, "", figure)),
        make("div", {}, make("h3", {}, "Suppresses"), bars(f.suppressed, "down", figure))) : null,
      make("div", { class: "two" },
        make("div", {}, make("h3", {}, "Similar direction", make("small", {}, "cosine")), links(f.near, v => round(v))),
        make("div", {}, make("h3", {}, "Fires together with", make("small", {}, "Jaccard")), links(f.together, v => round(v)))),
    ]).filter(Boolean));
  $("panel").scrollTop = 0;
}

// Routes, keys, pointer

function show() {
  const wanted = /^#feature=(\d+)$/.exec(location.hash), isRun = location.hash === "#run";
  const f = wanted ? byId.get(Number(wanted[1])) : null;
  $("features").hidden = isRun; $("run-page").hidden = !isRun;
  document.body.dataset.view = isRun ? "run" : f ? "feature" : "index";
  for (const link of document.querySelectorAll(".top nav a")) link.toggleAttribute("aria-current", (link.hash === "#run") === isRun);
  if (isRun) return;
  state.open = f ? f.id : state.shown[0] ?? null;
  if (state.open !== null) panel(byId.get(state.open));
  if (wanted && !f) {
    const text = `Feature ${wanted[1]} is not in this report; the table interpretations.csv has all of them.`;
    $("panel").prepend(make("p", { class: "notice" }, text));
  }
  markOpen();
  byId.get(state.open)?.row?.scrollIntoView({ block: "nearest" });
}

function step(by) {
  const i = state.shown.indexOf(state.open), next = state.shown[i < 0 ? 0 : Math.min(Math.max(i + by, 0), state.shown.length - 1)];
  if (next !== undefined) { history.replaceState(null, "", `#feature=${next}`); show(); }
}

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("features").hidden) return;
  const typing = event.target.tagName === "SELECT" || event.target.tagName === "INPUT";
  if (event.key === "/" && !typing) { event.preventDefault(); $("search").focus(); }
  else if (event.key === "Escape" && event.target === $("search")) { $("search").value = ""; refresh(); $("search").blur(); }
  else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && event.target.tagName !== "SELECT") {
    event.preventDefault();
    step(event.key === "ArrowDown" ? 1 : -1);
  }
});

const tip = make("div", { class: "tip", hidden: "" });
document.body.append(tip);
addEventListener("pointerover", event => {
  const mark = event.target.closest?.("mark[data-value]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = `${visible(mark.dataset.text)}  ${figure(Number(mark.dataset.value))}  (${mark.dataset.share} % of its maximum)`;
  const box = mark.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - 230))}px`;
  tip.style.top = `${box.top > 34 ? box.top - 30 : box.bottom + 6}px`;
});

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").setAttribute("aria-label", name === "dark" ? "light colours" : "dark colours");
}

const preference = matchMedia("(prefers-color-scheme: dark)");
setTheme(preference.matches ? "dark" : "light");
preference.addEventListener("change", event => setTheme(event.matches ? "dark" : "light"));
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
for (const button of document.querySelectorAll(".heads button")) button.addEventListener("click", () => {
  if (state.sort === button.dataset.sort) state.down = !state.down;
  else { state.sort = button.dataset.sort; state.down = true; }
  refresh();
  $("list").scrollTop = 0;
});
$("search").addEventListener("input", refresh);
for (const select of document.querySelectorAll(".filters select")) select.addEventListener("change", refresh);
addEventListener("hashchange", show);
for (const f of features)
  f.haystack = [f.id, f.label, f.scoreName ?? "", f.category ?? "", ...f.tokens.map(token => token[0])].join(" ").toLowerCase();
refresh();
show();
document.body.dataset.ready = Math.round(performance.now() - started);
