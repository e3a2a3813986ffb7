// The page that labels episodes, or only shows them. The server's answer is the only truth: a label is shown as
// saved when the server has said so, and what it says an episode's frames are is what is drawn.
"use strict";

const KEPT = 400; // pictures in memory, 10 to 60 KB each
const AHEAD = 4; // frames fetched before they are asked for
const PATIENCE_MS = 10000; // after which a server that does not answer is told of
const LARGE_MS = 60000; // the same for pictures and curves: 2 MB through a slow tunnel
const POLL_MS = 2000; // how often the label file is looked at for what others changed
const FRAME = { 1: "--success", 0: "--failure", x: "--excluded", "-": "--unlabelled" };
const MEANING = { 1: "success", 0: "failure", x: "excluded, so failure", "-": "unlabelled" };

let about; // what does not change
let episodes = []; // each {length, observations, task, label, text, problem, frames, recorded}
let wanted = []; // each {name, have, goal, missing}: the labelled frames of a kind
let version = "";
let at = { episode: 0, frame: 0 };
let recorded = null; // which recording of that episode is shown: another one may come in its place
let direction = 1; // of the last step, for what to fetch ahead
let playing = null; // who plays: the one call of play() that may go on
const opened = {}; // episode -> frame at which a range was opened and not yet closed
const done = []; // what undo takes back: {episode, frame, before, after}
const judged = new Map(); // episode -> {recorded, probability, success} or {recorded, error}
let heard = 0; // how many such answers came
let differences = [];
let visited = null; // the difference that was jumped to last, and its place in the list
let curves = []; // of the episode that is shown

// ---- the server

class Refusal extends Error {}

async function ask(path, kind, patience = PATIENCE_MS, options = {}) {
  let answer;
  let content;
  try {
    answer = await fetch(path, { ...options, signal: AbortSignal.timeout(patience) });
    content = await answer[answer.ok ? kind : "json"]();
  } catch (error) {
    const why = error.name === "TimeoutError" ? `held up, for ${patience / 1000} s now` : "ended";
    throw new Error(`The server does not answer: it was ${why}, or the tunnel is down. The list shows what is saved.`);
  }
  if (answer.ok) return content;
  throw new Refusal(content.error);
}

const pictures = new Map(); // path -> promise of a Blob; the one used last stands last

function picture(kind, camera, { episode, frame }) {
  const of = `episode=${episode}&recorded=${episodes[episode]?.recorded}`;
  const path = `api/${kind}?${of}&frame=${frame}&camera=${encodeURIComponent(camera)}`;
  const promise = pictures.get(path) ?? ask(path, "blob", LARGE_MS);
  pictures.delete(path);
  pictures.set(path, promise);
  promise.catch(() => pictures.delete(path)); // asked for again when it is looked at again
  if (pictures.size > KEPT) pictures.delete(pictures.keys().next().value);
  return promise;
}

// ---- labels: what a key makes of the label that is there

const equal = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const isForm = (label) => label && (label.success_start !== null || label.ranges !== null || label.all_fail);
const EMPTY = { success_start: null, ranges: null, all_fail: false, exclude: [], skip: false };

function successFrom(label, frame) {
  return { ...EMPTY, success_start: frame, exclude: label?.exclude ?? [], skip: label?.skip ?? false };
}

function allFail(label) {
  return { ...EMPTY, all_fail: true, skip: label?.skip ?? false };
}

function withRange(label, frame, episode, first) {
  const codes = [...episodes[episode].frames].map((code) => code === "1" || code === "x");
  const end = label?.success_start ?? (label?.ranges?.at(-1)[1] === null ? label.ranges.at(-1)[0] : Infinity);
  if (first === undefined) {
    if (frame < end) throw new Refusal("Open a range first: [ at its first frame of success.");
    codes.fill(false, end); // no range was opened, so this closes the success that had no end
    first = end;
  }
  codes.fill(true, Math.min(first, frame), Math.max(first, frame) + 1);
  const ranges = [];
  codes.forEach((hit, i) => {
    if (hit && !codes[i - 1]) ranges.push([i, null]);
    if (!hit && codes[i - 1]) ranges.at(-1)[1] = i;
  });
  return { ...EMPTY, ranges, exclude: label?.exclude ?? [], skip: label?.skip ?? false };
}

function exclude(label, frame, episode) {
  if (!"1x".includes(episodes[episode].frames[frame])) {
    throw new Refusal(`Frame ${frame} is no success, so there is nothing to exclude.`);
  }
  const others = label.exclude.filter((one) => one !== frame);
  const list = others.length < label.exclude.length ? others : [...others, frame].sort((a, b) => a - b);
  return { ...label, exclude: list };
}

function skip(label) {
  if (label?.skip) return isForm(label) ? { ...label, skip: false } : null;
  return { ...(label ?? EMPTY), skip: true };
}

// ---- changing one, in the order of the keys

let work = Promise.resolve();
let pending = 0; // keys whose change is not answered yet
const unsaved = new Map(); // episode -> {label, why}, until it has that label or was given another

/** `make` gets the place and the open range of when the key was pressed, and the label that earlier keys have made. */
function change(make) {
  const { episode, frame } = at;
  const seen = episodes[episode].recorded;
  const first = opened[episode];
  if (first !== undefined && make !== exclude && make !== skip) {
    delete opened[episode];
    drawPlace();
  }
  enqueue(async () => {
    const before = episodes[episode].label;
    const after = make(before, frame, episode, first);
    if (equal(before, after)) return say(`Episode ${episode} is labelled so already.`);
    await save(episode, seen, before, after);
    done.push({ episode, frame, seen, before, after });
    say(`Episode ${episode}: ${episodes[episode].text}.`);
  });
}

function undo() {
  enqueue(async () => {
    const last = done.at(-1);
    if (!last) return say("There is nothing to undo.");
    go(last.episode, last.frame);
    if (!equal(episodes[last.episode].label, last.after)) {
      done.pop();
      throw new Refusal(`Episode ${last.episode} was changed elsewhere since; that is kept, and not undone.`);
    }
    await save(last.episode, last.seen, last.after, last.before);
    done.pop();
    say(`Undone: episode ${last.episode} is ${episodes[last.episode].text} again.`);
  });
}

function enqueue(step) {
  if (about.read_only) return say(`Nothing can be changed here: ${about.read_only}.`);
  showPending(1);
  work = work.then(step).catch((error) => say(error.message)).finally(() => showPending(-1));
}

function showPending(more) {
  pending += more;
  if (pending) $("saved").textContent = pending === 1 ? "saving …" : `saving … ${pending} to go`;
  else if ($("saved").textContent.startsWith("saving")) $("saved").textContent = ""; // nothing was to be saved
}

async function save(episode, seen, before, label) {
  try {
    const body = JSON.stringify({ episode, recorded: seen, before, label });
    take(await ask("api/label", "json", PATIENCE_MS, { method: "POST", body }));
  } catch (error) {
    $("saved").textContent = "not saved";
    unsaved.set(episode, { label, why: error.message });
    showProblems();
    if (error instanceof Refusal) await refresh().catch(() => {}); // it may lie at a label that others gave
    throw new Refusal(`Episode ${episode} is not saved.`);
  }
  unsaved.delete(episode);
  trouble("");
  $("saved").textContent = `saved ${new Date().toLocaleTimeString([], { hour12: false })}`;
}

// ---- what the server says

function take(answer) {
  version = answer.version;
  if (!answer.episodes) return;
  const before = episodes.map((episode) => episode.recorded);
  episodes = answer.episodes;
  wanted = answer.wanted;
  const others = episodes.flatMap((episode, index) => (episode.recorded === before[index] ? [] : index));
  for (const index of others) delete opened[index];
  for (const [index, { label }] of unsaved) {
    if (!equal(episodes[index]?.label, label)) continue;
    unsaved.delete(index); // it had arrived, only its answer had not
    if (!unsaved.size && !pending) $("saved").textContent = "saved";
  }
  labelProblem(answer.problem);
  if (others.length || before.length !== episodes.length) {
    listEpisodes();
    if (about.threshold !== null) pollJudge();
  }
  showLabels();
  if (episodes[at.episode]?.recorded !== recorded) go(at.episode, at.frame);
}

async function refresh() {
  const known = version;
  const answer = await ask(`api/episodes?version=${encodeURIComponent(known)}`, "json");
  if (version === known) take(answer); // else a label was saved meanwhile, and its answer may be the newer one
}

let away = false;

async function poll() {
  if (!document.hidden) {
    try {
      await refresh();
      if (away) trouble("");
      away = false;
    } catch (error) {
      away = true;
      trouble(error.message);
    }
  }
  setTimeout(poll, POLL_MS);
}

let judging = false;

async function pollJudge() {
  if (judging) return;
  judging = true;
  for (let waiting = 1; waiting > 0; ) {
    try {
      const answer = await ask(`api/judged?first=${at.episode}&since=${heard}`, "json", LARGE_MS);
      for (const one of answer.judged) judged.set(one.episode, one);
      heard += answer.judged.length;
      waiting = answer.waiting;
      const [index, frames] = answer.now ?? [];
      const now = frames ? `, frame ${frames} of ${episodes[index]?.observations} in ${index}` : "";
      $("work-count").textContent = waiting ? `(${waiting} episodes to go${now})` : "";
      if (answer.judged.length) showLabels();
    } catch {
      // poll() tells of a server that is gone
    }
    if (waiting) await new Promise((resolve) => setTimeout(resolve, 500));
  }
  judging = false;
  showDifferences();
}

/** What the classifier said of an episode as it is now recorded. */
function verdict(index) {
  const answer = judged.get(index);
  return answer && answer.recorded === episodes[index]?.recorded ? answer : undefined;
}

// ---- words

function say(text) {
  $("said").textContent = text;
}

const problems = { server: "", labels: "" };

function trouble(text) {
  problems.server = text;
  showProblems();
}

function labelProblem(text) {
  problems.labels = text ?? "";
  showProblems();
}

function showProblems() {
  const why = [...unsaved.values()].at(-1)?.why;
  const lost = unsaved.size ? `Not saved: episode ${[...unsaved.keys()].join(", ")}. ${why}` : "";
  const server = problems.server === why ? "" : problems.server;
  $("problem").textContent = [lost, server, problems.labels].filter(Boolean).join(" · ");
  $("problem").hidden = !$("problem").textContent;
}

// ---- going somewhere

function go(episode, frame) {
  episode = Math.max(0, Math.min(episode, episodes.length - 1));
  if (!episodes[episode]) return;
  const changed = episode !== at.episode || episodes[episode].recorded !== recorded;
  frame = Math.max(0, Math.min(frame, episodes[episode].observations - 1));
  direction = !changed && frame < at.frame ? -1 : 1;
  at = { episode, frame };
  recorded = episodes[episode].recorded;
  if (changed) {
    playing = null;
    markEpisode();
    loadCurves();
  }
  say("");
  drawPlace();
  showFrame();
  rememberPlace();
}

const step = (count) => {
  playing = null;
  go(at.episode, at.frame + count);
};

function nextUnlabelled(way) {
  for (let i = 1; i <= episodes.length; i++) {
    const index = (at.episode + way * i + episodes.length * 2) % episodes.length;
    if (!episodes[index].label) return go(index, 0);
  }
  say("Every episode is labelled.");
}

function nextDifference() {
  if (!differences.length) return say(about.threshold === null ? "No classifier was given."
    : $("work-count").textContent ? "Nothing differs so far; the classifier is still looking." : "Nothing differs.");
  const same = visited && differences.findIndex((one) => one.key === visited.key);
  const place = visited === null ? 0 : same >= 0 ? same + 1 : visited.place; // one that was mended has left the list
  visitDifference(place % differences.length);
}

function visitDifference(place) {
  visited = { key: differences[place].key, place };
  go(differences[place].episode, differences[place].frame);
  say(differences[place].text);
  showDifferences();
}

async function play() {
  if (playing) return void (playing = null);
  const mine = (playing = {});
  const last = episodes[at.episode].observations - 1;
  if (at.frame === last) go(at.episode, 0);
  for (let due = performance.now(); playing === mine && at.frame < last; ) {
    await showing; // a slow tunnel makes it slower, and never leaves a frame out
    due = Math.max(due + 1000 / about.fps, performance.now());
    await new Promise((resolve) => setTimeout(resolve, due - performance.now()));
    if (playing === mine) go(at.episode, at.frame + 1);
  }
  if (playing === mine) playing = null;
}

let remember;

function rememberPlace() {
  clearTimeout(remember); // browsers refuse more than 200 of these in 10 s
  remember = setTimeout(() => history.replaceState(null, "", `#${at.episode}/${at.frame}`), 300);
}

// ---- keys, buttons and the list of them: one table

const ACTIONS = [
  { keys: ["s"], edit: true, text: "success from here", run: () => change(successFrom) },
  { keys: ["["], edit: true, brief: "range from here", text: "open a range of success", run: () => openRange() },
  { keys: ["]"], edit: true, brief: "to here", text: "close it after this frame", run: () => change(withRange) },
  { keys: ["x"], edit: true, brief: "exclude", text: "exclude this frame, or no more", run: () => change(exclude) },
  { keys: ["f"], edit: true, brief: "all fail", text: "the whole episode fails", run: () => change(allFail) },
  { keys: ["k"], edit: true, brief: "skip", text: "skip the episode, or no more", run: () => change(skip) },
  { keys: ["Delete"], shown: "Del", edit: true, text: "unlabel", run: () => change(() => null) },
  { keys: ["u"], edit: true, text: "undo", run: () => undo() },
  { keys: ["ArrowLeft", ","], shown: "← ,", brief: "", text: "a frame back", run: () => step(-1) },
  { keys: ["ArrowRight", "."], shown: "→ .", brief: "", text: "a frame on", run: () => step(1) },
  { keys: ["Shift+ArrowLeft", "Shift+,"], shown: "⇧←", brief: "", text: "10 frames back", run: () => step(-10) },
  { keys: ["Shift+ArrowRight", "Shift+."], shown: "⇧→", brief: "", text: "10 frames on", run: () => step(10) },
  { keys: ["Home"], shown: "Home", brief: "", text: "first frame", run: () => step(-Infinity) },
  { keys: ["End"], shown: "End", brief: "", text: "last frame", run: () => step(Infinity) },
  { keys: [" "], shown: "Space", brief: "play", text: "play, pause", run: () => play() },
  { keys: ["n"], text: "next unlabelled", run: () => nextUnlabelled(1) },
  { keys: ["p"], brief: "", text: "previous unlabelled", run: () => nextUnlabelled(-1) },
  { keys: ["ArrowUp"], shown: "↑", brief: "", text: "previous episode", run: () => go(at.episode - 1, 0) },
  { keys: ["ArrowDown"], shown: "↓", brief: "", text: "next episode", run: () => go(at.episode + 1, 0) },
  { keys: ["d"], judge: true, text: "next difference", run: () => nextDifference() },
  { keys: ["?"], text: "these keys", run: () => $("help").showModal() },
];

function perform(action) {
  if (!episodes.length && action.keys[0] !== "?") return say("This dataset has no episode yet.");
  action.run();
}

function openRange() {
  if (about.read_only) return say(`Nothing can be changed here: ${about.read_only}.`);
  opened[at.episode] = at.frame;
  drawPlace();
  say(`A range begins at frame ${at.frame}: go to its last frame of success, and press ]`);
}

const US = { Comma: ",", Period: ".", BracketLeft: "[", BracketRight: "]" }; // what is on the keys, beside the letters

/** The character of a key; where the keyboard writes Cyrillic or the like, the one at its place on a US keyboard. */
function character({ key, code }) {
  if (code === "Comma" || code === "Period") return US[code]; // with shift too
  if (/^(?!\p{Script=Latin})\p{L}$/u.test(key)) return US[code] ?? code.replace(/^Key/, "").toLowerCase();
  return key.length === 1 ? key.toLowerCase() : key;
}

function onKey(event) {
  if ($("help").open) return event.key === "?" ? $("help").close() : undefined;
  const written = event.getModifierState("AltGraph") || (event.altKey && "[]".includes(event.key)); // option-5 on a Mac
  if (!written && (event.ctrlKey || event.altKey || event.metaKey)) return;
  let key = character(event);
  if (event.shiftKey && (key.length > 1 || key === "," || key === ".")) key = `Shift+${key}`;
  const action = ACTIONS.find((one) => one.keys.includes(key));
  if (!action) return;
  event.preventDefault();
  if (event.repeat && action.edit) return;
  perform(action);
}

function listActions() {
  for (const action of ACTIONS) {
    const shown = action.shown ?? action.keys[0];
    $("keys").append(element("tr", {}, element("td", {}, element("kbd", { textContent: shown })),
      element("td", { textContent: action.text })));
    if ((action.edit && about.read_only) || (action.judge && about.threshold === null)) continue;
    if (action.keys[0] === "?") continue;
    const button = element("button", { title: action.text }, element("kbd", { textContent: shown }));
    if (action.brief ?? action.text) button.append(` ${action.brief ?? action.text}`);
    button.dataset.key = action.keys[0];
    button.onmousedown = (event) => event.preventDefault(); // keeps no focus, so that space stays play
    button.onclick = () => perform(action);
    $("actions").append(button);
  }
}

// ---- the list of episodes and the totals

function listEpisodes() {
  $("episodes").replaceChildren(...episodes.map((episode, index) => {
    const row = element("div", { className: "episode" },
      element("div", {}, element("b", { textContent: index }), element("span", { className: "state" }),
        element("span", { className: "length" })),
      element("span", { className: "band" }));
    row.onclick = () => go(index, 0);
    return row;
  }));
  markEpisode();
}

function markEpisode() {
  $("episodes").querySelector(".current")?.classList.remove("current");
  const row = $("episodes").children[at.episode];
  row?.classList.add("current");
  row?.scrollIntoView({ block: "nearest" });
  document.title = `${about.name} · episode ${at.episode}`;
}

function runs(codes) {
  const found = [];
  for (let i = 0; i < codes.length; i++) {
    if (i && codes[i] === codes[i - 1]) found.at(-1).end = i + 1;
    else found.push({ code: codes[i], start: i, end: i + 1 });
  }
  return found;
}

function showLabels() {
  episodes.forEach((episode, index) => {
    const row = $("episodes").children[index];
    const skipped = episode.label?.skip;
    row.classList.toggle("unlabelled", !episode.label);
    row.classList.toggle("skip", Boolean(skipped));
    row.classList.toggle("wrong", Boolean(episode.problem));
    row.querySelector(".state").textContent = episode.problem ?? episode.text;
    row.querySelector(".state").title = episode.problem ?? episode.text;
    row.querySelector(".length").textContent = episode.observations;
    const parts = runs(episode.frames).map(({ code, start, end }) => {
      const percent = (frame) => `${((100 * frame) / episode.observations).toFixed(2)}%`;
      return `var(${FRAME[code]}) ${percent(start)} ${percent(end)}`;
    });
    row.querySelector(".band").style.background = `linear-gradient(90deg, ${parts.join(", ")})`;
  });
  const unlabelled = episodes.filter((episode) => !episode.label).length;
  showTotals([
    ["labelled", episodes.length - unlabelled, `of ${episodes.length} episodes`, unlabelled],
    ...wanted.map(({ name, have, goal, missing }) => (
      [name, have, `${name}, ${goal} wanted${missing ? "" : ": enough"}`, missing]
    )),
  ]);
  findDifferences();
  drawPlace();
}

function showTotals(totals) {
  $("totals").replaceChildren(...totals.map(([id, count, text, missing]) => {
    const fill = element("i");
    fill.style.width = `${(100 * count) / Math.max(1, count + missing)}%`;
    fill.style.background = `var(${missing ? "--blue" : "--success"})`;
    const title = missing ? `${missing} to go` : "";
    return element("div", { className: "total", id: `total-${id}`, title }, element("b", { textContent: count }),
      ` ${text}`, element("div", { className: "bar" }, fill));
  }));
}

// ---- where the classifier and the label differ, the largest first

const SEEN = {
  1: "classifier sees success", 0: "classifier sees none",
  g: "classifier sees success, its state guard forbids it", // the surer it is, the further down the list
};

function findDifferences() {
  differences = [];
  episodes.forEach((episode, index) => {
    const answer = verdict(index);
    if (!answer?.success || !episode.label || episode.label.skip) return;
    const codes = [...answer.success].map((hit, i) => {
      const label = episode.frames[i];
      return label === "-" || (label === "1") === (hit === "1") ? "" : hit;
    });
    for (const { code, start, end } of runs(codes)) {
      if (code === "") continue;
      const parts = answer.probability.slice(start, end);
      const weight = parts.reduce((sum, p) => sum + Math.abs(p - (code === "1" ? 0 : 1)), 0);
      const text = SEEN[code];
      const frames = end - start === 1 ? `frame ${start}` : `frames ${start} to ${end - 1}`;
      differences.push({ key: `${index}/${start}/${code}`, episode: index, frame: start, weight, text, frames });
    }
  });
  differences.sort((a, b) => b.weight - a.weight);
  showDifferences();
}

function showDifferences() {
  if (about.threshold === null) return;
  $("differences").replaceChildren(...differences.slice(0, 200).map((one, place) => {
    const row = element("li", {}, `episode ${one.episode}, ${one.frames}`, element("small", { textContent: one.text }));
    row.classList.toggle("current", visited?.key === one.key);
    row.onclick = () => visitDifference(place);
    return row;
  }));
  if (!differences.length && !judging) {
    $("differences").append(element("li", { textContent: "nothing, in what is labelled" }));
  }
}

// ---- the frame and what the network sees of it

const ZOOMED_PX = [420, 260]; // a small frame is shown at the largest whole multiple that is no higher; beside others
let showing = Promise.resolve();
let busy = false;

function makeFrames() {
  const several = about.cameras.length > 1;
  $("frames").classList.toggle("several", several);
  if (!about.cameras.length) $("frames").append("This dataset has no camera.");
  for (const camera of about.cameras) {
    const zoom = Math.max(1, Math.floor(ZOOMED_PX[Number(several)] / camera.height));
    const size = `${camera.width} × ${camera.height} px` + (zoom > 1 ? `, shown ${zoom} times as large` : "");
    const canvas = element("canvas", { width: camera.width, height: camera.height });
    canvas.style.width = `min(${camera.width * zoom}px, var(--room) * ${camera.width / camera.height})`;
    canvas.classList.toggle("small", zoom > 1);
    const trouble = () => element("div", { className: "trouble", hidden: true });
    const caption = element("figcaption", { textContent: `${camera.name}, ${size}` });
    camera.frame = element("figure", {}, canvas, trouble(), caption);
    $("frames").append(camera.frame);
    const side = about.image.image_size;
    const view = element("canvas", { width: side, height: side });
    const crop = about.image.crop ? `crop ${about.image.crop.join(", ")}` : "no crop";
    camera.view = element("figure", {}, view, trouble(),
      element("figcaption", { textContent: `${several ? `${camera.name}: ` : ""}${side} × ${side} px, ${crop}` }));
    $("views").append(camera.view);
    if (camera.problem) complain(camera.view, camera.problem);
  }
}

const CAPTION_PX = 36; // the line under a frame, and the space above the frame
const LEAST_PX = 96;

/** Frames are no higher than what the desk leaves of the window, so that it never stands on them. */
function makeRoom() {
  const room = Math.max(LEAST_PX, $("stage").clientHeight - $("desk").offsetHeight - CAPTION_PX);
  $("frames").style.setProperty("--room", `${room}px`);
  drawPlace();
}

function complain(figure, text) {
  figure.querySelector(".trouble").textContent = text;
  figure.querySelector(".trouble").hidden = !text;
}

function showFrame() {
  if (!busy) showing = catchUp();
  return showing;
}

async function catchUp() {
  // One frame at a time: keys that come faster than frames leave frames out, and never make a queue of them.
  busy = true;
  let shown = null;
  while (shown !== at) {
    shown = at;
    await Promise.all(about.cameras.flatMap((camera) => [paintFrame(camera, shown), paintView(camera, shown)]));
    document.body.dataset.shown = `${shown.episode}/${shown.frame}`;
  }
  busy = false;
  fetchAhead(shown);
}

async function fetchAhead(from) {
  for (let i = 1; i <= AHEAD; i++) {
    const next = { episode: from.episode, frame: from.frame + i * direction };
    if (at !== from || !(next.frame in [...episodes[from.episode].frames])) return;
    const wanted = about.cameras.flatMap((camera) => [
      picture("frame", camera.name, next),
      ...(camera.problem ? [] : [picture("view", camera.name, next)]),
    ]);
    await Promise.allSettled(wanted);
  }
}

async function paint(figure, kind, camera, place) {
  const canvas = figure.querySelector("canvas");
  try {
    const bitmap = await createImageBitmap(await picture(kind, camera.name, place));
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
      canvas.width = bitmap.width;
      canvas.height = bitmap.height;
    }
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
    complain(figure, "");
    return canvas;
  } catch (error) {
    complain(figure, error.message);
    return null;
  }
}

async function paintView(camera, place) {
  if (!camera.problem) await paint(camera.view, "view", camera, place);
}

async function paintFrame(camera, place) {
  const canvas = await paint(camera.frame, "frame", camera, place);
  if (!canvas || !about.image.crop || camera.problem) return;
  const [top, left, height, width] = about.image.crop;
  const brush = canvas.getContext("2d");
  brush.fillStyle = "rgb(20 24 28 / 50%)";
  brush.fillRect(0, 0, canvas.width, top);
  brush.fillRect(0, top + height, canvas.width, canvas.height - top - height);
  brush.fillRect(0, top, left, height);
  brush.fillRect(left + width, top, canvas.width - left - width, height);
  brush.strokeStyle = "#ffd23f";
  brush.lineWidth = 2;
  brush.strokeRect(left + 1, top + 1, width - 2, height - 2);
}

// ---- the ribbon

const BAND_PX = 26;
const CURVE_PX = [76, 36]; // in a window of less height than LOW_PX the second
const LOW_PX = 480;
const RULER_PX = 16;

function drawPlace() {
  const episode = episodes[at.episode];
  if (!episode) return;
  const code = episode.frames[at.frame];
  const answer = verdict(at.episode);
  const p = answer?.probability?.[at.frame];
  $("where").textContent =
    `episode ${at.episode} · frame ${at.frame} of 0 to ${episode.observations - 1}` +
    (at.frame === episode.length ? " (the closing one)" : "") +
    ` · ${(at.frame / about.fps).toFixed(1)} s · ${MEANING[code]}` +
    (episode.label?.skip ? ", but skipped" : "") +
    (p === undefined ? "" : ` · classifier ${p.toFixed(2)}`) +
    (answer?.success?.[at.frame] === "g" ? ", the state guard forbids it" : "") +
    (answer?.error ? ` · classifier: ${answer.error}` : "");
  drawRibbon(episode);
  drawCurves();
}

function drawRibbon(episode) {
  const ribbon = $("ribbon");
  const upper = about.threshold === null ? 0 : CURVE_PX[Number(window.innerHeight < LOW_PX)];
  ribbon.style.height = `${upper + BAND_PX + RULER_PX}px`;
  const [brush, width] = fit(ribbon);
  brush.font = "11px system-ui, sans-serif";
  const cell = width / episode.observations;
  const answer = verdict(at.episode);
  if (upper) {
    brush.fillStyle = "#fff";
    brush.fillRect(0, 0, width, upper);
  }
  for (const { code, start, end } of runs(episode.frames)) {
    const height = code === "1" ? BAND_PX : BAND_PX * 0.6; // told apart without colours too
    brush.fillStyle = colour(FRAME[code]);
    brush.globalAlpha = episode.label?.skip ? 0.35 : 1;
    brush.fillRect(start * cell, upper + BAND_PX - height, (end - start) * cell, height);
  }
  brush.globalAlpha = 1;
  if (upper) drawProbability(brush, width, upper, cell, episode, answer);
  if (cell > 6) {
    brush.fillStyle = "rgb(255 255 255 / 60%)";
    for (let i = 1; i < episode.observations; i++) brush.fillRect(i * cell - 0.5, upper, 1, BAND_PX);
  }
  const open = opened[at.episode];
  if (open !== undefined) {
    const [first, last] = [Math.min(open, at.frame), Math.max(open, at.frame) + 1];
    brush.fillStyle = "rgb(0 114 178 / 45%)";
    brush.fillRect(first * cell, upper, (last - first) * cell, BAND_PX);
    brush.fillStyle = "#0072b2";
    brush.fillRect(open * cell, upper - 4, 3, BAND_PX + 4);
  }
  brush.strokeStyle = "#1f2328";
  brush.lineWidth = 2;
  brush.strokeRect(at.frame * cell + 1, 1, Math.max(cell - 2, 2), upper + BAND_PX - 2);
  drawRuler(brush, width, cell, episode.observations, upper + BAND_PX + 12);
  ribbon.setAttribute("aria-valuemax", episode.observations - 1);
  ribbon.setAttribute("aria-valuenow", at.frame);
}

function drawProbability(brush, width, height, cell, episode, answer) {
  const y = (p) => 6 + (1 - p) * (height - 12);
  brush.fillStyle = "#66707b";
  if (!answer) return brush.fillText("the classifier has not come to this episode yet", 8, height / 2);
  if (answer.error) return brush.fillText(answer.error, 8, height / 2);
  brush.fillStyle = "rgb(230 159 0 / 30%)";
  [...answer.success].forEach((hit, i) => {
    const label = episode.frames[i];
    if (label !== "-" && (label === "1") !== (hit === "1")) brush.fillRect(i * cell, 0, cell, height);
  });
  brush.strokeStyle = "#9aa4af";
  brush.lineWidth = 1;
  brush.setLineDash([4, 4]);
  brush.beginPath();
  brush.moveTo(0, y(about.threshold));
  brush.lineTo(width, y(about.threshold));
  brush.stroke();
  brush.setLineDash([]);
  brush.strokeStyle = COLOURS[0];
  brush.lineWidth = 2;
  brush.beginPath();
  answer.probability.forEach((p, i) => brush.lineTo((i + 0.5) * cell, y(p)));
  brush.stroke();
  brush.fillStyle = "#66707b";
  brush.fillText(`threshold ${about.threshold.toFixed(2)}`, 4, y(about.threshold) - 4);
}

function drawRuler(brush, width, cell, frames, y) {
  const every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000].find((n) => n * cell > 34) ?? 10000;
  brush.fillStyle = "#66707b";
  brush.textAlign = "center";
  for (let i = 0; i < frames; i += every) {
    const x = (i + 0.5) * cell;
    if (x < width - 8) brush.fillText(i, Math.max(x, 6), y);
  }
  brush.textAlign = "left";
}

function scrub(canvas, frames) {
  const seek = (event) => {
    if (!episodes.length) return;
    const box = canvas.getBoundingClientRect();
    playing = null;
    go(at.episode, Math.floor(((event.clientX - box.left) / box.width) * frames()));
  };
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    seek(event);
  };
  canvas.onpointermove = (event) => event.buttons && seek(event);
}

// ---- the curves: state, action, reward, who drove

const FIRST = ["action", "next.reward", "complementary_info.is_intervention", "observation.state"];
const AT_ONCE = 6; // lines in one plot: our state is positions, speeds and tool, six each

async function loadCurves() {
  const { episode } = at;
  const seen = recorded;
  let columns = [];
  let problem = "";
  try {
    columns = await ask(`api/curves?episode=${episode}`, "json", LARGE_MS);
  } catch (error) {
    problem = error.message;
  }
  if (episode !== at.episode || seen !== recorded) return; // who went on asked for that one's
  $("curves").replaceChildren(problem);
  const place = ({ name }) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  columns.sort((a, b) => place(a) - place(b) || a.name.localeCompare(b.name));
  curves = columns.flatMap(({ name, entries }) => {
    const parts = [];
    for (let i = 0; i < entries.length; i += AT_ONCE) parts.push(makeCurve(name, entries.slice(i, i + AT_ONCE)));
    return parts;
  });
  $("curves").append(...curves.map((curve) => curve.root));
  drawCurves();
}

function makeCurve(name, entries) {
  const canvas = element("canvas");
  const values = entries.map(() => element("span"));
  const legend = element("div", { className: "legend" }, element("b", { textContent: name }));
  entries.forEach((entry, i) => {
    const dot = element("i");
    dot.style.background = COLOURS[i];
    legend.append(element("span", {}, dot, `${entry.name} `, values[i]));
  });
  scrub(canvas, () => episodes[at.episode].observations);
  const finite = entries.flatMap((entry) => entry.values.filter((value) => value !== null));
  const low = finite.reduce((a, b) => Math.min(a, b), Infinity);
  const high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
  const isFlag = finite.every((value) => value === 0 || value === 1);
  const middle = isFlag ? 0.5 : (low + high) / 2;
  const half = isFlag ? 0.5 : Math.max((high - low) / 2, 1e-3 * Math.abs(middle), 1e-6);
  const root = element("div", { className: "curve" }, legend, canvas);
  return { root, canvas, entries, values, low: middle - 1.1 * half, high: middle + 1.1 * half };
}

function drawCurves() {
  for (const { canvas, entries, values, low, high } of curves) {
    const [brush, width, height] = fit(canvas);
    const cell = width / episodes[at.episode].observations;
    const y = (value) => height - 3 - ((value - low) / (high - low)) * (height - 6);
    if (low < 0 && high > 0) {
      brush.fillStyle = "#e7eaee";
      brush.fillRect(0, y(0), width, 1);
    }
    entries.forEach((entry, i) => {
      brush.strokeStyle = COLOURS[i];
      brush.lineWidth = 1.5;
      brush.beginPath();
      let pen = false;
      entry.values.forEach((value, row) => {
        if (value !== null) brush[pen ? "lineTo" : "moveTo"]((row + 0.5) * cell, y(value));
        pen = value !== null;
      });
      brush.stroke();
      const value = entry.values[at.frame];
      values[i].textContent = value === undefined ? "" : value === null ? "not a number" : inWords(value);
    });
    brush.fillStyle = "rgb(31 35 40 / 15%)";
    brush.fillRect(at.frame * cell, 0, Math.max(cell, 2), height);
  }
}

// ---- the start

async function start() {
  about = await ask("api/about", "json");
  $("name").textContent = about.name;
  $("name").title = `${about.folder}\nlabels: ${about.labels}`;
  $("saved").textContent = about.read_only ? "read-only" : "";
  $("saved").title = about.read_only ?? about.labels;
  $("notes").append(...about.notes.map((note) => element("li", { textContent: note })));
  $("notes").hidden = !about.notes.length;
  $("work").hidden = about.threshold === null;
  listActions();
  makeFrames();
  scrub($("ribbon"), () => episodes[at.episode].observations);
  const [episode, frame] = location.hash.slice(1).split("/").map(Number);
  at = { episode: episode || 0, frame: frame || 0 };
  await refresh(); // which goes there
  if (!episodes.length) say("This dataset has no episode yet.");
  document.addEventListener("keydown", onKey);
  $("help-button").onmousedown = (event) => event.preventDefault();
  $("help-button").onclick = () => $("help").showModal();
  window.addEventListener("beforeunload", (event) => {
    if (pending || unsaved.size) event.preventDefault(); // the browser asks whether to leave
  });
  new ResizeObserver(makeRoom).observe($("stage"));
  new ResizeObserver(makeRoom).observe($("desk"));
  setTimeout(poll, POLL_MS);
}

start().catch((error) => trouble(error.message));
