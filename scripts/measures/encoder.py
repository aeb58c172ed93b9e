"""The encoder as it is used, beside the encoder as the file holds it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from captioner.inference import Captioner
from captioner.model.quantization import has_int8_products
from measures.timing import Named, in_turn, ratio, spread


@torch.inference_mode()
def encoder(args: argparse.Namespace) -> Named:
    """Measure what folded BatchNorm and int8 save of the encoder, at several batch sizes."""
    for precision in ("float32", "bfloat16", *(["int8"] if has_int8_products() else [])):
        captioner = Captioner.load(device=args.device, precision=precision)
        size = captioner.checkpoint.config.preprocessing.size
        for count in args.sizes:
            drawn = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), np.uint8)
            pixels = torch.from_numpy(drawn).to(captioner.device)
            runs: dict[str, Callable[[], object]] = {
                "in use": partial(captioner.encode, list(drawn)),
                "as stored": partial(captioner.checkpoint.model.encode, pixels),
            }
            taken = in_turn(runs, args.rounds)
            yield (
                f"{precision}, batches of {count}",
                {
                    "ms a photograph": spread([1e3 * s / count for s in taken["in use"]]),
                    "in use / as stored": ratio(taken["in use"], taken["as stored"]),
                },
            )
