// The view of the whole: a collection's items in the plane, as the service has laid them out.

import { pathOf, send } from "./api.js";
import { card } from "./cards.js";
import { groupsOf, nameGroups } from "./clusters.js";
import { openDetail } from "./detail.js";
import { $, announce, button, el, plural, show } from "./dom.js";
import { FOLDER, KINDS, MANY, MONTH, monthWords, nameOf, shortFolder } from "./items.js";
import { drawNames, placed, shape } from "./marks.js";
import { forget } from "./previews.js";
import { requestBlock } from "./request.js";
import { thumbnails } from "./thumbnails.js";

const POINTS = 2_000;
const GROUPS = 8;
const OTHER = "other";
const LISTED = 100;
const RADIUS = 5;
const NEAR = 14;
const CLOSEST = 60;
const EDGE = 40;
const PICTURES = 150; // drawn at once
const [SMALLEST, LARGEST] = [36, 120]; // pictures, in pixels
const COLOURS = { [FOLDER]: "folder", [MONTH]: "month" };

export function mapView(app) {
  const [canvas, sheet, tip, legend, chosen, status, colour] = ["canvas", "sheet", "tip", "legend", "chosen", "mapped", "colour"].map($);
  const command = requestBlock($("map-request"));
  let points = [];
  let groups = []; // {name, count, element, fill, hidden}
  let labels = []; // {name, x, y, group}
  let hiddenKinds = new Set();
  let view = { scale: 1, x: 0, y: 0 }; // of the plane's centre, in pixels
  let under = null;
  let selected = null;
  let loaded = null;
  let clusters = []; // {name, x, y, members}: what lies together, named by the nearest word
  let naming = new AbortController();
  let drawing = 0;
  const small = thumbnails({ collection: () => app.collection, drawn: redraw });

  // What there is

  async function load() {
    const label = colour.value || null;
    const request = { path: pathOf("/collections", app.collection) + "/map", query: { limit: POINTS, label } };
    command.update(request);
    show(status, "");
    tell(`Laying out ${plural(app.count, "item")} …`);
    try {
      const answer = await send(request);
      points = answer.points;
      if (!label) for (const point of points) point.label = MANY[point.modality] ?? point.modality;
      const first = Object.keys(COLOURS).filter((key) => answer.keys.includes(key));
      const keys = [...first, ...answer.keys.filter((key) => !first.includes(key))];
      colour.replaceChildren(el("option", { value: "" }, "kind"), ...keys.map((key) => el("option", { value: key }, COLOURS[key] ?? key)));
      colour.value = keys.includes(label) ? label : "";
      const words = { [MONTH]: monthWords, [FOLDER]: shortFolder }[label];
      if (words) for (const point of points) point.label &&= words(point.label);
      const part = points.length < answer.count ? `A sample of ${points.length.toLocaleString("en")} of ` : "";
      show(status, points.length ? `${part}${plural(answer.count, "item")}` : "");
      if (points.length) tell(null);
      else tell("There is nothing in this collection yet.", el("a", { href: "#/add" }, "Add a folder"));
    } catch (error) {
      points = [];
      show(status, error.message, { bad: true });
      if (error.status === 404) tell("This collection is empty, or gone.", el("a", { href: "#/add" }, "Add a folder"));
      else tell(`The map cannot be drawn. ${error.message}`, button("Try again", null, load));
    }
    small.clear();
    nameClusters();
    loaded = `${app.collection} ${app.count}`;
    selected = under = null;
    regroup();
    select(null);
    fit();
    list();
  }

  /** In place of the map, while there is none. */
  function tell(text, ...more) {
    $("sheet-note").hidden = !text;
    $("sheet-note").replaceChildren(...(text ? [el("p", {}, text), ...more] : []));
  }

  async function nameClusters() {
    naming.abort();
    naming = new AbortController();
    clusters = [];
    const groups = groupsOf(points);
    if (!groups.length) return;
    try {
      await nameGroups(groups, app.collection, naming.signal);
    } catch {
      return; // a map without names is a map
    }
    if (naming.signal.aborted) return;
    clusters = groups.filter(({ name }) => name).sort((a, b) => b.members.length - a.members.length);
    $("map-words").textContent = clusters.length ? `Together lie: ${clusters.map(({ name }) => name).join(", ")}.` : "";
    draw();
  }

  function regroup() {
    const counts = new Map();
    for (const { label } of points) if (label != null) counts.set(label, (counts.get(label) ?? 0) + 1);
    const ordered = [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
    groups = ordered.slice(0, GROUPS).map(([name, count]) => ({ name, count }));
    const rest = points.length - groups.reduce((sum, { count }) => sum + count, 0);
    const byName = new Map(groups.map((each) => [each.name, each]));
    if (rest) groups.push({ name: OTHER, count: rest, rest: true });
    for (const point of points) point.group = byName.get(point.label) ?? groups.at(-1);
    labels = ordered.map(([name]) => placed(name, points.filter((each) => each.label === name))).filter(Boolean);
    const kinds = [...new Set(points.map((each) => each.modality))].sort();
    hiddenKinds = new Set();
    legend.replaceChildren(
      el("fieldset", {}, el("legend", {}, colour.selectedOptions[0].textContent),
        groups.map((group, place) => swatch(group, group.rest ? "rest" : `hue-${place}`, (on) => (group.hidden = !on)))),
      colour.value && kinds.length > 1 ? el("fieldset", {}, el("legend", {}, "kind"),
        kinds.map((kind) => swatch({ name: MANY[kind] ?? kind }, `mark ${kind}`, (on) => hiddenKinds[on ? "delete" : "add"](kind)))) : "",
    );
    dress();
  }

  function swatch(group, look, toggled) {
    const box = el("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      toggled(box.checked);
      draw();
      list();
    });
    group.element = el("i", { class: `swatch ${look}`, "aria-hidden": "true" });
    return el("label", {}, box, group.element, el("span", {}, group.name), group.count && el("small", {}, group.count.toLocaleString("en")));
  }

  function dress() {
    for (const group of groups) group.fill = getComputedStyle(group.element).color;
    draw();
  }

  const visible = (point) => !point.group.hidden && !hiddenKinds.has(point.modality);

  // Drawing

  const size = () => ({ width: canvas.clientWidth, height: canvas.clientHeight });

  function fit() {
    const { width, height } = size();
    if (!width) return;
    const reach = [...points, { x: 0.1, y: 0.1 }];
    const span = (axis) => [Math.min(...reach.map((each) => each[axis])), Math.max(...reach.map((each) => each[axis]))];
    const [[left, right], [bottom, top]] = [span("x"), span("y")];
    const scale = Math.min((width - 60) / (right - left || 1), (height - 60) / (top - bottom || 1));
    view = { scale, x: width / 2 - (scale * (left + right)) / 2, y: height / 2 + (scale * (bottom + top)) / 2 };
    view.least = scale / 2;
    draw();
  }

  const at = (point) => [view.x + view.scale * point.x, view.y - view.scale * point.y];

  function redraw() {
    drawing ||= requestAnimationFrame(() => {
      drawing = 0;
      draw();
    });
  }

  function draw() {
    const { width, height } = size();
    if (!width) return;
    const ratio = devicePixelRatio;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const pen = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const radius = RADIUS * Math.min(2, Math.max(0.8, Math.sqrt(300 / Math.max(points.length, 75))));
    pen.globalAlpha = 0.85;
    // What has no colour of its own lies underneath.
    for (const rest of [true, false]) {
      pen.globalAlpha = rest ? 0.4 : 0.85;
      for (const point of points) {
        if (Boolean(point.group.rest) !== rest || !visible(point)) continue;
        pen.fillStyle = point.group.fill;
        shape(pen, point.modality, ...at(point), radius);
        pen.fill();
      }
    }
    pen.globalAlpha = 1;
    drawPictures(pen, width, height);
    drawNames(canvas, colour.value ? labels : clusters, at);
    for (const point of [under, selected]) {
      if (!point || !visible(point)) continue;
      pen.fillStyle = point.group.fill;
      pen.strokeStyle = style.color;
      pen.lineWidth = point === selected ? 3 : 2;
      shape(pen, point.modality, ...at(point), radius + 3);
      pen.fill();
      pen.stroke();
    }
  }

  /** What is near enough to be told apart is drawn as the picture that it is. */
  function drawPictures(pen, width, height) {
    if (app.previews === false || view.scale < 1.6 * (2 * (view.least ?? view.scale))) return;
    const inside = points.filter((point) => {
      const [x, y] = at(point);
      return point.modality === "image" && visible(point) && x > -LARGEST && y > -LARGEST && x < width + LARGEST && y < height + LARGEST;
    });
    if (inside.length > PICTURES) return;
    small.want(inside.map(({ id }) => id));
    const side = Math.min(LARGEST, Math.max(SMALLEST, 0.55 * Math.sqrt((width * height) / Math.max(inside.length, 1))));
    for (const point of inside) {
      const picture = small.of(point.id);
      if (!picture) continue;
      const scale = side / Math.max(picture.width, picture.height);
      const [wide, high] = [scale * picture.width, scale * picture.height];
      const [x, y] = at(point);
      pen.drawImage(picture, x - wide / 2, y - high / 2, wide, high);
      pen.strokeStyle = point.group.fill;
      pen.lineWidth = 2;
      pen.strokeRect(x - wide / 2, y - high / 2, wide, high);
    }
  }

  // Moving about

  function zoom(factor, x = size().width / 2, y = size().height / 2) {
    const least = view.least ?? 1;
    const scale = Math.min(CLOSEST * least, Math.max(least, view.scale * factor));
    const by = scale / view.scale;
    view = { ...view, scale, x: x + by * (view.x - x), y: y + by * (view.y - y) };
    keepSome();
    draw();
  }

  /** The map is never moved to where there is nothing: its nearest item stays inside. */
  function keepSome() {
    const { width, height } = size();
    const inside = ([x, y]) => x > 0 && y > 0 && x < width && y < height;
    if (points.some((point) => visible(point) && inside(at(point)))) return;
    const point = nearest(width / 2, height / 2, Infinity);
    if (!point) return;
    const [x, y] = at(point);
    const inwards = (place, most) => Math.min(most - EDGE, Math.max(EDGE, place)) - place;
    view = { ...view, x: view.x + inwards(x, width), y: view.y + inwards(y, height) };
  }

  function nearest(x, y, reach = NEAR) {
    let [best, least] = [null, reach * reach];
    for (const point of points) {
      if (!visible(point)) continue;
      const [px, py] = at(point);
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [point, distance];
    }
    return best;
  }

  function hover(point) {
    under = point;
    tip.hidden = !point;
    canvas.classList.toggle("over", Boolean(point));
    if (point) {
      const [x, y] = at(point);
      tip.replaceChildren(el("strong", {}, nameOf(point)), el("span", {}, describe(point)));
      tip.classList.toggle("left", x > size().width / 2);
      tip.style.left = `${x}px`;
      tip.style.top = `${Math.min(size().height - 60, Math.max(0, y - 20))}px`;
    }
    draw();
  }

  const describe = (point) => {
    const kind = KINDS[point.modality] ?? point.modality;
    return colour.value && point.label != null ? `${kind}, ${point.label}` : kind;
  };

  const pointers = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = [event.offsetX, event.offsetY];
    const before = pointers.get(event.pointerId);
    if (!before) return hover(nearest(...now));
    moved += Math.abs(now[0] - before[0]) + Math.abs(now[1] - before[1]);
    if (pointers.size === 2) {
      const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
      const spread = ([x, y]) => Math.hypot(x - other[0], y - other[1]);
      zoom(spread(now) / Math.max(1, spread(before)), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else if (moved > 3) {
      view = { ...view, x: view.x + now[0] - before[0], y: view.y + now[1] - before[1] };
      keepSome();
      hover(null);
    }
    pointers.set(event.pointerId, now);
  });
  const lift = (event) => {
    if (pointers.delete(event.pointerId) && moved <= 3 && event.type === "pointerup") {
      const point = nearest(event.offsetX, event.offsetY, event.pointerType === "touch" ? 2 * NEAR : NEAR);
      if (point) select(point);
    }
  };
  canvas.addEventListener("pointerup", lift);
  canvas.addEventListener("pointercancel", lift);
  canvas.addEventListener("pointerleave", () => hover(null));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
  }, { passive: false });

  /** The nearest item in a direction: far to the side counts double. */
  function towards([dx, dy]) {
    const [x, y] = under ? at(under) : [size().width / 2, size().height / 2];
    if (!under) return nearest(x, y, Infinity);
    let [best, least] = [null, Infinity];
    for (const point of points) {
      if (point === under || !visible(point)) continue;
      const [px, py] = at(point);
      const along = (px - x) * dx + (py - y) * dy;
      const aside = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
      if (along > 0 && along + 2 * aside < least) [best, least] = [point, along + 2 * aside];
    }
    return best;
  }

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (ARROWS[event.key]) {
      const point = towards(ARROWS[event.key]);
      if (point) {
        keepInside(point);
        hover(point);
        announce(`${point.id}, ${describe(point)}`);
      }
    } else if (event.key === "+" || event.key === "=") zoom(1.4);
    else if (event.key === "-") zoom(1 / 1.4);
    else if (event.key === "0") fit();
    else if (event.key === "Enter" && under) select(under);
    else if (event.key === "Escape") hover(null);
    else return;
    event.preventDefault();
  });

  function keepInside(point) {
    const [x, y] = at(point);
    const { width, height } = size();
    if (x < 20 || y < 20 || x > width - 20 || y > height - 20) {
      view = { ...view, x: view.x + width / 2 - x, y: view.y + height / 2 - y };
    }
  }

  // One item

  async function select(point) {
    selected = point;
    draw();
    forget(chosen);
    chosen.replaceChildren();
    if (!point) return;
    const { collection } = app;
    const request = { path: pathOf("/items", point.id), query: { collection, include: "preview" } };
    try {
      const item = await send(request);
      if (selected !== point) return;
      const open = () => openDetail([item], item, { collection, like: app.like, compose: app.compose });
      chosen.replaceChildren(card(item, { collection, place: chosen, open, like: app.like, compose: app.compose, tag: "article" }));
    } catch (error) {
      chosen.replaceChildren(el("p", { class: "status bad" }, error.message));
    }
  }

  function list() {
    const wanted = $("narrow").value.trim().toLowerCase();
    const fits = (point) => visible(point) && (!wanted || `${point.id} ${point.label ?? ""}`.toLowerCase().includes(wanted));
    const found = points.filter(fits);
    $("list").replaceChildren(...found.slice(0, LISTED).map((point) =>
      el("li", {}, button(point.id, null, () => {
        hover(null);
        select(point);
      }, { class: "link" }), ` ${describe(point)}`)));
    $("list-more").textContent = found.length > LISTED ? `${(found.length - LISTED).toLocaleString("en")} more: narrow them down` : "";
  }

  $("narrow").addEventListener("input", list);
  colour.addEventListener("change", load);
  $("zoom-in").addEventListener("click", () => zoom(1.5));
  $("zoom-out").addEventListener("click", () => zoom(1 / 1.5));
  canvas.addEventListener("dblclick", (event) => {
    const point = nearest(event.offsetX, event.offsetY);
    if (!point) zoom(2, event.offsetX, event.offsetY);
  });
  $("zoom-all").addEventListener("click", fit);
  document.addEventListener("themechange", dress);
  new ResizeObserver(fit).observe(sheet);

  return {
    title: "Map",
    async openNamed(id) {
      const { collection } = app;
      const item = await send({ path: pathOf("/items", id), query: { collection, include: "preview" } }).catch(() => null);
      if (item) openDetail([item], item, { collection, like: app.like, compose: app.compose }, { remembered: false });
    },
    enter() {
      if (loaded !== `${app.collection} ${app.count}`) load();
      else draw();
    },
    collectionChanged() {
      colour.value = "";
      loaded = null;
      if (!$("map").hidden) load();
    },
  };
}
