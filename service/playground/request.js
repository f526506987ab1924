// "As a request": the curl command that does what a view has just done.

import { curl } from "./api.js";
import { announce, button, el } from "./dom.js";

/** Fills `place` with a fold; update(request, note) says what it shows. */
export function requestBlock(place) {
  const code = el("code");
  const note = el("p", { class: "help" });
  const copy = button("Copy", "copy", async () => {
    await navigator.clipboard.writeText(code.textContent);
    announce("The command is copied");
    copy.lastChild.textContent = "Copied";
    setTimeout(() => (copy.lastChild.textContent = "Copy"), 2000);
  });
  const pre = el("pre", { tabindex: "0", "aria-label": "The command" }, code);
  const fold = el("details", { class: "fold" }, el("summary", {}, "As a request (curl)"), pre, note, copy);
  fold.hidden = true;
  place.append(fold);
  let shown;
  const draw = () => {
    fold.hidden = !shown;
    if (shown) code.textContent = curl(shown.request);
    note.textContent = shown?.note ?? "";
  };
  document.addEventListener("keychange", draw);
  return {
    update(request, text) {
      shown = request && { request, note: text };
      draw();
    },
  };
}
