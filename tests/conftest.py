"""Settings that all tests share, and the table of the fault suite."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pipeline.stop import SIGNALS
from tests.faults.trials import kept_with_earlier, table

# Tests run beside each other, one process a core; more threads each would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it puts into the background with SIGINT ignored, and nohup ignores SIGHUP; a run leaves ignored
# what it finds ignored, and would not heed what the tests send to it. Programs are started with the default of a signal
# that is handled here, and the tests themselves still take no notice of it.
for number in SIGNALS:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

# Read when Triton is imported, by whatever library: without a GPU its kernels are interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine must not fail a test for being slow; a failing example is printed and can be replayed.
settings.register_profile("default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the fault tests have tried, where they were asked for in full.

    With FAULT_RESULTS the outcomes are kept in that file, and the table is that of all runs which kept theirs there: a
    run of hours can be made in pieces.
    """
    if "FAULT_SCALE" not in os.environ:
        return
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    failed = {report.nodeid for report in reports if report.failed}
    # What a fixture tells at its end comes with the report of the teardown, and that one counts as "".
    for report in terminalreporter.stats.get("", []):
        reports.append(report)
    outcomes = {
        report.nodeid: (report.nodeid in failed, values)
        for report in reports
        for name, values in report.user_properties
        if name == "trials" and values["promise"]
    }
    if results := os.environ.get("FAULT_RESULTS"):
        outcomes = kept_with_earlier(Path(results), outcomes)
    terminalreporter.section(f"faults, at {os.environ['FAULT_SCALE']} of the full counts")
    for line in table((node, *outcome) for node, outcome in outcomes.items()):
        terminalreporter.write_line(line)
    # What could not be tried here is not passed over in silence.
    for report in terminalreporter.stats.get("skipped", []):
        if "/faults/" in report.nodeid and isinstance(report.longrepr, tuple):
            terminalreporter.write_line(f"not tried: {report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")
