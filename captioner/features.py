"""The feature cache: what a frozen encoder says of each photograph, computed once and kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captioner.dataset import Features, pixel_batches
from captioner.encoder import Encoder

__all__ = ["encode_features"]


def encode_features(
    encoder: Encoder, paths: Sequence[str], folder: Path, precision: torch.dtype, workers: int
) -> Features:
    """Return the features of the photographs, from ``folder`` if they are there already.

    They are kept as float16 under a key of the encoder's weights, the preprocessing, and the
    path, size and time of every photograph. What was cut off while writing is never read.
    """
    key = _key(encoder, paths, precision)
    rows_path, done_path = folder / f"{key}.npy", folder / f"{key}.json"
    if not done_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{key}.{os.getpid()}.tmp"
        unreadable = _write(encoder, paths, temporary, precision, workers)
        os.replace(temporary, rows_path)
        temporary.write_text(json.dumps(unreadable), encoding="utf-8")
        os.replace(temporary, done_path)
    unreadable = json.loads(done_path.read_text(encoding="utf-8"))
    return Features(
        np.load(rows_path, mmap_mode="r"), {int(place): why for place, why in unreadable.items()}
    )


@torch.inference_mode()
def _write(
    encoder: Encoder, paths: Sequence[str], target: Path, precision: torch.dtype, workers: int
) -> dict[int, str]:
    encoder.eval()
    device = next(encoder.parameters()).device
    rows: np.memmap[tuple[int, ...], np.dtype[np.float16]] | None = None
    unreadable: dict[int, str] = {}
    progress = tqdm(total=len(paths), desc="encoding", unit="photo", disable=None)
    for batch in pixel_batches(paths, encoder.preprocessing, 32, workers):
        unreadable |= batch.unreadable
        progress.update(len(batch.places) + len(batch.unreadable))
        if not batch.places:
            continue
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            features = encoder(batch.pixels.to(device)).half().cpu().numpy()
        if rows is None:
            shape = (len(paths), *features.shape[1:])
            rows = np.lib.format.open_memmap(target, mode="w+", dtype=np.float16, shape=shape)
        rows[batch.places] = features
    if rows is None:
        with target.open("wb") as file:
            np.save(file, np.empty((len(paths), 0, encoder.width), np.float16))
    else:
        rows.flush()
    progress.close()
    return unreadable


def _key(encoder: Encoder, paths: Sequence[str], precision: torch.dtype) -> str:
    digest = hashlib.sha256(f"{encoder.name} {encoder.preprocessing} {precision}".encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for path in paths:
        try:
            stat = os.stat(path)
            seen = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            seen = "missing"
        digest.update(os.fsencode(path) + f"\0{seen}\n".encode())
    return digest.hexdigest()[:24]
