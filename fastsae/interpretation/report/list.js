// The list of features: filters, order, search; rows are made as they are scrolled to

const BATCH = 60;  // rows that are made at a time
const FILTERS = {
  score: (f, v) => f.score !== null && f.score >= +v,
  density: (f, v) => {
    const [low, high] = v.split(":").map(Number);
    return f.density > low && f.density <= high;
  },
  auc: (f, v) => f.auc !== null && f.auc >= +v,
  category: (f, v) => f.category === v,
  level: (f, v) => f.level === v,
  source: (f, v) => (v === "llm") === f.byLlm,
  dead: (f, v) => v === "all" || f.dead,
};
const ORDER = {
  evidence: f => f.evidence - (f.plain ? 2 : 0) - (f.dead ? 4 : 0),
  f1: f => (f.byLlm ? f.f1 : f.ruleF1) ?? -1,
  auc: f => f.auc ?? -1,
  detection: f => f.detection ?? -1,
  score: f => (f.score ?? 0) + (f.f1 ?? 0) / 10,
  density: f => f.density,
  mass: f => f.mass,
  label: f => f.label.toLowerCase(),
  id: f => -f.id,
};

function described(f) {
  const f1 = f.byLlm ? f.f1 : f.ruleF1;
  return [`feature ${f.id}: ${labelOf(f)}`, f1 === null ? "" : `F1 ${round(f1)}`,
    `fires on ${percent(f.density)} of the tokens`, f.auc === null ? "" : `AUC ${round(f.auc)} for ${f.category}`,
    f.score ? `score ${f.score} of 5` : ""].filter(Boolean).join(", ");
}

function row(f) {
  const label = make("span", { class: `label${f.byLlm ? " by-llm" : ""}`, title: f.label }, ...labelNodes(f));
  return make("li", {}, make("a", { class: `row${f.dead ? " dead" : ""}`, href: `#feature=${f.id}`,
    "data-id": f.id, "aria-label": described(f), "aria-current": f.id === state.open ? "true" : null },
    make("span", { class: "id number" }, String(f.id), make("span", { class: "under" }, f.level)),
    make("span", { class: "said" }, label, f.snippet ? snippet(f) : null, inExample(f)),
    make("span", { class: "figure number right of-density" }, percent(f.density)),
    make("span", { class: "figure number right of-auc", title: f.category }, round(f.auc),
      make("span", { class: "under" }, f.category || "")),
    make("span", { class: "figure right of-score" }, f.score ? dots(f.score) : "–",
      make("span", { class: "under number" }, f.f1 === null ? "" : `F1 ${round(f.f1)}`))));
}

// Search: every word has to be in a feature's label, tokens, promoted tokens or category, or in what
// is shown of its examples. Those with all words outside the examples come first.

const outside = f => state.words.every(word => f.haystack.includes(word));
const matches = f => state.words.every(word => f.haystack.includes(word) || f.texts?.includes(word));

// Where the first word that is in an example only stands there.
function inExample(f) {
  const word = state.words.find(word => !f.haystack.includes(word));
  const at = word === undefined ? -1 : f.texts?.indexOf(word) ?? -1;
  if (at < 0) return null;
  const text = f.texts, end = at + word.length;
  const from = Math.max(text.lastIndexOf("\u0000", at) + 1, at - 14);
  const until = Math.min((text.indexOf("\u0000", end) + 1 || text.length + 1) - 1, end + 40);
  return make("span", { class: "found" }, "in an example: …", text.slice(from, at),
    make("b", {}, word), text.slice(end, until), "…");
}

// The texts of the examples stand in the parts: read once, when something is searched.
let reading = null;
async function readTexts() {
  const n = Math.ceil(features.length / data.per_part);
  for (let number = 0; number < n; number++) {
    const { dialogues, features: details } = await (parts.get(number) ?? unpack($(`part-${number}`)));
    details.forEach((detail, i) => {
      const said = detail.examples.map(({ dialogue, peak }) => {
        const { ids } = dialogues[dialogue];
        const around = ids.slice(Math.max(0, peak - WINDOW), peak + WINDOW + 1);
        return around.map(id => data.strings[id]).join("").replace(/\s+/g, " ");
      });
      features[number * data.per_part + i].texts = said.join("\u0000").toLowerCase();
    });
    if (number % 8 === 7) refresh();
  }
  reading.done = true;
  refresh();
}

function search() {
  state.words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  if (state.words.length && !reading) {
    reading = { done: false };
    readTexts();
  }
  refresh();
}

function refresh() {
  const active = [...document.querySelectorAll(".filters select[data-filter]")].filter(s => s.value);
  document.querySelectorAll(".filters select[data-filter]").forEach(s => s.classList.toggle("set", Boolean(s.value)));
  const showDead = active.some(s => s.name === "dead");
  const key = ORDER[state.sort], sign = (state.down ? 1 : -1) * (state.sort === "label" ? -1 : 1);
  const found = features.filter(f => (showDead || !f.dead)
    && active.every(s => FILTERS[s.name](f, s.value)) && matches(f));
  const keyed = found.map(f => [f, key(f), state.words.length && !outside(f) ? 1 : 0]);
  keyed.sort(([a, x, i], [b, y, j]) => i - j || (x < y ? sign : x > y ? -sign : a.id - b.id));
  state.shown = keyed.map(([f]) => f.id);
  state.rendered = 0;
  $("list").replaceChildren();
  render(BATCH);
  $("none").hidden = found.length > 0;
  $("count").textContent = `${count(found.length)} of ${count(features.length)} features` +
    (state.words.length && !reading.done ? "; looking into the examples …" : "");
  $("order").value = state.sort;
  for (const button of document.querySelectorAll(".heads button")) {
    const on = button.dataset.sort === state.sort;
    button.setAttribute("aria-pressed", on);
    button.textContent = button.dataset.name + (on ? (state.down ? " ↓" : " ↑") : "");
  }
}

// Make the first `wanted` rows of the list, and a mark at their end that makes more when it is seen.
function render(wanted) {
  const end = Math.min(wanted, state.shown.length);
  if (end <= state.rendered) return;
  $("list").querySelector(".more")?.remove();
  $("list").append(...state.shown.slice(state.rendered, end).map(id => row(byId.get(id))));
  state.rendered = end;
  if (end < state.shown.length) {
    const more = make("li", { class: "more", "aria-hidden": "true" });
    $("list").append(more);
    seen.observe(more);
  }
}

const seen = new IntersectionObserver(entries => {
  if (entries.some(entry => entry.isIntersecting)) render(state.rendered + BATCH);
}, { rootMargin: "400px" });

function markOpen() {
  for (const node of document.querySelectorAll(".row[aria-current]")) node.removeAttribute("aria-current");
  const i = state.shown.indexOf(state.open);
  if (i < 0) return;
  render(i + 1);
  const node = $("list").querySelector(`[data-id="${state.open}"]`);
  node.setAttribute("aria-current", "true");
  if (document.body.dataset.view === "feature") node.scrollIntoView({ block: "nearest" });
}

function sortBy(name, down) {
  Object.assign(state, { sort: name, down });
  refresh();
  $("list").scrollTop = 0;
}

for (const button of document.querySelectorAll(".heads button")) button.addEventListener("click", () =>
  sortBy(button.dataset.sort, state.sort === button.dataset.sort ? !state.down : true));
$("order").addEventListener("change", event => sortBy(event.target.value, true));
$("search").addEventListener("input", search);
for (const select of document.querySelectorAll(".filters select[data-filter]"))
  select.addEventListener("change", refresh);
