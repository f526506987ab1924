// Many items: in sections by kind or in one flow, more of them as the end comes near, one opened among the others.

import { card, ratioOf } from "./cards.js";
import { deleteItem, isDeleted } from "./deleting.js";
import { openDetail } from "./detail.js";
import { button, el } from "./dom.js";
import { MANY } from "./items.js";
import { forget } from "./previews.js";

const ROWS = 2; // of a section that others follow
const AT_ONCE = 8; // cards, and what fills their last row
const REM = 16; // pixels
const ROW = { image: 12.5 * REM, audio: 6.5 * REM, text: 9 * REM }; // as in app.css
const LOW = { audio: 3, text: 2 }; // what is not looked at takes less height among its own kind
const DOUBTFUL = 0.3; // a further row of what hardly fits is no help
const NARROW = 700; // pixels: two columns of FEW items
const FEW = 6;

/**
 * Fills `place`. `more()` is called when the end comes near, and is to add() what follows; `like`, `compose`, `judge`
 * and `fit` are as for a card; `why()` is a function of openDetail(), where there is a query. What is `fixed` cannot be deleted.
 */
export function gallery(place, { collection, more, like, compose, judge, fit, why, failed, fixed }) {
  const cards = new Map(); // item → its card
  const items = new WeakMap(); // card → its item
  const sentinel = el("div", { class: "sentinel" });
  let wanting = false;
  let round = 0; // how many times it was emptied
  let ended = false; // there is no more to be asked for
  let backlog = []; // items that are here and not shown yet: many cards at once would hold up the scrolling
  let flow = null; // the list that is added to: {list, items, label}
  const end = new IntersectionObserver(async (entries) => {
    if (!entries.at(-1).isIntersecting || wanting) return; // a busy page is told of several changes at once
    wanting = true;
    const asked = round;
    if (backlog.length) pour();
    else {
      const came = await more();
      if (asked === round) ended = !came;
    }
    wanting = false;
    if (!ended || backlog.length) watch();
  }, { rootMargin: "1500px" });

  /** Be told of the end, also where it is in sight already. */
  function watch() {
    end.unobserve(sentinel);
    end.observe(sentinel);
  }

  /** Show some more of what is here: full rows, and the next in a list of its own, for a list is laid out as a whole. */
  function pour(soon = false) {
    const all = [...flow.items, ...backlog];
    const end = wholeRows(all, Math.max(AT_ONCE, flow.items.length + 1));
    const fresh = backlog.splice(0, end - flow.items.length);
    flow.list.lastElementChild.before(...fresh.map((item) => make(item, soon)));
    flow.list.hidden = false;
    flow.items.push(...fresh);
    if (end < all.length) {
      flow.list.lastElementChild.remove(); // the filler
      begin(flow.label);
    }
  }

  /** Let what is added from now on have a list of its own. */
  function begin(label) {
    flow = { list: grid([], label), items: [], label };
    flow.list.hidden = true;
    sentinel.before(flow.list);
  }

  // In rows of another width the lists' last rows would not be full: they become one again.
  let width = 0;
  new ResizeObserver(() => {
    if (width && place.clientWidth && place.clientWidth !== width) {
      for (const list of place.querySelectorAll(".grid + .grid")) {
        const former = list.previousElementSibling;
        former.append(...list.childNodes);
        if (flow.list === list) flow = { ...flow, list: former, items: [...former.querySelectorAll(".card")].map((made) => items.get(made)) };
        former.hidden = list.hidden && former.hidden;
        list.remove();
      }
    }
    width = place.clientWidth || width;
  }).observe(place);

  const options = { place, open: (item) => open(item), like, compose, judge, fit };

  const make = (item, soon) => {
    const made = card(item, { ...options, collection: collection(), soon });
    cards.set(item, made);
    items.set(made, item);
    return made;
  };

  const inOrder = () => [...[...place.querySelectorAll(".card")].map((made) => items.get(made)), ...backlog];

  function open(item, how) {
    const further = async () => {
      const before = cards.size + backlog.length;
      await more();
      return cards.size + backlog.length > before && inOrder();
    };
    openDetail(inOrder(), item, { collection: collection(), like, compose, fit, why: why?.(), judge: judge?.(), remove: !fixed && remove, further }, how);
  }

  /** Hide an item, and delete it if nobody objects. */
  function remove(item) {
    const made = cards.get(item);
    const marker = document.createComment("");
    made?.replaceWith(marker);
    deleteItem(item, collection(), {
      undone: () => marker.replaceWith(made),
      failed(message) {
        marker.replaceWith(made);
        failed(message);
      },
    });
  }

  const grid = (items, label, { kind = "", whole = false } = {}) =>
    el("ul", { class: `grid ${kind}`, "aria-label": label }, items.map((item) => make(item, true)), !whole && filler());
  const filler = () => el("li", { class: "filler", role: "presentation", "aria-hidden": "true" });

  function clear() {
    forget(place);
    flow = null;
    ended = false;
    round++;
    cards.clear();
    backlog = [];
    end.disconnect();
    place.replaceChildren();
  }

  return {
    get count() {
      return cards.size;
    },
    clear,
    /** Show `items` from the start. `sections`: [{kind, items, title, all(), note}], else one flow of them. */
    show(all, { sections, label = "Results" } = {}) {
      clear();
      const there = (item) => !isDeleted(item, collection());
      for (const section of sections ?? []) place.append(sectionOf({ ...section, items: section.items.filter(there) }));
      const rest = all.filter((item) => there(item) && !cards.has(item));
      backlog = rest;
      if (sections?.length && rest.length) place.append(el("h2", { class: "kinds" }, "More of everything"));
      place.append(sentinel);
      begin(sections ? "More results" : label);
      if (rest.length) pour(true);
      end.observe(sentinel);
    },
    /** Append items to the flow: some of them now, the rest as the end comes near. */
    add(more) {
      backlog.push(...more.filter((item) => !isDeleted(item, collection())));
      if (backlog.length) pour();
      watch();
    },
    /** Put something between the items, such as a heading, and let what is added follow it. */
    head(element, label) {
      while (backlog.length) pour();
      sentinel.before(element);
      begin(label);
    },
    find: (id) => [...cards.keys()].find((item) => item.id === id),
    open,
  };

  function sectionOf({ kind, items, title, note, all }) {
    const few = items.slice(0, fitting(items, kind));
    return el("section", { class: "section", "aria-label": MANY[kind] },
      el("div", { class: "row spread" }, el("h2", { class: "kinds" }, title ?? MANY[kind]),
        all && few.length < items.length && button(`All ${(MANY[kind] ?? kind).toLowerCase()}`, null, all, { class: "link" })),
      note && el("p", { class: "help" }, note),
      grid(few, MANY[kind], { kind, whole: few.length < items.length }));
  }

  /** How many of these, `least` or more, fill whole rows; all of them where they end before. */
  function wholeRows(items, least) {
    const width = place.clientWidth;
    if (width < NARROW) return Math.min(items.length, 2 * Math.ceil(least / 2));
    let used = 0;
    for (const [count, item] of items.entries()) {
      const wide = ratioOf(item) * ROW.image;
      if (used && used + REM + wide > width) {
        if (count >= least) return count;
        used = 0;
      }
      used += wide + (used ? REM : 0);
    }
    return items.length;
  }

  /** How many of these are shown of a section that others follow: two whole rows at most. */
  function fitting(items, kind) {
    const width = place.clientWidth;
    if (width < NARROW) return FEW;
    const [row, gap] = [ROW[kind] ?? ROW.image, REM];
    let [rows, used] = [1, 0];
    for (const [count, item] of items.entries()) {
      const wide = (LOW[kind] ?? ratioOf(item)) * row;
      if (used && used + gap + wide > width) {
        if (rows === ROWS || item.confidence < DOUBTFUL) return count;
        [rows, used] = [rows + 1, 0];
      }
      used += wide + (used ? gap : 0);
    }
    return items.length;
  }
}
