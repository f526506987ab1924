// The reference at /docs: the operations of this server's openapi.json, each with a form that sends it.

import { curl, key, plainAddress } from "./api.js";
import { $, el } from "./dom.js";

const MOST_SHOWN = 100_000; // characters of an answer
const METHODS = ["get", "post", "put", "delete"];
let components;

const nameOf = (reference) => reference.split("/").at(-1);
const resolved = (part) => (part?.$ref ? part.$ref.split("/").slice(2).reduce((node, step) => node[step], components) : part);

/** The type of a schema in words: string, Filter, list of number. */
function typeOf(schema) {
  if (schema.$ref) return nameOf(schema.$ref);
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return [...new Set(choices.map(typeOf))].filter((type) => type !== "null").join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.type === "array") return schema.items ? `list of ${typeOf(schema.items)}` : "list";
  return schema.type ?? "anything";
}

/** The names of the schemas that a schema's fields lead to. */
function references(schema) {
  if (!schema || typeof schema !== "object") return [];
  const found = typeof schema.$ref === "string" ? [nameOf(schema.$ref)] : Object.values(schema).flatMap(references);
  return [...new Set(found)];
}

/** A schema's fields as a table, and below it the schemas that they name, which are drawn when they are opened. */
function fields(schema) {
  const whole = resolved(schema);
  const properties = Object.entries(whole.properties ?? {});
  const rows = properties.map(([name, field]) =>
    el("tr", {},
      el("td", {}, el("code", {}, name), whole.required?.includes(name) ? " *" : ""),
      el("td", {}, typeOf(field)),
      el("td", {}, field.default == null ? "" : JSON.stringify(field.default)),
      el("td", {}, field.description ?? resolved(field).description ?? "")));
  const head = el("tr", {}, ...["field", "type", "default", "meaning"].map((title) => el("th", { scope: "col" }, title)));
  const table = rows.length ? el("table", {}, head, ...rows) : el("p", {}, typeOf(whole));
  return [table, ...references(whole).map((name) => folded(name, () => fields(components.schemas[name])))];
}

/** A part that is drawn when it is first opened. */
function folded(title, draw, attributes = {}) {
  const part = el("details", attributes, el("summary", {}, ...[title].flat()));
  part.addEventListener("toggle", () => part.children.length === 1 && part.append(el("div", {}, ...draw())));
  return part;
}

function operationPart(method, path, operation) {
  const [first] = operation.description.split("\n\n");
  const title = [el("span", { class: "method" }, method.toUpperCase()), el("code", {}, path), el("span", {}, first)];
  return folded(title, () => opened(method, path, operation), { class: "operation", id: operation.operationId });
}

function opened(method, path, operation) {
  const scope = operation.security?.[0]?.key?.[0];
  const need = scope ? ` A server with keys wants one with the scope ${scope}.` : " It needs no key.";
  const content = operation.requestBody?.content ?? {};
  const schema = content["application/json"]?.schema;
  const answers = Object.entries(operation.responses).map(([status, given]) => {
    const response = resolved(given);
    const shape = response.content?.["application/json"]?.schema;
    const text = `${status}: ${response.description}`;
    return el("li", {}, shape ? folded(text, () => fields(shape)) : text);
  });
  return [
    el("p", { class: "description" }, operation.description + need),
    form(method, path, operation, content),
    schema && folded("Fields of the body", () => fields(schema)),
    folded("Answers", () => [el("ul", {}, ...answers)]),
  ].filter(Boolean);
}

/** The form that sends an operation, and shows the command that does the same, and the answer. */
function form(method, path, operation, content) {
  const id = operation.operationId;
  const inputs = (operation.parameters ?? []).map((parameter) => {
    const attributes = { id: `${id}-${parameter.name}`, required: parameter.required, placeholder: parameter.schema.default };
    return [parameter, el("input", attributes)];
  });
  const rows = inputs.map(([parameter, input]) =>
    el("tr", {},
      el("td", {}, el("label", { for: input.id }, el("code", {}, parameter.name), parameter.required ? " *" : "")),
      el("td", {}, input),
      el("td", {}, [typeOf(parameter.schema), parameter.description].filter(Boolean).join(". "))));
  const kinds = Object.keys(content);
  const written = kinds.find((kind) => content[kind].example !== undefined);
  const attached = kinds.find((kind) => kind !== written);
  const example = content[written]?.example;
  const shown = typeof example === "string" ? example : JSON.stringify(example, null, 2);
  const text = written && el("textarea", { id: `${id}-body`, rows: Math.min(shown.split("\n").length + 1, 14), spellcheck: "false" });
  if (text) text.value = shown;
  const file = attached && el("input", { type: "file", id: `${id}-file`, multiple: attached === "multipart/form-data" });
  const command = el("pre", {});
  const answer = el("div", { "aria-live": "polite" });

  async function submit(event) {
    event.preventDefault();
    const request = { method: method.toUpperCase(), path, query: {} };
    const headers = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
    for (const [parameter, { value }] of inputs) {
      if (parameter.in === "path") request.path = request.path.replace(`{${parameter.name}}`, encodeURIComponent(value));
      else if (value && parameter.in === "header") headers[parameter.name] = value;
      else if (value) request.query[parameter.name] = isList(parameter.schema) ? value.split(",") : value;
    }
    const files = [...(file?.files ?? [])];
    let body;
    if (files.length && attached === "multipart/form-data") {
      body = new FormData();
      for (const each of files) body.append("file", each, each.name);
      if (text.value.trim()) body.append("request", text.value);
    } else if (files.length) {
      [body] = files;
      headers["content-type"] = attached;
    } else if (text) {
      body = text.value;
      headers["content-type"] = written;
    }
    let said = request;
    try {
      if (written === "application/json") said = { ...request, json: text.value.trim() ? JSON.parse(text.value) : null };
    } catch (error) {
      answer.replaceChildren(el("p", { class: "bad" }, `The body is no JSON: ${error.message}`));
      return;
    }
    const named = files.map((each) => ({ name: each.name, data: each }));
    const carried = attached === "multipart/form-data" || !files.length;
    command.textContent = carried && (!text || said.json) ? curl({ ...said, files: named }) : "";
    for (const { src } of answer.querySelectorAll("[src]")) URL.revokeObjectURL(src);
    answer.replaceChildren("Waiting …");
    const started = performance.now();
    try {
      const response = await fetch(plainAddress(request), { method: request.method, headers, body });
      answer.replaceChildren(...(await drawn(response, performance.now() - started)));
    } catch {
      answer.replaceChildren(el("p", { class: "bad" }, "The server cannot be reached."));
    }
  }

  return el("form", { onsubmit: submit },
    rows.length > 0 && el("table", {}, ...rows),
    text && el("label", { for: text.id }, `Body, ${written}`),
    text,
    file && el("p", {}, el("label", { for: file.id }, `Or files, ${attached}: `), file),
    el("p", {}, el("button", { class: "primary" }, "Send")),
    command, answer);
}

function isList(schema) {
  return [schema, ...(schema.anyOf ?? [])].some(({ type }) => type === "array");
}

async function drawn(response, took) {
  const kind = (response.headers.get("content-type") ?? "").split(";")[0];
  const head = el("p", { class: response.ok ? "" : "bad" }, `${response.status} in ${Math.round(took)} ms, ${kind || "no body"}`);
  const data = await response.blob();
  if (kind.startsWith("image/")) return [head, el("img", { src: URL.createObjectURL(data), alt: "The answer" })];
  if (/^(audio|video)\//.test(kind)) return [head, el(kind.split("/")[0], { src: URL.createObjectURL(data), controls: true })];
  let said = await data.text();
  // JSON.parse would round integers of more than 15 digits.
  if (kind.endsWith("json") && !/\d{16}/.test(said)) said = JSON.stringify(JSON.parse(said), null, 2);
  const rest = said.length - MOST_SHOWN;
  return [head, el("pre", {}, rest > 0 ? `${said.slice(0, MOST_SHOWN)}\n… ${rest} more characters` : said)];
}

async function draw() {
  const headers = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  const response = await fetch("openapi.json", { headers });
  if (!response.ok) {
    $("about").textContent = response.status === 401 || response.status === 403
      ? "This server shows its API to those who have a key: write one above."
      : `The server answered with status ${response.status}.`;
    if (response.status === 401) $("key").focus();
    return;
  }
  const api = await response.json();
  components = api.components;
  $("title").textContent = `${api.info.title} API ${api.info.version}`;
  $("about").replaceChildren(
    "The operations of this server, which can be tried here. The document: ", el("a", { href: "openapi.json" }, "openapi.json"), ".");
  const operations = Object.entries(api.paths).flatMap(([path, methods]) =>
    METHODS.filter((method) => methods[method]).map((method) => [method, path, methods[method]]));
  $("operations").replaceChildren(...api.tags.flatMap(({ name, description }) => [
    el("h2", {}, name),
    el("p", { class: "help" }, description),
    ...operations.filter(([, , operation]) => operation.tags[0] === name).map((each) => operationPart(...each)),
  ]));
  const chosen = location.hash && document.getElementById(location.hash.slice(1));
  if (chosen) chosen.open = true;
}

$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  draw();
});
draw();
