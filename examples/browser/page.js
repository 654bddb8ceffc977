// The page: files in, one after the other, a table out.

import { digits } from "./numbers.js";

const part = (id) => document.getElementById(id);
const folder = new URL("model", document.baseURI).href;
const rows = []; // of answered pictures: {file, line, answer}
let worker, ranks, likely, decimals, waiting = [], done = 0, busy = false, turn = 0;

start();

/**
 * A worker made of a blob is held by this page's policy; one made of an address would be by none. What it imports while
 * it runs is a script to the policy, not one more worker.
 */
function start() {
  const script = `
    const model = import(${JSON.stringify(new URL("worker.js", document.baseURI).href)});
    onmessage = async ({ data }) => {
      try {
        postMessage(await (await model).handle(data));
      } catch (error) {
        postMessage({ failed: error.message || String(error) });
      }
    };`;
  const url = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  worker = new Worker(url, { type: "module" });
  ask({ kind: "load", folder }).then(ready).catch((error) => fail(error.message));
}

/** What the worker answers to a message; one at a time. */
function ask(message) {
  return new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => ("failed" in data ? reject(new Error(data.failed)) : resolve(data));
    worker.onerror = (event) => reject(new Error(event.message || "the worker cannot be started"));
    worker.postMessage(message);
  });
}

function fail(reason) {
  part("state").textContent = `The model cannot be used: ${reason}`;
  part("state").className = "problem";
}

function ready(loaded) {
  ({ ranks, likely } = loaded);
  const range = ranks.values.at(-1) - ranks.values[0];
  decimals = Math.min(12, Math.max(0, -Math.floor(Math.log10(range / 200))));
  const [first, last] = [ranks.names[0], ranks.names.at(-1)];
  const count = ranks.names.length;
  part("state").textContent = `The model is ready. It answers with one of ${count} ranks, ${first} to ${last}.`;
  if (ranks.levels) {
    const { lowest, usual, highest } = ranks.levels;
    Object.assign(part("level"), { min: lowest, max: highest, value: usual });
    part("allowed").textContent = `${lowest.toFixed(2)} to ${highest.toFixed(2)}`;
    part("asked").hidden = false;
  }
  const more = [...(likely ? ["Probability"] : []), ...(ranks.levels ? ["Interval"] : []), "Among all ranks"];
  for (const textContent of ["Picture", "File", "Value", "Rank", ...more]) {
    part("answers").tHead.rows[0].append(element("th", { textContent, scope: "col", role: "columnheader" }));
  }
  part("controls").hidden = false;
  part("files").onchange = () => {
    add(part("files").files);
    part("files").value = ""; // so that the same may be chosen again
  };
  part("level").onchange = () => part("level").reportValidity() && again();
  part("save").onclick = save;
  part("clear").onclick = clear;
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault(); // or the browser would open the picture instead of the page
      part("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") add(event.dataTransfer.files);
    });
  }
}

function add(files) {
  for (const file of files) waiting.push({ file });
  work();
}

/** All pictures once more, at another level; their rows stay where they are. */
function again() {
  for (const row of rows) fill(row, null);
  waiting = [...rows.filter((row) => !waiting.includes(row)), ...waiting];
  done = 0;
  turn += 1;
  work();
}

function clear() {
  waiting = [];
  turn += 1;
  done = 0;
  rows.length = 0;
  part("problems").replaceChildren();
  part("answers").tBodies[0].replaceChildren();
  show();
}

/** Answer what waits. What was asked before the level changed, or all was cleared, is not shown. */
async function work() {
  if (busy) return show();
  busy = true;
  done = 0;
  while (waiting.length) {
    show();
    const row = waiting[0];
    const asked = turn;
    let answer, problem;
    try {
      answer = await ask({ kind: "answer", file: row.file, level: Number(part("level").value) });
    } catch (error) {
      problem = error.message;
    }
    if (asked !== turn) continue;
    waiting.shift();
    done += 1;
    if (answer) fill(row, answer);
    else report(row, problem);
  }
  busy = false;
  show();
}

function show() {
  const all = done + waiting.length;
  part("working").hidden = !waiting.length;
  Object.assign(part("progress"), { max: Math.max(1, all), value: done });
  part("count").textContent = `${done} of ${all}`;
  part("answers").hidden = !rows.length;
  part("save").disabled = !rows.length || waiting.length > 0;
  part("clear").disabled = !rows.length && !waiting.length && !part("problems").childElementCount;
  const problems = part("problems").childElementCount;
  const counts = [`${rows.length} ${rows.length === 1 ? "picture" : "pictures"} answered`];
  if (problems) counts.push(`${problems} not`);
  let state = rows.length || problems ? `${counts.join(", ")}.` : "The model is ready.";
  if (waiting.length) state = "Reading pictures.";
  if (part("state").textContent !== state) part("state").textContent = state; // or it were read out again
}

/** A file without an answer: one line, with its name. */
function report(row, problem) {
  row.line?.remove();
  if (rows.includes(row)) rows.splice(rows.indexOf(row), 1);
  part("problems").append(element("li", { textContent: `${JSON.stringify(row.file.name)}: ${problem}` }));
}

/** The row of a picture; without an answer it waits for another one. */
function fill(row, answer) {
  if (!row.line) {
    row.line = part("answers").tBodies[0].insertRow();
    row.line.setAttribute("role", "row");
    rows.push(row);
  }
  row.answer = answer;
  if (!answer) {
    for (const cell of row.line.querySelectorAll(".number")) cell.textContent = "…";
    return;
  }
  const shown = (number) => number.toFixed(decimals);
  const unit = ranks.unit ? ` ${ranks.unit}` : "";
  const cell = (name, text, kind = "number") => {
    const made = element("td", { textContent: text, className: kind, role: "cell" });
    made.dataset.name = name;
    return made;
  };
  const picture = element("td", { className: "picture", role: "cell" });
  const { width, height } = answer.thumbnail;
  const canvas = element("canvas", { width, height, ariaHidden: "true" }); // beside its name
  canvas.getContext("2d").drawImage(answer.thumbnail, 0, 0);
  answer.thumbnail.close();
  picture.append(canvas);
  const among = cell("", "", "among");
  among.append(scale(answer));
  row.line.replaceChildren(
    picture,
    element("th", { textContent: row.file.name, scope: "row", role: "rowheader" }),
    cell("Value", shown(answer.value) + unit, "number value"),
    cell("Rank", answer.name),
    ...(likely ? [cell("Probability", answer.probability.toFixed(3))] : []),
    ...(answer.ends ? [cell("Interval", `${answer.ends.map(shown).join(" to ")}${unit}`)] : []),
    among,
  );
}

/** Where an answer and its interval lie between the lowest and the highest rank; numbers beside it say the same. */
function scale({ value, ends }) {
  const [low, high] = [ranks.values[0], ranks.values.at(-1)];
  const share = (number) => `${(100 * Math.min(1, Math.max(0, (number - low) / (high - low)))).toFixed(2)}%`;
  const drawn = element("span", { className: "scale", ariaHidden: "true" });
  if (ends) {
    const band = element("span", {});
    band.style.left = share(ends[0]);
    band.style.right = `calc(100% - ${share(ends[1])})`;
    drawn.append(band);
  }
  const dot = element("span", { className: "dot" });
  dot.style.left = share(value);
  drawn.append(dot);
  return drawn;
}

/** The table as predict.py prints it. */
function table() {
  const lines = rows.map(({ file, answer }) => {
    const share = likely ? digits(answer.probability, 6) : "";
    const ends = (answer.ends ?? []).map((end) => digits(end, 7));
    return [file.name, digits(answer.value, 7), ranks.unit, answer.name, share, ...ends];
  });
  const head = ["file", "value", "unit", "name", "probability", ...(ranks.levels ? ["low", "high"] : [])];
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  return [head, ...lines].map((line) => `${line.map(quoted).join(",")}\n`).join("");
}

function save() {
  const url = URL.createObjectURL(new Blob([table()], { type: "text/csv" }));
  element("a", { href: url, download: "answers.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

function element(tag, properties) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  return made;
}
