"""`overnight merge`: the finished shards of a job become one output, as an undivided run would have written it."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline import talk
from pipeline.job import Say, copy_output, job_identity, upload_of
from pipeline.ledger.files import Patience
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.merge import find_merged, merge_parts
from pipeline.ledger.parts import begun_shards, count_shards, finished_parts, joined_facts
from pipeline.outcome import Outcome, concluding, finished, summary_facts, tell_end
from pipeline.output import choose_form
from pipeline.records import Json
from pipeline.remote import is_remote
from pipeline.source.inputs import expand_inputs
from pipeline.spec.keys import JobSpec
from pipeline.stop import Stop


def merge_job(
    spec: JobSpec, *, num_shards: int | None = None, fresh: bool = False, quiet: bool = False, stop: Stop | None = None
) -> Outcome:
    """Join the finished runs of all shards of the job into one, and publish it as an undivided run would have done.

    `num_shards` is found from the files where it is None. Loads no model. Raises NotFoundError, StoppedError, DataError
    or SpecError naming each shard that lacks something, and whatever keeps the output from being written; can be
    interrupted anywhere and called again. `fresh` moves the files of an earlier run, or merge, aside.
    """
    say = _silence if quiet else talk.say
    stop = stop or Stop()
    with stop.signals():
        with stop.interrupting("merging"):
            summary = _merge(spec, num_shards, stop, say, fresh=fresh)
        copy_output(spec, stop, say)
    return finished(spec.output.file, summary)


def _merge(spec: JobSpec, num_shards: int | None, stop: Stop, say: Say, *, fresh: bool) -> Mapping[str, Json]:
    """The summary of the output, published on this machine."""
    files = tuple(expand_inputs(spec.input.path))
    output = spec.output.file
    summary = None if fresh else find_merged(output, lambda limit: job_identity(spec, files, limit))
    if summary is not None:
        say(f"{output} is finished already; nothing was done")
        return summary
    if is_remote(spec.output.path):
        upload_of(spec).refuse_stranger()
    parts = finished_parts(output, num_shards or count_shards(output, begun_shards(output)))
    identity = job_identity(spec, files, parts[0].header.limit)
    form = choose_form(spec, output)
    patience = Patience(sleep=stop.sleep)
    merge_parts(output, parts, identity, fresh=fresh, companions=form.companions, patience=patience)
    with Ledger.open(output, identity) as ledger:
        told = summary_facts(spec, ledger.input_sha256, joined_facts(parts))
        summary = ledger.publish(concluding(told), summary_line=spec.output.summary_line, form=form)
    say(f"merged {len(parts)} shards")
    tell_end(output, summary, say)
    return summary


def _silence(_text: str) -> None:
    pass
