// The view that adds: a folder's files, some at a time, with progress and what is wrong with each that is refused.

import { pathOf, send } from "./api.js";
import { $, el, plural, show } from "./dom.js";
import { takenAt } from "./exif.js";
import { gallery } from "./gallery.js";
import { DATE, FOLDER, MONTH, bytesWords } from "./items.js";
import { kindOf, readable } from "./media.js";
import { renewPreviews } from "./previews.js";
import { requestBlock } from "./request.js";

const BATCH = 12;
const BATCH_BYTES = 6e6;
const AT_ONCE = 2;
const TRIES = 6;
const SHOWN = 200;
const PICTURED = 48;

export function addView(app) {
  const [status, progress, refusals, target] = ["added", "progress", "refusals", "target"].map($);
  const command = requestBlock($("add-request"));
  let waiting = [];
  let running = null;
  let last = "default"; // the collection that was added to
  const arrivals = gallery($("arrivals"), {
    collection: () => last, like: (item) => app.like(item), compose: (item) => app.compose(item), more: async () => false,
    failed: (message) => show(status, message, { bad: true }),
  });

  /** files: [{path, file}] */
  function take(files) {
    if (running) return;
    const hidden = ({ path }) => path.split("/").some((step) => step.startsWith("."));
    waiting = files.filter((given) => kindOf(given.file) && !hidden(given));
    const others = files.filter((given) => !waiting.includes(given));
    const bytes = waiting.reduce((sum, { file }) => sum + file.size, 0);
    const left = others.length ? `; ${plural(others.length, "other file is", "other files are")} left out` : "";
    show(status, waiting.length ? `${plural(waiting.length, "file")}, ${bytesWords(bytes)}${left}` : `Nothing there that is a picture, a video, a sound or a text${left}`, { bad: !waiting.length });
    $("left").hidden = !others.length;
    $("left").firstElementChild.textContent = `Left out: ${plural(others.length, "file")}`;
    $("left-out").replaceChildren(
      ...others.slice(0, SHOWN).map((given) => el("li", {}, el("strong", {}, given.path), hidden(given) ? " its name or folder begins with a dot" : " is no picture, video, sound or text")),
      others.length > SHOWN ? el("li", {}, `and ${plural(others.length - SHOWN, "other")}`) : "");
    arrivals.clear();
    $("start").disabled = !waiting.length;
    $("start").textContent = waiting.length ? `Add ${plural(waiting.length, "file")}` : "Add";
    $("refused").hidden = true;
    refusals.replaceChildren();
    progress.hidden = true;
    if (waiting.length) $("start").focus();
  }

  async function run() {
    const files = waiting;
    const collection = target.value;
    const began = performance.now();
    const tally = { added: 0, refused: 0, drawn: 0, ids: [] };
    last = collection;
    running = new AbortController();
    const { signal } = running;
    busy(true);
    const refuse = (path, why) => {
      tally.refused++;
      $("refused").hidden = false;
      if (tally.refused <= SHOWN) refusals.append(el("li", {}, el("strong", {}, path), ` ${why}`));
    };
    const draw = (force) => {
      const done = tally.added + tally.refused;
      progress.value = done / files.length;
      if (!force && performance.now() - tally.drawn < 1000) return;
      tally.drawn = performance.now();
      const rate = done / ((performance.now() - began) / 1000);
      const left = rate > 0 ? `, about ${Math.ceil((files.length - done) / rate)} s left` : "";
      show(status, `${done} of ${plural(files.length, "file")}${left}`);
    };
    draw(true);
    const batches = batchesOf(files);
    const note = "The last files that were sent. Their paths are from the folder that holds yours.";
    const sent = (request) => command.update(request, note);
    const work = async () => {
      for (let batch = batches.shift(); batch && !signal.aborted; batch = batches.shift()) {
        const added = await addBatch(batch, { collection, refuse, signal, sent });
        tally.added += added.length; // not in one: the other worker may have added meanwhile
        tally.ids.push(...added);
        draw(false);
      }
    };
    let failure = null;
    try {
      await Promise.all(Array.from({ length: AT_ONCE }, work));
    } catch (error) {
      failure = error.name === "AbortError" ? null : error;
      running.abort();
    }
    const stopped = signal.aborted && !failure;
    const seconds = (performance.now() - began) / 1000;
    const refused = tally.refused ? `, ${tally.refused} not` : "";
    const end = failure ? `. Stopped: ${failure.message}` : stopped ? ". Stopped" : ` in ${seconds.toFixed(1)} s`;
    await app.refresh(); // before the link is there: it leads to a collection that may be new
    app.changed();
    draw(true);
    show(status, `${plural(tally.added, "item")} added to ${collection}${refused}${end}`, { bad: Boolean(failure) });
    if (tally.added) status.append(". ", el("a", { href: `#/browse?in=${encodeURIComponent(collection)}` }, "Browse them"));
    running = null;
    busy(false);
    waiting = [];
    await picture(tally.ids, collection);
  }

  /** Show what has been added, as it will be found. */
  async function picture(ids, collection) {
    const ask = (id) => send({ path: pathOf("/items", id), query: { collection, include: "preview" } }).catch(() => null);
    const items = (await Promise.all(ids.slice(0, PICTURED).map(ask))).filter(Boolean);
    if (running) return;
    arrivals.show(items, { label: "Added" });
  }

  function busy(on) {
    progress.hidden = false;
    $("start").disabled = true;
    $("start").textContent = "Add";
    $("cancel").hidden = !on;
    for (const id of ["add-folder", "add-files", "target"]) $(id).disabled = on;
    if (on) $("cancel").focus();
    else $("add-folder").focus();
  }

  $("add-folder").addEventListener("click", () => $("folder-input").click());
  $("add-files").addEventListener("click", () => $("files-input").click());
  for (const input of [$("folder-input"), $("files-input")]) {
    input.addEventListener("change", () => {
      take([...input.files].map((file) => ({ path: file.webkitRelativePath || file.name, file })));
      input.value = "";
    });
  }
  $("adding").addEventListener("submit", (event) => {
    event.preventDefault();
    if (waiting.length && !running) run();
  });
  $("cancel").addEventListener("click", () => running?.abort());
  return {
    title: "Add",
    hint: "Drop to add it",
    drop: take,
    enter() {
      if (!running) target.value = app.collection;
    },
    collectionChanged() {
      if (!running) target.value = app.collection;
    },
  };
}

function batchesOf(files) {
  const batches = [];
  let room = 0;
  for (const given of files) {
    if (!batches.length || batches.at(-1).length === BATCH || given.file.size > room) {
      batches.push([]);
      room = BATCH_BYTES;
    }
    batches.at(-1).push(given);
    room -= given.file.size;
  }
  return batches;
}

/** The ids of what was added. What is wrong with a file is told to `refuse`. Throws what is wrong with the server. */
async function addBatch(batch, { collection, refuse, signal, sent }) {
  const items = [];
  const files = [];
  const paths = [];
  for (const { path, file } of batch) {
    try {
      const item = { id: path, metadata: await metadataOf(path, file), ...(collection !== "default" && { collection }) };
      if (kindOf(file) === "text") item.text = await file.text();
      else files.push({ name: path, data: await readable(file) });
      items.push(item);
      paths.push(path);
    } catch (error) {
      refuse(path, error.message);
    }
  }
  if (!items.length) return [];
  const request = { method: "POST", path: "/items", json: { items, on_error: "null" }, files };
  sent(request);
  try {
    const answer = await patiently(request, signal);
    renewPreviews();
    for (const { id, error } of answer.items) if (error) refuse(id, error.detail);
    return answer.items.filter(({ error }) => !error).map(({ id }) => id);
  } catch (error) {
    if (!error.status || error.status === 401 || error.status === 403 || error.status >= 500) throw error;
    if (batch.length === 1) {
      refuse(paths[0], error.message);
      return [];
    }
    // One of them is why: each by itself.
    const added = [];
    for (const given of batch.filter(({ path }) => paths.includes(path))) {
      added.push(...(await addBatch([given], { collection, refuse, signal, sent }))); // one after the other
    }
    return added;
  }
}

/** Send, and again after a while where the server has too much to do. */
async function patiently(request, signal) {
  for (let tries = 1; ; tries++) {
    try {
      return await send(request, signal);
    } catch (error) {
      if (![429, 503].includes(error.status) || tries === TRIES) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfter || tries)));
      signal.throwIfAborted();
    }
  }
}

/** What `isthmus index` notes of a file too: its folder, and when it was taken or else last changed. */
async function metadataOf(path, file) {
  const folder = path.split("/").slice(0, -1).join("/");
  const changed = new Date(file.lastModified);
  const date = (await takenAt(file)) ?? Math.floor((changed.getTime() - 60_000 * changed.getTimezoneOffset()) / 1000);
  return { ...(folder && { [FOLDER]: folder }), [MONTH]: new Date(1000 * date).toISOString().slice(0, 7), [DATE]: date };
}
