"""A journal cut anywhere gives a beginning of itself; damaged anywhere else it is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.ledger.files import DISK, GrowingFile, Patience
from pipeline.ledger.journal import (
    Journal,
    decode_line,
    encode_line,
    new_id,
    read_first_and_last,
    read_journal,
    read_runs,
    write_runs,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
records = st.dictionaries(st.text(), json_values, max_size=4)


@given(records, st.integers(0, 2**50))
def test_a_line_reads_back(record, synced):
    line = encode_line(record, synced)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert line.isascii()
    assert decode_line(line) == (record, synced)


@given(records, st.data())
def test_a_line_with_one_byte_changed_removed_or_added_is_not_whole(record, data):
    line = encode_line(record, 7)
    at = data.draw(st.integers(0, len(line) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != line[at]))
    for damaged in (line[:at] + bytes((byte,)) + line[at + 1 :], line[:at] + line[at + 1 :]):
        assert decode_line(damaged) is None
    assert decode_line(line[:at] + bytes((byte,)) + line[at:]) is None


@given(st.lists(st.integers(0, 50)))
def test_runs_read_back_in_their_order(numbers):
    assert read_runs(write_runs(numbers)) == numbers


def test_runs_are_compact():
    assert write_runs(range(10**6)) == "0-999999"
    assert write_runs([4, 5, 6, 9, 2, 3, 3, 2]) == "4-6 9 2-3 3 2"
    assert write_runs([]) == ""


def journal_of(path, num_synced, num_unsynced, first=b""):
    """A journal with so many lines whose sync later lines tell of, and so many that may have been lost."""
    path.write_bytes(first)
    journal = Journal(GrowingFile(DISK, path, Patience(0.0)))
    for number in range(num_synced + num_unsynced):
        journal.append({"kind": "note", "number": number})
        if number < num_synced:
            journal.sync()
    return path.read_bytes()


def read_all(path, content):
    path.write_bytes(content)
    return [record["number"] for record, _ in read_journal(path)]


def test_a_journal_cut_anywhere_gives_its_whole_lines(tmp_path):
    content = journal_of(tmp_path / "j", 3, 3)
    for size in range(len(content) + 1):
        assert read_all(tmp_path / "cut", content[:size]) == list(range(content[:size].count(b"\n")))
        # What a file system often leaves in place of the rest.
        assert read_all(tmp_path / "cut", content[:size].ljust(len(content), b"\0"))[
            : content[:size].count(b"\n")
        ] == list(range(content[:size].count(b"\n")))


def test_each_record_comes_with_the_end_of_its_line(tmp_path):
    content = journal_of(tmp_path / "j", 2, 2)
    ends = [end for _, end in read_journal(tmp_path / "j")]
    assert [content[:end].count(b"\n") for end in ends] == [1, 2, 3, 4]
    assert ends[-1] == len(content)


@pytest.mark.parametrize("damage", ["flip", "zero", "remove"])
def test_damage_to_synced_lines_is_refused_and_to_the_tail_is_cut(tmp_path, damage):
    content = journal_of(tmp_path / "j", 3, 3)
    for at in range(len(content)):
        new = {"flip": bytes((content[at] ^ 1,)), "zero": b"\0", "remove": b""}[damage]
        spoilt = content[:at] + new + content[at + 1 :]
        line = content[:at].count(b"\n")
        if line < 3:
            with pytest.raises(DataError, match=r"damaged.*--fresh"):
                read_all(tmp_path / "bad", spoilt)
        else:
            assert read_all(tmp_path / "bad", spoilt) == list(range(line))


def test_an_unsynced_line_may_be_lost_before_one_that_is_whole(tmp_path):
    content = journal_of(tmp_path / "j", 2, 3)
    lines = content.splitlines(keepends=True)
    lines[3] = bytes(len(lines[3]) - 1) + b"\n"
    assert read_all(tmp_path / "hole", b"".join(lines)) == [0, 1, 2]


@pytest.mark.parametrize("is_ours", [False, True])
def test_what_a_removed_journal_has_left_in_the_blocks_of_a_torn_tail_is_no_part_of_this_one(tmp_path, is_ours):
    """Same job, same sizes, and lines that say that all before them was synced."""
    ids = [new_id(), new_id()]
    firsts = [encode_line({"number": 0, "id": ids[0 if is_ours else journal]}, 0) for journal in (0, 1)]
    content, old = (journal_of(tmp_path / name, 3, 1, first) for name, first in zip("jo", firsts, strict=True))
    assert len(content) == len(old)
    assert read_all(tmp_path / "j", content) == [0, 0, 1, 2, 3]
    assert read_first_and_last(tmp_path / "j")[1]["number"] == 3
    ends = [end for _, end in read_journal(tmp_path / "j")]
    for end in ends[:-1]:
        torn = content[:end] + bytes(9) + old[end + 9 :]
        if is_ours and end < ends[-2]:
            with pytest.raises(DataError, match="damaged"):
                read_all(tmp_path / "torn", torn)
        else:
            assert read_all(tmp_path / "torn", torn) == [0, 0, 1, 2][: ends.index(end) + 1]
    if not is_ours:  # nor is it where it begins with a line
        assert read_all(tmp_path / "torn", content[: ends[1]] + old[ends[1] :]) == [0, 0]


def test_lines_taken_out_of_the_middle_are_missed(tmp_path):
    lines = journal_of(tmp_path / "j", 4, 0).splitlines(keepends=True)
    with pytest.raises(DataError, match="lines are missing"):
        read_all(tmp_path / "short", b"".join(lines[:1] + lines[2:]))


def test_the_ends_are_read_whatever_their_length(tmp_path):
    path = tmp_path / "j"
    for length in (1, 10, 100_000, 1_000_000):
        lines = [encode_line({"number": number, "text": "x" * length}, 0) for number in range(3)]
        path.write_bytes(b"".join(lines))
        first, last = read_first_and_last(path)
        assert (first["number"], last["number"]) == (0, 2)
        path.write_bytes(lines[0])
        assert read_first_and_last(path) == (first, first)
        for torn in (b"", lines[0] + lines[1][:-1], lines[0][1:] + lines[1]):
            path.write_bytes(torn)
            with pytest.raises(ValueError, match="not whole"):
                read_first_and_last(path)
