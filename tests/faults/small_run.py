"""A run of a few answers, the same every time: to break, to resume, and to see whether what comes out is right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import OvernightError
from pipeline.ledger.files import Files, Patience
from pipeline.ledger.history import History
from pipeline.ledger.identity import Identity
from pipeline.ledger.ledger import Ledger
from pipeline.records import Completion, Item, ItemError, Timing, Unfinished, Usage
from pipeline.source.inputs import InputFile
from pipeline.source.lines import InputDigest
from pipeline.summary import Session, Tally
from tests.faults.crash_states import Recorder

NUM_ITEMS = 5
NUM_SAMPLES = 1
# Not in the order of the input, and two to a group.
GROUPS = [[1, 0], [4, 2], [3]]


class UnsyncedFiles(Files):
    """For checks of what a run does that do not cut the power: syncs take their time and change nothing."""

    def sync(self, descriptor: int) -> None:
        pass

    def sync_directory(self, path: Path) -> None:
        pass


def identity(
    num_items: int = NUM_ITEMS, num_samples: int = NUM_SAMPLES, *, before: int | None = None, **fields: object
) -> Identity:
    """Of a job over an input of `num_items` lines, whose first `before` lines are what the input once was."""
    files = (InputFile("in.jsonl", 10 * num_items, num_items),)

    def measure(prefix_bytes: int | None) -> InputDigest:
        prefix = f"{before} lines" if before is not None and prefix_bytes == 10 * before else None
        return InputDigest(files, f"{num_items} lines", 10 * num_items, num_items, prefix)

    return Identity({"model.path": "echo", **fields}, num_samples, files, measure)


def answer(index: int, sample: int = 0) -> Completion:
    """Every seventh item fails."""
    item = Item(index, "in.jsonl", index + 1, 10 * index)
    if index % 7 == 3:
        return Completion.failed(item, sample, ItemError("broken", "no answer"))
    usage, timing = Usage(2, 3), Timing(0.0, 0.0, 0.1, 0.2)
    return Completion(item, sample, "stop", text="x" * index, usage=usage, timing=timing)


def line(index: int, sample: int = 0) -> bytes:
    return json.dumps({"index": index, "sample": sample, "text": "x" * index}).encode() + b"\n"


def lines(num_items: int = NUM_ITEMS, num_samples: int = NUM_SAMPLES) -> bytes:
    return b"".join(line(index, sample) for index in range(num_items) for sample in range(num_samples))


def summarize(tally: Tally, sessions: Sequence[Session], sha256: str) -> dict[str, object]:
    """Says nothing of time and of sessions, so that every run of the same answers ends in the same bytes."""
    assert sessions[-1].ended == "finished"
    return {"object": "summary", "completed": tally.completed, "failed": tally.failed, "output_sha256": sha256}


def published(num_items: int = NUM_ITEMS, num_samples: int = NUM_SAMPLES) -> tuple[bytes, bytes]:
    """What X and its summary must be."""
    answers = lines(num_items, num_samples)
    failed = len(range(3, num_items, 7)) * num_samples
    record = {
        "object": "summary",
        "completed": num_items * num_samples - failed,
        "failed": failed,
        "output_sha256": hashlib.sha256(answers).hexdigest(),
    }
    last = json.dumps(record).encode() + b"\n"
    return answers + last, last


def open_ledger(output: Path, files: Files, **options: object) -> Ledger:
    """The ledger of the small run, with no time for a full disk unless a patience is given."""
    options = {"identity": identity(), "patience": Patience(0.0), **options}
    return Ledger.open(output, options.pop("identity"), files=files, **options)


def known(ledger: Ledger) -> dict[str, object]:
    """What the ledger has acknowledged, to be noted while it is recorded and looked for after a crash."""
    history: History = ledger._history
    return {
        "done": {number for number, done in enumerate(history.done) if done},
        "unfinished": dict(history.unfinished),
        "ended": None,
        "published": False,
    }


def run_session(output: Path, recorder: Recorder, *, stop_after: int | None = None, **options: object) -> None:
    """Take the run up and go on to the end, or stop in good order after so many commits; note what is acknowledged."""
    ledger = open_ledger(output, recorder, **options)
    recorder.note(known(ledger))
    try:
        _go_on(ledger, recorder, stop_after)
    except OvernightError:  # a process that is killed closes nothing
        ledger.close()
        recorder.note(known(ledger))
        raise


def _go_on(ledger: Ledger, recorder: Recorder, stop_after: int | None) -> None:
    ledger.loaded(1.5)
    num_commits = 0
    for group in GROUPS:
        left = [index for index in group if not ledger.is_done(index, 0)]
        if num_commits == stop_after:
            ledger.close("stopped")
            recorder.note({**known(ledger), "ended": "stopped"})
            return
        if not left:
            continue
        ledger.admit((index, 0) for index in left)
        ledger.save_unfinished([Unfinished(left[0], 0, (7, 8, 9))])
        recorder.note(known(ledger))
        for index in left:
            ledger.append(answer(index), line(index))
        ledger.commit()
        num_commits += 1
        recorder.note(known(ledger))
    ledger.publish(summarize, summary_line=True)
    recorder.note({**known(ledger), "published": True})
    ledger.close()


def finish(output: Path, files: Files, **options: object) -> dict[str, object]:
    """Resume, answer what is missing, publish; what was known at the beginning, and how the sessions before ended."""
    with open_ledger(output, files, **options) as ledger:
        before = {**known(ledger), "sessions": [session.ended for session in ledger.sessions]}
        for number in range(ledger.num_answers):
            if not ledger.is_done(number, 0):
                ledger.append(answer(number), line(number))
        ledger.publish(summarize, summary_line=True)
    return before
