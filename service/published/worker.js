// Embeds and searches beside the page, so that the page goes on answering. It is asked {id, text | file | row}.

import { pixelsOf } from "./pixels.js";
import { tokenizer } from "./tokens.js";
import { unpacked } from "./weights.js";

const at = (path) => new URL(`../${path}`, import.meta.url).href;
const once = (make) => {
  let made;
  return () => (made ??= make().catch((error) => { // the next question tries again
    made = null;
    throw error;
  }));
};

async function bytesOf(path, what, total) {
  const response = await fetch(at(path)).catch(() => null);
  if (!response?.ok) throw new Error(`${path} cannot be fetched: is the folder on the server whole?`);
  let done = 0;
  const counted = response.body.pipeThrough(new TransformStream({
    transform(chunk, controller) {
      postMessage({ what, done: (done += chunk.length), total });
      controller.enqueue(chunk);
    },
  }));
  return new Response(counted);
}

// Not by the host: some say of such a file that it is encoded, and some do not.
const inflated = (response) => new Response(response.body.pipeThrough(new DecompressionStream("gzip")));

const published = once(async () => (await bytesOf("published.json")).json());

const runtime = once(async () => {
  const ort = await import(at("runtime/ort.js"));
  // Threads need headers that hosts of files do not send.
  Object.assign(ort.env.wasm, { numThreads: 1, wasmPaths: { mjs: at("runtime/ort-wasm.js"), wasm: at("runtime/ort-wasm.wasm") } });
  return ort;
});

const towerOf = (modality) => once(async () => {
  const { towers } = await published();
  const { file, bytes, preprocessing } = towers[modality];
  const packed = inflated(await bytesOf(file, modality, bytes));
  const graph = unpacked(new Uint8Array(await packed.arrayBuffer()));
  const ort = await runtime();
  const session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
  return { ort, session, preprocessing };
});
const image = towerOf("image");
const text = towerOf("text");
const tokens = once(async () => {
  const { preprocessing } = (await published()).towers.text;
  return tokenizer(await inflated(await bytesOf("bundle/tokenizer")).json(), preprocessing.max_length);
});

function normalised(vector) {
  const length = Math.hypot(...vector);
  if (!(length > 0 && length < Infinity)) throw new Error("The model gives this input no vector");
  return Float32Array.from(vector, (each) => each / length);
}

async function run({ ort, session }, inputs) {
  const feeds = Object.fromEntries(Object.entries(inputs).map(([name, [type, data, dims]]) => [name, new ort.Tensor(type, data, dims)]));
  const { unit_vectors: answer } = await session.run(feeds, ["unit_vectors"]);
  return normalised(answer.data);
}

async function ofText(given) {
  if (!given.trim()) throw new Error("The text is empty");
  const encode = await tokens();
  const tower = await text();
  const { ids, truncated } = encode(tower.preprocessing.query_prefix + given);
  if (!ids.length) throw new Error("The text is empty");
  const int64 = (values) => ["int64", BigInt64Array.from(values, BigInt), [1, ids.length]];
  const vector = await run(tower, { input_ids: int64(ids), attention_mask: int64(ids.map(() => 1)) });
  return { vector, truncated, known: encode(given).known };
}

async function ofPicture(file) {
  const tower = await image();
  const { height, width } = tower.preprocessing;
  return { vector: await run(tower, { pixels: ["float32", await pixelsOf(file, tower.preprocessing), [1, 3, height, width]] }) };
}

// The index: a row for each item, then one for each moment, whose item is `owners`

const index = once(async () => {
  const { dimensions, items, owners, vectors } = await published();
  const halves = new Uint16Array(await (await bytesOf("vectors.f16", "vectors", vectors)).arrayBuffer());
  const matrix = new Float32Array(halves.length);
  const pattern = new Int32Array(1);
  const float = new Float32Array(pattern.buffer);
  halves.forEach((half, place) => {
    pattern[0] = ((half & 0x8000) << 16) | ((half & 0x7fff) << 13);
    matrix[place] = float[0] * 2 ** 112;
  });
  return { dimensions, items, owners, matrix };
});

/** All items, the nearest first: their places, their scores, and the moments that are nearest (-1: none). */
async function search(vector, leftOut) {
  const { dimensions, items, owners, matrix } = await index();
  const scores = new Float32Array(items);
  const moments = new Int32Array(items).fill(-1);
  const best = new Float32Array(items).fill(-2);
  for (let row = 0, place = 0; row < items + owners.length; row++) {
    let score = 0;
    for (let each = 0; each < dimensions; each++) score += vector[each] * matrix[place++];
    if (row < items) scores[row] = score;
    else {
      const owner = owners[row - items];
      if (score > best[owner]) [best[owner], moments[owner]] = [score, row - items];
    }
  }
  for (let item = 0; item < items; item++) scores[item] = Math.max(scores[item], best[item]);
  const order = Int32Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b).filter((item) => item !== leftOut);
  return { order, scores: Float32Array.from(order, (item) => scores[item]), moments: Int32Array.from(order, (item) => moments[item]) };
}

async function answer({ text: words, file, row }) {
  if (words != null) return ofText(words);
  if (file) return ofPicture(file);
  const { dimensions, matrix } = await index();
  return { vector: normalised(matrix.subarray(row * dimensions, (row + 1) * dimensions)) };
}

addEventListener("message", async ({ data }) => {
  try {
    if (data.warm) return void (await Promise.all([text(), tokens(), index()]).catch(() => {})); // asking says what is wrong
    const embedded = await answer(data);
    postMessage({ id: data.id, ...embedded, ...(await search(embedded.vector, data.row)) });
  } catch (error) {
    postMessage({ id: data.id, error: error.message });
  }
});
