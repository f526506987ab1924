// Small pictures of items for a canvas, fetched a few at a time.

import { blob, pathOf, send } from "./api.js";
import { previewRequest } from "./previews.js";

const AT_ONCE = 4;
const KEPT = 400;
const SIDE = 160; // pixels

/** `drawn` is called when a picture has come; of(id) is the picture, or null while there is none. */
export function thumbnails({ collection, drawn }) {
  const known = new Map(); // id → ImageBitmap, or null: on its way, or without one
  let queue = [];
  let busy = 0;

  async function fetchNext() {
    if (busy >= AT_ONCE || !queue.length) return;
    busy++;
    const id = queue.shift();
    const name = collection();
    try {
      // The item is asked for first: a preview that is not there would be an error on the console.
      const item = await send({ path: pathOf("/items", id), query: { collection: name, include: "preview" } });
      if (item.preview?.media_type?.startsWith("image/")) {
        const picture = await createImageBitmap(await blob(previewRequest(item, name)));
        const scale = Math.min(1, SIDE / Math.max(picture.width, picture.height));
        const small = await createImageBitmap(picture, { resizeWidth: Math.ceil(scale * picture.width), resizeHeight: Math.ceil(scale * picture.height), resizeQuality: "medium" });
        picture.close();
        if (name === collection()) {
          known.set(id, small);
          drawn();
        }
      }
    } catch {
      // A point stays a point.
    } finally {
      busy--;
      fetchNext();
    }
  }

  return {
    of: (id) => known.get(id) ?? null,
    /** Fetch those of these that are not here yet, in place of what was asked for before. */
    want(ids) {
      for (const id of queue) known.delete(id); // they may be wanted again
      queue = ids.filter((id) => !known.has(id));
      for (const id of queue) known.set(id, null);
      for (const id of [...known.keys()].slice(0, Math.max(0, known.size - KEPT))) {
        known.get(id)?.close();
        known.delete(id);
      }
      for (let place = 0; place < AT_ONCE; place++) fetchNext();
    },
    clear() {
      queue = [];
      for (const picture of known.values()) picture?.close();
      known.clear();
    },
  };
}
