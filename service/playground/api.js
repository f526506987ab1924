// Requests as plain descriptions, which are both sent and shown as curl, so that the two cannot differ:
// {method, path, query: {…}, json: {…}, files: [{name, data: Blob}], keepalive}: the last for what outlives the page

const KEY = "isthmus-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server answered that was no success; the message is fit for people. */
export class Problem extends Error {
  constructor(status, body, retryAfter) {
    super(sentence(status, body));
    this.status = status;
    this.code = body?.code;
    this.retryAfter = retryAfter;
  }
}

function sentence(status, body) {
  const errors = (body?.errors ?? []).map((each) => `${each.loc.slice(1).join(".")}: ${each.msg}`);
  const said = errors.length ? errors.join("; ") : body?.detail?.replace(/^(query|(queries|inputs|items)\[\d+\]): /, "");
  return said ? said[0].toUpperCase() + said.slice(1) : `The server answered with status ${status}`;
}

let unauthorised = () => {};

/** Call `listener` whenever the server asks for a key, or refuses the one it got. */
export function onUnauthorised(listener) {
  unauthorised = listener;
}

function address({ path, query = {} }) {
  const url = new URL(path.replace(/^\//, ""), document.baseURI.split("#")[0]);
  for (const [name, value] of Object.entries(query)) {
    for (const single of [value].flat()) if (single != null) url.searchParams.append(name, single);
  }
  return url;
}

/** The address of what needs no key, for an element that fetches it itself. */
export const plainAddress = (request) => address(request).href;

/** The path of something with an id that may hold anything. */
export const pathOf = (route, id) => `${route}/${id.split("/").map(encodeURIComponent).join("/")}`;

async function respond(request, signal) {
  const { method = "GET", json, files, keepalive } = request;
  const headers = {};
  let body;
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (files?.length) {
    body = new FormData();
    for (const file of files) body.append("file", file.data, file.name);
    if (json) body.append("request", JSON.stringify(json));
  } else if (json) {
    headers["content-type"] = "application/json";
    body = JSON.stringify(json);
  }
  let response;
  try {
    response = await fetch(address(request), { method, headers, body, signal, keepalive });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) unauthorised(Boolean(key.get()));
  const said = await response.json().catch(() => null);
  throw new Problem(response.status, said, Number(response.headers.get("retry-after")) || 0);
}

/** The answer as JSON, null where it has none. Throws Problem. */
export async function send(request, signal) {
  const response = await respond(request, signal);
  return response.status === 204 ? null : response.json();
}

export async function blob(request, signal) {
  return (await respond(request, signal)).blob();
}

/** The request as a command for a shell. The key is named, not shown. */
export function curl(request) {
  const { method = "GET", json, files } = request;
  const parts = [];
  const carries = files?.length || json;
  if (method !== (carries ? "POST" : "GET")) parts.push(`-X ${method}`);
  if (key.get()) parts.push('-H "authorization: Bearer $ISTHMUS_API_KEY"');
  if (files?.length) {
    for (const { name } of files) parts.push(`-F ${quoted(`file=@"${name.replace(/[\\"]/g, "\\$&")}"`)}`);
    if (json) parts.push(`--form-string ${quoted(`request=${JSON.stringify(json)}`)}`);
  } else if (json) {
    parts.push("-H 'content-type: application/json'", `-d ${quoted(JSON.stringify(json))}`);
  }
  parts.push(quoted(address(request).href));
  return parts.length === 1 ? `curl ${parts[0]}` : `curl ${parts.join(" \\\n     ")}`;
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
