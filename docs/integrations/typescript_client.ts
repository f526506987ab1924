// Store, search and classify from TypeScript, with a client that is typed by the server's own OpenAPI document:
//   npm install openapi-fetch; npm install --save-dev openapi-typescript typescript
//   npx openapi-typescript http://127.0.0.1:8000/openapi.json -o isthmus.ts
import createClient from "openapi-fetch";
import type { components, paths } from "./isthmus.js";

type Result = components["schemas"]["SearchResult"];

/** Make a client of the server at an address; a server with keys wants one. */
export function connect(baseUrl: string, key?: string) {
  return createClient<paths>({ baseUrl, headers: key ? { Authorization: `Bearer ${key}` } : {} });
}

/** The answer, or an Error that says what the server refused. */
function answered<T>({ data, error }: { data?: T; error?: components["schemas"]["Problem"] }): T {
  if (data === undefined) throw new Error(error ? `${error.code}: ${error.detail}` : "no answer");
  return data;
}

export async function upsert(space: ReturnType<typeof connect>, texts: Record<string, string>): Promise<number> {
  const items = Object.entries(texts).map(([id, text]) => ({ id, text }));
  return answered(await space.POST("/items", { body: { items } })).upserted;
}

export async function search(space: ReturnType<typeof connect>, query: string, count: number): Promise<Result[]> {
  return answered(await space.POST("/search", { body: { query, top_k: count } })).results;
}

export async function searchMany(space: ReturnType<typeof connect>, queries: string[]): Promise<Result[][]> {
  return answered(await space.POST("/search/batch", { body: { queries, top_k: 1 } })).results;
}

/** The name of the label that fits a base64 image best. */
export async function classify(space: ReturnType<typeof connect>, image: string, labels: string[]): Promise<string> {
  const { results } = answered(await space.POST("/classify", { body: { inputs: [{ image }], labels } }));
  return results[0]?.labels?.[0]?.label ?? "nothing";
}
