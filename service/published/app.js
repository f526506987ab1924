// The published page: a question by words, by a picture, or by one of the items, answered without a server.

import { ask, find, items, moments, onProgress, published, warm } from "./api.js";
import { closeDetail, isOpen } from "./detail.js";
import { $, plural, show } from "./dom.js";
import { gallery } from "./gallery.js";
import { MANY, bytesWords, fitOf, nameOf } from "./items.js";

const MOST = 1_000;
const WHAT = { text: "the text model", image: "the picture model", vectors: "the index" };

const { towers, name, collection, licence } = published;
const kinds = [...document.querySelectorAll("[name=modality]")];
let picture = null; // the file that is asked for
let turn = 0;
const results = gallery($("results"), {
  collection: () => collection, more: async () => false, fixed: true, fit: fitOf,
  like: (item) => go({ like: item.id }),
  failed: (message) => show($("found"), message, { bad: true }),
});

const address = () => new URLSearchParams(location.hash.split("?")[1] ?? "");
function go(query) {
  const next = `#/search?${new URLSearchParams(query)}`;
  if (location.hash === next) route();
  else location.hash = next;
}

const told = (count, what) => `${plural(count, "item")}${what}`;

async function question() {
  const query = address();
  const like = find(query.get("like"));
  if (like) return { words: `, most like ${nameOf(like)} first`, ask: { row: like.row } };
  if (query.has("picture") && picture) return { words: `, most like ${picture.name} first`, ask: { file: picture } };
  const words = query.get("words")?.trim();
  return words && towers.text ? { words: ", best first", ask: { text: words } } : null;
}

let shown = null; // what is shown now, as the address has it
async function route() {
  const query = address();
  const open = query.get("open");
  query.delete("open");
  if (!open) closeDetail();
  const only = kinds.filter((box) => box.checked).map((box) => box.value);
  const wanted = `${query}|${only}|${query.has("picture") && picture?.lastModified}`;
  if (wanted !== shown) {
    shown = wanted;
    $("words").value = query.get("words") ?? "";
    await fill(only);
  }
  if (open && !isOpen()) {
    const item = results.find(open) ?? find(open);
    if (item) results.open(item, { remembered: false });
  }
}

async function fill(only) {
  const mine = ++turn;
  const pick = (item) => !only.length || only.includes(item.modality);
  const asked = await question();
  $("results").toggleAttribute("aria-busy", Boolean(asked));
  $("verdict").hidden = true;
  try {
    if (!asked) {
      const all = items.filter(pick).reverse();
      results.show(all.slice(0, MOST), { label: "Items" });
      return show($("found"), told(all.length, ""));
    }
    show($("found"), "Searching …");
    const { order, scores, moments: nearest, known, truncated } = await ask(asked.ask);
    if (mine !== turn) return;
    const hits = [];
    let count = 0;
    for (const [place, row] of order.entries()) {
      if (pick(items[row]) && ++count <= MOST) hits.push({ ...items[row], score: scores[place], moment: moments[nearest[place]] });
    }
    results.show(hits);
    show($("found"), told(count, asked.words));
    const doubts = [known === false && "The model knows none of these words: what is found is by chance.", truncated && "Only the beginning of the text was read: it is longer than the model takes."];
    $("verdict").textContent = doubts.filter(Boolean).join(" ");
    $("verdict").hidden = !$("verdict").textContent;
  } catch (error) {
    if (mine !== turn) return;
    shown = null;
    results.clear();
    show($("found"), error.message, { bad: true });
  } finally {
    if (mine === turn) $("results").removeAttribute("aria-busy");
  }
}

onProgress((what, done, total) => {
  if ($("results").hasAttribute("aria-busy")) {
    const said = done < total ? `Fetching ${WHAT[what]}: ${bytesWords(done)} of ${bytesWords(total)}` : "Searching …";
    show($("found"), said);
  }
});

function askPicture(file) {
  if (!towers.image || !file) return;
  picture = file;
  shown = null;
  go({ picture: file.name });
}

// Controls

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  go($("words").value.trim() ? { words: $("words").value.trim() } : {});
});
$("words").addEventListener("focus", warm, { once: true });
for (const box of kinds) {
  const count = items.filter((item) => item.modality === box.value).length;
  box.parentElement.hidden = !count;
  box.nextElementSibling.textContent = `${MANY[box.value]} (${count.toLocaleString("en")})`;
  box.addEventListener("change", route);
}
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  askPicture($("file").files[0]);
  $("file").value = "";
});
let depth = 0;
const veil = (event, change) => {
  if (!towers.image || !event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  depth = Math.max(0, depth + change);
  $("veil").hidden = depth === 0;
};
addEventListener("dragenter", (event) => veil(event, 1));
addEventListener("dragleave", (event) => veil(event, -1));
addEventListener("dragover", (event) => veil(event, 0));
addEventListener("drop", (event) => {
  veil(event, -depth);
  askPicture(event.dataTransfer?.files[0]);
});
addEventListener("hashchange", route);
addEventListener("popstate", route);

// Start

document.title = `${collection} · Isthmus`;
$("choose").hidden = !towers.image;
if (!towers.text) for (const id of ["words", "go"]) $(id).disabled = true;
$("serving").firstChild.textContent = `${name}: ${plural(items.length, "item")} of the collection ${collection}. ${licence}. What is asked stays in this browser. `;
route();
