// The first page: what the data's features are about, on one screen

const N_CATEGORIES = 11, N_CLEAREST = 5;
const KINDS = {
  clear: "a label with F1 of 0.7 or more", partly: "F1 0.3 to 0.7", none: "no label that holds",
  dead: "never fire",
};

function kindsNode() {
  const kinds = data.overview.kinds.filter(([, n]) => n);
  const bar = make("div", { class: "kinds", role: "img",
    "aria-label": kinds.map(([name, n]) => `${count(n)}: ${KINDS[name]}`).join(", ") });
  for (const [name, n] of kinds) {
    const piece = make("span", { class: name });
    piece.style.flexGrow = n;
    bar.append(piece);
  }
  const legend = make("p", { class: "legend" }, ...kinds.map(([name, n]) =>
    make("span", {}, make("i", { class: name }), make("b", { class: "number" }, count(n)), ` ${KINDS[name]}`)));
  return [bar, legend];
}

// A bar from chance (0.5) to 1, with a line where random tokens get to.
function aucBar(entry) {
  const place = auc => `${100 * Math.min(1, Math.max(0, (auc - 0.5) / 0.5))}%`;
  const said = entry.random === null ? "" : `, a random token's vector ${round(entry.random)}`;
  const fill = make("span", { class: "fill" });
  fill.style.width = place(entry.auc);
  const track = make("span", { class: "track", role: "img", "aria-label": `AUC ${round(entry.auc)}${said}` }, fill);
  if (entry.random !== null) {
    const line = make("span", { class: "random" });
    line.style.left = place(entry.random);
    track.append(line);
  }
  return track;
}

function categoryNode(entry) {
  const f = entry.feature === null ? null : byId.get(entry.feature);
  const best = f ? make("a", { href: `#feature=${f.id}`, title: labelOf(f) }, `${f.id} ${labelOf(f)}`)
    : make("span", { class: "mixed" }, "no feature has it as its best");
  return make("li", {}, make("span", { class: "name", title: entry.name, dir: "auto" }, entry.name),
    aucBar(entry), make("span", { class: "number" }, round(entry.auc)), best);
}

function categoriesNode() {
  const { categories, field } = data.overview;
  if (!categories.length) return null;
  const list = make("ul", { class: "categories" }, ...categories.slice(0, N_CATEGORIES).map(categoryNode));
  const more = categories.length <= N_CATEGORIES ? null : make("button", { type: "button", class: "all",
    onclick: () => {
      list.replaceChildren(...categories.map(categoryNode));
      more.remove();
    } }, `all ${categories.length} categories`);
  return make("section", {}, make("h2", {}, "What your categories look like inside the model"),
    make("p", { class: "said" }, "Each value of ", make("b", {}, field ?? "the label field"),
      " with the feature that tells it best from the others. Bars: ", term("auc", "AUC"),
      " of the best single feature, from 0.5 (chance) to 1; the line: of the best of as many ",
      term("random-tokens", "random tokens"), "."),
    list, more);
}

// The features with most evidence, one for each category.
function clearest() {
  const taken = new Set(), found = [];
  const order = features.filter(f => !f.dead && f.snippet);
  order.sort((a, b) => ORDER.evidence(b) - ORDER.evidence(a) || a.id - b.id);
  for (const f of order) {
    if (found.length === N_CLEAREST) break;
    if (f.category && taken.has(f.category)) continue;
    taken.add(f.category);
    found.push(f);
  }
  return found;
}

function clearestNode() {
  const entries = clearest().map(f => make("li", {}, make("a", { href: `#feature=${f.id}`, "aria-label": described(f) },
    make("span", { class: "label" }, ...labelNodes(f)), snippet(f),
    f.auc === null ? null : make("span", { class: "under" }, `${f.category} · AUC ${round(f.auc)}`))));
  return make("section", {}, make("h2", {}, "Features with most evidence"),
    make("p", { class: "said" }, "Begin with these. A word is shaded ", make("mark", {}, "where the feature fires"),
      "; ", term("f1", "F1"), " says how well its label holds. ", make("a", { href: "#features" }, `All ${count(features.length)}`),
      " are in the list, by ", term("evidence", "evidence"), "."),
    make("ol", { class: "clearest" }, ...entries));
}

function overview() {
  $("kinds").replaceChildren(...kindsNode());
  $("about").replaceChildren(...[categoriesNode(), clearestNode()].filter(Boolean));
}
