// The page: asks for answers to a picture and shows them as they come.

import { Anytime, AnytimeError, softmax } from "./anytime.js";
import { Drawing } from "./drawing.js";
import { decode, fit, normalise, obstacle } from "./prepare.js";
import { throttled } from "./throttled.js";

const RUNTIME = "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
const DIRECTORY = new URL(new URLSearchParams(location.search).get("export") ?? "exported/digits", document.baseURI);
const DIGITS = "0123456789";
const SHIPPED = Array.from(DIGITS, (digit) => ({ file: `pictures/${digit}.png`, name: `A scanned ${digit}` }));
const FIRST = 4; // shown unasked: a hard one, whose answers get better
const COLUMNS = 5; // where there are too many classes to show all
const MANY = 12;

const $ = (id) => document.getElementById(id);

let model = null;
let received = []; // bytes of each step's file
let answers = []; // to the picture of now, each with its probabilities
let picture = null; // decoded
let opening; // identify the newest attempt to open and to answer: older ones stop
let answering;
let fetching = new AbortController(); // of the newest attempt to open

const board = new Drawing(
  $("board"),
  () => (board.isEmpty ? forget() : choose(() => board.picture())),
  (down) => ($("pen").textContent = down ? "Pen down" : "Pen up"),
);

async function open() {
  const mine = (opening = Symbol("opening"));
  answering = Symbol("opening");
  fetching.abort();
  fetching = new AbortController();
  model?.release();
  [model, received, answers] = [null, [], []];
  complain(null);
  const speed = Number($("connection").value);
  const request = speed ? throttled(speed) : fetch;
  const { signal } = fetching;
  try {
    if (DIRECTORY.origin !== location.origin) {
      throw new AnytimeError("this page opens exports of its own server only.", { found: DIRECTORY.href });
    }
    const ort = await runtime();
    const opened = await Anytime.open(DIRECTORY, ort, {
      verify: isSecureContext,
      fetch: (url) => request(url, { signal }),
      observe: (step, bytes) => mine === opening && showFetched(step, bytes),
      session: { logSeverityLevel: 3 },
    });
    if (mine !== opening) return;
    const reason = obstacle(opened.manifest.preparation);
    if (reason) throw new AnytimeError(reason);
    model = opened;
    model.preload();
    introduce();
    if (picture) answer();
    else if (!$("shipped").hidden) $("shipped").children[FIRST].click();
  } catch (error) {
    if (mine === opening) complain(error);
  }
}

async function runtime() {
  try {
    const ort = await import(RUNTIME);
    ort.env.wasm.numThreads = 1; // more need a page that is isolated from other origins
    ort.env.logLevel = "error";
    return ort;
  } catch (cause) {
    throw new AnytimeError("ONNX Runtime Web is not there.", {
      expected: RUNTIME,
      next: "Run npm ci in examples/web.",
      cause,
    });
  }
}

/** Take a picture, given by a function, and ask for answers; `button` is that of a shipped one. */
async function choose(source, button = null) {
  const mine = (answering = Symbol("choosing"));
  for (const other of $("shipped").children) other.setAttribute("aria-pressed", `${other === button}`);
  showBusy(true);
  let decoded;
  try {
    decoded = await decode(await source());
  } catch (error) {
    if (mine === answering)
      complain(new AnytimeError("that is no picture which this browser can open.", { found: error.message }));
    return;
  }
  if (mine !== answering) return;
  picture = decoded;
  if (model) await answer();
}

async function answer() {
  const mine = (answering = Symbol("answering"));
  const { preparation } = model.manifest;
  complain(null);
  showBusy(true);
  answers = [];
  if (received.some((bytes, step) => bytes < model.manifest.steps[step].bytes)) show(); // else new ones come in an instant
  try {
    const pixels = fit(picture, preparation);
    showSeen(pixels);
    for await (const { logits, ...rest } of model.anytime(normalise(pixels, preparation))) {
      if (mine !== answering) return;
      answers.push({ ...rest, probabilities: softmax(logits) });
      show();
      await painted();
      if (mine !== answering) return;
    }
    showBusy(false);
  } catch (error) {
    if (mine === answering) complain(error);
  }
}

function forget() {
  answering = Symbol("nothing");
  [picture, answers] = [null, []];
  $("seen").getContext("2d").clearRect(0, 0, $("seen").width, $("seen").height);
  showBusy(false);
  show();
}

/** Until the browser has shown what there is: else all answers would appear at once. */
function painted() {
  return new Promise((resolve) =>
    document.hidden ? setTimeout(resolve) : requestAnimationFrame(() => setTimeout(resolve)),
  );
}

/** Show what the export is, and which kinds of pictures it takes. */
function introduce() {
  const { manifest, leaves, bytes, classes } = model;
  const files = manifest.steps.length === 1 ? "1 file" : `${manifest.steps.length} files`;
  $("about").textContent =
    `${manifest.name}: ${counted(leaves)} in ${files}, ${kilobytes(bytes)}. It answers from the first file on.`;
  const digits = classes?.join("") === DIGITS;
  $("kinds").hidden = !digits;
  if (!digits) document.querySelector("[name=kind][value=file]").checked = true;
  showKind();
  received = manifest.steps.map(() => 0);
  $("files").replaceChildren(...manifest.steps.map((step) => element("div", { style: { "--bytes": step.bytes } })));
  $("steps").replaceChildren(
    ...manifest.steps.map((step) => {
      const row = element("li");
      row.append(
        element("span", { class: "leaves" }),
        element("div", { class: "bars", "aria-hidden": "true" }),
        element("span", { class: "cost" }),
      );
      row.dataset.leaves = step.leaves;
      return row;
    }),
  );
  showFetched(0, 0);
  show();
}

function showKind() {
  const kind = document.querySelector("[name=kind]:checked").value;
  for (const id of ["shipped", "drawing", "file"]) $(id).hidden = id !== kind;
}

function showSeen({ data, width, height, channels }) {
  const canvas = Object.assign($("seen"), { width, height });
  const image = new ImageData(width, height);
  for (let at = 0; at < width * height; at++) {
    for (let c = 0; c < 3; c++) image.data[at * 4 + c] = data[at * channels + (channels === 3 ? c : 0)];
    image.data[at * 4 + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  $("seen-size").textContent = `${width} x ${height} pixels`;
}

function showFetched(step, bytes) {
  received[step] = bytes;
  if (!model) return;
  const { steps } = model.manifest;
  $("files").childNodes.forEach((part, at) =>
    part.style.setProperty("--come", `${(100 * received[at]) / steps[at].bytes}%`),
  );
  const all = received.reduce((a, b) => a + b, 0);
  $("fetched").textContent =
    all >= model.bytes ? `All ${kilobytes(all)} fetched` : `${kilobytes(all)} of ${kilobytes(model.bytes)} fetched`;
  showRows();
}

/** Show the answers that there are. */
function show() {
  const newest = answers.at(-1);
  if (newest) {
    const best = largest(newest.probabilities);
    const by =
      newest.leaves === model.leaves ? `all ${counted(model.leaves)}` : `${newest.leaves} of ${counted(model.leaves)}`;
    const text = ` ${percent(newest.probabilities[best])} sure, by ${model.leaves === 1 ? "its only leaf" : by}`;
    $("answer").replaceChildren(element("b", { text: className(best) }), text);
  } else {
    $("answer").replaceChildren(element("span", { class: "note", text: picture ? "On its way." : "None yet." }));
  }
  showRows();
}

function showRows() {
  if (!model) return;
  const { steps } = model.manifest;
  const columns = columnsOf(answers.at(-1)?.probabilities);
  const best = answers.length ? largest(answers.at(-1).probabilities) : -1;
  $("axis").replaceChildren(
    ...columns.map((column) =>
      element("span", { text: className(column), title: className(column), class: column === best ? "largest" : "" }),
    ),
  );
  steps.forEach((step, index) => {
    const row = $("steps").children[index];
    const [leaves, bars, cost] = row.children;
    const answer = answers[index];
    const come = received[index];
    row.dataset.state = answer ? "answered" : come >= step.bytes ? "fetched" : come > 0 ? "fetching" : "waiting";
    leaves.replaceChildren(counted(step.leaves));
    if (answer) {
      const winner = largest(answer.probabilities);
      leaves.append(
        element("span", { class: "top", text: ` ${className(winner)}, ${percent(answer.probabilities[winner])}` }),
      );
    }
    cost.textContent = answer
      ? `${kilobytes(answer.bytes)}, ${answer.milliseconds.toFixed(1)}\u00a0ms`
      : ({ fetched: "here", fetching: `${kilobytes(come)} of ${kilobytes(step.bytes)}` }[row.dataset.state] ??
        `${kilobytes(step.bytes)} to come`);
    while (bars.children.length < columns.length) bars.append(element("i"));
    while (bars.children.length > columns.length) bars.lastChild.remove();
    const winner = answer ? largest(answer.probabilities) : -1;
    columns.forEach((column, at) => {
      bars.children[at].style.setProperty("--probability", answer?.probabilities[column] ?? 0);
      bars.children[at].classList.toggle("largest", column === winner);
    });
  });
}

/** The classes that have bars: all, or the likeliest of the newest answer. */
function columnsOf(probabilities) {
  const count = model.classes?.length ?? probabilities?.length ?? 0;
  const all = Array.from({ length: count }, (_, index) => index);
  if (count <= MANY) return all;
  return probabilities ? all.sort((a, b) => probabilities[b] - probabilities[a]).slice(0, COLUMNS) : [];
}

/** Whether answers are still to come. */
function showBusy(busy) {
  $("steps").setAttribute("aria-busy", `${busy}`);
}

function complain(error) {
  if (error) showBusy(false);
  if (error && !model) $("fetched").textContent = "";
  $("problem").hidden = !error;
  const told = error instanceof AnytimeError ? error.message : `It went wrong: ${error?.message ?? error}`;
  $("problem").textContent = error ? told : "";
}

function largest(values) {
  return values.indexOf(Math.max(...values));
}

function className(index) {
  return model.classes?.[index] ?? `class ${index}`;
}

function counted(leaves) {
  return leaves === 1 ? "1 leaf" : `${leaves} leaves`;
}

function kilobytes(bytes) {
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)}\u00a0kB` : `${(bytes / 1e6).toFixed(1)}\u00a0MB`;
}

function percent(probability) {
  return probability > 0.9995 ? "over 99.9\u00a0%" : `${(100 * probability).toFixed(1)}\u00a0%`;
}

function element(tag, { text = "", style = {}, ...attributes } = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(style)) made.style.setProperty(name, value);
  for (const [name, value] of Object.entries(attributes)) if (value) made.setAttribute(name, value);
  return made;
}

$("shipped").append(
  ...SHIPPED.map(({ file, name }) => {
    const button = element("button", { type: "button", "aria-pressed": "false" });
    button.append(element("img", { src: file, alt: name, width: 8, height: 8 }));
    button.addEventListener("click", () => choose(async () => (await fetch(file)).blob(), button));
    return button;
  }),
);
$("kinds").addEventListener("change", showKind);
$("clear").addEventListener("click", () => board.clear());
$("chosen").addEventListener("change", () => {
  const [file] = $("chosen").files;
  if (file) choose(() => file);
});
$("again").addEventListener("submit", (event) => {
  event.preventDefault();
  open();
});
open();
