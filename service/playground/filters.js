// Conditions on metadata as rows of a form → the filter of /search.

import { button, el, iconButton } from "./dom.js";

const TESTS = {
  is: ["is", (given) => ({ $in: readings(given) })],
  not: ["is not", (given) => ({ $in: readings(given) })],
  contains: ["contains", (given) => ({ $contains: given })],
  least: ["at least", (given) => ({ $gte: reading(given) })],
  most: ["at most", (given) => ({ $lte: reading(given) })],
  under: ["is or lies in", null], // two conditions: see within()
  exists: ["is there", () => ({ $exists: true })],
};

/** "2004" may have been stored as a number or as a text. */
function readings(text) {
  const read = reading(text);
  return typeof read === "string" ? [text] : [read, text];
}

function reading(text) {
  if (text === "true" || text === "false") return text === "true";
  return text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}

/** `keys()` are suggested; `changed` is told of every change. */
export function filtersIn(place, { keys, changed }) {
  const rows = el("ul", { class: "rows" });
  const known = el("datalist", { id: "metadata-keys" });
  place.append(known, rows, button("Another condition", "plus", () => add({}).querySelector("input").focus(), { class: "link" }));

  function add(given = {}) {
    known.replaceChildren(...keys().map((each) => el("option", { value: each })));
    const key = el("input", { class: "key", list: "metadata-keys", "aria-label": "Metadata key", placeholder: "key", autocomplete: "off" });
    const test = el("select", { "aria-label": "Condition" },
      Object.entries(TESTS).map(([name, [text]]) => el("option", { value: name }, text)));
    const value = el("input", { class: "value", "aria-label": "Value", placeholder: "value", autocomplete: "off" });
    const row = el("li", {}, key, test, value, iconButton("Remove this condition", "close", () => {
      row.remove();
      changed();
    }, { class: "quiet" }));
    test.addEventListener("change", () => (value.hidden = test.value === "exists"));
    row.addEventListener("change", changed);
    key.value = given.key ?? "";
    if (given.test in TESTS) test.value = given.test;
    value.value = given.value ?? "";
    value.hidden = test.value === "exists";
    row.read = () => key.value && (test.value === "exists" || value.value !== "") && { key: key.value, test: test.value, value: value.value };
    rows.append(row);
    return row;
  }

  const conditions = () => [...rows.children].map((row) => row.read()).filter(Boolean);
  return {
    open() {
      if (!rows.children.length) add();
    },
    get conditions() {
      return conditions();
    },
    /** Show these conditions in place of those there are. */
    set(given) {
      rows.replaceChildren();
      given.forEach(add);
    },
    get count() {
      return conditions().length;
    },
    /** undefined where there is no condition. */
    get filter() {
      const parts = conditions().map(({ key, test, value }) => {
        if (test === "under") return within(key, value);
        const condition = { [key]: TESTS[test][1](value) };
        return test === "not" ? { $not: condition } : condition;
      });
      return parts.length > 1 ? { $and: parts } : parts[0];
    },
  };
}

/** A folder and all below it. Texts from "a/" up to "a0" are those that begin with "a/": "0" comes after "/". */
export const within = (key, folder) => ({ $or: [{ [key]: folder }, { [key]: { $gte: `${folder}/`, $lt: `${folder}0` } }] });
