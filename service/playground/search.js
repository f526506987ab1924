// The view that searches: words, images, sounds and stored items, alone or combined with weights.

import { send } from "./api.js";
import { KINDS, card, forget } from "./cards.js";
import { $, announce, el, plural, show } from "./dom.js";
import { filtersIn } from "./filters.js";
import { filePart, partsIn } from "./parts.js";
import { recordingButton } from "./recording.js";
import { requestBlock } from "./request.js";

const PAGE = 24;
const GLANCE = 12;

export function searchView(app) {
  const [words, results, found, more] = ["words", "results", "found", "more"].map($);
  const command = requestBlock($("search-request"));
  const keys = new Set();
  let count = PAGE;
  let searching = new AbortController();
  let asked = false;

  const parts = partsIn($("parts"), { weighted: true, changed: run });
  const filters = filtersIn($("filters"), { keys: () => [...keys].sort(), changed: filtered });

  // The words have a tile of their own, for their weight, as soon as there is something to weigh them against.
  let own = null;
  function weighWords() {
    const wanted = words.value.trim() && parts.all.some((each) => each !== own);
    if (own && !wanted) {
      parts.clear((each) => each !== own);
      own = null;
    } else if (wanted && !own) {
      own = parts.add({ kind: "text", fixed: true, name: "the words" });
    }
    if (own) {
      own.text = words.value.trim();
      own.element.querySelector(".name").textContent = `“${own.text}”`;
    }
  }

  function query() {
    weighWords();
    const typed = words.value.trim();
    const all = parts.all.filter((each) => each.kind !== "text" || each.text.trim());
    const files = all.filter((each) => each.file).map((each) => ({ name: each.name, data: each.file }));
    if (!all.length) return typed ? { query: typed } : null;
    if (all.length === 1 && all[0].weight === 1) {
      const [only] = all;
      if (only.file) return { files };
      return { query: only.kind === "text" ? only.text.trim() : { id: only.id } };
    }
    const compose = all.map((each) => {
      const { weight } = each;
      if (each.file) return { weight };
      return each.kind === "text" ? { text: each.text.trim(), weight } : { id: each.id, weight };
    });
    return { query: { compose }, files };
  }

  async function run({ keep = false } = {}) {
    if (keep !== true) count = PAGE;
    searching.abort();
    searching = new AbortController();
    const { signal } = searching;
    const wanted = query();
    asked = Boolean(wanted);
    if (!wanted) return glance();
    const modalities = [...document.querySelectorAll("[name=modality]:checked")].map((each) => each.value);
    const json = {
      ...(wanted.query && { query: wanted.query }),
      top_k: count,
      correction: 1, // else what is of the query's own kind crowds out the others
      ...(app.collection !== "default" && { collection: app.collection }),
      ...(modalities.length && { modalities }),
      ...(filters.filter && { filter: filters.filter }),
      include: ["metadata", "preview"],
    };
    const request = { method: "POST", path: "/search", json, files: wanted.files };
    const made = parts.all.some((each) => each.made);
    command.update(request, made ? "Save what was recorded or converted here beside it first." : "");
    results.setAttribute("aria-busy", "true");
    show(found, "Searching …");
    try {
      const answer = await send(request, signal);
      draw(answer.results);
      const time = answer.took_ms < 10 ? answer.took_ms.toFixed(1) : Math.round(answer.took_ms).toLocaleString("en");
      const said = answer.results.length ? `${plural(answer.results.length, "result")} in ${time} ms` : "Nothing is found";
      show(found, [said, ...(answer.warnings ?? [])].join(" – "), { bad: Boolean(answer.warnings) });
      more.hidden = answer.results.length < count;
    } catch (error) {
      if (error.name === "AbortError") return;
      draw([]);
      show(found, error.message, { bad: true });
      more.hidden = true;
    } finally {
      if (!signal.aborted) results.removeAttribute("aria-busy");
    }
  }

  /** Before anything is asked: some of what there is. */
  async function glance() {
    const { collection } = app;
    const request = { path: "/items", query: { collection, limit: GLANCE, include: "preview" } };
    const { signal } = searching;
    more.hidden = true;
    command.update(request);
    try {
      const { items } = await send(request, signal);
      if (asked || collection !== app.collection) return;
      draw(items);
      show(found, items.length ? `Some of the ${plural(app.count, "item")} here` : "");
      $("search-hint").replaceChildren(
        items.length
          ? "Type, drop a picture or a sound anywhere on this page, or record one. Combine several, and weigh them."
          : el("span", {}, "There is nothing in this collection yet. ", el("a", { href: "#/add" }, "Add a folder")),
      );
    } catch (error) {
      if (error.name === "AbortError") return;
      draw([]);
      show(found, error.status === 404 ? "" : error.message, { bad: true });
    } finally {
      if (!signal.aborted) results.removeAttribute("aria-busy");
    }
  }

  function draw(items) {
    forget(results);
    for (const item of items) Object.keys(item.metadata ?? {}).forEach((each) => keys.add(each));
    const best = Math.max(0, ...items.map((each) => each.score ?? 0));
    const options = { collection: app.collection, place: results, best, like, compose };
    results.replaceChildren(...items.map((each) => card(each, options)));
    $("search-empty").hidden = asked;
  }

  function itemPart(item) {
    return { kind: "item", id: item.id, modality: item.modality, name: item.id };
  }

  function like(item) {
    words.value = "";
    own = null;
    parts.clear();
    parts.add(itemPart(item));
    announce(`More like ${item.id}`);
    app.go("search");
    app.remember({});
    run();
    $("main").focus();
    scrollTo({ top: 0 });
  }

  function compose(item) {
    parts.add(itemPart(item));
    announce(`${KINDS[item.modality] ?? ""} ${item.id} is a part of the query`);
    run();
  }

  async function take(files) {
    for (const file of files) {
      try {
        parts.add(await filePart(file));
      } catch (error) {
        show(found, error.message, { bad: true });
        return;
      }
    }
    if (files.length) await run();
  }

  function filtered() {
    $("filter-count").textContent = filters.count ? ` (${filters.count})` : "";
    if (asked) run();
  }

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
    app.remember(parts.all.length ? {} : { q: words.value.trim() });
  });
  words.addEventListener("input", () => {
    weighWords();
    if (!words.value && !parts.all.length) run();
  });
  $("choose").addEventListener("click", () => $("file").click());
  $("choose").title = "Choose an image or a sound";
  $("file").addEventListener("change", () => {
    take([...$("file").files]);
    $("file").value = "";
  });
  recordingButton($("record"), { taken: (file) => take([file]), failed: (error) => show(found, error.message, { bad: true }) });
  $("more-words").addEventListener("click", () => {
    weighWords();
    const part = parts.add({ kind: "text", text: "", name: "another text" });
    weighWords();
    part.element.querySelector("input").focus();
  });
  document.querySelectorAll("[name=modality]").forEach((each) => each.addEventListener("change", () => asked && run()));
  $("filtering").addEventListener("click", () => {
    const open = $("filters").hidden;
    $("filters").hidden = !open;
    $("filtering").setAttribute("aria-expanded", String(open));
    if (open) filters.open();
  });
  more.addEventListener("click", () => {
    count += PAGE;
    run({ keep: true });
  });

  return {
    title: "Search",
    hint: "Drop to search with it",
    like,
    drop: (files) => take(files.map(({ file }) => file)),
    enter(query) {
      if (query.has("q") && query.get("q") !== words.value.trim()) {
        words.value = query.get("q");
        parts.clear();
        own = null;
      }
      if (query.has("q") || !asked) run();
    },
    collectionChanged() {
      parts.clear((each) => each.kind !== "item");
      keys.clear();
      run();
    },
  };
}
