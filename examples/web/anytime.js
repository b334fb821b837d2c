// Answers of what `treeify export` wrote, with ONNX Runtime Web: the first one as soon as the first file is there.
//
//   import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
//   import { Anytime, softmax } from "./anytime.js";
//
//   const model = await Anytime.open("exported/digits", ort);
//   for await (const answer of model.anytime(image)) show(answer.leaves, softmax(answer.logits));
//
// A step's file holds only the branches of its own leaves. What it needs of earlier steps it gets as values that
// those gave beside their logits and that are kept for it.

const FORMAT = "treeify-export";
const VERSION = 1;
const FILE_NAME = /^\w[\w.-]*$/; // of a step, beside ensemble.json

/** What can go wrong: what, what was expected, what was found, what to do next. */
export class AnytimeError extends Error {
  constructor(what, { expected, found, next, cause } = {}) {
    const details = [expected && `Expected ${expected}`, found && `Found ${found}`, next];
    super([what, ...details.filter(Boolean)].join("\n  "), { cause });
    this.name = "AnytimeError";
  }
}

export class Anytime {
  #ort;
  #options;
  #steps = []; // promises of each step's file and session, of those asked for

  /**
   * An exported directory, of which only ensemble.json is fetched yet.
   *
   * @param {string | URL} directory its address; relative ones are to the page's.
   * @param {object} ort the module of ONNX Runtime Web.
   * @param {object} options
   * @param {boolean} options.verify compare every file with its sha256; browsers can on https and localhost only.
   * @param {typeof globalThis.fetch} options.fetch how files are fetched.
   * @param {(step: number, bytes: number) => void} options.observe told how much of a step's file has come.
   * @param {object} options.session options of every InferenceSession.
   */
  static async open(directory, ort, { verify = true, fetch, observe = () => {}, session = {} } = {}) {
    const url = new URL(`${directory}`.replace(/\/*$/, "/"), globalThis.document?.baseURI);
    if (verify && !globalThis.crypto?.subtle) {
      throw new AnytimeError(`the files of ${url} cannot be compared with their sha256 here.`, {
        expected: "a page from https or localhost: browsers have crypto.subtle nowhere else",
        next: "Serve the page so, or open the export with {verify: false}.",
      });
    }
    // `fetch` must be called as a function of the window's, not of the options.
    const options = { verify, fetch: fetch ?? ((...request) => globalThis.fetch(...request)), observe, session };
    const response = await requested(options.fetch, new URL("ensemble.json", url));
    const manifest = await response.json().catch((cause) => {
      throw new AnytimeError(`ensemble.json of ${url} is not JSON.`, { found: cause.message, cause });
    });
    check(manifest ?? {}, url);
    return new Anytime(url, manifest, ort, options);
  }

  constructor(url, manifest, ort, options) {
    this.url = url;
    this.manifest = manifest;
    this.classes = manifest.classes;
    this.leaves = manifest.steps.at(-1).leaves;
    this.bytes = manifest.steps.reduce((sum, step) => sum + step.bytes, 0);
    this.#ort = ort;
    this.#options = options;
  }

  /** Fetch every file, one after another, so that none slows the one before it; not waited for. */
  preload() {
    this.#step(this.manifest.steps.length - 1);
  }

  /** Give back the memory of all steps; those asked for afterwards are fetched anew. */
  async release() {
    const steps = this.#steps.splice(0);
    await Promise.allSettled(steps.map(async ({ session }) => (await session).release()));
  }

  /**
   * Better and better answers for the same images, one per step; files are fetched once for all images.
   *
   * @param {Float32Array | object} images values of [N, C, H, W], or a tensor of ort's.
   * @yields {{leaves: number, logits: Float32Array, dims: number[], bytes: number, milliseconds: number}} after each
   *   step the mean logits of all leaves so far, their shape [N, K], the size of the files they took, and how long
   *   all steps so far computed, without waiting for files.
   */
  async *anytime(images) {
    const { steps, output } = this.manifest;
    const values = new Map([["images", this.#tensor(images)]]);
    let sums;
    let bytes = 0;
    let milliseconds = 0;
    this.preload();
    for (const [index, step] of steps.entries()) {
      const session = await this.#step(index).session;
      const start = performance.now();
      const results = await session.run(Object.fromEntries(step.inputs.map(({ name }) => [name, values.get(name)])));
      milliseconds += performance.now() - start;
      bytes += step.bytes;
      for (const { name, kind } of step.outputs) if (kind === "kept") values.set(name, results[name]);
      const needed = new Set(steps.slice(index + 1).flatMap(({ inputs }) => inputs.map(({ name }) => name)));
      for (const name of values.keys()) if (!needed.has(name)) values.delete(name);
      const leafLogits = results[output.tensor];
      const [count, added, ...dims] = leafLogits.dims;
      const size = dims.reduce((product, dim) => product * dim, 1);
      sums ??= new Float64Array(count * size);
      leafLogits.data.forEach((value, at) => {
        sums[Math.floor(at / (added * size)) * size + (at % size)] += Number(value);
      });
      const { leaves } = step;
      yield {
        leaves,
        logits: Float32Array.from(sums, (sum) => sum / leaves),
        dims: [count, ...dims],
        bytes,
        milliseconds,
      };
    }
  }

  /** What is under way of a step: `arrived`, when its file has come, and `session`. */
  #step(index) {
    if (!this.#steps[index]) {
      const before = index > 0 ? this.#step(index - 1).arrived : Promise.resolve();
      const file = before.then(() => this.#file(index));
      const session = file.then((bytes) =>
        this.#ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], ...this.#options.session }),
      );
      const arrived = file.then(() => undefined); // does not hold the bytes, which the session has
      // Whoever awaits them is told; the next to ask makes another attempt.
      const step = { arrived, session };
      const forget = () => this.#steps[index] === step && delete this.#steps[index];
      for (const promise of [arrived, session]) promise.catch(forget);
      this.#steps[index] = step;
    }
    return this.#steps[index];
  }

  async #file(index) {
    const { file, bytes: size, sha256 } = this.manifest.steps[index];
    const url = new URL(file, this.url);
    const { body } = await requested(this.#options.fetch, url);
    const bytes = new Uint8Array(size);
    let received = 0;
    for (const reader = body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (received + value.length <= size) bytes.set(value, received);
      received += value.length;
      this.#options.observe(index, received);
    }
    const hash = this.#options.verify && received === size ? await sha256Of(bytes) : sha256;
    if (received === size && hash === sha256) return bytes;
    throw new AnytimeError(`${url} is damaged or of another export.`, {
      expected: `${size} bytes with sha256 ${sha256}`,
      found: `${received} bytes${received === size ? ` with sha256 ${hash}` : ""}`,
      next: "Copy the exported directory again.",
    });
  }

  #tensor(images) {
    const [batch, ...image] = this.manifest.images.shape;
    const size = image.reduce((product, dim) => product * dim, 1);
    const tensor = ArrayBuffer.isView(images)
      ? new this.#ort.Tensor("float32", images, [images.length / size, ...image])
      : images;
    const fits = tensor.dims.length === image.length + 1 && image.every((dim, at) => dim === tensor.dims[at + 1]);
    if (tensor.type !== "float32" || !fits || tensor.dims[0] < 1 || (batch !== "batch" && batch !== tensor.dims[0])) {
      throw new AnytimeError("images do not fit the network.", {
        expected: `float32 [${this.manifest.images.shape.join(", ")}]`,
        found: `${tensor.type} [${tensor.dims.join(", ")}]`,
      });
    }
    return tensor;
  }
}

async function sha256Of(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Probabilities of one image's logits. */
export function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

async function requested(fetch, url) {
  let response;
  try {
    response = await fetch(url);
  } catch (cause) {
    throw new AnytimeError(`${url} cannot be fetched.`, { found: cause.message, cause });
  }
  if (!response.ok) {
    throw new AnytimeError(`${url} cannot be fetched.`, {
      expected: "a directory that `treeify export` wrote",
      found: `status ${response.status} ${response.statusText}`.trim(),
      next: "Write it: treeify export RUN --out DIRECTORY, below that of the page.",
    });
  }
  return response;
}

function check({ format, version, output, images, steps }, url) {
  const what = `${url} is no export that this page can run.`;
  if (format !== FORMAT || version !== VERSION) {
    const found = `format ${format}, version ${version}`;
    throw new AnytimeError(what, {
      expected: `format ${FORMAT}, version ${VERSION}`,
      found,
      next: "Export it with the treeify of this page.",
    });
  }
  if (typeof output?.tensor !== "string" || images.dtype !== "float32") {
    const found = `${images.dtype} images, output ${JSON.stringify(output)}`;
    throw new AnytimeError(what, { expected: "float32 images and one tensor of logits", found });
  }
  const odd = steps.find(({ file, data }) => !FILE_NAME.test(file) || data);
  if (odd || !steps.length) {
    throw new AnytimeError(what, {
      expected: "one ONNX file for each step",
      found: odd ? `${odd.file} and ${odd.data?.file}` : "none",
    });
  }
}
