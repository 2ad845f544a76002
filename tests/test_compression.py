"""Compressed files are read whole or refused, in bounded memory, and an output is compressed by its name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compression import DamagedStreamError, compressed, decompressing
from pipeline.errors import DataError
from pipeline.output.results import read_results
from pipeline.source.inputs import CHUNK_BYTES, expand_inputs, read_chunks
from tests.command import overnight, read_output, without_times, write_job

KINDS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


def read(data: bytes, suffix: str) -> bytes:
    with decompressing(io.BytesIO(data), f"a.jsonl{suffix}") as stream:
        return stream.read()


@pytest.mark.parametrize("suffix", KINDS)
@given(st.lists(st.binary(max_size=200), max_size=4), st.integers(0, 9))
def test_streams_in_a_row_are_one_file(suffix: str, parts: list[bytes], num_zeros: int) -> None:
    # As `cat a.zst b.zst` makes them; some writers fill up with zeros at the end.
    data = b"".join(map(KINDS[suffix], parts)) + b"\0" * (num_zeros if parts else 0)
    assert read(data, suffix.upper()) == b"".join(parts)


@pytest.mark.parametrize("suffix", ["", *KINDS])
@given(st.lists(st.binary(max_size=200), max_size=4))
def test_what_is_written_is_read_and_the_same_each_time(suffix: str, pieces: list[bytes]) -> None:
    data = b"".join(compressed(pieces, f"x{suffix}"))
    assert read(data, suffix) == b"".join(pieces)
    assert data == b"".join(compressed(pieces, f"x{suffix}"))


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: data[:-1],
        lambda data: data[:3],
        _flip,
        lambda data: data + b"garbage",
        lambda data: data + data[:9],
        lambda _: b'{"prompt": "plain"}\n',
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, suffix: str, damage) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    checksum = {zstd.CompressionParameter.checksum_flag: True}
    data = os.urandom(1000)
    path.write_bytes(damage(zstd.compress(data, options=checksum) if suffix == ".zst" else KINDS[suffix](data)))
    (file,) = expand_inputs([str(path)])
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+: is cut short, damaged, or no "):
        list(read_chunks(file, CHUNK_BYTES))


@pytest.mark.parametrize("suffix", KINDS)
def test_a_bomb_is_read_in_bounded_memory_and_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"in.jsonl{suffix}").write_bytes(KINDS[suffix](bytes(64 << 20)))
    (file,) = expand_inputs([str(tmp_path / f"in.jsonl{suffix}")])
    tracemalloc.start()
    assert sum(map(len, read_chunks(file, CHUNK_BYTES))) == 64 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    job = write_job(tmp_path, [], input={"path": str(tmp_path / f"in.jsonl{suffix}"), "max_bytes": "1MiB"})
    run = overnight("run", job)
    assert run.returncode == 65 and "input.max_bytes" in run.stderr


def test_a_header_that_asks_for_much_memory_is_refused() -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 3 << 19}]
    data = bytearray(lzma.compress(b"x", format=lzma.FORMAT_ALONE, filters=[{"id": lzma.FILTER_LZMA1}]))
    data[1:5] = (0xFFFFFFFF).to_bytes(4, "little")
    with pytest.raises(DamagedStreamError, match=r"[Mm]emory"):
        read(bytes(data), ".xz")
    assert read(lzma.compress(b"x", filters=filters), ".xz") == b"x"


@pytest.mark.parametrize("suffix", KINDS)
def test_a_run_publishes_compressed_and_verify_reads_it(tmp_path: Path, suffix: str) -> None:
    lines = [{"prompt": f"question {number}"} for number in range(20)]
    (tmp_path / "plain").mkdir()
    assert overnight("run", write_job(tmp_path / "plain", lines)).returncode == 0
    answers, _ = read_output(tmp_path / "plain/out.jsonl")
    out = tmp_path / f"out.jsonl{suffix}"
    job = write_job(tmp_path, lines, output={"path": str(out)})
    (tmp_path / f"in.jsonl{suffix}").write_bytes(KINDS[suffix]((tmp_path / "in.jsonl").read_bytes()))
    words = ["--set", f"input.path={tmp_path / f'in.jsonl{suffix}'}"]
    assert overnight("run", job, *words).returncode == 0
    assert without_times(list(read_results(out))) == without_times(answers)
    assert read(out.read_bytes(), suffix).endswith(b"}\n")
    assert overnight("verify", job, *words).returncode == 0
    again = overnight("run", job, *words)
    assert again.returncode == 0 and "finished already" in again.stderr
    out.write_bytes(_flip(out.read_bytes()))
    assert overnight("verify", job, *words).returncode == 65
