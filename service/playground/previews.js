// The small pictures and sounds that the server keeps of its items: fetched when they come near, let go with their cards.

import { blob, key, pathOf, plainAddress } from "./api.js";
import { stopPlaying } from "./player.js";

const urls = new Map(); // a place that is emptied as a whole → the object URLs in it
const arrivals = new WeakMap();
let replacements = 0; // how often this page stored items, perhaps in the place of others
const near = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => arrive(target)),
  { rootMargin: "600px" },
);

function arrive(element) {
  near.unobserve(element);
  arrivals.get(element)?.();
}

/** Do `work` when the element comes near to what is seen. */
export function whenNear(element, work) {
  arrivals.set(element, work);
  near.observe(element);
}

/** Let go of the media of a place whose cards are no longer shown. */
export function forget(place) {
  stopPlaying();
  for (const image of place.querySelectorAll("img:not([src])")) near.unobserve(image);
  for (const href of urls.get(place) ?? []) URL.revokeObjectURL(href);
  urls.delete(place);
}

/** An object URL of an item's preview, which lasts until its place is emptied. */
export async function previewUrl(item, collection, place) {
  return keepUrl(await blob(previewRequest(item, collection)), place);
}

export const previewRequest = (item, collection) => ({ path: pathOf("/previews", item.id), query: { collection } });

/** The address of a preview, for an element that fetches it itself; null where that takes a key. */
export function plainPreview(item, collection) {
  if (key.get()) return null;
  const { path, query } = previewRequest(item, collection);
  return plainAddress({ path, query: replacements ? { ...query, replacements } : query });
}

/** Give previews new addresses: a page shows what it has of an address without asking whether it changed. */
export function renewPreviews() {
  replacements += 1;
}

export function keepUrl(data, place) {
  const href = URL.createObjectURL(data);
  if (!urls.has(place)) urls.set(place, []);
  urls.get(place).push(href);
  return href;
}
