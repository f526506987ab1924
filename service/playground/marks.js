// What the map draws of a point and of a name.

const FEW = 5;
const LONGEST = 24;

/** The outline of an item of a kind, which colour alone would not tell. */
export function shape(pen, modality, x, y, radius) {
  pen.beginPath();
  if (modality === "image") pen.arc(x, y, radius, 0, 7);
  else if (modality === "audio") {
    pen.moveTo(x, y - 1.25 * radius);
    pen.lineTo(x + 1.15 * radius, y + 0.8 * radius);
    pen.lineTo(x - 1.15 * radius, y + 0.8 * radius);
    pen.closePath();
  } else if (modality === "text") pen.rect(x - 0.9 * radius, y - 0.9 * radius, 1.8 * radius, 1.8 * radius);
  else {
    pen.moveTo(x, y - 1.3 * radius);
    pen.lineTo(x + 1.3 * radius, y);
    pen.lineTo(x, y + 1.3 * radius);
    pen.lineTo(x - 1.3 * radius, y);
    pen.closePath();
  }
}

/** Each label where the middle of its items is, the most frequent first, as far as there is room. */
export function drawNames(canvas, named, at) {
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  pen.font = `600 13px ${style.fontFamily}`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineJoin = "round";
  const taken = [];
  for (const { name, x, y, group } of named) {
    if (group?.hidden) continue;
    const [px, middle] = at({ x, y });
    const py = middle - (group ? 14 : 0);
    const half = pen.measureText(name).width / 2 + 6;
    const overlaps = (box) => Math.abs(box.px - px) < box.half + half && Math.abs(box.py - py) < 20;
    const outside = px < -half || py < 0 || px > canvas.clientWidth + half || py > canvas.clientHeight;
    if (outside || taken.some(overlaps)) continue;
    taken.push({ px, py, half });
    pen.strokeStyle = style.backgroundColor;
    pen.lineWidth = 4;
    pen.strokeText(name, px, py);
    pen.fillStyle = !group || group.rest ? style.color : group.fill;
    pen.fillText(name, px, py);
  }
}

/** A label in the middle of its items: the median, which a stray one does not move. Null for a label of few. */
export function placed(name, own) {
  if (own.length < FEW) return null;
  const middle = (axis) => own.map((each) => each[axis]).sort((a, b) => a - b)[Math.floor(own.length / 2)];
  const short = name.length > LONGEST ? `${name.slice(0, LONGEST)}…` : name;
  return { name: short, x: middle("x"), y: middle("y"), group: own[0].group };
}
