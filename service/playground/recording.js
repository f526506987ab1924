// A button that records, and stops; while it does, how loud it is and for how long.

import { announce, clock, el, icon } from "./dom.js";
import { LONGEST_S, startRecording } from "./media.js";

const SILENT_S = 2.5;
const AUDIBLE = 0.01;

/**
 * `taken` gets the WAV file, `failed` what went wrong. `label` is the element whose text says what the button does,
 * `meter` the place for the level.
 */
export function recordingButton(button, { taken, failed, label, meter }) {
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
    dress("Stop");
    announce("Recording. Press again to stop.");
    const end = measure(current, meter);
    try {
      taken(await current.done);
    } catch (error) {
      failed(error);
    } finally {
      end();
      current = null;
      dress(label ? "Record" : "Record a sound");
    }
  });
}

/** Show the level and the time in `meter` until the function that is returned is called. */
function measure(recording, meter) {
  const began = performance.now();
  const level = el("meter", { min: 0, max: 1, value: 0, "aria-label": "Loudness" });
  const time = el("span", { class: "time" }, clock(0));
  const advice = el("span", { class: "help" });
  meter.replaceChildren(el("span", { class: "dot", "aria-hidden": "true" }), el("span", {}, "Recording"), time, level, advice);
  meter.hidden = false;
  let [loudest, frame] = [0, 0];
  const follow = () => {
    const seconds = (performance.now() - began) / 1000;
    const loud = recording.level();
    loudest = Math.max(loudest, loud);
    level.value = Math.min(1, Math.sqrt(loud) * 1.6);
    time.textContent = `${clock(seconds)} of ${clock(LONGEST_S)}`;
    advice.textContent = loudest < AUDIBLE && seconds > SILENT_S ? "Nothing is heard. Is the microphone on?" : "Press the button again to stop.";
    frame = requestAnimationFrame(follow);
  };
  follow();
  return () => {
    cancelAnimationFrame(frame);
    meter.hidden = true;
    meter.replaceChildren();
  };
}
