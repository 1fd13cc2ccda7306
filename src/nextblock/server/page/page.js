"use strict";

const EXAMPLE = "Q: Leo has 8 bags with 7 coins in each. He loses 13. How many coins does Leo have?\nA:";
const PASSES_PER_SECOND = 12;
const byId = (id) => document.getElementById(id);
const form = byId("form"), scrubber = byId("scrubber");
let model = null, lanes = [], calls = null, timer = null, following = true;

/** One mode's answer: what happened, and how it looks after any forward pass. */
class Lane {
  constructor(mode, block) {
    this.mode = mode;
    this.block = block;
    this.events = [];
    this.passes = 0;
    this.end = null;
    this.began = performance.now();
    this.seconds = 0;
    this.text = "";
    const root = byId("lane").content.cloneNode(true).firstElementChild;
    this.root = root;
    root.dataset.mode = mode;
    root.querySelector("h2").textContent = mode;
    this.cells = root.querySelector(".cells");
    byId("lanes").append(root);
  }

  take(chunk) {
    if (chunk.forwards === undefined) return;
    for (const event of chunk.events) {
      if (event.type === "finished") this.end = event.tokens;
      else this.events.push(event);
    }
    this.passes = Math.max(this.passes, chunk.forwards);
    for (const choice of chunk.choices) this.text += choice.delta ? choice.delta.content ?? "" : choice.text;
    this.seconds = (performance.now() - this.began) / 1000;
  }

  /** Tokens in their places after `pass`, drafts that this pass rejected, and how many places are shown. */
  at(pass) {
    const tokens = new Map(), ghosts = new Map();
    let last = 0;
    for (const event of this.events) {
      if (event.step > pass || (this.end !== null && event.offset >= this.end)) continue;
      if (event.type === "committed") {
        if (event.step > last) { last = event.step; ghosts.clear(); }
        tokens.set(event.offset, event);
      } else if (event.step >= last) {
        if (event.step > last) { last = event.step; ghosts.clear(); }
        if (!ghosts.has(event.offset)) ghosts.set(event.offset, event);
      }
    }
    let width = Math.max(0, ...[...tokens.keys()].map((offset) => offset + 1));
    if (this.mode === "diffusion" && width && this.block) width = Math.ceil(width / this.block) * this.block;
    if (this.end !== null) width = Math.min(width, this.end);
    return { tokens, ghosts, width, last };
  }

  show(pass) {
    const { tokens, ghosts, width, last } = this.at(pass);
    const parts = [];
    for (let offset = 0; offset < width; offset++) {
      if (this.mode === "diffusion" && this.block && offset && offset % this.block === 0) parts.push(cell("span", "block", ""));
      const token = tokens.get(offset);
      if (token === undefined) { parts.push(cell("span", "token mask", " ")); continue; }
      const sign = /^<.*>$/.test(token.text);
      const made = cell("span", `token${sign ? " sign" : ""}${token.step === last ? " new" : ""}`, visible(token.text));
      made.style.setProperty("--c", token.confidence);
      made.title = `${(100 * token.confidence).toFixed(0)} %, pass ${token.step}`;
      parts.push(made);
      if (token.text.includes("\n")) parts.push(document.createElement("br"));
    }
    for (const [offset, ghost] of [...ghosts].sort((a, b) => a[0] - b[0])) {
      if (pass < this.passes || this.end === null || offset < this.end) parts.push(cell("s", "ghost", visible(ghost.text)));
    }
    this.cells.replaceChildren(...parts);
    const count = tokens.size, passes = Math.min(pass, this.passes);
    this.say(".passes", passes);
    this.say(".tokens", count);
    this.say(".per-pass", passes ? (count / passes).toFixed(2) : "–");
    if (pass >= this.passes) this.say(".per-second", this.seconds ? Math.round(count / this.seconds) : "–");
  }

  say(where, what) { this.root.querySelector(where).textContent = what; }
}

function cell(kind, name, text) {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

const visible = (text) => (text === "" ? "∅" : text.replaceAll("\n", "⏎"));
const longest = () => Math.max(0, ...lanes.map((lane) => lane.passes));

function draw() {
  scrubber.max = longest();
  if (following) scrubber.value = longest();
  const pass = Number(scrubber.value);
  byId("pass").textContent = `pass ${pass} of ${longest()}`;
  scrubber.setAttribute("aria-valuetext", `pass ${pass} of ${longest()}`);
  for (const lane of lanes) lane.show(pass);
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}

const headers = () => ({
  "Content-Type": "application/json",
  ...(byId("key").value ? { Authorization: `Bearer ${byId("key").value}` } : {}),
});

async function failure(response) {
  const body = await response.json().catch(() => null);
  if (response.status === 401) byId("key-field").hidden = false;
  return new Error(body?.error?.message ?? `the server says ${response.status}`);
}

function request(mode) {
  const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
  const chat = byId("chat").checked, text = byId("prompt").value;
  const body = {
    model: model?.id, mode, stream: true, events: true,
    max_tokens: number("max_tokens"), temperature: number("temperature"), seed: number("seed"),
    ...(chat ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
  };
  if (mode !== "ar") body.block_size = number("block_size");
  if (mode === "diffusion") body.threshold = number("threshold");
  return [chat ? "v1/chat/completions" : "v1/completions", JSON.stringify(body)];
}

async function decode(lane, signal) {
  const [path, body] = request(lane.mode);
  const response = await fetch(path, { method: "POST", headers: headers(), body, signal });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: {")) continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      lane.take(chunk);
      redraw();
    }
  }
}

function complain(error) {
  byId("error").textContent = error ? `${error.message ?? error}` : "";
  byId("error").hidden = !error;
}

async function run() {
  if (calls) return;
  pause();
  complain(null);
  const wanted = form.elements.mode.value;
  const modes = wanted === "race" ? model.modes : [wanted];
  calls = new AbortController();
  following = true;
  byId("lanes").replaceChildren();
  lanes = modes.map((mode) => new Lane(mode, Number(byId("block_size").value) || model?.block_size));
  for (const id of ["player", "legend"]) byId(id).hidden = false;
  byId("share").hidden = modes.length < 2;
  byId("run").disabled = true;
  byId("stop").disabled = false;
  byId("status").textContent = "decoding";
  draw();
  const ends = await Promise.allSettled(lanes.map((lane) => decode(lane, calls.signal)));
  const failed = ends.find((end) => end.status === "rejected" && end.reason.name !== "AbortError");
  if (failed) complain(failed.reason);
  calls = null;
  byId("run").disabled = false;
  byId("stop").disabled = true;
  draw();
  for (const lane of lanes) lane.say(".answer", lane.text);
  const told = lanes.map((lane) => `${lane.mode}: ${lane.end ?? lane.at(lane.passes).tokens.size} tokens in ${lane.passes} passes`);
  byId("status").textContent = failed ? "" : `done. ${told.join("; ")}`;
}

function pause() {
  clearInterval(timer);
  timer = null;
  byId("play").textContent = "Replay";
  byId("play").setAttribute("aria-pressed", "false");
}

function play() {
  if (timer) { pause(); return; }
  following = false;
  if (Number(scrubber.value) >= longest()) scrubber.value = 0;
  byId("play").textContent = "Pause";
  byId("play").setAttribute("aria-pressed", "true");
  timer = setInterval(() => {
    scrubber.value = Number(scrubber.value) + 1;
    draw();
    if (Number(scrubber.value) >= longest() && !calls) pause();
  }, 1000 / PASSES_PER_SECOND);
}

async function greet() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await failure(response);
  model = (await response.json()).data[0];
  const kind = model.block_size ? `blocks of ${model.block_size}` : "ar mode only: no block-diffusion settings";
  byId("model").textContent = `${model.id} · ${kind}`;
  document.title = `${model.id} · nextblock`;
  for (const choice of form.elements.mode) {
    choice.disabled = choice.value === "race" ? model.modes.length < 2 : !model.modes.includes(choice.value);
  }
  if (!model.modes.includes(form.elements.mode.value)) form.elements.mode.value = model.modes[0];
  if (!byId("prompt").value && /^tiny-(bd|ar)$/.test(model.id)) byId("prompt").value = EXAMPLE;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    if (!model) await greet();
    await run();
  } catch (error) { complain(error); }
});
byId("stop").addEventListener("click", () => calls?.abort());
byId("play").addEventListener("click", play);
scrubber.addEventListener("input", () => { pause(); following = Number(scrubber.value) >= longest(); draw(); });
byId("threshold").addEventListener("input", () => {
  byId("threshold-shown").textContent = Number(byId("threshold").value).toFixed(2);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") calls?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
greet().catch(complain);
