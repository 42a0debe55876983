// The sheet to draw on: two layers of bright strokes on a dark ground, and their image in the size of a model.

const SIDE = 560; // pixels of the sheet
const PEN = 44; // the width of the pen, so that a digit of usual size gets strokes like those of MNIST
const INK = 40; // brightness from which a pixel counts as ink
const DIGIT = 20; // the longer side of a digit of MNIST, in pixels
const KEY_STEP = 14;
const MAX_UNDO = 30;
const COLOURS = ["#ff8a3d", "#4fd0e0"]; // of the layers, where there are two

export class Sheet {
  /** canvas, overlay: of SIDE x SIDE. changed: called after each change of the drawing. */
  constructor(canvas, overlay, changed) {
    this.canvas = canvas;
    this.overlay = overlay;
    this.changed = changed;
    this.layers = [0, 1].map(newLayer);
    this.active = 0;
    this.coloured = false;
    this.history = [];
    this.pen = { x: SIDE / 2, y: SIDE / 2, down: false };
    this.listen();
    this.show();
  }

  get empty() {
    return this.layers.every((layer) => !layer.used);
  }

  clear() {
    this.remember();
    this.layers = [0, 1].map(newLayer);
    this.pen.down = false;
    this.update();
  }

  undo() {
    const before = this.history.pop();
    if (!before) return;
    this.layers = before;
    this.update();
  }

  /** Fill the active layer with an image of the model: grey pixels of size x size, taken as they are from then on. */
  put(pixels, size) {
    this.remember();
    const small = new OffscreenCanvas(size, size);
    small.getContext("2d").putImageData(grey(pixels, size), 0, 0);
    const layer = newLayer();
    layer.context.imageSmoothingEnabled = false;
    layer.context.drawImage(small, 0, 0, SIDE, SIDE);
    layer.used = layer.fixed = true;
    this.layers[this.active] = layer;
    this.update();
  }

  /**
   * Return the drawing as the model's pixels, size x size, and its place: model pixel (x, y) covers the sheet from
   * place.x + place.scale * x, place.y + place.scale * y. The object gets the size and the place that training images
   * have: preparation is GetModel's. layers has the pixels of each used layer alone.
   */
  image(size, preparation) {
    const inks = this.layers.filter((layer) => layer.used).map(brightness);
    const place = this.layers.some((layer) => layer.fixed) ? whole(size) : placeOf(inks, size, preparation);
    const layers = inks.map((ink) => sample(ink, size, place));
    const pixels = new Uint8Array(size * size);
    for (const part of layers) {
      for (let index = 0; index < pixels.length; index++) pixels[index] = Math.min(255, pixels[index] + part[index]);
    }
    return { pixels, place, layers };
  }

  /** Lay a map of size x size numbers over the drawing: orange for positive ones, blue for negative ones. */
  lay(values, size, place) {
    const context = this.overlay.getContext("2d");
    context.clearRect(0, 0, SIDE, SIDE);
    if (!values) return;
    const largest = Math.max(1e-6, ...values.map(Math.abs));
    const image = new ImageData(size, size);
    values.forEach((value, index) => {
      const strength = Math.sqrt(Math.abs(value) / largest);
      image.data.set(value > 0 ? [255, 140, 26] : [43, 123, 186], 4 * index);
      image.data[4 * index + 3] = 200 * strength;
    });
    const small = new OffscreenCanvas(size, size);
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingQuality = "high";
    context.drawImage(small, place.x, place.y, place.scale * size, place.scale * size);
  }

  show() {
    const context = this.canvas.getContext("2d");
    context.globalCompositeOperation = "source-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, SIDE, SIDE);
    context.globalCompositeOperation = "lighter";
    this.layers.forEach((layer, index) => {
      if (layer.used) context.drawImage(this.coloured ? tinted(layer, COLOURS[index]) : layer.canvas, 0, 0);
    });
    if (this.canvas.matches(":focus-visible")) {
      context.globalCompositeOperation = "difference";
      context.strokeStyle = "#888";
      context.lineWidth = 2;
      context.beginPath();
      context.arc(this.pen.x, this.pen.y, this.pen.down ? PEN / 2 : PEN / 3, 0, 7);
      context.stroke();
    }
  }

  update() {
    this.show();
    this.changed();
  }

  remember() {
    this.history.push(this.layers.map(copyOf));
    if (this.history.length > MAX_UNDO) this.history.shift();
  }

  line(from, to) {
    const layer = this.layers[this.active];
    const { context } = layer;
    context.strokeStyle = "#fff";
    context.lineWidth = PEN;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x + 0.01, to.y);
    context.stroke();
    layer.used = true;
    this.update();
  }

  listen() {
    const { canvas } = this;
    let last = null;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return { x: ((event.clientX - box.left) * SIDE) / box.width, y: ((event.clientY - box.top) * SIDE) / box.height };
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      canvas.setPointerCapture(event.pointerId);
      this.remember();
      last = at(event);
      this.line(last, last);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      for (const part of event.getCoalescedEvents?.() ?? [event]) {
        const next = at(part);
        this.line(last, next);
        last = next;
      }
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { last = null; });
    canvas.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => this.show());
  }

  key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) {
      const from = { ...this.pen };
      this.pen.x = Math.min(SIDE, Math.max(0, from.x + KEY_STEP * step[0]));
      this.pen.y = Math.min(SIDE, Math.max(0, from.y + KEY_STEP * step[1]));
      if (this.pen.down) this.line(from, this.pen);
      else this.show();
    } else if (event.key === " ") {
      this.pen.down = !this.pen.down;
      if (this.pen.down) {
        this.remember();
        this.line(this.pen, this.pen);
      } else this.show();
    } else if (event.key === "Delete") this.clear();
    else return;
    event.preventDefault();
  }
}

function newLayer() {
  const canvas = new OffscreenCanvas(SIDE, SIDE);
  return { canvas, context: canvas.getContext("2d", { willReadFrequently: true }), used: false, fixed: false };
}

function copyOf(layer) {
  const copy = newLayer();
  copy.context.drawImage(layer.canvas, 0, 0);
  return Object.assign(copy, { used: layer.used, fixed: layer.fixed });
}

function tinted(layer, colour) {
  const canvas = new OffscreenCanvas(SIDE, SIDE);
  const context = canvas.getContext("2d");
  context.drawImage(layer.canvas, 0, 0);
  context.globalCompositeOperation = "multiply";
  context.fillStyle = colour;
  context.fillRect(0, 0, SIDE, SIDE);
  context.globalCompositeOperation = "destination-in";
  context.drawImage(layer.canvas, 0, 0);
  return canvas;
}

/** Return the brightness of a layer's pixels, SIDE x SIDE. */
function brightness(layer) {
  const { data } = layer.context.getImageData(0, 0, SIDE, SIDE);
  const ink = new Uint8Array(SIDE * SIDE);
  for (let index = 0; index < ink.length; index++) ink[index] = (data[4 * index] * data[4 * index + 3]) / 255;
  return ink;
}

/** Return the image data of size x size grey pixels. */
export function grey(pixels, size, colour = [1, 1, 1]) {
  const image = new ImageData(size, size);
  for (let index = 0; index < size * size; index++) {
    image.data.set([...colour.map((part) => part * pixels[index]), 255], 4 * index);
  }
  return image;
}

function whole(size) {
  return { x: 0, y: 0, scale: SIDE / size };
}

function boxOf(ink) {
  const box = { left: SIDE, right: -1, top: SIDE, bottom: -1, mass: 0, x: 0, y: 0 };
  for (let y = 0; y < SIDE; y++) {
    for (let x = 0; x < SIDE; x++) {
      const value = ink[y * SIDE + x];
      if (value < INK) continue;
      box.left = Math.min(box.left, x);
      box.right = Math.max(box.right, x + 1);
      box.top = Math.min(box.top, y);
      box.bottom = Math.max(box.bottom, y + 1);
      box.mass += value;
      box.x += value * (x + 0.5);
      box.y += value * (y + 0.5);
    }
  }
  return box;
}

/** Return the place of an image of size x size pixels on the sheet, so that the ink has the right size and place. */
function placeOf(inks, size, preparation) {
  const boxes = inks.map(boxOf).filter((box) => box.mass);
  if (!boxes.length || !preparation?.object_size) return whole(size);
  const left = Math.min(...boxes.map((box) => box.left));
  const right = Math.max(...boxes.map((box) => box.right));
  const top = Math.min(...boxes.map((box) => box.top));
  const bottom = Math.max(...boxes.map((box) => box.bottom));
  const longer = (box) => Math.max(box.right - box.left, box.bottom - box.top);
  const scale = boxes.length > 1
    ? Math.max(...boxes.map(longer)) / DIGIT
    : Math.max(right - left, bottom - top) / preparation.object_size;
  const mass = boxes.reduce((sum, box) => sum + box.mass, 0);
  const middle = preparation.centred_by_mass
    ? { x: boxes.reduce((sum, box) => sum + box.x, 0) / mass, y: boxes.reduce((sum, box) => sum + box.y, 0) / mass }
    : { x: (left + right) / 2, y: (top + bottom) / 2 };
  return { x: middle.x - (scale * size) / 2, y: middle.y - (scale * size) / 2, scale };
}

/** Return the mean brightness under each pixel of an image of size x size at a place. */
function sample(ink, size, place) {
  const pixels = new Uint8Array(size * size);
  for (let row = 0; row < size; row++) {
    const [top, bottom] = [Math.round(place.y + place.scale * row), Math.round(place.y + place.scale * (row + 1))];
    for (let column = 0; column < size; column++) {
      const left = Math.round(place.x + place.scale * column);
      const right = Math.max(left + 1, Math.round(place.x + place.scale * (column + 1)));
      let sum = 0;
      for (let y = Math.max(0, top); y < Math.min(SIDE, Math.max(top + 1, bottom)); y++) {
        for (let x = Math.max(0, left); x < Math.min(SIDE, right); x++) sum += ink[y * SIDE + x];
      }
      pixels[row * size + column] = Math.min(255, sum / ((Math.max(top + 1, bottom) - top) * (right - left)));
    }
  }
  return pixels;
}
