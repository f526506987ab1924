// What the playground's modules ask a server for, from the files of this folder; and the questions to the worker.

const at = (path) => new URL(`../${path}`, import.meta.url).href;

async function json(path) {
  const response = await fetch(at(path)).catch(() => null);
  if (!response?.ok) throw new Error(`${path} cannot be fetched: is the folder on the server whole?`);
  return response.json();
}

/** What was published, its items, and the moments of its rows. */
export const published = await json("published.json");
export const { items, moments } = await json("items.json");
const byId = new Map(items.map((item, row) => [item.id, Object.assign(item, { row })]));

export const find = (id) => byId.get(id);

export const key = { get: () => "" };

export const pathOf = (route, id) => ({ route, id });

export const plainAddress = ({ path }) => at(find(path.id).file);

export async function send({ path }) {
  return find(path.id);
}

export async function blob(request) {
  const response = await fetch(plainAddress(request));
  if (!response.ok) throw new Error("The preview cannot be fetched");
  return response.blob();
}

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let asked = 0;
let progressed = () => {};

/** Call `listener(what, done, total)` while something is fetched: bytes. */
export function onProgress(listener) {
  progressed = listener;
}

worker.addEventListener("message", ({ data: { id, what, done, total, error, ...answer } }) => {
  if (what) return progressed(what, done, total);
  if (id == null) return;
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error) reject(new Error(error));
  else resolve(answer);
});
worker.addEventListener("error", () => {
  for (const { reject } of waiting.values()) reject(new Error("The search cannot run in this browser"));
  waiting.clear();
});

/** Ask by {text}, {file} or {row}: {vector, order, scores, moments, truncated, known}. */
export function ask(question) {
  return new Promise((resolve, reject) => {
    waiting.set(++asked, { resolve, reject });
    worker.postMessage({ id: asked, ...question });
  });
}

/** Begin to fetch what a search by words takes. */
export const warm = () => worker.postMessage({ warm: true });
