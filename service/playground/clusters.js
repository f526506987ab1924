// What lies together on the map, and the word that is nearest to it.

import { send } from "./api.js";
import { WORDS } from "./words.js";

const FEWEST = 16; // items that are worth naming
const [LEAST, MOST] = [3, 14]; // groups
const ROUNDS = 12;
const HITS = 12; // best items of a word
const AGREE = 3; // of them in one group, at least, for the word to name it
const AT_ONCE = 128; // words of one request

/** Points {x, y} → groups [{x, y, members}] of those that lie together: k-means, begun at points that are far apart. */
export function groupsOf(points) {
  if (points.length < FEWEST) return [];
  const count = Math.min(MOST, Math.max(LEAST, Math.round(Math.sqrt(points.length / 2.5))));
  const apart = (a, b) => (a.x - b.x) ** 2 + (a.y - b.y) ** 2;
  let middles = [points[0]];
  while (middles.length < count) {
    const far = points.map((point) => Math.min(...middles.map((middle) => apart(point, middle))));
    middles.push(points[far.indexOf(Math.max(...far))]);
  }
  let members = [];
  for (let round = 0; round < ROUNDS; round++) {
    members = middles.map(() => []);
    for (const point of points) {
      const ways = middles.map((middle) => apart(point, middle));
      members[ways.indexOf(Math.min(...ways))].push(point);
    }
    middles = members.map((some, place) => (some.length ? { x: mean(some, "x"), y: mean(some, "y") } : middles[place]));
  }
  return middles.map((middle, place) => ({ ...middle, members: members[place] })).filter(({ members: some }) => some.length >= AGREE);
}

const mean = (points, axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length;

/**
 * Give groups a `name` each: the word whose best items lie in it more than any other's. A group of which no word has
 * enough keeps none. Throws what the server says.
 */
export async function nameGroups(groups, collection, signal) {
  const groupOf = new Map(groups.flatMap((group) => group.members.map(({ id }) => [id, group])));
  const votes = []; // {word, group, weight}
  for (let from = 0; from < WORDS.length; from += AT_ONCE) {
    const words = WORDS.slice(from, from + AT_ONCE);
    const json = { queries: words, top_k: HITS, correction: 1, collection, include: [] };
    const { results } = await send({ method: "POST", path: "/search/batch", json }, signal);
    results.forEach((hits, place) => votes.push(...votesOf(words[place], hits, groupOf)));
  }
  votes.sort((a, b) => b.weight - a.weight);
  const used = new Set();
  for (const { word, group } of votes) {
    if (group.name || used.has(word)) continue;
    group.name = word.replace(/^(an?|the) /, "");
    used.add(word);
  }
}

function votesOf(word, hits, groupOf) {
  const inside = new Map();
  for (const { id, score } of hits) {
    const group = groupOf.get(id);
    if (!group) continue;
    const so = inside.get(group) ?? { count: 0, score: 0 };
    inside.set(group, { count: so.count + 1, score: so.score + score });
  }
  // A word is as good as its items agree on the group, and as they are like it.
  return [...inside].filter(([, { count }]) => count >= AGREE)
    .map(([group, { count, score }]) => ({ word, group, weight: (count / HITS) * (score / count) }));
}
