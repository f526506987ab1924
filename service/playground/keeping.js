// Files that were dropped or recorded, kept in this browser so that an address of the page can name them.

const NAME = "isthmus-files";
const STORE = "files";
const MOST = 40;
const MOST_BYTES = 200e6;

const opening = new Promise((resolve) => {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "key" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null); // a private window may have none
  } catch {
    resolve(null);
  }
});

async function work(mode, task) {
  const database = await opening;
  if (!database) return null;
  return new Promise((resolve) => {
    const request = task(database.transaction(STORE, mode).objectStore(STORE));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  });
}

/** The key by which keptFile() finds the file again. */
export async function keepFile(file) {
  const key = await fingerprint(file);
  const kept = (await work("readonly", (store) => store.getAll())) ?? [];
  kept.sort((a, b) => b.when - a.when);
  let bytes = file.size;
  for (const [place, other] of kept.entries()) {
    bytes += other.file.size;
    if (place >= MOST - 1 || bytes > MOST_BYTES) await work("readwrite", (store) => store.delete(other.key));
  }
  await work("readwrite", (store) => store.put({ key, file, when: Date.now() }));
  return key;
}

/** The file, or null where this browser has it no more. */
export async function keptFile(key) {
  return (await work("readonly", (store) => store.get(key)))?.file ?? null;
}

/** Twelve letters that are the same for the same bytes. FNV-1a: a page that does not come over HTTPS has no SHA-256. */
async function fingerprint(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let [low, high] = [0x811c9dc5, 0x9dc5811c];
  for (const byte of bytes) {
    low = Math.imul(low ^ byte, 0x01000193);
    high = Math.imul(high ^ byte, 0x85ebca6b);
  }
  return [low, high].map((half) => (half >>> 0).toString(36).padStart(7, "0")).join("").slice(0, 14);
}
