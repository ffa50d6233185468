// One feature

function bars(items, className, far, scale) {
  const top = scale ?? Math.max(...items.map(([, value]) => Math.abs(value)), 1e-9);
  return make("ul", { class: `bars ${className}` }, ...items.map(([what, value]) => {
    const bar = make("span", { class: "bar" });
    bar.style.width = `${Math.max(1, 100 * Math.abs(value) / top)}%`;
    return make("li", {},
      make("span", { class: "what", title: what, dir: "auto" }, nameOf(what)),
      bar, make("span", { class: "far number" }, far(value)));
  }));
}

function links(items, far) {
  return make("ul", { class: "bars links" }, ...items.map(([id, value]) => {
    const other = byId.get(id);
    const name = `${id} ${other ? labelOf(other) : ""}`;
    const link = other ? make("a", { href: `#feature=${id}`, title: name }, name)
      : make("span", {}, `${id} (in the table only)`);
    return make("li", {}, link, make("span", { class: "far number" }, far(value)));
  }));
}

function histogram(f) {
  const w = 640, h = 96, n = f.histogram.length, top = Math.max(...f.histogram), step = w / n;
  const picture = drawing("svg", { viewBox: `0 0 ${w} ${h + 18}`, role: "img",
    "aria-label": "histogram of activations" });
  f.histogram.forEach((value, i) => {
    const height = value ? Math.max(1.5, h * value / top) : 0;
    const bar = drawing("rect", { class: "bar", x: i * step + 1, y: h - height,
      width: Math.max(1, step - 2), height, rx: 1.5 });
    const [from, to] = [i, i + 1].map(edge => figure(edge * f.histogramEnd / n));
    bar.append(drawing("title", {}, `${from} to ${to}: ${count(value)} tokens`));
    picture.append(bar);
  });
  picture.append(drawing("line", { class: "axis", x1: 0, x2: w, y1: h, y2: h }));
  for (const [place, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]])
    picture.append(drawing("text", { x: place * w, y: h + 14, "text-anchor": anchor },
      figure(place * f.histogramEnd)));
  return picture;
}

function exampleNode(f, example) {
  const dialogue = f.dialogues[example.dialogue];
  const body = make("div", {}, tokens(f, example));
  const button = make("button", { type: "button", "aria-expanded": "false", onclick: () => {
    const open = button.getAttribute("aria-expanded") === "false";
    body.replaceChildren(tokens(f, example, open));
    button.setAttribute("aria-expanded", open);
    button.textContent = open ? "less" : "whole text";
    if (open) body.querySelector(".peak")?.scrollIntoView({ block: "nearest" });
  } }, "whole text");
  const rank = example.quantile === null ? null : make("span", {}, `${100 * example.quantile}th percentile`);
  return make("section", { class: "example" },
    make("header", {}, make("b", { class: "number" }, figure(example.top)), rank,
      make("span", {}, `row ${dialogue.line}${dialogue.label ? " · " + dialogue.label : ""}`), button),
    body);
}

function fact(name, value, ...notes) {
  const said = notes.filter(Boolean);
  return make("div", {}, make("dt", {}, ...[name].flat()),
    make("dd", { class: "number" }, value, said.length ? make("small", {}, ...said) : null));
}

function facts(f) {
  const special = f.special > 0.005 ? fact(["on the ", term("template", "chat template")],
    percent(f.special), "of its activation") : null;
  return make("dl", { class: "facts" },
    fact(term("density", "fires on"), percent(f.density), "of the tokens"),
    fact(["strongest ", term("activation", "activation")], figure(f.max), `mean ${figure(f.mean)}`),
    f.score ? fact(term("score", "LLM score"), dots(f.score), `${f.score} of 5`) : null,
    f.auc === null ? null : fact([term("auc", "AUC"), ` for ${f.category}`], round(f.auc),
      data.chance ? term("by-chance", "by chance") : null, data.chance ? ` up to ${round(data.chance)}` : null),
    f.detection === null ? null : fact(term("detection", "found from five examples"), round(f.detection),
      "AUC; by chance 0.5"),
    ...f.judged.map(([kind, value]) => fact(term("judged", `${kind} test`), round(value), "of its label")),
    special);
}

function origin(f) {
  const node = make("p", { class: "origin" });
  if (f.dead) node.append("This feature did not fire on any of the tokens counted here.");
  else if (f.byLlm) node.append(`Label by ${f.source}${f.protocol ? `, ${f.protocol} protocol` : ""}. `,
    ...(f.f1 === null ? ["Not validated on held-out examples. "]
      : [`Validated on ${f.held} held-out examples: `, term("f1", "F1"),
        ` ${round(f.f1)} (precision ${round(f.precision)}, recall ${round(f.recall)}). `]));
  const asked = f.byLlm || f.status.startsWith("llm") ? "" : "; no language model was asked";
  if (!f.dead && f.rule)
    node.append(...(f.byLlm ? [`As a rule: ${visible(f.rule)}. `]
      : ["A ", term("rule", "rule"), `, found on half of the texts${asked}. `]), ...worth(f));
  else if (!f.dead) node.append("No simple rule tells where it fires: read its examples.");
  if (f.scoreName && f.scoreName !== f.label) node.append(` The scoring model calls it “${f.scoreName}”.`);
  if (f.status !== "ok" && !f.dead) node.append(make("span", { class: "bad" }, ` ${f.status}.`));
  return node;
}

function worth(f) {
  if (f.ruleF1 === null)
    return ["It was not tested, for the feature does not fire strongly in the other half."];
  return ["On the other half it has ", term("f1", "F1"),
    ` ${round(f.ruleF1)} for “fires above 0.3 of its maximum” ` +
    `(precision ${round(f.rulePrecision)}, recall ${round(f.ruleRecall)}).`];
}

function heading(name, ...notes) {
  return make("h3", {}, name, notes.length ? make("small", {}, ...notes) : null);
}

function exampleGroups(f) {
  const groups = [
    [heading("Strongest examples", "the fuller the colour, the stronger; point at a word or tap it for the value"),
      f.examples.filter(e => e.quantile === null)],
    [heading(term("percentile", "Ordinary examples"), "at five percentiles of its strongest activation per example"),
      f.examples.filter(e => e.quantile !== null)],
  ];
  return groups.filter(([, list]) => list.length)
    .flatMap(([name, list]) => [name, ...list.map(e => exampleNode(f, e))]);
}

// The tokens that a direction promotes and suppresses, where they stand out from random mixes of the
// features; else a sentence, for then they are noise.
function lensNodes(f) {
  if (!f.promoted.length) return [];
  const outside = (list, chance, sign) =>
    chance === null ? list : list.filter(([, value]) => sign * value > sign * chance);
  const [up, down] = [outside(f.promoted, f.lensChance[0], 1), outside(f.suppressed, f.lensChance[1], -1)];
  const bound = chance => chance === null ? [] : ["next tokens; ", term("lens-chance", "by chance"), ` up to ${figure(chance)}`];
  if (!up.length && !down.length)
    return [heading(term("lens", "Promotes")), make("p", { class: "origin" }, "No next token stands out: random mixes of the features promote and suppress some as much.")];
  const block = (name, list, className, chance) => list.length
    ? make("div", {}, heading(name, ...bound(chance)), bars(list, className, figure)) : null;
  return [make("div", { class: "two" }, block(term("lens", "Promotes"), up, "", f.lensChance[0]),
    block("Suppresses", down, "down", f.lensChance[1]))];
}

// What taking the feature out of the model and adding it does, beside random pushes; of the features
// with most evidence only.
function effectNodes(f) {
  if (!f.effects) return [];
  const { tokens, passages, removed, added, written } = f.effects;
  const far = part => [part.kl, part.random];
  const [out, outRandom, more, moreRandom] = [...far(removed), ...far(added)];
  const signed = x => `${x < 0 ? "-" : "+"}${round(Math.abs(x))}`;
  const times = outRandom ? out / outRandom : null;
  const said = make("p", { class: "origin" }, "Without it the next token changes ",
    times === null ? "" : make("b", {}, `${figure(times)} times`), times === null ? "" : " as much as by ",
    term("random-push", "random pushes"), ` of that length: counted on ${count(tokens)} tokens after it fires, in ` +
    `${passages === 1 ? "its strongest example" : `its ${passages} strongest examples`}. The loss there changes by ` +
    `${signed(removed.loss)} nats, by random pushes ${signed(removed.randomLoss)}.`);
  const list = bars([["taken out", out], ["by chance", outRandom], ["added again", more],
    ["by chance", moreRandom]], "beside", figure);
  const ways = written && make("dl", { class: "ways" }, ...[["as it is", "unchanged"], ["taken out", "removed"],
    ["added", "added"], ["random", "random"]].flatMap(([name, key]) => [make("dt", {}, name),
    make("dd", { dir: "auto" }, newlines(written[key]))]));
  return [heading(term("effect", "What it does"), term("kl", "KL divergence"), " of the next token, nats"), list, said,
    ...(ways ? [heading("How the model goes on", `row ${written.line}, after`),
      make("p", { class: "tokens", dir: "auto" }, newlines(written.prompt)), ways] : [])];
}

function panel(f) {
  const i = state.shown.indexOf(f.id), [before, after] = i < 0 ? [] : [state.shown[i - 1], state.shown[i + 1]];
  const go = (id, text) => id === undefined ? null : make("a", { href: `#feature=${id}` }, text);
  const side = (name, content) => make("div", {}, name, content);
  $("panel").replaceChildren(...[
    make("div", { class: "crumbs" }, make("a", { class: "back", href: "#features" }, "← all"),
      make("span", {}, `Feature ${f.id}`, f.level ? " · " : "", f.level ? term("level", f.level) : ""),
      make("span", { class: "step" }, go(before, "↑ previous"), go(after, "↓ next"))),
    make("h2", { tabindex: -1, dir: "auto" }, labelOf(f)), origin(f),
    ...(f.dead ? [] : [
      facts(f), ...exampleGroups(f),
      make("div", { class: "two" },
        side(heading(term("characteristic", "Characteristic tokens"), "share of its activation"), bars(f.tokens, "", percent)),
        side(heading("Where it fires", "share of its activation"), bars(f.groups, "", percent, 1))),
      heading("Activations", "tokens by strength, where it fires"), histogram(f),
      ...effectNodes(f), ...lensNodes(f),
      make("div", { class: "two" },
        side(heading("Similar direction", term("cosine", "cosine")), links(f.near, v => round(v))),
        side(heading("Fires together with", term("jaccard", "Jaccard index")), links(f.together, v => round(v)))),
    ])].filter(Boolean));
  $("panel").scrollTop = 0;
}
