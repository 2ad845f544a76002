"""The page of a report: words and drawings in one file of HTML. The template escapes whatever comes from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.tools.report.charts import Charts
from pipeline.tools.report.palette import DARK, LIGHT
from pipeline.tools.report.record import RunRecord
from pipeline.tools.report.words import Words


def render_page(record: RunRecord, job: str, *, show_text: bool) -> str:
    """The report as one HTML file that asks nothing of the network. Raises NotFoundError without matplotlib."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    charts = Charts(record)
    words = Words(record, show_text=show_text)
    history = record.history
    drawn: dict[str, Any] = {"timeline": None, "latencies": None, "lengths": None}
    if record.axis.length > 0:
        drawn["timeline"] = list(map(Markup, charts.timeline()))
    if history.tally.completed:
        drawn["latencies"] = list(map(Markup, charts.latencies()))
        drawn["lengths"] = list(map(Markup, charts.lengths()))
    page = {"job": job, "show_text": show_text, **drawn, **words.all()}
    return environment.get_template("page.html").render(page=page, light=LIGHT.to_css(), dark=DARK.to_css())
