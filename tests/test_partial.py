"""Lines come back in input order whatever the order and the groups in which they were written."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.ledger import partial
from pipeline.ledger.journal import encode_line, write_runs
from pipeline.ledger.partial import LineIndex, read_groups


def write_run(directory, groups, lines):
    """A journal and a partial file of these groups of numbers, as far as this module reads them."""
    data, journal = b"", b""
    for numbers in groups:
        group = b"".join(lines[number] for number in numbers)
        record = {"kind": "commit", "start": len(data), "end": len(data) + len(group)}
        record |= {"sha256": hashlib.sha256(group).hexdigest(), "numbers": write_runs(numbers), "failed": ""}
        data += group
        journal += encode_line({"kind": "admit"}, 0) + encode_line(record, 0)
    (directory / "j").write_bytes(journal)
    (directory / "p").write_bytes(data)
    return directory / "j", directory / "p"


@st.composite
def runs(draw):
    lines = draw(st.lists(st.binary(max_size=12).map(lambda data: data.replace(b"\n", b" ") + b"\n"), max_size=30))
    order = draw(st.permutations(range(len(lines))))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(lines) - 1)), max_size=4)))
    groups = [order[start:end] for start, end in zip([0, *cuts], [*cuts, len(lines)], strict=True)]
    return [group for group in groups if group], lines


@given(runs(), st.integers(1, 40))
def test_lines_are_read_in_order(tmp_path_factory, run, run_bytes):
    groups, lines = run
    directory = tmp_path_factory.mktemp("run")
    paths = write_run(directory, groups, lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial, "_RUN_BYTES", run_bytes)
        parts = list(LineIndex(paths[1], range(len(lines)), read_groups(*paths)).read_in_order())
    assert b"".join(parts) == b"".join(lines)
    assert all(part.endswith(b"\n") for part in parts)
    assert all(len(part) < run_bytes + max(map(len, lines)) for part in parts)
    assert [group.numbers for group in read_groups(*paths)] == groups


def test_neighbours_are_read_together(tmp_path):
    lines = [b"%d\n" % number for number in range(100)]
    paths = write_run(tmp_path, [range(50, 100), range(50)], lines)
    assert len(list(LineIndex(paths[1], range(100), read_groups(*paths)).read_in_order())) == 2


def test_a_group_that_has_changed_is_refused(tmp_path):
    lines = [b"%d\n" % number for number in range(9)]
    journal, path = write_run(tmp_path, [range(5), range(5, 9)], lines)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + b"x" + whole[at + 1 :])
        with pytest.raises(DataError, match=f"bytes {0 if at < 10 else 10} to {10 if at < 10 else 18} are not those"):
            list(read_groups(journal, path))
        path.write_bytes(whole[:at])
        with pytest.raises(DataError, match=f"ends at byte {at}"):
            list(read_groups(journal, path))
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be read: No such file.*--fresh"):
        list(read_groups(journal, path))


def test_a_group_with_another_number_of_lines_is_refused(tmp_path):
    journal, path = write_run(tmp_path, [[0, 1]], [b"0\n1\n", b"2\n"])
    with pytest.raises(DataError, match="another number of answers"):
        list(read_groups(journal, path))
