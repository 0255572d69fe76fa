"""Run folders: what is resumed, what is refused, and that kill -9 loses and damages nothing."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

import interp
from interp.files import write_json
from interp.provenance import ProvenanceError
from interp.runs import Run, RunError

SETTINGS = {"model": "abc", "analysis": "sink_rate", "rule": {"key": 0, "threshold": 0.3}}
N_ITEMS, SIZE = 22, 2
ROOT = Path(interp.__file__).parent.parent

CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from test_runs import score
score({folder!r}, lambda: (print("shard", flush=True), time.sleep(0.005)))
"""


def rows_of(items: slice) -> pd.DataFrame:
    """Stands in for the scoring: the same items give the same rows."""
    index = np.arange(items.start, items.stop)
    return pd.DataFrame({"item": index, "score": np.sin(index) / 3})


def score(folder, between=lambda: None) -> pd.DataFrame:
    """A whole scoring run, as a command would do it."""
    run = Run.open(folder, SETTINGS)
    for index, items in run.shards(N_ITEMS, SIZE):
        run.save_shard(index, rows_of(items), {"index": index})
        between()
    table = pd.concat(run.tables(), ignore_index=True)
    run.finish(items=len(table))
    return table


def read_run(folder) -> dict:
    return json.loads((Path(folder) / "run.json").read_text())


def test_a_run_leaves_its_shards_and_says_what_it_did(tmp_path):
    table = score(tmp_path / "a" / "b")
    assert_frame_equal(table, rows_of(slice(0, N_ITEMS)))
    record = read_run(tmp_path / "a" / "b")
    assert record["status"] == "complete" and record["counts"] == {"items": N_ITEMS}
    assert record["settings"] == SETTINGS
    assert record["resumed"] == {"sessions": 1, "shards_kept": 0, "shards": 11}
    assert {"python", "torch", "transformers"} <= set(record["sessions"][0]["versions"])
    names = sorted(p.name for p in (tmp_path / "a/b/shards").iterdir())
    assert names[0] == "shard-00000-of-00011.parquet" and len(names) == 11


def test_the_last_shard_may_be_short(tmp_path):
    work = list(Run.open(tmp_path, SETTINGS).shards(5, 2))
    assert work == [(0, slice(0, 2)), (1, slice(2, 4)), (2, slice(4, 5))]


def test_a_shard_brings_its_metadata_back(tmp_path):
    run = Run.open(tmp_path, SETTINGS)
    for index, items in run.shards(2, 1):
        run.save_shard(index, rows_of(items), {"failed": np.int64(index), "why": ("a", "b")})
    assert [t.attrs for t in run.tables()] == [{"failed": i, "why": ["a", "b"]} for i in (0, 1)]


def test_other_readers_read_a_shard(tmp_path):
    score(tmp_path)
    shard = pd.read_parquet(tmp_path / "shards/shard-00001-of-00011.parquet")
    assert_frame_equal(shard, rows_of(slice(2, 4)))


def test_killed_at_any_moment_it_ends_with_the_same_table(tmp_path):
    whole = score(tmp_path / "whole")
    folder = tmp_path / "killed"
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder))
    rng = random.Random(0)
    kills = 0
    for _ in range(20):
        command = [sys.executable, "-c", code]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(rng.randint(0, 2)):
            child.stdout.readline()
        time.sleep(rng.uniform(0, 0.02))
        child.kill()
        rest = child.communicate()[0]
        kills += child.returncode == -9
        if child.returncode == 0:
            break
        assert "Traceback" not in rest
        if kills == 6:
            break
    assert kills >= 3
    saved = len(list(folder.glob("shards/shard-*.parquet")))
    assert_frame_equal(score(folder), whole)
    record = read_run(folder)
    assert record["status"] == "complete" and record["resumed"]["shards_kept"] == saved
    assert not list(folder.glob("**/.*"))


def test_a_finished_run_computes_nothing_again(tmp_path):
    whole = score(tmp_path)
    run = Run.open(tmp_path, SETTINGS)
    assert list(run.shards(N_ITEMS, SIZE)) == [] and run.n_shards == 11
    assert_frame_equal(pd.concat(run.tables(), ignore_index=True), whole)


def test_a_resumed_run_keeps_its_shard_size(tmp_path):
    run = Run.open(tmp_path, SETTINGS)
    index, items = next(run.shards(N_ITEMS, SIZE))
    run.save_shard(index, rows_of(items))
    work = list(Run.open(tmp_path, SETTINGS).shards(N_ITEMS, 7))
    assert work[0] == (1, slice(2, 4))


def test_another_number_of_items_is_refused(tmp_path):
    Run.open(tmp_path, SETTINGS).shards(22, 2)
    with pytest.raises(RunError, match="22 items.*23.*--out.*--overwrite"):
        Run.open(tmp_path, SETTINGS).shards(23, 2)


def truncate(shard):
    shard.write_bytes(shard.read_bytes()[:-20])


def empty(shard):
    shard.write_bytes(b"")


def flip_data(shard):
    content = bytearray(shard.read_bytes())
    content[60] ^= 0xFF
    shard.write_bytes(content)


def no_parquet(shard):
    shard.write_bytes(b"PAR1 not really PAR1")


@pytest.mark.parametrize("damage", [truncate, empty, flip_data, no_parquet, Path.unlink])
def test_a_damaged_shard_is_done_again(tmp_path, damage):
    whole = score(tmp_path)
    damage(tmp_path / "shards/shard-00003-of-00011.parquet")
    assert [index for index, _ in Run.open(tmp_path, SETTINGS).shards(N_ITEMS, SIZE)] == [3]
    assert_frame_equal(score(tmp_path), whole)


def test_a_shard_damaged_while_running_is_a_clear_error(tmp_path):
    run = Run.open(tmp_path, SETTINGS)
    for index, items in run.shards(N_ITEMS, SIZE):
        run.save_shard(index, rows_of(items))
    truncate(tmp_path / "shards/shard-00003-of-00011.parquet")
    with pytest.raises(RunError, match="shard-00003.*Start it again"):
        list(run.tables())


def test_another_runs_folder_names_what_differs(tmp_path):
    score(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    other = {"model": "abc", "analysis": "sink_rate", "rule": {"key": 0, "threshold": 0.5}, "n": 3}
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path, other)
    message = str(caught.value)
    for words in ("rule.threshold is 0.3 there and 0.5 here", "n is not set there", "--overwrite"):
        assert words in message
    assert "model is" not in message and "\n" not in message
    assert (tmp_path / "run.json").read_bytes() == before


def test_many_differences_are_counted(tmp_path):
    Run.open(tmp_path, dict.fromkeys("abcdef", 0))
    with pytest.raises(RunError, match="a is 0 there and 1 here.*and 3 more"):
        Run.open(tmp_path, dict.fromkeys("abcdef", 1))


def test_starting_anew_deletes_the_results_and_nothing_else(tmp_path):
    score(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "shards/mine.txt").write_text("mine")
    run = Run.open(tmp_path, {"model": "other"}, resume=False)
    assert len(list(run.shards(N_ITEMS, SIZE))) == 11
    assert not list(tmp_path.glob("shards/shard-*"))
    assert (tmp_path / "notes.txt").exists() and (tmp_path / "shards/mine.txt").exists()


def test_settings_survive_json(tmp_path):
    settings = {
        "lengths": (256, 512),
        "n": np.int64(20),
        "data": Path("a/b"),
        "limit": float("nan"),
    }
    Run.open(tmp_path, settings)
    assert Run.open(tmp_path, settings).settings["lengths"] == [256, 512]


def test_settings_that_json_cannot_say_are_named(tmp_path):
    with pytest.raises(ProvenanceError, match=r"settings\.model: a object"):
        Run.open(tmp_path, {"model": object()})


@pytest.mark.parametrize("content", ["", '{"format": "inte', "\x00\x00\x00"])
def test_a_damaged_run_json_is_repaired_and_the_shards_are_kept(tmp_path, content):
    whole = score(tmp_path)
    (tmp_path / "run.json").write_text(content)
    run = Run.open(tmp_path, SETTINGS)
    assert list(run.shards(N_ITEMS, SIZE)) == []
    assert_frame_equal(pd.concat(run.tables(), ignore_index=True), whole)
    assert read_run(tmp_path)["settings"] == SETTINGS


def test_without_run_json_the_shards_of_another_run_are_refused(tmp_path):
    score(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunError, match="shards of a run with other settings"):
        Run.open(tmp_path, {"model": "other"})


def test_a_run_json_of_something_else_is_refused(tmp_path):
    write_json(tmp_path / "run.json", {"my": "file"})
    with pytest.raises(RunError, match="not one of ours"):
        Run.open(tmp_path, SETTINGS)


def test_a_newer_run_json_is_refused(tmp_path):
    write_json(tmp_path / "run.json", {"format": "interp.run", "version": 9})
    with pytest.raises(RunError, match="version 9.*up to 1"):
        Run.open(tmp_path, SETTINGS)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file'.*it is a file.*another --out"):
        Run.open(tmp_path / "file", SETTINGS)
    with pytest.raises(RunError, match="cannot write there"):
        Run.open(tmp_path / "file" / "below", SETTINGS)
    with pytest.raises(RunError, match="cannot write there"):
        Run.open("/proc/interp", SETTINGS)


def test_an_unfinished_run_cannot_be_called_complete(tmp_path):
    run = Run.open(tmp_path, SETTINGS)
    next(run.shards(N_ITEMS, SIZE))
    with pytest.raises(RunError, match="11 of 11 shards"):
        run.finish()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ProvenanceError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
