"""The feature cache: never stale, never cut off, and nothing is computed twice."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import PIL
import pytest
import torch
from processes import end, forked, start

from captioner.config import Preprocessing
from captioner.data.dataset import Features, PixelBatch, pixel_batches
from captioner.files import locked
from captioner.model.encoder import Encoder
from captioner.training import features
from captioner.training.features import encode_features
from conftest import draw_picture

COLOURS = ["red", "green", "blue", "yellow", "black", "white", "orange"]
PREPROCESSING = Preprocessing(size=64)


def make_encoder(preprocessing: Preprocessing = PREPROCESSING) -> Encoder:
    torch.manual_seed(0)
    return Encoder("squeezenet1_1", preprocessing)


def draw(folder: Path) -> list[str]:
    folder.mkdir()
    # All of them have the same size, as bitmaps do.
    return [str(draw_picture(folder / f"{colour}.bmp", colour)) for colour in COLOURS]


class Cache:
    """A folder of features, and what happened there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.encoder = make_encoder()
        self.precision = torch.float32
        self.said: list[str] = []
        self.encoded: list[str] = []
        self.dies_after = 99

    def __call__(self, paths: Sequence[str], workers: int = 0, shared: bool = False) -> Features:
        return encode_features(
            self.encoder, paths, self.folder, self.precision, workers, self.said.append, shared
        )

    def pixel_batches(
        self, paths: Sequence[str], preprocessing: Preprocessing, size: int, workers: int
    ) -> Iterator[PixelBatch]:
        for number, batch in enumerate(pixel_batches(paths, preprocessing, size, workers)):
            if number == self.dies_after:
                raise KilledError
            start = number * size
            self.encoded += [Path(path).stem for path in paths[start : start + size]]
            yield batch

    def one(self, name: str) -> Path:
        (path,) = self.folder.glob(f"*/*/{name}")
        return path


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    cache = Cache(tmp_path / "features")
    monkeypatch.setattr(features, "pixel_batches", cache.pixel_batches)
    monkeypatch.setattr(features, "_BATCH", 2)
    return cache


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return draw(tmp_path / "photographs")


@torch.inference_mode()
def expected(paths: Sequence[str], encoder: Encoder) -> np.ndarray:
    """Return what the encoder says of each photograph alone."""
    batches = pixel_batches(paths, encoder.preprocessing, 1, 0)
    rows: np.ndarray = torch.cat([encoder.eval()(batch.pixels) for batch in batches]).numpy()
    return rows


def same(one: Features, other: Features) -> bool:
    return np.array_equal(one.rows, other.rows) and one.unreadable == other.unreadable


def test_rows_are_the_encoder_s_and_mapped(cache: Cache, paths: list[str]) -> None:
    made = cache(paths)
    assert isinstance(made.rows, np.memmap)
    assert not made.rows.flags.writeable
    assert (made.rows.dtype, made.rows.shape) == (np.float16, (7, 9, 512))
    assert np.allclose(made.rows, expected(paths, cache.encoder), rtol=1e-3, atol=1e-3)
    assert made.unreadable == {}


def test_workers_change_nothing(cache: Cache, paths: list[str], tmp_path: Path) -> None:
    alone = cache(paths)
    cache.folder = tmp_path / "other"
    assert same(alone, cache(paths, workers=2))


def test_nothing_is_encoded_twice(cache: Cache, paths: list[str], tmp_path: Path) -> None:
    first = cache(paths)
    assert cache.encoded == COLOURS
    assert same(cache(paths), first)
    copies = [shutil.copy(path, str(tmp_path / f"{place}")) for place, path in enumerate(paths)]
    assert same(cache(copies), first)
    for path in paths:
        os.utime(path, (1, 1))
    assert same(cache(paths), first)
    assert cache.encoded == COLOURS


def test_a_changed_photograph_is_encoded(cache: Cache, paths: list[str]) -> None:
    first = cache(paths)
    before = os.stat(paths[0])
    draw_picture(Path(paths[0]), "pink")
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(paths[0]).st_size == before.st_size
    again = cache(paths)
    assert not np.array_equal(again.rows[0], first.rows[0])
    assert np.array_equal(again.rows[1:], first.rows[1:])
    assert np.allclose(again.rows, expected(paths, cache.encoder), rtol=1e-3, atol=1e-3)


def test_another_order_has_rows_of_its_own(cache: Cache, paths: list[str]) -> None:
    first = cache(paths)
    assert np.allclose(cache(paths[::-1]).rows[::-1], first.rows, rtol=1e-2, atol=1e-3)


Change = Callable[[Cache, pytest.MonkeyPatch], None]


def change_a_weight(cache: Cache, _: pytest.MonkeyPatch) -> None:
    parameter = list(cache.encoder.parameters())[-1]
    with torch.no_grad():
        parameter[0] = torch.nextafter(parameter[0], torch.tensor(9.0))


def change_the_fit(cache: Cache, _: pytest.MonkeyPatch) -> None:
    cache.encoder = make_encoder(replace(PREPROCESSING, fit="crop"))


def change_the_mean(cache: Cache, _: pytest.MonkeyPatch) -> None:
    cache.encoder = make_encoder(replace(PREPROCESSING, mean=(0.485, 0.456, 0.407)))


def change_the_precision(cache: Cache, _: pytest.MonkeyPatch) -> None:
    cache.precision = torch.bfloat16


def change_pillow(_: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL, "__version__", "99.0")


@pytest.mark.parametrize(
    "change",
    [change_a_weight, change_the_fit, change_the_mean, change_the_precision, change_pillow],
)
def test_another_setting_is_never_served_the_same(
    cache: Cache, paths: list[str], monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    cache(paths, shared=True)
    change(cache, monkeypatch)
    cache(paths, shared=True)
    assert cache.encoded == COLOURS * 2
    assert len(list(cache.folder.glob("*/*/rows"))) == 2


def test_a_run_s_own_folder_keeps_one_encoder(
    cache: Cache, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = cache.folder / "earlier" / "7-digest" / "rows.float16"  # before version 2
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    other = cache.folder / "something" / "else" / "notes.txt"
    other.parent.mkdir(parents=True)
    other.touch()
    before = cache(paths)
    assert not earlier.parent.parent.exists()
    assert other.exists()
    rows = before.rows.copy()
    cache(paths[:3])
    assert len(list(cache.folder.glob("*/*/rows"))) == 2
    change_a_weight(cache, monkeypatch)
    cache(paths)
    cache.one("rows")
    assert np.array_equal(before.rows, rows)  # it is still mapped


def test_unreadable_photographs_stay_named(cache: Cache, paths: list[str]) -> None:
    Path(paths[0]).write_bytes(b"no picture")
    Path(paths[1]).unlink()
    Path(paths[4]).write_bytes(b"")
    for _ in range(2):
        made = cache(paths)
        assert made.unreadable == {
            0: "not a picture that Pillow can read",
            1: "no such file",
            4: "an empty file (0 bytes)",
        }
        assert made.rows[[2, 3, 5, 6]].any(axis=(1, 2)).all()
        assert not made.rows[[0, 1, 4]].any()
    assert cache.encoded == COLOURS
    draw_picture(Path(paths[1]), "green")
    assert sorted(cache(paths).unreadable) == [0, 4]


def test_no_photograph_at_all(cache: Cache) -> None:
    assert cache([]).rows.shape == (0, 0, 512)
    assert not cache.folder.exists()


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_pass_that_was_cut_off_goes_on(
    cache: Cache, paths: list[str], tmp_path: Path, chunks: int
) -> None:
    for path in (paths[1], paths[6]):
        Path(path).write_bytes(b"no picture")
    cache.dies_after = chunks
    with pytest.raises(KilledError):
        cache(paths)
    assert list(cache.folder.glob("*/*/rows")) == []
    cache.dies_after = 99
    cut = cache(paths)
    assert sorted(cut.unreadable) == [1, 6]
    assert cache.encoded == COLOURS  # none of them twice
    assert (f"{2 * chunks} of them there already" in cache.said[-1]) == (chunks > 0)
    cache.folder = tmp_path / "undisturbed"
    assert same(cut, cache(paths))


RECORD = 9 * 512 * 2 + 252 + 4  # of a photograph: its features, a reason, a checksum

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "cut within a record": lambda content: content[:-9],
    "gone": lambda _: b"",
    "longer": lambda content: content + b"more",
    "a bit of the features": lambda content: content[:9000] + b"\xff" + content[9001:],
    "a bit of a reason": lambda content: content.replace(b"not a", b"not b"),
    "a bit of a checksum": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "zeros": lambda content: bytes(len(content)),
    "a hole": lambda content: content[:RECORD] + bytes(RECORD) + content[2 * RECORD :],
    "records changed over": lambda content: (
        content[RECORD : 2 * RECORD] + content[:RECORD] + content[2 * RECORD :]
    ),
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_anew(
    cache: Cache, paths: list[str], tmp_path: Path, damage: str, finished: bool
) -> None:
    Path(paths[1]).write_bytes(b"no picture")
    cache.dies_after = 99 if finished else 3
    with suppress(KilledError):
        cache(paths)
    cache.dies_after = 99
    path = cache.one("rows" if finished else "rows.part")
    damaged = DAMAGES[damage](path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    again = cache(paths)
    assert sum(" is damaged; " in line for line in cache.said) == finished
    cache.folder = tmp_path / "undisturbed"
    assert same(again, cache(paths))


def test_only_what_is_damaged_is_encoded_again(cache: Cache, paths: list[str]) -> None:
    rows = cache(paths).rows.copy()
    with cache.one("rows").open("r+b") as file:
        file.seek(3 * RECORD)
        file.write(b"\0\0\0\0")
    cache.encoded.clear()
    assert np.array_equal(cache(paths).rows, rows)
    assert cache.encoded == COLOURS[2:4]  # with its neighbour, as at first


def test_a_photograph_that_changes_meanwhile_is_not_kept(
    cache: Cache, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(*arguments: object) -> Iterator[PixelBatch]:
        for number, batch in enumerate(cache.pixel_batches(*arguments)):  # type: ignore[arg-type]
            if number == 1:
                draw_picture(Path(paths[2]), "pink")
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(features, "pixel_batches", change)
        with pytest.raises(OSError, match=r"blue.bmp changed while its features were computed"):
            cache(paths)
    assert cache.one("rows.part").stat().st_size == 2 * RECORD  # red and green
    made = cache(paths)
    assert np.allclose(made.rows, expected(paths, cache.encoder), rtol=1e-3, atol=1e-3)


class Usage(NamedTuple):
    free: int


def test_a_full_disk_is_refused_before_the_start(
    cache: Cache, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 7 * RECORD
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(needed - 1))
    with pytest.raises(OSError, match=r"need 66,304 bytes, and 66,303 are free; .*another disk"):
        cache(paths)
    assert cache.encoded == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(needed))
    cache(paths)
    assert cache.encoded == COLOURS


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """Return how to limit the size of the files that this process writes, as a full disk would."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_names_the_file_and_goes_on_later(
    cache: Cache, paths: list[str], room: Callable[[int], None]
) -> None:
    room(5 * RECORD)
    with pytest.raises(OSError, match=r"File too large: .*rows.part"):
        cache(paths)
    room(-1)
    cache.encoded.clear()
    cache(paths)
    assert cache.encoded == COLOURS[4:]


def test_the_size_is_said_before_it_is_written(cache: Cache, paths: list[str]) -> None:
    cache.dies_after = 0
    with pytest.raises(KilledError):
        cache(paths)
    folder = cache.one("rows.part").parent
    assert cache.said == [f"features of 7 photographs: 0.1 MB to write in {folder}"]


def encode(folder: Path, paths: list[str], dies_after: int = 99) -> None:
    """Be a process that encodes, two photographs at a time, and says so; it may kill itself."""

    def counted(
        paths: Sequence[str], preprocessing: Preprocessing, size: int, workers: int
    ) -> Iterator[PixelBatch]:
        for number, batch in enumerate(pixel_batches(paths, preprocessing, size, workers)):
            if number == dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            print("encoded", flush=True)
            yield batch

    with patch.multiple(features, pixel_batches=counted, _BATCH=2):
        made = encode_features(make_encoder(), paths, folder, torch.float32, 0, lambda line: None)
    print(hashlib.sha256(made.rows.tobytes()).hexdigest())


@pytest.mark.usefixtures("one_thread")  # as these processes have
def test_killed_and_by_two_processes_at_once(
    cache: Cache, paths: list[str], tmp_path: Path
) -> None:
    killed = forked(encode, tmp_path / "shared", paths, 1)
    assert killed == (-signal.SIGKILL, "encoded\n")
    told = [tmp_path / name for name in ("first", "second")]
    both = [start(said, encode, tmp_path / "shared", paths) for said in told]
    ended = [end(process, said) for process, said in zip(both, told, strict=True)]
    assert [process.status for process in ended] == [0, 0]
    outputs = [process.said.split() for process in ended]
    assert sorted(len(output) for output in outputs) == [1, 4]  # three chunks, by one of them
    undisturbed = hashlib.sha256(cache(paths).rows.tobytes()).hexdigest()
    assert {output[-1] for output in outputs} == {undisturbed}


def test_who_waits_is_told(cache: Cache, paths: list[str]) -> None:
    first = cache(paths)
    with ThreadPoolExecutor(1) as pool:
        with locked(str(cache.one("lock"))):
            other = pool.submit(cache, paths)
            while len(cache.said) < 2 and not other.done():
                time.sleep(0.01)
        assert same(other.result(), first)
    assert cache.said[1:] == [
        f"another process has the features in {cache.one('lock').parent}; waiting for it"
    ]
