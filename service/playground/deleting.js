// Deleting with a way back: an item goes when its message does, and until then it is only hidden.

import { pathOf, send } from "./api.js";
import { nameOf } from "./items.js";
import { endToast, toast } from "./toast.js";

const waiting = new Set(); // "collection id" of what is hidden

const keyOf = (item, collection) => `${collection} ${item.id}`;

export const isDeleted = (item, collection) => waiting.has(keyOf(item, collection));

/** Hide an item, and delete it unless the person undoes it. `undone` is called then, `failed` if the server refuses. */
export function deleteItem(item, collection, { undone, failed }) {
  const key = keyOf(item, collection);
  const name = nameOf(item);
  toast(`${name} is removed from this collection. Its file stays where it is.`, {
    action: {
      text: "Undo",
      run() {
        waiting.delete(key);
        undone();
      },
    },
    async over() {
      try {
        await send({ method: "DELETE", path: pathOf("/items", item.id), query: { collection }, keepalive: true });
        waiting.delete(key); // the same file may be added again
      } catch (error) {
        if (error.status !== 404) {
          waiting.delete(key);
          failed(`${name} is still there. ${error.message}`);
        }
      }
    },
  });
  waiting.add(key);
}

addEventListener("pagehide", endToast);
