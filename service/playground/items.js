// What a person is told of an item: its name, its folder, its date, and metadata in words.

import { clock } from "./dom.js";

export const KINDS = { __proto__: null, image: "Picture", video: "Video", audio: "Sound", text: "Text", vector: "Vector" };
export const MANY = { __proto__: null, image: "Pictures", video: "Videos", audio: "Sounds", text: "Texts", vector: "Vectors" };
export const ICONS = { __proto__: null, image: "image", video: "video", audio: "sound", text: "text", vector: "vector" };

/** Learn of a modality that the bundle has besides: it is called by its own name. Returns that. */
export const addKind = (name) => (KINDS[name] = MANY[name] = name[0].toUpperCase() + name.slice(1).replaceAll("_", " "));

/** Metadata that the index keeps for itself: what a file was when it was stored, its folder, its month. */
const OF_THE_INDEX = "file";
const isOfTheIndex = (key) => key === OF_THE_INDEX || key.startsWith(`${OF_THE_INDEX}.`);
export const [FOLDER, MONTH, DATE] = ["file.folder", "file.month", "file.date"];
const DATES = ["taken", "date", "datetime", "date_taken", "captured"];

export const kindName = (item) => KINDS[item.modality] ?? item.modality;

export const nameOf = (item) => item.id.slice(item.id.lastIndexOf("/") + 1) || item.id;

/** The folder that an item's file lies in; empty where it lies in none. */
export function folderOf({ id, metadata }) {
  const said = [metadata?.[FOLDER], metadata?.folder].find((value) => typeof value === "string");
  return said ?? id.slice(0, Math.max(0, id.lastIndexOf("/")));
}

/** When a picture was taken or a file was last changed, as its clock showed it, read as UTC; null where nothing says. */
export function dateOf({ metadata }) {
  if (typeof metadata?.[DATE] === "number") return new Date(1e3 * metadata[DATE]);
  for (const key of DATES) {
    const date = asDate(metadata?.[key]);
    if (date) return date;
  }
  const modified = metadata?.[OF_THE_INDEX]?.modified / 1e6; // from nanoseconds
  return modified > 0 ? new Date(modified - 60_000 * new Date(modified).getTimezoneOffset()) : null;
}

function asDate(said) {
  if (typeof said !== "string" || !/^\d{4}[-:]\d\d[-:]\d\d/.test(said)) return null;
  const [day, time = "00:00"] = said.replace(/^(\d{4}):(\d\d):(\d\d)/, "$1-$2-$3").split(/[ T]/);
  const date = new Date(`${day}T${/^\d\d:\d\d(:\d\d)?/.exec(time)?.[0] ?? "00:00"}Z`);
  return Number.isNaN(date.getTime()) ? null : date;
}

const UTC = { timeZone: "UTC" };

export const dayWords = (date) => date.toLocaleDateString("en-GB", { day: "numeric", month: "short", year: "numeric", ...UTC });

export const timeWords = (date) => date.toLocaleString("en-GB", { dateStyle: "long", timeStyle: "short", ...UTC });

/** "2024-05" → "May 2024" */
export function monthWords(month) {
  const date = new Date(`${month}-01T00:00Z`);
  return Number.isNaN(date.getTime()) ? month : date.toLocaleDateString("en", { month: "long", year: "numeric", ...UTC });
}

export function bytesWords(bytes) {
  if (bytes < 1e6) return `${Math.max(1, Math.round(bytes / 1e3))} kB`;
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}

/** The last steps of a folder's path: where there is little room, they say more than the first ones. */
export const shortFolder = (folder) => folder.split("/").slice(-2).join("/");

/** The second of a moment in a video or a sound, for people. */
export const momentWords = ({ start, end }) => (end - start >= 1 ? `${clock(start)} – ${clock(end)}` : clock(start));

/** Metadata as pairs of text, without what the index keeps for itself and what is said elsewhere. */
export function factsOf(item) {
  const said = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const shown = ([key, value]) => !isOfTheIndex(key) && !(key === "folder" && value === folderOf(item));
  return Object.entries(item.metadata ?? {}).filter(shown).map(([key, value]) => [key, said(value)]);
}

/** How well a result fits, as a bar and in a word: never against the other results, which may all be bad. */
export function fitOf({ score, confidence }) {
  if (score == null) return null;
  const title = `Similarity ${score.toFixed(3)}`;
  if (confidence == null) return { share: null, words: `Similarity ${score.toFixed(2)}`, title };
  const [, words] = FITS.find(([least]) => confidence >= least);
  return { share: confidence, words, title: `${title}. ${words}: ${chanceWords(confidence)}` };
}

const FITS = [[0.97, "Strong"], [0.8, "Fair"], [0.3, "Weak"], [0, "Doubtful"]];

function chanceWords(confidence) {
  const expected = -Math.log(Math.max(confidence, 1e-12));
  if (expected < 0.005) return "chance would hardly ever score as high here";
  if (expected < 0.7) return `chance would score as high in one search of ${Math.round(1 / expected)}`;
  return `by chance alone, about ${expected < 10 ? expected.toFixed(1) : Math.round(expected)} items score as high here`;
}

/** The size of an item's file in bytes, where whoever stored it said so. */
export const sizeOf = (item) => item.metadata?.[OF_THE_INDEX]?.bytes ?? null;
