// The page of `fpenet view`: sends a photo, paints its label map over it.
"use strict";

const byId = (id) => document.getElementById(id);
const stage = byId("stage");
const slider = byId("slider");

/** What the server says about the model: classes, palette, limits. */
let model = null;
/** The photo on show: name, width, height, labels (a class per pixel), visible (per class). */
let shown = null;
/** Cancels the request under way. */
let pending = null;

const STAGES = {
  upload: "upload",
  decode: "decode",
  prepare: "set-up",
  inference: "inference",
  encode: "encode",
};

// ---- Photos in

async function start() {
  try {
    const reply = await fetch("/model.json");
    if (!reply.ok) throw new Error(await reply.text());
    model = await reply.json();
  } catch (error) {
    fail(unreachable(error));
    return;
  }
  const size = model.train_size ? `, trained at ${model.train_size.join("\u00d7")}` : "";
  byId("model").textContent =
    `${model.classes.length} classes, ${model.parameters.toLocaleString("en")} parameters${size}` +
    ` \u00b7 ${model.device}`;
  showLegend(model.classes.map(() => 0), 0);
}

async function segment(file) {
  if (!model) return;
  pending?.abort();
  const request = (pending = new AbortController());
  byId("error").hidden = true;
  if (file.size > model.max_upload_bytes) {
    const mib = (bytes) => (bytes / 2 ** 20).toFixed(1);
    fail(`${file.name}: expected a file of at most ${mib(model.max_upload_bytes)} MiB, ` +
      `found ${mib(file.size)} MiB`);
    return;
  }
  say(`Segmenting ${file.name} \u2026`);
  stage.setAttribute("aria-busy", "true");
  try {
    const begun = performance.now();
    const reply = await post("/segment", file, request.signal);
    const png = await reply.blob();
    const answered = performance.now();
    const labels = await readLabels(png);
    const photo = await readPhoto(file, labels, request.signal);
    if (request.signal.aborted) return;
    show(file, png, labels, photo);
    const ended = performance.now();
    showTiming(reply, ended - answered, ended - begun);
  } catch (error) {
    if (!request.signal.aborted) fail(unreachable(error));
  } finally {
    if (pending === request) stage.removeAttribute("aria-busy");
  }
}

async function post(path, file, signal) {
  const reply = await fetch(`${path}?name=${encodeURIComponent(file.name)}`, {
    method: "POST",
    headers: { "Content-Type": "application/octet-stream" },
    body: file,
    signal,
  });
  if (!reply.ok) throw new Error((await reply.text()).trim());
  return reply;
}

/** A failed fetch says no more than "Failed to fetch". */
function unreachable(error) {
  return error instanceof TypeError
    ? "the server does not answer: is fpenet view still running?"
    : error.message;
}

/** The label map's grey values, one class index per pixel. */
async function readLabels(png) {
  const exact = { premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(png, exact);
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  const values = new Uint8Array(width * height);
  for (let i = 0; i < values.length; i++) values[i] = data[4 * i];
  // Browsers that blur canvases against fingerprinting would paint wrong classes.
  if (values.some((value) => value >= model.classes.length)) {
    throw new Error("this browser changes pixels that are read from a canvas; allow it here");
  }
  return { width, height, values };
}

/** The photo upright; by the server where the browser cannot show its format. */
async function readPhoto(file, { width, height }, signal) {
  try {
    const bitmap = await createImageBitmap(file);
    if (bitmap.width === width && bitmap.height === height) return bitmap;
  } catch {
    // TIFF, PNM
  }
  const reply = await post("/photo", file, signal);
  return createImageBitmap(await reply.blob());
}

// ---- Results out

function show(file, png, { width, height, values }, photo) {
  const counts = model.classes.map(() => 0);
  for (const value of values) counts[value]++;
  const visible = shown?.visible ?? model.classes.map(() => true);
  shown = { name: file.name, png, width, height, labels: values, photo, visible };

  for (const id of ["photo", "overlay"]) {
    byId(id).width = width;
    byId(id).height = height;
  }
  byId("photo").getContext("2d").drawImage(photo, 0, 0);
  stage.style.setProperty("--ratio", String(width / height));
  stage.classList.remove("empty");
  slider.disabled = false;
  byId("save-labels").disabled = byId("save-overlay").disabled = false;
  paint();
  showLegend(counts, values.length);
  say(`${file.name}, ${width}\u00d7${height}`);
}

/** Colours of the visible classes; the rest stays transparent. */
function paint() {
  const { width, height, labels, visible } = shown;
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const table = new Uint32Array(256);
  model.palette.forEach(([r, g, b], i) => {
    const bytes = new Uint8Array(table.buffer, 4 * i, 4);
    if (visible[i]) bytes.set([r, g, b, 255]);
  });
  for (let i = 0; i < pixels.length; i++) pixels[i] = table[labels[i]];
  byId("overlay").getContext("2d").putImageData(image, 0, 0);
}

/** Largest share first, as in the overlays of `fpenet segment`. */
function showLegend(counts, total) {
  const order = counts.map((_, i) => i).sort((a, b) => counts[b] - counts[a] || a - b);
  const rows = order.map((index) => {
    const box = element("input", { type: "checkbox", value: index });
    box.checked = shown?.visible[index] ?? true;
    box.disabled = total === 0;
    box.addEventListener("change", () => {
      shown.visible[index] = box.checked;
      paint();
    });
    const swatch = element("span", { className: "swatch" });
    swatch.style.backgroundColor = `rgb(${model.palette[index].join(" ")})`;
    const name = element("span", { className: "name", textContent: model.classes[index] });
    const share = element("span", { className: "share" });
    share.textContent = total === 0 ? "" : `${percent(counts[index], total)} %`;
    const label = element("label", {}, [box, swatch, name, share]);
    const absent = total > 0 && counts[index] === 0;
    return element("li", { className: absent ? "absent" : "" }, [label]);
  });
  byId("legend").replaceChildren(...rows);
}

function percent(count, total) {
  const value = (100 * count) / total;
  return count > 0 && value < 0.05 ? "<0.1" : value.toFixed(1);
}

function setAll(visible) {
  if (!shown) return;
  shown.visible.fill(visible);
  document.querySelectorAll("#legend input").forEach((box) => (box.checked = visible));
  paint();
}

/** The server's stages, and what the page itself took, in milliseconds. */
function showTiming(reply, display, total) {
  const stages = new Map();
  for (const part of (reply.headers.get("Server-Timing") ?? "").split(",")) {
    const [, name, time] = part.match(/^\s*([a-z]+);dur=([0-9.]+)/) ?? [];
    if (STAGES[name]) stages.set(STAGES[name], Number(time));
  }
  stages.set("display", display);
  const longest = Math.max(...stages.values());
  const cell = (time) => element("td", { textContent: `${time.toFixed(1)} ms` });
  const rows = [...stages].map(([name, time]) => {
    const bar = element("div", { className: "time" });
    bar.style.width = `${(100 * time) / longest}%`;
    const heading = element("th", { scope: "row", textContent: name });
    return element("tr", {}, [heading, element("td", {}, [bar]), cell(time)]);
  });
  const heading = element("th", { scope: "row", textContent: "total" });
  const foot = element("tr", {}, [heading, element("td"), cell(total)]);
  document.querySelector("#timing tbody").replaceChildren(...rows);
  document.querySelector("#timing tfoot").replaceChildren(foot);
  const network = reply.headers.get("X-Network-Size");
  byId("network").textContent = network ? `Network at ${network.replace("x", "\u00d7")}` : "";
}

function moveDivider() {
  stage.style.setProperty("--at", `${slider.value}%`);
  slider.setAttribute("aria-valuetext", `photo up to ${slider.value} percent of the width`);
}

function readOut(event) {
  if (!shown) return;
  const box = stage.getBoundingClientRect();
  const at = (offset, length, pixels) =>
    Math.min(pixels - 1, Math.max(0, Math.floor((offset / length) * pixels)));
  const x = at(event.clientX - box.left, box.width, shown.width);
  const y = at(event.clientY - box.top, box.height, shown.height);
  const name = model.classes[shown.labels[y * shown.width + x]];
  byId("readout").textContent = `x ${x}, y ${y}: ${name}`;
}

async function saveOverlay() {
  const canvas = new OffscreenCanvas(shown.width, shown.height);
  const context = canvas.getContext("2d");
  context.drawImage(shown.photo, 0, 0);
  context.globalAlpha = byId("opacity").value / 100;
  context.drawImage(byId("overlay"), 0, 0);
  save(await canvas.convertToBlob(), "overlay");
}

function save(blob, kind) {
  const stem = shown.name.replace(/\.[^.]*$/, "") || "photo";
  const link = element("a", { href: URL.createObjectURL(blob), download: `${stem}.${kind}.png` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(text) {
  byId("status").textContent = text;
}

function fail(text) {
  say(shown ? `${shown.name}, ${shown.width}\u00d7${shown.height}` : "");
  byId("error").textContent = text;
  byId("error").hidden = false;
}

// ---- Events

function take(files) {
  const file = [...files].find((file) => file.type.startsWith("image/")) ?? files[0];
  if (file) segment(file);
}

byId("choose").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // so that choosing the same file again is a change
});
byId("example").addEventListener("click", async () => {
  try {
    const blob = await (await fetch("/example.jpg")).blob();
    segment(new File([blob], "street.jpg", { type: blob.type }));
  } catch (error) {
    fail(unreachable(error));
  }
});
document.addEventListener("paste", (event) => take(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take(event.dataTransfer.files);
});
slider.addEventListener("input", moveDivider);
stage.addEventListener("pointermove", readOut);
stage.addEventListener("pointerleave", () => (byId("readout").textContent = "\u00a0"));
byId("opacity").addEventListener("input", (event) => {
  byId("overlay").style.opacity = event.target.value / 100;
  byId("opacity-value").textContent = `${event.target.value} %`;
});
byId("all").addEventListener("click", () => setAll(true));
byId("none").addEventListener("click", () => setAll(false));
byId("save-labels").addEventListener("click", () => save(shown.png, "labels"));
byId("save-overlay").addEventListener("click", saveOverlay);
byId("overlay").style.opacity = byId("opacity").value / 100;
start();
