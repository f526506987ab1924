// When a photograph was taken, as its camera wrote it into the file.

const [READ, TIFF_BE] = [131_072, 0x4d4d];
const [EXIF_FOLDER, TAKEN, CHANGED] = [0x8769, 0x9003, 0x0132];

/** Seconds since 1970 as the camera's clock showed, read as UTC; null where a JPEG says nothing of it. */
export async function takenAt(file) {
  try {
    const view = new DataView(await file.slice(0, READ).arrayBuffer());
    if (view.getUint16(0) !== 0xffd8) return null;
    for (let at = 2; at + 4 < view.byteLength; at += 2 + view.getUint16(at + 2)) {
      if (view.getUint16(at) === 0xffe1 && view.getUint32(at + 4) === 0x45786966) return dateIn(view, at + 10);
      if (view.getUint8(at) !== 0xff || view.getUint16(at) === 0xffda) return null;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // the file ends early, or lies
  }
  return null;
}

function dateIn(view, base) {
  const little = view.getUint16(base) !== TIFF_BE;
  const entries = (at) => Array.from({ length: view.getUint16(at, little) }, (_, place) => at + 2 + 12 * place);
  const find = (at, tag) => entries(at).find((entry) => view.getUint16(entry, little) === tag);
  const offset = (entry) => base + view.getUint32(entry + 8, little);
  const first = base + view.getUint32(base + 4, little);
  const inner = find(first, EXIF_FOLDER);
  const entry = (inner && find(offset(inner), TAKEN)) ?? find(first, CHANGED);
  if (!entry) return null;
  const text = Array.from({ length: 19 }, (_, place) => String.fromCharCode(view.getUint8(offset(entry) + place))).join("");
  const parts = /^(\d{4}):(\d\d):(\d\d) (\d\d):(\d\d):(\d\d)$/.exec(text)?.slice(1).map(Number);
  if (!parts || !parts[1] || !parts[2]) return null;
  return Date.UTC(parts[0], parts[1] - 1, ...parts.slice(2)) / 1000;
}
