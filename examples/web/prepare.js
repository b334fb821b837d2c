// How a picture becomes the input of a network: what `treeify.data.Preparation` does in Python, with the same numbers.
// Only what browsers decode otherwise than Pillow differs: pixels that are partly transparent, 16 bits, CMYK.

import { resample } from "./resample.js";

/** Decoded pixels `{data, width, height, channels: 4}` of a file, an image or a canvas, upright. */
export async function decode(source) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "from-image" };
  const bitmap = await createImageBitmap(source, options);
  const { width, height } = bitmap;
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { data: context.getImageData(0, 0, width, height).data, width, height, channels: 4 };
}

/** Decoded pixels in the size and channels of a preparation, which is that of ensemble.json. */
export function fit(decoded, preparation) {
  const {
    size: [height, width],
    channels,
    interpolation,
    crop_mode,
    mean,
  } = preparation;
  const pixels = inChannels(decoded, channels);
  const [newWidth, newHeight] = resized(decoded, preparation);
  const fill = crop_mode === "border" ? mean.map((value) => roundToEven(255 * value)) : mean.map(() => 0);
  return cropped(resample(pixels, newWidth, newHeight, interpolation), width, height, fill);
}

/** Pixels as the values [C, H, W] of an input. */
export function normalise({ data, width, height, channels }, { mean, std }) {
  const values = new Float32Array(data.length);
  const plane = width * height;
  for (let c = 0; c < channels; c++) {
    const [shift, scale] = [Math.fround(mean[c]), Math.fround(std[c])];
    for (let at = 0; at < plane; at++) {
      // Each operation is rounded to float32, as in Python.
      values[c * plane + at] = Math.fround(Math.fround(data[at * channels + c] / 255) - shift) / scale;
    }
  }
  return values;
}

/** Why pictures cannot be prepared so; null if they can. */
export function obstacle(preparation) {
  if (!preparation?.mean) return "The export does not say how images are prepared: export an ensemble that knows.";
  return [1, 3].includes(preparation.channels)
    ? null
    : `The network takes ${preparation.channels} channels; this page makes 1 or 3.`;
}

function inChannels({ data, width, height }, channels) {
  const out = new Uint8ClampedArray(width * height * channels);
  for (let at = 0, to = 0; to < out.length; at += 4) {
    const [r, g, b] = [data[at], data[at + 1], data[at + 2]];
    if (channels === 1) {
      out[to++] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; // ITU-R 601-2 luma, as Pillow rounds it
    } else {
      out[to++] = r;
      out[to++] = g;
      out[to++] = b;
    }
  }
  return { data: out, width, height, channels };
}

/** The width and height before cropping. */
function resized({ width, height }, { size, crop_mode, crop_pct }) {
  const [toHeight, toWidth] = size.map((side) => Math.floor(side / crop_pct));
  if (crop_mode === "squash") return [toWidth, toHeight];
  if (crop_mode === "center" && toWidth === toHeight) {
    const long = Math.trunc((toWidth * Math.max(width, height)) / Math.min(width, height));
    return width <= height ? [toWidth, long] : [long, toWidth];
  }
  const ratios = [height / toHeight, width / toWidth];
  const ratio = crop_mode === "border" ? Math.max(...ratios) : Math.min(...ratios);
  return [roundToEven(width / ratio), roundToEven(height / ratio)];
}

/** The centre, or the picture with `fill` around where it is smaller. */
function cropped(pixels, width, height, fill) {
  const { channels } = pixels;
  const out = new Uint8ClampedArray(width * height * channels);
  const [left, top] = [offset(pixels.width, width), offset(pixels.height, height)];
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [fromX, fromY] = [x + left, y + top];
      const inside = fromX >= 0 && fromX < pixels.width && fromY >= 0 && fromY < pixels.height;
      const from = (fromY * pixels.width + fromX) * channels;
      for (let c = 0; c < channels; c++) out[at++] = inside ? pixels.data[from + c] : fill[c];
    }
  }
  return { data: out, width, height, channels };
}

function offset(from, to) {
  return from < to ? -Math.floor((to - from) / 2) : roundToEven((from - to) / 2);
}

/** As Python rounds: halves to even numbers. */
function roundToEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 ? below + 1 : below;
}
