"""`overnight report`: of every state of a run, right in its numbers, safe with hostile content, quiet about prompts."""

import json
import re
import signal
import sys
import tracemalloc
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import load_job, run_job
from pipeline.errors import DataError, NotFoundError, OutputError, UsageError
from pipeline.tools.report.charts import Charts
from pipeline.tools.report.palette import DARK, LIGHT, STAND_IN, contrast
from pipeline.tools.report.record import NUM_SLOWEST, RunRecord
from pipeline.tools.report.report import report_job
from pipeline.tools.report.timeline import Axis, Spread
from pipeline.tools.report.words import Words
from tests.command import is_generating, kill_after, overnight, start, wait_until, write_job
from tests.faults.small_run import UnsyncedFiles, identity, open_ledger

SLOW = {"engine": "echo", "echo": {"delay": "20ms", "fail_every": 5}}
QUICK = {"engine": "echo", "echo": {"fail_every": 5}}
PROMPTS = [{"id": f"id-{number}", "prompt": f"secret {number} " * (1 + number % 9)} for number in range(60)]
# Elements that a page without content of a file has no use for.
FORBIDDEN = {"script", "iframe", "object", "embed", "link", "img", "image", "form", "base", "foreignobject", "animate"}


class Page(HTMLParser):
    """The elements of a page, their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    @property
    def tags(self):
        return {tag for tag, _ in self.elements}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERNIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def undrawn(monkeypatch):
    """For what a page says in words: drawing takes a second."""
    monkeypatch.setattr(Charts, "timeline", lambda _: ("", ""))
    monkeypatch.setattr(Charts, "latencies", lambda _: [])
    monkeypatch.setattr(Charts, "lengths", lambda _: [])


def report(job, **options):
    return Page(report_job(load_job(job), **options).read_text())


def words(job):
    return Words(RunRecord(load_job(job).output.path and job.parent / "out.jsonl"), show_text=False).all()


# --- every state


def test_there_is_no_report_of_no_run(tmp_path):
    told = overnight("report", write_job(tmp_path, PROMPTS))
    assert told.returncode == 66 and "there is no run yet" in told.stderr


def test_a_run_is_reported_while_it_runs_after_it_was_killed_and_when_it_is_finished(tmp_path, undrawn):
    job = write_job(
        tmp_path, [*PROMPTS, b"{bad"], model={"engine": "echo", "echo": {"delay": "500ms", "fail_every": 5}}
    )
    process = start("run", job)
    wait_until(lambda: is_generating(tmp_path))
    assert f"Running (process {process.pid})" in report(job).text
    kill_after(process, 0, signal.SIGKILL)
    assert "still running" not in (stopped := report(job).text)
    assert "Stopped: " in stopped and "killed, by what is not known" in stopped
    run_job(load_job(job, overrides=["model.echo.delay=1ms"]), quiet=True)
    page = report(job)
    assert "Finished: 61 of 61 answers, 13 of them errors" in page.text
    assert "killed, by what is not known" in page.text and "in 2 sessions, 1 of which ended by a fault" in page.text
    assert "in.jsonl, line 61" in page.text and "echo_failure" in page.text
    assert overnight("report", "--help").returncode == 0


@pytest.mark.parametrize(
    ("lines", "model", "said"),
    [
        ([], QUICK, "Finished: 0 of 0 answers, no errors"),
        ([{"prompt": "one"}], {"engine": "echo"}, "Finished: 1 of 1 answers, no errors"),
        ([b"{", b"["], QUICK, "Finished: 2 of 2 answers, 2 of them errors"),
        ([{"prompt": "x"}] * 5, {"engine": "echo", "echo": {"fail_every": 1}}, "5 of 5 answers, 5 of them errors"),
    ],
    ids=["no line", "one answer", "no good line", "all failed"],
)
def test_few_answers_or_none_are_no_trouble(tmp_path, lines, model, said):
    job = write_job(tmp_path, lines, model=model)
    run_job(load_job(job), quiet=True)
    assert said in report(job).text


def test_a_run_that_has_only_begun_is_reported(tmp_path, undrawn):
    job = write_job(tmp_path, PROMPTS[:5])
    open_ledger(tmp_path / "out.jsonl", UnsyncedFiles()).close("stopped")
    assert "Stopped: 0 of 5 answers" in report(job).text


def test_a_damaged_run_is_refused_and_a_changed_output_is_told(tmp_path, undrawn):
    job = write_job(tmp_path, PROMPTS[:5])
    run_job(load_job(job), quiet=True)
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    output.write_bytes(output.read_bytes() + b"\n")
    page = report(job)
    assert "not as it left them" in page.text and "has changed since it was published" in page.text
    partial.write_bytes(partial.read_bytes().replace(b"secret", b"public"))
    with pytest.raises(DataError, match="not those that were committed"):
        report(job)


def test_what_a_retry_has_mended_is_no_error_any_more(tmp_path):
    job = write_job(tmp_path, PROMPTS, model=QUICK)
    run_job(load_job(job), quiet=True)
    assert words(job)["errors"][0]["count"] == "12"
    run_job(load_job(job), quiet=True, retry=True)
    told = words(job)
    assert told["errors"][0]["count"] == "12" and "12 lines of 60" in told["error_sentence"]


# --- right numbers


def test_the_drawings_hold_what_was_answered(tmp_path):
    job = write_job(tmp_path, PROMPTS, model=SLOW)
    process = start("run", job)
    wait_until(lambda: is_generating(tmp_path))
    kill_after(process, 0)
    run_job(load_job(job, overrides=["model.echo.delay=1ms"]), quiet=True)
    record = RunRecord(tmp_path / "out.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()][:-1]
    good = [answer for answer in answers if answer["error"] is None]
    total = sum(answer["usage"]["completion_tokens"] for answer in good)
    assert sum(record.output_tokens.totals()) == pytest.approx(total) == record.history.tally.output_tokens
    assert sum(record.failures.totals()) == len(answers) - len(good) == record.errors["echo_failure"].count
    assert record.outputs.longest == max(answer["usage"]["completion_tokens"] for answer in good)
    assert record.prompts.histogram.count == len(good)
    slowest = sorted(good, key=lambda answer: (-answer["timing"]["total_s"], answer["index"]))[:NUM_SLOWEST]
    assert [answer["index"] for answer in record.slowest] == [answer["index"] for answer in slowest]
    assert record.peak_bytes > 1 << 20 and record.slots == 16 and max(record.memory) == record.peak_bytes
    assert record.axis.length == pytest.approx(
        sum(session.duration + session.load_s for session in record.history.sessions)
    )


def test_predicted_and_actual_stand_side_by_side(tmp_path):
    job = write_job(tmp_path, PROMPTS * 2, model={"engine": "echo", "echo": {"delay": "20ms"}})
    run_job(load_job(job), quiet=True)
    assert "nothing was known of the speed" in words(job)["prediction"]
    run_job(load_job(job), quiet=True, fresh=True)
    told = words(job)
    rows = {row["name"]: row for row in told["predictions"]}
    assert rows["Tokens of answers"]["share"] == "100%" and "1 earlier run" in told["prediction"]
    assert 50 < float(rows["Generation"]["share"].rstrip("%")) < 200


intervals = st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(0.1, 100)).map(
    lambda drawn: (min(drawn[:2]), max(drawn[:2]), drawn[2])
)


@given(st.lists(intervals, max_size=20), st.integers(1, 12))
def test_amounts_are_spread_over_the_bins_that_they_overlap(added, num_bins):
    spread = Spread(10.0, num_bins)
    expected = [0.0] * num_bins
    edges = [spread.width * number for number in range(num_bins + 1)]
    for begin, end, amount in added:
        spread.add(begin, end, amount)
        if end - begin < 1e-9:
            expected[min(num_bins - 1, int(begin / spread.width))] += amount
            continue
        for number, (low, high) in enumerate(pairwise(edges)):
            expected[number] += amount * max(0.0, min(end, high) - max(begin, low)) / (end - begin)
    assert sum(spread.totals()) == pytest.approx(sum(amount for _, _, amount in added))
    if all(end - begin > 1e-3 or end == begin for begin, end, _ in added):
        assert spread.totals() == pytest.approx(expected, abs=1e-6)


def test_moments_lie_in_their_session_however_long_the_pause():
    axis = Axis([(1000.0, 5.0, 20.0), (90_000.0, 4.0, 10.0)])
    first, second = axis.stretches
    assert axis.length == 39.0
    assert [first.position(at) for at in (0.0, 1000.0, 1003.0, 5000.0)] == [5.0, 5.0, 8.0, 25.0]
    assert [second.position(at) for at in (90_000.0, 90_002.5, 10.0**9, 0.0)] == [29.0, 31.5, 39.0, 29.0]


def test_shards_have_reports_and_so_has_what_they_are_merged_into(tmp_path, undrawn):
    job = write_job(tmp_path, PROMPTS, model=QUICK)
    for shard in ("1/2", "2/2"):
        assert overnight("run", job, "--shard", shard, "--set", "model.echo.delay=5ms").returncode == 3
    told = overnight("report", job, "--shard", "2/2", "-o", tmp_path / "shard.html")
    assert told.returncode == 0 and "30 of 30 answers" in (tmp_path / "shard.html").read_text()
    assert overnight("merge", job).returncode == 3
    page = report(job)
    assert "60 of 60 answers" in page.text and "joined from 2 shards" in page.text
    record = RunRecord(tmp_path / "out.jsonl")
    assert sum(record.output_tokens.totals()) == pytest.approx(record.history.tally.output_tokens)


def test_memory_does_not_grow_with_the_answers(tmp_path):
    peaks = []
    for number in (1_000, 8_000):
        output = tmp_path / f"{number}.jsonl"
        write_answers(output, number)
        tracemalloc.start()
        record = RunRecord(output)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert record.history.num_done == number
    assert peaks[1] < peaks[0] + 7_000 * 16 + (1 << 20)  # a group of answers is in memory, and a byte for each


def write_answers(output, number):
    """A run of so many answers, finished all but the publishing."""
    timing = {"started_at": "2026-01-01T00:00:00.000Z", "queue_s": 0.1, "time_to_first_token_s": 0.2, "total_s": 1.0}
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "reasoning_tokens": 0}
    ledger = open_ledger(output, UnsyncedFiles(), identity=identity(number))
    ledger.loaded(0.0)
    from tests.faults.small_run import Completion, Item, Timing, Usage

    for index in range(number):
        line = {"index": index, "sample": 0, "id": None, "completion": "x", "error": None, "finish_reason": "stop"}
        line |= {"usage": usage, "timing": timing, "input": {"prompt": "p" * 100}}
        item = Item(index, "in.jsonl", index + 1, 0)
        told = Completion(item, 0, "stop", "x", None, Usage(10, 20), Timing(0.0, 0.1, 0.1, 0.8))
        ledger.append(told, json.dumps(line).encode() + b"\n")
        if index % 500 == 499:
            ledger.commit()
    ledger.close("stopped")


# --- safe and quiet


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\" {{ 7 * 7 }} {% raw %}"


def test_what_files_hold_is_never_markup(tmp_path, undrawn):
    lines = [{"id": HOSTILE, "prompt": HOSTILE, HOSTILE: 1}, {"id": HOSTILE, HOSTILE: "no prompt"}, {"prompt": 3}]
    job = write_job(tmp_path, lines, input={"system": HOSTILE}, generation={"stop": [HOSTILE]})
    job.write_text(json.dumps({"name": HOSTILE, **json.loads(job.read_text())}))
    run_job(load_job(job), quiet=True)
    page = report(job, show_text=True)
    assert not FORBIDDEN & page.tags
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 5  # shown as it is


def test_texts_are_on_the_page_only_if_asked_for(tmp_path, undrawn):
    job = write_job(tmp_path, PROMPTS, model=QUICK, input={"system": "be discreet"})
    run_job(load_job(job), quiet=True)
    page = report(job)
    assert "secret" not in page.text and "discreet" not in page.text and "id-4" in page.text
    shown = report(job, show_text=True)
    assert "secret 4" in shown.text and "be discreet" in shown.text


@pytest.mark.parametrize(("form", "is_kept"), [("native", True), ("openai-batch", False)])
def test_the_prompt_of_a_batch_line_is_its_text_or_is_not_there(tmp_path, undrawn, form, is_kept):
    body = {"messages": [{"role": "user", "content": "secret 0"}]}
    lines = [{"custom_id": "ask", "method": "POST", "url": "/v1/chat/completions", "body": body}]
    job = write_job(tmp_path, lines, model=QUICK, output={"format": form})
    run_job(load_job(job), quiet=True)
    shown = " ".join(report(job, show_text=True).text.split())
    assert "secret 0" in shown and "{'" not in shown  # the answer, which is the echo of the prompt
    assert ("Prompt secret 0" in shown) == is_kept


# --- looks


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_every_text_can_be_read(palette):
    for text in (palette.ink, palette.muted, palette.accent):
        for ground in (palette.background, palette.panel):
            assert contrast(text, ground) >= 4.5, (text, ground)
    assert contrast(palette.accent, palette.soft) >= 3  # an edge, beside its area
    assert contrast(palette.ink, palette.soft) >= 4.5


def test_contrast_is_that_of_the_web_guidelines():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


def test_a_page_is_whole_in_itself_and_its_drawings_have_its_colours(tmp_path):
    job = write_job(tmp_path, PROMPTS, model=QUICK)
    run_job(load_job(job, overrides=["model.echo.delay=20ms", "run.time_limit=500ms"]), quiet=True)
    run_job(load_job(job, overrides=["model.echo.delay=20ms"]), quiet=True)
    told = overnight("report", job, "--png", tmp_path / "out.png")
    assert told.returncode == 0 and told.stdout == f"{tmp_path / 'out.jsonl.report.html'}\n"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "out.jsonl.report.html").read_text()
    page = Page(html)
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action")
    ]
    assert all(address.startswith("#") for address in addresses)
    assert not re.search(r"@import|@font-face|url\((?!#)", html) and not FORBIDDEN & page.tags
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    drawings = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(drawings) == 7  # over time for wide pages and for narrow ones, three of latency, two of length
    for drawing in drawings:
        assert not re.search(r"(?:fill|stroke|color): *(?:#|rgb)", drawing) and "var(--ink)" in drawing
    assert "var(--accent)" in drawings[0] and "time limit; resumed" in drawings[0] and "mean" in drawings[0]
    assert not any(colour in html for colour in (STAND_IN.ink, STAND_IN.accent, STAND_IN.line))
    assert LIGHT.ink in html and DARK.ink in html and "prefers-color-scheme: dark" in html


# --- the command


def test_a_report_never_takes_the_place_of_a_file_of_the_run(tmp_path, undrawn):
    job = write_job(tmp_path, PROMPTS[:3])
    run_job(load_job(job), quiet=True)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out.jsonl*")}
    for name in before:
        with pytest.raises(UsageError, match="file of the run"):
            report_job(load_job(job), page=tmp_path / name)
        with pytest.raises(UsageError, match="file of the run"):
            report_job(load_job(job), png=tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out.jsonl*")} == before
    lines = (tmp_path / "in.jsonl").read_bytes()
    for names in ({"page": tmp_path / "in.jsonl"}, {"png": tmp_path / "in.jsonl"}):
        with pytest.raises(OutputError, match="is no report"):
            report_job(load_job(job), **names)
    assert (tmp_path / "in.jsonl").read_bytes() == lines
    assert report_job(load_job(job)) == report_job(load_job(job))  # an earlier report is replaced
    with pytest.raises(OutputError, match=r"in\.jsonl"):
        report_job(load_job(job), page=tmp_path / "in.jsonl" / "report.html")


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    job = write_job(tmp_path, PROMPTS[:3])
    run_job(load_job(job), quiet=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NotFoundError, match=re.escape("pip install 'overnight[report]'")):
        report_job(load_job(job))
