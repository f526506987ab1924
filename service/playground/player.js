// A sound as a waveform that plays. One plays at a time.

import { clock, el, icon } from "./dom.js";

const BAR = 4; // pixels, at least

let playing = null;

/** `load` is asked for an object URL when it is first played, which begins at the second `from`. */
export function player({ name, peaks, seconds, from = 0, load }) {
  const canvas = el("canvas", { "aria-hidden": "true" });
  const seek = el("input", {
    type: "range", min: 0, max: 1000, value: 0, class: "seek", "aria-label": `Position in ${name}`, disabled: true,
  });
  const time = el("span", { class: "time" }, clock(seconds ?? 0));
  const toggle = el("button", { type: "button", class: "round play", "aria-label": `Play ${name}` }, icon("play"));
  const box = el("div", { class: "player" }, toggle, el("div", { class: "wave" }, canvas, seek), time);
  let audio = null;

  const share = () => (audio?.duration > 0 ? audio.currentTime / audio.duration : 0);
  const draw = () => {
    const pen = canvas.getContext("2d");
    const style = getComputedStyle(box);
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width) return;
    canvas.width = Math.round(width * devicePixelRatio);
    canvas.height = Math.round(height * devicePixelRatio);
    pen.scale(devicePixelRatio, devicePixelRatio);
    const count = Math.max(1, Math.min(peaks.length, Math.floor(width / BAR)));
    const step = width / count;
    for (let bar = 0; bar < count; bar++) {
      const own = peaks.slice(Math.floor((bar * peaks.length) / count), Math.floor(((bar + 1) * peaks.length) / count));
      const tall = Math.max(2, (Math.max(0, ...own) / 100) * height);
      pen.fillStyle = bar / count < share() ? style.color : style.borderTopColor;
      pen.beginPath();
      pen.roundRect(bar * step + 0.75, (height - tall) / 2, step - 1.5, tall, 1.5);
      pen.fill();
    }
  };
  const follow = () => {
    draw();
    seek.value = Math.round(1000 * share());
    seek.setAttribute("aria-valuetext", clock(audio?.currentTime ?? 0));
    time.textContent = clock(audio && !audio.paused ? audio.currentTime : (audio?.duration || seconds) ?? 0);
    if (audio && !audio.paused) requestAnimationFrame(follow);
  };
  const dress = () => {
    const on = audio && !audio.paused;
    toggle.replaceChildren(icon(on ? "pause" : "play"));
    toggle.setAttribute("aria-label", `${on ? "Pause" : "Play"} ${name}`);
    follow();
  };

  toggle.addEventListener("click", async () => {
    if (!audio) {
      toggle.disabled = true;
      try {
        audio = new Audio(await load());
      } catch {
        time.textContent = "gone";
        time.title = "This sound cannot be had from the server any more";
        return;
      } finally {
        toggle.disabled = false;
      }
      for (const event of ["play", "pause", "ended"]) audio.addEventListener(event, dress);
      audio.addEventListener("loadedmetadata", () => from < audio.duration - 0.5 && (audio.currentTime = from), { once: true });
      seek.disabled = false;
      toggle.focus();
    }
    if (!audio.paused) return audio.pause();
    playing?.pause();
    playing = audio;
    try {
      await audio.play();
    } catch (error) {
      if (error.name === "AbortError") return; // paused before it began
      time.textContent = "–:––";
      time.title = "This browser cannot play it";
    }
  });
  seek.addEventListener("input", () => {
    if (audio?.duration > 0) audio.currentTime = (seek.value / 1000) * audio.duration;
    follow();
  });
  new ResizeObserver(draw).observe(canvas);
  box.addEventListener("redraw", draw);
  return box;
}

document.addEventListener("themechange", () => {
  for (const box of document.querySelectorAll(".player")) box.dispatchEvent(new Event("redraw"));
});

export function stopPlaying() {
  playing?.pause();
  playing = null;
}
