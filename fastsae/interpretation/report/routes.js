// Routes, keys, and the start

async function show() {
  const hash = location.hash, wanted = /^#feature=(\d+)$/.exec(hash);
  const f = wanted ? byId.get(Number(wanted[1])) : null;
  const view = hash === "#run" ? "run" : f || wanted ? "feature" : hash === "#features" ? "index" : "overview";
  const before = document.body.dataset.view;
  $("overview").hidden = view !== "overview";
  $("features").hidden = view !== "index" && view !== "feature";
  $("run-page").hidden = view !== "run";
  document.body.dataset.view = view;
  const page = { index: "#features", feature: "#features", run: "#run", overview: "#" }[view];
  for (const link of document.querySelectorAll(".top nav a"))
    if (link.getAttribute("href") === page) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  point(null);
  if ($("features").hidden) return;
  state.open = f ? f.id : wanted ? null : state.open ?? state.shown[0] ?? null;
  if (state.open === null) $("panel").replaceChildren();
  else await openPanel(byId.get(state.open));
  if (wanted && !f) $("panel").prepend(make("p", { class: "notice" },
    `Feature ${wanted[1]} is not in this report; the table interpretations.csv has all of them.`));
  markOpen();
  // on a phone the panel takes the list's place
  if (view === "feature" && before === "index" && !$("list").offsetParent)
    $("panel").querySelector("h2")?.focus();
}

async function openPanel(f) {
  const whole = await detailed(f);
  if (state.open !== f.id) return;  // another one was opened meanwhile
  panel(whole);
  document.body.dataset.open = f.id;
}

function step(by) {
  const i = state.shown.indexOf(state.open);
  const next = state.shown[i < 0 ? 0 : Math.min(Math.max(i + by, 0), state.shown.length - 1)];
  if (next === undefined) return;
  history.replaceState(null, "", `#feature=${next}`);
  show();
}

addEventListener("keydown", event => {
  if (event.key === "Escape") point(null);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.tagName === "SELECT" || event.target.tagName === "INPUT";
  if (event.key === "/" && !typing) {
    event.preventDefault();
    if ($("features").hidden) location.hash = "#features";
    setTimeout(() => $("search").focus());
  } else if (event.key === "Escape" && event.target === $("search")) {
    $("search").value = "";
    search();
    $("search").blur();
  } else if (!$("features").hidden && event.target.tagName !== "SELECT" && !event.target.closest(".whole")
    && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    event.preventDefault();
    step(event.key === "ArrowDown" ? 1 : -1);
  }
});

async function start() {
  if (typeof DecompressionStream === "undefined") {
    $("old-browser").hidden = false;
    return;
  }
  data = await unpack($("data"));
  features = data.features;
  features.forEach((f, place) => {
    f.place = place;
    f.haystack = [f.id, f.label, f.scoreName ?? "", f.category ?? "", f.rule ?? "", f.words].join(" ").toLowerCase();
  });
  byId = new Map(features.map(f => [f.id, f]));
  refresh();
  overview();
  addEventListener("hashchange", show);
  await show();
  document.body.dataset.ready = Math.round(performance.now() - started);
}

start();
