"""Lines, their places and their digest, against a reader so simple that it needs the whole file in memory."""

from __future__ import annotations

import gzip
import hashlib
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.source.inputs import InputFile, expand_inputs
from pipeline.source.lines import InputDigest, RawLine, digest_inputs, read_lines

BOM = b"\xef\xbb\xbf"
PIECES = (b"\n", b"\n\n", b"\r\n", b"\r", b" ", b"\t \x0b\x0c", b"{}", b"\n{", b'{"prompt":"a"}', BOM, b"\0", b"\xef")
CONTENT = st.one_of(st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=25).map(b"".join), st.binary())
CONTENTS = st.lists(CONTENT, min_size=1, max_size=3)
CHUNK_BYTES = st.integers(1, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


def write(folder: Path, contents: Sequence[bytes]) -> list[InputFile]:
    for number, content in enumerate(contents):
        (folder / f"{number}.jsonl").write_bytes(content)
    return expand_inputs([str(folder / f"{number}.jsonl") for number in range(len(contents))])


def expected_lines(files: Sequence[InputFile], max_line_bytes: int = 10**9) -> list[RawLine]:
    lines: list[RawLine] = []
    for file in files:
        content = file.path.read_bytes()
        offset = len(BOM) if content.startswith(BOM) else 0
        for number, line in enumerate(content[offset:].split(b"\n"), 1):
            if line.strip(b" \t\n\r\x0b\x0c"):
                data = line.removesuffix(b"\r")
                kept = data if len(data) <= max_line_bytes else None
                lines.append(RawLine(len(lines), str(file.path), number, offset, kept))
            offset += len(line) + 1
    return lines


@given(CONTENTS, CHUNK_BYTES, st.integers(1, 30))
def test_lines_and_places_do_not_depend_on_chunks(
    folder: Path, contents: list[bytes], chunk: int, longest: int
) -> None:
    files = write(folder, contents)
    lines = list(read_lines(files, max_line_bytes=longest, chunk_bytes=chunk))
    assert lines == expected_lines(files, longest)
    for line in lines:
        if line.data is not None:
            assert Path(line.file).read_bytes()[line.offset :].startswith(line.data)


@given(CONTENTS, CHUNK_BYTES)
def test_digest_counts_the_lines_that_are_read(folder: Path, contents: list[bytes], chunk: int) -> None:
    files = write(folder, contents)
    digest = digest_inputs(files, chunk_bytes=chunk)
    assert digest.num_items == len(expected_lines(files))
    assert digest.num_bytes == sum(map(len, contents))
    if len(contents) == 1:
        assert digest.sha256 == hashlib.sha256(contents[0]).hexdigest()
    assert digest == digest_inputs(files)


@given(CONTENTS, CHUNK_BYTES, st.tuples(st.integers(0, 12), st.integers(0, 12)), st.sets(st.integers(0, 12)))
def test_a_part_of_the_lines_is_what_was_asked_for(
    folder: Path, contents: list[bytes], chunk: int, bounds: tuple[int, int], done: set[int]
) -> None:
    files = write(folder, contents)
    everything = expected_lines(files)
    start, stop = bounds

    def next_wanted(index: int) -> int | None:
        return next((each for each in range(index, len(everything)) if each not in done), None)

    part = read_lines(files, max_line_bytes=99, start=start, stop=stop, next_wanted=next_wanted, chunk_bytes=chunk)
    assert list(part) == [line for line in everything[start:stop] if line.index not in done]


def digest_of(folder: Path, contents: Sequence[bytes], prefix_bytes: int | None = None) -> InputDigest:
    return digest_inputs(write(folder, contents), prefix_bytes=prefix_bytes)


def test_files_do_not_run_into_each_other(folder: Path) -> None:
    divisions = [[b"{}\n", b"{}\n"], [b"{}\n{}\n"], [b"{}", b"\n{}\n"], [b"{}", b"{}"], [b"{}{}"], [b"{", b"}{}"]]
    assert len({digest_of(folder, contents).sha256 for contents in divisions}) == len(divisions)
    assert digest_of(folder, [b"{}", b"{}"]).num_items == 2


def test_blank_lines_are_told_from_lines_with_braces_inside(folder: Path) -> None:
    assert digest_of(folder, [b'{}\n{}\n{"a":{}}\n\n']).num_items == 3


def test_a_prefix_that_ends_in_the_byte_order_mark_does_not_change_the_count(folder: Path) -> None:
    for prefix_bytes in range(6):
        assert digest_of(folder, [BOM + b"\n{}"], prefix_bytes).num_items == 1


def test_an_empty_file_changes_nothing(folder: Path) -> None:
    assert digest_of(folder, [b"", b"{}\n", b""]).sha256 == digest_of(folder, [b"{}\n"]).sha256


def test_recompressed_content_has_the_same_digest(tmp_path: Path) -> None:
    content = b'{"prompt": "a"}\n' * 100_000
    (tmp_path / "plain.jsonl").write_bytes(content)
    (tmp_path / "fast.gz").write_bytes(gzip.compress(content, 1))
    (tmp_path / "small.gz").write_bytes(gzip.compress(content[:999], 9) + gzip.compress(content[999:], 9))
    digests = {
        (digest.sha256, digest.num_bytes, digest.num_items)
        for name in ("plain.jsonl", "fast.gz", "small.gz")
        for digest in [digest_inputs(expand_inputs([str(tmp_path / name)]))]
    }
    assert digests == {(hashlib.sha256(content).hexdigest(), len(content), 100_000)}


@given(CONTENTS, CONTENT, CHUNK_BYTES)
def test_input_that_grew_is_known_by_its_prefix(folder: Path, contents: list[bytes], more: bytes, chunk: int) -> None:
    before = digest_inputs(write(folder, contents))
    old_items = expected_lines(before.files)
    files = write(folder, [*contents[:-1], contents[-1] + more])
    after = digest_inputs(files, prefix_bytes=before.num_bytes, chunk_bytes=chunk)
    kept = expected_lines(files)[: len(old_items)] == old_items
    if after.prefix_sha256 is not None:
        assert after.prefix_sha256 == before.sha256
        # Only a carriage return that turns out not to end the line escapes the look at one byte.
        assert kept or more.startswith(b"\r")
    elif kept:  # refused although nothing changed: white space, or a part of a byte order mark, at the end
        assert not more.startswith((b"\r", b"\n")) or contents[-1] in (b"\xef", b"\xef\xbb")


def test_a_prefix_is_told_from_other_content(folder: Path) -> None:
    old = digest_of(folder, [b"{}\n", b"{}\n"])
    grown = [[b"{}\n", b"{}\n{}"], [b"{}\n", b"{}\n", b"{}"], [b"{}\n", b"{}\n"], [b"{}\n", b"", b"{}\n", b""]]
    assert {digest_of(folder, contents, old.num_bytes).prefix_sha256 for contents in grown} == {old.sha256}
    for other in ([b"{}\n", b"[]\n{}"], [b"{}\n{}\n", b"{}"], [b"{}\n"]):
        assert digest_of(folder, other, old.num_bytes).prefix_sha256 != old.sha256
    cut = digest_of(folder, [b'{"prompt": "a'])
    assert digest_of(folder, [b'{"prompt": "a"}\n'], cut.num_bytes).prefix_sha256 is None


def test_more_than_max_bytes_is_refused_without_reading_on(tmp_path: Path) -> None:
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b" " * (64 << 20)))
    files = expand_inputs([str(tmp_path / "bomb.gz")])
    read: list[int] = []
    with pytest.raises(DataError, match=r"bomb.gz.*input.max_bytes"):
        digest_inputs(files, max_bytes=3 << 20, progress=read.append)
    assert len(read) < 6
    assert digest_inputs(files, max_bytes=64 << 20).num_items == 0


@pytest.mark.parametrize("kind", ["long line", "gzip bomb of blanks", "many short lines"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.gz" if "gzip" in kind else "a.jsonl")
    if kind == "long line":
        with path.open("wb") as file:
            file.truncate(300 << 20)  # a hole: one line of NULs
    elif kind == "gzip bomb of blanks":
        path.write_bytes(gzip.compress(b" " * (64 << 20), 1))
    else:
        path.write_bytes(b"1\n" * (8 << 20))
    files = expand_inputs([str(path)])
    tracemalloc.start()
    try:
        num_items = digest_inputs(files).num_items
        digest_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        # Tracing makes each of millions of small lines dear; the first of them show as much as all.
        lines = [line.data for line in read_lines(files, max_line_bytes=1 << 20, stop=100)]
        read_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (num_items, lines) == {
        "long line": (1, [None]),
        "gzip bomb of blanks": (0, []),
        "many short lines": (8 << 20, [b"1"] * 100),
    }[kind]
    assert digest_peak < 8 << 20
    assert read_peak < 64 << 20


def test_passing_over_finished_items_costs_a_scan(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' * 400_000)
    files = expand_inputs([str(path)])

    def seconds(work: Callable[[], object]) -> float:
        def once() -> float:
            begin = time.process_time()
            work()
            return time.process_time() - begin

        return min(once() for _ in range(3))

    def read_the_last() -> None:
        (line,) = read_lines(files, max_line_bytes=99, start=399_999)
        assert (line.index, line.line, line.offset) == (399_999, 400_000, 399_999 * 16)

    assert seconds(read_the_last) < 2.5 * seconds(lambda: digest_inputs(files))


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(-2, 3), st.sampled_from([b"\n", b"\r\n", b""]), CHUNK_BYTES)
def test_the_longest_line_that_is_allowed(folder: Path, longest: int, excess: int, end: bytes, chunk: int) -> None:
    length = max(1, longest + excess)
    files = write(folder, [b"x" * length + end])
    (line,) = read_lines(files, max_line_bytes=longest, chunk_bytes=chunk)
    assert line.data == (b"x" * length if length <= longest else None)
