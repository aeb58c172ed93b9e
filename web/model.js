// What an ONNX file of captioner's says of itself, and how its numbers become words.

const FORMAT = "captioner onnx 1";
const METADATA = 14; // the field metadata_props of ModelProto, in onnx.proto
const CLITICS = new Set(["'s", "'re", "'ve", "'ll", "'d", "'m", "n't", "'"]);

// The fields of a protobuf message: [number, bytes or null].
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let factor = 1; at < bytes.length; factor *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
    throw new Error("it ends too early");
  };
  while (at < bytes.length) {
    const key = varint();
    const [number, kind] = [Math.floor(key / 8), key % 8];
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const length = varint();
      yield [number, bytes.subarray(at, at + length)];
      at += length;
    } else throw new Error("it is no ONNX file");
  }
}

function metadata(bytes) {
  const text = new TextDecoder();
  const found = {};
  for (const [number, content] of fields(bytes)) {
    if (number !== METADATA) continue;
    const [[, key], [, value]] = fields(content);
    found[text.decode(key)] = text.decode(value);
  }
  return found;
}

export function about(bytes) {
  const stored = metadata(bytes);
  if (stored.format !== FORMAT) throw new Error("it is not a model of captioner's");
  return JSON.parse(stored.captioner);
}

function sentence(words) {
  return words.reduce((text, word) => text + (text && !CLITICS.has(word) ? " " : "") + word, "");
}

// The best caption and the tags of the first image of a session's outputs.
export function described(outputs, { vocabulary, tags, tag_scoring: scoring }) {
  const length = Number(outputs.lengths.data[0]);
  const ids = Array.from(outputs.tokens.data.slice(0, length), Number);
  const words = ids.map((id) => vocabulary[id]);
  const cells = outputs.attention?.dims[3];
  const attention = words.map((_, i) =>
    cells ? outputs.attention.data.slice(i * cells, (i + 1) * cells) : null,
  );
  const scores = outputs.tag_scores.data;
  const given = tags
    .map((name, i) => ({ name, score: scores[i] }))
    .filter(({ score }) => score > 0 && score >= (scoring?.threshold ?? 0))
    .sort((a, b) => b.score - a.score);
  return {
    caption: sentence(words),
    logProb: outputs.log_probs.data[0],
    // Each as it stands in the sentence: a clitic has no space before it.
    words: words.map((word, i) => ({
      text: i && !CLITICS.has(word) ? ` ${word}` : word,
      attention: attention[i],
    })),
    tags: given,
  };
}

