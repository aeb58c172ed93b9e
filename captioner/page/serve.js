"use strict";
const find = (id) => document.getElementById(id);

// As many requests as are sent at a time: enough for a batch, few enough to leave room for others.
const TOGETHER = 8;
const SIDE = 480; // of thumbnails, in pixels
const waiting = [];
const records = new Map(); // of each card that has an answer
const asking = new Set();

find("token").value = sessionStorage.getItem("token") ?? "";
fetch("health").then((answer) => answer.json()).then(({ token }) => {
  find("token-field").hidden = !token;
}).catch(() => {});

function make(name, className, text = "") {
  const element = document.createElement(name);
  element.className = className;
  // Names, captions and errors come from elsewhere: they are only ever text.
  element.textContent = text;
  return element;
}

function add(files) {
  const works = Array.from(files, prepare);
  find("cards").prepend(...works.map(({ card }) => card));
  waiting.push(...works);
  for (const work of works) {
    say(work, make("p", "state", "waiting"));
    next();
  }
}

function prepare(file) {
  const card = make("article", "");
  const photo = make("div", "photo");
  const said = make("div", "said");
  card.append(photo, said, make("p", "name", file.name));
  return { file, card, photo, said, stop: new AbortController() };
}

function say({ said }, ...elements) {
  said.replaceChildren(...elements);
  const done = records.size;
  const all = find("cards").children.length;
  find("count").textContent = all ? `${done} of ${all} done` : "";
  find("save").disabled = !done;
  find("clear").disabled = !all;
}

// One after the other: a photograph of 12 megapixels is 48 MB while it is decoded.
let drawing = Promise.resolve();
function draw({ file, photo, card }) {
  drawing = drawing.then(async () => {
    if (!card.isConnected) return;
    try {
      const whole = await createImageBitmap(file);
      const scale = Math.min(1, SIDE / Math.max(whole.width, whole.height));
      const canvas = document.createElement("canvas");
      canvas.width = Math.max(1, Math.round(whole.width * scale));
      canvas.height = Math.max(1, Math.round(whole.height * scale));
      const context = canvas.getContext("2d");
      context.imageSmoothingQuality = "high";
      context.drawImage(whole, 0, 0, canvas.width, canvas.height);
      whole.close();
      photo.replaceChildren(canvas);
    } catch {
      photo.replaceChildren(make("small", "", "no preview in this browser"));
    }
  });
}

async function next() {
  if (asking.size >= TOGETHER || !waiting.length) return;
  const work = waiting.shift();
  asking.add(work);
  try {
    if (work.card.isConnected) {
      draw(work);
      await describe(work);
    }
  } finally {
    asking.delete(work);
    next();
  }
}

async function describe(work) {
  say(work, make("p", "state", "looking at it"));
  let answer;
  let found;
  try {
    answer = await ask(work);
    found = await answer.json();
  } catch (error) {
    if (work.card.isConnected) fail(work, "The server does not answer.");
    return;
  }
  if (!work.card.isConnected) return;
  if (answer.status === 401) find("token-field").hidden = false;
  const record = found.records?.[0];
  if (!record) {
    fail(work, found.detail ?? `The server answered ${answer.status}.`);
    return;
  }
  records.set(work.card, record);
  if (record.error !== undefined) say(work, make("p", "why", record.error));
  else show(work, record);
}

async function ask(work) {
  for (;;) {
    const form = new FormData();
    form.append("images", work.file, work.file.name);
    const count = Number(find("captions").value);
    const query = new URLSearchParams({ num_captions: count, beam_size: Math.max(3, count) });
    const token = find("token").value;
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const { signal } = work.stop;
    const answer = await fetch(`v1/describe?${query}`, { method: "POST", body: form, headers, signal });
    if (answer.status !== 503) return answer;
    say(work, make("p", "state", "the server is busy; waiting"));
    const seconds = Number(answer.headers.get("Retry-After")) || 1;
    await new Promise((done) => setTimeout(done, 1000 * seconds));
    if (!work.card.isConnected) throw new Error("no longer wanted");
  }
}

function fail(work, why) {
  const again = make("button", "", "Try again");
  again.type = "button";
  again.addEventListener("click", () => {
    waiting.push(work);
    say(work, make("p", "state", "waiting"));
    next();
  });
  say(work, make("p", "why", why), again);
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

function show(work, record) {
  const caption = make("p", "caption", `${record.caption} `);
  if (record.confidence !== undefined) {
    const sure = make("small", "", percent(record.confidence));
    sure.title = "how probably the caption is right";
    caption.append(sure);
  }
  const parts = [caption];
  if (record.captions.length > 1) {
    const others = make("ol", "");
    others.start = 2;
    for (const { text } of record.captions.slice(1)) others.append(make("li", "", text));
    parts.push(others);
  }
  const tags = make("p", "tags");
  for (const { name, score } of record.tags) {
    const tag = make("span", "", `${name} `);
    tag.append(make("small", "", percent(score)));
    tags.append(tag);
  }
  parts.push(tags);
  if (record.truncated) parts.push(make("p", "why", "The file breaks off; its last rows are missing."));
  say(work, ...parts);
}

find("files").addEventListener("change", ({ target }) => {
  add(target.files);
  target.value = "";
});

async function entries(entry) {
  if (entry.isFile) {
    const file = await new Promise((done, failed) => entry.file(done, failed));
    return file.name.startsWith(".") ? [] : [file];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    // It gives a hundred at a time.
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) break;
    for (const inner of some) found.push(...(await entries(inner)));
  }
  // Of a folder only what looks like photographs; a file that is dropped itself is always tried.
  return found.filter((file) => file.type.startsWith("image/"));
}

document.addEventListener("drop", async (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  // Both lists are empty once this function has waited.
  const items = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.());
  const files = [...event.dataTransfer.files];
  if (items.length && items.every(Boolean)) {
    for (const item of items) add(await entries(item));
  } else {
    add(files);
  }
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("paste", ({ clipboardData }) => {
  add(clipboardData.files);
});

find("token").addEventListener("change", ({ target }) => sessionStorage.setItem("token", target.value));
find("options").addEventListener("submit", (event) => event.preventDefault());
find("clear").addEventListener("click", () => {
  waiting.length = 0;
  for (const work of asking) work.stop.abort();
  find("cards").replaceChildren();
  records.clear();
  say({ said: make("div", "") });
});
find("save").addEventListener("click", () => {
  const lines = [...find("cards").children].filter((card) => records.has(card))
    .map((card) => `${JSON.stringify(records.get(card))}\n`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = "captions.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
