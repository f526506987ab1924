// Label sets with names: the labels and their examples in this browser, and what the server has learnt of them.

import { pathOf, send } from "./api.js";
import { keepFile, keptFile } from "./keeping.js";
import { inJson } from "./media.js";

const SAVED = "isthmus-label-sets";
const AT_ONCE = 1_000;

const all = () => {
  try {
    return JSON.parse(localStorage.getItem(SAVED)) ?? {};
  } catch {
    return {};
  }
};

/** Names of the sets that are saved in this browser or stored by the server, in order. */
export async function savedNames() {
  const names = new Set(Object.keys(all()));
  let page;
  do {
    const query = { limit: AT_ONCE, after: page?.at(-1).name };
    page = (await send({ path: "/label-sets", query })).label_sets;
    for (const { name } of page) names.add(name);
  } while (page.length === AT_ONCE);
  return [...names].sort((a, b) => a.localeCompare(b, "en"));
}

/** "name", or "name: prompt | prompt", one a line → what the API takes. */
export function readLabels(text) {
  const lines = text.split("\n").map((line) => line.trim()).filter(Boolean);
  return lines.map((line) => {
    const [name, rest] = line.split(/:(.*)/s).map((piece) => piece.trim());
    const prompts = rest ? rest.split("|").map((piece) => piece.trim()).filter(Boolean) : [];
    return prompts.length && name ? { name, prompts } : line;
  });
}

export const labelName = (label) => (typeof label === "string" ? label : label.name);

/** Store a set on the server, and its text and examples here. `examples`: label → files. */
export async function saveSet(name, text, examples) {
  const labels = await Promise.all(readLabels(text).map(async (label) => {
    const files = examples.get(labelName(label)) ?? [];
    if (!files.length) return label;
    return { ...(typeof label === "string" ? { name: label } : label), examples: await Promise.all(files.map(inJson)) };
  }));
  await send({ method: "PUT", path: pathOf("/label-sets", name), json: { labels } });
  const kept = {};
  for (const [label, files] of examples) {
    kept[label] = await Promise.all(files.map(async (file) => ({ key: await keepFile(file), name: file.name })));
  }
  localStorage.setItem(SAVED, JSON.stringify({ ...all(), [name]: { text, examples: kept } }));
}

/** {text, examples, lost}: a set as it was saved here, or as the server describes it. Throws where neither knows it. */
export async function openSet(name) {
  const here = all()[name];
  if (!here) return fromServer(name);
  const examples = new Map();
  let lost = 0;
  for (const [label, files] of Object.entries(here.examples)) {
    const found = await Promise.all(files.map(async ({ key, name: file }) => {
      const data = await keptFile(key);
      return data && new File([data], file, { type: data.type });
    }));
    examples.set(label, found.filter(Boolean));
    lost += found.filter((file) => !file).length;
  }
  return { text: here.text, examples, lost };
}

async function fromServer(name) {
  const { labels } = await send({ path: pathOf("/label-sets", name) });
  const line = (label) => (label.prompts ? `${label.name}: ${label.prompts.join(" | ")}` : labelName(label));
  const lost = labels.reduce((sum, label) => sum + (label.examples ?? 0), 0);
  return { text: labels.map(line).join("\n"), examples: new Map(), lost };
}

export async function deleteSet(name) {
  const { [name]: gone, ...rest } = all();
  localStorage.setItem(SAVED, JSON.stringify(rest));
  try {
    await send({ method: "DELETE", path: pathOf("/label-sets", name) });
  } catch (error) {
    if (error.status !== 404) throw error;
  }
}
