"use strict";
// A labeling sheet: one task in the page at a time, every change saved at once, nothing sent anywhere. All text from
// the data is put in as text nodes; the page's policy allows no other script and no connection.
(() => {
const SHEET = JSON.parse(document.getElementById("sheet").textContent);
const TASKS = SHEET.tasks.map(([id, prompt, outputs]) => ({ id, prompt, outputs }));
const BY_ID = new Map(TASKS.map((task) => [task.id, task]));
const LETTERS = "ABCDEFGHI";
const AT_FIRST = 4000; // characters of a text shown before "Show the rest"
const IDLE = 180_000; // milliseconds without a sign of the labeler after which time no longer counts
const REASONS = ["I do not understand it", "I lack the knowledge to judge it", "I would rather not read this",
  "The text is broken or cut off", "Another reason"];
const $ = (id) => document.getElementById(id);

let labeler = null;
let answers = new Map(); // task id -> answer
let at = 0; // number of the task in the page
let current = null; // its answer

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// ---- what is kept in the browser ------------------------------------------------------------------------------

const PREFIX = `prefopt-label/${SHEET.sheet}/`;
const keep = {
  get(name) { try { return localStorage.getItem(PREFIX + name); } catch { return null; } },
  set(name, value) {
    try {
      localStorage.setItem(PREFIX + name, value);
      warn("");
    } catch {
      warn("This browser does not keep answers (no storage, or it is full). Do not close the page before you have downloaded them.");
    }
  },
};
let unsafe = false; // answers that are only in this page
function warn(text) {
  unsafe = text !== "";
  $("warning").textContent = text;
  $("warning").hidden = !unsafe;
}
window.addEventListener("beforeunload", (event) => { if (unsafe && answers.size) event.preventDefault(); });

// Saved answers stand in localStorage, which outlives the page at once but reaches the disk seconds later; a second
// copy in IndexedDB, asked to be durable, outlives a browser that is killed.
let copies = null;
const opened = new Promise((resolve) => {
  try {
    const request = indexedDB.open("prefopt-label", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("answers");
    request.onsuccess = () => { copies = request.result; resolve(); };
    request.onerror = request.onblocked = () => resolve();
  } catch { resolve(); }
});
const answerName = (id) => `${labeler}/task/${id}`;
function copy(answer) {
  if (!copies) return;
  try {
    copies.transaction("answers", "readwrite", { durability: "strict" }).objectStore("answers")
      .put(JSON.stringify(answer), PREFIX + answerName(answer.task));
  } catch { copies = null; }
}
function readCopies() {
  return opened.then(() => new Promise((resolve) => {
    if (!copies) return resolve([]);
    const from = PREFIX + answerName("");
    const request = copies.transaction("answers").objectStore("answers").getAll(IDBKeyRange.bound(from, from + "\uffff"));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve([]);
  }));
}

// ---- answers ----------------------------------------------------------------------------------------------------

function blank(task) {
  const k = task.outputs.length;
  return { task: task.id, status: "started", seconds: 0, started: null, finished: null, saved: null,
    ratings: Array(k).fill(null), flags: Array.from({ length: k }, () => []), ranks: Array(k).fill(null), notes: "", skipped: null };
}
const isList = (value, k, test) => Array.isArray(value) && value.length === k && value.every(test);
const within = (value, most) => value === null || (Number.isInteger(value) && value >= 1 && value <= most);
function isAnswer(answer) { // of this sheet, and whole
  const task = BY_ID.get(answer?.task);
  if (!task) return false;
  const k = task.outputs.length;
  const full = (values) => values.every((value) => value !== null);
  return ["done", "skipped", "started"].includes(answer.status) && typeof answer.seconds === "number"
    && isList(answer.ratings, k, (value) => within(value, 7)) && isList(answer.ranks, k, (value) => within(value, k))
    && isList(answer.flags, k, (one) => Array.isArray(one) && one.every((flag) => SHEET.flags.some(([name]) => name === flag)))
    && typeof answer.notes === "string" && (answer.status !== "done" || (full(answer.ratings) && full(answer.ranks)));
}
// Takes the newer of two answers to a task; says whether it was this one.
function take(answer) {
  if ((answers.get(answer.task)?.saved ?? "") >= (answer.saved ?? "")) return false;
  answers.set(answer.task, answer);
  return true;
}
function takeText(text) {
  try {
    const answer = JSON.parse(text);
    return isAnswer(answer) && take(answer);
  } catch { return false; }
}
function save(finished = false) {
  if (!current) return;
  const now = new Date().toISOString();
  current.started ??= now;
  current.saved = now;
  answers.set(current.task, current);
  keep.set(answerName(current.task), JSON.stringify(current));
  if (finished) copy(current);
}
function changed() { // by the labeler: what was finished is no longer, until it is finished again
  current.skipped = null;
  if (current.status !== "started") { current.status = "started"; current.finished = null; showProgress(); }
  $("missing").textContent = "";
  save();
}

// ---- time -------------------------------------------------------------------------------------------------------

let lastSign = 0, lastTick = performance.now();
const sign = () => { lastSign = performance.now(); };
for (const kind of ["pointermove", "pointerdown", "keydown", "scroll", "wheel", "touchmove"])
  window.addEventListener(kind, sign, { passive: true, capture: true });
function tick() {
  const now = performance.now();
  // Several seconds between two ticks were spent asleep or in the background.
  const passed = Math.min(now - lastTick, 2500);
  lastTick = now;
  if (current && !$("work").hidden && document.visibilityState === "visible" && now - lastSign < IDLE)
    current.seconds = Math.round(current.seconds * 1000 + passed) / 1000;
}
setInterval(tick, 1000);
function leave() { tick(); if (current && answers.get(current.task) === current) { keep.set(answerName(current.task), JSON.stringify(current)); copy(current); } }
document.addEventListener("visibilitychange", () => { if (document.visibilityState === "hidden") leave(); else lastTick = performance.now(); });
window.addEventListener("pagehide", leave);

// ---- text, shown as what it is ------------------------------------------------------------------------------------

// Characters that turn the rest of a line around, control characters and halves of pairs have a name instead of an
// effect; marks of direction and joiners, which right-to-left and other scripts need, are left alone.
const CONTROL = /[\u202d\u202e\u0000-\u0008\u000b-\u001f\u007f-\u009f\ud800-\udfff]/gu; // u: pairs are one character
function put(node, text) {
  let from = 0;
  for (const found of text.matchAll(CONTROL)) {
    const code = "U+" + found[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
    node.append(text.slice(from, found.index), h("span", { className: "control", title: "control character" }, code));
    from = found.index + found[0].length;
  }
  node.append(text.slice(from));
  return node;
}
function lines(text) { // prose, and code between fences
  const box = document.createDocumentFragment();
  const flush = (part, code) => { if (part.length) box.append(put(h("div", code ? { className: "code", tabIndex: 0, role: "group", "aria-label": "code" } : { className: "prose", dir: "auto" }), part.join("\n"))); };
  let part = [], fence = null;
  for (const line of text.replaceAll("\r\n", "\n").split("\n")) {
    const mark = /^\s*(```+|~~~+)/.exec(line)?.[1];
    if (fence === null && mark) { flush(part, false); part = [line]; fence = mark; }
    else if (fence !== null && mark?.startsWith(fence)) { flush([...part, line], true); part = []; fence = null; }
    else part.push(line);
  }
  flush(part, fence !== null);
  return box;
}
function cutAt(text) { // not inside a pair of surrogates, at white space if there is some near
  const space = text.slice(AT_FIRST - 200, AT_FIRST).search(/\s\S*$/);
  if (space >= 0) return AT_FIRST - 200 + space;
  return /[\ud800-\udbff]/.test(text[AT_FIRST - 1]) ? AT_FIRST - 1 : AT_FIRST;
}
function showText(text) {
  const box = h("div", { className: "text" });
  if (!text.trim()) return h("div", { className: "text hint" }, text === "" ? "(nothing)" : `(white space only: ${text.length} characters)`);
  if (text.length <= AT_FIRST * 1.25) { box.append(lines(text)); return box; }
  const cut = cutAt(text);
  box.append(lines(text.slice(0, cut)));
  const more = h("button", { type: "button", className: "more", onclick: () => { box.replaceChildren(lines(text)); box.tabIndex = -1; box.focus({ preventScroll: true }); } },
    `Show the rest (${(text.length - cut).toLocaleString("en")} of ${text.length.toLocaleString("en")} characters)`);
  box.append(more);
  return box;
}
function showValue(value) { // a text, or [role, text] of messages
  if (typeof value === "string") return showText(value);
  return h("div", {}, ...value.map(([role, text]) => h("div", { className: "turn" }, put(h("div", { className: "role" }), role), showText(text))));
}
const plain = (value) => typeof value === "string" ? value : value.map(([, text]) => text).join(" ");

// ---- one task -----------------------------------------------------------------------------------------------------

let flagsOpen = (keep.get("flags-open") ?? (innerWidth > 640 ? "yes" : "no")) === "yes";
function card(i) {
  const letter = LETTERS[i], name = `Output ${letter}`;
  const scale = h("div", { className: "scale" }, h("span", { className: "hint", "aria-hidden": "true" }, "bad"));
  for (let n = 1; n <= 7; n++) {
    const input = h("input", { type: "radio", name: `rating-${i}`, value: n, checked: current.ratings[i] === n, "aria-label": `${n} of 7${n === 1 ? ", bad" : n === 7 ? ", very good" : ""}`,
      onchange: () => { current.ratings[i] = n; changed(); contradictions(); } });
    scale.append(h("label", {}, input, h("span", { className: "point", "aria-hidden": "true" }, String(n))));
  }
  scale.append(h("span", { className: "hint", "aria-hidden": "true" }, "good"));
  const said = h("span", { className: "said" });
  const words = () => { said.textContent = current.flags[i].length ? `: ${current.flags[i].length} ticked` : ": none ticked"; };
  const boxes = SHEET.flags.map(([flag, text]) => h("label", { className: "check" }, h("input", { type: "checkbox", value: flag, checked: current.flags[i].includes(flag),
    onchange: (event) => {
      const set = new Set(current.flags[i]);
      set[event.target.checked ? "add" : "delete"](flag);
      current.flags[i] = SHEET.flags.map(([one]) => one).filter((one) => set.has(one));
      words(); changed();
    } }), h("span", {}, text)));
  words();
  const details = h("details", { open: flagsOpen }, h("summary", {}, `Flags of ${letter}`, said),
    h("fieldset", { "aria-label": `Flags of output ${letter}` }, h("div", { className: "flags" }, ...boxes)));
  details.addEventListener("toggle", () => {
    if (details.open === flagsOpen || !details.isConnected) return;
    flagsOpen = details.open;
    keep.set("flags-open", flagsOpen ? "yes" : "no");
    for (const other of document.querySelectorAll("#outputs details")) other.open = flagsOpen;
  });
  return h("article", { className: "output", id: `output-${i}`, tabIndex: -1, "aria-labelledby": `letter-${i}` },
    h("header", {}, h("h3", { id: `letter-${i}` }, "Output ", h("span", { className: "letter" }, letter))),
    showValue(TASKS[at].outputs[i]),
    h("fieldset", {}, h("legend", {}, `Overall quality of ${letter}`), scale), details);
}

const rankName = (n, k) => n === 1 ? "1 best" : n === k ? `${k} worst` : String(n);
let chips = [];
function board() {
  const k = TASKS[at].outputs.length;
  chips = TASKS[at].outputs.map((output, i) => {
    const letter = LETTERS[i];
    const select = h("select", { "aria-label": `Rank of output ${letter}`, "aria-describedby": "ranking-hint",
      onchange: (event) => place(i, event.target.value === "" ? null : Number(event.target.value)) },
      h("option", { value: "" }, "–"), ...Array.from({ length: k }, (_, n) => h("option", { value: n + 1 }, String(n + 1))));
    const chip = h("li", { className: "chip", "data-output": i },
      h("span", { className: "handle" }, h("span", { className: "grip", "aria-hidden": "true" }, "⋮⋮"), h("span", { className: "letter" }, letter)),
      put(h("span", { className: "preview", dir: "auto", "aria-hidden": "true" }), plain(output).slice(0, 120).replace(/\s+/g, " ").trim()), select);
    chip.addEventListener("pointerdown", (event) => lift(event, i));
    return chip;
  });
  const slots = (label) => h("ul", { className: "slots", "aria-label": label });
  const parts = [h("div", { className: "rank tray", "data-rank": "" }, h("span", { className: "name" }, "not yet"), slots("Not ranked yet"))];
  for (let n = 1; n <= k; n++) {
    parts.push(h("div", { className: "gap", "data-gap": n }));
    parts.push(h("div", { className: "rank", "data-rank": n }, h("span", { className: "name", "aria-hidden": "true" }, rankName(n, k)), slots(`Rank ${rankName(n, k)}`)));
  }
  parts.push(h("div", { className: "gap", "data-gap": k + 1 }));
  $("board").replaceChildren(...parts);
  arrange();
}
function arrange() {
  const focused = document.activeElement;
  chips.forEach((chip, i) => {
    const list = document.querySelector(`#board [data-rank="${current.ranks[i] ?? ""}"] ul`);
    const after = [...list.children].find((other) => Number(other.dataset.output) > i) ?? null;
    if (chip.parentNode !== list || chip.nextSibling !== after) list.insertBefore(chip, after);
    chip.querySelector("select").value = current.ranks[i] ?? "";
  });
  if (chips.some((chip) => chip.contains(focused))) focused.focus({ preventScroll: true }); // moving a node loses it
  contradictions();
}
function place(i, rank) {
  current.ranks[i] = rank;
  changed();
  arrange();
  const tied = LETTERS.split("").filter((_, j) => j !== i && rank !== null && current.ranks[j] === rank);
  say(`${LETTERS[i]}: ${rank === null ? "not ranked" : `rank ${rank}${tied.length ? `, tied with ${tied.join(" and ")}` : ""}`}`);
}
// Makes room between rank g - 1 and rank g by moving others towards the nearest empty rank.
function insert(i, g) {
  const k = current.ranks.length, others = current.ranks.map((rank, j) => j === i ? null : rank);
  const isEmpty = (rank) => !others.includes(rank);
  let below = g, above = g - 1;
  while (below <= k && !isEmpty(below)) below++;
  while (above >= 1 && !isEmpty(above)) above--;
  const down = below <= k;
  others.forEach((rank, j) => {
    if (rank === null) return;
    if (down && rank >= g && rank < below) current.ranks[j] = rank + 1;
    if (!down && rank > above && rank < g) current.ranks[j] = rank - 1;
  });
  place(i, down ? g : g - 1);
}
function contradictions() {
  const pairs = [];
  const { ranks, ratings } = current;
  for (let a = 0; a < ranks.length; a++) for (let b = 0; b < ranks.length; b++)
    if (ranks[a] !== null && ranks[b] !== null && ranks[a] < ranks[b] && ratings[a] !== null && ratings[b] !== null && ratings[a] < ratings[b])
      pairs.push(`${LETTERS[a]} above ${LETTERS[b]}`);
  const text = pairs.length ? `Ranked ${pairs.join(", ")}, but rated the other way round. Fine if you mean it.` : "";
  if ($("contradiction").textContent !== text) $("contradiction").textContent = text;
}

// ---- drag: pointer events, so that mouse, pen and finger are one ----------------------------------------------------

let drag = null;
function lift(event, i) {
  if (event.button !== 0 || drag || event.target.closest("select")) return;
  if (event.pointerType !== "mouse" && !event.target.closest(".handle")) return; // a finger elsewhere scrolls
  const chip = chips[i], box = chip.getBoundingClientRect();
  drag = { i, id: event.pointerId, x: event.clientX, y: event.clientY, dx: event.clientX - box.left, dy: event.clientY - box.top, ghost: null, over: null };
  chip.setPointerCapture(event.pointerId);
  chip.addEventListener("pointermove", move);
  chip.addEventListener("pointerup", drop);
  chip.addEventListener("pointercancel", cancel);
  if (event.pointerType === "mouse") event.preventDefault(); // no selection of text
}
function move(event) {
  if (!drag || event.pointerId !== drag.id) return;
  drag.px = event.clientX; drag.py = event.clientY;
  if (!drag.ghost) {
    if (Math.hypot(drag.px - drag.x, drag.py - drag.y) < 5) return;
    const chip = chips[drag.i];
    drag.ghost = chip.cloneNode(true);
    drag.ghost.classList.add("ghost");
    drag.ghost.inert = true;
    drag.ghost.style.width = `${chip.offsetWidth}px`;
    chip.classList.add("lifted");
    document.documentElement.classList.add("dragging");
    document.body.append(drag.ghost);
    requestAnimationFrame(scrollAtEdge);
  }
  follow();
}
function follow() {
  drag.ghost.style.transform = `translate(${drag.px - drag.dx}px, ${drag.py - drag.dy}px)`;
  const over = document.elementFromPoint(drag.px, drag.py)?.closest("#board [data-rank], #board [data-gap]") ?? null;
  if (over === drag.over) return;
  drag.over?.classList.remove("over");
  over?.classList.add("over");
  drag.over = over;
}
function scrollAtEdge() {
  if (!drag?.ghost) return;
  // Not where it was picked up near an edge: only once it has been carried towards that edge.
  const up = drag.py < 60 && drag.py < drag.y - 24, down = drag.py > innerHeight - 60 && drag.py > drag.y + 24;
  const by = up ? -12 : down ? 12 : 0;
  if (by) { window.scrollBy(0, by); document.querySelector(".side").scrollBy(0, by); follow(); }
  requestAnimationFrame(scrollAtEdge);
}
function drop(event) {
  if (!drag || event.pointerId !== drag.id) return;
  const { i, over } = drag;
  cancel();
  if (!over) return;
  if (over.dataset.gap) insert(i, Number(over.dataset.gap));
  else place(i, over.dataset.rank === "" ? null : Number(over.dataset.rank));
}
function cancel() {
  if (!drag) return;
  const chip = chips[drag.i];
  for (const [kind, heard] of [["pointermove", move], ["pointerup", drop], ["pointercancel", cancel]]) chip.removeEventListener(kind, heard);
  chip.classList.remove("lifted");
  document.documentElement.classList.remove("dragging");
  drag.ghost?.remove();
  drag.over?.classList.remove("over");
  drag = null;
}

// ---- from task to task ----------------------------------------------------------------------------------------------

const isClosed = (task) => ["done", "skipped"].includes(answers.get(task.id)?.status);
function showProgress() {
  let done = 0, skipped = 0;
  for (const answer of answers.values()) { done += answer.status === "done"; skipped += answer.status === "skipped"; }
  $("bar").max = TASKS.length;
  $("bar").value = done + skipped;
  $("progress").textContent = `${done} of ${TASKS.length} done${skipped ? `, ${skipped} skipped` : ""}`;
}
const say = (text) => { $("status").textContent = text; };
function view(name) {
  for (const section of ["start", "work", "end"]) $(section).hidden = section !== name;
  showProgress();
}
function open(number) {
  leave();
  at = Math.min(Math.max(number, 0), TASKS.length - 1);
  const task = TASKS[at];
  current = answers.get(task.id) ?? blank(task);
  keep.set(`${labeler}/at`, String(at));
  $("prompt").replaceChildren(showValue(task.prompt));
  $("outputs").replaceChildren(...task.outputs.map((_, i) => card(i)));
  board();
  $("notes").value = current.notes;
  $("missing").textContent = "";
  say("");
  const state = current.status === "done" ? " (done)" : current.status === "skipped" ? ` (skipped: ${current.skipped?.reason})` : "";
  $("task-title").textContent = `Task ${at + 1} of ${TASKS.length}${state}`;
  $("go").max = TASKS.length;
  $("go").value = at + 1;
  $("back").disabled = at === 0;
  sign();
  lastTick = performance.now();
  view("work");
  window.scrollTo(0, 0);
  document.querySelector(".side").scrollTo(0, 0);
  $("task-title").focus({ preventScroll: true });
}
function openNext() { // the next unfinished one after this, else the first
  for (let step = 1; step <= TASKS.length; step++) {
    const number = (at + step) % TASKS.length;
    if (!isClosed(TASKS[number])) return open(number);
  }
  current = null;
  $("end-text").textContent = `All ${TASKS.length} tasks are answered. Download your answers and send the file back; you can still change any of them.`;
  view("end");
  $("end-title").focus();
}
function finish() {
  const letters = (values) => values.flatMap((value, i) => value === null ? [LETTERS[i]] : []).join(", ");
  const unrated = letters(current.ratings), unranked = letters(current.ranks);
  if (unrated || unranked) {
    $("missing").textContent = [unrated && `Not rated yet: ${unrated}.`, unranked && `Not ranked yet: ${unranked}.`].filter(Boolean).join(" ");
    if (unrated) $(`output-${LETTERS.indexOf(unrated[0])}`).querySelector("input").focus();
    else chips[LETTERS.indexOf(unranked[0])].querySelector("select").focus();
    return;
  }
  close("done", null);
}
function close(status, skipped) {
  tick();
  Object.assign(current, { status, skipped, finished: new Date().toISOString() });
  save(true);
  const closed = at + 1;
  openNext();
  say(`Task ${closed} ${status}. Saved.`);
}

// ---- answers as a file --------------------------------------------------------------------------------------------------

function download() {
  leave();
  const now = new Date().toISOString();
  const given = TASKS.map((task) => answers.get(task.id)).filter(Boolean);
  const head = { format: "prefopt-answers", version: 1, sheet: SHEET.sheet, labeler, downloaded: now, answers: given.length };
  const text = [head, ...given].map((line) => JSON.stringify(line) + "\n").join("");
  const name = labeler.normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "labeler";
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: "application/jsonl" })), download: `answers-${name}-${SHEET.sheet}.jsonl` });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  say(`Downloaded ${given.length} answers: ${link.download}`);
}
async function load(file) {
  const objects = [];
  try {
    for (const line of (await file.text()).replace(/^\ufeff/, "").split("\n")) if (line.trim()) objects.push(JSON.parse(line));
  } catch { return say(`${file.name} is not a file of answers.`); }
  const head = objects.shift();
  if (head?.format !== "prefopt-answers" || head.version !== 1) return say(`${file.name} is not a file of answers.`);
  if (head.sheet !== SHEET.sheet) return say(`${file.name} belongs to another sheet.`);
  if (labeler === null) $("name").value = head.labeler;
  if (labeler !== null && head.labeler !== labeler) return say(`${file.name} holds the answers of ${head.labeler}, and you are ${labeler}. Nothing was loaded.`);
  if (labeler === null) await begin(head.labeler);
  const good = objects.filter(isAnswer), taken = good.filter(take);
  for (const answer of taken) { keep.set(answerName(answer.task), JSON.stringify(answer)); copy(answer); }
  current = null;
  open(firstOpen());
  say(`Loaded ${taken.length} answers; ${good.length - taken.length} were here already${objects.length > good.length ? `; ${objects.length - good.length} do not fit and were left out` : ""}.`);
}

// ---- start --------------------------------------------------------------------------------------------------------------

const firstOpen = () => Math.max(TASKS.findIndex((task) => !isClosed(task)), 0);
async function begin(name) {
  labeler = name.trim().normalize("NFC");
  answers = new Map();
  current = null;
  keep.set("labeler", labeler);
  for (const task of TASKS) {
    const text = keep.get(answerName(task.id));
    if (text !== null) takeText(text);
  }
  for (const text of await readCopies()) takeText(text);
  const last = Number(keep.get(`${labeler}/at`) ?? NaN);
  document.title = `Ranking outputs: ${labeler}`;
  for (const id of ["download", "load-label"]) $(id).hidden = false;
  open(Number.isInteger(last) && last < TASKS.length && !isClosed(TASKS[last]) ? last : firstOpen());
}

$("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("name").value.trim()) begin($("name").value);
});
$("name").value = keep.get("labeler") ?? "";
if ($("name").value) $("begin").textContent = "Continue";
$("download").hidden = true;
for (const id of ["download", "end-download"]) $(id).addEventListener("click", download);
$("load").addEventListener("change", async (event) => { const [file] = event.target.files; event.target.value = ""; if (file) await load(file); });
$("finish").addEventListener("click", finish);
$("back").addEventListener("click", () => open(at - 1));
for (const id of ["next-open", "end-open"]) $(id).addEventListener("click", openNext);
$("end-back").addEventListener("click", () => open(at));
$("go-form").addEventListener("submit", (event) => { event.preventDefault(); if ($("go").value) open(Number($("go").value) - 1); });
$("notes").addEventListener("input", (event) => { current.notes = event.target.value; changed(); });

$("skip-reasons").append(...REASONS.map((reason) => h("label", { className: "check" }, h("input", { type: "radio", name: "reason", value: reason, required: true }), h("span", {}, reason))));
function askSkip() { $("skip-form").reset(); $("skip-dialog").showModal(); $("skip-reasons").querySelector("input").focus(); }
$("skip").addEventListener("click", askSkip);
$("skip-cancel").addEventListener("click", () => $("skip-dialog").close());
$("skip-form").addEventListener("submit", () => close("skipped", { reason: new FormData($("skip-form")).get("reason"), detail: $("skip-detail").value }));
$("read-again").append(...[...$("instructions").childNodes].map((node) => node.cloneNode(true)));
$("read").addEventListener("click", () => { $("read-dialog").showModal(); $("read-dialog").scrollTo(0, 0); });
$("keys").addEventListener("click", () => $("keys-dialog").showModal());
$("single-keys").checked = keep.get("single-keys") !== "off";
$("single-keys").addEventListener("change", (event) => keep.set("single-keys", event.target.checked ? "on" : "off"));

const THEMES = ["auto", "light", "dark"];
function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").textContent = `Theme: ${name}`;
}
let themed = THEMES.includes(keep.get("theme")) ? keep.get("theme") : "auto";
theme(themed);
$("theme").addEventListener("click", () => { themed = THEMES[(THEMES.indexOf(themed) + 1) % 3]; theme(themed); keep.set("theme", themed); });

window.addEventListener("storage", (event) => { // the same sheet in another tab
  if (labeler === null || !event.key?.startsWith(PREFIX + answerName("")) || event.newValue === null) return;
  if (takeText(event.newValue)) {
    showProgress();
    if (current && event.key === PREFIX + answerName(current.task)) { current = null; open(at); }
  }
});

document.addEventListener("keydown", (event) => {
  if (drag && event.key === "Escape") { event.preventDefault(); return cancel(); }
  if ($("work").hidden || document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); return finish(); }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const chip = event.target.closest?.(".chip");
  if (chip && (/^[1-9]$/.test(event.key) || event.key === "Delete" || event.key === "Backspace")) {
    const rank = Number(event.key) || null;
    if (rank === null || rank <= chips.length) { event.preventDefault(); place(Number(chip.dataset.output), rank); }
    return;
  }
  if (chip && (event.key === "ArrowLeft" || event.key === "ArrowRight")) { // a list would change its value
    event.preventDefault();
    return chips[Number(chip.dataset.output) + (event.key === "ArrowLeft" ? -1 : 1)]?.querySelector("select").focus();
  }
  if (["text", "number", "textarea"].includes(event.target.type) || !$("single-keys").checked) return;
  const here = event.target.closest?.(".output");
  const i = here ? Number(here.id.slice(7)) : -1;
  const show = (node) => { node.focus({ preventScroll: true }); node.scrollIntoView({ block: "nearest" }); };
  const key = event.key.toLowerCase();
  if (key === "j" || key === "k") {
    const next = key === "j" ? i + 1 : Math.max(i - 1, 0);
    if (next < chips.length) { $(`output-${next}`).focus({ preventScroll: true }); $(`output-${next}`).scrollIntoView({ block: "start" }); }
  } else if (here && /^[1-7]$/.test(key)) {
    const input = here.querySelector(`input[type="radio"][value="${key}"]`);
    input.click();
    input.focus({ preventScroll: true });
  } else if (here && key === "f") {
    here.querySelector("details").open = true;
    show(here.querySelector('input[type="checkbox"]'));
  } else if (key === "r") show((chips.find((_, j) => current.ranks[j] === null) ?? chips[0]).querySelector("select"));
  else if (key === "n") show($("notes"));
  else if (key === "s") askSkip();
  else return;
  event.preventDefault();
});
showProgress();
})();
