// Resizing 8-bit pixels as Pillow does, bit for bit: a browser's own smoothing differs from it by several levels.
//
// Each output pixel is a weighted mean of the input pixels under its filter, which widens as images shrink; first along
// rows, then along columns, each rounded to 8 bits; weights are rounded to 22 binary digits. (Pillow 13 begins with the
// columns where heights shrink much more than widths, which older ones do not: most pixels then differ by 0 or 1 of 255.)

const ONE = 2 ** 22;

const FILTERS = {
  box: { support: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  hamming: {
    support: 1,
    weight: (x) =>
      x === 0
        ? 1
        : Math.abs(x) >= 1
          ? 0
          : sinc(x) * (Math.fround(0.54) + Math.fround(0.46) * Math.cos(Math.PI * Math.abs(x))),
  },
  bicubic: {
    support: 2,
    weight: (x) => {
      const a = -0.5;
      const d = Math.abs(x);
      if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
      return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
    },
  },
  lanczos: { support: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

/** Pixels `{data, width, height, channels}`, row by row, in another size. */
export function resample(pixels, width, height, interpolation) {
  if (width < 1 || height < 1) throw new RangeError(`no picture has ${width} x ${height} pixels`);
  if (width === pixels.width && height === pixels.height) return pixels;
  if (interpolation === "nearest") return nearest(pixels, width, height);
  const across = width === pixels.width ? pixels : alongRows(pixels, width, FILTERS[interpolation]);
  return height === pixels.height ? across : alongColumns(across, height, FILTERS[interpolation]);
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

/** For each output position the first input position and the weights from there on. */
function windows(from, to, { support, weight }) {
  const scale = from / to;
  const stretch = Math.max(1, scale);
  return Array.from({ length: to }, (_, position) => {
    const center = (position + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support * stretch + 0.5));
    const last = Math.min(from, Math.trunc(center + support * stretch + 0.5));
    const weights = Array.from({ length: last - first }, (_, at) =>
      weight((at + first - center + 0.5) * (1 / stretch)),
    );
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((w) => roundAway((sum ? w / sum : w) * ONE)) };
  });
}

function roundAway(value) {
  return Math.trunc(value + (value < 0 ? -0.5 : 0.5));
}

function alongRows({ data, width, height, channels }, to, filter) {
  const out = new Uint8ClampedArray(to * height * channels);
  const parts = windows(width, to, filter);
  for (let y = 0, at = 0; y < height; y++) {
    const row = y * width * channels;
    for (const { first, weights } of parts) {
      for (let c = 0; c < channels; c++) {
        let sum = ONE / 2;
        for (let k = 0, from = row + first * channels + c; k < weights.length; k++, from += channels)
          sum += data[from] * weights[k];
        out[at++] = Math.floor(sum / ONE);
      }
    }
  }
  return { data: out, width: to, height, channels };
}

function alongColumns({ data, width, height, channels }, to, filter) {
  const length = width * channels;
  const out = new Uint8ClampedArray(to * length);
  windows(height, to, filter).forEach(({ first, weights }, y) => {
    const sums = new Float64Array(length).fill(ONE / 2);
    weights.forEach((weight, k) => {
      const row = (first + k) * length;
      for (let at = 0; at < length; at++) sums[at] += data[row + at] * weight;
    });
    for (let at = 0; at < length; at++) out[y * length + at] = Math.floor(sums[at] / ONE);
  });
  return { data: out, width, height: to, channels };
}

function nearest({ data, width, height, channels }, toWidth, toHeight) {
  const columns = centers(width, toWidth);
  const out = new Uint8ClampedArray(toWidth * toHeight * channels);
  let at = 0;
  for (const y of centers(height, toHeight)) {
    for (const x of columns) {
      const from = (y * width + x) * channels;
      for (let c = 0; c < channels; c++) out[at++] = data[from + c];
    }
  }
  return { data: out, width: toWidth, height: toHeight, channels };
}

/** Input positions under the centres of output pixels; added up, as Pillow does, for the same rounding. */
function centers(from, to) {
  const scale = from / to;
  const positions = [];
  for (let at = scale * 0.5; positions.length < to; at += scale) positions.push(Math.min(from - 1, Math.trunc(at)));
  return positions;
}
