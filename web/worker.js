// Loads the model and describes photographs, beside the page so that this stays quick.
import * as ort from "./ort.wasm.min.mjs";
import { about, described } from "./model.js";
import { decode, resample } from "./pixels.js";

ort.env.wasm.wasmPaths = new URL(".", import.meta.url).href;
// More threads need a server that isolates the page from others (COOP and COEP).
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 4) : 1;

let model;

async function download(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  const total = Number(answer.headers.get("Content-Length")) || 0;
  const parts = [];
  let loaded = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    loaded += value.length;
    postMessage({ kind: "progress", loaded, total });
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function load() {
  const bytes = await download("model.onnx");
  const facts = about(bytes);
  postMessage({ kind: "starting" });
  const session = await ort.InferenceSession.create(bytes, {
    executionProviders: ["wasm"],
    // The int8 weights become floats once, here, and not at every call.
    extra: { session: { disable_quant_qdq: "1" } },
  });
  postMessage({ kind: "ready", fit: facts.preprocessing.fit });
  return { session, facts };
}

async function describe(file) {
  const { session, facts } = await model;
  const { data, width, height } = await decode(file).catch(() => {
    throw new Error("not a picture that this browser can read");
  });
  const { size } = facts.preprocessing;
  const pixels = resample(data, width, height, facts.preprocessing);
  const input = new ort.Tensor("uint8", pixels, [1, 3, size, size]);
  return described(await session.run({ pixels: input }), facts);
}

model = load();
model.catch((error) => postMessage({ kind: "failed", reason: String(error.message ?? error) }));

let turn = model.catch(() => {});
self.addEventListener("message", ({ data: { id, file } }) => {
  // One photograph after the other: the session takes one call at a time.
  turn = turn.then(async () => {
    try {
      postMessage({ kind: "described", id, ...(await describe(file)) });
    } catch (error) {
      postMessage({ kind: "unread", id, reason: String(error.message ?? error) });
    }
  });
});
