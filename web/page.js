// The page: takes photographs, and shows what the worker says of them. Names and captions are text.
const $ = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
const cards = new Map();
let fit = "squash";
let next = 0;

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

function tell(text, share) {
  $("status").textContent = text;
  if (share === undefined) $("progress").removeAttribute("value");
  else $("progress").value = share;
}

const told = {
  progress({ loaded, total }) {
    const of = total ? ` of ${megabytes(total)}` : "";
    tell(`Loading the model: ${megabytes(loaded)}${of}`, total ? loaded / total : undefined);
  },
  starting() {
    tell("Starting the model …");
  },
  ready(message) {
    fit = message.fit;
    $("loading").hidden = true;
    document.body.dataset.ready = "true";
  },
  failed({ reason }) {
    $("loading").classList.add("error");
    $("progress").hidden = true;
    $("status").textContent = `The model cannot be loaded: ${reason}`;
    for (const card of cards.values()) say(card, "", "error");
  },
  described(message) {
    show(cards.get(message.id), message);
  },
  unread({ id, reason }) {
    say(cards.get(id), reason, "error");
  },
};
worker.addEventListener("message", ({ data }) => told[data.kind](data));
worker.addEventListener("error", (event) => told.failed({ reason: event.message || "no worker" }));

function say(card, text, state) {
  card.dataset.state = state;
  card.querySelector(".caption").textContent = text;
}

function add(file) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  const image = card.querySelector("img");
  image.src = URL.createObjectURL(file);
  image.addEventListener("error", () => image.classList.add("broken"));
  card.querySelector(".name").textContent = file.name;
  say(card, "Looking …", "waiting");
  $("results").prepend(card);
  cards.set(next, card);
  worker.postMessage({ id: next++, file });
}

function show(card, { caption, words, tags }) {
  say(card, "", "done");
  card.querySelector("img").alt = caption;
  card.querySelector(".caption").append(...words.map((word) => wordOf(card, word)));
  card.querySelector(".tags").append(
    ...tags.map(({ name, score }) => {
      const tag = document.createElement("li");
      tag.textContent = name;
      tag.title = `${Math.round(100 * score)} %`;
      return tag;
    }),
  );
}

function wordOf(card, { text, attention }) {
  const word = document.createElement("span");
  word.textContent = text;
  if (attention) {
    word.tabIndex = 0;
    for (const kind of ["pointerenter", "focus"])
      word.addEventListener(kind, () => look(card, word, attention));
    for (const kind of ["pointerleave", "blur"]) word.addEventListener(kind, () => leave(card));
  }
  return word;
}

// Darken the photograph where the model did not look for a word.
function look(card, word, attention) {
  leave(card);
  word.classList.add("looked");
  const canvas = card.querySelector("canvas");
  const side = Math.sqrt(attention.length);
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  const cells = context.createImageData(side, side);
  const most = Math.max(...attention);
  attention.forEach((weight, i) => {
    cells.data[4 * i + 3] = 200 * (1 - weight / most);
  });
  context.putImageData(cells, 0, 0);
  canvas.classList.toggle("crop", fit === "crop");
  canvas.hidden = false;
}

function leave(card) {
  card.querySelector("canvas").hidden = true;
  for (const word of card.querySelectorAll(".looked")) word.classList.remove("looked");
}

$("files").addEventListener("change", (event) => {
  for (const file of event.target.files) add(file);
  event.target.value = "";
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
for (const kind of ["dragleave", "drop"])
  addEventListener(kind, () => $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  for (const file of event.dataTransfer.files) add(file);
});
addEventListener("paste", (event) => {
  for (const file of event.clipboardData.files) add(file);
});

navigator.serviceWorker?.register("offline.js").then(
  () => navigator.serviceWorker.ready.then(() => (document.body.dataset.offline = "true")),
  () => {}, // a browser that forbids it still captions, online
);
