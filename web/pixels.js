// A photograph as the pixels that the graph takes: Pillow's bicubic resampling, bit for bit.
// Source: Pillow, src/libImaging/Resample.c; ImageOps.fit for the cut.

const BITS = 22; // of the fractions that Pillow computes with
const SUPPORT = 2; // of the bicubic filter, in pixels of the smaller picture
const A = -0.5;

function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return ((A + 2) * x - (A + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * A;
  return 0;
}

// For each pixel of the result: the first pixel of the source that counts, and the weights.
function weights(length, start, end, size) {
  const scale = (end - start) / size;
  const wide = Math.max(scale, 1);
  const found = [];
  for (let place = 0; place < size; place++) {
    const centre = start + (place + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - SUPPORT * wide + 0.5), 0);
    const last = Math.min(Math.trunc(centre + SUPPORT * wide + 0.5), length);
    const real = [];
    for (let x = first; x < last; x++) real.push(bicubic((x - centre + 0.5) * (1 / wide)));
    const sum = real.reduce((a, b) => a + b, 0);
    const whole = real.map((w) => {
      const fraction = (sum === 0 ? w : w / sum) * 2 ** BITS;
      return Math.trunc(fraction < 0 ? fraction - 0.5 : fraction + 0.5);
    });
    found.push([first, Int32Array.from(whole)]);
  }
  return found;
}

// The part of a picture that is taken: all of it, or the square in its middle.
function box(width, height, fit) {
  if (fit !== "crop") return [0, 0, width, height];
  const side = Math.min(width, height);
  const left = (width - side) * 0.5;
  const top = (height - side) * 0.5;
  return [left, top, left + side, top + side];
}

// Planes of bytes, `lines` x `length` each, resampled along their length; the result is turned:
// `kernels.length` x `lines`.
function along(planes, lines, length, kernels) {
  const size = kernels.length;
  return planes.map((plane) => {
    const turned = new Uint8Array(size * lines);
    for (let place = 0; place < size; place++) {
      const [first, kernel] = kernels[place];
      for (let line = 0; line < lines; line++) {
        let sum = 1 << (BITS - 1);
        const start = line * length + first;
        for (let i = 0; i < kernel.length; i++) sum += plane[start + i] * kernel[i];
        turned[place * lines + line] = Math.min(Math.max(sum >> BITS, 0), 255);
      }
    }
    return turned;
  });
}

// Planes of `rows` x `columns` bytes with rows for columns.
function turned(planes, rows, columns) {
  return planes.map((plane) => {
    const result = new Uint8Array(plane.length);
    for (let y = 0; y < rows; y++)
      for (let x = 0; x < columns; x++) result[x * rows + y] = plane[y * columns + x];
    return result;
  });
}

// RGBA (4 bytes a pixel, row by row) to RGB planes, size x size.
export function resample(rgba, width, height, { size, fit }) {
  const [left, top, right, bottom] = box(width, height, fit);
  const across = weights(width, left, right, size);
  const down = weights(height, top, bottom, size);
  const planes = [0, 1, 2].map((channel) => {
    const plane = new Uint8Array(width * height);
    for (let i = 0; i < plane.length; i++) plane[i] = rgba[4 * i + channel];
    return plane;
  });
  // Bytes are rounded between the passes, so that their order shows. Pillow 13 begins with the
  // height where that leaves less to do.
  const small =
    height > size && height + size > 2 * width
      ? turned(along(along(turned(planes, height, width), width, height, down), size, width, across), size, size)
      : along(along(planes, height, width, across), size, height, down);
  const whole = new Uint8Array(3 * size * size);
  small.forEach((plane, i) => whole.set(plane, i * size * size));
  return whole;
}

// Phones give no canvas of more pixels than about this.
const MOST_PIXELS = 16_000_000;

// A file's upright pixels in the colours of sRGB, transparency on white.
export async function decode(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  const shrink = Math.min(1, Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)));
  const width = Math.max(1, Math.round(bitmap.width * shrink));
  const height = Math.max(1, Math.round(bitmap.height * shrink));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}
