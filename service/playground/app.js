// The page: its views, the collection, the theme, the key.

import { key, onUnauthorised, send } from "./api.js";
import { addView } from "./add.js";
import { classifyView } from "./classify.js";
import { $, el, plural } from "./dom.js";
import { mapView } from "./map.js";
import { droppedFiles } from "./media.js";
import { stopPlaying } from "./player.js";
import { searchView } from "./search.js";

const COLLECTION = "isthmus-collection";
const THEME = "isthmus-theme";

const app = {
  collection: localStorage.getItem(COLLECTION) ?? "default",
  collections: [],
  go(name) {
    if (current() !== name) location.hash = `#/${name}`;
  },
  /** Make what was asked a place to come back to. */
  remember(asked) {
    const query = new URLSearchParams(asked).toString();
    const hash = `#/search${query ? `?${query}` : ""}`;
    if (location.hash !== hash) history.pushState(null, "", hash);
  },
  get count() {
    return this.collections.find((each) => each.name === this.collection)?.count ?? 0;
  },
  /** Ask again which collections there are. */
  async refresh() {
    try {
      ({ collections: this.collections } = await send({ path: "/collections" }));
    } catch {
      this.collections = []; // the views say what is wrong
    }
    const names = this.collections.map((each) => each.name);
    if (names.length && !names.includes(this.collection)) this.collection = names.includes("default") ? "default" : names[0];
    $("collection").replaceChildren(
      ...this.collections.map(({ name, count }) => el("option", { value: name }, `${name} (${count.toLocaleString("en")})`)),
    );
    $("collection").value = this.collection;
    $("targets").replaceChildren(...names.map((name) => el("option", { value: name })));
  },
};

const views = { search: searchView(app), classify: classifyView(app), map: mapView(app), add: addView(app) };

app.like = (item) => views.search.like(item);

const current = () => /^#\/(\w+)/.exec(location.hash)?.[1] ?? "search";

function route() {
  const name = current() in views ? current() : "search";
  const query = new URLSearchParams(location.hash.split("?")[1] ?? "");
  stopPlaying();
  for (const other of Object.keys(views)) $(other).hidden = other !== name;
  for (const link of document.querySelectorAll(".views a")) {
    if (link.hash === `#/${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${views[name].title} · Isthmus`;
  views[name].enter(query);
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
  if (why) $("key-why").textContent = why;
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
onUnauthorised((had) => askForKey(had ? "The server refuses this key." : "This server asks for a key. It stays in this tab until the tab is closed, and is sent to this server alone."));

// Collection

$("collection").addEventListener("change", () => {
  app.collection = $("collection").value;
  localStorage.setItem(COLLECTION, app.collection);
  Object.values(views).forEach((view) => view.collectionChanged?.());
});

// Dropping, anywhere on the page

let depth = 0;
const carries = (event) => event.dataTransfer?.types.includes("Files");
const veil = (on) => {
  const { hint, drop } = views[current()] ?? {};
  $("veil").hidden = !on || !drop;
  if (hint) $("veil").firstElementChild.textContent = hint;
};
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
  await app.refresh();
  route();
  try {
    const { models } = await send({ path: "/models" });
    const [{ name, dimensions, towers }] = models;
    const all = app.collections.reduce((sum, each) => sum + each.count, 0);
    $("serving").textContent =
      `${name}: ${Object.keys(towers).join(", ")} in one space of ${dimensions} dimensions · ${plural(all, "item")} in ${plural(app.collections.length, "collection")}`;
  } catch {
    $("serving").textContent = "";
  }
}

addEventListener("hashchange", route);
dressTheme();
dressKey();
start();
