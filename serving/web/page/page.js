// The page: it sends each drawing to the server, and shows what the network answers and why.

import { Refused, call, fromBase64, latest, setToken, settled, toBase64 } from "./api.js";
import { Sheet, grey } from "./sheet.js";

const DIGIT_COLOURS = [[1, 0.54, 0.24], [0.31, 0.82, 0.88]];
const RELEVANCE_DELAY = 180; // milliseconds without a stroke before the dear question is asked
const MAX_SIDE = 1024; // pixels of a picture that is sent; the server refuses much larger ones
const MAX_BYTES = 2 ** 18; // of a file that is sent as it is
const POSE_RANGE = 0.35; // how far a slider turns a number of the pose
const SHELF = [
  ["seven.png", "a 7"], ["attacked.png", "an attacked 7"], ["shoe.png", "a shoe"], ["noise.png", "noise"],
  ["blank.png", "a blank"], ["paper.jpg", "a 3 on paper"],
];

const element = (id) => document.getElementById(id);
const create = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

const state = { model: null, answer: null, sent: null, poses: new Map(), found: new Map() };
const sheet = new Sheet(element("canvas"), element("overlay"), changed);

const classify = latest(() => guarded(askForAnswer));
const explain = latest(() => guarded(askForRelevance));
const draw = latest(() => guarded(askForPictures));
const explainSoon = settled(explain, RELEVANCE_DELAY);

function named() {
  return { model_name: state.model.model_name, model_version: state.model.model_version };
}

/** Run a task, and tell the reader of an error in words. */
async function guarded(task) {
  try {
    await task();
    tell("");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) element("access").hidden = false;
    else if (error instanceof Refused) tell(error.message);
    else if (error instanceof TypeError) tell("The server does not answer.");
    else throw error;
  }
}

function tell(text) {
  element("notice").textContent = text;
  element("notice").hidden = !text;
}

function changed() {
  element("hint").hidden = !sheet.empty;
  sheet.lay(null);
  if (state.model) classify();
}

async function start() {
  const { models = [] } = await indexOfModels();
  const found = [];
  for (const { name, version } of models.filter((one) => one.state === "READY")) {
    found.push(await call(`v1/model?model_name=${encodeURIComponent(name)}&model_version=${version}`));
  }
  if (!found.length) throw new Refused(503, "The server serves no model now.");
  const choice = element("model");
  choice.replaceChildren(...found.map((model, index) => (
    create("option", { value: index, textContent: `${model.model_name} ${model.model_version}` })
  )));
  choice.disabled = false;
  choice.onchange = () => use(found[choice.value]);
  element("access").hidden = true;
  use(found[0]);
}

async function indexOfModels() {
  const models = await call("v2/repository/index", {});
  return { models: Array.isArray(models) ? models : models.models };
}

function use(model) {
  state.model = model;
  const pairs = model.dataset === "multimnist";
  sheet.coloured = pairs;
  element("layers").hidden = !pairs;
  if (!pairs) {
    element("layers").querySelector("input").checked = true;
    sheet.active = 0;
  }
  element("seen").width = element("seen").height = model.image_width;
  element("relevance-class").replaceChildren(
    create("option", { value: "", textContent: "the longest" }),
    ...model.labels.map((label, index) => create("option", { value: index, textContent: label })),
  );
  const error = model.test_images ? ((100 * model.test_errors) / model.test_images).toFixed(2) : "?";
  element("about").textContent = `${model.model_name} ${model.model_version}, trained on ${model.dataset}; `
    + `test error ${error} % of ${model.test_images.toLocaleString("en")}; ${model.execution_provider}, `
    + `${model.precision}; SHA-256 ${model.sha256.slice(0, 16)}…`;
  bars();
  sheet.show();
  sheet.clear();
}

/** Make the rows of the bars, empty. */
function bars() {
  const presence = state.model.calibration?.presence ?? [];
  element("bars").replaceChildren(...state.model.labels.map((label, index) => {
    const fill = create("span", { className: "fill" });
    const track = create("span", { className: "track" }, fill);
    if (presence[index]) {
      const tick = create("span", { className: "tick" });
      tick.style.left = `${100 * presence[index]}%`;
      track.append(tick);
    }
    return create("li", {}, create("span", { className: "name", textContent: label, title: label }), track,
      create("span", { className: "number" }));
  }));
}

async function askForAnswer() {
  const { model } = state;
  if (sheet.empty) {
    showNothing();
    return;
  }
  const size = model.image_width;
  const { pixels, place, layers } = sheet.image(size, model.preparation);
  const channels = new Uint8Array(model.image_channels * pixels.length);
  for (let channel = 0; channel < model.image_channels; channel++) channels.set(pixels, channel * pixels.length);
  const encoded = toBase64(channels);
  const body = { ...named(), images: [{ pixels: encoded }], reconstruction_error: Boolean(model.reconstructs) };
  const { results: [answer] } = await call("v1/classify", body);
  Object.assign(state, { answer, sent: { encoded, place, size, layers } });
  element("seen").getContext("2d").putImageData(grey(pixels, size), 0, 0);
  showAnswer(answer);
  takePoses(answer);
  explainSoon();
}

function showNothing() {
  state.answer = state.sent = null;
  setVerdict("Nothing drawn yet.", "", "");
  for (const row of element("bars").children) fillBar(row, 0, "", false);
  const { width, height } = element("seen");
  element("seen").getContext("2d").clearRect(0, 0, width, height);
  state.poses.clear();
  state.found.clear();
  element("pictures").replaceChildren();
  element("sliders").replaceChildren();
  element("pose-class").replaceChildren();
}

function setVerdict(text, kind, detail) {
  if (element("verdict").textContent !== text) element("verdict").textContent = text;
  element("verdict").className = `verdict ${kind}`;
  element("detail").textContent = detail;
}

function fillBar(row, length, number, present) {
  row.className = present ? "present" : "";
  row.querySelector(".fill").style.width = `${100 * Math.min(1, length)}%`;
  row.querySelector(".number").textContent = number;
}

function showAnswer(answer) {
  const rate = (value) => `${(100 * value).toFixed(1)} %`;
  const objects = state.model.calibration?.objects || 1;
  const share = objects > 1 ? ` of at most ${rate(1 / objects)}, since this network takes an image to show ${objects} objects` : "";
  const longest = `The longest capsule is ${answer.label}.`;
  const [text, kind, detail] = {
    VERDICT_OK: [`It is ${answer.label}.`, "good", `Confidence ${rate(answer.confidence)}${share}.`],
    VERDICT_SEVERAL: [`${answer.present.join(" and ")} together.`, "good", "Several classes are present."],
    VERDICT_NONE_OF_THESE: ["None of these.", "warn", longest],
    VERDICT_SUSPICIOUS: [`Perhaps ${answer.present.join(" and ")}.`, "warn", suspicion(answer)],
    VERDICT_BLANK: ["A blank image.", "warn", "All pixels are the same."],
  }[answer.verdict] ?? [`${answer.label}?`, "", "This model has no calibration."];
  const error = answer.reconstruction_error == null ? ""
    : ` Its reconstruction differs by ${answer.reconstruction_error.toFixed(4)} (mean square).`;
  setVerdict(text, kind, detail + error);
  [...element("bars").children].forEach((row, index) => {
    const capsule = answer.capsules[index];
    const present = answer.present.includes(capsule.label);
    fillBar(row, capsule.probability, capsule.probability.toFixed(2), present);
    row.setAttribute("aria-label", `${capsule.label}: length ${capsule.probability.toFixed(2)}${present ? ", present" : ""}`);
  });
}

function suspicion(answer) {
  const lengths = answer.capsules.map((capsule) => capsule.probability).sort((a, b) => b - a);
  const { margin } = state.model.calibration;
  return answer.present.length === 1 && lengths[0] - lengths[1] < margin
    ? "Its lead over the next class is unusually small." : "The image is unlike what the network draws from its pose.";
}

async function askForRelevance() {
  const { sent } = state;
  if (!sent || !element("relevance").checked || !state.model.primary_capsules) {
    sheet.lay(null);
    return;
  }
  const choice = element("relevance-class").value;
  const body = { ...named(), images: [{ pixels: sent.encoded }], parts: ["EXPLANATION_PART_RELEVANCE"] };
  if (choice) body.classes = [Number(choice)];
  const { results: [answer] } = await call("v1/explain", body);
  if (state.sent === sent) sheet.lay(answer.classes[0].relevance.values, sent.size, sent.place);
}

/** Take the poses of the present classes, or of the longest, from an answer. */
function takePoses(answer) {
  if (!state.model.reconstructs) return;
  const shown = answer.present.length ? answer.present : [answer.label];
  const indices = shown.slice(0, 2).map((label) => state.model.labels.indexOf(label));
  state.found = new Map(indices.map((index) => [index, answer.capsules[index].pose]));
  state.poses = new Map(indices.map((index) => [index, [...answer.capsules[index].pose]]));
  const choice = element("pose-class");
  const before = Number(choice.value);
  choice.replaceChildren(...indices.map((index) => (
    create("option", { value: index, textContent: state.model.labels[index] })
  )));
  if (state.poses.has(before)) choice.value = before;
  sliders();
  draw();
}

function sliders() {
  const index = Number(element("pose-class").value);
  const [found, pose] = [state.found.get(index), state.poses.get(index)];
  if (!pose) return;
  const holder = element("sliders");
  if (holder.children.length !== pose.length) {
    holder.replaceChildren(...pose.map((_, dimension) => {
      const input = create("input", { type: "range", step: 0.005, ariaLabel: `Dimension ${dimension + 1} of the pose` });
      const output = create("output");
      input.oninput = () => turn(dimension, Number(input.value));
      return create("label", {}, create("span", { textContent: dimension + 1 }), input, output);
    }));
  }
  pose.forEach((value, dimension) => {
    const [, input, output] = holder.children[dimension].children;
    Object.assign(input, { min: found[dimension] - POSE_RANGE, max: found[dimension] + POSE_RANGE, value });
    output.textContent = value.toFixed(2);
  });
}

function turn(dimension, value) {
  state.poses.get(Number(element("pose-class").value))[dimension] = value;
  element("sliders").children[dimension].lastChild.textContent = value.toFixed(2);
  draw();
}

async function askForPictures() {
  const poses = [...state.poses].map(([class_index, pose]) => ({ class_index, pose }));
  if (!poses.length) return;
  const answer = await call("v1/reconstruct", { ...named(), poses: { poses } });
  const size = answer.image_width;
  const images = answer.results.map((result) => fromBase64(result.image));
  const colours = coloursOf(images);
  const pictures = answer.results.map((result, index) => (
    picture(size, [[images[index], colours[index]]], `${result.label}, drawn from its pose`)
  ));
  if (images.length > 1) pictures.push(picture(size, images.map((image, index) => [image, colours[index]]), "both"));
  const holder = element("pictures");
  if (state.poses.size) holder.replaceChildren(...pictures);
}

/** Return the colour of each reconstruction: white for one, else that of the layer that it fits better. */
function coloursOf(images) {
  if (images.length < 2) return [[1, 1, 1]];
  const layers = state.sent?.layers ?? [];
  const fit = (image, layer) => image.reduce((sum, value, index) => sum + value * layer[index], 0);
  const swapped = layers.length === 2
    && fit(images[0], layers[1]) + fit(images[1], layers[0]) > fit(images[0], layers[0]) + fit(images[1], layers[1]);
  return swapped ? [...DIGIT_COLOURS].reverse() : DIGIT_COLOURS;
}

/** Return a figure of images that are added up, each with its colour. */
function picture(size, parts, text) {
  const canvas = create("canvas", { width: size, height: size, role: "img", ariaLabel: text });
  const context = canvas.getContext("2d");
  const sum = context.createImageData(size, size);
  for (let index = 3; index < sum.data.length; index += 4) sum.data[index] = 255;
  for (const [pixels, colour] of parts) {
    const { data } = grey(pixels, size, colour);
    for (let index = 0; index < data.length; index++) if (index % 4 < 3) sum.data[index] += data[index];
  }
  context.putImageData(sum, 0, 0);
  return create("figure", {}, canvas, create("figcaption", { textContent: text }));
}

/** Return a small PNG or JPEG file of any picture that the browser reads, upright. Throws Refused. */
async function shrunk(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    throw new Refused(400, "The browser cannot read this picture.");
  }
  const scale = MAX_SIDE / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1 && blob.size <= MAX_BYTES && ["image/png", "image/jpeg"].includes(blob.type)) return blob;
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * Math.min(1, scale))));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return canvas.convertToBlob({ type: blob.type === "image/jpeg" ? "image/jpeg" : "image/png", quality: 0.95 });
}

/** Put a picture on the sheet as the server prepares it for the model. */
async function take(blob) {
  await guarded(async () => {
    const encoded = toBase64(new Uint8Array(await (await shrunk(blob)).arrayBuffer()));
    const image = { encoded, preprocess: "PREPROCESS_AUTO" };
    const body = { ...named(), images: [image], parts: ["EXPLANATION_PART_ROUTING"] };
    const { results: [answer] } = await call("v1/explain", body);
    const size = state.model.image_width;
    sheet.put(fromBase64(answer.pixels).subarray(0, size * size), size);
  });
}

async function takeFrom(name) {
  const answer = await fetch(`shelf/${name}`);
  const blob = await answer.blob();
  if (name.endsWith(".jpg")) await take(blob);
  else await putAsItIs(blob);
}

/** Put a picture in the size of the model on the sheet, in the middle, without any preparation. */
async function putAsItIs(blob) {
  const size = state.model.image_width;
  const bitmap = await createImageBitmap(blob);
  const canvas = new OffscreenCanvas(size, size);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, Math.floor((size - bitmap.width) / 2), Math.floor((size - bitmap.height) / 2));
  const { data } = context.getImageData(0, 0, size, size);
  sheet.put(Uint8Array.from({ length: size * size }, (_, index) => data[4 * index]), size);
}

function listen() {
  element("clear").onclick = () => sheet.clear();
  element("undo").onclick = () => sheet.undo();
  element("reset").onclick = () => {
    const index = Number(element("pose-class").value);
    if (!state.found.has(index)) return;
    state.poses.set(index, [...state.found.get(index)]);
    sliders();
    draw();
  };
  element("pose-class").onchange = sliders;
  element("relevance").onchange = explain;
  element("relevance-class").onchange = explain;
  for (const radio of document.getElementsByName("layer")) radio.onchange = () => { sheet.active = Number(radio.value); };
  element("file").onchange = () => {
    if (element("file").files.length) take(element("file").files[0]);
    element("file").value = "";
  };
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) take(file);
  });
  const holder = element("sheet");
  holder.addEventListener("dragover", (event) => {
    event.preventDefault();
    holder.classList.add("over");
  });
  holder.addEventListener("dragleave", () => holder.classList.remove("over"));
  holder.addEventListener("drop", (event) => {
    event.preventDefault();
    holder.classList.remove("over");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
  element("access").onsubmit = (event) => {
    event.preventDefault();
    setToken(element("token").value.trim());
    guarded(start);
  };
  element("shelf").replaceChildren(...SHELF.map(([name, text]) => {
    const image = create("img", { src: `shelf/${name}`, alt: "" });
    const button = create("button", { type: "button" }, image, text);
    button.onclick = () => guarded(() => takeFrom(name));
    return create("li", {}, button);
  }));
}

listen();
guarded(start);
