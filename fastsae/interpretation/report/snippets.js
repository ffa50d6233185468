// Labels, and texts with their activations

const WINDOW = 26;  // tokens on each side of the strongest one, before "whole text"
const labelOf = f => f.label || (f.dead ? "never fires here" : "no label");

// A label, with the held-out F1 of one that is a rule.
function labelNodes(f) {
  if (f.byLlm || f.dead) return [make("span", { dir: "auto" }, labelOf(f))];
  if (!f.rule) return [make("span", { class: "mixed" }, labelOf(f))];
  const claim = f.ruleF1 === null ? null
    : make("small", { class: "claim number" }, `F1 ${round(f.ruleF1)}`);
  return [make("span", { dir: "auto" }, visible(f.label)), claim].filter(Boolean);
}

function newlines(text, breaks) {
  const node = make("span");
  for (const piece of text.split(/([\n\t\r])/)) {
    if (!piece) continue;
    if (/[\n\t\r]/.test(piece))
      node.append(make("span", { class: "newline" }, visible(piece)), piece === "\n" && breaks ? "\n" : "");
    else node.append(piece);
  }
  return node;
}

// What a token is without its shading: text, or a mark of the template.
function plainToken(text, kind, breaks) {
  if (kind === "t" || kind === "p")
    return text.trim() ? make("span", { class: "special" }, visible(text)) : newlines(text, breaks);
  return /[\n\t\r]/.test(text) ? newlines(text, breaks) : text;
}

function tokenNode(text, kind, value, max, isPeak, breaks) {
  const inner = plainToken(text, kind, breaks);
  if (!value)
    return kind === "p" && typeof inner !== "string" ? make("span", { class: "out" }, inner) : inner;
  // shade the word, not the gap before it
  const space = typeof inner === "string" && text.trim() ? /^ */.exec(text)[0] : "";
  const node = make("mark", { class: isPeak ? "peak" : null, "data-value": value, "data-text": text },
    text === " " ? "␠" : space ? text.slice(space.length) : inner);
  node.style.setProperty("--a", Math.min(1, value / max).toFixed(3));
  node.dataset.share = Math.round(100 * value / max);
  if (!space) return node;
  const both = document.createDocumentFragment();
  both.append(space, node);
  return both;
}

function tokens(f, example, whole = false) {
  const dialogue = f.dialogues[example.dialogue], n = dialogue.ids.length;
  const values = new Map(example.at.map((position, i) => [position, example.values[i]]));
  let first = 0, last = n;
  if (!whole) {
    first = Math.max(0, example.peak - WINDOW);
    last = Math.min(n, example.peak + WINDOW + 1);
    // the prefix that all examples share says nothing
    while (first < example.peak && dialogue.kinds[first] === "p") first++;
  }
  const node = make(whole ? "div" : "p", { class: whole ? "tokens whole" : "tokens", dir: "auto",
    tabindex: whole ? 0 : null });
  if (first > 0 || dialogue.cut) node.append("… ");
  for (let i = first; i < last; i++)
    node.append(tokenNode(data.strings[dialogue.ids[i]], dialogue.kinds[i], values.get(i), f.max,
      i === example.peak, whole));
  if (last < n || dialogue.cutEnd) node.append(" …");
  return node;
}

// One line around the strongest token, which is never cut off: what stands before it gives way at its
// beginning, what stands after it at its end.
function snippet(f) {
  const sides = [make("span", { class: "before" }), make("span", { class: "after" })];
  const { texts, shares, kinds, peak } = f.snippet;
  let mark = null;
  texts.forEach((text, i) => {
    const shown = text.replace(/\s+/g, " ");  // one line
    const inner = plainToken(i === peak ? text.trim() || text : shown, kinds[i]);
    if (i === peak) mark = make("mark", { class: "peak" }, inner);
    const node = i === peak || !shares[i] ? inner : make("mark", {}, inner);
    if (node instanceof Element && shares[i]) node.style.setProperty("--a", shares[i] / 100);
    if (i === peak) mark.style.setProperty("--a", shares[i] / 100);
    else sides[Number(i > peak)].append(node);
  });
  if (/^\s/.test(texts[peak]) && texts[peak].trim()) sides[0].append(" ");
  // a block that grows to the right would lose its beginning only: its text is laid from the right
  return make("span", { class: "snippet", dir: "auto" },
    make("span", { class: "cut" }, sides[0]), mark, sides[1]);
}

function dots(score) {
  return make("span", { class: "dots", role: "img", "aria-label": `score ${score} of 5` },
    "●".repeat(score), make("i", {}, "●".repeat(5 - score)));
}
