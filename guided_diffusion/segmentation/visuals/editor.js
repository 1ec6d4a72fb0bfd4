const MOST_KEPT = 5e7;  // pixels in all strokes that can be undone
const MOST_ZOOM = 32;
const state = { tool: "brush", index: categories[1].index, diameter: 15, zoom: 1, fitted: true };
// strokes, of which the first `done` are in the mask: {places, before, after}
let strokes = [];
let done = 0;
let start = {};  // stands for the mask before the first of them
let saved = null;  // the last stroke in the mask that was saved
let stroke = null;  // under the pointer
let busy = false;

function finish() {
  const ended = stroke;
  stroke = null;
  if (!ended || !ended.count) return;
  ended.places = ended.places.slice(0, ended.count);
  ended.before = ended.before.slice(0, ended.count);
  strokes = [...strokes.slice(0, done), ended];
  let kept = strokes.reduce((sum, one) => sum + one.count, 0);
  while (kept > MOST_KEPT && strokes.length > 1) {
    start = strokes.shift();
    kept -= start.count;
  }
  done = strokes.length;
  changed();
}

/** The last stroke in the mask, which tells one state of the mask from all others. */
const latest = () => (done ? strokes[done - 1] : start);

function step(back) {
  if (stroke || (back ? done === 0 : done === strokes.length)) return;
  if (back) strokes[--done].apply(true);
  else strokes[done++].apply(false);
  changed();
}

function changed() {
  byId("undo").disabled = done === 0;
  byId("redo").disabled = done === strokes.length;
  for (const button of byId("classes").querySelectorAll("button")) {
    const share = (100 * shares[button.dataset.index]) / mask.length;
    button.querySelector("small").textContent = `${share.toFixed(1)} %`;
  }
  const isSaved = latest() === saved;
  say(isSaved ? data.saved : data.note);
  parent.postMessage({ kind: "unsaved", unsaved: !isSaved && (done > 0 || saved !== null) }, "*");
}

function say(text, wrong = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("wrong", wrong);
}

// ---- saving

async function save(replace = false) {
  if (busy || stroke) return;
  busy = byId("save").disabled = true;
  const at = latest();
  say("Saving ...");
  const content = await packed(mask);
  const answer = await new Promise((resolve) => {
    const heard = (event) => {
      if (event.source !== parent) return;
      removeEventListener("message", heard);
      resolve(event.data);
    };
    addEventListener("message", heard);
    parent.postMessage({ kind: "save", token: data.token, replace, mask: content.buffer }, "*");
  });
  busy = byId("save").disabled = false;
  if (answer.saved) {
    saved = at;
    data.saved = `Saved ${answer.saved}.`;
    data.note = "Changes are not saved yet.";
    changed();
  } else if (answer.question) {
    changed();
    byId("question-text").textContent = answer.question;
    byId("question").showModal();
  } else {
    say(`Not saved: ${answer.error}`, true);
  }
}

async function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await png());
  link.download = `${data.name}_mask.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// ---- pointer

/** The pointer's place in pixels: the centre of one for odd diameters, a corner for even ones. */
function place(event) {
  const box = canvas.getBoundingClientRect();
  const x = ((event.clientX - box.left) * width) / box.width;
  const y = ((event.clientY - box.top) * height) / box.height;
  const odd = state.diameter % 2;
  return [x, y].map((v) => (odd ? Math.floor(v) + 0.5 : Math.round(v)));
}

let last = null;  // the pointer's last place, in pixels of the mask or of the screen

canvas.addEventListener("pointerdown", (event) => {
  if (stroke || last || event.button > 1) return;
  canvas.setPointerCapture(event.pointerId);
  if (state.tool === "move" || event.button === 1) {
    event.preventDefault();
    last = { moving: true, x: event.clientX, y: event.clientY };
    return;
  }
  const erases = state.tool === "eraser";
  stroke = new Stroke(erases ? 0 : state.index, erases ? state.index : null);
  last = place(event);
  stroke.line(last, last, state.diameter);
});
canvas.addEventListener("pointermove", (event) => {
  ring(event);
  if (last && last.moving) {
    byId("view").scrollBy(last.x - event.clientX, last.y - event.clientY);
    last = { moving: true, x: event.clientX, y: event.clientY };
  } else if (stroke) {
    const events = event.getCoalescedEvents?.() ?? [];
    for (const one of events.length ? events : [event]) {
      const next = place(one);
      stroke.line(last, next, state.diameter);
      last = next;
    }
  }
});
for (const kind of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(kind, () => {
    last = null;
    finish();
  });
}
canvas.addEventListener("pointerleave", () => { byId("ring").hidden = true; });

function ring(event) {
  const [x, y] = place(event);
  const { style } = byId("ring");
  byId("ring").hidden = state.tool === "move";
  style.left = `${x * state.zoom}px`;
  style.top = `${y * state.zoom}px`;
  style.width = style.height = `${state.diameter * state.zoom}px`;
}

// ---- zoom

const fitting = () =>
  Math.min(byId("view").clientWidth / width, byId("view").clientHeight / height, MOST_ZOOM);

/** Zoom so that the point of the view at (x, y), by default its middle, stays where it is. */
function zoomTo(zoom, x = byId("view").clientWidth / 2, y = byId("view").clientHeight / 2) {
  const view = byId("view");
  const stage = byId("stage");
  const box = stage.getBoundingClientRect();
  const frame = view.getBoundingClientRect();
  const [u, v] = [(x + frame.left - box.left) / state.zoom, (y + frame.top - box.top) / state.zoom];
  state.zoom = Math.min(MOST_ZOOM, Math.max(zoom, Math.min(1, fitting() / 2)));
  stage.style.width = `${width * state.zoom}px`;
  stage.style.height = `${height * state.zoom}px`;
  byId("ring").hidden = true;
  const moved = stage.getBoundingClientRect();
  view.scrollBy(moved.left + u * state.zoom - x - frame.left,
    moved.top + v * state.zoom - y - frame.top);
}

function fit() {
  state.fitted = true;
  zoomTo(fitting());
}

function zoomBy(factor, x, y) {
  state.fitted = false;
  zoomTo(state.zoom * factor, x, y);
}

byId("view").addEventListener("wheel", (event) => {
  if (!event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  const frame = byId("view").getBoundingClientRect();
  zoomBy(Math.exp(-event.deltaY / 300), event.clientX - frame.left, event.clientY - frame.top);
}, { passive: false });
new ResizeObserver(() => state.fitted && fit()).observe(byId("view"));

// ---- tools

function choose(tool, index = state.index) {
  if (tool === "eraser" && index === 0) index = categories[1].index;
  Object.assign(state, { tool, index });
  for (const button of byId("tools").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", button.dataset.tool === tool);
  }
  for (const button of byId("classes").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", Number(button.dataset.index) === index);
  }
  byId("stage").classList.toggle("move", tool === "move");
  byId("ring").hidden = true;
}

/** Choose a class; there is no background to erase. */
const chooseClass = (index) => choose(index === 0 || state.tool === "move" ? "brush" : state.tool,
  index);

function setDiameter(diameter) {
  const slider = byId("diameter");
  state.diameter = Math.min(slider.max, Math.max(1, diameter));
  slider.value = state.diameter;
  byId("diameter-of").textContent = `${state.diameter} px`;
  byId("ring").hidden = true;
}

function setOpacity(percent) {
  byId("opacity-of").textContent = `${percent} %`;
  canvas.style.opacity = percent / 100;
}

const keys = {
  b: () => choose("brush"),
  e: () => choose("eraser"),
  m: () => choose("move"),
  "[": () => setDiameter(state.diameter - Math.ceil(state.diameter / 10)),
  "]": () => setDiameter(state.diameter + Math.ceil(state.diameter / 10)),
  "+": () => zoomBy(1.25),
  "=": () => zoomBy(1.25),
  "-": () => zoomBy(0.8),
  0: fit,
  h: () => { canvas.style.visibility = "hidden"; },
};
const controlled = { z: () => step(true), y: () => step(false), s: () => save() };

function pressed(event) {
  if (event.altKey || byId("question").open) return;
  const key = event.key.toLowerCase();
  const control = event.ctrlKey || event.metaKey;
  let action = control ? controlled[key] : keys[key];
  if (control && event.shiftKey && key === "z") action = controlled.y;
  if (!control && /^[1-9]$/.test(key) && categories[key]) {
    action = () => chooseClass(categories[key].index);
  }
  if (!action || stroke) return;
  event.preventDefault();
  action();
}

function build() {
  document.title = `Correct ${data.name}`;
  byId("name").textContent = data.name;
  byId("size-of").textContent = `${width} × ${height}`;
  byId("radiograph").src = data.image;
  Object.assign(canvas, { width, height });
  for (const { index, name, color } of categories) {
    const button = document.createElement("button");
    const square = document.createElement("span");
    Object.assign(button, { type: "button" }).dataset.index = index;
    square.className = "swatch";
    square.style.background = `rgb(${color.join(",")})`;
    button.append(square, name, document.createElement("small"));
    button.addEventListener("click", () => chooseClass(index));
    byId("classes").append(button);
  }
  for (const button of byId("tools").querySelectorAll("button")) {
    button.addEventListener("click", () => choose(button.dataset.tool));
  }
  byId("diameter").max = Math.max(40, Math.ceil(Math.max(width, height) / 10));
  byId("diameter").addEventListener("input", (event) => setDiameter(Number(event.target.value)));
  byId("opacity").addEventListener("input", (event) => setOpacity(event.target.value));
  const clicks = {
    undo: () => step(true), redo: () => step(false), save: () => save(), download,
    smaller: () => zoomBy(0.8), fit, larger: () => zoomBy(1.25),
  };
  for (const [id, action] of Object.entries(clicks)) byId(id).addEventListener("click", action);
  // by buttons: a frame in a sandbox may not submit forms
  byId("keep").addEventListener("click", () => byId("question").close());
  byId("replace").addEventListener("click", () => {
    byId("question").close();
    save(true);
  });
  document.addEventListener("keydown", pressed);
  document.addEventListener("keyup", (event) => {
    if (event.key.toLowerCase() === "h") canvas.style.visibility = "";
  });
  choose("brush");
  setDiameter(Math.max(3, Math.round(Math.max(width, height) / 60)));
  setOpacity(40);
  fit();
  for (const value of mask) shares[value]++;
  show(0, 0, width - 1, height - 1);
  changed();
  canvas.dataset.ready = "true";
}

unpacked(Uint8Array.from(atob(data.mask), (c) => c.charCodeAt(0))).then((values) => {
  mask = values;
  build();
}).catch((error) => say(`this browser cannot show the mask (${error.message})`, true));
