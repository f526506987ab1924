// The view that searches: words, images, sounds and stored items, alone or combined with weights.

import { pathOf, send } from "./api.js";
import { asking } from "./asking.js";
import { openDetail } from "./detail.js";
import { $, announce, button, el, plural, show } from "./dom.js";
import { gallery } from "./gallery.js";
import { KINDS, MANY, fitOf, kindName, nameOf } from "./items.js";
import { recordingButton } from "./recording.js";
import { requestBlock } from "./request.js";
import { read, written } from "./state.js";
import { toast } from "./toast.js";

const FIRST = 36; // of each kind
const TIMES = 4;
const MOST = 1_000;
const GLANCE = 60;
const SAVE_FIRST = "Save what was recorded or converted here beside it first.";
const HINT = "Type what you look for, or drop a picture or a sound anywhere on this page. Combine several, and weigh them.";

/** {kind: its items in their order}. Object.groupBy() is not in every browser yet. */
function byModality(items) {
  const kinds = {};
  for (const item of items) (kinds[item.modality] ??= []).push(item);
  return kinds;
}

/** How sure the best of some items is; less than any where it cannot be judged. */
const sure = ([best]) => best.confidence ?? -1;
const order = (kind) => Object.keys(KINDS).indexOf(kind);

export function searchView(app) {
  const [words, found, verdict] = ["words", "found", "verdict"].map($);
  const command = requestBlock($("search-request"));
  const keys = new Set();
  let searching = new AbortController();
  let asked = null; // the state of the question that is answered, as text; null before the first
  let depth = FIRST;
  let seen = new Set();
  let cursor = null; // of the items that are shown before anything is asked
  let more = async () => false;
  let why = null; // of an item and a signal: what made it a result
  let judge = null; // of an item and whether it is relevant: teaches the collection, and can be undone

  const collection = () => app.collection;
  const asker = asking({ changed: () => run(), keys: () => [...keys].sort(), collection });
  const results = gallery($("results"), {
    collection, like, compose, fit: fitOf, why: () => why, judge: () => judge, more: () => more(), failed: (message) => show(found, message, { bad: true }),
  });

  function begin() {
    searching.abort();
    searching = new AbortController();
    $("results").setAttribute("aria-busy", "true");
    return searching.signal;
  }

  function failed(error, signal) {
    if (error.name === "AbortError") return;
    asked = null; // asked again when the view is entered again, with a key perhaps
    results.clear();
    verdict.hidden = true;
    show($("ending"), "");
    show(found, error.message, { bad: true });
    if (!signal.aborted) $("results").removeAttribute("aria-busy");
  }

  
  async function run({ remember = true, notes = [] } = {}) {
    const signal = begin();
    const state = asker.state();
    asked = written(state);
    if (remember) app.remember(asked);
    const query = asker.query();
    if (!query) return glance(signal, notes);
    depth = FIRST;
    show(found, "Searching …");
    try {
      let answer;
      try {
        answer = await ask(query, signal);
      } catch (error) {
        const wrong = error.status >= 400 && error.status < 500 && error.status !== 401 ? await asker.sift(signal) : [];
        const rest = asker.query();
        if (!wrong.length || !rest) throw error;
        notes = [...notes, ...wrong.map((why) => `${why} (left out)`)];
        answer = await ask(rest, signal);
      }
      draw(answer, notes);
    } catch (error) {
      return failed(error, signal);
    }
    if (!signal.aborted) $("results").removeAttribute("aria-busy");
  }

  /** One request: of every kind so many, or so many of the one kind that is wanted. */
  function ask(query, signal) {
    const kinds = asker.kinds();
    const { filter } = asker.filters;
    const json = {
      ...(query.query && { query: query.query }),
      top_k: depth,
      balance: true, // so many of each kind, and how many there are
      ...(app.collection !== "default" && { collection: app.collection }),
      ...(kinds.length && { modalities: kinds }),
      ...(filter && { filter }),
      include: ["metadata", "preview", "confidence"],
    };
    const request = { method: "POST", path: "/search", json, files: query.files };
    command.update(request, asker.made ? SAVE_FIRST : "");
    why = async (item, own) => {
      const only = { ...json, top_k: depth, include: ["why"], why_of: [item.id] };
      const { results: items } = await send({ ...request, json: only }, own);
      return items.find(({ id }) => id === item.id)?.why;
    };
    judge = query.files?.length ? null : (item, relevant) => teach(query.query, item, relevant);
    more = async () => {
      if (depth >= MOST) return false;
      const { signal: same } = searching;
      const before = depth;
      depth = Math.min(MOST, TIMES * depth);
      try {
        const answer = await send({ ...request, json: { ...json, top_k: depth } }, same);
        return append(answer.results.filter((item) => !seen.has(item.id)), answer);
      } catch (error) {
        depth = before;
        if (error.name !== "AbortError") show($("ending"), `There is more, but it cannot be had. ${error.message}`, { bad: true });
        return false;
      }
    };
    return send(request, signal);
  }

  async function teach(query, item, relevant) {
    const where = { collection: app.collection };
    try {
      const { current } = await send({ path: "/feedback", query: where });
      const judged = { query, [relevant ? "relevant" : "not_relevant"]: [item.id] };
      const { version } = await send({ method: "POST", path: "/feedback", json: { ...where, judgements: [judged] } });
      const undo = () =>
        send({ method: "PUT", path: "/feedback", json: { ...where, version: current } })
          .then(() => send({ method: "DELETE", path: "/feedback", query: { ...where, version } }))
          .then(() => toast("Undone: searches answer as before."))
          .catch((error) => toast(error.message));
      toast(`Learned from ${nameOf(item)}: searches like this one find ${relevant ? "more" : "less"} like it.`, { action: { text: "Undo", run: undo } });
    } catch (error) {
      toast(error.message);
    }
  }

  function append(items, answer) {
    note(items);
    results.add(items);
    const all = endOf(answer);
    show($("ending"), all);
    return !all && items.length > 0;
  }

  /** What is said at the end of the results; empty where more are to come. */
  function endOf({ results: items, counts }) {
    const perKind = Object.values(byModality(items)).map((some) => some.length);
    if (perKind.some((count) => count >= depth) && depth < MOST) return "";
    const most = perKind.some((count) => count >= MOST);
    if (most) return `These are the best ${MOST.toLocaleString("en")} of each kind. Say more, or add a filter, to find others.`;
    return items.length ? `That is all: ${totalOf(counts, items.length)}.` : "";
  }

  function note(items) {
    for (const item of items) {
      seen.add(item.id);
      Object.keys(item.metadata ?? {}).filter((key) => key !== "file").forEach((key) => keys.add(key));
    }
  }

  function draw(answer, notes) {
    const { results: items, counts, nothing } = answer;
    seen = new Set();
    note(items);
    const byKind = byModality(items);
    const kinds = Object.keys(byKind).sort((a, b) => sure(byKind[b]) - sure(byKind[a]) || order(a) - order(b));
    const sections = kinds.length > 1 && kinds.map((kind) => ({
      kind,
      items: byKind[kind],
      title: [MANY[kind] ?? kind, counts?.[kind] != null && el("small", {}, counts[kind].toLocaleString("en"))].filter(Boolean),
      all: () => {
        asker.onlyKind(kind);
        run();
        scrollTo({ top: 0 });
      },
    }));
    results.show(items, { sections: sections || undefined });
    show($("ending"), endOf(answer));
    sayVerdict(items, nothing);
    tellPreviews(items);
    $("search-empty").hidden = true;
    const time = answer.took_ms < 10 ? answer.took_ms.toFixed(1) : Math.round(answer.took_ms).toLocaleString("en");
    const said = items.length ? `Best first, of ${totalOf(counts, items.length)} in ${time} ms` : "";
    const taught = answer.feedback && `As people taught it (version ${answer.feedback})`;
    const all = [said, taught, ...(answer.warnings ?? []), ...notes].filter(Boolean);
    show(found, all.join(". "), { bad: Boolean(answer.warnings) || notes.length > 0 });
    if (nothing || !items.length) announce(verdict.textContent);
  }

  /** Nothing at all, or nothing that fits better than chance would: said above the results. */
  function sayVerdict(items, nothing) {
    verdict.hidden = items.length > 0 && !nothing;
    if (!items.length) verdict.replaceChildren(...nothingFits());
    else if (nothing) {
      verdict.replaceChildren(el("strong", {}, "Probably nothing here."),
        " The best of these fits no better than chance would have it in a collection of this size.");
    }
    $("results").classList.toggle("doubtful", Boolean(nothing));
  }

  function nothingFits() {
    const [kinds, count] = [asker.kinds(), asker.filters.count];
    if (!app.count) return [el("strong", {}, "This collection is empty."), " ", el("a", { href: "#/add" }, "Add files to it")];
    const which = kinds.map((kind) => (MANY[kind] ?? kind).toLowerCase()).join(" and ") || "items";
    const again = (text, change) => button(text, null, () => {
      change();
      run();
    }, { class: "link" });
    return [
      el("strong", {}, `No ${which} ${count ? "pass the filters" : "are in this collection"}.`), " ",
      count > 0 && again("Remove the filters", () => asker.filters.set([])),
      kinds.length > 0 && again("Search every kind", () => asker.onlyKind(null)),
    ].filter(Boolean);
  }

  /** Why there is nothing to look at, and what to do about it. */
  function tellPreviews(items) {
    const media = items.filter(({ modality }) => modality === "image" || modality === "audio");
    const bare = media.filter(({ preview }) => !preview?.media_type).length;
    const box = $("previews-note");
    box.hidden = !bare;
    if (!bare) return;
    const steps = "keep previews: isthmus serve --previews";
    const index = el("code", {}, "isthmus index FOLDER");
    const none = app.previews === false || (app.previews == null && bare === media.length);
    box.replaceChildren(...(none
      ? [el("strong", {}, "There is nothing to look at, because this server keeps no previews."),
        " Start it with ", el("code", {}, steps.split(": ")[1]), ", then run ", index, " again: it fills in what is missing."]
      : [`${plural(bare, "result has", "results have")} no preview, because they were stored before previews were kept. Run `, index, " again to fill them in."]));
  }

  function totalOf(counts, fallback) {
    const pairs = Object.keys(KINDS).map((kind) => [kind, counts?.[kind]]).filter(([, count]) => count);
    if (!pairs.length) return plural(fallback, "item");
    return pairs.map(([kind, count]) => plural(count, (KINDS[kind] ?? kind).toLowerCase(), (MANY[kind] ?? `${kind}s`).toLowerCase())).join(", ");
  }

  /** Before anything is asked: what there is, the newest first. */
  async function glance(signal, notes = []) {
    const kinds = asker.kinds();
    const { filter } = asker.filters;
    const query = {
      collection: app.collection, limit: GLANCE, include: "preview", order: "desc",
      ...(kinds.length === 1 && { modality: kinds[0] }), ...(filter && { filter: JSON.stringify(filter) }),
    };
    const request = { path: "/items", query };
    command.update(request);
    why = judge = null;
    more = async () => {
      if (!cursor) return false;
      const page = await send({ ...request, query: { ...query, cursor } }, signal).catch(() => null);
      if (!page) return false;
      cursor = page.next_cursor;
      note(page.items);
      results.add(page.items);
      return Boolean(cursor);
    };
    try {
      const page = await send(request, signal);
      cursor = page.next_cursor;
      seen = new Set();
      note(page.items);
      results.show(page.items, { label: "Newest" });
      verdict.hidden = true;
      show($("ending"), "");
      tellPreviews(page.items);
      const said = page.items.length ? `Newest first, of ${plural(app.count, "item")}` : "";
      show(found, [said, ...notes].filter(Boolean).join(". "), { bad: notes.length > 0 });
      $("search-empty").hidden = false;
      $("search-hint").replaceChildren(page.items.length ? HINT
        : el("span", {}, "There is nothing in this collection yet. ", el("a", { href: "#/add" }, "Add a folder")));
    } catch (error) {
      if (error.status === 404) show(found, "");
      else failed(error, signal);
    }
    if (!signal.aborted) $("results").removeAttribute("aria-busy");
  }

  function like(item) {
    asker.clear();
    asker.addItem(item);
    announce(`More like ${nameOf(item)}`);
    app.show("search");
    run();
    $("main").focus();
    scrollTo({ top: 0 });
  }

  function compose(item) {
    asker.addItem(item);
    announce(`${kindName(item)} ${nameOf(item)} is a part of the query`);
    app.show("search");
    run();
  }

  async function take(files) {
    const wrong = await asker.addFiles(files);
    if (wrong.length && !asker.query()) show(found, wrong.join(". "), { bad: true });
    else if (files.length) await run({ notes: wrong });
  }

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  words.addEventListener("input", () => {
    asker.weighWords();
    if (!words.value && !asker.parts.all.length) run();
  });
  $("choose").addEventListener("click", () => $("file").click());
  $("choose").title = "Choose an image or a sound";
  $("file").addEventListener("change", () => {
    take([...$("file").files]);
    $("file").value = "";
  });
  recordingButton($("record"), {
    meter: $("recording"), taken: (file) => take([file]), failed: (error) => show(found, error.message, { bad: true }),
  });
  $("more-words").addEventListener("click", () => asker.addText());
  $("kinds").addEventListener("change", () => run());
  $("filtering").addEventListener("click", () => asker.openFilters($("filters").hidden));

  /** Show large the item that the address names, wherever it is. */
  async function openNamed(id) {
    const there = results.find(id);
    if (there) return results.open(there, { remembered: false });
    const { collection: name } = app;
    try {
      const item = await send({ path: pathOf("/items", id), query: { collection: name, include: "preview" } });
      openDetail([item], item, { collection: name, like, compose, fit: fitOf }, { remembered: false });
    } catch (error) {
      show(found, error.status === 404 ? `${id} is not in this collection.` : error.message, { bad: true });
    }
    return null;
  }

  return {
    title: "Search",
    hint: "Drop to search with it",
    like,
    compose,
    openNamed,
    stale() {
      asked = null;
    },
    drop: (files) => take(files.map(({ file }) => file)),
    async enter(query) {
      const state = read(query);
      const same = asked !== null && written({ ...state, collection: app.collection }) === asked;
      if (!same) {
        await run({ remember: false, notes: await asker.apply(state) });
      }
      if (matchMedia("(hover: hover)").matches && document.activeElement === document.body) words.focus({ preventScroll: true });
    },
    collectionChanged() {
      asker.parts.clear((part) => part.kind !== "item");
      keys.clear();
      run();
    },
  };
}
