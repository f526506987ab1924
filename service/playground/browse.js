// The view without a question: what is in a collection by folder and by month, the newest first.

import { pathOf, send } from "./api.js";
import { openDetail } from "./detail.js";
import { $, button, el, icon, plural, show } from "./dom.js";
import { within } from "./filters.js";
import { gallery } from "./gallery.js";
import { DATE, FOLDER, KINDS, MANY, MONTH, monthWords } from "./items.js";
import { requestBlock } from "./request.js";

const PAGE = 60;
const ORDERS = { newest: { sort: DATE, order: "desc" }, oldest: { sort: DATE, order: "asc" }, stored: { order: "desc" } };

export function browseView(app) {
  const [status, folders, months, kind, order, crumbs] = ["browsed", "folders", "months", "browse-kind", "browse-order", "crumbs"].map($);
  const command = requestBlock($("browse-request"));
  let chosen = { folder: "", month: "", kind: "", order: "newest" };
  let shown = null; // what of `chosen` is on the page, as text
  let loading = new AbortController();
  let cursor = null;
  let heading = null;
  let more = async () => false;
  const items = gallery($("browse-items"), {
    collection: () => app.collection, like: (item) => app.like(item), compose: (item) => app.compose(item),
    more: () => more(), failed: (message) => show(status, message, { bad: true }),
  });

  const written = () => {
    const { order: by, ...rest } = chosen;
    const pairs = Object.entries({ ...rest, ...(by !== "newest" && { order: by }), in: app.collection }).filter(([, value]) => value);
    return new URLSearchParams(pairs).toString();
  };

  function go(change) {
    chosen = { ...chosen, ...change };
    history.pushState(null, "", `#/browse?${written()}`);
    load();
    scrollTo({ top: 0 });
  }

  async function load() {
    shown = written();
    loading.abort();
    loading = new AbortController();
    const { signal } = loading;
    $("browse-items").setAttribute("aria-busy", "true");
    show(status, "Looking …");
    try {
      await Promise.all([shelve(signal), list(signal)]);
    } catch (error) {
      if (error.name === "AbortError") return;
      shown = null;
      items.clear();
      show(status, error.message, { bad: true });
    }
    if (!signal.aborted) $("browse-items").removeAttribute("aria-busy");
  }

  // Folders and months

  async function shelve(signal) {
    const path = `${pathOf("/collections", app.collection)}/facets`;
    const facets = async (key, filter) => {
      const answer = await send({ path, query: { key, filter: filter && JSON.stringify(filter), modality: chosen.kind || null } }, signal);
      return { ...answer, ...answer.facets[key] };
    };
    // What is chosen in one of the two limits what the other lists.
    const [byFolder, byMonth] = await Promise.all([
      facets(FOLDER, filterOf({ month: chosen.month })), facets(MONTH, filterOf({ folder: chosen.folder })),
    ]);
    drawFolders(byFolder);
    drawMonths(byMonth);
    const kinds = chosen.kind ? { [chosen.kind]: null } : byMonth.modalities;
    kind.replaceChildren(el("option", { value: "" }, "All kinds"), ...Object.keys(MANY).filter((name) => name in kinds || name === chosen.kind)
      .map((name) => el("option", { value: name }, kinds[name] == null ? MANY[name] : `${MANY[name]} (${kinds[name].toLocaleString("en")})`)));
    kind.value = chosen.kind;
    order.value = chosen.order;
    drawCrumbs();
  }

  const entry = (name, label, count, look, current, change) => el("li", {},
    button(label, look, () => go(change), { class: "shelf", "aria-pressed": String(current), title: name }),
    el("small", {}, count.toLocaleString("en")));

  function drawFolders({ values, missing, more: hidden, total }) {
    const counts = new Map();
    for (const { value, count } of values) {
      const steps = String(value).split("/");
      // A folder counts what lies in the folders below it too.
      for (let depth = 1; depth <= steps.length; depth++) {
        const path = steps.slice(0, depth).join("/");
        counts.set(path, (counts.get(path) ?? 0) + count);
      }
    }
    const open = chosen.folder;
    const above = (path) => path.slice(0, Math.max(0, path.lastIndexOf("/")));
    // What is on the way to the chosen folder, beside it and below it; the rest is a click away.
    const roots = [...counts.keys()].filter((path) => !above(path));
    const near = [...counts.keys()].filter((path) => {
      const parent = above(path);
      return !parent || parent === open || (roots.length === 1 && parent === roots[0]) || open.startsWith(`${parent}/`) || parent === above(open);
    }).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    folders.replaceChildren(entry("Every folder", "Every folder", total, "folder", !open, { folder: "" }), ...near.map((path) => {
      const made = entry(path, path.slice(path.lastIndexOf("/") + 1), counts.get(path), "folder", path === open, { folder: path });
      made.style.setProperty("--depth", path.split("/").length);
      return made;
    }));
    $("folders-note").textContent = [
      missing && `${plural(missing, "item")} without a folder`, hidden && `${plural(hidden, "more folder")}, with fewer items`,
    ].filter(Boolean).join(". ");
    if (missing && missing === total) $("folders-note").append(". ", el("code", {}, "isthmus index FOLDER --again"), " notes them.");
  }

  function drawMonths({ values, missing, total }) {
    const ordered = [...values].sort((a, b) => (a.value < b.value ? 1 : -1));
    months.replaceChildren(entry("Any time", "Any time", total, "calendar", !chosen.month, { month: "" }),
      ...ordered.map(({ value, count }) => entry(value, monthWords(value), count, "calendar", value === chosen.month, { month: value })));
    $("months-note").textContent = missing ? `${plural(missing, "item")} without a date` : "";
  }

  function drawCrumbs() {
    const steps = chosen.folder ? chosen.folder.split("/") : [];
    const to = (text, change) => button(text, null, () => go(change), { class: "link" });
    const parts = [to("Everything", { folder: "", month: "" })];
    steps.forEach((step, place) => parts.push(to(step, { folder: steps.slice(0, place + 1).join("/") })));
    if (chosen.month) parts.push(el("span", {}, monthWords(chosen.month)));
    crumbs.replaceChildren(...parts.flatMap((part, place) => (place ? [icon("right"), part] : [part])));
    $("search-here").hidden = !chosen.folder && !chosen.month;
  }

  // Their items

  async function list(signal) {
    const filter = filterOf(chosen);
    const query = {
      collection: app.collection, limit: PAGE, include: ["preview", "total"], ...ORDERS[chosen.order],
      ...(filter && { filter: JSON.stringify(filter) }), ...(chosen.kind && { modality: chosen.kind }),
    };
    const request = { path: "/items", query };
    command.update(request);
    const page = await send(request, signal);
    cursor = page.next_cursor;
    heading = null;
    items.show([], { label: "Items" });
    append(page.items);
    show(status, page.items.length ? plural(page.total, "item") : emptyWords());
    $("browse-add").hidden = page.items.length > 0;
    more = async () => {
      if (!cursor) return false;
      try {
        const next = await send({ ...request, query: { ...query, include: "preview", cursor } }, signal);
        cursor = next.next_cursor;
        append(next.items);
      } catch (error) {
        if (error.name !== "AbortError") show(status, `There is more, but it cannot be had. ${error.message}`, { bad: true });
        return false;
      }
      return Boolean(cursor);
    };
  }

  const emptyWords = () => (chosen.folder || chosen.month || chosen.kind ? "Nothing is here." : "There is nothing in this collection yet.");

  /** Items under the months that they are of, where they come by date. */
  function append(page) {
    if (chosen.order === "stored") return items.add(page);
    const monthOf = (item) => item.metadata?.[MONTH] ?? "";
    let run = [];
    for (const item of page) {
      const month = monthOf(item);
      if (month !== heading) {
        items.add(run);
        run = [];
        heading = month;
        const text = month ? monthWords(month) : "Without a date";
        items.head(el("h2", { class: "kinds" }, text), text);
      }
      run.push(item);
    }
    return items.add(run);
  }

  kind.addEventListener("change", () => go({ kind: kind.value }));
  order.addEventListener("change", () => go({ order: order.value }));
  $("search-here").addEventListener("click", () => {
    const where = [
      chosen.folder && { key: FOLDER, test: "under", value: chosen.folder },
      chosen.month && { key: MONTH, test: "is", value: chosen.month },
    ].filter(Boolean);
    app.search({ where, kinds: chosen.kind ? [chosen.kind] : [] });
  });

  return {
    title: "Browse",
    async openNamed(id) {
      const there = items.find(id);
      if (there) return items.open(there, { remembered: false });
      const { collection } = app;
      try {
        const item = await send({ path: pathOf("/items", id), query: { collection, include: "preview" } });
        openDetail([item], item, { collection, like: app.like, compose: app.compose }, { remembered: false });
      } catch (error) {
        show(status, error.message, { bad: true });
      }
      return null;
    },
    async enter(query) {
      const by = query.get("order");
      chosen = {
        folder: query.get("folder") ?? "", month: query.get("month") ?? "",
        kind: query.get("kind") in KINDS ? query.get("kind") : "", order: by in ORDERS ? by : "newest",
      };
      const narrow = matchMedia("(max-width: 60rem)").matches;
      for (const id of ["folders-fold", "months-fold"]) if (narrow && !shown) $(id).open = false;
      if (shown !== written()) await load();
    },
    collectionChanged() {
      chosen = { ...chosen, folder: "", month: "" };
      shown = null;
      if (!$("browse").hidden) go({});
    },
    stale() {
      shown = null;
    },
  };
}

/** The filter of a folder with all below it, and of a month; undefined for neither. */
function filterOf({ folder, month }) {
  const parts = [folder && within(FOLDER, folder), month && { [MONTH]: month }].filter(Boolean);
  return parts.length > 1 ? { $and: parts } : parts[0];
}
