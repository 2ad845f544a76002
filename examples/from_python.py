"""Use the pipeline as a library: load a job, run it, read the answers."""

import sys
from pathlib import Path

from pipeline import load_job, read_results, run_job

job = load_job(
    Path("jobs/rehearsal-echo.yaml"), overrides=["model.echo.delay=0ms", *sys.argv[1:]]
)  # the same syntax as --set
outcome = run_job(job)
print("exit code", outcome.exit_code)
assert outcome.summary is not None
print(outcome.summary["completed"], "answers,", outcome.summary["failed"], "failures")
for record in read_results(Path(job.output.path)):
    print(record["id"], record["finish_reason"], record["completion"])
    if record["index"] == 4:
        break
