// The view that classifies: images, sounds or a text, by labels of one's own.

import { send } from "./api.js";
import { $, el, plural, show } from "./dom.js";
import { filePart, glimpse, partsIn } from "./parts.js";
import { recordingButton } from "./recording.js";
import { requestBlock } from "./request.js";

const SAVED = "isthmus-labels";
const FIRST = ["a cat", "a cup of coffee", "a person", "coins", "grass", "rain", "a siren", "church bells"];
const MOST = 20;

export function classifyView() {
  const [labels, status, verdicts] = ["labels", "classified", "verdicts"].map($);
  const command = requestBlock($("classify-request"));
  const parts = partsIn($("classify-parts"), { changed: () => {} });
  let urls = [];
  labels.value = localStorage.getItem(SAVED) ?? FIRST.join("\n");

  async function run() {
    const wanted = readLabels(labels.value);
    const text = $("classify-text").value.trim();
    const files = parts.all.map((each) => ({ name: each.name, data: each.file }));
    localStorage.setItem(SAVED, labels.value);
    if (!wanted.length || (!text && !files.length)) {
      show(status, wanted.length ? "Give it an image, a sound or a text" : "Give it a label or two", { bad: true });
      return;
    }
    const json = {
      ...(text && { inputs: [text] }),
      labels: wanted,
      top_k: Math.min(MOST, wanted.length),
      ...($("doubt").checked && { threshold: Number($("threshold").value) }),
    };
    const request = { method: "POST", path: "/classify", json, files };
    command.update(request, parts.all.some((each) => each.made) ? "Save what was recorded or converted here beside it first." : "");
    show(status, "Classifying …");
    try {
      const { results, warnings } = await send(request);
      const inputs = [...(text ? [{ kind: "text", name: text }] : []), ...parts.all];
      urls.forEach((each) => URL.revokeObjectURL(each));
      urls = [];
      verdicts.replaceChildren(...results.map((each, place) => verdict(inputs[place], each)));
      const said = `${plural(results.length, "input")}, ${plural(wanted.length, "label")}`;
      show(status, [said, ...(warnings ?? [])].join(" – "), { bad: Boolean(warnings) });
    } catch (error) {
      verdicts.replaceChildren();
      show(status, error.message, { bad: true });
    }
  }

  function verdict(input, result) {
    let face = el("blockquote", {}, input.name);
    if (input.file) {
      const url = URL.createObjectURL(input.file);
      urls.push(url);
      face = glimpse(input, url);
    }
    const bars = result.labels.map(({ label, score, similarity }) => {
      const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("span"));
      bar.firstChild.style.width = `${100 * score}%`;
      return el("li", { title: `cosine similarity ${similarity.toFixed(3)}` },
        el("span", { class: "label" }, label), bar, el("span", { class: "number" }, score.toFixed(3)));
    });
    return el("li", { class: "verdict" },
      el("div", { class: `face ${input.kind}` }, face),
      el("div", {}, el("p", { class: "id" }, input.name),
        result.abstained && el("p", { class: "none" }, "None of these, by the score"),
        el("ol", { class: `bars${result.abstained ? " unsure" : ""}`, "aria-label": `Labels of ${input.name}` }, bars)));
  }

  async function take(files) {
    try {
      for (const file of files) parts.add(await filePart(file));
    } catch (error) {
      show(status, error.message, { bad: true });
      return;
    }
    if (files.length) await run();
  }

  $("label").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  $("classify-choose").addEventListener("click", () => $("classify-file").click());
  $("classify-file").addEventListener("change", () => {
    take([...$("classify-file").files]);
    $("classify-file").value = "";
  });
  recordingButton($("classify-record"), {
    taken: (file) => take([file]),
    failed: (error) => show(status, error.message, { bad: true }),
    label: $("classify-record").querySelector("span"),
  });
  return { title: "Classify", hint: "Drop to classify it", drop: (files) => take(files.map(({ file }) => file)), enter() {} };
}

/** "name", or "name: prompt | prompt". */
function readLabels(text) {
  const lines = text.split("\n").map((each) => each.trim()).filter(Boolean);
  return lines.map((line) => {
    const [name, rest] = line.split(/:(.*)/s).map((each) => each.trim());
    const prompts = rest ? rest.split("|").map((each) => each.trim()).filter(Boolean) : [];
    return prompts.length && name ? { name, prompts } : line;
  });
}
