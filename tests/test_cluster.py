"""Runs on a Ray cluster: a local one of two nodes, one of which is lost; plans; what goes wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest
import ray
from PIL import Image
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem, PyFileSystem, SubTreeFileSystem
from ray.cluster_utils import Cluster

from captioner.cluster import ClusterError, describe_dataset, stages
from captioner.cluster.listing import Listed, home, listed
from captioner.cluster.parts import Part, content_of, named
from captioner.cluster.plan import Plan
from captioner.cluster.stages import Reading, Stages, Wanted, read, shard_row
from captioner.cluster.storage import Place, located
from captioner.cluster.workers import Workers, check_nodes, connected
from captioner.config import Preprocessing
from captioner.files import Record, as_json
from captioner.folder import RunError, RunResult, describe_folder, find_photographs
from captioner.folder.find import PassedOver
from captioner.generation.options import SearchOptions
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from captioner.settings import ConfigError
from readers import read_or_crash

# Ray's own code warns of what it itself calls; what it says to its callers is an error as ever.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")

ROOT = Path(__file__).parent.parent
COUNT, SHARD = 160, 8
SEARCH = SearchOptions(beam_size=4, min_words=3, max_words=12)

# A killed node counts as lost after some three seconds, not a quarter of a minute. With less
# time a busy machine's own node would count as lost, too.
QUICK_TO_MISS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Return a cluster whose only node has one CPU; its processes end with the module."""
    place = mkdtemp(prefix="ray-")  # short: the paths of sockets are below it
    head = {"num_cpus": 1, "num_gpus": 1, "include_dashboard": False, "temp_dir": place,
            "object_store_memory": 100_000_000, "_system_config": QUICK_TO_MISS}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return many photographs that take a moment each to read, and some that cannot be read."""
    folder = tmp_path_factory.mktemp("archive")
    for kind in range(8):
        pixels = np.random.default_rng(kind).integers(0, 256, (3, 4, 3), np.uint8)
        # Of an odd width, which a decoder does not scale.
        picture = Image.fromarray(pixels).resize((2001, 1501), Image.Resampling.BICUBIC)
        picture.save(folder / f".{kind}.jpg")
    (folder / "deep").mkdir()
    for index in range(COUNT - 3):
        below = "deep" if index % 3 else "."
        (folder / below / f"{index:03}.jpg").symlink_to(folder / f".{index % 8}.jpg")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "text.jpg").write_text("this is no picture")
    return folder


@pytest.fixture(scope="module")
def checkpoint(small: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_checkpoint(small, path)
    return path


@pytest.fixture(scope="module")
def expected(archive: Path, checkpoint: Path, one_thread: None) -> list[Record]:
    """Return the records of a folder run."""
    captioner = Captioner.load(checkpoint, device="cpu", precision="float32")
    return list(describe_folder(captioner, [archive], options=SEARCH, batch_size=4))


def records_of(output: Path) -> list[Record]:
    """Return the records of a finished run, in the order of its parts."""
    assert (output / "_SUCCESS").exists()
    texts = [part.read_text(encoding="utf-8") for part in sorted(output.glob("part-*"))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_a_node_is_lost_and_the_records_are_those_of_a_folder_run(
    cluster: Cluster, archive: Path, checkpoint: Path, expected: list[Record], tmp_path: Path
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    cluster.wait_for_nodes()
    done: list[int] = []

    def progress(result: RunResult) -> None:
        done.append(result.done)
        if len(done) == 4:
            cluster.remove_node(node, allow_graceful=False)

    output = tmp_path / "out.jsonl"
    result = describe_dataset(
        [archive],
        output,
        model=checkpoint,
        options=SEARCH,
        address=cluster.address,
        concurrency=2,
        precision="float32",
        batch_size=4,
        shard_size=SHARD,
        progress=progress,
    )
    assert (result.total, result.done, result.described, result.errors) == (
        (COUNT, COUNT, COUNT - 3, 3)
    )
    assert len(done) == 1 + COUNT // SHARD  # none was done twice
    assert records_of(output) == expected


@pytest.mark.slow
def test_a_run_whose_driver_was_killed_is_continued(
    cluster: Cluster, archive: Path, checkpoint: Path, expected: list[Record], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "caption_cluster.py"),
        str(archive),
        "--quiet",
    ]
    flags = {"--output": output, "--model": checkpoint, "--address": cluster.address,
             "--precision": "float32", "--batch-size": 4, "--shard-size": SHARD,
             "--beam-size": SEARCH.beam_size, "--min-words": SEARCH.min_words,
             "--max-words": SEARCH.max_words}  # fmt: skip
    command += [str(word) for pair in flags.items() for word in pair]
    with subprocess.Popen(command) as driver:
        try:
            deadline = time.monotonic() + 120.0
            while len(list(output.glob("part-*"))) < 3:
                assert driver.poll() is None, "it ended too soon"
                assert time.monotonic() < deadline, "it takes too long"
                time.sleep(0.02)
        finally:
            driver.kill()  # by SIGKILL
    before = {part.name: part.stat().st_ino for part in output.glob("part-*")}
    assert 3 <= len(before) < COUNT // SHARD
    assert not (output / "_SUCCESS").exists()

    again = subprocess.run(command, check=False)
    assert again.returncode == 1  # some could not be read
    after = {part.name: part.stat().st_ino for part in output.glob("part-*")}
    assert after.items() >= before.items()
    assert records_of(output) == expected

    # A third time there is nothing left, and the earlier errors still count.
    assert subprocess.run(command, check=False).returncode == 1
    assert {part.name: part.stat().st_ino for part in output.glob("part-*")} == after


@pytest.mark.slow
def test_a_dataset_of_paths_on_gpu_workers(
    cluster: Cluster, archive: Path, checkpoint: Path, expected: list[Record], tmp_path: Path
) -> None:
    """Reading is a stage of its own then, elsewhere; Ray counts a GPU that need not be there."""
    chosen = [record for record in expected if "deep" not in record["image"]]
    node = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    try:
        with connected(cluster.address):
            rows = [{"path": record["image"]} for record in reversed(chosen)]
            result = describe_dataset(
                ray.data.from_items([*rows, rows[0]]),
                tmp_path / "out.parquet",
                model=[checkpoint],
                options=SEARCH,
                num_gpus=0.5,
                device="cpu",
                precision="float32",
                batch_size=4,
                shard_size=16,
            )
            assert ray.is_initialized()  # it was the caller's
            with pytest.raises(RunError, match="has no column 'path', but image"):
                describe_dataset(
                    ray.data.from_items([{"image": "a.jpg"}]),
                    tmp_path / "b.jsonl",
                    model=checkpoint,
                )
    finally:
        cluster.remove_node(node)
    assert result.total == len(chosen)
    table = pyarrow.dataset.dataset(tmp_path / "out.parquet").to_table()
    found = {record["image"]: record for record in without_nulls(table.to_pylist())}
    # Batches were cut elsewhere: numbers may differ in the last place.
    for record in chosen:
        other = found[record["image"]]
        assert other.get("caption") == record.get("caption")
        assert other.get("error") == record.get("error")
        assert other.get("log_prob", 0.0) == pytest.approx(record.get("log_prob", 0.0), abs=2e-4)


@pytest.mark.slow
def test_what_keeps_a_run_from_beginning_on_a_cluster(
    cluster: Cluster,
    archive: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(paths: Sequence[Path] = (archive,), **others: Any) -> RunResult:
        values = {"model": checkpoint, "address": cluster.address, **others}
        return describe_dataset(paths, tmp_path / "out.jsonl", **values)

    with pytest.raises(RunError, match=r"2 workers of 1 CPUs do not fit .* 1 nodes have 1 CPUs"):
        run(concurrency=2)
    with pytest.raises(RunError, match=r"no such file or folder: '.*nowhere'"):
        run([tmp_path / "nowhere"])
    with pytest.raises(RunError, match="no photographs in "):
        run([checkpoint.parent])
    assert not (tmp_path / "out.jsonl").exists()

    with connected(cluster.address):
        with pytest.raises(RunError, match=r"^/nowhere must be on all nodes .* on node [\d.]+$"):
            check_nodes([str(archive), "/nowhere"])
        monkeypatch.setattr("captioner.cluster.workers.__version__", "9.9")
        with pytest.raises(RunError, match=r"^captioner 0\..* is not the 9\.9 of this machine"):
            check_nodes([])
        reading = Reading(Preprocessing(size=64), None, 1, 30.0)
        wanted = Wanted(None, None, True, True, 0.0, 4)
        workers = Workers(
            concurrency=1, num_cpus=1, num_gpus=0.0, device="cpu", precision="float32"
        )
        other = Stages(reading, wanted, workers, [checkpoint], "another model's")
        row = shard_row(0, [Listed("a.jpg", str(archive / "empty.jpg"))])
        with pytest.raises(
            ClusterError, match=r"^the model cannot be used on node [\d.]+: [^\n]*$"
        ):
            list(other.run([row]))


def test_what_keeps_a_run_from_beginning(
    checkpoint: Path, photographs: Path, tmp_path: Path
) -> None:
    """None of it needs a cluster, and all come before one is looked for."""

    def run(output: str = "out.jsonl", **others: Any) -> RunResult:
        values = {"model": checkpoint, "address": "127.0.0.1:1", **others}
        return describe_dataset([photographs], tmp_path / output, **values)

    with pytest.raises(TypeError, match="write \\['photos'\\]"):
        describe_dataset("photos", tmp_path / "out.jsonl")
    with pytest.raises(RunError, match=r"must end in \.jsonl or \.parquet"):
        run("out.csv")
    with pytest.raises(RunError, match="there is no folder"):
        run("none/out.jsonl")
    with pytest.raises(RunError, match="cannot be reached"):
        describe_dataset([photographs], "unknown://bucket/out.jsonl", model=checkpoint)
    with pytest.raises(RunError, match=r"^a s3:// URI with a password") as refused:
        describe_dataset([photographs], "s3://me:secret@bucket/out.jsonl", model=checkpoint)
    assert "secret" not in str(refused.value)
    with pytest.raises(CheckpointError, match="no such file"):
        run(model="none.safetensors")
    with pytest.raises(ConfigError, match="'zebra'"):
        run(options=SearchOptions(required=("zebra",)))
    with pytest.raises(ConfigError, match="concurrency is 0"):
        run(concurrency=0)
    with pytest.raises(ConfigError, match=r"num_gpus is 1\.5"):
        run(num_gpus=1.5)
    with pytest.raises(RunError, match=r"no Ray cluster at 127\.0\.0\.1:1: Connection refused"):
        run()
    with pytest.raises(RunError, match="an address is auto, local or HOST:PORT"):
        run(address="ray://somewhere:10001")


def test_without_ray_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import captioner.cluster\n"
        "assert not {'pyarrow', 'torch'} & sys.modules.keys()\n"
        "from captioner.cluster import describe_dataset\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    needed = 'a run on a cluster needs an extra: pip install "captioner[ray]"'
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: {needed}")
    script = f"import sys; sys.modules['ray'] = None\n{code.splitlines()[1]}\n" + (
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "from caption_cluster import main; sys.exit(main(['a', '-o', 'b.jsonl']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"caption_cluster.py: {needed}")
    assert len(done.stderr.splitlines()) == 1


def settings(**others: Any) -> dict[str, Any]:
    return {"model": "m", "shard_size": 3, **asdict(SEARCH), **others}


def test_a_plan_is_continued_with_the_same_settings_alone(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    photographs = [Listed(f"p{i}.jpg", f"/p{i}.jpg") for i in range(7)]
    photographs[5] = Listed("\udcff.jpg", "/\udcff.jpg", "no such file or folder")
    plan = Plan(output, settings())
    assert not plan.take_up(overwrite=False)
    plan.write(photographs)
    assert [shard for shards in plan.missing(1) for shard in shards] == [
        (0, photographs[:3]), (1, photographs[3:6]), (2, photographs[6:]),
    ]  # fmt: skip
    plan.keep(Part(1, 2), b'{"image": "a"}\n')

    again = Plan(output, settings())
    assert again.take_up(overwrite=False)
    assert again.total == 7
    assert again.done() == {1: Part(1, 2)}
    assert [again.size(shard) for shard in range(3)] == [3, 3, 1]
    assert [shard for shards in again.missing(1) for shard, _ in shards] == [0, 2]

    with pytest.raises(RunError, match="beam_size was 4, is 5; continue it as it was"):
        Plan(output, settings(beam_size=5)).take_up(overwrite=False)
    other = Plan(output, settings(beam_size=5))
    assert not other.take_up(overwrite=True)
    assert again.done()  # nothing is removed before the new list is there
    other.write(photographs)
    assert not other.done()


def test_a_plan_takes_no_other_folder(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.mkdir()
    assert not Plan(output, settings()).take_up(overwrite=False)
    (output / "_run").mkdir()  # killed while it was listing
    assert not Plan(output, settings()).take_up(overwrite=False)
    (output / "_run").rmdir()
    (output / "precious.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(RunError, match="no output of a run on a cluster"):
            Plan(output, settings()).take_up(overwrite)
    (tmp_path / "file.jsonl").touch()
    with pytest.raises(RunError, match="no output of a run on a cluster"):
        Plan(tmp_path / "file.jsonl", settings()).take_up(overwrite=True)


def test_a_plan_has_its_photographs_in_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captioner.cluster.plan._TOGETHER", 2)
    plan = Plan(tmp_path / "out.jsonl", settings())
    photographs = [Listed(f"p{i}.jpg", f"/p{i}.jpg") for i in range(20)]
    plan.write(photographs)
    for shard in (2, 3, 4):
        plan.keep(Part(shard, 0), b"")
    assert [[shard for shard, _ in shards] for shards in plan.missing(1)] == [[0, 1], [5], [6]]
    assert [[shard for shard, _ in shards] for shards in plan.missing(3)] == [[0, 1, 5], [6]]
    assert [one for shards in plan.missing(1) for _, photos in shards for one in photos] == (
        photographs[:6] + photographs[15:]
    )


def test_parts_are_known_by_their_names() -> None:
    parts = [Part(3, 0), Part(10_000_000, 7)]
    names = [part.name(".parquet") for part in parts]
    assert names == ["part-0000003.parquet", "part-10000000-7-errors.parquet"]
    assert named([*names, "_SUCCESS", ".part-0000001.parquet", "part-1.parquet.tmp"]) == {
        part.shard: part for part in parts
    }


def test_parquet_has_what_json_lines_have() -> None:
    records: list[Record] = [
        {"image": "a.jpg", "caption": "a dog", "log_prob": -1.5, "confidence": 0.5,
         "captions": [{"text": "a dog", "log_prob": -1.5, "confidence": 0.5, "finished": False}],
         "tags": [{"name": "dog", "score": 0.9}], "truncated": True},
        {"image": "b.jpg", "error": "no such file"},
        {"image": "\udcff.jpg", "tags": []},
    ]  # fmt: skip
    lines = b"".join(as_json(record) + b"\n" for record in records)
    assert content_of(lines, ".jsonl") == lines
    buffer = pyarrow.BufferReader(content_of(lines, ".parquet"))
    found = without_nulls(pyarrow.parquet.read_table(buffer).to_pylist())
    records[2]["image"] = "\\xff.jpg"
    assert found == records


@pytest.mark.parametrize("remote", [False, True])
def test_a_listing_finds_what_a_folder_run_finds(photographs: Path, remote: bool) -> None:
    (photographs / "@eaDir").mkdir()
    (photographs / "@eaDir" / "thumb.jpg").touch()
    (photographs / "deep.jpg").touch()  # sorted apart from what lies in the folder "deep"
    (photographs / "deep" / ".trash").mkdir()
    (photographs / "deep" / ".trash" / "old.jpg").touch()
    expected = [found.path for found in find_photographs([str(photographs)])]
    filesystem = remote_of(photographs.parent) if remote else None
    given = [photographs.name if remote else str(photographs)]
    found = listed(given * 2, filesystem, PassedOver())
    prefix = f"{photographs.parent}/" if remote else ""
    assert [prefix + one.image for one in found] == expected
    assert [prefix + one.path for one in found] == expected
    assert isinstance(home(given, filesystem), SubTreeFileSystem if remote else LocalFileSystem)


def remote_of(folder: Path) -> SubTreeFileSystem:
    """Return a file system that is not this machine's, as far as a run can see."""
    return SubTreeFileSystem(str(folder), LocalFileSystem())


def test_a_bucket_that_cannot_be_listed(photographs: Path) -> None:
    class Closed(pyarrow.fs.FSSpecHandler):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def get_type_name(self) -> str:
            return "closed"

        def get_file_info(self, paths: list[str]) -> list[Any]:
            return [pyarrow.fs.FileInfo(path, pyarrow.fs.FileType.Directory) for path in paths]

        def get_file_info_selector(self, selector: FileSelector) -> list[Any]:
            raise PermissionError(13, "Access Denied")

    with pytest.raises(RunError, match=r"^bucket/photos: cannot be reached: Access Denied$"):
        listed(["bucket/photos"], PyFileSystem(Closed()), PassedOver())
    with pytest.raises(RunError, match="of different file systems"):
        home([photographs, "mock:///photos"], None)


def test_a_file_is_written_whole_where_a_store_shows_parts(tmp_path: Path) -> None:
    for place in (Place(remote_of(tmp_path), "a.txt"), located(tmp_path / "a.txt")):
        place.write(b"first")
        place.write(b"second")
        assert place.read() == b"second"
        assert os.listdir(tmp_path) == ["a.txt"]
    assert Plan("file:///a/out.jsonl?", settings()).place.path == "/a/out.jsonl"
    assert located("file:///a/b c%20.jpg").path == "/a/b c%20.jpg"  # nothing is decoded


def outcomes(reading: Reading, photographs: Sequence[Listed]) -> list[Any]:
    row = read(shard_row(4, photographs), reading)
    assert row["shard"] == 4
    assert row["failure"] == ""
    names, images = pickle.loads(row["images"])
    assert names == [one.image for one in photographs]
    return list(images)


@pytest.mark.parametrize("remote", [False, True])
def test_what_cannot_be_read_is_an_error(
    photographs: Path, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem: FileSystem | None = remote_of(photographs) if remote else None
    names = ["b.jpg", "text.jpg", "empty.jpg", "cut.jpg", "none.jpg", "a.PNG"]
    base = "" if remote else f"{photographs}/"
    given = [Listed(f"s3://x/{name}", f"{base}{name}") for name in names]
    given.append(Listed("missing", "missing", "no such file or folder"))
    monkeypatch.setattr(stages, "MOST_BYTES", 2_000_000)
    with (photographs / "a.PNG").open("ab") as file:
        file.truncate(2_000_001)
    reading = Reading(Preprocessing(size=32), filesystem, 1, 30.0)
    good, text, empty, cut, none, large, missing = outcomes(reading, given)
    assert good[0] == 0
    assert len(good) == 1 + 3 * 32 * 32
    assert text == "not a picture that Pillow can read"
    assert empty == "an empty file (0 bytes)"
    assert cut.startswith("the file breaks off")
    assert none == "no such file"
    assert large == "too large to read: more than 2,000,000 bytes"
    assert missing == "no such file or folder"


def test_a_decoder_that_crashes_costs_one_photograph(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "read_photograph", read_or_crash)
    given = [Listed(name, str(photographs / name)) for name in ("b.jpg", "crash.jpg", "a.PNG")]
    # A size of its own: processes are kept for each.
    first, second, third = outcomes(Reading(Preprocessing(size=33), None, 1, 30.0), given)
    assert (first, third) == (b"33", b"33")
    assert second == "the decoder crashed (SIGSEGV)"
