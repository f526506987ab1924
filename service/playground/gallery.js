// Many items: in sections by kind or in one flow, more of them as the end comes near, one opened among the others.

import { card, ratioOf } from "./cards.js";
import { deleteItem, isDeleted } from "./deleting.js";
import { openDetail } from "./detail.js";
import { button, el } from "./dom.js";
import { MANY } from "./items.js";
import { forget } from "./previews.js";

const ROWS = 2; // of a section that others follow
const AT_ONCE = 24; // cards
const REM = 16; // pixels
const ROW = { image: 12.5 * REM, audio: 6.5 * REM, text: 9 * REM }; // as in app.css
const LOW = { audio: 3, text: 2 }; // what is not looked at takes less height among its own kind
const DOUBTFUL = 0.3; // a further row of what hardly fits is no help
const NARROW = 700; // pixels: two columns of FEW items
const FEW = 6;

/**
 * Fills `place`. `more()` is called when the end comes near, and is to add() what follows; `like`, `compose` and `fit`
 * are as for a card.
 */
export function gallery(place, { collection, more, like, compose, fit, failed }) {
  const cards = new Map(); // item → its card
  const items = new WeakMap(); // card → its item
  const sentinel = el("div", { class: "sentinel" });
  let wanting = false;
  let backlog = []; // items that are here and not shown yet: many cards at once would hold up the scrolling
  const end = new IntersectionObserver(async ([entry]) => {
    if (!entry.isIntersecting || wanting) return;
    wanting = true;
    const came = backlog.length ? pour() : await more();
    wanting = false;
    if (came || backlog.length) watch();
  }, { rootMargin: "1500px" });

  /** Be told of the end, also where it is in sight already. */
  function watch() {
    end.unobserve(sentinel);
    end.observe(sentinel);
  }

  function pour() {
    place.querySelector(".flow").lastElementChild.before(...backlog.splice(0, AT_ONCE).map(make));
    return true;
  }

  const options = () => ({ collection: collection(), place, open: (item) => open(item), like, compose, fit });

  const make = (item) => {
    const made = card(item, options());
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
    openDetail(inOrder(), item, { collection: collection(), like, compose, fit, remove, further }, how);
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
    el("ul", { class: `grid ${kind}`, "aria-label": label }, items.map(make), !whole && filler());
  const filler = () => el("li", { class: "filler", role: "presentation", "aria-hidden": "true" });

  function clear() {
    forget(place);
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
      const flow = grid(rest.slice(0, AT_ONCE), sections ? "More results" : label);
      backlog = rest.slice(AT_ONCE);
      if (sections?.length && rest.length) place.append(el("h2", { class: "kinds" }, "More of everything"));
      flow.hidden = !rest.length;
      flow.classList.add("flow");
      place.append(flow, sentinel);
      end.observe(sentinel);
    },
    /** Append items to the flow: some of them now, the rest as the end comes near. */
    add(more) {
      const fresh = more.filter((item) => !isDeleted(item, collection()));
      const flow = place.querySelector(".flow");
      flow.hidden &&= !fresh.length;
      backlog.push(...fresh);
      pour();
      watch();
    },
    /** Put something between the items, such as a heading, and let what is added follow it. */
    head(element, label) {
      while (backlog.length) pour();
      place.querySelector(".flow")?.classList.remove("flow");
      const flow = grid([], label);
      flow.classList.add("flow");
      sentinel.before(element, flow);
    },
    find: (id) => [...cards.keys()].find((item) => item.id === id),
    open,
    finish() {
      end.disconnect();
    },
  };

  function sectionOf({ kind, items, title, note, all }) {
    const few = items.slice(0, fitting(items, kind));
    return el("section", { class: "section", "aria-label": MANY[kind] },
      el("div", { class: "row spread" }, el("h2", { class: "kinds" }, title ?? MANY[kind]),
        all && few.length < items.length && button(`All ${(MANY[kind] ?? kind).toLowerCase()}`, null, all, { class: "link" })),
      note && el("p", { class: "help" }, note),
      grid(few, MANY[kind], { kind, whole: few.length < items.length }));
  }

  /** How many of these fill whole rows. */
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
