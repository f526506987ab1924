// A short message at the bottom of the page, with one thing to do about it.

import { announce, button, el } from "./dom.js";

const LASTS_MS = 8_000;
let current = null;

/** The part of the page that can be pressed: an open dialog makes the rest of it inert. */
const layer = () => document.querySelector("dialog[open]") ?? document.body;

/** Show `text`, and an `action` ({text, run}) if there is one; `over` is called when it goes without having been used. */
export function toast(text, { action, over } = {}) {
  current?.end();
  const box = el("div", { class: "toast" }, el("span", {}, text));
  const end = (used = false) => {
    if (current?.box !== box) return;
    clearTimeout(current.timer);
    current = null;
    box.remove();
    if (used) action.run();
    else over?.();
  };
  if (action) box.append(button(action.text, null, () => end(true), { class: "link" }));
  layer().append(box);
  announce(text);
  current = { box, end, timer: setTimeout(end, LASTS_MS, false) };
}

/** A dialog was opened or closed: the message goes where it can still be pressed. */
export function moveToast() {
  if (current) layer().append(current.box);
}

export function endToast() {
  current?.end();
}
