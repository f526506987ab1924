// What is asked: the words, the parts beside them, the kinds and the conditions, as a request and as a state to keep.

import { pathOf, send } from "./api.js";
import { $, el } from "./dom.js";
import { filtersIn } from "./filters.js";
import { keepFile, keptFile } from "./keeping.js";
import { filePart, partsIn } from "./parts.js";
import { KINDS, addKind, nameOf } from "./items.js";

/** `changed` is told of every change; `keys()` are metadata keys to suggest; `collection()` is the present one. */
export function asking({ changed, keys, collection }) {
  const words = $("words");
  const boxes = () => [...document.querySelectorAll("[name=modality]")];
  const parts = partsIn($("parts"), { weighted: true, changed, collection });
  const filters = filtersIn($("filters"), {
    keys,
    changed() {
      dressFilters();
      changed();
    },
  });

  // The words have a tile of their own, for their weight, as soon as there is something to weigh them against.
  let wordsPart = null;
  function weighWords(weight = 1) {
    const needed = words.value.trim() && parts.all.some((part) => part !== wordsPart);
    if (wordsPart && !needed) {
      parts.clear((part) => part !== wordsPart);
      wordsPart = null;
    } else if (needed && !wordsPart) {
      wordsPart = parts.add({ kind: "text", fixed: true, name: "the words", weight });
    }
    if (wordsPart) {
      wordsPart.text = words.value.trim();
      wordsPart.element.querySelector(".name").textContent = `“${wordsPart.text}”`;
    }
  }

  const used = () => parts.all.filter((part) => !part.bad && (part.kind !== "text" || part.text.trim()));

  function dressFilters() {
    $("filter-count").textContent = filters.count ? ` (${filters.count})` : "";
  }

  function openFilters(open) {
    $("filters").hidden = !open;
    $("filtering").setAttribute("aria-expanded", String(open));
    if (open) filters.open();
  }

  const stored = (id) => send({ path: pathOf("/items", id), query: { collection: collection(), include: "preview" } }).catch(() => null);

  const kinds = () => boxes().filter((box) => box.checked).map((box) => box.value);

  const api = {
    parts,
    filters,
    weighWords,
    openFilters,
    kinds,
    get made() {
      return parts.all.some((part) => part.made);
    },
    /** {query, files} of /search; null where nothing is asked. */
    query() {
      weighWords();
      const typed = words.value.trim();
      const all = used();
      const files = all.filter((part) => part.file).map((part) => ({ name: part.name, data: part.file }));
      if (!all.length) return typed ? { query: typed } : null;
      if (all.length === 1 && all[0].weight === 1) {
        const [only] = all;
        if (only.file) return { files };
        return { query: only.kind === "text" ? only.text.trim() : { id: only.id } };
      }
      const compose = all.map((part) => {
        const { weight } = part;
        if (part.file) return { weight };
        return part.kind === "text" ? { text: part.text.trim(), weight } : { id: part.id, weight };
      });
      return { query: { compose }, files };
    },
    /** All that is asked, as written() of state.js takes it. */
    state() {
      return {
        words: words.value.trim(),
        weight: wordsPart?.weight,
        parts: used().filter((part) => !part.fixed).map(({ kind, file, ...part }) => ({ kind: file ? "file" : kind, ...part })),
        kinds: kinds(),
        where: filters.conditions,
        collection: collection(),
      };
    },
    /** Ask what a state says. Returns what of it is no longer to be had, in words. */
    async apply(state) {
      words.value = state.words;
      parts.clear();
      wordsPart = null;
      for (const box of boxes()) box.checked = state.kinds.includes(box.value);
      filters.set(state.where);
      dressFilters();
      openFilters(state.where.length > 0);
      const lost = [];
      for (const part of state.parts) {
        if (part.kind === "text") parts.add({ ...part, name: "another text" });
        else if (part.kind === "item") {
          const item = await stored(part.id);
          if (item) api.addItem(item, part.weight);
          else lost.push(`${nameOf(part)} is no longer in this collection`);
        } else {
          const file = await keptFile(part.key);
          if (file) parts.add({ ...(await filePart(new File([file], part.name, { type: file.type }))), key: part.key, weight: part.weight });
          else lost.push(`${part.name} is no longer in this browser: drop it here again`);
        }
      }
      weighWords(state.weight);
      return lost;
    },
    clear() {
      words.value = "";
      parts.clear();
      wordsPart = null;
    },
    onlyKind(kind) {
      for (const box of boxes()) box.checked = box.value === kind;
    },
    addItem: (item, weight = 1) => parts.add({ kind: "item", id: item.id, weight, modality: item.modality, seen: isSeen(item), name: nameOf(item) }),
    addText() {
      weighWords();
      const part = parts.add({ kind: "text", text: "", name: "another text" });
      weighWords();
      part.element.querySelector("input").focus();
    },
    /** Add files; returns what is wrong with those that are left out. */
    async addFiles(files) {
      const wrong = [];
      for (const file of files) {
        try {
          const part = await filePart(file);
          parts.add({ ...part, key: await keepFile(part.file) });
        } catch (error) {
          wrong.push(error.message);
        }
      }
      return wrong;
    },
    /** Find out which files the server cannot read, and leave them out. Returns what is wrong with them. */
    async sift(signal) {
      const given = used().filter((part) => part.file);
      if (given.length < 1 || used().length < 2) return [];
      const files = given.map((part) => ({ name: part.name, data: part.file }));
      const { embeddings } = await send({ method: "POST", path: "/embed", json: { inputs: [], on_error: "null", dimensions: 1 }, files }, signal);
      const wrong = [];
      for (const { index, error } of embeddings) {
        if (!error) continue;
        parts.spoil(given[index], error.detail);
        wrong.push(`${given[index].name}: ${error.detail}`);
      }
      return wrong;
    },
  };
  return api;
}

const isSeen = (item) => Boolean(item.preview?.media_type?.startsWith("image/"));

/** A chip for each kind that the bundle has besides pictures, videos, sounds and texts. */
export function addChips(kinds) {
  for (const kind of kinds.filter((name) => !(name in KINDS)))
    $("kinds").append(el("label", {}, el("input", { type: "checkbox", name: "modality", value: kind }), el("span", {}, addKind(kind))));
}

/** Chips of kinds, with how many items there are of each. */
export function dressChips(counts) {
  addChips(Object.keys(counts ?? {}));
  for (const box of document.querySelectorAll("[name=modality]")) {
    const count = counts?.[box.value];
    const label = box.nextElementSibling;
    label.querySelector("small")?.remove();
    if (count != null) label.append(el("small", {}, count.toLocaleString("en")));
    box.parentElement.classList.toggle("none", count === 0 && !box.checked);
  }
}
