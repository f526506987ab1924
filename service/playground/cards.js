// An item as a card: what there is to see or hear of it, its score, its id and metadata, and what can be done with it.

import { blob, pathOf } from "./api.js";
import { button, el, icon, iconButton } from "./dom.js";
import { player, stopPlaying } from "./player.js";

export const KINDS = { image: "Image", audio: "Sound", text: "Text", vector: "Vector" };
export const ICONS = { image: "image", audio: "sound", text: "text", vector: "vector" };
const SHOWN = 4;

const held = new Map(); // what is emptied as a whole → the object URLs in it
const near = new IntersectionObserver(
  (entries) => entries.filter((each) => each.isIntersecting).forEach((each) => arrive(each.target)),
  { rootMargin: "400px" },
);
const arrivals = new WeakMap();

function arrive(element) {
  near.unobserve(element);
  arrivals.get(element)?.();
}

/** Let go of the media of cards that are no longer shown. */
export function forget(place) {
  stopPlaying();
  for (const image of place.querySelectorAll("img.waiting")) near.unobserve(image);
  for (const href of held.get(place) ?? []) URL.revokeObjectURL(href);
  held.delete(place);
}

async function mediaUrl(item, collection, place) {
  const data = await blob({ path: pathOf("/previews", item.id), query: { collection } });
  const href = URL.createObjectURL(data);
  held.set(place, [...(held.get(place) ?? []), href]);
  return href;
}

function picture(item, collection, place) {
  const { width, height } = item.preview;
  const image = el("img", { alt: "", width, height, class: "waiting" });
  arrivals.set(image, async () => {
    try {
      image.src = await mediaUrl(item, collection, place);
      image.classList.remove("waiting");
    } catch {
      image.replaceWith(blank(item)); // deleted meanwhile
    }
  });
  near.observe(image);
  return image;
}

const blank = (item) => el("span", { class: "blank" }, icon(ICONS[item.modality] ?? "vector"));

function face(item, collection, place) {
  const seen = item.preview;
  if (seen?.media_type === "image/webp") return picture(item, collection, place);
  if (seen?.media_type === "audio/mpeg") {
    const load = () => mediaUrl(item, collection, place);
    return player({ name: item.id, peaks: seen.peaks ?? [], seconds: seen.seconds, load });
  }
  if (seen?.text) return el("blockquote", {}, seen.text);
  return blank(item);
}

/** A metadata value in a line. */
const said = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function facts(metadata) {
  const pairs = Object.entries(metadata ?? {});
  const list = (some) => some.map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, said(value))));
  if (!pairs.length) return null;
  const rest = pairs.slice(SHOWN);
  return [
    el("dl", {}, list(pairs.slice(0, SHOWN))),
    rest.length > 0 &&
      el("details", { class: "rest" }, el("summary", {}, `${rest.length} more`), el("dl", {}, list(rest))),
  ];
}

/** `place` is what is emptied as a whole with forget(); `best` the first result's score, which is a whole bar. */
export function card(item, { collection, place, best, like, compose, tag = "li" }) {
  const kind = KINDS[item.modality] ?? item.modality;
  const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("span"));
  if (best > 0) bar.firstChild.style.width = `${Math.max(2, Math.min(100, (100 * item.score) / best))}%`;
  return el(
    tag,
    { class: `card ${item.modality}` },
    el("div", { class: "face" }, face(item, collection, place)),
    el(
      "div",
      { class: "about" },
      item.score != null &&
        el("p", { class: "score" }, bar, el("span", { class: "hidden" }, "Score "), item.score.toFixed(3)),
      el("p", { class: "id", title: item.id }, el("span", { class: "kind" }, icon(ICONS[item.modality] ?? "vector"), el("span", { class: "hidden" }, kind)), el("span", {}, item.id)),
      facts(item.metadata),
      el(
        "p",
        { class: "acts" },
        button("More like this", "like", () => like(item), { "aria-label": `More like ${item.id}` }),
        compose && iconButton(`Combine with ${item.id}`, "plus", () => compose(item)),
      ),
    ),
  );
}
