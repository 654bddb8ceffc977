// From a picture's file to the pixels that a model was trained on: those of predict.py, bit for bit once it is decoded.
//
// Resizing is that of Pillow for 8-bit pictures, from its documented algorithm: a pass per axis, the horizontal one
// first; a kernel that is as much wider as the picture is made smaller; weights normalised to 1, then rounded to 22
// bits behind the point; whole numbers from 0 to 255 after each pass.

import { readHeader } from "./header.js";
import { round } from "./numbers.js";

const BITS = 22; // of weights, behind the point
const TILE = 2048; // pixels on a side that are read from the canvas at once: browsers limit its size

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

/** Kernel by name: its half width in pixels, and its weight at a distance. "nearest" has none: it takes a pixel. */
const KERNELS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)],
  bicubic: [2, (x) => cubic(Math.abs(x), -0.5)],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

/** Cubic convolution (Keys 1981) at a distance of 0 or more. */
function cubic(x, a) {
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/**
 * A picture's file as the model takes it.
 *
 * @param {Blob} file
 * @param {object} settings - what preprocessing.json holds.
 * @returns {Promise<{pixels: Float32Array, thumbnail: ImageBitmap}>} (3, size, size), and a small picture to show.
 * @throws {Error} a file that is no picture, or one that predict.py or this browser would not read as it is meant.
 */
export async function read(file, settings, thumbnail = 96) {
  const image = await decode(file, settings, thumbnail);
  return { pixels: prepare(image, settings), thumbnail: image.thumbnail };
}

/** A picture's file -> {width, height, data}: RGB, a byte each, EXIF rotation applied, transparent laid on white. */
export async function decode(file, settings, thumbnail = 0) {
  if (!file.size) throw new Error("an empty file");
  const bytes = new Uint8Array(await file.arrayBuffer());
  const header = check(bytes, settings);
  // Without the file's name or type: what it is, its content says.
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([bytes]), options);
  } catch {
    throw new Error(`${header.format}: damaged, cut off, or of a kind that this browser does not decode`);
  }
  try {
    const { width, height } = bitmap;
    checkSize(width, height, settings);
    if (header.width !== null && width * height !== header.width * header.height) {
      throw new Error(`this browser makes ${width} x ${height} pixels of ${header.width} x ${header.height}`);
    }
    const found = { width, height, data: pixelsOf(bitmap), thumbnail: null };
    if (thumbnail) {
      const share = Math.min(1, thumbnail / Math.max(width, height));
      const [resizeWidth, resizeHeight] = [width, height].map((length) => Math.max(1, Math.round(length * share)));
      found.thumbnail = await createImageBitmap(bitmap, { resizeWidth, resizeHeight, resizeQuality: "medium" });
    }
    return found;
  } finally {
    bitmap.close();
  }
}

/** What a file says of itself. Refused is what predict.py refuses, and what it turns and browsers do not. */
function check(bytes, settings) {
  let header;
  try {
    header = readHeader(bytes);
  } catch (error) {
    throw error instanceof RangeError ? new Error("cut off within its header") : error;
  }
  if (!header || !settings.formats.includes(header.format)) {
    throw new Error(`in none of the formats ${settings.formats.join(", ")}`);
  }
  if (header.width !== null) checkSize(header.width, header.height, settings);
  const turned = (orientation) => orientation > 1 && orientation < 9;
  if (header.format === "WEBP" && turned(header.orientation)) {
    throw new Error("a WEBP turned by its EXIF, which browsers do not heed; save it turned");
  }
  if (header.orientation === null) {
    const [, , xmp] = new TextDecoder("latin1").decode(bytes).match(/tiff:Orientation(="|>)([0-9])/) ?? [];
    if (turned(Number(xmp ?? 1))) throw new Error("turned by its XMP, which browsers do not heed; save it turned");
    if (header.packed) throw new Error("a text with EXIF or XMP, which may turn it and is not read here; save it anew");
  }
  return header;
}

function checkSize(width, height, { max_pixels, max_ratio }) {
  if (!(width * height > 0)) throw new Error(`${width} x ${height}: no pixels`);
  if (width * height > max_pixels || Math.max(width, height) > max_ratio * Math.min(width, height)) {
    throw new Error(`${width} x ${height} pixels are too many, or too long for their width`);
  }
}

/** RGB of a decoded picture, laid on white. */
function pixelsOf(bitmap) {
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(Math.min(width, TILE), Math.min(height, TILE));
  const context = canvas.getContext("2d", { willReadFrequently: true }); // in memory: no graphics card computes pixels
  const data = new Uint8Array(3 * width * height);
  for (let top = 0; top < height; top += TILE) {
    for (let left = 0; left < width; left += TILE) {
      const [wide, high] = [Math.min(TILE, width - left), Math.min(TILE, height - top)];
      context.fillStyle = "#fff";
      context.fillRect(0, 0, wide, high);
      context.drawImage(bitmap, left, top, wide, high, 0, 0, wide, high);
      const tile = context.getImageData(0, 0, wide, high).data;
      for (let y = 0; y < high; y++) {
        let to = 3 * ((top + y) * width + left);
        for (let from = 4 * y * wide; from < 4 * (y + 1) * wide; from += 4) {
          data[to++] = tile[from];
          data[to++] = tile[from + 1];
          data[to++] = tile[from + 2];
        }
      }
    }
  }
  return data;
}

/**
 * Whether pixels are read back as they were drawn. Browsers that hide who their user is change them on purpose, and
 * answers would be wrong in silence.
 */
export function readsTruly() {
  const size = 64;
  const context = new OffscreenCanvas(size, size).getContext("2d", { willReadFrequently: true });
  const drawn = context.createImageData(size, size);
  for (let at = 0; at < drawn.data.length; at++) drawn.data[at] = at % 4 === 3 ? 255 : (at * 151) % 256;
  context.putImageData(drawn, 0, 0);
  const found = context.getImageData(0, 0, size, size).data;
  return found.every((value, at) => value === drawn.data[at]);
}

/** RGB {width, height, data} -> (3, size, size) float32: resized, the centre cut out, standardised per channel. */
export function prepare(image, settings) {
  const { size, scaled_size: side, resize: rule, interpolation, mean, std } = settings;
  let [width, height] = [side, side];
  if (rule === "shortest") {
    const scale = side / Math.min(image.width, image.height);
    [width, height] = [image.width, image.height].map((length) => Math.max(side, round(length * scale)));
  }
  const scaled = resize(image, width, height, interpolation);
  const [left, top] = [width, height].map((length) => round((length - size) * 0.5));
  const pixels = new Float32Array(3 * size * size);
  const f32 = Math.fround; // every step in single precision, as in Python
  for (let channel = 0; channel < 3; channel++) {
    const [middle, spread] = [f32(mean[channel]), f32(std[channel])];
    const standardised = Float32Array.from({ length: 256 }, (_, value) => f32(f32(value / 255) - middle) / spread);
    let to = channel * size * size;
    for (let y = top; y < top + size; y++) {
      for (let x = left; x < left + size; x++) {
        const inside = x >= 0 && y >= 0 && x < width && y < height; // a crop larger than the picture is black around it
        pixels[to++] = standardised[inside ? scaled.data[3 * (y * width + x) + channel] : 0];
      }
    }
  }
  return pixels;
}

/** RGB {width, height, data} -> the same, so wide and so high. */
export function resize(image, width, height, interpolation) {
  if (width === image.width && height === image.height) return image;
  if (interpolation === "nearest") return nearest(image, width, height);
  const across = width === image.width ? image : resizeAcross(image, width, KERNELS[interpolation]);
  return height === image.height ? across : resizeDown(across, height, KERNELS[interpolation]);
}

/** For each of `to` pixels of a line of `from`: the first that it is made of, and the whole weights from there. */
function weights(from, to, [halfWidth, kernel]) {
  const scale = from / to;
  const wider = Math.max(1, scale);
  const support = halfWidth * wider;
  return Array.from({ length: to }, (_, at) => {
    const centre = (at + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(from, Math.trunc(centre + support + 0.5));
    const raw = Array.from({ length: last - first }, (_, k) => kernel((k + first - centre + 0.5) * (1 / wider)));
    const sum = raw.reduce((total, weight) => total + weight, 0);
    const whole = raw.map((weight) => {
      const scaled = (sum === 0 ? weight : weight / sum) * 2 ** BITS;
      return Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    });
    return { first, whole: Int32Array.from(whole) };
  });
}

const HALF = 1 << (BITS - 1);
const clipped = (sum) => Math.min(255, Math.max(0, sum >> BITS));

function resizeAcross({ width: wide, height, data }, width, kernel) {
  const found = new Uint8Array(3 * width * height);
  const columns = weights(wide, width, kernel);
  let to = 0;
  for (let y = 0; y < height; y++) {
    for (const { first, whole } of columns) {
      let [red, green, blue] = [HALF, HALF, HALF];
      for (let k = 0, from = 3 * (y * wide + first); k < whole.length; k++, from += 3) {
        red += data[from] * whole[k];
        green += data[from + 1] * whole[k];
        blue += data[from + 2] * whole[k];
      }
      found[to++] = clipped(red);
      found[to++] = clipped(green);
      found[to++] = clipped(blue);
    }
  }
  return { width, height, data: found };
}

function resizeDown({ width, height: high, data }, height, kernel) {
  const found = new Uint8Array(3 * width * height);
  const row = 3 * width;
  const sums = new Int32Array(row);
  weights(high, height, kernel).forEach(({ first, whole }, y) => {
    sums.fill(HALF);
    for (let k = 0, from = row * first; k < whole.length; k++) {
      for (let x = 0; x < row; x++) sums[x] += data[from++] * whole[k];
    }
    for (let x = 0; x < row; x++) found[row * y + x] = clipped(sums[x]);
  });
  return { width, height, data: found };
}

/** The pixel under each new one's centre; places are summed step by step, as Pillow does, or halves fall otherwise. */
function nearest({ width: wide, height: high, data }, width, height) {
  const places = (from, to) => {
    const step = from / to;
    let place = step * 0.5;
    return Int32Array.from({ length: to }, () => {
      const now = Math.min(from - 1, Math.trunc(place));
      place += step;
      return now;
    });
  };
  const [columns, rows] = [places(wide, width), places(high, height)];
  const found = new Uint8Array(3 * width * height);
  let to = 0;
  for (const y of rows) {
    for (const x of columns) {
      const from = 3 * (y * wide + x);
      found[to++] = data[from];
      found[to++] = data[from + 1];
      found[to++] = data[from + 2];
    }
  }
  return { width, height, data: found };
}
