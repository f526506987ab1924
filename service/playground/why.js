// Why a result was found: a heat map over its picture, its sound's or film's best seconds, and the words that count.

import { clock, el } from "./dom.js";

const HOTTEST = 0.6; // opacity of the most similar cell
const STRONG = 0.1; // a word that gives so much is shaded whole

/** A canvas of the picture's proportions; the warmer a place, the more it is like the query. */
export function heatMap(cells, width, height) {
  const [rows, columns] = [cells.length, cells[0].length];
  const small = el("canvas", { width: columns, height: rows });
  const pixels = new ImageData(columns, rows);
  const [low, high] = [Math.min(...cells.flat()), Math.max(...cells.flat())];
  cells.flat().forEach((value, place) => pixels.data.set([255, 90, 0, 255 * HOTTEST * ((value - low) / (high - low || 1)) ** 2], 4 * place));
  small.getContext("2d").putImageData(pixels, 0, 0);
  const heat = el("canvas", { width, height, class: "heat", role: "img", "aria-label": `Most like the query: ${placeWords(cells)}` });
  const context = heat.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, width, height);
  return heat;
}

function placeWords(cells) {
  const place = cells.flat().indexOf(Math.max(...cells.flat()));
  const third = (index, count, names) => names[Math.floor((3 * (index + 0.5)) / count)];
  const columns = cells[0].length;
  const words = [third(Math.floor(place / columns), cells.length, ["top", "", "bottom"]), third(place % columns, columns, ["left", "", "right"])];
  return words.filter(Boolean).join(" ") || "the middle";
}

function shared(percent, element) {
  element.style.setProperty("--share", `${percent}%`);
  return element;
}

/** What is said beside it. `seek(seconds)` goes to a part. */
export function whyText(why, seek) {
  const { parts = [], words = [] } = why ?? {};
  const said = [el("h3", { class: "sub" }, "Why")];
  if (why?.cells) said.push(el("p", { class: "help" }, `Most like the query: ${placeWords(why.cells)}.`));
  if (words.length) {
    said.push(el("p", { class: "why-words" }, words.flatMap(({ text, contribution }) => {
      const share = Math.round(100 * Math.min(1, Math.max(0, contribution / STRONG)));
      return [shared(share, el("mark", { title: `It gives ${contribution.toFixed(3)} to the similarity` }, text)), " "];
    })));
  }
  if (parts.length) {
    const [low, high] = [Math.min, Math.max].map((of) => of(...parts.map(({ similarity }) => similarity)));
    said.push(el("p", { class: "why-parts" }, parts.map(({ start, end, modality, similarity }) => {
      const name = `${clock(start)} to ${clock(end)}, ${modality === "image" ? "picture" : "sound"}: ${similarity.toFixed(2)}`;
      const share = Math.round(10 + (90 * (similarity - low)) / (high - low || 1));
      return shared(share, el("button", { type: "button", title: name, "aria-label": name, onclick: () => seek(start) }));
    })));
  }
  if (said.length === 1) said.push(el("p", { class: "help" }, "Nothing is at hand to tell: there is no preview of this item."));
  return said;
}
