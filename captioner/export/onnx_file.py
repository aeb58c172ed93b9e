"""One ONNX file from pixels to words: encoder, both searches, and all that reading it takes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import onnx
import torch
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor, nn

from captioner.data.vocabulary import UNSAID
from captioner.export.decoder import DecoderGraph
from captioner.export.graph import Graph, Value
from captioner.export.search import Found, Rules, search_nodes
from captioner.export.tags import tag_nodes
from captioner.files import replacing
from captioner.generation.captions import token_rules
from captioner.generation.options import SearchOptions
from captioner.model.checkpoint import Checkpoint, stored_tensors
from captioner.model.device import own_settings
from captioner.model.model import CaptionModel
from captioner.settings import ConfigError
from captioner.version import __version__

__all__ = ["FORMAT", "write_onnx"]

FORMAT = "captioner onnx 1"
"""What the metadata of such a file say that it is."""

_OPSET = 18
# Of the options, those that a graph cannot have.
_REFUSED = (
    "required", "groups", "diversity", "sample", "temperature", "top_k", "top_p", "seed",
)  # fmt: skip
_CONTRACT = {
    "pixels": "uint8 (B, 3, h, w): RGB, prepared as `preprocessing` says",
    "tokens": "int64 (B, n, P): ids of `vocabulary`, of which the first `lengths` count",
    "lengths": "int64 (B, n): words of each caption, best first",
    "log_probs": "float (B, n): natural logarithms; -inf where there are fewer captions",
    "finished": "bool (B, n): false where nothing satisfies the options",
    "word_log_probs": "float (B, n, P): the terms of log_probs, that of the end included",
    "attention": "float (B, n, P, N): where the model looked for each word, cells row by row",
    "tag_scores": "float (B, T): the probability, 0 to 1, of each of `tags`",
}


@own_settings()
@torch.no_grad()
def write_onnx(
    checkpoint: Checkpoint, path: Path, options: SearchOptions, storage: str = "int8"
) -> None:
    """Write a model with its search as one ONNX file.

    Args:
        checkpoint: The model, on the CPU and in float32.
        path: The file.
        options: The search, which the file fixes.
        storage: How weights are stored, as in :func:`captioner.model.checkpoint.save_checkpoint`.

    Raises:
        ConfigError: A graph cannot have one of the options, or the model does not know a word.
        OSError: The file cannot be written.
    """
    _check(options)
    graph = Graph(stored_tensors(checkpoint.model, storage))
    grid = _encoder_nodes(graph, checkpoint)
    outputs = _caption_nodes(graph, checkpoint, options, grid)
    scores = tag_nodes(graph, checkpoint, grid.value, grid.head)
    tags = len(checkpoint.tags.names)
    outputs.append(_output(graph, scores, "tag_scores", TensorProto.FLOAT, [tags]))
    size = checkpoint.config.preprocessing.size
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["B", 3, size, size])
    model = helper.make_model(
        graph.proto("captioner", [pixels], outputs),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=9,
        producer_name="captioner",
        producer_version=__version__,
    )
    helper.set_model_props(model, {"format": FORMAT, "captioner": _metadata(checkpoint, options)})
    onnx.checker.check_model(model)
    with replacing(str(path)) as file:
        file.write(model.SerializeToString(deterministic=True))


def _check(options: SearchOptions) -> None:
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name in _REFUSED and value != option.default:
            raise ConfigError(f"{option.name} is {value!r}, which an ONNX file cannot have")


def _metadata(checkpoint: Checkpoint, options: SearchOptions) -> str:
    return json.dumps(
        {
            "preprocessing": asdict(checkpoint.config.preprocessing),
            "options": {k: v for k, v in asdict(options).items() if k not in _REFUSED},
            "vocabulary": checkpoint.vocabulary.words,
            "tags": checkpoint.tags.names,
            "tag_frequencies": checkpoint.tags.frequencies,
            "tag_scoring": checkpoint.scoring and asdict(checkpoint.scoring),
            "contract": _CONTRACT,
            "encoder": checkpoint.config.encoder.name,
            "provenance": checkpoint.provenance,
        }
    )


def _output(
    graph: Graph, value: Value, name: str, kind: int, shape: Sequence[str | int]
) -> ValueInfoProto:
    """Give a value its name as an output of the file."""
    graph.nodes.append(helper.make_node("Identity", [value], [name]))
    return helper.make_tensor_value_info(name, kind, ["B", *shape])


def _caption_nodes(
    graph: Graph, checkpoint: Checkpoint, options: SearchOptions, grid: _Grid
) -> list[ValueInfoProto]:
    token_rules(options, checkpoint.vocabulary)  # refuses words that are none of the model's
    vocabulary = checkpoint.vocabulary
    unsaid = UNSAID[:-1] if options.unknown else UNSAID
    rules = Rules(
        words=len(vocabulary),
        never=[*unsaid, *vocabulary.encode(options.forbidden)[:-1]],
        no_ending=vocabulary.encode(options.no_ending)[:-1],
    )
    config = checkpoint.config.model.caption
    decoder = DecoderGraph(graph, "caption_decoder", config)
    found = search_nodes(graph, decoder, grid.value, grid.cells, options, rules, config.attention)
    return _caption_outputs(graph, found, options, grid.cells)


def _caption_outputs(
    graph: Graph, found: Found, options: SearchOptions, cells: int
) -> list[ValueInfoProto]:
    # The confidence of each caption, (B, n), is to be one more output here.
    n, p = options.num_captions, options.max_words + 1
    outputs = [
        _output(graph, found.tokens, "tokens", TensorProto.INT64, [n, p]),
        _output(graph, found.lengths, "lengths", TensorProto.INT64, [n]),
        _output(graph, found.log_probs, "log_probs", TensorProto.FLOAT, [n]),
        _output(graph, found.finished, "finished", TensorProto.BOOL, [n]),
        _output(graph, found.terms, "word_log_probs", TensorProto.FLOAT, [n, p]),
    ]
    if found.attention is not None:
        looked = found.attention
        outputs.append(_output(graph, looked, "attention", TensorProto.FLOAT, [n, p, cells]))
    return outputs


class _Grid(NamedTuple):
    """What comes of the pixels in one pass."""

    value: Value  # (B, N, D)
    cells: int  # N
    head: Value | None  # (B, V): the logits of the head for tags, of a model that has one


class _Encode(nn.Module):
    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        self.encoder, self.projection = model.encoder, model.projection
        self.tag_head = model.tag_head

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        grid: Tensor = self.projection(self.encoder(pixels))
        return (grid,) if self.tag_head is None else (grid, self.tag_head(grid))


def _encoder_nodes(graph: Graph, checkpoint: Checkpoint) -> _Grid:
    """Add what torch's exporter makes of the encoder; its weights become those of the file."""
    size = checkpoint.config.preprocessing.size
    encode, pixels = _Encode(checkpoint.model).eval(), torch.zeros(2, 3, size, size).byte()
    exported = _exported(encode, pixels)
    renamed = {"pixels": "pixels"}
    weights = dict(encode.named_parameters()) | dict(encode.named_buffers())
    for tensor in exported.initializer:
        if tensor.name in weights:
            renamed[tensor.name] = graph.weight(tensor.name)
        else:
            renamed[tensor.name] = graph.name(f"encoder.{tensor.name}")
            tensor.name = renamed[tensor.name]
            graph.initializers.append(tensor)
    for node in exported.node:
        _add_renamed(graph, node, renamed)
    grid, *head = (renamed[output.name] for output in exported.output)
    cells = encode(pixels[:1])[0].shape[1]
    return _Grid(grid, cells, head[0] if head else None)


def _add_renamed(graph: Graph, node: NodeProto, renamed: dict[str, str]) -> None:
    for output in node.output:
        renamed[output] = graph.name(f"encoder.{output}")
    copy = NodeProto()
    copy.CopyFrom(node)
    del copy.input[:], copy.output[:], copy.metadata_props[:]
    copy.input.extend(renamed.get(name, "") for name in node.input)
    copy.output.extend(renamed[name] for name in node.output)
    copy.name, copy.doc_string = "", ""
    graph.nodes.append(copy)


def _exported(encode: nn.Module, pixels: Tensor) -> GraphProto:
    """Return the graph of the encoder.

    By torch's exporter of TorchScript: the newer one takes twelve times as long for the default's
    encoder, and its graph has twice the nodes.
    """
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age, and of what is constant on purpose
        path = Path(folder) / "encoder.onnx"
        torch.onnx.export(
            encode, (pixels,), path, dynamo=False, input_names=["pixels"],
            dynamic_axes={"pixels": {0: "B"}}, opset_version=_OPSET,
            # As they are: BatchNorm put into a convolution would have other weights than the file.
            training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
        )  # fmt: skip
        return onnx.load(path).graph
