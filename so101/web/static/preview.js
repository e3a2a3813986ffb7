// The page on which a person watches a reward classifier: frame by frame through a dataset, or live. Guard and vote
// are worked out here, for whatever threshold the slider stands at; what a mark says is decided by the stored one.
"use strict";

const KEPT = 300; // pictures in memory, 30 to 60 KB each
const AHEAD = 6; // frames fetched before they are asked for
const POLL_MS = 500; // how often it is asked what was judged since
const AGAIN_MS = 1000; // before the next try to reach a program that is gone
const SETTLE_MS = 80; // of the slider, before it is asked what the threshold would change
const SPEED_MS = 1000;

const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
let about; // what does not change
let queue; // what was marked
let threshold; // where the slider stands
let episodes = []; // of a dataset
const judged = new Map(); // episode -> what the classifier said
let heard = 0; // how many such answers came
let waiting = 0; // episodes that are not judged yet
let at = { episode: 0, frame: 0 }; // live: the number of the look is `frame`
let looks = []; // live: {frame, p, allowed, counted}, oldest first
let held = null; // live: numbers of the looks that can be gone back to while the picture stands still
let playing = null;
let over = false;
let drawn = 0; // counts what was asked to be painted
let painted = 0; // which of them is: a late picture must not replace a newer one

async function ask(path, kind = "json", options = {}) {
  const answer = await fetch(path, options);
  const content = await answer[answer.ok ? kind : "json"]();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

const post = (path, body) => ask(path, "json", { method: "POST", body: JSON.stringify(body) });

function trouble(words) {
  $("problem").textContent = words;
  $("problem").hidden = !words;
}

// ---- what the classifier said, as a row of points: {frame, p, allowed, counted, label}

function points() {
  if (about.live) return looks;
  const answer = judged.get(at.episode);
  const labels = episodes[at.episode]?.frames ?? "";
  if (!answer?.probability) return [];
  return answer.probability.map((p, frame) => (
    { frame, p, allowed: answer.allowed[frame] === "1", counted: true, label: labels[frame] }
  ));
}

/** For each point how many successes stand in a row there, at a threshold; the vote is won at about.consecutive. */
function rows(series, limit) {
  let row = 0;
  return series.map(({ p, allowed, counted }) => {
    if (counted) row = p > limit && allowed !== false ? row + 1 : 0;
    return row;
  });
}

// ---- pictures

const pictures = new Map(); // path -> promise of a Blob; the one used last stands last

function picture(kind, camera, { episode, frame }) {
  const of = about.live ? "" : `episode=${episode}&recorded=${episodes[episode]?.recorded}&`;
  const path = `api/${kind}?${of}frame=${frame}&camera=${encodeURIComponent(camera)}`;
  const promise = pictures.get(path) ?? ask(path, "blob");
  pictures.delete(path);
  pictures.set(path, promise);
  promise.catch(() => pictures.delete(path));
  if (pictures.size > KEPT) pictures.delete(pictures.keys().next().value);
  return promise;
}

function put(parent, index, bitmap, crop) {
  const canvas = parent.children[index];
  if (canvas.width !== bitmap.width) canvas.width = bitmap.width;
  if (canvas.height !== bitmap.height) canvas.height = bitmap.height;
  const pen = canvas.getContext("2d");
  pen.drawImage(bitmap, 0, 0);
  if (crop) {
    const [top, left, height, width] = crop;
    pen.lineWidth = Math.max(1, bitmap.width / 400);
    pen.setLineDash([8, 6]);
    pen.strokeStyle = "rgb(255 255 255 / 80%)";
    pen.strokeRect(left + 1, top + 1, width - 2, height - 2);
  }
}

/** Paint what is at a place, fetched (or come by the stream, `sent`), all cameras and views at once. */
async function paint(place, sent) {
  const mine = ++drawn;
  const fetched = (kind, come) => about.cameras.map(async (camera, i) => {
    if (!sent) return createImageBitmap(await picture(kind, camera, place));
    const image = Object.assign(new Image(), { src: come[i] });
    await image.decode();
    return image;
  });
  try {
    const frames = await Promise.all(fetched("frame", sent?.cameras));
    const views = await Promise.all(fetched("view", sent?.views));
    if (mine < painted) return;
    painted = mine;
    frames.forEach((bitmap, i) => put($("frames"), i, bitmap, about.crop));
    views.forEach((bitmap, i) => put($("views"), i, bitmap));
    $("frames").dataset.shown = place.frame;
    $("frames").dataset.pictures = 1 + Number($("frames").dataset.pictures ?? 0);
    if (!about.live || held) trouble("");
  } catch (error) {
    if (mine === drawn) trouble(error.message);
  }
}

// ---- what is shown

function show() {
  const series = points();
  const index = series.findIndex(({ frame }) => frame === at.frame);
  const now = series[index];
  const row = now ? rows(series, threshold)[index] : 0;
  $("probability").textContent = now ? now.p.toFixed(3) : "";
  $("bar-now").style.width = `${100 * (now?.p ?? 0)}%`;
  $("bar-now").className = now && now.p > threshold ? "above" : "";
  $("bar-moved").style.left = `${100 * threshold}%`;
  const stored = about.threshold;
  $("threshold-said").textContent = threshold === stored
    ? `${stored.toFixed(3)}, as stored` : `${threshold.toFixed(3)} on trial (stored: ${stored.toFixed(3)})`;
  const won = row >= about.consecutive;
  $("verdict").textContent = !now ? "not judged yet" : won ? "success" : "no success";
  $("verdict").className = won ? "success" : "";
  const guard = !now ? "" : about.guard === null ? "this classifier has none"
    : now.allowed === null ? `not judged: ${guarded}` : now.allowed ? "allows it" : "forbids it";
  fill($("judgement"), [
    ["classifier", !now ? "" : `${now.p.toFixed(3)} is ${now.p > threshold ? "above" : "not above"} ${threshold.toFixed(3)}`],
    ["state guard", guard], ["vote", now ? `${Math.min(row, about.consecutive)} of ${about.consecutive} in a row` : ""],
  ]);
  showMark(now);
  showPlace(now);
  drawHistory(series, index);
  if (about.live) showLiveScores(series);
}

let guarded = ""; // live: why the guard is not judged

function showPlace(now) {
  const label = { 1: ", labelled success", 0: ", labelled none", x: ", labelled none (excluded)" }[now?.label] ?? "";
  $("where").textContent = about.live
    ? (held ? `stopped at ${at.frame}, ${held.indexOf(at.frame) + 1} of the last ${held.length}` : `${rate()} a second`)
    : `episode ${at.episode}, frame ${at.frame} of ${(episodes[at.episode]?.observations ?? 1) - 1}${label}`;
  $("play").innerHTML = `<kbd>space</kbd> ${about.live ? (held ? "go on" : "stop") : (playing ? "stop" : "play")}`;
}

const marked = (place) => queue.marks.some((mark) => String(mark.place) === String(place));
const here = () => (about.live ? at.frame : [at.episode, at.frame]);
const unsaid = (now) => !now || (about.live && now.allowed === null && guarded !== "");

function showMark(now) {
  const said = now && now.p > about.threshold;
  $("mark-says").textContent = !now ? "not judged yet" : marked(here()) ? "marked as wrong"
    : unsaid(now) ? "needs the arm, whose state goes with a frame"
      : said ? "wrong: this is no success" : "wrong: this is a success";
  $("mark").disabled = !now || marked(here()) || unsaid(now);
  const agrees = now?.label === (said ? "1" : "0");
  $("note").textContent = agrees
    ? "Its label in the dataset agrees with the classifier: if both are wrong, mend the label with label.py as well." : "";
  $("note").hidden = !agrees;
  $("undo").disabled = !queue.marks.length;
  $("count").textContent = queue.marks.length ? `${plural(queue.marks.length, "frame")} marked` : "";
  $("queue").textContent = queue.marks.length
    ? `They lie in ${queue.folder}, each with its truth as label. To train with them:`
    : `A frame that is marked goes to ${queue.folder}, with the truth as its label, for the next training.`;
  $("retrain").textContent = queue.retrain;
  $("retrain").hidden = !queue.marks.length;
}

function fill(table, lines, tag = "td") {
  table.replaceChildren(...lines.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((cell) => {
      const [text, kind] = Array.isArray(cell) ? cell : [cell, ""];
      return Object.assign(document.createElement(lines.length > 3 && cells === lines[0] ? "th" : tag),
        { textContent: text, className: kind });
    }));
    return row;
  }));
}

function across(series, width) { // the x of a point, and how wide one is
  const all = about.live ? about.points : Math.max(2, series.length);
  const each = width / all;
  return [(i) => (about.live ? width - (series.length - i) * each : i * each), each];
}

function drawHistory(series, index) {
  const [pen, width, height] = fit($("history"));
  const [x, each] = across(series, width);
  const top = 8, bottom = height - (about.live ? 16 : 26);
  const y = (p) => bottom - (bottom - top) * p;
  rows(series, threshold).forEach((row, i) => {
    if (row < about.consecutive) return;
    pen.fillStyle = "#dff1e6";
    pen.fillRect(x(i), top, each + 0.5, bottom - top);
  });
  series.forEach(({ allowed, label }, i) => {
    if (allowed === false) {
      pen.fillStyle = colour("--excluded");
      pen.fillRect(x(i), bottom + 3, each + 0.5, 4);
    }
    if (label) {
      pen.fillStyle = colour({ 1: "--success", 0: "--failure", x: "--excluded" }[label] ?? "--unlabelled");
      pen.fillRect(x(i), bottom + 10, each + 0.5, 7);
    }
  });
  const limit = (p, style, dash) => {
    pen.strokeStyle = style;
    pen.lineWidth = 1.5;
    pen.setLineDash(dash);
    pen.beginPath();
    pen.moveTo(0, y(p));
    pen.lineTo(width, y(p));
    pen.stroke();
    pen.setLineDash([]);
  };
  limit(about.threshold, colour("--ink"), [5, 4]);
  if (threshold !== about.threshold) limit(threshold, colour("--blue"), [2, 3]);
  pen.strokeStyle = colour("--blue");
  pen.lineWidth = 2;
  pen.beginPath();
  series.forEach(({ p }, i) => pen.lineTo(x(i) + each / 2, y(p)));
  pen.stroke();
  if (index >= 0) {
    pen.fillStyle = "rgb(31 35 40 / 55%)";
    pen.fillRect(x(index) + each / 2 - 1, 0, 2, height);
  }
  pen.fillStyle = "#8250df";
  series.forEach(({ frame }, i) => {
    if (!marked(about.live ? frame : [at.episode, frame])) return;
    const middle = x(i) + each / 2;
    pen.beginPath();
    pen.moveTo(middle - 5, height - 1);
    pen.lineTo(middle + 5, height - 1);
    pen.lineTo(middle, height - 10);
    pen.fill();
  });
}

function drawEpisodes() {
  if (about.live) return;
  const nav = $("episodes");
  while (nav.children.length < episodes.length) {
    const entry = document.createElement("div");
    entry.innerHTML = '<div><b></b><span class="state"></span><span class="length"></span></div>';
    const index = nav.children.length;
    entry.onclick = () => go(index, 0);
    nav.append(entry);
  }
  episodes.forEach((episode, index) => {
    const [number, state, length] = nav.children[index].firstChild.children;
    nav.children[index].className = `episode${index === at.episode ? " current" : ""}`;
    number.textContent = index;
    state.textContent = outcome(index);
    state.title = `label: ${episode.text}`;
    nav.children[index].classList.toggle("wrong", /false|missed/.test(state.textContent));
    length.textContent = episode.observations;
  });
}

/** What the classifier makes of an episode at the moved threshold, beside its label. */
function outcome(index) {
  const answer = judged.get(index);
  if (!answer) return "…";
  if (answer.error) return "cannot be read";
  const series = answer.probability.map((p, i) => ({ p, allowed: answer.allowed[i] === "1", counted: true }));
  const fires = rows(series, threshold).findIndex((row) => row >= about.consecutive);
  const labels = episodes[index].frames;
  const start = labels.indexOf("1");
  if (!/[01]/.test(labels)) return fires < 0 ? "no success" : `success at ${fires}`;
  if (start < 0) return fires < 0 ? "none, rightly" : `false success at ${fires}`;
  return fires < 0 ? "missed" : fires < start - 2 ? `false success at ${fires}` : `found at ${fires}`;
}

const SCORES = [
  ["precision of frames", "precision", 1], ["recall of frames", "recall", 1], ["accuracy of frames", "accuracy", 1],
  ["episodes, false success", "false_episodes", -1], ["episodes, missed", "missed_episodes", -1],
];

let asked = 0;

async function scores() {
  const mine = ++asked;
  await new Promise((done) => setTimeout(done, SETTLE_MS));
  if (mine !== asked) return;
  try {
    const found = await ask(`api/scores?threshold=${threshold}`);
    if (mine !== asked) return;
    const shown = (value, whole) => (value === null ? "–" : whole ? `${value}` : `${(100 * value).toFixed(1)} %`);
    fill($("scores"), [["", "stored", "moved"], ...(found.stored ? SCORES : []).map(([title, key, sign]) => {
      const [a, b] = [found.stored[key], found.moved[key]];
      const gain = sign * ((b ?? 0) - (a ?? 0));
      return [title, shown(a, sign < 0), [shown(b, sign < 0), gain > 0 ? "better" : gain < 0 ? "worse" : ""]];
    })]);
    $("scores-of").textContent = found.frames
      ? `over ${plural(found.frames, "labelled frame")} of ${plural(found.episodes, "episode")}`
        + (waiting ? `; ${waiting} more to be judged` : "")
      : waiting ? `${plural(waiting, "episode")} to be judged` : "no episode is labelled, so nothing can be said";
  } catch (error) {
    $("scores-of").textContent = error.message;
  }
}

function showLiveScores(series) {
  const counts = [about.threshold, threshold].map((limit) => {
    const row = rows(series, limit);
    const wins = row.filter((value, i) => value >= about.consecutive && (row[i - 1] ?? 0) < about.consecutive);
    return [series.filter(({ p }) => p > limit).length, wins.length];
  });
  fill($("scores"), [
    ["", "stored", "moved"], ["looks above it", counts[0][0], counts[1][0]],
    ["successes by vote", counts[0][1], counts[1][1]], ["looks in all", series.length, series.length],
  ]);
  $("scores-of").textContent = `on the curve; the vote counts ${about.fps} looks a second, as in a run`;
}

// ---- a dataset

function go(episode, frame) {
  if (!episodes.length) return;
  episode = Math.max(0, Math.min(episodes.length - 1, episode));
  frame = Math.max(0, Math.min(episodes[episode].observations - 1, frame));
  const other = episode !== at.episode;
  at = { episode, frame };
  history.replaceState(null, "", `#${episode}/${frame}`);
  if (other) drawEpisodes();
  show();
  const painted = paint({ ...at });
  for (let i = 1; i <= AHEAD; i++) {
    if (frame + i >= episodes[episode].observations) break;
    for (const camera of about.cameras) {
      for (const kind of ["frame", "view"]) picture(kind, camera, { episode, frame: frame + i }).catch(() => {});
    }
  }
  return painted;
}

async function play() {
  const mine = {};
  playing = playing ? null : mine;
  if (playing && at.frame === episodes[at.episode].observations - 1) await go(at.episode, 0);
  show();
  while (playing === mine && at.frame < episodes[at.episode].observations - 1) {
    const began = performance.now();
    await go(at.episode, at.frame + 1);
    await new Promise((done) => setTimeout(done, began + SPEED_MS / about.fps - performance.now()));
  }
  if (playing === mine) playing = null;
  show();
}

async function poll() {
  while (!over) {
    try {
      const answer = await ask("api/episodes");
      episodes = answer.episodes;
      if (answer.problem) trouble(answer.problem);
      const more = await ask(`api/judged?first=${at.episode}&since=${heard}`);
      for (const one of more.judged) judged.set(one.episode, one);
      heard += more.judged.length;
      if (more.judged.length || more.waiting !== waiting) {
        waiting = more.waiting;
        drawEpisodes();
        show();
        scores();
      }
    } catch (error) {
      trouble(`The program does not answer: it has ended, or the tunnel is down. (${error.message})`);
    }
    await new Promise((done) => setTimeout(done, POLL_MS));
  }
}

// ---- a live camera

const times = []; // ms at which the last looks came

function rate() {
  const span = times.length > 1 ? (times.at(-1) - times[0]) / 1000 : 0;
  return span ? Math.round((times.length - 1) / span) : 0;
}

async function follow() {
  while (!over) {
    try {
      const reader = (await fetch("api/live")).body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const lines = (text + value).split("\n");
        text = lines.pop();
        lines.forEach((line) => take(JSON.parse(line)));
      }
    } catch (error) {
      if (!over) trouble(`The program does not answer: it has ended, or the tunnel is down. (${error.message})`);
    }
    if (!over) await new Promise((done) => setTimeout(done, AGAIN_MS));
  }
}

function take(line) {
  if (line.over) {
    over = true;
    trouble("The program has ended; what it printed last is in its terminal.");
    return;
  }
  if (line.cameras) {
    if (held) return;
    at = { episode: 0, frame: line.number };
    paint(at, line);
    show();
    return;
  }
  guarded = line.guarded;
  trouble(line.trouble);
  for (const [frame, p, allowed, counted] of line.passed) {
    looks.push({ frame, p, allowed, counted });
    times.push(performance.now());
  }
  looks = looks.slice(-about.points);
  times.splice(0, times.length - 60);
  if (held) show();
}

async function stop(where) {
  try {
    const answer = await post("api/hold", { on: !held || where !== undefined });
    held = answer.held.length ? answer.held : null;
    if (held) step(where === undefined ? 0 : where - at.frame);
  } catch (error) {
    trouble(error.message);
  }
  show();
}

function step(by) {
  const place = held.reduce((near, frame) => (Math.abs(frame - at.frame - by) < Math.abs(near - at.frame - by) ? frame : near));
  at = { episode: 0, frame: place };
  show();
  paint(at);
}

// ---- what the person does

async function mark() {
  const now = points().find(({ frame }) => frame === at.frame);
  if ($("mark").disabled) return;
  const place = about.live ? { frame: at.frame } : { ...at };
  const success = !(now.p > about.threshold);
  $("mark").disabled = true; // until it is on the disk
  try {
    queue = await post("api/mark", { ...place, success });
    const judges = about.held_out?.includes(at.episode) ? " Its episode is held out to judge by, so a training with the same reward.seed leaves it out." : "";
    $("said").textContent = `Queued, to be learned as ${success ? "a success" : "no success"}.${judges}`;
    trouble("");
  } catch (error) {
    trouble(`Not marked: ${error.message}`);
  }
  show();
}

async function undo() {
  try {
    queue = await post("api/undo", {});
    $("said").textContent = "Taken back: its label says skip.";
  } catch (error) {
    trouble(error.message);
  }
  show();
}

function move(value) {
  threshold = Math.abs(value - about.threshold) < 0.0026 ? about.threshold : value; // the slider's steps miss it
  show();
  if (about.live) return;
  drawEpisodes();
  scores();
}

document.addEventListener("keydown", (down) => {
  if (down.ctrlKey || down.metaKey || down.altKey || !about) return;
  if (down.target.id === "threshold" && /Arrow|Home|End/.test(down.key)) return;
  const far = down.shiftKey ? 10 : 1;
  const by = { ArrowLeft: -far, ArrowRight: far }[down.key];
  if (down.key === "w") mark();
  else if (down.key === "u") undo();
  else if (down.key === " ") about.live ? stop() : play();
  else if (by && about.live) { if (held) step(by); } else if (by) go(at.episode, at.frame + by);
  else if (about.live) return;
  else if (down.key === "ArrowDown") go(at.episode + 1, 0);
  else if (down.key === "ArrowUp") go(at.episode - 1, 0);
  else if (down.key === "Home") go(at.episode, 0);
  else if (down.key === "End") go(at.episode, Infinity);
  else return;
  down.preventDefault();
});

$("history").addEventListener("pointerdown", seek);
$("history").addEventListener("pointermove", (move) => { if (move.buttons === 1) seek(move); });

function seek(event) {
  const series = points();
  const box = $("history").getBoundingClientRect();
  const [x, each] = across(series, box.width);
  const i = Math.floor((event.clientX - box.left - x(0)) / each);
  if (!series[i]) return;
  if (!about.live) go(at.episode, series[i].frame);
  else if (held) step(series[i].frame - at.frame);
  else stop(series[i].frame);
}

$("play").onclick = () => { about.live ? stop() : play(); $("play").blur(); };
$("mark").onclick = () => { mark(); $("mark").blur(); };
$("undo").onclick = () => { undo(); $("undo").blur(); };
$("threshold").oninput = () => move(Number($("threshold").value));
$("threshold").ondblclick = () => { $("threshold").value = about.threshold; move(about.threshold); };
window.addEventListener("resize", () => about && show());

async function begin() {
  try {
    [about, queue] = await Promise.all([ask("api/about"), ask("api/queue")]);
  } catch (error) {
    trouble(error.message);
    return;
  }
  document.body.classList.toggle("live", about.live);
  document.title = `preview ${about.classifier}`;
  $("name").textContent = about.classifier;
  $("source").textContent = about.live ? `live: ${about.source}` : `on ${about.source}`;
  $("legend-labels").hidden = about.live;
  $("keys").innerHTML = about.live ? "<kbd>&larr;</kbd> <kbd>&rarr;</kbd> look back while stopped"
    : "<kbd>&larr;</kbd> <kbd>&rarr;</kbd> frame, with <kbd>Shift</kbd> 10 &nbsp; <kbd>&uarr;</kbd> <kbd>&darr;</kbd> episode";
  for (const parent of ["frames", "views"]) {
    $(parent).replaceChildren(...about.cameras.map(() => document.createElement("canvas")));
  }
  threshold = about.threshold;
  $("threshold").value = threshold;
  $("bar-stored").style.left = `${100 * threshold}%`;
  if (about.live) {
    follow();
    return;
  }
  episodes = (await ask("api/episodes")).episodes;
  const [, episode, frame] = location.hash.match(/^#(\d+)\/(\d+)$/) ?? [0, 0, 0];
  at.episode = -1;
  go(Number(episode), Number(frame));
  poll();
}

begin();
