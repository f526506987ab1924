// A packed tower → the bytes of its ONNX graph. service/engine/packing.py says what the file holds.

const [float, bits] = [new Float32Array(1), null];
const pattern = new Int32Array(float.buffer);

/** The nearest number of half precision, as its 16 bits. */
function half(value) {
  float[0] = value * 2 ** -112; // its exponent is then that of half precision, below the smallest normal number too
  const whole = pattern[0];
  const rounded = (whole & 0x7fffffff) + 0xfff + ((whole >> 13) & 1);
  return ((whole >>> 16) & 0x8000) | (rounded >> 13);
}

export function unpacked(file) {
  const length = new DataView(file.buffer, file.byteOffset).getUint32(0, true);
  const { size, tensors } = JSON.parse(new TextDecoder().decode(file.subarray(4, 4 + length)));
  const graph = new Uint8Array(size);
  let place = 4 + length;
  let at = 0;
  const take = (count) => file.subarray(place, (place += count));
  const widthOf = (tensor) => tensor.count * (tensor.half ? 2 : 4);
  for (const tensor of tensors) {
    graph.set(take(tensor.at - at), at);
    at = tensor.at + widthOf(tensor);
  }
  graph.set(take(size - at), at);
  for (const tensor of tensors) {
    const { rows, count, low } = tensor;
    const steps = new Float32Array(take(4 * rows).slice().buffer);
    const high = new Int8Array(take(count).slice().buffer);
    const stream = take(Math.ceil((count * low) / 8));
    const mask = (1 << low) - 1;
    const made = tensor.half ? new Uint16Array(count) : new Float32Array(count);
    for (let index = 0, row = 0; row < rows; row++) {
      const step = steps[row];
      for (const end = index + count / rows; index < end; index++) {
        const bit = index * low;
        const byte = Math.floor(bit / 8);
        const below = (((stream[byte] | (stream[byte + 1] << 8)) >> (bit % 8)) & mask);
        const value = Math.fround(((high[index] << low) | below) * step);
        made[index] = tensor.half ? half(value) : value;
      }
    }
    graph.set(new Uint8Array(made.buffer), tensor.at);
  }
  return graph;
}
