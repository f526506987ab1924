// One item, large: what it is, all that is known of it, and what can be done with it. Arrow keys go to its neighbours.

import { blob, key, pathOf, plainAddress, send } from "./api.js";
import { bar, face, thumbs } from "./cards.js";
import { isDeleted } from "./deleting.js";
import { $, announce, button, clock, el } from "./dom.js";
import { bytesWords, dateOf, factsOf, folderOf, kindName, momentWords, nameOf, sizeOf, timeWords } from "./items.js";
import { stopPlaying } from "./player.js";
import { forget, keepUrl, previewUrl } from "./previews.js";
import { moveToast } from "./toast.js";
import { heatMap, whyText } from "./why.js";
import { zooming } from "./zooming.js";

const LARGEST_BLOB = 200e6; // an original that is fetched as a whole, because a key must go with it
const BLOWN_UP = 3;
const SHOWN = /^image\/(jpeg|png|webp|gif|avif|bmp)$/; // by every browser

let current = null; // {items, item, options, zoom, loading, ended}
const dialog = $("detail");

/**
 * Open `item` among `items`. `options`: {collection, like, compose, fit, why, judge, remove, further}, where why(item, signal) asks the server and further() is all the items
 * with more of them, or false at the end; `remembered` is false where the address names it already.
 */
export function openDetail(items, item, options, { remembered = true } = {}) {
  current = { items, options, ended: !options.further };
  if (!dialog.open) {
    dialog.showModal();
    moveToast();
    if (remembered) history.pushState({ detail: true }, "", addressOf(item.id));
  }
  show(item);
}

/** Close it without a step in the history: the address has changed already. */
export function closeDetail() {
  if (dialog.open) dialog.close();
}

export const isOpen = () => dialog.open;

function addressOf(id) {
  const [path, query] = (location.hash || "#/search").split("?");
  const asked = new URLSearchParams(query);
  if (id == null) asked.delete("open");
  else asked.set("open", id);
  return asked.size ? `${path}?${asked}` : path;
}

/** Closed by the person: the history goes back to where it was opened, if it was opened here. */
function leave() {
  if (history.state?.detail) history.back();
  else history.replaceState(null, "", addressOf(null));
  closeDetail();
}

async function step(by) {
  const { item, options } = current;
  const beside = () => current.items[current.items.indexOf(item) + by];
  if (!beside() && by > 0 && !current.ended) {
    const all = (await options.further?.()) || null;
    if (current.item !== item) return;
    current.items = all ?? current.items;
    current.ended = !all;
  }
  const next = beside();
  if (!next) {
    dressPlace();
    return;
  }
  history.replaceState(history.state, "", addressOf(next.id));
  show(next);
  announce(`${kindName(next)} ${nameOf(next)}`);
}

function show(item) {
  const { options } = current;
  current.loading?.abort();
  current.loading = new AbortController();
  current.item = item;
  current.zoom = null;
  $("why").replaceChildren();
  forget($("stage"));
  $("detail-name").textContent = nameOf(item);
  dressPlace();
  $("stage-media").replaceChildren(media(item));
  dressZoom();
  dressActions(item, options);
  describe(item);
  complete(item, options, current.loading.signal);
}

/** Which of how many it is, and whether there are others. */
function dressPlace() {
  const { items, item, ended } = current;
  const place = items.indexOf(item);
  $("detail-place").textContent = items.length > 1 ? `${place + 1} of ${items.length}` : "";
  $("previous").disabled = place <= 0;
  $("next").disabled = ended && place >= items.length - 1;
}

// What there is to see or hear

function media(item) {
  const { collection } = current.options;
  const { preview } = item;
  if (preview?.media_type?.startsWith("image/")) return picture(item, collection);
  const made = el("div", { class: `large ${item.modality}` }, face(item, collection, $("stage")));
  if (!preview?.media_type && !preview?.text) made.append(el("p", {}, `There is no preview of this ${kindName(item).toLowerCase()}.`));
  return made;
}

function picture(item, collection) {
  const { width, height } = item.preview;
  const image = el("img", { alt: nameOf(item), width, height, class: "whole", draggable: "false" });
  previewUrl(item, collection, $("stage")).then(
    (href) => (image.src ||= href),
    () => image.replaceWith(el("p", {}, "The preview of this picture is gone.")),
  );
  limit(image, width, height);
  const frame = el("div", { class: "frame" }, image);
  current.zoom = zooming(frame, image, { swiped: step });
  return frame;
}

/** A small picture is not blown up to a wall of blocks. */
function limit(image, width, height) {
  image.style.maxWidth = `${BLOWN_UP * width}px`;
  image.style.maxHeight = `${BLOWN_UP * height}px`;
}

function dressZoom() {
  for (const id of ["larger", "smaller", "whole"]) $(id).hidden = !current.zoom;
}

/** What only the server knows: when it was stored, and its original where the operator lends it. */
async function complete(item, options, signal) {
  const { collection } = options;
  try {
    const query = { collection, include: "original" };
    const whole = await send({ path: pathOf("/items", item.id), query }, signal);
    if (current.item !== item) return;
    Object.assign(item, { created: whole.created, updated: whole.updated, original: whole.original, metadata: whole.metadata });
    describe(item);
    dressActions(item, options);
    if (item.original) await showOriginal(item, collection, signal);
  } catch (error) {
    if (error.name === "AbortError" || current.item !== item) return;
    const gone = error.status === 404 && !isDeleted(item, collection);
    $("facts").prepend(el("p", { class: "status bad" }, gone ? "This item has been deleted meanwhile." : error.message));
  }
}

async function showOriginal(item, collection, signal) {
  const source = await originalUrl(item, collection, signal);
  if (!source || current.item !== item) return;
  if (SHOWN.test(item.original) && item.modality === "image") {
    const image = $("stage-media").querySelector("img.whole");
    const sharp = new Image();
    sharp.src = source;
    await sharp.decode().catch(() => null); // the preview stays where the browser cannot read it
    if (image && sharp.naturalWidth && current.item === item) {
      image.src = source;
      for (const part of image.parentElement.children) limit(part, sharp.naturalWidth, sharp.naturalHeight);
      current.zoom?.draw();
      describe(item, `${sharp.naturalWidth} × ${sharp.naturalHeight} pixels`);
    }
  } else if (/^(video|audio)\//.test(item.original)) {
    const film = el(item.original.startsWith("video/") ? "video" : "audio", { controls: true, preload: "metadata", class: "film", "aria-label": nameOf(item) });
    film.addEventListener("error", () => film.replaceWith(el("p", {}, "This browser cannot play the original. Download it to play it elsewhere.")));
    film.addEventListener("loadedmetadata", () => (film.currentTime = item.moment?.start ?? 0), { once: true });
    film.src = source;
    stopPlaying();
    $("stage-media").replaceChildren(film);
  }
}

const originalRequest = (item, collection) => ({ path: pathOf("/media", item.id), query: { collection } });

/** An address that needs no key: the server's own, or one of this page where a key must be sent. */
async function originalUrl(item, collection, signal) {
  if (!key.get()) return plainAddress(originalRequest(item, collection));
  const size = sizeOf(item);
  if (size > LARGEST_BLOB) return null;
  return keepUrl(await blob(originalRequest(item, collection), signal), $("stage"));
}

// What is known of it

function describe(item, pixels) {
  const [folder, date, size] = [folderOf(item), dateOf(item), sizeOf(item)];
  const { preview = {} } = item;
  const seconds = preview?.whole_seconds ?? preview?.seconds;
  const rows = [
    ["Kind", kindName(item)],
    folder && ["Folder", folder],
    date && ["Date", timeWords(date)],
    pixels && ["Size", pixels],
    seconds && ["Length", clock(seconds)],
    size && ["File", bytesWords(size)],
    item.moment && ["Best moment", momentWords(item.moment)],
    item.created && ["Stored here", new Date(item.created).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" })],
    preview?.mapped != null && ["Vector", `mapped from another model's, about ${preview.mapped.toFixed(2)} off (1 - cosine)`],
    ["Id", item.id],
  ].filter(Boolean);
  const list = (pairs) => el("dl", { class: "pairs" }, pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  const facts = factsOf(item);
  const match = current.options.fit?.(item);
  $("facts").replaceChildren(
    ...[
      match && match.share != null && el("div", { class: "match" }, bar(match.share), el("span", {}, match.words)),
      match && el("p", { class: "help" }, match.title),
      list(rows),
      facts.length > 0 && el("h3", { class: "sub" }, "Metadata"),
      facts.length > 0 && list(facts),
    ].filter(Boolean),
  );
}

async function explain(item, why) {
  $("why").replaceChildren(el("p", { class: "help" }, "Asking …"));
  try {
    const reasons = await why(item, current.loading.signal);
    if (current.item !== item) return;
    $("stage-media").querySelector(".heat")?.remove();
    const image = $("stage-media").querySelector("img.whole");
    if (reasons?.cells && image) {
      const heat = heatMap(reasons.cells, image.width, image.height);
      limit(heat, image.naturalWidth, image.naturalHeight);
      image.after(heat);
      current.zoom?.draw();
    }
    const film = () => $("stage-media").querySelector("video, audio");
    $("why").replaceChildren(...whyText(reasons, (seconds) => film() && (film().currentTime = seconds)));
  } catch (error) {
    if (error.name !== "AbortError" && current.item === item) $("why").replaceChildren(el("p", { class: "status bad" }, error.message));
  }
}

// What can be done with it

function dressActions(item, { collection, like, compose, why, judge, remove }) {
  const name = nameOf(item);
  const close = (then) => () => {
    history.replaceState(null, "", addressOf(null));
    closeDetail();
    then(item);
  };
  const has = item.original || item.preview?.media_type;
  $("detail-acts").replaceChildren(
    ...[
      like && button("Similar", "like", close(like), { "aria-label": `More like ${name}` }),
      compose && button("Combine", "plus", close(compose), { "aria-label": `Combine with ${name}` }),
      why && button("Why?", "search", () => explain(item, why), { title: "Show what in it and in the query made it a result" }),
      ...thumbs(item, judge, (label, name, act) => button(name === "good" ? "More" : "Less", name, act, { title: label, "aria-label": label })),
      has && button("Open", "open", () => openOutside(item, collection), { title: item.original ? "Open the original" : "Open the preview" }),
      has && button("Download", "download", () => download(item, collection), { title: item.original ? "Download the original" : "Download the preview: this server does not lend the original" }),
      remove && button("Delete", "bin", () => removeIt(item, remove), { class: "danger" }),
    ].filter(Boolean),
  );
}

const outsideUrl = (item, collection) => (item.original ? originalUrl(item, collection) : previewUrl(item, collection, $("stage")));

async function openOutside(item, collection) {
  const opened = window.open("about:blank", "_blank");
  try {
    const href = await outsideUrl(item, collection);
    if (opened && href) opened.location.href = href;
  } catch (error) {
    opened?.close();
    announce(error.message);
  }
}

async function download(item, collection) {
  try {
    const href = await outsideUrl(item, collection);
    if (!href) return;
    const ending = { "image/jpeg": ".jpg", "image/webp": ".webp", "audio/mpeg": ".mp3" }[item.preview?.media_type] ?? "";
    const name = item.original ? nameOf(item) : nameOf(item).replace(/\.[^.]*$/, "") + ending;
    el("a", { href, download: name }).click();
  } catch (error) {
    announce(error.message);
  }
}

function removeIt(item, remove) {
  const { items } = current;
  const place = items.indexOf(item);
  const next = items[place + 1] ?? items[place - 1];
  current.items = items.filter((other) => other !== item);
  remove(item);
  if (!next) return leave();
  history.replaceState(history.state, "", addressOf(next.id));
  show(next);
}

// Moving about

$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("detail-close").addEventListener("click", leave);
$("larger").addEventListener("click", () => current.zoom?.in());
$("smaller").addEventListener("click", () => current.zoom?.out());
$("whole").addEventListener("click", () => current.zoom?.whole());
dialog.addEventListener("cancel", (event) => {
  event.preventDefault();
  leave();
});
dialog.addEventListener("close", () => {
  forget($("stage"));
  current.loading?.abort();
  $("stage-media").replaceChildren();
  moveToast();
});
document.addEventListener("keydown", (event) => {
  if (!dialog.open || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, video, audio")) return;
  const { zoom, item, options } = current;
  const does = {
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    "+": () => zoom?.in(),
    "=": () => zoom?.in(),
    "-": () => zoom?.out(),
    0: () => zoom?.whole(),
    Delete: () => options.remove && removeIt(item, options.remove),
  }[event.key];
  if (!does) return;
  event.preventDefault();
  does();
});
