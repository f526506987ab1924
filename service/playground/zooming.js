// A picture that can be made larger and moved: by wheel, pinch, double click, keys and buttons.

const MOST = 12;
const STEP = 1.5;

/** Lets `image`, and what lies over it, be zoomed within `stage`. `swiped(-1 | 1)` is told of a swipe while it is whole. */
export function zooming(stage, image, { swiped, zoomed } = {}) {
  let [scale, x, y] = [1, 0, 0];
  const pointers = new Map();
  let start = null;
  let last = 0;

  function draw() {
    const [width, height] = [stage.clientWidth, stage.clientHeight];
    const [wide, high] = [image.clientWidth * scale, image.clientHeight * scale];
    const [roomX, roomY] = [Math.max(0, (wide - width) / 2), Math.max(0, (high - height) / 2)];
    [x, y] = [Math.min(roomX, Math.max(-roomX, x)), Math.min(roomY, Math.max(-roomY, y))];
    for (const layer of stage.children) layer.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
    stage.classList.toggle("zoomed", scale > 1);
  }

  /** By a factor, about a point from the middle of the stage. */
  function by(factor, aboutX = 0, aboutY = 0) {
    const next = Math.min(MOST, Math.max(1, scale * factor));
    [x, y] = [aboutX - (next / scale) * (aboutX - x), aboutY - (next / scale) * (aboutY - y)];
    scale = next;
    draw();
    zoomed?.(scale);
  }

  const from = (event) => {
    const box = stage.getBoundingClientRect();
    return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
  };

  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    by(Math.exp(-event.deltaY / 300), ...from(event));
  }, { passive: false });
  stage.addEventListener("pointerdown", (event) => {
    if (event.target.closest("button, input, video, a") || event.button > 0) return;
    stage.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, from(event));
    if (pointers.size === 1) start = { at: from(event), time: event.timeStamp };
    else start = null;
  });
  stage.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const now = from(event);
    if (pointers.size === 2) {
      const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
      const spread = (place) => Math.hypot(place[0] - other[0], place[1] - other[1]);
      by(spread(now) / Math.max(1, spread(before)), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else if (scale > 1) {
      [x, y] = [x + now[0] - before[0], y + now[1] - before[1]];
      draw();
    }
    pointers.set(event.pointerId, now);
  });
  const lift = (event) => {
    if (!pointers.delete(event.pointerId) || !start || event.type !== "pointerup") return;
    const [dx, dy] = from(event).map((value, axis) => value - start.at[axis]);
    if (scale === 1 && Math.abs(dx) > 50 && Math.abs(dx) > 2 * Math.abs(dy)) swiped?.(dx < 0 ? 1 : -1);
    else if (Math.hypot(dx, dy) < 6) {
      const twice = event.timeStamp - last < 350;
      last = twice ? 0 : event.timeStamp;
      if (twice) by(scale > 1 ? 1 / scale : 2.5, ...from(event));
    }
    start = null;
  };
  stage.addEventListener("pointerup", lift);
  stage.addEventListener("pointercancel", lift);
  return {
    in: () => by(STEP),
    out: () => by(1 / STEP),
    whole: () => by(1 / scale),
    get isWhole() {
      return scale === 1;
    },
    draw,
  };
}
