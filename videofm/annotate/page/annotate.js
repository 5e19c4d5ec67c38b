// The desk of an annotator. The server knows everything; this page shows what it says, plays two videos in step, and does not go on
// before a vote is on the server's disk.
"use strict";

const byId = (id) => document.getElementById(id);
const videos = [byId("video-left"), byId("video-right")];
const figures = videos.map((video) => video.parentElement);
const choiceButtons = [...document.querySelectorAll("[data-choice]")];
const undoButtons = [...document.querySelectorAll(".undo")];
const calm = matchMedia("(prefers-reduced-motion: reduce)");

const WORDS = { left: "Voted: left is better.", right: "Voted: right is better.", tie: "Voted: equally good.", both_bad: "Voted: both bad.",
  skip: "Skipped." };
const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 3: "tie", ArrowDown: "tie", 4: "both_bad", s: "skip" };
const TOOLS = { r: replay, p: togglePause, u: undo };
const HOLD = 350; // milliseconds on the last frame before both begin again
const APART = 0.1; // seconds that long videos may be apart

let state = null; // what the server said last; the page is of the annotator in it, and becomes another's only where a name is said
let waiting = false; // for an answer of the server
let ready = new Set(); // videos whose first frame is there
let failed = new Set(); // videos that cannot be had just now
let ended = new Set(); // videos that are at their end
let paused = false; // nothing plays until it is asked for
let hold = 0; // timer of the next loop
let showing = 0; // counts what was put on the desk, so that what belongs to an earlier pair is seen

// -- talking to the server

class Refusal extends Error {}

function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "content-type": "application/json", "x-videofm-change": state.change },
    body: JSON.stringify(body),
  };
  const response = await fetch(path, { ...options, credentials: "same-origin", cache: "no-store" });
  const text = await response.text();
  let found = null;
  try { found = JSON.parse(text); } catch { found = { error: text.trim() || `the server answered with ${response.status}` }; }
  if (response.ok) return found;
  if (response.status >= 500) throw new Error(found.error);
  throw new Refusal(found.error);
}

// Sends until the server has answered: the id in `body` makes a second arrival harmless.
async function askUntilAnswered(path, body) {
  for (let pause = 1000; ; pause = Math.min(2 * pause, 10000)) {
    try {
      const found = await ask(path, body);
      tellProblem("");
      return found;
    } catch (error) {
      if (error instanceof Refusal) throw error;
      tellProblem(`Not saved yet: ${error.message}. Trying again; keep this page open.`);
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }
}

async function change(path, body, words) {
  if (waiting) return;
  waiting = true;
  enable();
  const before = state.annotator;
  try {
    state = { ...state, ...await askUntilAnswered(path, { ...body, annotator: before, client_id: randomId() }) };
    tellProblem("");
    show(words);
  } catch (error) {
    tellProblem(`${error.message}.`);
    try { takeOver(await ask("/api/state"), before); show(""); } catch { /* the reason stands there already */ }
  } finally {
    waiting = false;
    enable();
  }
}

// A browser has one name for all its windows. Where it is not the one that this page is of, the page asks, and takes no vote until
// a name is said in it: going on would put the votes of one person under the name of another.
function takeOver(found, annotator) {
  state = found.annotator !== null && found.annotator === annotator ? found : nobodys(found);
}

function nobodys(found) {
  return { change: found.change, names: found.names, annotator: null, pair: null };
}

// The name in the address as the server keeps it; null where there is none.
function nameInAddress() {
  const name = new URLSearchParams(location.search).get("annotator");
  return name === null ? null : name.trim().split(/\s+/).join(" ").normalize("NFC");
}

// -- showing what it said

function show(words) {
  const named = state.annotator !== null;
  byId("ask").hidden = named;
  byId("desk").hidden = !named || state.pair === null;
  byId("done").hidden = !named || state.pair !== null;
  byId("how-far").hidden = byId("who").hidden = !named;
  if (!named) return askForName();
  byId("annotator").textContent = state.annotator;
  byId("bar").max = Math.max(state.num_pairs, 1);
  byId("bar").value = state.num_done;
  byId("count").textContent = `${state.num_done} of ${state.num_pairs}`;
  history.replaceState(null, "", `/?annotator=${encodeURIComponent(state.annotator)}`);
  if (state.pair === null) {
    stop();
    byId("done-text").textContent = `${state.annotator}, these were all ${state.num_done} pairs for you. Thank you.`;
    say(`${words} Nothing is left.`);
    byId("done-title").focus();
    return;
  }
  const place = `Pair ${state.num_done + 1} of ${state.num_pairs}`;
  say(`${words} ${place}.`, state.pair.prompt);
  byId("prompt").textContent = state.pair.prompt;
  showAxes();
  load();
}

function askForName() {
  stop();
  say("");
  const given = nameInAddress();
  byId("name-form").hidden = state.names.length > 0;
  byId("names").hidden = state.names.length === 0;
  byId("names").replaceChildren(...state.names.map((name) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => beginAs(name));
    return button;
  }));
  if (given !== null && byId("name").value === "") byId("name").value = given;
  (state.names.length ? byId("ask-title") : byId("name")).focus();
}

/** Where a screen reader goes on, without the ring that says "you came here by Tab". */
function focusPrompt() {
  const prompt = byId("prompt");
  prompt.classList.add("led");
  prompt.addEventListener("blur", () => prompt.classList.remove("led"), { once: true });
  prompt.focus();
}

function beginAs(name) {
  change("/api/name", { name }, `Hello ${name}.`).then(() => {
    if (state.annotator !== null && state.pair !== null) focusPrompt();
  });
}

function showAxes() {
  const inside = byId("axes").contains(document.activeElement);
  byId("axes").hidden = state.axes.length === 0;
  byId("axes").replaceChildren(...state.axes.map((axis) => {
    const set = document.createElement("fieldset");
    const legend = document.createElement("legend");
    const row = document.createElement("div");
    legend.textContent = axis.label;
    row.className = "thirds";
    row.append(...[["left", "Left"], ["tie", "Same"], ["right", "Right"]].map(([value, word]) => {
      const label = document.createElement("label");
      const input = document.createElement("input");
      Object.assign(input, { type: "radio", name: `axis-${axis.name}`, value });
      label.append(input, word);
      return label;
    }));
    set.append(legend, row);
    return set;
  }));
  if (inside) byId("axes").querySelector("input").focus(); // who votes by key from here goes on here
  document.documentElement.style.setProperty("--around", state.axes.length ? "460px" : "370px");
}

// In the live region; `unseen` is for those who listen, others have it before their eyes.
function say(text, unseen = "") {
  const more = document.createElement("span");
  more.className = "unseen";
  more.textContent = ` ${unseen}`;
  byId("said").replaceChildren(text.trim(), more);
}

function tellProblem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = text === "";
}

function enable() {
  const seen = !waiting && ready.size === 2;
  byId("videos").classList.toggle("loading", !seen);
  for (const button of choiceButtons) {
    const can = button.dataset.choice === "skip" ? !waiting : seen;
    button.setAttribute("aria-disabled", String(!can));
  }
  byId("replay").setAttribute("aria-disabled", String(!seen && failed.size === 0));
  for (const button of undoButtons) button.setAttribute("aria-disabled", String(waiting || !state || !state.can_undo));
  document.body.dataset.ready = String(seen && state !== null && state.pair !== null);
}

// -- two videos in step

function load() {
  begin();
  if (calm.matches) setPaused(true);
  for (const element of [...choiceButtons, ...figures]) element.classList.remove("chosen");
  document.body.dataset.loops = "0";
  videos.forEach((video, index) => {
    video.src = state.pair.videos[index];
    video.load();
  });
  enable();
}

function stop() {
  begin();
  for (const video of videos) {
    video.pause();
    video.removeAttribute("src");
    video.load();
  }
  enable();
}

// Nothing is known of what is on the desk next.
function begin() {
  showing += 1;
  ready = new Set();
  failed = new Set();
  ended = new Set();
  clearTimeout(hold);
}

// Both from their first frame, when both are there.
async function restart() {
  const mine = showing;
  ended = new Set();
  clearTimeout(hold);
  await Promise.all(videos.map((video) => {
    video.pause();
    if (video.currentTime === 0) return null;
    return new Promise((resolve) => {
      video.addEventListener("seeked", resolve, { once: true });
      video.currentTime = 0;
    });
  }));
  if (mine === showing && !paused) play();
}

// Those that are not at their end: there one waits for the other.
function play() {
  for (const video of videos) {
    if (video.ended) continue;
    video.play().catch((error) => { if (error.name === "NotAllowedError") setPaused(true); }); // a browser that plays nothing unasked
  }
}

function setPaused(value) {
  paused = value;
  byId("pause").setAttribute("aria-pressed", String(paused));
}

// Both stop at the time of the one that is behind.
function pause() {
  clearTimeout(hold);
  for (const video of videos) video.pause();
  const running = videos.filter((video) => !video.ended);
  const at = Math.min(...running.map((video) => video.currentTime));
  for (const video of running) if (video.currentTime !== at) video.currentTime = at;
}

async function resume() {
  const mine = showing;
  if (videos.every((video) => video.ended)) return restart();
  await Promise.all(videos.filter((video) => video.seeking).map((video) => (
    new Promise((resolve) => { video.addEventListener("seeked", resolve, { once: true }); })
  )));
  if (mine === showing && !paused) play();
}

videos.forEach((video, index) => {
  video.addEventListener("loadeddata", () => {
    if (state === null || state.pair === null || !video.currentSrc.endsWith(state.pair.videos[index])) return;
    ready.add(index);
    video.classList.toggle("tiny", video.videoWidth <= 128);
    if (ready.size < 2) return;
    const wide = videos[0].videoWidth / videos[0].videoHeight >= videos[1].videoWidth / videos[1].videoHeight ? videos[0] : videos[1];
    byId("desk").style.setProperty("--ratio", String(wide.videoWidth / wide.videoHeight));
    enable();
    if (!paused) restart();
  });
  video.addEventListener("ended", () => {
    ended.add(index);
    if (ended.size < 2) return; // the shorter one waits on its last frame
    document.body.dataset.loops = String(Number(document.body.dataset.loops) + 1);
    if (calm.matches) setPaused(true);
    if (!paused) hold = setTimeout(restart, HOLD);
  });
  video.addEventListener("error", () => {
    if (!video.getAttribute("src") || state === null || state.pair === null) return;
    ready.delete(index);
    failed.add(index);
    tellProblem(`The ${index ? "right" : "left"} video cannot be played. Skip this pair, or try again with Replay; where that does `
      + "not help, the one who runs the server finds why in its log.");
    enable();
  });
});

function keepTogether() {
  const [left, right] = videos;
  const both = !left.paused && !right.paused && !left.seeking && !right.seeking && !left.ended && !right.ended;
  if (both && Math.min(left.duration, right.duration) > 2 && Math.abs(left.currentTime - right.currentTime) > APART) {
    right.currentTime = left.currentTime;
  }
  requestAnimationFrame(keepTogether);
}

// -- what people do

function vote(choice) {
  const button = choiceButtons.find((one) => one.dataset.choice === choice);
  if (waiting || state === null || state.pair === null || button.getAttribute("aria-disabled") === "true") return;
  const axes = {};
  for (const input of byId("axes").querySelectorAll("input:checked")) axes[input.name.slice("axis-".length)] = input.value;
  button.classList.add("chosen");
  if (choice === "left" || choice === "right") figures[choice === "left" ? 0 : 1].classList.add("chosen");
  change("/api/vote", { pair: state.pair.id, choice, axes }, WORDS[choice]);
}

function undo() {
  if (!waiting && state !== null && state.can_undo) {
    const wasDone = state.pair === null;
    change("/api/undo", {}, "Undone. The same pair again.").then(() => { if (wasDone && state.pair !== null) focusPrompt(); });
  }
}

// From the first frame; a video that could not be had is asked for again.
function replay() {
  if (failed.size > 0 && !waiting) {
    tellProblem("");
    const again = videos.filter((video, index) => failed.has(index));
    failed = new Set();
    for (const video of again) video.load();
    enable();
  } else if (ready.size === 2) {
    setPaused(false);
    restart();
  }
}

function togglePause() {
  if (state.pair === null) return;
  setPaused(!paused);
  say(paused ? "Paused. Pause again, and it plays on." : "Playing.");
  if (ready.size < 2) return; // they start when both are there, unless paused
  if (paused) pause();
  else resume();
}

// The second click of a double click would fall on the next pair; clicks of the keyboard count 0.
for (const button of choiceButtons) button.addEventListener("click", (event) => { if (event.detail < 2) vote(button.dataset.choice); });
for (const button of undoButtons) button.addEventListener("click", (event) => { if (event.detail < 2) undo(); });
byId("replay").addEventListener("click", replay);
byId("pause").addEventListener("click", togglePause);
byId("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  beginAs(byId("name").value);
});
byId("change").addEventListener("click", () => {
  if (waiting) return; // its answer would bring the old name back
  history.replaceState(null, "", "/?annotator="); // to load the page again asks as well
  byId("name").value = "";
  state = nobodys(state);
  show("");
});

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || state === null || state.annotator === null) return;
  const inRadio = event.target instanceof HTMLInputElement;
  if (inRadio && event.target.type !== "radio") return;
  if (inRadio && event.key.startsWith("Arrow")) return; // the arrows choose there
  const prompt = byId("prompt");
  if (event.target === prompt && prompt.scrollHeight > prompt.clientHeight && ["ArrowDown", "ArrowUp"].includes(event.key)) return; // they scroll it
  if (event.key === "ArrowDown" && tall()) return; // it scrolls the page
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const choice = KEYS[key];
  const tool = TOOLS[key];
  if (choice === undefined && tool === undefined) return;
  event.preventDefault();
  if (choice !== undefined) vote(choice);
  else tool();
});

function tall() {
  return document.scrollingElement.scrollHeight > document.documentElement.clientHeight;
}

(async () => {
  try {
    const found = await ask("/api/state");
    takeOver(found, nameInAddress() ?? found.annotator); // another window may have been quicker to change the name
    show("");
  } catch (error) {
    tellProblem(`${error.message}.`);
  }
  requestAnimationFrame(keepTogether);
})();
