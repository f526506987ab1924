// The view that adds: a folder's files, some at a time, with progress and what is wrong with each that is refused.

import { send } from "./api.js";
import { $, el, plural, show } from "./dom.js";
import { kindOf, readable } from "./media.js";
import { requestBlock } from "./request.js";

const BATCH = 12;
const BATCH_BYTES = 6e6;
const AT_ONCE = 2;
const TRIES = 6;
const SHOWN = 200;

export function addView(app) {
  const [status, progress, refusals, target] = ["added", "progress", "refusals", "target"].map($);
  const command = requestBlock($("add-request"));
  let waiting = [];
  let running = null;

  /** files: [{path, file}] */
  function take(files) {
    if (running) return;
    const known = files.filter(({ file }) => kindOf(file));
    const hidden = ({ path }) => path.split("/").some((each) => each.startsWith("."));
    waiting = known.filter((each) => !hidden(each));
    const others = files.length - waiting.length;
    const bytes = waiting.reduce((sum, { file }) => sum + file.size, 0);
    const left = others ? `; ${plural(others, "other file is", "other files are")} left out` : "";
    show(status, waiting.length ? `${plural(waiting.length, "file")}, ${size(bytes)}${left}` : `Nothing there that is an image, a sound or a text${left}`, { bad: !waiting.length });
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
    const tally = { added: 0, refused: 0, drawn: 0 };
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
        tally.added += added; // not in one: the other worker may have added meanwhile
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
    draw(true);
    show(status, `${plural(tally.added, "item")} added to ${collection}${refused}${end}`, { bad: Boolean(failure) });
    running = null;
    busy(false);
    waiting = [];
    await app.refresh();
  }

  function busy(on) {
    progress.hidden = false;
    $("start").disabled = true;
    $("start").textContent = "Add";
    $("cancel").hidden = !on;
    for (const each of ["add-folder", "add-files", "target"]) $(each).disabled = on;
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
  for (const each of files) {
    if (!batches.length || batches.at(-1).length === BATCH || each.file.size > room) {
      batches.push([]);
      room = BATCH_BYTES;
    }
    batches.at(-1).push(each);
    room -= each.file.size;
  }
  return batches;
}

/** How many were added. What is wrong with a file is told to `refuse`. Throws what is wrong with the server. */
async function addBatch(batch, { collection, refuse, signal, sent }) {
  const items = [];
  const files = [];
  const paths = [];
  for (const { path, file } of batch) {
    try {
      const folder = path.split("/").slice(0, -1).join("/");
      const item = { id: path, ...(folder && { metadata: { folder } }), ...(collection !== "default" && { collection }) };
      if (kindOf(file) === "text") item.text = await file.text();
      else files.push({ name: path, data: await readable(file) });
      items.push(item);
      paths.push(path);
    } catch (error) {
      refuse(path, error.message);
    }
  }
  if (!items.length) return 0;
  const request = { method: "POST", path: "/items", json: { items, on_error: "null" }, files };
  sent(request);
  try {
    const answer = await patiently(request, signal);
    for (const each of answer.items) if (each.error) refuse(each.id, each.error.detail);
    return answer.upserted;
  } catch (error) {
    if (!error.status || error.status === 401 || error.status === 403 || error.status >= 500) throw error;
    if (batch.length === 1) {
      refuse(paths[0], error.message);
      return 0;
    }
    // One of them is why: each by itself.
    let added = 0;
    for (const each of batch.filter(({ path }) => paths.includes(path))) {
      added += await addBatch([each], { collection, refuse, signal, sent }); // one after the other
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

function size(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
