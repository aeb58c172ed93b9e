
"use strict";
const find = (id) => document.getElementById(id);
const main = find("cards");
const cards = Array.from(main.children, (element) => ({
  element,
  place: Number(element.dataset.place),
  confidence: Number(element.dataset.confidence ?? -1),
  failed: element.classList.contains("error"),
  tags: Array.from(element.querySelectorAll("[data-tag]"), (tag) => tag.dataset.tag),
  text: element.textContent.toLowerCase(),
}));

const counts = new Map();
for (const card of cards) for (const tag of card.tags) counts.set(tag, (counts.get(tag) ?? 0) + 1);
for (const [tag, count] of [...counts].sort((a, b) => b[1] - a[1])) {
  const option = document.createElement("option");
  option.value = tag;
  option.label = `${tag} (${count})`;
  find("tags").append(option);
}

// Photographs are decoded only when they come near.
const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) {
      target.src = target.dataset.src;
      near.unobserve(target);
    }
  }
}, { rootMargin: "800px" });
for (const image of main.querySelectorAll("img")) near.observe(image);

function filter() {
  const words = find("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const tag = find("tag").value.trim();
  const kind = find("kind").value;
  let shown = 0;
  for (const card of cards) {
    const visible = (kind === "all" || card.failed === (kind === "errors"))
      && (!tag || card.tags.includes(tag)) && words.every((word) => card.text.includes(word));
    card.element.hidden = !visible;
    shown += visible;
  }
  find("count").textContent = `${shown} of ${cards.length}`;
  find("none").hidden = shown > 0;
}

const orders = {
  found: (a, b) => a.place - b.place,
  sure: (a, b) => b.confidence - a.confidence || a.place - b.place,
  // Errors are last either way: nothing is known of them.
  unsure: (a, b) => a.failed - b.failed || a.confidence - b.confidence || a.place - b.place,
};

function sort() {
  cards.sort(orders[find("order").value]);
  main.append(...cards.map((card) => card.element));
}

for (const type of ["input", "change"]) {
  for (const id of ["text", "tag", "kind"]) find(id).addEventListener(type, filter);
  find("order").addEventListener(type, sort);
}
document.forms[0].addEventListener("submit", (event) => event.preventDefault());
main.addEventListener("click", (event) => {
  const tag = event.target.closest("[data-tag]");
  if (tag) {
    find("tag").value = find("tag").value === tag.dataset.tag ? "" : tag.dataset.tag;
    filter();
  }
});

function look(word) {
  const image = word.closest("article").querySelector("img");
  if (!image) return;
  forget(word);
  const weights = Uint8Array.from(atob(word.dataset.weights), (c) => c.charCodeAt(0));
  const side = Math.round(Math.sqrt(weights.length));
  const grid = new ImageData(side, side);
  weights.forEach((weight, cell) => grid.data.set([255, 90, 0, 0.85 * weight], 4 * cell));
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(grid, 0, 0);
  let { offsetLeft: left, offsetTop: top, clientWidth: width, clientHeight: height } = image;
  if (document.body.dataset.fit === "crop") {
    const square = Math.min(width, height);
    left += (width - square) / 2;
    top += (height - square) / 2;
    width = height = square;
  }
  for (const [name, value] of Object.entries({ left, top, width, height })) canvas.style[name] = `${value}px`;
  image.after(canvas);
}

function forget(word) {
  word.closest("article").querySelector("canvas")?.remove();
}

for (const [begin, end] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
  main.addEventListener(begin, ({ target }) => target.matches(".word") && look(target));
  main.addEventListener(end, ({ target }) => target.matches(".word") && forget(target));
}

function step(element, selector, by) {
  let next = element;
  do next = by > 0 ? next.nextElementSibling : next.previousElementSibling;
  while (next && !next.matches(selector));
  return next;
}

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  const typing = target.matches("input, select");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (key === "/" && !typing) {
    event.preventDefault();
    find("text").focus();
  } else if (key === "Escape" && target.matches("input")) {
    target.value = "";
    filter();
    target.blur();
  } else if (["ArrowDown", "ArrowUp"].includes(key) && !typing) {
    const here = target.closest("article");
    const visible = "article:not([hidden])";
    const next = here ? step(here, visible, key === "ArrowDown" ? 1 : -1) : main.querySelector(visible);
    if (next) {
      event.preventDefault();
      next.focus();
      next.scrollIntoView({ block: "nearest" });
    }
  } else if (["ArrowLeft", "ArrowRight"].includes(key) && !typing) {
    const here = target.closest("article");
    const next = target.matches(".word")
      ? step(target, ".word", key === "ArrowRight" ? 1 : -1) : here?.querySelector(".word");
    if (next) {
      event.preventDefault();
      next.focus();
    }
  }
});
filter();
