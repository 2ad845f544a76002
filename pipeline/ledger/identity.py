"""What makes a run the run of one job and one input, and the refusal to go on with another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from pipeline.errors import DataError, Problem, SpecError
from pipeline.records import Json
from pipeline.source.inputs import InputFile
from pipeline.source.lines import InputDigest
from pipeline.source.shard import Shard

LIMIT, SHARD = "--limit", "--shard"  # among the fields of a job, what the command line adds to them
_NUM_SAMPLES = "generation.num_samples"
_ANEW = "start anew with --fresh, which moves the earlier run's files aside"


@dataclass(frozen=True, slots=True)
class Identity:
    """What the job and its input are now.

    `fields` are all keys of the job whose change would mix answers or bytes, by dotted name. `measure` reads the whole
    input and is called only if it must be; its argument is how many bytes the input once had, or None. `model` is a
    digest of the model's files; None where the engine has no model, or where nobody has looked yet.
    """

    fields: Mapping[str, Json]
    num_samples: int
    files: tuple[InputFile, ...]
    measure: Callable[[int | None], InputDigest]
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """What the job was when the run began, and its input when it last grew, as the journal has them."""

    fields: Mapping[str, Json]
    num_samples: int
    input: InputDigest
    model: str | None = None
    merged: tuple[str, ...] = ()  # SHA-256 of the shards' outputs, where the run was put together from them

    @property
    def limit(self) -> int | None:
        """How many of the input's items a trial was begun with; None for all."""
        return cast("int | None", self.fields.get(LIMIT))

    @property
    def items(self) -> range:
        """The indexes of the run's items: all of the input, or those of its shard."""
        shard, num_items = self.fields.get(SHARD), self.input.num_items
        return range(num_items) if shard is None else Shard.parse(str(shard)).items(num_items)

    @property
    def numbers(self) -> range:
        """The numbers of the answers that the run has to give."""
        return range(self.items.start * self.num_samples, self.items.stop * self.num_samples)

    @property
    def num_answers(self) -> int:
        return len(self.numbers)

    @classmethod
    def of(cls, identity: Identity, merged: tuple[str, ...] = ()) -> Header:
        return cls(_as_json(identity.fields), identity.num_samples, identity.measure(None), identity.model, merged)

    def to_record(self) -> dict[str, Any]:
        return {
            "fields": self.fields,
            "num_samples": self.num_samples,
            "input": input_to_record(self.input),
            "model": self.model,
            **({"merged": self.merged} if self.merged else {}),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Header:
        digest, merged = input_from_record(record["input"]), tuple(record.get("merged", ()))
        return cls(record["fields"], record["num_samples"], digest, record["model"], merged)


def _as_json(fields: Mapping[str, Json]) -> dict[str, Json]:
    """What reading the fields back will give: a list for a tuple."""
    return json.loads(json.dumps(dict(fields)))


def input_to_record(digest: InputDigest) -> dict[str, Any]:
    return {
        "sha256": digest.sha256,
        "num_bytes": digest.num_bytes,
        "num_items": digest.num_items,
        "files": [[file.name, file.size, file.mtime_ns] for file in digest.files],
    }


def input_from_record(record: Mapping[str, Any]) -> InputDigest:
    files = tuple(InputFile(name, size, mtime_ns) for name, size, mtime_ns in record["files"])
    return InputDigest(files, record["sha256"], record["num_bytes"], record["num_items"])


def check_job(header: Header, identity: Identity) -> None:
    """SpecError with every key that has changed since the run began, its old value and its new one."""
    problems = list(_changed_fields(header, identity))
    if identity.model is not None and identity.model != header.model:
        message = "the model's files are not those that the run began with, which would mix answers"
        problems.append(
            Problem(f"{message}; bring them back, write to another output.path, or {_ANEW}", field="model.path")
        )
    if problems:
        raise SpecError(problems)


def _changed_fields(header: Header, identity: Identity) -> Iterator[Problem]:
    before = {**header.fields, _NUM_SAMPLES: header.num_samples}
    now = {**_as_json(identity.fields), _NUM_SAMPLES: identity.num_samples}
    for name in sorted(before.keys() | now.keys()):
        if name in before and name in now and before[name] == now[name]:
            continue
        values = [json.dumps(each[name], ensure_ascii=False) if name in each else "nothing" for each in (before, now)]
        message = f"was {values[0]} when the run began and is {values[1]} now, which would mix answers"
        yield Problem(f"{message}; set it back, write to another output.path, or {_ANEW}", field=name)


def check_input(header: Header, identity: Identity, *, may_grow: bool) -> InputDigest | None:
    """None where the input's content is as before; its new digest where it only grew at its end, if it may.

    Reads the input. Raises DataError for any other change.
    """
    before = header.input
    now = identity.measure(before.num_bytes if may_grow else None)
    if (now.sha256, now.num_items) == (before.sha256, before.num_items):
        return None
    if now.prefix_sha256 == before.sha256:  # measured only if it may
        return now
    names = ", ".join(file.name for file in identity.files)
    change = f"had {before.num_items} items and {before.num_bytes} bytes, has {now.num_items} and {now.num_bytes}"
    raise DataError(
        Problem(f"the input has changed since the run began ({change} now): restore it, or {_ANEW}", file=names)
    )


def is_untouched(header: Header, identity: Identity) -> bool:
    """Whether the input's files have the names, sizes and times that they had, so that nobody need read them."""
    return header.input.files == identity.files
