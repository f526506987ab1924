// A picture file → the pixels that an image tower takes: resized as Pillow does it, to the bit, not as a canvas would.

const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (x === 0 ? 1 : Math.abs(x) >= 1 ? 0 : (Math.sin(Math.PI * x) / (Math.PI * x)) * (0.54 + 0.46 * Math.cos(Math.PI * x)))],
  bicubic: [2, (given) => {
    const x = Math.abs(given);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  }],
  lanczos: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)],
};
const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const BITS = 22; // of the fixed-point coefficients
const [CLEAR, CONTRAST] = [0.02, 32]; // as in service/contract/images.py
const [LONG, GAP] = [4, 2];

/** What each of `size` places takes of `length` samples, from `from` to `to`: [first, coefficients]. */
function coefficients(length, from, to, size, filter) {
  const scale = (to - from) / size;
  if (filter === "nearest") {
    let at = from - scale / 2; // added up, as Pillow does: the sum is rounded each time
    return Array.from({ length: size }, (_, place) => [Math.min(length - 1, Math.floor((at = place ? at + scale : from + scale / 2))), [1 << BITS]]);
  }
  const [reach, weigh] = FILTERS[filter];
  const stretch = Math.max(1, scale);
  return Array.from({ length: size }, (_, place) => {
    const centre = from + (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach * stretch + 0.5));
    const last = Math.min(length, Math.trunc(centre + reach * stretch + 0.5));
    const weights = Array.from({ length: last - first }, (_, x) => weigh((x + first - centre + 0.5) * (1 / stretch)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, Int32Array.from(weights, (each) => {
      const whole = (sum ? each / sum : each) * (1 << BITS);
      return Math.trunc(whole + (whole < 0 ? -0.5 : 0.5));
    })];
  });
}

/** Rows of `channels` samples a pixel → rows of RGB, as wide as there are `parts`; samples become bytes. */
function across(samples, width, channels, parts) {
  const height = samples.length / width / channels;
  const made = new Uint8ClampedArray(3 * parts.length * height);
  for (let row = 0, at = 0; row < height; row++) {
    for (const [first, weights] of parts) {
      const start = channels * (row * width + first);
      for (let channel = 0; channel < 3; channel++) {
        let sum = 1 << (BITS - 1);
        for (let x = 0, place = start + channel; x < weights.length; x++, place += channels) sum += samples[place] * weights[x];
        made[at++] = Math.floor(sum / (1 << BITS));
      }
    }
  }
  return made;
}

/** The same down: of rows of `stride` samples, as many as there are `parts`. */
function down(samples, stride, parts) {
  const made = new Uint8ClampedArray(stride * parts.length);
  const sums = new Float64Array(stride);
  parts.forEach(([first, weights], row) => {
    sums.fill(1 << (BITS - 1));
    weights.forEach((weight, y) => {
      const start = (first + y) * stride;
      for (let x = 0; x < stride; x++) sums[x] += samples[start + x] * weight;
    });
    for (let x = 0; x < stride; x++) made[row * stride + x] = Math.floor(sums[x] / (1 << BITS));
  });
  return made;
}

/** RGBA samples → RGB samples of another size, of the part [left, top, right, bottom]. */
export function resized({ data, width, height }, [wide, high], filter, box = [0, 0, width, height]) {
  const [left, top, right, bottom] = box;
  const columns = coefficients(width, left, right, wide, filter);
  const rows = coefficients(height, top, bottom, high, filter);
  // Which way goes first decides what is rounded in between: so does Pillow 13, by what was tried.
  if (height > high && height - high > 2 * (width - wide)) return across(down(data, 4 * width, rows), width, 4, columns);
  return down(across(data, width, 4, columns), 3 * wide, rows);
}

/** The picture in which each pixel is the mean of a square of `times` pixels a side: what libjpeg decodes at a fraction. */
function reduced({ data, width, height }, times) {
  const [wide, high] = [Math.ceil(width / times), Math.ceil(height / times)];
  const made = new Uint8ClampedArray(4 * wide * high);
  for (let y = 0, at = 0; y < high; y++) {
    const bottom = Math.min(height, (y + 1) * times);
    for (let x = 0; x < wide; x++, at += 4) {
      const right = Math.min(width, (x + 1) * times);
      let [red, green, blue] = [0, 0, 0];
      for (let row = y * times; row < bottom; row++) {
        for (let place = 4 * (row * width + x * times), end = 4 * (row * width + right); place < end; place += 4) {
          red += data[place];
          green += data[place + 1];
          blue += data[place + 2];
        }
      }
      const count = (bottom - y * times) * (right - x * times);
      made[at] = red / count;
      made[at + 1] = green / count;
      made[at + 2] = blue / count;
    }
  }
  return { data: made, width: wide, height: high };
}

/** Where what is visible would not be seen on white, transparency is laid on black. */
function laidOnGround(pixels) {
  const { data } = pixels;
  let [alpha, contrast] = [0, 0];
  for (let at = 0; at < data.length; at += 4) {
    alpha += data[at + 3];
    contrast += data[at + 3] * (255 - Math.min(data[at], data[at + 1], data[at + 2]));
  }
  const count = data.length / 4;
  const ground = 1 - alpha / 255 / count >= CLEAR && alpha > 0 && contrast < CONTRAST * alpha ? 0 : 255;
  if (alpha < 255 * count) {
    for (let at = 0; at < data.length; at++) {
      const opacity = data[at | 3] / 255;
      if ((at & 3) !== 3) data[at] = Math.round(data[at] * opacity + ground * (1 - opacity));
    }
  }
  return pixels;
}

async function decoded(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error("This browser cannot read that picture. JPEG, PNG and WebP can be read everywhere");
  }
  const { width, height } = bitmap;
  const pen = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  pen.drawImage(bitmap, 0, 0);
  bitmap.close();
  return laidOnGround(pen.getImageData(0, 0, width, height));
}

/** What of the picture is resized, to which size, and where in it the crop begins; by the size of the `whole` picture. */
function geometry(spec, whole, { width, height }) {
  const middle = (wide, high) => [wide, high, Math.floor((wide - spec.width) / 2), Math.floor((high - spec.height) / 2)];
  if (spec.resize === "squash") {
    const [high, wide] = spec.squashed ?? [spec.height, spec.width];
    return [[0, 0, width, height], ...middle(wide, high)];
  }
  const edge = spec.shortest_edge ?? Math.max(spec.height, spec.width);
  const sides = [whole.width, whole.height];
  const [wide, high, left, top] = middle(...sides.map((length) => Math.trunc((edge * length) / Math.min(...sides))));
  if (Math.max(wide, high) <= LONG * Math.min(wide, high)) return [[0, 0, width, height], wide, high, left, top];
  const [x, y] = [width / wide, height / high];
  return [[left * x, top * y, Math.min(width, (left + spec.width) * x), Math.min(height, (top + spec.height) * y)], spec.width, spec.height, 0, 0];
}

/** The fraction at which the server decodes a JPEG of which less is enough: 1, 2, 4 or 8 times smaller. */
function reduction(spec, width, height) {
  const [high, wide] = spec.squashed ?? [spec.height, spec.width];
  const edge = (spec.shortest_edge ?? Math.max(spec.height, spec.width)) / Math.min(width, height);
  const enough = spec.resize === "squash" ? [wide, high] : [Math.ceil(edge * width), Math.ceil(edge * height)];
  const room = Math.min(width / Math.ceil(GAP * enough[0]), height / Math.ceil(GAP * enough[1]));
  return [8, 4, 2].find((times) => times <= room) ?? 1;
}

/** A picture file → float32 (3, height, width), as the tower's preprocessing says. */
export async function pixelsOf(file, spec) {
  const whole = await decoded(file);
  const [first, second] = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  const times = first === 0xff && second === 0xd8 ? reduction(spec, whole.width, whole.height) : 1;
  const picture = times > 1 ? reduced(whole, times) : whole;
  const [box, wide, high, left, top] = geometry(spec, whole, picture);
  const samples = resized(picture, [wide, high], spec.resample, box);
  const made = new Float32Array(3 * spec.height * spec.width);
  for (let channel = 0, at = 0; channel < 3; channel++) {
    const levels = Float32Array.from({ length: 256 }, (_, level) => (Math.fround(level / 255) - spec.mean[channel]) / spec.std[channel]);
    for (let y = 0; y < spec.height; y++) {
      for (let x = 0; x < spec.width; x++) made[at++] = levels[samples[3 * ((top + y) * wide + left + x) + channel]];
    }
  }
  return made;
}
