"use strict";
// The report's behaviour, in five files that run as one script, this one first: page, snippets,
// list, panel, overview, routes. Everything that came from the data is put into the page as text,
// never as markup.
const started = performance.now();
const $ = id => document.getElementById(id);
const state = { sort: "evidence", down: true, shown: [], open: null, words: [], rendered: 0 };
let data = null, features = [], byId = new Map();

// Nodes

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

// A word with an explanation; the sentences stand in the list of terms on the Run page.
function term(key, text) {
  return make("button", { type: "button", class: "term", "data-term": key,
    "aria-describedby": `term-${key}` }, text);
}

const percent = x => x === 0 ? "0 %" : x < 0.001 ? `${(100 * x).toPrecision(1)} %`
  : `${(100 * x).toFixed(x < 0.1 ? 1 : 0)} %`;
const round = (x, digits = 2) => x === null || x === undefined ? "–" : x.toFixed(digits);
const figure = x => x === 0 ? "0"  // of any scale
  : Math.abs(x) < 999.5 ? x.toPrecision(3) : Math.round(x).toLocaleString("en");
const count = x => x.toLocaleString("en");
const visible = text => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍");
// A token that stands alone: what has no glyph is named by its code.
const nameOf = text => !/^[\p{Z}\p{C}\p{M}]+$/u.test(text) ? visible(text)
  : [...text].map(one => one === " " ? "␠" : /[\n\t\r]/.test(one) ? visible(one)
    : `U+${one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`).join("");

// Data: deflated JSON in base64. The details of a feature stand in a part with its neighbours, which
// is unpacked when one of them is opened; the last few parts are kept.

const KEPT_PARTS = 8;
const parts = new Map();

async function unpack(node) {
  const bytes = Uint8Array.from(atob(node.textContent), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function part(number) {
  const found = parts.get(number) ?? unpack($(`part-${number}`));
  parts.delete(number);
  parts.set(number, found);  // the newest is the last
  if (parts.size > KEPT_PARTS) parts.delete(parts.keys().next().value);
  return found;
}

// A feature with its details: {...f, examples, histogram, ..., dialogues}.
async function detailed(f) {
  const { dialogues, features: details } = await part(Math.floor(f.place / data.per_part));
  return { ...f, ...details[f.place % data.per_part], dialogues };
}

// What a word or a token says when it is pointed at, focused or tapped

const tip = make("div", { class: "tip", role: "tooltip", hidden: "" });
document.body.append(tip);

function tipText(node) {
  if (node.dataset.term) return $(`term-${node.dataset.term}`).textContent;
  return `${visible(node.dataset.text)}  ${figure(Number(node.dataset.value))}  ` +
    `(${node.dataset.share} % of its maximum)`;
}

function point(target) {
  const node = target?.closest?.("mark[data-value], [data-term]");
  tip.hidden = !node;
  if (!node) return;
  tip.textContent = tipText(node);
  tip.classList.toggle("said", Boolean(node.dataset.term));
  const box = node.getBoundingClientRect(), own = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - own.width - 8))}px`;
  const above = box.top - own.height - 4;
  tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
}

addEventListener("pointerover", event => { if (event.pointerType !== "touch") point(event.target); });
addEventListener("focusin", event => point(event.target));
addEventListener("focusout", () => point(null));
addEventListener("click", event => point(event.target));
addEventListener("scroll", () => point(null), { capture: true, passive: true });

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").setAttribute("aria-label", name === "dark" ? "light colours" : "dark colours");
}

const preference = matchMedia("(prefers-color-scheme: dark)");
setTheme(preference.matches ? "dark" : "light");
preference.addEventListener("change", event => setTheme(event.matches ? "dark" : "light"));
$("theme").addEventListener("click", () =>
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
