// What is asked, as the part of the address after #/search, and back: so that it can be kept, shared and returned to.
//
// q, w         the words, and their weight where it is not 1
// part         a further part: "text~1~words", "item~0.5~image~id", "file~1~key~name"
// kind, where  kinds of items; conditions as "key~test~value"
// in           the collection; without it the one that was seen last
// open         the item that is shown large, which is none of the question

const SEPARATOR = "~";

const joined = (...pieces) => pieces.map((piece) => encodeURIComponent(piece)).join(SEPARATOR);
const split = (text) => text.split(SEPARATOR).map(decodeURIComponent);

/** {words, weight, parts, kinds, where, collection} → the text of a query. */
export function written({ words, weight = 1, parts = [], kinds = [], where = [], collection }) {
  const query = new URLSearchParams();
  if (words) query.set("q", words);
  if (words && weight !== 1) query.set("w", weight);
  for (const part of parts) query.append("part", partWritten(part));
  for (const kind of kinds) query.append("kind", kind);
  for (const { key, test, value } of where) query.append("where", joined(key, test, value));
  if (collection && (query.size || collection !== "default")) query.set("in", collection);
  return query.toString();
}

function partWritten({ kind, weight, text, id, modality, key, name }) {
  if (kind === "text") return joined("text", weight, text);
  return kind === "item" ? joined("item", weight, modality, id) : joined("file", weight, key, name);
}

/** The reverse of written(). What cannot be read is left out. */
export function read(query) {
  const all = (name, reader) => query.getAll(name).map((text) => {
    try {
      return reader(...split(text));
    } catch {
      return null;
    }
  }).filter(Boolean);
  return {
    words: query.get("q") ?? "",
    weight: weightOf(query.get("w") ?? 1),
    parts: all("part", (kind, weight, first, second) => {
      const part = { kind, weight: weightOf(weight) };
      if (kind === "text" && first) return { ...part, text: first };
      if (kind === "item" && second) return { ...part, modality: first, id: second };
      return kind === "file" && second ? { ...part, key: first, name: second } : null;
    }),
    kinds: query.getAll("kind"),
    where: all("where", (key, test, value) => (key && test ? { key, test, value: value ?? "" } : null)),
    collection: query.get("in"),
  };
}

function weightOf(text) {
  const weight = Number(text);
  return Number.isFinite(weight) ? Math.min(1, Math.max(-1, weight)) : 1;
}
