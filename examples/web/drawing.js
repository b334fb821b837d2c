// A digit drawn with a finger, a mouse or the arrow keys, given to the network as those it learnt from were made:
// light on dark, filling the height, in the middle.

const SIDE = 128; // of the picture for the network
const LINE = 0.15; // of that side
const STEP = 1 / 16; // of an arrow key
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Drawing {
  #canvas;
  #onChange;
  #onPen;
  #strokes = []; // of points [x, y] from 0 to 1
  #pen = { x: 0.5, y: 0.25, down: false, shown: false };

  /**
   * @param {HTMLCanvasElement} canvas where to draw.
   * @param {() => void} onChange called after every change.
   * @param {(down: boolean) => void} onPen called when a key raises or lowers the pen.
   */
  constructor(canvas, onChange, onPen) {
    this.#canvas = canvas;
    this.#onChange = onChange;
    this.#onPen = onPen;
    canvas.addEventListener("pointerdown", (event) => this.#press(event));
    canvas.addEventListener("pointermove", (event) => this.#drag(event));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#showPen(false));
    this.#paint();
  }

  get isEmpty() {
    return !this.#strokes.length;
  }

  clear() {
    this.#strokes = [];
    this.#pen.down = false;
    this.#changed();
  }

  /** What was drawn, as large as it fits. */
  picture() {
    const points = this.#strokes.flat();
    const [xs, ys] = [0, 1].map((axis) => points.map((point) => point[axis]));
    const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const free = SIDE * (1 - LINE);
    // Digits of the data fill the height; a bar or a dot must not grow without end.
    const scale = free / Math.max(bottom - top, (right - left) / 0.8, 0.2);
    const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
    const context = canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, SIDE, SIDE);
    const place = ([x, y]) => [
      SIDE / 2 + (x - (left + right) / 2) * scale,
      SIDE / 2 + (y - (top + bottom) / 2) * scale,
    ];
    stroke(
      context,
      this.#strokes.map((points) => points.map(place)),
      SIDE * LINE,
      "#fff",
    );
    return canvas;
  }

  #press(event) {
    if (event.button !== 0) return;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#pen.down = false;
    this.#pen.shown = false;
    this.#strokes.push([this.#place(event)]);
    this.#changed();
  }

  #drag(event) {
    if (!this.#canvas.hasPointerCapture(event.pointerId)) return;
    const events = event.getCoalescedEvents?.() ?? [];
    this.#strokes.at(-1).push(...(events.length ? events : [event]).map((each) => this.#place(each)));
    this.#changed();
  }

  #place({ clientX, clientY }) {
    const { left, top, width, height } = this.#canvas.getBoundingClientRect();
    return [clamp((clientX - left) / width), clamp((clientY - top) / height)];
  }

  #key(event) {
    const pen = this.#pen;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in MOVES) {
      const [x, y] = MOVES[event.key];
      pen.x = clamp(pen.x + x * STEP);
      pen.y = clamp(pen.y + y * STEP);
      if (pen.down) this.#strokes.at(-1).push([pen.x, pen.y]);
    } else if (event.key === " " || event.key === "Enter") {
      pen.down = !pen.down && !event.repeat;
      if (pen.down) this.#strokes.push([[pen.x, pen.y]]);
      this.#onPen(pen.down);
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.clear();
    } else {
      return;
    }
    event.preventDefault();
    pen.shown = true;
    if (pen.down) this.#changed();
    else this.#paint();
  }

  #showPen(shown) {
    this.#pen.shown = shown;
    if (!shown) this.#pen.down = false;
    this.#paint();
  }

  #changed() {
    this.#paint();
    this.#onChange();
  }

  #paint() {
    const { width, height } = this.#canvas;
    const context = this.#canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    const place = ([x, y]) => [x * width, y * height];
    stroke(
      context,
      this.#strokes.map((points) => points.map(place)),
      width * 0.09,
      "#fff",
    );
    if (!this.#pen.shown) return;
    context.beginPath();
    context.arc(this.#pen.x * width, this.#pen.y * height, width * 0.045, 0, 2 * Math.PI);
    context.lineWidth = 4;
    context.strokeStyle = "#ffb454";
    context.fillStyle = "#ffb454";
    context.stroke();
    if (this.#pen.down) context.fill();
  }
}

function stroke(context, lines, width, colour) {
  Object.assign(context, { lineWidth: width, lineCap: "round", lineJoin: "round", strokeStyle: colour });
  context.beginPath();
  for (const [first, ...rest] of lines) {
    context.moveTo(...first);
    context.lineTo(...first); // a dot, where there is nothing more
    for (const point of rest) context.lineTo(...point);
  }
  context.stroke();
}

function clamp(value) {
  return Math.min(1, Math.max(0, value));
}
