// The page: its views, the collection, the theme, the key.

import { key, onUnauthorised, pathOf, send } from "./api.js";
import { addView } from "./add.js";
import { addChips, dressChips } from "./asking.js";
import { browseView } from "./browse.js";
import { classifyView } from "./classify.js";
import { closeDetail, isOpen } from "./detail.js";
import { $, el, plural } from "./dom.js";
import { mapView } from "./map.js";
import { droppedFiles } from "./media.js";
import { stopPlaying } from "./player.js";
import { searchView } from "./search.js";
import { written } from "./state.js";

const COLLECTION = "isthmus-collection";
const THEME = "isthmus-theme";

const app = {
  collection: localStorage.getItem(COLLECTION) ?? "default",
  collections: [],
  /** Whether the server keeps previews; null where it does not say. */
  previews: null,
  show: (name) => showView(name),
  /** Make what was asked a place to come back to. */
  remember(query) {
    const hash = `#/search${query ? `?${query}` : ""}`;
    if (location.hash !== hash && (query || location.hash)) history.pushState(null, "", hash);
  },
  /** Search by a state, as written() of state.js takes it. */
  search(state) {
    location.hash = `#/search?${written({ ...state, collection: this.collection })}`;
  },
  /** Something was added: what the views show is no longer all. */
  changed() {
    for (const view of Object.values(views)) view.stale?.();
  },
  get count() {
    return this.collections.find(({ name }) => name === this.collection)?.count ?? 0;
  },
  /** Ask again which collections there are. */
  async refresh() {
    try {
      ({ collections: this.collections } = await send({ path: "/collections" }));
    } catch {
      this.collections = []; // the views say what is wrong
    }
    const names = this.collections.map(({ name }) => name);
    if (names.length && !names.includes(this.collection)) this.collection = names.includes("default") ? "default" : names[0];
    $("collection").replaceChildren(
      ...this.collections.map(({ name, count }) => el("option", { value: name }, `${name} (${count.toLocaleString("en")})`)),
    );
    $("collection").value = this.collection;
    $("targets").replaceChildren(...names.map((name) => el("option", { value: name })));
    await this.countKinds();
  },
  /** How many items of each kind there are, on the chips. */
  async countKinds() {
    try {
      const { parts } = await send({ path: pathOf("/collections", this.collection) });
      dressChips(Object.fromEntries((parts ?? []).map(({ modality, count }) => [modality, count])));
    } catch {
      dressChips(null);
    }
  },
};

const views = {
  search: searchView(app), browse: browseView(app), classify: classifyView(app), map: mapView(app), add: addView(app),
};

app.like = (item) => views.search.like(item);
app.compose = (item) => views.search.compose(item);

const current = () => /^#\/(\w+)/.exec(location.hash)?.[1] ?? "search";

function showView(name) {
  stopPlaying();
  if ($(name).hidden) scrollTo({ top: 0 });
  for (const other of Object.keys(views)) $(other).hidden = other !== name;
  for (const link of document.querySelectorAll(".views a")) {
    if (link.hash === `#/${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${views[name].title} · Isthmus`;
}

let routed = 0;
async function route() {
  const turn = ++routed;
  const name = current() in views ? current() : "search";
  const query = new URLSearchParams(location.hash.split("?")[1] ?? "");
  const open = query.get("open");
  if (!open) closeDetail();
  if ($(name).hidden || !isOpen()) showView(name);
  const collection = query.get("in");
  if (collection && collection !== app.collection && app.collections.some((other) => other.name === collection)) choose(collection);
  await views[name].enter(query);
  if (turn === routed && open && !isOpen()) await views[name].openNamed?.(open);
}

function choose(collection) {
  app.collection = collection;
  $("collection").value = collection;
  localStorage.setItem(COLLECTION, collection);
  app.countKinds();
}

// Theme

function dressTheme() {
  const set = document.documentElement.dataset.theme;
  const dark = set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const label = `Use the ${dark ? "light" : "dark"} theme`;
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
  $("theme").onclick = () => {
    const chosen = dark ? "light" : "dark";
    document.documentElement.dataset.theme = chosen;
    localStorage.setItem(THEME, chosen);
    dressTheme();
  };
  document.dispatchEvent(new Event("themechange"));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dressTheme);

// Key

function dressKey() {
  const label = key.get() ? "API key (one is set)" : "API key";
  $("key").setAttribute("aria-label", label);
  $("key").title = label;
  $("key").classList.toggle("set", Boolean(key.get()));
  document.dispatchEvent(new Event("keychange"));
}

async function useKey(value) {
  key.set(value);
  $("key-dialog").close();
  dressKey();
  await start();
}

function askForKey(why) {
  if ($("key-dialog").open) return;
  $("key-why").textContent = why ?? (key.get() ? "A key is set. Paste another to use it instead." : "This server has not asked for one. Some servers do.");
  $("key-forget").hidden = !key.get();
  $("key-value").value = key.get();
  $("key-dialog").showModal();
}
$("key").addEventListener("click", () => askForKey());
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key-value").value.trim());
});
$("key-forget").addEventListener("click", () => useKey(""));
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
onUnauthorised((had) => askForKey(had
  ? "The server refuses this key. It may be mistyped, revoked, or a key of another server."
  : "This server asks for a key. Paste the one that you were given."));

// Collection

$("collection").addEventListener("change", () => {
  choose($("collection").value);
  Object.values(views).forEach((view) => view.collectionChanged?.());
});

// Keys of the whole page

addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || isOpen() || $("key-dialog").open) return;
  if (event.target.closest?.("input, textarea, select, [contenteditable]")) return;
  event.preventDefault();
  if (current() !== "search") location.hash = "#/search";
  showView("search");
  $("words").focus();
  $("words").select();
});

// Dropping, anywhere on the page

let depth = 0;
const carries = (event) => event.dataTransfer?.types.includes("Files");
const veil = (on) => {
  const { hint, drop, zones } = views[current()] ?? {};
  $("veil").hidden = !on || !drop;
  $("veil").classList.toggle("thin", Boolean(zones)); // what lies beneath can be dropped on too
  if (hint) $("veil").firstElementChild.textContent = hint;
};
document.addEventListener("dropped", () => {
  depth = 0;
  veil(false);
});
addEventListener("dragenter", (event) => carries(event) && veil(++depth > 0));
addEventListener("dragleave", (event) => carries(event) && --depth <= 0 && veil(false));
addEventListener("dragover", (event) => carries(event) && event.preventDefault());
addEventListener("drop", async (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  depth = 0;
  veil(false);
  const files = await droppedFiles(event.dataTransfer);
  views[current()]?.drop?.(files);
});

// Start

async function start() {
  const asked = send({ path: "/models" });
  await Promise.allSettled([app.refresh(), asked.then(({ models: [{ towers }] }) => addChips(Object.keys(towers)))]);
  route();
  try {
    const { models, previews } = await asked;
    app.previews = previews ?? null;
    const [{ name, dimensions, towers }] = models;
    const all = app.collections.reduce((sum, each) => sum + each.count, 0);
    $("serving").textContent =
      `${name}: ${Object.keys(towers).join(", ")} in one space of ${dimensions} dimensions · ${plural(all, "item")} in ${plural(app.collections.length, "collection")}`;
  } catch {
    $("serving").textContent = "";
  }
}

addEventListener("hashchange", route);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says what is asked
  $("main").focus();
});
dressTheme();
dressKey();
start();
