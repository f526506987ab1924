// An item as a card: what there is to see or hear of it, its name, its folder and date, and how well it fits.

import { el, icon, iconButton } from "./dom.js";
import { ICONS, dateOf, dayWords, folderOf, kindName, momentWords, nameOf, shortFolder } from "./items.js";
import { player } from "./player.js";
import { plainPreview, previewUrl, whenNear } from "./previews.js";

const [NARROWEST, WIDEST] = [0.72, 2.1]; // of a card, as a share of its height
const RATIOS = { audio: 1.7, text: 1.6, video: 1.6 };

/**
 * The picture of an item, or what stands for it. `place` is what is emptied as a whole with forget(); `soon` fetches the
 * picture at once, not when it comes near.
 */
export function face(item, collection, place, soon) {
  const seen = item.preview;
  if (seen?.media_type?.startsWith("image/")) return picture(item, collection, place, soon);
  if (seen?.media_type?.startsWith("audio/")) {
    const load = () => previewUrl(item, collection, place);
    return player({ name: nameOf(item), peaks: seen.peaks ?? [], seconds: seen.seconds, from: item.moment?.start, load });
  }
  if (seen?.text) return el("blockquote", {}, seen.text);
  return blank(item);
}

const blank = (item) => el("span", { class: "blank" }, icon(ICONS[item.modality] ?? "vector"));

function picture(item, collection, place, soon) {
  const { width, height } = item.preview;
  const image = el("img", { alt: "", width, height, decoding: "async" });
  const gone = () => image.replaceWith(blank(item)); // deleted meanwhile
  const address = plainPreview(item, collection);
  image.addEventListener("error", gone);
  if (address) {
    if (!soon) image.loading = "lazy";
    image.src = address;
  } else {
    whenNear(image, () => previewUrl(item, collection, place).then((href) => (image.src = href), gone));
  }
  return image;
}

/** How wide a card's face is, as a share of its height. */
export function ratioOf(item) {
  const { width, height } = item.preview ?? {};
  const ratio = width && height ? width / height : (RATIOS[item.modality] ?? 1.33);
  return Math.min(WIDEST, Math.max(NARROWEST, ratio));
}

/** A bar from nothing to all: `share` of it is filled, whatever the other results have. */
export function bar(share) {
  const whole = el("span", { class: "bar", "aria-hidden": "true" }, el("span"));
  whole.firstChild.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  return whole;
}

/** Two buttons, made by `make`, that say of a result whether it is what was looked for. */
export function thumbs(item, judge, make) {
  const thumb = (relevant, label) => make(label, relevant ? "good" : "bad", () => judge(item, relevant));
  return judge ? [thumb(true, "More like this for this search"), thumb(false, "Less like this for this search")] : [];
}

/** `open(item)` shows it large; `like` and `compose` ask with it; `judge()` is a function that takes it and whether it is relevant, or null; `fit(item)` is {share, words} of how well it fits. */
export function card(item, { collection, place, open, like, compose, judge, fit, soon, tag = "li" }) {
  const name = nameOf(item);
  const match = fit?.(item);
  const [folder, date] = [folderOf(item), dateOf(item)];
  const made = el(
    tag,
    { class: `card ${item.modality}`, "data-id": item.id },
    el("div", { class: "face" }, face(item, collection, place, soon),
      item.moment && el("span", { class: "moment" }, momentWords(item.moment)),
      item.modality === "video" && el("span", { class: "badge" }, icon("play"))),
    el("div", { class: "about" },
      el("p", { class: "name" },
        el("span", { class: "kind" }, icon(ICONS[item.modality] ?? "vector"), el("span", { class: "hidden" }, kindName(item))),
        open ? el("button", { type: "button", class: "open", title: item.id, onclick: () => open(item) }, name)
          : el("span", { title: item.id }, name)),
      (folder || date) && el("p", { class: "where" },
        folder && el("span", { class: "folder", title: folder }, shortFolder(folder)), date && el("span", {}, dayWords(date))),
      match && el("p", { class: "match", title: match.title }, match.share != null && bar(match.share), el("span", {}, match.words))),
  );
  // Made for the card that is pointed at or focused: among a thousand they would take a third of the work.
  let dressed = !like && !compose;
  const dress = () => {
    if (dressed) return;
    dressed = true;
    made.append(el("p", { class: "acts" },
      like && iconButton(`More like ${name}`, "like", () => like(item)),
      compose && iconButton(`Combine with ${name}`, "plus", () => compose(item)),
      ...thumbs(item, judge?.(), iconButton)));
  };
  for (const event of ["pointerenter", "focusin"]) made.addEventListener(event, dress);
  made.style.setProperty("--ratio", ratioOf(item));
  return made;
}
