// The view that classifies: images, sounds or a text, by labels of one's own, which examples may teach.

import { send } from "./api.js";
import { $, announce, el, iconButton, plural, show } from "./dom.js";
import { deleteSet, labelName, openSet, readLabels, saveSet, savedNames } from "./labelsets.js";
import { droppedFiles, kindOf } from "./media.js";
import { filePart, glimpse, partsIn } from "./parts.js";
import { recordingButton } from "./recording.js";
import { requestBlock } from "./request.js";

const SAVED = "isthmus-labels";
const FIRST = ["a cat", "a cup of coffee", "a person", "coins", "grass", "rain", "a siren", "church bells"];
const MOST = 20;
const UNNAMED = "unnamed";
const DRAGGED = "application/x-isthmus-input";

export function classifyView() {
  const [labels, status, verdicts, setName, rows] = ["labels", "classified", "verdicts", "set-name", "examples"].map($);
  const command = requestBlock($("classify-request"));
  const parts = partsIn($("classify-parts"), { changed: () => {} });
  let examples = new Map(); // label → files that show it
  let stored = null; // the set as the server has it, as text; null where it has none
  let urls = [];
  let exampleUrls = [];
  let dragged = null; // the input that is being dragged to a label
  labels.value = localStorage.getItem(SAVED) ?? FIRST.join("\n");

  const asText = () => JSON.stringify([setName.value.trim(), labels.value,
    [...examples].map(([label, files]) => [label, files.map(({ name, size }) => [name, size])])]);
  const taught = () => readLabels(labels.value).some((label) => examples.get(labelName(label))?.length);

  async function run() {
    const wanted = readLabels(labels.value);
    const text = $("classify-text").value.trim();
    const files = parts.all.map((part) => ({ name: part.name, data: part.file }));
    localStorage.setItem(SAVED, labels.value);
    if (!wanted.length || (!text && !files.length)) {
      show(status, wanted.length ? "Give it an image, a sound or a text" : "Give it a label or two", { bad: true });
      return;
    }
    show(status, "Classifying …");
    try {
      // Examples teach a set that the server stores; labels alone go with the request.
      if (taught() && stored !== asText()) await save({ quiet: true });
      const set = stored === asText() ? setName.value.trim() : null;
      const json = {
        ...(text && { inputs: [text] }),
        ...(set ? { label_set: set } : { labels: wanted }),
        top_k: Math.min(MOST, wanted.length),
        on_error: "null",
        ...($("doubt").checked && { threshold: Number($("threshold").value) }),
      };
      const request = { method: "POST", path: "/classify", json, files };
      command.update(request, parts.all.some((part) => part.made) ? "Save what was recorded or converted here beside it first." : "");
      const { results, warnings } = await send(request);
      const inputs = [...(text ? [{ kind: "text", name: text }] : []), ...parts.all];
      urls.forEach((url) => URL.revokeObjectURL(url));
      urls = [];
      verdicts.replaceChildren(...results.map((result, place) => verdict(inputs[place], result)));
      const bad = results.filter(({ error }) => error).length;
      const said = [`${plural(results.length, "input")}, ${plural(wanted.length, "label")}`, bad && `${plural(bad, "file")} cannot be read`, ...(warnings ?? [])];
      show(status, said.filter(Boolean).join(". "), { bad: bad > 0 || Boolean(warnings) });
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
    if (result.error) {
      return el("li", { class: "verdict" }, el("div", { class: `face ${input.kind}` }, face),
        el("div", {}, el("p", { class: "id" }, input.name), el("p", { class: "bad" }, result.error.detail)));
    }
    const bars = result.labels.map(({ label, score, similarity }) => {
      const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("span"));
      bar.firstChild.style.width = `${100 * score}%`;
      return el("li", { title: `cosine similarity ${similarity.toFixed(3)}` },
        el("span", { class: "label" }, label), bar, el("span", { class: "number" }, score.toFixed(3)));
    });
    const made = el("li", { class: "verdict", draggable: input.file ? "true" : null },
      el("div", { class: `face ${input.kind}` }, face),
      el("div", {}, el("p", { class: "id" }, input.name),
        result.abstained && el("p", { class: "none" }, "None of these, by the score"),
        el("ol", { class: `bars${result.abstained ? " unsure" : ""}`, "aria-label": `Labels of ${input.name}` }, bars)));
    made.addEventListener("dragstart", (event) => {
      dragged = input.file;
      event.dataTransfer.setData(DRAGGED, input.name);
      $("teaching").open = true;
    });
    made.addEventListener("dragend", () => (dragged = null));
    return made;
  }

  async function take(files) {
    const wrong = [];
    for (const file of files) {
      try {
        parts.add(await filePart(file));
      } catch (error) {
        wrong.push(error.message);
      }
    }
    if (files.length > wrong.length) await run();
    if (wrong.length) show(status, [status.textContent, ...wrong].filter(Boolean).join(". "), { bad: true });
  }

  // Examples

  function drawExamples() {
    exampleUrls.forEach((url) => URL.revokeObjectURL(url));
    exampleUrls = [];
    rows.replaceChildren(...readLabels(labels.value).map((label) => exampleRow(labelName(label))));
    const count = [...examples.values()].reduce((sum, files) => sum + files.length, 0);
    $("teaching").querySelector("summary").textContent = `Teach the labels by examples${count ? ` (${count})` : ""}`;
  }

  function exampleRow(label) {
    const files = examples.get(label) ?? [];
    const input = el("input", { type: "file", multiple: true, hidden: true, accept: "image/*,audio/*", "aria-label": `Examples of ${label}` });
    const row = el("li", { class: "example" }, el("strong", {}, label),
      el("span", { class: "shown" }, files.map((file) => exampleTile(label, file))),
      iconButton(`Choose examples of ${label}`, "plus", () => input.click(), { class: "quiet" }), input);
    input.addEventListener("change", () => teach(label, [...input.files]));
    row.addEventListener("dragover", (event) => {
      event.preventDefault();
      event.stopPropagation();
      row.classList.add("over");
    });
    row.addEventListener("dragleave", () => row.classList.remove("over"));
    row.addEventListener("drop", async (event) => {
      event.preventDefault();
      event.stopPropagation();
      document.dispatchEvent(new Event("dropped"));
      if (dragged) return teach(label, [dragged]);
      return teach(label, (await droppedFiles(event.dataTransfer)).map(({ file }) => file));
    });
    return row;
  }

  function exampleTile(label, file) {
    const url = URL.createObjectURL(file);
    exampleUrls.push(url);
    const face = kindOf(file) === "image" ? el("img", { src: url, alt: "", width: 44, height: 44 }) : el("span", { class: "name" }, file.name);
    return el("span", { class: "tile", title: file.name }, face,
      iconButton(`Remove the example ${file.name} of ${label}`, "close", () => {
        examples.set(label, examples.get(label).filter((other) => other !== file));
        drawExamples();
      }, { class: "quiet" }));
  }

  function teach(label, files) {
    const fit = files.filter((file) => ["image", "audio"].includes(kindOf(file)));
    const left = files.filter((file) => !fit.includes(file)).map(({ name }) => name);
    examples.set(label, [...(examples.get(label) ?? []), ...fit]);
    drawExamples();
    const said = `${label} has ${plural(examples.get(label).length, "example")}`;
    show(status, left.length ? `${said}. Left out, as neither picture nor sound: ${left.join(", ")}` : said, { bad: left.length > 0 });
    announce(said);
  }

  // Sets with names

  async function drawSets() {
    const names = await savedNames();
    $("set").replaceChildren(el("option", { value: "" }, names.length ? "A saved set …" : "No set is saved yet"),
      ...names.map((name) => el("option", { value: name }, name)));
    $("set").value = names.includes(setName.value.trim()) ? setName.value.trim() : "";
    $("set").disabled = !names.length;
    $("set-delete").disabled = !$("set").value;
  }

  async function save({ quiet = false } = {}) {
    setName.value = setName.value.trim() || UNNAMED;
    if (!setName.reportValidity()) throw new Error("A set's name has letters, digits, dots, dashes and underscores");
    await saveSet(setName.value, labels.value, examples);
    stored = asText();
    await drawSets();
    if (!quiet) show(status, `The set ${setName.value} is saved: ${plural(readLabels(labels.value).length, "label")}`);
  }

  const trying = (work) => async () => {
    try {
      await work();
    } catch (error) {
      show(status, error.message, { bad: true });
    }
  };

  $("set").addEventListener("change", trying(async () => {
    const name = $("set").value;
    if (!name) return;
    const { text, examples: found, lost } = await openSet(name);
    labels.value = text;
    setName.value = name;
    examples = found;
    drawExamples();
    stored = asText();
    await drawSets();
    const gone = lost ? `. ${plural(lost, "example is", "examples are")} no longer in this browser: the server still knows what they taught, until the set is saved again` : "";
    show(status, `The set ${name} is here${gone}`);
  }));
  $("set-save").addEventListener("click", trying(() => save()));
  $("set-delete").addEventListener("click", trying(async () => {
    const name = $("set").value;
    await deleteSet(name);
    stored = null;
    await drawSets();
    show(status, `The set ${name} is deleted. Its labels are still here, unsaved.`);
  }));
  labels.addEventListener("input", drawExamples);
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
    meter: $("classify-recording"),
  });
  drawExamples();
  return {
    title: "Classify",
    hint: "Drop to classify it, or on a label to teach it",
    zones: true,
    drop: (files) => take(files.map(({ file }) => file)),
    enter: trying(drawSets),
  };
}
