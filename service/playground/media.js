// Files and recordings → what the server reads. Nothing leaves the page here.

const IMAGES = /\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|heif)$/i;
const OTHER_IMAGES = /\.(jxl|ico)$/i;
const SOUNDS = /\.(wav|flac|ogg|oga|opus|mp3|aiff?|caf|au)$/i;
const OTHER_SOUNDS = /\.(m4a|m4b|aac|weba|wma|amr)$/i;
const VIDEOS = /\.(mp4|m4v|mov|mkv|webm|avi|ogv|3gp|mts|m2ts)$/i;
const ARRAYS = /\.npy$/i;
const TEXTS = /\.(txt|md|markdown|text)$/i;

const LARGEST_IMAGE = 25e6;
const SIDE = 2048;
const EXAMPLE_SIDE = 768;
const LARGE_EXAMPLE = 4e5;
const RATE = 24_000;
export const PEAKS = 80;
export const LONGEST_S = 30;

/** image, audio, video, array, text, or null for what is none of them. */
export function kindOf(file) {
  const { name, type } = file;
  if (IMAGES.test(name) || OTHER_IMAGES.test(name)) return "image";
  if (SOUNDS.test(name) || OTHER_SOUNDS.test(name)) return "audio";
  if (TEXTS.test(name)) return "text";
  if (ARRAYS.test(name)) return "array";
  if (VIDEOS.test(name)) return type.startsWith("audio/") ? "audio" : "video";
  if (type.startsWith("image/") && type !== "image/svg+xml") return "image";
  return /^(audio|video)\//.exec(type)?.[1] ?? null;
}

/**
 * An image or sound in a form that the server reads: as it is where it may read that, else made anew by the browser.
 * What the browser cannot read either goes as it is: the server says what is wrong with it.
 */
export async function readable(file) {
  try {
    if (["video", "array"].includes(kindOf(file))) return file;
    if (kindOf(file) === "image") {
      const known = IMAGES.test(file.name) || /^image\/(jpeg|png|webp|gif|bmp|tiff|avif|hei[cf])$/.test(file.type);
      return known && file.size <= LARGEST_IMAGE ? file : await redrawn(file);
    }
    const known = SOUNDS.test(file.name) || /^audio\/(x-)?(wav|wave|flac|ogg|mpeg|mp3)$/.test(file.type);
    return known ? file : wavFile(await decode(file), stem(file.name));
  } catch {
    return file;
  }
}

/** An image or sound as base64, a large image made smaller, to be sent within JSON. */
export async function inJson(file) {
  let data = await readable(file);
  const kind = kindOf(file);
  if (kind === "image" && data.size > LARGE_EXAMPLE) data = await redrawn(data, EXAMPLE_SIDE).catch(() => data);
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(data);
  });
  return { [kind]: url.slice(url.indexOf(",") + 1) };
}

async function redrawn(file, side = SIDE) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(Math.round(bitmap.width * scale), Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const data = await canvas.convertToBlob({ type: "image/webp", quality: 0.92 }); // what is transparent stays so
  return new File([data], `${stem(file.name)}.${data.type.split("/")[1]}`, { type: data.type });
}

async function decode(file) {
  const context = new OfflineAudioContext(1, 1, RATE);
  try {
    return await context.decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} is no sound that this browser can read`);
  }
}

const stem = (name) => name.replace(/\.[^.]*$/, "");

/** The heights of a sound's waveform, 0 to 100, and its length; null where the browser cannot decode it. */
export async function waveform(file) {
  try {
    const samples = mono(await decode(file));
    return { peaks: peaksOf(samples), seconds: samples.length / RATE };
  } catch {
    return null;
  }
}

function peaksOf(samples) {
  const loudest = Array.from({ length: PEAKS }, (_, bar) => {
    const [from, to] = [bar, bar + 1].map((each) => Math.floor((each * samples.length) / PEAKS));
    let top = 0;
    for (let place = from; place < to; place++) top = Math.max(top, Math.abs(samples[place]));
    return top;
  });
  const top = Math.max(...loudest) || 1;
  return loudest.map((each) => Math.round((100 * each) / top));
}

function mono(sound) {
  const mixed = new Float32Array(sound.length);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    const own = sound.getChannelData(channel);
    for (let place = 0; place < own.length; place++) mixed[place] += own[place] / sound.numberOfChannels;
  }
  return mixed;
}

/** A decoded sound → a WAV of 16 bits with all its channels: how they become one is the server's to know. */
function wavFile(sound, name) {
  const channels = sound.numberOfChannels;
  const size = 2 * channels * sound.length;
  const view = new DataView(new ArrayBuffer(44 + size));
  const ascii = (at, text) => [...text].forEach((each, place) => view.setUint8(at + place, each.charCodeAt(0)));
  ascii(0, "RIFF");
  view.setUint32(4, 36 + size, true);
  ascii(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, channels, true);
  view.setUint32(24, sound.sampleRate, true);
  view.setUint32(28, 2 * channels * sound.sampleRate, true);
  view.setUint16(32, 2 * channels, true);
  view.setUint16(34, 16, true);
  ascii(36, "data");
  view.setUint32(40, size, true);
  for (let channel = 0; channel < channels; channel++) {
    sound.getChannelData(channel).forEach((each, place) => {
      view.setInt16(44 + 2 * (channels * place + channel), 32767 * Math.max(-1, Math.min(1, each)), true);
    });
  }
  return new File([view], `${name}.wav`, { type: "audio/wav" });
}

let recordings = 0;

/** Record from the microphone until stop() is called or LONGEST_S are over; `done` is the WAV. Throws where it may not. */
export async function startRecording() {
  if (!navigator.mediaDevices) throw new Error("Recording needs a page that comes over HTTPS or from this machine");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    const none = error.name === "NotFoundError";
    throw new Error(none ? "There is no microphone" : "The browser was not allowed to use the microphone");
  }
  const context = new AudioContext();
  const analyser = new AnalyserNode(context, { fftSize: 1024 });
  context.createMediaStreamSource(stream).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  const recorder = new MediaRecorder(stream);
  const pieces = [];
  recorder.ondataavailable = (event) => pieces.push(event.data);
  const ended = new Promise((resolve) => (recorder.onstop = resolve));
  recorder.start();
  const limit = setTimeout(() => recorder.stop(), LONGEST_S * 1000);
  const done = ended.then(async () => {
    clearTimeout(limit);
    stream.getTracks().forEach((track) => track.stop());
    context.close();
    const taken = new File(pieces, `recording-${++recordings}`, { type: recorder.mimeType });
    return wavFile(await decode(taken), taken.name);
  });
  return {
    done,
    stop: () => recorder.state === "recording" && recorder.stop(),
    /** The loudest sample of the last moment, 0 to 1. */
    level() {
      analyser.getFloatTimeDomainData(samples);
      return samples.reduce((loudest, sample) => Math.max(loudest, Math.abs(sample)), 0);
    },
  };
}

/** What was dropped, folders opened: [{path, file}]. To be called before anything is awaited, while the drop lasts. */
export function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return Promise.resolve([...transfer.files].map((file) => ({ path: file.name, file })));
  return Promise.all(entries.map(opened)).then((found) => found.flat());
}

async function opened(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ path: entry.fullPath.replace(/^\//, ""), file }];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    // A reader gives at most a hundred at a time.
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    for (const each of some) found.push(...(await opened(each)));
  }
  return found;
}
