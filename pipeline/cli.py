"""Words to calls, errors to exit codes; no logic. Standard output is data, standard error is talk."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from pipeline import talk
from pipeline.errors import EXIT_OK, EXIT_SOME_FAILED, DataError, OvernightError, Problem, UsageError
from pipeline.source.shard import Shard

app = typer.Typer(
    name="overnight",
    help="Offline bulk generation: one YAML job, one JSONL file of prompts, one command; run it again to resume.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the job: --set generation.seed=7 (repeatable)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no talk; errors only.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Talk on standard error as JSON, one object a line.")]
TimeLimit = Annotated[str | None, typer.Option(metavar="DURATION", help="Stop in good order after it, e.g. 3h: 75.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N items, for a trial.")]
ShardOf = Annotated[
    Shard | None,
    typer.Option("--shard", metavar="I/N", parser=Shard.parse, help="Only the I-th of N parts of the input, from 1."),
]


@app.command(epilog="Example: overnight run jobs/quickstart.yaml")
def run(
    job: JobFile,
    overrides: Overrides = None,
    limit: Limit = None,
    shard: ShardOf = None,
    time_limit: TimeLimit = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an earlier run's files aside and start anew.")] = False,
    supervised: Annotated[
        bool, typer.Option("--supervise", help="Start the run again whenever its process dies.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Answer every prompt of the job's input; run again to resume."""
    talk.use_json(log_json)
    if supervised:
        _supervise(job, overrides, time_limit, limit=limit, shard=shard, fresh=fresh, quiet=quiet, as_json=as_json)
    _run(job, overrides, time_limit, limit=limit, shard=shard, fresh=fresh, quiet=quiet, as_json=as_json)


@app.command(epilog="Example: overnight retry jobs/quickstart.yaml")
def retry(
    job: JobFile,
    overrides: Overrides = None,
    limit: Limit = None,
    shard: ShardOf = None,
    time_limit: TimeLimit = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Answer again the lines of a finished run whose answer is an error, and publish all anew."""
    talk.use_json(log_json)
    _run(job, overrides, time_limit, limit=limit, shard=shard, retry=True, quiet=quiet, as_json=as_json)


@app.command(epilog="Example: overnight validate jobs/quickstart.yaml")
def validate(job: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check the job file and every input line; loads no model."""
    from pipeline.spec.job_file import load_spec
    from pipeline.tools.validate import validate_job

    tell, found = _teller(as_json=as_json)
    validation = validate_job(load_spec(job, overrides=overrides or ()), tell, talk.say)
    if as_json:
        _print_json({**validation.to_json(), "problems": found})
    else:
        talk.say(str(validation))
    raise typer.Exit(DataError.exit_code if validation.num_bad else EXIT_OK)


@app.command(
    epilog="Example: overnight plan jobs/qwen3-next-80b-min-gpu.yaml --machine examples/machines/cpu-64gb.yaml"
)
def plan(
    job: JobFile,
    overrides: Overrides = None,
    limit: Limit = None,
    shard: ShardOf = None,
    machine: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan for the machine that this file describes.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and time a few steps, for the time to be known.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, metavar="PRICE", help="Of the machine; the plan says what the run costs.")
    ] = None,
    sample: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most lines to tokenize, evenly spread; all are checked.")
    ] = 20_000,
    as_json: AsJson = False,
) -> None:
    """Say what a run would do, how long it would take and what it would refuse, without doing it."""
    from pipeline.spec.job_file import load_spec
    from pipeline.tools.plan import plan_job

    report = plan_job(
        load_spec(job, overrides=overrides or ()),
        limit=limit,
        shard=shard,
        machine_file=machine,
        measure=measure,
        price_per_hour=price_per_hour,
        sample=sample,
    )
    if as_json:
        _print_json(report.to_json())
    else:
        sys.stdout.write(f"{report}\n")


@app.command(epilog="Example: overnight status jobs/quickstart.yaml --watch")
def status(
    job: JobFile,
    overrides: Overrides = None,
    shard: ShardOf = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on until the run ends; with --json one object a line.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say how far a running, stopped or finished run is, from its files alone."""
    from pipeline.spec.job_file import load_spec
    from pipeline.tools.status import job_status, show_until_end

    spec = load_spec(job, overrides=overrides or ())
    if watch:
        with suppress(KeyboardInterrupt):
            show_until_end(spec, shard, sys.stdout, as_json=as_json)
    elif as_json:
        _print_json(job_status(spec, shard).to_json())
    else:
        sys.stdout.write(f"{job_status(spec, shard)}\n")


@app.command(epilog="Example: overnight report jobs/quickstart.yaml -o report.html --png report.png")
def report(
    job: JobFile,
    overrides: Overrides = None,
    shard: ShardOf = None,
    page: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The page; OUTPUT.report.html if not given.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="The drawings as a picture, too.")] = None,
    show_text: Annotated[
        bool, typer.Option("--show-text", help="Show prompts and answers of slow and failed lines.")
    ] = False,
) -> None:
    """Write a page that tells what happened in a run, finished or not: one HTML file that needs no network."""
    from pipeline.spec.job_file import load_spec
    from pipeline.tools.report.report import report_job

    spec = load_spec(job, overrides=overrides or ())
    path = report_job(spec, shard=shard, page=page, png=png, show_text=show_text)
    sys.stdout.write(f"{path}\n")


@app.command(epilog="Example: overnight merge jobs/quickstart.yaml")
def merge(
    job: JobFile,
    overrides: Overrides = None,
    num_shards: Annotated[
        int | None, typer.Option("--shards", min=1, metavar="N", help="How many there are; else found from the files.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an earlier output aside and merge anew.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Join the finished shards of a job into one output, as an undivided run would have written it."""
    from pipeline.spec.job_file import load_spec
    from pipeline.tools.merge import merge_job

    outcome = merge_job(load_spec(job, overrides=overrides or ()), num_shards=num_shards, fresh=fresh, quiet=quiet)
    if as_json:
        _print_json(outcome.summary)
    raise typer.Exit(outcome.exit_code)


@app.command(epilog="Example: overnight verify jobs/quickstart.yaml --json")
def verify(job: JobFile, overrides: Overrides = None, shard: ShardOf = None, as_json: AsJson = False) -> None:
    """Check a run's files, its output and its input: nothing lost, doubled or altered; exit code 65 if not."""
    from pipeline.spec.job_file import load_spec
    from pipeline.tools.verify import verify_job

    tell, found = _teller(as_json=as_json)
    verification = verify_job(load_spec(job, overrides=overrides or ()), tell, shard=shard)
    if as_json:
        _print_json({**verification.to_json(), "problems": found})
    else:
        talk.say(str(verification))
    raise typer.Exit(DataError.exit_code if verification.num_problems else EXIT_OK)


@app.command(
    epilog="Examples: overnight bench jobs/quickstart.yaml --baseline stock > now.json; "
    "overnight bench --compare before.json now.json"
)
def bench(
    job: Annotated[Path | None, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)] = None,
    overrides: Overrides = None,
    limit: Limit = None,
    passes: Annotated[int, typer.Option(min=1, metavar="N", help="Times through the data, after a warm-up.")] = 3,
    baseline: Annotated[
        Literal["stock"] | None, typer.Option(help="Measure stock transformers in turn, in batches of 16.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="Compare two results instead.")
    ] = None,
) -> None:
    """Measure the job's throughput on its input; writes no answers.

    A table and VALID or INVALID, with reasons, on standard error; the result as JSON on standard output. Exit code 3
    where the figures are INVALID.
    """
    from pipeline.tools import bench as tool

    if (job is None) == (compare is None):
        raise UsageError("bench takes a job file, or --compare with two results")
    if compare is not None:
        sys.stdout.write(f"{tool.compare(*compare)}\n")
        return
    from pipeline.spec.job_file import load_spec

    assert job is not None
    spec = load_spec(job, overrides=overrides or ())
    result = tool.bench_job(spec, num_passes=passes, limit=limit, stock=baseline is not None, say=talk.say)
    talk.say(str(result))
    _print_json(result.to_json())
    raise typer.Exit(EXIT_OK if result.valid else EXIT_SOME_FAILED)


@app.command(
    epilog="Examples: overnight doctor; overnight doctor jobs/quickstart.yaml; "
    "overnight doctor --model builtin:smollm2-135m; overnight doctor runs/"
)
def doctor(
    subject: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR | JOB.yaml]",
            help="A job: the machine, its model and its output's directory. A directory: whether its file system "
            "keeps what the ledger needs, and nothing else.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="How fast this model is loaded: a directory, builtin:NAME, hub id."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what of this machine, a model or a directory is slow, and what to do; exit code 69 in trouble."""
    from pipeline.tools.doctor import diagnose

    diagnosis = diagnose(subject, model)
    if as_json:
        _print_json(diagnosis.to_json())
    else:
        sys.stdout.write(f"{diagnosis}\n")
    raise typer.Exit(diagnosis.exit_code)


@app.command(
    epilog="Examples: overnight chat jobs/quickstart.yaml; "
    "overnight chat jobs/quickstart.yaml --once 'Name a planet.'; "
    "overnight chat jobs/quickstart.yaml --once - < prompt.txt"
)
def chat(
    job: JobFile,
    overrides: Overrides = None,
    once: Annotated[
        str | None,
        typer.Option(metavar="PROMPT", help="Answer this prompt and leave; - reads it from standard input."),
    ] = None,
    hide_thinking: Annotated[bool, typer.Option("--hide-thinking", help="Do not show what the model thinks.")] = False,
    quiet: Quiet = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --once: the answer as a record, as in a run's output.")
    ] = False,
) -> None:
    """Talk to the job's model: same placement, template and thinking mode as a run.

    /help lists the commands of a conversation. Ctrl-C stops an answer, Ctrl-D leaves. With --once the answer is on
    standard output, all else on standard error; exit code 3 if it is an error.
    """
    from pipeline.spec.job_file import load_spec
    from pipeline.tools.chat_terminal import chat_about

    if as_json and once is None:
        raise UsageError("--json needs --once")
    spec = load_spec(job, overrides=overrides or ())
    raise typer.Exit(chat_about(spec, once, say=talk.say, quiet=quiet, hide_thinking=hide_thinking, as_json=as_json))


@app.command(epilog="Examples: overnight schema > job.schema.json; overnight schema --markdown | less")
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="The reference for people, in Markdown.")] = False,
) -> None:
    """Print the JSON Schema of the job file, for editors, or its reference."""
    if markdown:
        from pipeline.spec.job_reference import job_reference

        sys.stdout.write(job_reference())
        return
    from pipeline.spec.job_schema import json_schema

    _print_json(json_schema())


def _run(job: Path, overrides: list[str] | None, time_limit: str | None, *, as_json: bool, **options: Any) -> NoReturn:
    from pipeline.stop import Stop

    stop = Stop()
    with stop.signals():  # before anything that takes time
        from pipeline.job import run_job
        from pipeline.spec.job_file import load_spec

        if time_limit is not None:
            overrides = [*(overrides or ()), f"run.time_limit={time_limit}"]
        outcome = run_job(load_spec(job, overrides=overrides or ()), stop=stop, **options)
    if as_json:
        _print_json(outcome.summary)
    raise typer.Exit(outcome.exit_code)


def _supervise(
    job: Path,
    overrides: list[str] | None,
    time_limit: str | None,
    *,
    limit: int | None,
    shard: Shard | None,
    fresh: bool,
    quiet: bool,
    as_json: bool,
) -> NoReturn:
    from pipeline.spec.job_file import load_spec
    from pipeline.tools.supervise import supervise

    words = [str(job), *(word for override in overrides or () for word in ("--set", override))]
    words += ["--limit", str(limit)] if limit is not None else []
    words += ["--shard", str(shard)] if shard is not None else []
    switches = {"--quiet": quiet, "--json": as_json, "--log-json": talk.is_json()}
    words += [word for word, given in switches.items() if given]
    if time_limit is not None:
        overrides = [*(overrides or ()), f"run.time_limit={time_limit}"]
    spec = load_spec(job, overrides=overrides or ())
    raise typer.Exit(supervise(spec, words, None if quiet else talk.say, shard=shard, fresh=fresh))


def _teller(*, as_json: bool) -> tuple[Callable[[Problem], None], list[dict[str, Any]]]:
    """Takes problems as they are found: said at once, or kept in the list for one object at the end."""
    found: list[dict[str, Any]] = []
    return (lambda one: found.append(asdict(one))) if as_json else (lambda one: talk.say(str(one))), found


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """The console script: every way out has one of the documented exit codes."""
    try:
        app()
    except OvernightError as error:
        talk.complain(error)
        sys.exit(error.exit_code)
    except SystemExit as exit_:
        # The command-line library reports wrong usage with 2; sysexits(3) and we say 64.
        sys.exit(UsageError.exit_code if exit_.code == 2 else exit_.code)
    except Exception:  # noqa: BLE001 - a fault of ours
        talk.confess(traceback.format_exc())
        sys.exit(OvernightError.exit_code)
