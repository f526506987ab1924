// A button that records, and stops.

import { announce, clock, icon } from "./dom.js";
import { startRecording } from "./media.js";

/** `taken` gets the WAV file, `failed` what went wrong. `label` is the element whose text says what the button does. */
export function recordingButton(button, { taken, failed, label }) {
  let current = null;
  const dress = (text) => {
    button.querySelector("svg").replaceWith(icon(current ? "stop" : "mic"));
    button.classList.toggle("live", Boolean(current));
    button.setAttribute("aria-pressed", String(Boolean(current)));
    if (label) label.textContent = text;
    button.title = text;
  };
  button.title = "Record a sound";
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", async () => {
    if (current) return current.stop();
    button.disabled = true;
    try {
      current = await startRecording();
    } catch (error) {
      return failed(error);
    } finally {
      button.disabled = false;
    }
    const began = performance.now();
    dress("Stop");
    announce("Recording. Press again to stop.");
    const ticking = setInterval(() => dress(`Stop ${clock((performance.now() - began) / 1000)}`), 500);
    try {
      taken(await current.done);
    } catch (error) {
      failed(error);
    } finally {
      clearInterval(ticking);
      current = null;
      dress(label ? "Record" : "Record a sound");
    }
  });
}
