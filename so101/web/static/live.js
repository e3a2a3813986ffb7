// The page of a running script. One connection brings everything: parts of kind, index, length and content. What is
// held to drive is sent ten times a second; the program takes silence for letting go.
"use strict";

const STATE = 0, CAMERA = 1, VIEW = 2; // kinds of parts, as in live_page.py
const HEAD_BYTES = 6;
const AGAIN_MS = 1000; // before the next try to reach a program that is gone
const BEAT_MS = 100; // three of them are the program's heartbeat
const CURVES_MS = 3000;
const DEAD_ZONE = 0.15; // of a stick that nobody touches
const KEPT_TICKS = 600;
const HOT = 50; // deg C; the program warns at 55
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]; // Okabe and Ito, as in plots.py
const DRIVER = { p: "--unlabelled", l: "--excluded", b: "--blue", "-": "--paper" };
const ENDS = { S: "--success", F: "--failure", T: "--ink" };
const SAYS = { policy: "policy drives", leader: "leader arm drives", page: "page drives" };
const LABELS = {
  success: "success", failure: "failure", intervene: "take over / hand back", end: "end episode", redo: "drop, again",
  pause: "pause", quit: "quit",
};
const MOTION = { // by the key's place, so that it is the same on every keyboard: entry of the action, direction
  ArrowUp: [0, 1], ArrowDown: [0, -1], ArrowLeft: [1, 1], ArrowRight: [1, -1], KeyA: [2, 1], KeyZ: [2, -1],
  KeyO: [3, 1], KeyC: [3, -1],
};
const PAD_BUTTONS = { 0: "success", 1: "failure", 2: "intervene", 3: "redo", 8: "end", 9: "pause" };
const CURVE_GROUPS = [
  ["success of the last 20", ["success_last_20", "success_alone_last_20", "intervention_share", "evaluated_success"], 1],
  ["steps an episode", ["episode_steps"]],
  ["value", ["q", "q_max"]],
  ["entropy", ["entropy"]],
  ["critic loss", ["critic_loss"]],
  ["updates a second", ["updates_per_s"]],
];

const $ = (id) => document.getElementById(id);
const me = Math.random().toString(36).slice(2);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name) || name;
const held = new Set(); // places of the keys that are down
const padDown = new Set();
let about;
let wheel = false; // whether this page is to drive
let ticks = []; // two letters each: who drove, how the episode ended
let over = false;

function tell(words) {
  $("problem").textContent = words;
  $("problem").hidden = !words;
}

async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    signal: AbortSignal.timeout(2000),
  });
  if (!answer.ok) throw new Error((await answer.json()).error);
}

// ---- what comes

async function follow() {
  while (!over) {
    try {
      about = await (await fetch("api/about")).json();
      lay();
      await read((await fetch("api/live")).body.getReader());
    } catch (error) {
      if (!over) tell(`The program does not answer: it has ended, or the tunnel is down. (${error.message})`);
    }
    drive(false);
    if (!over) await new Promise((done) => setTimeout(done, AGAIN_MS));
  }
}

async function read(reader) {
  let have = new Uint8Array(0);
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const more = new Uint8Array(have.length + value.length);
    more.set(have);
    more.set(value, have.length);
    have = more;
    while (have.length >= HEAD_BYTES) {
      const size = new DataView(have.buffer, have.byteOffset).getUint32(2);
      if (have.length < HEAD_BYTES + size) break;
      const content = have.slice(HEAD_BYTES, HEAD_BYTES + size);
      take(have[0], have[1], content);
      have = have.subarray(HEAD_BYTES + size);
    }
  }
}

function take(kind, index, content) {
  if (kind === STATE) show(JSON.parse(new TextDecoder().decode(content)));
  else if (kind === CAMERA) paint($("cameras"), index, content, "image/jpeg");
  else if (kind === VIEW) paint($("views"), index, content, "image/png");
}

async function paint(parent, index, content, type) {
  const picture = await createImageBitmap(new Blob([content], { type }));
  while (parent.children.length <= index) parent.append(document.createElement("canvas"));
  const canvas = parent.children[index];
  if (canvas.width !== picture.width) canvas.width = picture.width;
  if (canvas.height !== picture.height) canvas.height = picture.height;
  canvas.getContext("2d").drawImage(picture, 0, 0);
  canvas.dataset.pictures = 1 + Number(canvas.dataset.pictures ?? 0);
}

// ---- what is shown

function lay() {
  tell("");
  document.title = `so101 ${about.script}`;
  $("script").textContent = about.script;
  $("judge").hidden = about.threshold === null;
  if (about.threshold !== null) $("threshold").style.left = `${100 * about.threshold}%`;
  const buttons = Object.entries(about.keys).map(([event, key]) => {
    const button = document.createElement("button");
    button.innerHTML = `<kbd>${key}</kbd> `;
    button.append(LABELS[event]);
    button.className = event;
    button.id = `press-${event}`;
    button.onclick = () => press(event);
    return button;
  });
  $("buttons").replaceChildren(...buttons);
  if (about.curves) curves();
}

function show(state) {
  if (state.over) {
    over = true;
    drive(false);
    $("driver").textContent = "ended";
    tell("The program has ended; what it printed last is in its terminal.");
    return;
  }
  tell("");
  ticks = [...ticks, ...state.ticks].slice(-KEPT_TICKS);
  if (state.ticks.length) drawRibbon();
  for (const [kind, words] of state.told) say(kind, words);
  showFacts(state.facts);
  const mine = state.driver === "page" && state.wheel === me;
  const driver = $("driver");
  driver.className = state.driver;
  driver.textContent = mine ? "you drive" : SAYS[state.driver];
  if (state.driver === "page" && !state.wheel) {
    driver.className = "still";
    driver.textContent = "nobody drives: the arm holds";
  }
  if (state.paused) driver.textContent += ", then pause";
  if (state.probability !== undefined && state.probability !== null) {
    $("probability").textContent = state.probability.toFixed(3);
    $("reward-bar").style.width = `${100 * state.probability}%`;
    $("reward-bar").className = state.probability > about.threshold ? "above" : "";
  }
  if (state.action) drawAction(state.action);
  showArm(state);
  showLoop(state);
}

function showFacts(facts) {
  if (facts.label === undefined) return;
  $("count").textContent = `${facts.done} / ${facts.total} ${facts.unit}`;
  $("done").style.width = `${Math.min(100, 100 * facts.done / Math.max(1, facts.total))}%`;
  const parts = Object.entries(facts.info).map(([name, value]) => {
    const span = document.createElement("span");
    span.append(`${name} `, Object.assign(document.createElement("b"), {
      textContent: typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(3) : value,
    }));
    return span;
  });
  $("facts").replaceChildren(...parts);
}

function say(kind, words) {
  const line = document.createElement("li");
  line.className = kind;
  line.textContent = words;
  $("told").prepend(line);
  while ($("told").children.length > 60) $("told").lastChild.remove();
  $("last-line").textContent = words;
}

function rows(table, lines) {
  table.replaceChildren(...lines.map(([tag, cells, kind]) => {
    const row = document.createElement("tr");
    if (kind) row.className = kind;
    row.append(...cells.map((cell) => Object.assign(document.createElement(tag), { textContent: cell })));
    return row;
  }));
}

function showArm(state) {
  if (!state.temperature) return;
  const hottest = state.temperature.indexOf(Math.max(...state.temperature));
  const lines = about.joints.map((name, i) => ["td", [
    name, `${state.temperature[i].toFixed(0)} °C`, `${(100 * state.load[i]).toFixed(0)} %`,
    `${state.voltage[i].toFixed(1)} V`,
  ], i === hottest && state.temperature[i] > HOT ? "hot" : ""]);
  const tool = state.tool.map((metres) => (100 * metres).toFixed(1)).join(" ");
  rows($("arm"), [
    ["th", ["", "heat", "load", "supply"]], ...lines,
    ["td", [`hottest: ${about.joints[hottest]}`, "", "", ""]], ["td", [`tool ${tool} cm`, "", "", ""]],
    ["td", [`gripper ${(100 * state.opening).toFixed(0)} % open`, "", "", ""]],
  ]);
}

function showLoop(state) {
  if (!state.period) return;
  const ms = (seconds) => `${(1000 * seconds).toFixed(1)} ms`;
  const lines = [["td", ["tick", ms(state.period)]], ["td", ["of it busy", ms(state.busy)]]];
  if (state.periods) lines.push(["td", ["mean of the last 100", ms(state.periods[0])]], ["td", ["99 %", ms(state.periods[1])]]);
  lines.push(["td", ["late so far", state.overruns]]);
  if (state.lag !== undefined) lines.push(["td", ["tool behind its target", `${(1000 * state.lag).toFixed(1)} mm`]]);
  rows($("loop"), lines);
}

function fit(canvas) { // to its size on the page
  const scale = window.devicePixelRatio;
  const { width, height } = canvas.getBoundingClientRect();
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  return [pen, width, height];
}

function drawRibbon() {
  const [pen, width, height] = fit($("ribbon"));
  const each = width / KEPT_TICKS;
  ticks.forEach(([driver, end], i) => {
    const x = width - (ticks.length - i) * each;
    pen.fillStyle = colour(DRIVER[driver]);
    pen.fillRect(x, 3, each + 0.5, height - 6);
    if (end) {
      pen.fillStyle = colour(ENDS[end]);
      pen.fillRect(x, 0, Math.max(2, each), height);
    }
  });
}

function drawAction([x, y, z, gripper]) {
  const [pen, width, height] = fit($("action"));
  const middle = height / 2, reach = middle - 14;
  pen.font = "11px system-ui";
  pen.fillStyle = pen.strokeStyle = colour("--faint");
  pen.strokeRect(middle - reach, middle - reach, 2 * reach, 2 * reach);
  pen.fillText("away", middle - 12, 11);
  arrow(pen, middle, middle, -reach * y, -reach * x); // the base frame from above: x away, y to the left
  const bar = (at, value, up, down) => {
    pen.fillStyle = colour("--faint");
    pen.fillText(up, at - 10, 11);
    pen.fillText(down, at - 14, height - 3);
    pen.strokeStyle = colour("--faint");
    pen.strokeRect(at - 8, middle - reach + 4, 16, 2 * reach - 8);
    pen.fillStyle = colour("--blue");
    const length = (reach - 4) * value;
    pen.fillRect(at - 7, Math.min(middle, middle - length), 14, Math.abs(length));
  };
  bar(width * 0.62, z, "up", "down");
  bar(width * 0.86, gripper, "open", "close");
}

function arrow(pen, x, y, dx, dy) {
  pen.strokeStyle = pen.fillStyle = colour("--blue");
  pen.lineWidth = 3;
  pen.beginPath();
  pen.moveTo(x, y);
  pen.lineTo(x + dx, y + dy);
  pen.stroke();
  pen.beginPath();
  pen.arc(x + dx, y + dy, 4.5, 0, 7);
  pen.fill();
  pen.lineWidth = 1;
}

async function curves() {
  while (!over) {
    try {
      drawCurves(await (await fetch("api/curves")).json());
    } catch (error) {
      return; // follow() tells it, and begins anew
    }
    await new Promise((done) => setTimeout(done, CURVES_MS));
  }
}

function drawCurves(points) {
  for (const [title, names, top] of CURVE_GROUPS) {
    const there = names.filter((name) => points[name]?.length > 1);
    if (!there.length) continue;
    const id = `curve-${names[0]}`;
    if (!$(id)) {
      const block = Object.assign(document.createElement("div"), { className: "curve", id });
      block.innerHTML = '<div class="legend"></div><canvas></canvas>';
      $("curves").append(block);
    }
    const all = there.flatMap((name) => points[name]);
    const values = all.map(([, value]) => value);
    const low = top ? 0 : Math.min(...values), high = top ?? Math.max(...values);
    const last = Math.max(...all.map(([step]) => step)), first = Math.min(...all.map(([step]) => step));
    const [pen, width, height] = fit($(id).querySelector("canvas"));
    there.forEach((name, i) => {
      pen.strokeStyle = COLOURS[i];
      pen.lineWidth = 1.5;
      pen.beginPath();
      for (const [step, value] of points[name]) {
        const x = 4 + (width - 8) * (step - first) / Math.max(1, last - first);
        pen.lineTo(x, height - 5 - (height - 10) * (value - low) / (high - low || 1));
      }
      pen.stroke();
    });
    const legend = there.map((name, i) => {
      const entry = document.createElement("span");
      entry.append(Object.assign(document.createElement("i"), { style: `background: ${COLOURS[i]}` }),
        `${name} `, Object.assign(document.createElement("b"), { textContent: points[name].at(-1)[1].toPrecision(3) }));
      return entry;
    });
    const head = Object.assign(document.createElement("b"), { textContent: title });
    $(id).querySelector(".legend").replaceChildren(head, ...legend);
  }
}

// ---- what the person does

async function press(event) {
  const button = $(`press-${event}`);
  button?.classList.add("pressed");
  setTimeout(() => button?.classList.remove("pressed"), 300);
  try {
    await post("api/press", { event });
  } catch (error) {
    tell(`${LABELS[event]} was not taken: ${error.message}`);
  }
}

function drive(on) {
  if (wheel === on) return;
  wheel = on;
  held.clear();
  $("wheel").setAttribute("aria-pressed", on);
  $("held").textContent = "";
  if (on) beat();
  else post("api/hand", { who: me, hand: null }).catch(() => {}); // where it does not come through, silence says it
}

function hand() {
  const action = [0, 0, 0, 0];
  for (const place of held) action[MOTION[place][0]] += MOTION[place][1];
  const stick = (value) => (Math.abs(value) > DEAD_ZONE ? value : 0);
  for (const pad of navigator.getGamepads()) {
    if (!pad) continue;
    const [across, along, , up] = pad.axes; // the standard layout: down and right are positive
    const add = [-stick(along), -stick(across), -stick(up ?? 0), (pad.buttons[6]?.value ?? 0) - (pad.buttons[7]?.value ?? 0)];
    add.forEach((value, i) => { action[i] += value; });
  }
  const speed = $("speed").value / 100;
  return action.map((value, i) => Math.max(-1, Math.min(1, value)) * (i < 3 ? speed : 1));
}

async function beat() {
  let failed = 0;
  while (wheel) {
    const now = hand();
    $("held").textContent = now.some(Boolean) ? now.map((value) => value.toFixed(1)).join("  ") : "";
    post("api/hand", { who: me, hand: now }).then(() => { failed = 0; }, (error) => {
      failed += 1;
      if (failed > 2 || /another/.test(error.message)) {
        drive(false);
        tell(`You do not drive: ${error.message}`);
      }
    });
    await new Promise((done) => setTimeout(done, BEAT_MS));
  }
}

function padEvents() { // buttons that press a key do so once
  for (const pad of navigator.getGamepads()) {
    if (!pad) continue;
    for (const [number, event] of Object.entries(PAD_BUTTONS)) {
      const name = `${pad.index} ${number}`;
      if (!pad.buttons[number]?.pressed) padDown.delete(name);
      else if (!padDown.has(name)) {
        padDown.add(name);
        press(event);
      }
    }
  }
}

document.addEventListener("keydown", (down) => {
  if (down.ctrlKey || down.metaKey || down.altKey || !about) return;
  if (wheel && MOTION[down.code]) {
    held.add(down.code);
    down.preventDefault();
    return;
  }
  if (down.repeat) return;
  if (down.key === "d") {
    drive(!wheel);
    return;
  }
  const event = Object.keys(about.keys).find((name) => about.keys[name] === down.key);
  if (event) press(event);
});
document.addEventListener("keyup", (up) => held.delete(up.code));
window.addEventListener("blur", () => held.clear());
document.addEventListener("visibilitychange", () => held.clear());
window.addEventListener("pagehide", () => drive(false));
$("wheel").onclick = () => { drive(!wheel); $("wheel").blur(); };
$("speed").oninput = () => { $("speed-said").textContent = `${$("speed").value} %`; };
$("speed").oninput();
setInterval(padEvents, 50);
follow();
