"""The composition root: the only module that knows all the parts of a run and puts them together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import __version__, talk
from pipeline.bandwidth import read_speed
from pipeline.errors import BusyError, OvernightError, StoppedError
from pipeline.ledger.files import Patience, RunPaths
from pipeline.ledger.identity import LIMIT, SHARD, Identity
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.recovery import Resume, find_finished
from pipeline.ledger.upload import Upload
from pipeline.ledger.witness import Witness
from pipeline.metrics import Metrics
from pipeline.notice import facts_of_end, notify
from pipeline.outcome import Outcome, concluding, finished, plan_facts, summary_facts, tell_end
from pipeline.output import choose_form, kept_fields
from pipeline.output.native import render
from pipeline.probe import count_oom_kills, memory_held, memory_left
from pipeline.progress import Preparation, Progress
from pipeline.records import Engine, Json, Prompt, Rejection
from pipeline.remote import is_remote
from pipeline.runner import Runner
from pipeline.source.inputs import InputFile, expand_inputs
from pipeline.source.line_parser import LineParser
from pipeline.source.lines import InputDigest, digest_inputs, read_lines
from pipeline.source.shard import Shard, run_output
from pipeline.spec.fingerprint import fingerprint_fields
from pipeline.spec.keys import JobSpec
from pipeline.stop import Stop
from pipeline.summary import Tally
from pipeline.watch import Watch

if TYPE_CHECKING:
    from pipeline.engines import EngineChoice
    from pipeline.facts.model_facts import ModelFacts
    from pipeline.forecast.forecast import Forecast
    from pipeline.machine import Machine
    from pipeline.plan.plan import Plan, PromptStats

Say = Callable[[str], None]

_LIBRARIES = ("torch", "transformers", "auto-round", "tokenizers", "safetensors")
_TOLD_DECISIONS = (
    "load strategy",
    "dtype",
    "weights",
    "repacked weights",
    "experts",
    "slots",
)  # of the plan, at the start of a run


def run_job(
    spec: JobSpec,
    *,
    limit: int | None = None,
    shard: Shard | None = None,
    fresh: bool = False,
    retry: bool = False,
    quiet: bool = False,
    stop: Stop | None = None,
) -> Outcome:
    """Answer every prompt of the job's input that has no answer yet, and publish when all have one.

    `limit` runs only the first items, `shard` a part of them with an output of its own; `fresh` moves the files of an
    earlier run aside; `retry` takes up a finished run for the lines that are answered with an error. Raises an
    OvernightError for whatever keeps the run from starting or going on; what was acknowledged stays, and the same call
    resumes. Signals and `stop` end the run in good order.
    """
    say = _silence if quiet else talk.say
    stop = stop or Stop()
    stop.limit(spec.run.time_limit)
    with stop.signals():
        metrics = Metrics.of(spec, shard, say)
        try:
            outcome = _run(spec, limit, shard, stop, say, metrics, fresh=fresh, retry=retry, quiet=quiet)
            if outcome.summary is not None and shard is None:
                copy_output(spec, stop, say)
        except BusyError:  # the end of that run is for its own process to tell
            raise
        except Exception as error:
            code = error.exit_code if isinstance(error, OvernightError) else OvernightError.exit_code
            outcome = Outcome(code, run_output(spec.output.file, shard), None)
            _announce(spec, shard, outcome, metrics, say, str(error))
            raise
        if outcome.is_news:
            _announce(spec, shard, outcome, metrics, say)
    return outcome


def _announce(
    spec: JobSpec, shard: Shard | None, outcome: Outcome, metrics: Metrics, say: Say, message: str = ""
) -> None:
    """Tell those who wait for the end of the run."""
    metrics.end(outcome.exit_code)
    if spec.run.on_finish is not None:
        notify(spec.run.on_finish, facts_of_end(spec, shard, outcome, message), say)


def copy_output(spec: JobSpec, stop: Stop, say: Say) -> None:
    """Where the job's output belongs elsewhere, copy what is published there unless it is there. Raises WriteError."""
    if is_remote(spec.output.path):
        with stop.interrupting("copying the output"):
            if upload_of(spec).finish():
                say(f"copied to {spec.output.path}")


def upload_of(spec: JobSpec) -> Upload:
    """What copies the published output of a job to the remote place that it names."""
    return Upload(spec.output.file, spec.output.path, choose_form(spec, spec.output.file).companions)


def _run(
    spec: JobSpec,
    limit: int | None,
    shard: Shard | None,
    stop: Stop,
    say: Say,
    metrics: Metrics,
    *,
    fresh: bool,
    retry: bool,
    quiet: bool,
) -> Outcome:
    """As far as the output published on this machine."""
    with stop.interrupting("looking for the input"):
        files = tuple(expand_inputs(spec.input.path))
    parser = LineParser(spec, say)
    output = run_output(spec.output.file, shard)
    form = choose_form(spec, output)
    identity = job_identity(spec, files, limit, shard)
    resume = _resume(spec, shard, retry=retry)
    with stop.interrupting("reading the input"):
        summary = None if fresh else find_finished(output, identity, resume=resume)
    if summary is not None and not (retry and summary["failed"]):
        say(f"{output} is finished already; {'there is nothing to retry' if retry else 'nothing was done'}")
        return replace(finished(output, summary), is_news=False)
    with stop.interrupting("preparing"):
        # Imported by a run that has something to do: who asks for a finished one again need not wait for them.
        from pipeline.forecast.session import Expectation
        from pipeline.loading import apply_environment

        if shard is None and is_remote(spec.output.path):
            upload_of(spec).refuse_stranger()
        facts, model = locate_model(spec, say, quiet=quiet)
        plan, choice = prepare(spec, facts, files=files)
        apply_environment(plan)
        encoder = choice.encoder()
    expectation = Expectation(spec, plan, versions := library_versions(plan.engine))
    watch = Watch(stop, stall_timeout_s=spec.run.stall_timeout, memory=memory_left, say=say)
    witness = Witness(RunPaths(output).log, oom_kills=count_oom_kills, memory_held=memory_held)
    with (
        Ledger.open(
            output,
            replace(identity, model=model),
            resume=resume,
            fresh=fresh,
            retry=retry,
            patience=Patience(sleep=watch.sleep),
            witness=witness,
            companions=form.companions,
        ) as ledger,
        witness.listening() as log,
    ):
        before = replace(ledger.tally)  # the counts; they go on growing in place
        if not ledger.is_complete:
            num_done = before.completed + before.failed
            forecast = expectation.forecast(ledger.items, num_done, files, encoder.encode)
            _say_beginning(ledger, plan, forecast, output, say)
            metrics.begin(ledger.num_answers, plan.slots, ledger.tally, ledger.sessions)
            runner = Runner(
                encode=encoder.encode,
                engine=None,
                ledger=ledger,
                render=partial(render, keep_fields=kept_fields(spec)),
                num_samples=spec.generation.num_samples,
                stop=stop,
                beat=watch.beat,
                observe=lambda _tally, _num_in_flight: None,
                max_attempts=spec.run.max_attempts,
                save_unfinished_s=spec.run.save_unfinished,
            )
            if runner.settle(_prompts(spec, parser, files, limit, ledger.next_unanswered_item)):
                engine = _load(choice, ledger, expectation.conditions(forecast), stop, say)
                progress = Progress(ledger.num_answers, ledger.tally, quiet=quiet)
                with closing(progress), closing(engine), watch.watching(log):
                    runner = replace(runner, engine=engine, observe=_observer(ledger, progress, metrics, engine))
                    if ledger.has_suspects:
                        say("a fault ended an earlier session: what was in flight is tried one by one")
                        runner.run_alone(_prompts(spec, parser, files, limit, ledger.next_suspect_item))
                    runner.run(_prompts(spec, parser, files, limit, ledger.next_unanswered_item))
        if not ledger.is_complete:
            ledger.close(stop.ended)
            expectation.learn(before, ledger.tally, ledger.sessions[-1])
            say(f"stopped ({stop.reason}); run the same command again to resume")
            return Outcome(StoppedError.exit_code, output, None)
        told = summary_facts(spec, ledger.input_sha256, plan_facts(plan, versions))
        summary = ledger.publish(concluding(told), summary_line=spec.output.summary_line, form=form)
        expectation.learn(before, ledger.tally, ledger.sessions[-1])
        metrics.show(ledger.tally, ledger.sessions, 0)
    tell_end(output, summary, say)
    return finished(output, summary)


def library_versions(engine: str) -> dict[str, str]:
    """Of overnight, Python and the libraries that the engine computes with."""
    import platform
    from importlib.metadata import version

    libraries = () if engine == "echo" else _LIBRARIES
    ours = {"overnight": __version__, "python": platform.python_version()}
    return ours | {name: version(name) for name in libraries}


def _observer(ledger: Ledger, progress: Progress, metrics: Metrics, engine: Engine) -> Callable[[Tally, int], None]:
    """Shows what each commit has come to."""

    def observe(tally: Tally, num_in_flight: int) -> None:
        progress.show(tally)
        metrics.show(tally, ledger.sessions, num_in_flight, slots=engine.slots)

    return observe


def locate_model(spec: JobSpec, say: Say, *, quiet: bool) -> tuple[ModelFacts | None, str | None]:
    """The facts of the job's model, found, made or downloaded as need be, and what identifies its content.

    None and None for an engine without a model. Raises as `find_model` and `read_facts` do.
    """
    facts = _read_facts(spec, say, config_only=False, quiet=quiet)
    if facts is None:
        return None, None
    from pipeline.loading.resolve import model_identity

    return facts, model_identity(Path(facts.directory), trust_remote_code=spec.model.trust_remote_code)


def locate_config(spec: JobSpec, say: Say) -> ModelFacts | None:
    """The facts of the job's model as far as a plan needs them: of a hub model no weights are downloaded."""
    return _read_facts(spec, say, config_only=True, quiet=False)


def _read_facts(spec: JobSpec, say: Say, *, config_only: bool, quiet: bool) -> ModelFacts | None:
    if spec.model.engine == "echo":
        return None
    from pipeline.facts.model_facts import read_facts
    from pipeline.loading.resolve import find_model

    with closing(Preparation(quiet=quiet)) as preparation:
        directory = find_model(spec.model, config_only=config_only, report=say, progress=preparation)
    return read_facts(directory, trust_remote_code=spec.model.trust_remote_code)


def prepare(
    spec: JobSpec,
    facts: ModelFacts | None,
    *,
    machine: Machine | None = None,
    stats: PromptStats | None = None,
    files: Sequence[InputFile] = (),
) -> tuple[Plan, EngineChoice]:
    """Decide how the job runs here (or on `machine`), before anything heavy is loaded.

    Without `stats`, where memory bounds the batch, the first lines of `files` tell how long prompts are.
    """
    from pipeline.engines import choose_engine
    from pipeline.forecast.census import FIRST_LINES, take_sample
    from pipeline.loading import apply_environment
    from pipeline.plan.budget import MAX_SLOTS
    from pipeline.plan.plan import make_plan
    from pipeline.probe import probe_machine

    here = machine or probe_machine()
    plan = make_plan(spec, here, facts, stats)
    if plan.streaming is not None and machine is None:
        speed = read_speed(sorted(Path(plan.model_dir or "").glob("*.safetensors")))
        here = replace(here, disk_read_bytes_per_s=None if speed is None else round(speed))
        plan = make_plan(spec, here, facts, stats)
    choice = choose_engine(spec, plan, facts)
    if files and stats is None and facts is not None and plan.slots < MAX_SLOTS:
        apply_environment(plan)  # the encoder imports what reads it
        sample = take_sample(spec, files, range(FIRST_LINES), choice.encoder().encode, most=FIRST_LINES)
        plan = make_plan(spec, here, facts, sample.prompt_stats)
        choice = choice.revised(plan)
    return plan, choice


def _load(choice: EngineChoice, ledger: Ledger, conditions: Mapping[str, Json], stop: Stop, say: Say) -> Engine:
    """The engine, with its model in memory, and the ledger told so. Raises StoppedError, and what loading raises."""
    try:
        with stop.interrupting("loading the model"):
            engine, load_s = choice.open(say, say is not _silence and sys.stderr.isatty() and not talk.is_json())
    except StoppedError:
        ledger.close(stop.ended)
        raise
    ledger.loaded(load_s, conditions)
    return engine


def _resume(spec: JobSpec, shard: Shard | None, *, retry: bool) -> Resume:
    """What `run.resume` means here: a retry is of an earlier run, and which items a shard has changes with the input's
    length."""
    unfit = (retry and spec.run.resume == "never") or (shard is not None and spec.run.resume == "always")
    return "if-unchanged" if unfit else spec.run.resume


def job_identity(
    spec: JobSpec, files: tuple[InputFile, ...], limit: int | None, shard: Shard | None = None
) -> Identity:
    """What the job and its input are now, its model apart; reads no input yet. NotFoundError for a template file."""

    def measure(prefix_bytes: int | None) -> InputDigest:
        digest = digest_inputs(files, prefix_bytes=prefix_bytes, max_bytes=spec.input.max_bytes)
        return digest if limit is None else replace(digest, num_items=min(limit, digest.num_items))

    fields = {**fingerprint_fields(spec), LIMIT: limit}
    if shard is not None:
        fields[SHARD] = str(shard)
    return Identity(fields, spec.generation.num_samples, files, measure)


def _prompts(
    spec: JobSpec,
    parser: LineParser,
    files: Sequence[InputFile],
    limit: int | None,
    next_wanted: Callable[[int], int | None],
) -> Iterator[Prompt | Rejection]:
    """The prompts that are wanted; the other lines are passed over unparsed."""
    lines = read_lines(files, max_line_bytes=spec.input.max_line, stop=limit, next_wanted=next_wanted)
    return map(parser.parse, lines)


def _say_beginning(ledger: Ledger, plan: Plan, forecast: Forecast | None, output: Path, say: Say) -> None:
    done = ledger.tally.completed + ledger.tally.failed
    if done:
        say(f"resuming {output}: {done} of {ledger.num_answers} answers are there")
    say_decisions(plan, say, _TOLD_DECISIONS)
    if forecast is not None:
        say(f"time: {forecast} of generation ({forecast.reason})")


def say_decisions(plan: Plan, say: Say, names: Sequence[str]) -> None:
    """Tell those of the plan's decisions, each with its reason."""
    for decision in plan.decisions:
        if decision.name in names:
            say(f"{decision.name}: {decision.value} ({decision.reason})")


def _silence(_told: object) -> None:
    pass
