// The page of a running script. One connection brings everything: parts of kind, index, length and content. What is
// held to drive is sent ten times a second; the program takes silence for letting go.
"use strict";

const STATE = 0, CAMERA = 1, VIEW = 2; // kinds of parts, as in live_page.py
const HEAD_BYTES = 6;
const AGAIN_MS = 1000; // before the next try to reach a program that is gone
const BEAT_MS = 100; // three of them are the program's heartbeat
const SEEN_MS = 100; // between two words of how many pictures came
const UNDERWAY = 6; // beats at most, 0.6 s of line: with 4, a round trip of 0.3 s left gaps; without an end, old ones would come all at once
const COMPLAINT_MS = 8000; // for so long it stands
const CURVES_MS = 3000;
const RESETS_S = 0.6; // without a tick so long it is between two episodes
const DEAD_ZONE = 0.15; // of a stick that nobody touches
const KEPT_TICKS = 600;
const HOT = 50; // deg C; the program warns at 55
const DRIVER = { p: "--unlabelled", l: "--excluded", b: "--blue", "-": "--paper" };
const ENDS = { S: "--success", F: "--failure", T: "--ink" };
const LABELS = {
  success: "success", failure: "failure", intervene: "take over", end: "end episode", redo: "drop, again",
  pause: "pause", quit: "quit",
};
const FACTS = { // what the console's short words mean
  alone: "of the last 20 episodes, those that succeeded without help", replay: "transitions: online + demonstrations",
  updates: "gradient steps so far", late: "ticks that came late", lag_mm: "how far the tool is behind its target",
};
const MOTION = { // by key: entry of the action, direction
  arrowup: [0, 1], arrowdown: [0, -1], arrowleft: [1, 1], arrowright: [1, -1], a: [2, 1], z: [2, -1], o: [3, 1], c: [3, -1],
};
const PAD_BUTTONS = { 0: "success", 1: "failure", 2: "intervene", 3: "redo", 8: "end", 9: "pause" };
const PAD_HELP = "gamepad: left stick, right stick for up and down, triggers open and close; A success, B failure, " +
  "X take over, Y drop, view end, menu pause.";
const CURVE_GROUPS = [
  ["success of the last 20", ["success_last_20", "success_alone_last_20", "intervention_share", "evaluated_success"], 1],
  ["steps an episode", ["episode_steps"]],
  ["value", ["q", "q_max"]],
  ["entropy", ["entropy"]],
  ["critic loss", ["critic_loss"]],
  ["updates a second", ["updates_per_s"]],
];

const me = Math.random().toString(36).slice(2);
const fixed = (value, digits) => (typeof value === "number" ? value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1") : "?");
const held = new Map(); // what the keys that are down mean, by their place
const padDown = new Set();
const newest = {}; // picture of each place that waits to be drawn
let about, state = {};
let wheel = false; // whether this page is to drive
let beats = 0, underway = 0, late; // s, by which the line is too slow to drive through
let pictures = 0, told = 0, telling = false;
let ticks = []; // two letters each: who drove, how the episode ended
let over = false;
let forgetting, saidAt = 0;

function tell(words) {
  clearTimeout(forgetting);
  $("problem").textContent = words;
  $("problem").hidden = !words;
}

function complain(words) {
  tell(words);
  forgetting = setTimeout(() => tell(""), COMPLAINT_MS);
}

async function ask(path, options) {
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  const refused = new Error((await answer.json()).error);
  refused.status = answer.status;
  throw refused;
}

function post(path, body, keepalive = false) {
  const headers = { "Content-Type": "application/json" };
  const signed = JSON.stringify({ ...body, seen: state.now }); // what it answers: the program refuses what comes late
  return ask(path, { method: "POST", headers, body: signed, keepalive, signal: AbortSignal.timeout(2000) });
}

// ---- what comes

async function follow() {
  while (!over) {
    try {
      about = await (await ask("api/about")).json();
      lay();
      await read((await ask(`api/live?who=${me}`)).body.getReader());
    } catch (error) {
      if (error.status === 403) end("The program was started anew, with another address: open the one that it prints.");
      else if (!over) tell(`The program does not answer: it was ended, or the tunnel is down. (${error.message})`);
    }
    letGo();
    document.body.classList.add("gone");
    if (!over) await new Promise((done) => setTimeout(done, AGAIN_MS));
  }
}

function end(words) {
  over = true;
  letGo();
  document.body.classList.add("gone");
  $("driver").className = "";
  $("driver").textContent = "ended";
  tell(words);
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
      take(have[0], have[1], have.slice(HEAD_BYTES, HEAD_BYTES + size));
      have = have.subarray(HEAD_BYTES + size);
    }
  }
}

function take(kind, index, content) {
  if (kind === STATE) {
    show(JSON.parse(new TextDecoder().decode(content)));
    return;
  }
  pictures += 1;
  const place = kind === CAMERA ? "cameras" : "views";
  const name = `${place} ${index}`;
  const drawing = name in newest;
  newest[name] = new Blob([content], { type: kind === CAMERA ? "image/jpeg" : "image/png" });
  if (!drawing) paint(place, index, name);
}

async function paint(place, index, name) { // one after the other, and only the newest
  while (newest[name]) {
    const content = newest[name];
    newest[name] = null;
    const picture = await createImageBitmap(content);
    const canvas = frame(place, index).querySelector("canvas");
    if (canvas.width !== picture.width) canvas.width = picture.width;
    if (canvas.height !== picture.height) canvas.height = picture.height;
    canvas.getContext("2d").drawImage(picture, 0, 0);
    canvas.dataset.pictures = 1 + Number(canvas.dataset.pictures ?? 0);
  }
  delete newest[name];
}

function frame(place, index) {
  const parent = $(place);
  while (parent.children.length <= index) {
    const figure = document.createElement("figure");
    figure.innerHTML = '<canvas width="256" height="256"></canvas><div class="trouble" hidden></div><figcaption></figcaption>';
    parent.append(figure);
  }
  return parent.children[index];
}

async function sayWhatCame() {
  if (telling || pictures === told || over) return;
  telling = true;
  const count = pictures;
  await post("api/seen", { who: me, count }).then(() => { told = count; }, () => {});
  telling = false;
}

// ---- what is shown

function lay() {
  tell("");
  document.body.classList.remove("gone");
  document.title = `so101 ${about.script}`;
  $("script").textContent = about.script;
  [ticks, pictures, told] = [[], 0, 0];
  $("told").replaceChildren();
  const buttons = Object.entries(about.keys).map(([event, key]) => {
    const button = document.createElement("button");
    button.innerHTML = `<kbd>${key}</kbd> <span></span>`;
    button.lastChild.textContent = LABELS[event];
    button.className = event;
    button.id = `press-${event}`;
    button.onclick = () => { press(event); button.blur(); }; // or the space bar would press it again
    return button;
  });
  $("buttons").replaceChildren(...buttons);
}

function show(now) {
  if (now.over) {
    end(`${about.script} has ended here; its terminal has what it printed last.`);
    return;
  }
  state = now;
  ticks = [...ticks, ...state.ticks].slice(-KEPT_TICKS);
  if (state.ticks.length) drawRibbon();
  for (const [kind, words] of state.told) say(kind, words);
  if (state.ticks.length && performance.now() - saidAt > COMPLAINT_MS) $("last-line").textContent = ""; // it goes on
  Object.entries(state.cameras).forEach(([name, complaint], i, all) => {
    const [, trouble, caption] = frame("cameras", i).children;
    caption.textContent = all.length > 1 ? name : "";
    trouble.textContent = complaint;
    trouble.hidden = !complaint;
  });
  showDriver();
  showFacts(state.facts);
  showOutcomes(state.outcomes);
  $("judge").hidden = typeof state.threshold !== "number";
  if (!$("judge").hidden) showReward(state.probability, state.threshold, state.vetoed);
  if (state.action) {
    drawAction(state.action);
    const pushes = state.edge.map((side, i) => (side * state.action[i] > 0 ? side : 0));
    $("edge").textContent = pushes.some(Boolean) ? `the workspace ends here: ${said([...pushes, 0])}` : "";
  }
  if (state.tool) showArm();
  if (state.period) showLoop();
}

function showDriver() {
  const mine = state.wheel === me, pill = $("driver"), between = state.age > RESETS_S;
  const alone = ["record", "teleoperate"].includes(about.script); // there is no policy, and nobody to hand back to
  let words = { policy: alone ? "between episodes" : "policy drives", leader: "leader arm drives", page: mine ? "you drive" : "another page drives" }[state.driver];
  let kind = state.driver === "page" && mine ? "mine" : state.driver;
  if (state.driver === undefined) words = kind = "";
  else if (state.driver === "page" && !state.wheel) [words, kind] = ["nobody drives: the arm holds", "still"];
  const meanwhile = about.script === "train_sac" ? "between episodes: it resets and learns" : "between episodes";
  if (between && state.driver) [words, kind] = state.paused ? ["paused: press p to go on", "still"] : [meanwhile, ""];
  else if (state.driver) words += `, ${Math.ceil(state.left)} s left${state.paused ? ", then pause" : ""}`;
  pill.textContent = words;
  pill.className = kind;
  const intervene = $("press-intervene"), driving = state.driver && state.driver !== "policy";
  intervene.lastChild.textContent = driving ? "hand back" : "take over";
  intervene.disabled = alone || state.driver === undefined;
  intervene.title = alone ? "in a recording there is nobody to hand back to" : "";
  $("press-pause").lastChild.textContent = state.paused ? "go on" : "pause";
  const now = wheel ? hand() : null;
  $("held").textContent = !wheel ? "" : late ? `the line is ${fixed(late, 1)} s behind: the arm holds` : now.some(Boolean) ? said(now)
    : state.driver === "policy" && !between && !state.recording ? "hold a key to step in"
      : `nothing held${state.driver === "page" && !alone ? ": i hands back" : ""}`;
}

function said([x, y, z, gripper]) {
  const parts = [[x, "away", "near"], [y, "left", "right"], [z, "up", "down"], [gripper, "open", "close"]];
  return parts.filter(([value]) => value).map(([value, more, less]) => (value > 0 ? more : less)).join(", ");
}

function showFacts(facts) {
  if (facts.label === undefined) return;
  $("count").textContent = `${facts.label} ${facts.done} / ${facts.total} ${facts.unit}s`;
  $("done").style.width = `${Math.min(100, 100 * facts.done / Math.max(1, facts.total))}%`;
  const parts = Object.entries(facts.info).map(([name, value]) => {
    const span = document.createElement("span");
    span.title = FACTS[name] ?? "";
    span.append(`${name.replaceAll("_", " ")} `, Object.assign(document.createElement("b"), {
      textContent: typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(3) : value,
    }));
    return span;
  });
  $("facts").replaceChildren(...parts);
}

function showOutcomes(outcomes) {
  const squares = outcomes.map((outcome) => Object.assign(document.createElement("i"), { className: outcome }));
  const words = outcomes.length ? ` ${outcomes.filter((outcome) => outcome === "success").length} of the last ${outcomes.length} succeeded` : "";
  $("outcomes").replaceChildren(...squares, words);
}

function showReward(probability, threshold, vetoed) {
  $("threshold").style.left = `${100 * threshold}%`;
  $("probability").textContent = `${fixed(probability, 3)} (success above ${fixed(threshold, 3)})${vetoed ? ": the state guard says no" : ""}`;
  $("reward-bar").style.width = `${100 * (probability ?? 0)}%`;
  $("reward-bar").className = probability > threshold && !vetoed ? "above" : "";
}

function say(kind, words) {
  const line = document.createElement("li");
  line.className = kind;
  line.textContent = words;
  $("told").prepend(line);
  while ($("told").children.length > 60) $("told").lastChild.remove();
  $("last-line").textContent = words;
  saidAt = performance.now();
}

function rows(table, lines) {
  table.replaceChildren(...lines.map(([tag, cells, kind]) => {
    const row = document.createElement("tr");
    if (kind) row.className = kind;
    row.append(...cells.map((cell) => Object.assign(document.createElement(tag), { textContent: cell })));
    return row;
  }));
}

function showArm() {
  const heat = state.temperature ?? [], hottest = heat.indexOf(Math.max(...heat));
  const lines = about.joints.map((name, i) => ["td", [
    name, `${fixed(heat[i], 0)} °C`, `${fixed(100 * state.load?.[i], 0)} %`, `${fixed(state.voltage?.[i], 1)} V`,
  ], heat[i] > HOT ? "hot" : ""]);
  $("hottest").textContent = heat.length ? `hottest ${about.joints[hottest]}, ${fixed(heat[hottest], 0)} °C` : "";
  $("hottest").className = heat[hottest] > HOT ? "hot" : "";
  rows($("arm"), [["th", ["", "heat", "load", "supply"]], ...lines]);
}

function showLoop() {
  const ms = (seconds) => (typeof seconds === "number" ? `${(1000 * seconds).toFixed(1)} ms` : "?");
  const lines = [["td", ["a tick should take", ms(state.period)]], ["td", ["of the last it worked", ms(Math.max(0, state.busy))]]];
  if (state.periods) {
    lines.push(["td", ["mean of the last 100", ms(state.periods[0])]], ["td", ["99 % of them below", ms(state.periods[1])]]);
  }
  lines.push(["td", ["late so far", state.overruns]]);
  if (state.behind !== null) lines.push(["td", ["this page is behind", ms(state.behind)]]);
  if (state.lag !== undefined) lines.push(["td", ["tool behind its target", `${fixed(1000 * state.lag, 1)} mm`]]);
  lines.push(["td", ["tool x y z", `${state.tool.map((metres) => fixed(100 * metres, 1)).join("  ")} cm`]]);
  lines.push(["td", ["gripper open", `${fixed(100 * state.opening, 0)} %`]]);
  rows($("loop"), lines);
}

function drawRibbon() {
  const [pen, width, height] = fit($("ribbon"));
  const each = width / KEPT_TICKS;
  ticks.forEach(([driver, end], i) => {
    const x = width - (ticks.length - i) * each;
    pen.fillStyle = colour(DRIVER[driver]);
    pen.fillRect(Math.floor(x), 3, Math.ceil(each), height - 6);
  });
  ticks.forEach(([, end], i) => {
    if (!end) return;
    pen.fillStyle = colour(ENDS[end]);
    pen.fillRect(Math.floor(width - (ticks.length - i) * each), 0, Math.max(3, each), height);
  });
}

function drawAction([x, y, z, gripper]) {
  const [pen, width, height] = fit($("action"));
  const middle = height / 2, reach = middle - 16;
  pen.font = "11px system-ui";
  pen.textAlign = "center";
  const label = (words, x, y) => { pen.fillStyle = colour("--faint"); pen.fillText(words, x, y); };
  pen.strokeStyle = colour("--line");
  pen.strokeRect(middle - reach + 14, middle - reach, 2 * reach, 2 * reach);
  label("away", middle + 14, 11);
  label("near", middle + 14, height - 4);
  label("left", 13, middle + 4);
  label("right", 2 * middle + 16, middle + 4);
  arrow(pen, middle + 14, middle, -reach * y, -reach * x); // the base frame from above: x away, y to the left
  const bar = (at, value, up, down) => {
    label(up, at, 11);
    label(down, at, height - 4);
    pen.strokeStyle = colour("--line");
    pen.strokeRect(at - 8, middle - reach, 16, 2 * reach);
    pen.fillStyle = colour("--blue");
    pen.fillRect(at - 7, Math.min(middle, middle - reach * value), 14, Math.abs(reach * value));
    pen.fillRect(at - 8, middle - 0.5, 16, 1);
  };
  bar(width * 0.68, z, "up", "down");
  bar(width * 0.88, gripper, "open", "close");
}

function arrow(pen, x, y, dx, dy) {
  const length = Math.hypot(dx, dy);
  pen.fillStyle = pen.strokeStyle = colour("--blue");
  if (length < 2) {
    pen.beginPath();
    pen.arc(x, y, 2, 0, 7);
    pen.fill();
    return;
  }
  pen.save();
  pen.translate(x + dx, y + dy);
  pen.rotate(Math.atan2(dy, dx));
  const head = Math.min(9, length);
  pen.lineWidth = 3;
  pen.beginPath();
  pen.moveTo(-length, 0);
  pen.lineTo(-head, 0);
  pen.stroke();
  pen.beginPath();
  pen.moveTo(0, 0);
  pen.lineTo(-head, -5);
  pen.lineTo(-head, 5);
  pen.fill();
  pen.restore();
}

async function askCurves() {
  for (; !over; await new Promise((done) => setTimeout(done, CURVES_MS))) {
    if (about?.curves && !document.hidden) await ask("api/curves").then((answer) => answer.json()).then(drawCurves, () => {});
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
    const values = all.map(([, value]) => value), steps = all.map(([step]) => step);
    const low = top ? 0 : Math.min(...values), high = top ?? Math.max(...values);
    const first = Math.min(...steps), last = Math.max(...steps);
    const [pen, width, height] = fit($(id).querySelector("canvas"));
    there.forEach((name, i) => {
      pen.strokeStyle = pen.fillStyle = COLOURS[i];
      pen.lineWidth = 1.5;
      pen.beginPath();
      for (const [step, value] of points[name]) {
        const x = 44 + (width - 52) * (step - first) / Math.max(1, last - first);
        pen.lineTo(x, height - 18 - (height - 26) * (value - low) / (high - low || 1));
      }
      pen.stroke();
    });
    pen.fillStyle = colour("--faint");
    pen.font = "10px system-ui";
    pen.fillText(`step ${first}`, 44, height - 5);
    pen.textAlign = "right";
    pen.fillText(last, width - 8, height - 5);
    pen.fillText(Number(high.toPrecision(3)), 40, 13);
    pen.fillText(Number(low.toPrecision(3)), 40, height - 16);
    const legend = there.map((name, i) => {
      const entry = document.createElement("span");
      entry.append(Object.assign(document.createElement("i"), { style: `background: ${COLOURS[i]}` }),
        `${name.replaceAll("_", " ")} `,
        Object.assign(document.createElement("b"), { textContent: Number(points[name].at(-1)[1].toPrecision(3)) }));
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
  if (event === "intervene" && state.driver === "policy" && !state.leader) await drive(true); // with what else?
  try {
    await post("api/press", { event });
  } catch (error) {
    complain(`${LABELS[event]} was not taken: ${error.message}`);
  }
}

async function drive(on) {
  if (wheel === on || over) return;
  letGo();
  wheel = on;
  $("wheel").setAttribute("aria-pressed", on);
  $("wheel-label").textContent = on ? "let go of the wheel" : "drive from here";
  if (on) await beat();
  else post("api/hand", { who: me, number: ++beats, hand: null }).catch(() => {});
}

function letGo() { // without a word: the program notices, and drops the episode if this page drove it
  wheel = false;
  held.clear();
  $("wheel").setAttribute("aria-pressed", false);
  $("wheel-label").textContent = "drive from here";
  $("held").textContent = "";
}

function hand() {
  const action = [0, 0, 0, 0];
  if (document.hidden) return action; // a pad's sticks then stand as they were
  for (const [entry, direction] of held.values()) action[entry] += direction;
  const stick = (value) => (Math.abs(value) > DEAD_ZONE ? value : 0);
  for (const pad of pads()) {
    const [across, along, , up] = pad.axes; // down and right are positive
    const add = [-stick(along), -stick(across), -stick(up), pad.buttons[6].value - pad.buttons[7].value];
    add.forEach((value, i) => { action[i] += value; });
  }
  const speed = $("speed").value / 100;
  return action.map((value, i) => Math.max(-1, Math.min(1, value)) * (i < 3 ? speed : 1));
}

function pads() { // those of the standard layout; of another nobody knows which stick is which
  return [...(navigator.getGamepads?.() ?? [])].filter((pad) => pad?.connected && pad.mapping === "standard");
}

async function beat() {
  if (!wheel || underway >= UNDERWAY) return;
  underway += 1;
  try {
    late = (await (await post("api/hand", { who: me, number: ++beats, hand: hand() })).json()).late;
  } catch (error) {
    if (wheel && error.status !== undefined) { // refused; else the program is not reached, and lets go by itself
      letGo();
      complain(`You do not drive: ${error.message}`);
    }
  }
  underway -= 1;
}

function watchPads() { // buttons that press a key do so once
  const there = pads();
  if (there.length) $("pad").textContent = PAD_HELP;
  for (const pad of there) {
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

function named(key) { // by what is printed on it; where that is no Latin letter, by its place
  return (/^[a-z]$/i.test(key.key) || key.key.startsWith("Arrow") ? key.key : key.code.replace("Key", "")).toLowerCase();
}

document.addEventListener("keydown", (down) => {
  if (down.ctrlKey || down.metaKey || down.altKey || !about || over) {
    held.clear(); // a shortcut; some systems do not tell of the other keys' release then
    beat();
    return;
  }
  const name = named(down);
  if (wheel && MOTION[name]) {
    down.preventDefault();
    if (held.has(down.code)) return;
    held.set(down.code, MOTION[name]);
    beat();
    return;
  }
  if (down.repeat) return;
  const event = Object.keys(about.keys).find((event) => about.keys[event] === name);
  if (name === "d") drive(!wheel);
  else if (event && !$(`press-${event}`).disabled) press(event);
});
document.addEventListener("keyup", (up) => { if (held.delete(up.code)) beat(); });
function release() {
  held.clear();
  beat();
}
window.addEventListener("blur", release);
document.addEventListener("visibilitychange", release);
window.addEventListener("pagehide", () => { // nothing held from now on; that it is gone the program then hears by its silence
  if (wheel) post("api/hand", { who: me, number: ++beats, hand: [0, 0, 0, 0] }, true).catch(() => {});
  letGo();
});
$("wheel").onclick = () => { drive(!wheel); $("wheel").blur(); };
$("speed").oninput = () => { $("speed-said").textContent = `${$("speed").value} %`; };
$("speed").onchange = () => $("speed").blur();
$("speed").oninput();
setInterval(beat, BEAT_MS);
setInterval(sayWhatCame, SEEN_MS);
setInterval(watchPads, 50);
askCurves();
follow();
