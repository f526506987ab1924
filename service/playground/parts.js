// The parts of a query, or the inputs of a classification, as tiles.

import { blob } from "./api.js";
import { el, icon, iconButton } from "./dom.js";
import { ICONS } from "./items.js";
import { PEAKS, kindOf, readable, waveform } from "./media.js";
import { player, stopPlaying } from "./player.js";
import { previewRequest } from "./previews.js";

/** A file as a part: {kind: "image" | "audio" | "video" | "array", file, name}. Throws where it is none of them. */
export async function filePart(given) {
  const kind = kindOf(given);
  if (!["image", "audio", "video", "array"].includes(kind)) throw new Error(`${given.name} is no picture, sound or video`);
  const file = await readable(given);
  const wave = kind === "audio" ? await waveform(file) : null;
  return { kind, file, name: file.name, wave, made: file !== given || given.name.startsWith("recording-") };
}

/** What a part looks or sounds like. */
export function glimpse(part, url, collection) {
  if (part.kind === "image") {
    const image = el("img", { src: url, alt: "" }); // its name stands beside it
    image.addEventListener("error", () => image.replaceWith(icon("image"))); // TIFF, in most browsers
    return image;
  }
  if (part.kind === "audio") {
    const { peaks, seconds } = part.wave ?? { peaks: Array(PEAKS).fill(40), seconds: 0 };
    return player({ name: part.name, peaks, seconds, load: async () => url });
  }
  const blank = el("span", { class: "blank" }, icon(ICONS[part.modality ?? part.kind] ?? "vector"));
  if (part.seen) blob(previewRequest(part, collection())).then((data) => {
    const image = el("img", { src: URL.createObjectURL(data), alt: "" });
    image.addEventListener("load", () => URL.revokeObjectURL(image.src));
    blank.replaceWith(image);
  }, () => {}); // the icon stays
  return blank;
}

/** Keeps tiles in `place`, with weights if they are `weighted`; `changed` is told of every change. */
export function partsIn(place, { weighted = false, changed, collection }) {
  let parts = [];

  const weightOf = (part) => {
    const output = el("output", { class: "weight" }, signed(part.weight));
    const slider = el("input", {
      type: "range", min: -1, max: 1, step: 0.1, value: part.weight, "aria-label": `Weight of ${part.name}`,
    });
    slider.addEventListener("input", () => {
      part.weight = Number(slider.value);
      output.textContent = signed(part.weight);
    });
    slider.addEventListener("change", changed);
    return el("span", { class: "weigh" }, slider, output);
  };

  const tile = (part) => {
    const url = part.file && URL.createObjectURL(part.file);
    const remove = iconButton(`Remove ${part.name}`, "close", () => api.remove(part), { class: "quiet" });
    const name = el("span", { class: "name", title: part.name }, part.name);
    const write = part.kind === "text" && !part.fixed;
    const words = write && el("input", { type: "text", value: part.text, "aria-label": "Another text", placeholder: "and …" });
    if (words) {
      words.addEventListener("input", () => (part.text = words.value));
      words.addEventListener("change", changed);
    }
    const save = part.made && el("a", { href: url, download: part.name, class: "save" }, "Save");
    const made = el("li", { class: `part ${part.fixed ? "fixed" : part.kind}` },
      part.kind !== "text" && el("span", { class: "glimpse" }, glimpse(part, url, collection)),
      words || name, save, weighted && weightOf(part), !part.fixed && remove);
    return Object.assign(part, { element: made, url });
  };

  const api = {
    get all() {
      return parts;
    },
    add(part) {
      const whole = tile({ weight: 1, ...part });
      if (part.fixed) {
        parts.unshift(whole);
        place.prepend(whole.element);
      } else {
        parts.push(whole);
        place.append(whole.element);
      }
      return whole;
    },
    remove(part) {
      parts = parts.filter((each) => each !== part);
      if (part.kind === "audio") stopPlaying();
      part.element.remove();
      if (part.url) URL.revokeObjectURL(part.url);
      changed();
    },
    /** Mark a part as one that cannot be used, and say why. */
    spoil(part, why) {
      part.bad = true;
      part.element.classList.add("spoilt");
      part.element.querySelector(".name").after(el("span", { class: "bad" }, why));
    },
    clear(keep = () => false) {
      for (const part of parts.filter((each) => !keep(each))) {
        part.element.remove();
        if (part.url) URL.revokeObjectURL(part.url);
      }
      parts = parts.filter(keep);
    },
  };
  return api;
}

const signed = (weight) => (weight > 0 ? "+" : weight < 0 ? "−" : "") + Math.abs(weight).toFixed(1);
