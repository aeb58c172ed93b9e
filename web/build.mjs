// Puts the page together in one folder that any web server can serve as it is:
//     npm --prefix web run build -- ../default.onnx
import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const HERE = dirname(fileURLToPath(import.meta.url));
const OWN = ["index.html", "style.css", "page.js", "worker.js", "model.js", "pixels.js"];
const RUNTIME = ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"];

const [model, target = join(HERE, "dist")] = process.argv.slice(2);
if (!model) {
  console.error("build: which model? npm --prefix web run build -- FILE.onnx [FOLDER]");
  process.exit(2);
}

const folder = resolve(target);
const files = [
  ...OWN.map((name) => [join(HERE, name), name]),
  ...RUNTIME.map((name) => [join(HERE, "node_modules/onnxruntime-web/dist", name), name]),
  [resolve(model), "model.onnx"],
];
rmSync(folder, { recursive: true, force: true });
mkdirSync(folder, { recursive: true });
const hash = createHash("sha256");
for (const [source, name] of files) {
  copyFileSync(source, join(folder, name));
  hash.update(name).update(readFileSync(source));
}
// A page that was loaded once takes all files from one version of the page or from another.
const worker = readFileSync(join(HERE, "offline.js"), "utf8")
  .replace("VERSION", hash.digest("hex").slice(0, 16))
  .replace('["FILES"]', JSON.stringify([".", ...files.map(([, name]) => name)]));
writeFileSync(join(folder, "offline.js"), worker);
console.log(`${folder}: ${readdirSync(folder).length} files`);
