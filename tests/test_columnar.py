"""Tables in and out: their rows are the lines of a job, whatever their layout, and answers can be a table."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import columnar, load_job, read_results, run_job
from pipeline.errors import DataError, NotFoundError, SpecError
from pipeline.output.parquet import SUMMARY_KEY, Parquet, schema
from pipeline.source.inputs import expand_inputs
from pipeline.source.lines import digest_inputs, read_lines
from pipeline.tools.verify import verify_job
from tests.command import finish, is_generating, kill_after, start, wait_until, write_job

CELLS = {
    "prompt": st.none() | st.text(max_size=20),
    "number": st.none() | st.integers(-(2**63), 2**63 - 1),
    "flag": st.none() | st.booleans(),
    "ratio": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "tags": st.none() | st.lists(st.text(max_size=3), max_size=3),
    "place": st.none() | st.fixed_dictionaries({"city": st.none() | st.text(max_size=3), "height": st.integers(0, 9)}),
}
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("number", pa.int64()),
        ("flag", pa.bool_()),
        ("ratio", pa.float64()),
        ("tags", pa.list_(pa.string())),
        ("place", pa.struct([("city", pa.string()), ("height", pa.int64())])),
    ]
)
ROWS = st.lists(st.fixed_dictionaries(CELLS), min_size=1, max_size=30)


def read(path: Path) -> list[Any]:
    """The objects in the lines of a table; their places must be those of rows in the lines that the rows make."""
    lines = list(read_lines(expand_inputs([str(path)]), max_line_bytes=1 << 20))
    assert [raw.line for raw in lines] == [raw.index + 1 for raw in lines] == list(range(1, len(lines) + 1))
    offset = 0
    for raw in lines:
        assert raw.data is not None and raw.offset == offset
        offset += len(raw.data) + 1
    return [json.loads(raw.data or b"") for raw in lines]


def digest(path: Path) -> str:
    return digest_inputs(expand_inputs([str(path)])).sha256


def write_arrow(path: Path, table: pa.Table, *, stream: bool) -> None:
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


@given(ROWS, st.integers(1, 40), st.sampled_from(["none", "snappy", "zstd", "gzip"]), st.booleans())
@settings(max_examples=60)
def test_rows_are_the_lines_whatever_the_layout(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], group: int, codec: str, dictionary: bool
) -> None:
    directory = tmp_path_factory.mktemp("layout")
    table = pa.Table.from_pylist(rows, SCHEMA)
    one, other = directory / "one.parquet", directory / "other.parquet"
    pq.write_table(table, one)
    pq.write_table(table, other, row_group_size=group, compression=codec, use_dictionary=dictionary)
    assert read(one) == read(other) == rows
    write_arrow(directory / "file.arrow", table, stream=False)
    write_arrow(directory / "stream.arrow", table, stream=True)
    assert len({digest(path) for path in directory.iterdir()}) == 1


def test_the_digest_is_that_of_the_lines_which_the_rows_make(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "ü"], "n": [1, None]}), tmp_path / "in.parquet")
    lines = '{"prompt":"a","n":1}\n{"prompt":"ü","n":null}\n'.encode()
    assert digest(tmp_path / "in.parquet") == hashlib.sha256(lines).hexdigest()


def test_values_that_json_has_not(tmp_path: Path) -> None:
    table = pa.table(
        {
            "bytes": [b"\xff\x00"],
            "decimal": [Decimal("1.20")],
            "day": [datetime(2026, 1, 2, tzinfo=UTC).date()],
            "time": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns", "UTC")),
            "not_a_number": [float("nan")],
            "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
            "category": pa.array(["x"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    (row,) = read(tmp_path / "in.parquet")
    assert row == {
        "bytes": "_wA=",
        "decimal": "1.20",
        "day": "2026-01-02",
        "time": "2023-11-14T22:13:20.123456Z",
        "not_a_number": None,
        "map": [["a", 1]],
        "category": "x",
    }


def test_text_that_is_no_utf8_costs_its_row(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"b\xffd", b"also\ngood"]).view(pa.string())
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "in.parquet")
    job = write_job(tmp_path, [], input={"path": str(tmp_path / "in.parquet")})
    assert run_job(load_job(job), quiet=True).exit_code == 3
    first, second, third = read_results(tmp_path / "out.jsonl")
    assert (first["completion"], third["completion"]) == ("good", "also\ngood")
    assert (second["error"]["type"], second["error"]["line"]) == ("invalid_utf8", 2)


@given(st.data())
@settings(max_examples=150)
def test_a_damaged_table_is_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / data.draw(st.sampled_from(["in.parquet", "in.arrow", "stream.arrow"]))
    table = pa.table({"prompt": [f"prompt {n}" for n in range(200)], "n": list(range(200))})
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression="zstd")
    else:
        write_arrow(path, table, stream=path.name == "stream.arrow")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        digest(path)
    except DataError as error:
        assert str(path) in str(error) and "Traceback" not in str(error)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["x", "x"]), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="two columns have the name 'x'"):
        digest(tmp_path / "in.parquet")


# Directories.


def test_a_saved_data_set_is_its_rows_in_order(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_dict({"prompt": [f"p{n}" for n in range(2500)]})
    whole.save_to_disk(tmp_path / "saved", num_shards=3)
    assert [row["prompt"] for row in whole] == [row["prompt"] for row in lines_of(tmp_path / "saved")]
    whole.shuffle(seed=1).select(range(40)).save_to_disk(tmp_path / "chosen")
    chosen = datasets.load_from_disk(tmp_path / "chosen")
    assert [row["prompt"] for row in chosen] == [row["prompt"] for row in lines_of(tmp_path / "chosen")]


def lines_of(directory: Path) -> list[Any]:
    return [json.loads(raw.data or b"") for raw in read_lines(expand_inputs([str(directory)]), max_line_bytes=1 << 20)]


def test_of_several_splits_one_must_be_named(tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"prompt": ["a"]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
    with pytest.raises(NotFoundError, match=r"holds several splits; name one: .*/both/train or .*/both/test"):
        expand_inputs([str(tmp_path / "both")])
    assert len(lines_of(tmp_path / "both" / "test")) == 1
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    for name in ("train-00001-of-00002", "train-00000-of-00002", "test-00000-of-00001"):
        part.to_parquet(hub / f"{name}.parquet")
    with pytest.raises(NotFoundError, match=r"name one: .*data/test-\*\.parquet or .*data/train-\*\.parquet"):
        expand_inputs([str(tmp_path / "hub")])
    (hub / "test-00000-of-00001.parquet").unlink()
    assert [file.path.name[:11] for file in expand_inputs([str(tmp_path / "hub")])] == ["train-00000", "train-00001"]


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": [{"filename": "../../etc/passwd"}]}'])
def test_a_data_set_that_is_none_is_refused(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(NotFoundError):
        expand_inputs([str(tmp_path)])


def test_lists_and_globs_of_mixed_formats_have_stable_indexes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["p0", "p1"]}), tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a0"}\n\n{"prompt": "a1"}')
    (tmp_path / "c.jsonl").write_text('{"prompt": "c0"}')
    files = expand_inputs([str(tmp_path / "c.jsonl"), str(tmp_path / "[ab].*")])
    found = [(raw.index, Path(raw.file).name, raw.line) for raw in read_lines(files, max_line_bytes=1 << 20)]
    assert found == [
        (0, "c.jsonl", 1),
        (1, "a.jsonl", 1),
        (2, "a.jsonl", 3),
        (3, "b.parquet", 1),
        (4, "b.parquet", 2),
    ]


@pytest.mark.parametrize("key", ["input.path", "output.path"])
def test_without_the_library_the_job_says_what_to_install(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SpecError, match=rf"{key}: x\.parquet: \.parquet needs `pip install 'overnight\[data\]'`"):
        load_job(write_job(tmp_path, []), overrides=[f"{key}=x.parquet"])


@pytest.mark.slow
def test_a_large_table_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())]), use_dictionary=False) as writer:
        writer.write_table(pa.table({"prompt": [f"{n} " * 400 for n in range(300_000)]}))  # one row group of 800 MB
    program = (
        "import resource, sys; from pipeline.source.inputs import expand_inputs; import pyarrow.parquet;"
        "from pipeline.source.lines import digest_inputs;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; digest_inputs(expand_inputs(sys.argv[1:]));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 256 * 1024  # KiB


# A table of answers.

LINES: list[Any] = [{"id": n or "zero", "prompt": f"say {n} " * (n % 5 + 1), "n": n} for n in range(40)] + [b"{bad"]


def answers(directory: Path, name: str, **sections: Any) -> list[dict[str, Any]]:
    job = write_job(directory, LINES, output={"path": str(directory / name)}, **sections)
    assert finish(job) == 3
    return list(read_results(directory / name))


def test_a_table_of_answers_says_what_the_lines_say(tmp_path: Path) -> None:
    lines = answers(tmp_path, "out.jsonl", generation={"num_samples": 2})
    rows = answers(tmp_path, "out.parquet", generation={"num_samples": 2})
    assert len(lines) == 82
    for line, row in zip(lines, rows, strict=True):
        assert line.keys() == row.keys() and (line["timing"] is None) == (row["timing"] is None)
        id_ = line["id"] if line["id"] is None or isinstance(line["id"], str) else json.dumps(line["id"])
        assert {**line, "id": id_, "timing": None} == {**row, "timing": None}
        assert row["timing"] is None or row["timing"].keys() == line["timing"].keys()


def test_others_read_the_table(tmp_path: Path) -> None:
    answers(tmp_path, "out.parquet")
    frame = pd.read_parquet(tmp_path / "out.parquet")
    assert list(frame["index"]) == list(range(41)) and frame["completion"].isna().sum() == 1
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "c"))
    assert loaded["train"][3]["usage"]["prompt_tokens"] == len(LINES[3]["prompt"])
    assert json.loads(loaded["train"][3]["input"]) == LINES[3]
    with pq.ParquetFile(tmp_path / "out.parquet") as file:
        assert file.schema_arrow.remove_metadata() == schema()
        summary = json.loads(file.metadata.metadata[SUMMARY_KEY.encode()])
    assert summary == json.loads((tmp_path / "out.parquet.summary.json").read_bytes())


def test_the_summary_may_stay_out_of_the_table(tmp_path: Path) -> None:
    job = write_job(tmp_path, LINES, output={"path": str(tmp_path / "out.parquet"), "summary_line": False})
    assert run_job(load_job(job), quiet=True).exit_code == 3
    assert SUMMARY_KEY.encode() not in pq.read_metadata(tmp_path / "out.parquet").metadata


@given(st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=40)
def test_a_changed_byte_of_the_table_is_told(finished: Path, place: int, value: int) -> None:
    path = finished / "out.parquet"
    content = path.read_bytes()
    place %= len(content)
    changed = content[:place] + bytes([value]) + content[place + 1 :]
    path.write_bytes(changed)
    problems: list[Any] = []
    verify_job(load_job(finished / "job.yaml"), problems.append)
    path.write_bytes(content)
    assert bool(problems) == (changed != content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("table")
    answers(directory, "out.parquet")
    return directory


def test_the_same_lines_make_the_same_table_however_they_are_cut(finished: Path) -> None:
    data = (finished / "out.parquet.partial").read_bytes()
    cut = data.find(b"\n", len(data) // 2) + 1
    tables = [
        b"".join(Parquet().encode(lines, lambda _: b"{}\n", summary_line=True))
        for lines in ([data], [data[:cut], data[cut:]])
    ]
    assert tables[0] == tables[1]


def test_what_is_no_table_of_answers_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for name in ("other.parquet", "broken.parquet"):
        with pytest.raises(DataError, match=name):
            list(read_results(tmp_path / name))
    with pytest.raises(NotFoundError):
        list(read_results(tmp_path / "none.parquet"))


def test_a_killed_run_from_table_to_table_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    whole, killed = (table_job(tmp_path / name) for name in ("whole", "killed"))
    process = start("run", killed, "--quiet")
    wait_until(lambda: is_generating(killed.parent, "out.parquet"))
    assert kill_after(process, 0) == -9
    assert not (killed.parent / "out.parquet").exists()
    # The same rows in another layout are the same input.
    table = pq.read_table(killed.parent / "in.parquet")
    pq.write_table(table, killed.parent / "in.parquet", row_group_size=9)
    for job in (whole, killed):
        assert finish(job) == 0
    results = [[{**row, "timing": None} for row in read_results(job.parent / "out.parquet")] for job in (whole, killed)]
    assert results[0] == results[1]
    assert len(json.loads((killed.parent / "out.parquet.summary.json").read_bytes())["sessions"]) == 2


def table_job(directory: Path) -> Path:
    directory.mkdir()
    pq.write_table(pa.table({"prompt": [f"say {n} " * (n % 7 + 1) for n in range(150)]}), directory / "in.parquet")
    return write_job(
        directory,
        [],
        model={"engine": "echo", "echo": {"delay": "10ms"}},
        input={"path": str(directory / "in.parquet")},
        output={"path": str(directory / "out.parquet")},
        generation={"temperature": 1.0},
        batch={"slots": 2},
    )


def test_a_changed_row_is_another_input(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"]}), path)
    job = write_job(tmp_path, [], input={"path": str(path)})
    assert finish(job) == 0
    pq.write_table(pa.table({"prompt": ["a", "c"]}), path)
    with pytest.raises(DataError, match="the input has changed"):
        finish(job)
