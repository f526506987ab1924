// Many items: in sections by kind or in one flow, more of them as the end comes near, one opened among the others.

import { card, ratioOf } from "./cards.js";
import { deleteItem, isDeleted } from "./deleting.js";
import { openDetail } from "./detail.js";
import { button, el, plural } from "./dom.js";
import { MANY } from "./items.js";
import { forget } from "./previews.js";

const ROWS = 2; // of a section that others follow
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
  let shown = []; // in the order in which the arrow keys go through them
  const waiting = new Map(); // kind → items of it that its section has no room for
  const cards = new Map(); // item → its card
  const sentinel = el("div", { class: "sentinel" });
  let wanting = false;
  const end = new IntersectionObserver(async ([entry]) => {
    if (!entry.isIntersecting || wanting) return;
    wanting = true;
    const came = await more();
    wanting = false;
    if (came) {
      end.unobserve(sentinel); // asked again: the end may still be in sight
      end.observe(sentinel);
    }
  }, { rootMargin: "1200px" });

  const options = () => ({ collection: collection(), place, open: (item) => open(item), like, compose, fit });

  const make = (item) => {
    const made = card(item, options());
    cards.set(item, made);
    return made;
  };

  function open(item, how) {
    const order = [...place.querySelectorAll(".card")].map((element) => [...cards].find(([, made]) => made === element)?.[0]);
    shown = order.filter(Boolean);
    openDetail(shown, item, { collection: collection(), like, compose, fit, remove }, how);
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
    waiting.clear();
    end.disconnect();
    place.replaceChildren();
  }

  return {
    get count() {
      return cards.size;
    },
    clear,
    /** Show `items` from the start. `sections`: [{kind, items, title, all(), note}], else one flow of them. */
    show(items, { sections, label = "Results" } = {}) {
      clear();
      const there = (item) => !isDeleted(item, collection());
      for (const section of sections ?? []) place.append(sectionOf({ ...section, items: section.items.filter(there) }));
      const rest = items.filter((item) => there(item) && !cards.has(item));
      const flow = grid(rest, sections ? "More results" : label);
      if (sections?.length && rest.length) place.append(el("h2", { class: "kinds" }, "More of everything"));
      flow.hidden = !rest.length;
      flow.classList.add("flow");
      place.append(flow, sentinel);
      end.observe(sentinel);
    },
    /** Append items to the flow. */
    add(items) {
      const flow = place.querySelector(".flow");
      const fresh = items.filter((item) => !isDeleted(item, collection()));
      flow.hidden = !fresh.length && flow.hidden;
      flow.lastElementChild.before(...fresh.map(make));
    },
    /** Put something between the items, such as a heading, and let what is added follow it. */
    head(element, label) {
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
