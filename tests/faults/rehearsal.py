"""Imported by the server that processes are forked from: after a first run nothing is left to import or to build."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

import pipeline.cli
from tests.faults.processes import make_job

with TemporaryDirectory() as directory:
    sys.argv = ["overnight", "run", str(make_job(Path(directory), delay="0ms")), "--quiet"]
    with suppress(SystemExit):
        pipeline.cli.main()
pipeline.cli.app = typer.main.get_command(pipeline.cli.app)
