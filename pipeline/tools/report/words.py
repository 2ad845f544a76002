"""What a report says in words, figures and tables, by the names that the page has for them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import __version__
from pipeline.forecast.forecast import Estimate, show_duration
from pipeline.plan.placement import show_bytes
from pipeline.summary import timestamp
from pipeline.tools.report.record import Answer, RunRecord

# Keys of the job whose values are texts of the user's, like the prompts.
_TEXT_KEYS = ("input.system", "input.template")
_MOST_SESSIONS = 40  # rows; of more the first and the last half
_NOTHING = "\N{EN DASH}"
_ENDED = {
    "finished": "finished",
    "running": "still running",
    "stopped": "stopped by a signal",
    "time_limit": "stopped at the time limit",
    "low_memory": "stopped, memory was running out",
    "failed": "refused, see its messages",
    "crashed": "crashed",
    "stalled": "ended because nothing moved any more",
    "out_of_memory": "killed for lack of memory",
    "killed": "killed, by what is not known",
}


@dataclass(frozen=True, slots=True)
class Words:
    """The sentences, figures and tables of a report."""

    record: RunRecord
    show_text: bool

    def all(self) -> dict[str, Any]:
        """By the names that the template has for them."""
        sessions = list(self._sessions())
        shown = (
            sessions
            if len(sessions) <= _MOST_SESSIONS
            else sessions[: _MOST_SESSIONS // 2] + sessions[-_MOST_SESSIONS // 2 :]
        )
        predictions = list(self._predictions())
        return {
            "state": self.state(),
            "problem": self.record.problem and str(self.record.problem),
            "figures": list(self._figures()),
            "over_time": self._over_time(),
            "sessions": shown,
            "num_sessions_left_out": len(sessions) - len(shown),
            "latency": self._latency(),
            "length": self._length(),
            "prediction": self._prediction_sentence(has_rows=bool(predictions)),
            "predictions": predictions,
            "error_sentence": self._error_sentence(),
            "errors": list(self._errors()),
            "slowest": list(map(self._slow, self.record.slowest)),
            "machine": self._conditions().get("plan", "Nothing is known of the machine: no session loaded a model."),
            "details": self._details(),
            "footer": f"Made by overnight {__version__} at {_moment(time.time())} UTC from the files of "
            f"{self.record.paths.output}; nothing on this page comes from the network.",
        }

    # --- what happened

    def state(self) -> str:
        """One sentence: how far the run is."""
        history, run = self.record.history, self.record.run
        tally, total = history.tally, history.header.num_answers
        done = tally.completed + tally.failed
        failed = f"{tally.failed:,} of them errors" if tally.failed else "no errors"
        counted = f"{done:,} of {total:,} answers, {failed}"
        match run.state:
            case "finished":
                return f"Finished: {counted}."
            case "running":
                return f"Running (process {run.process}): {counted} so far."
            case "publishing":
                return f"All is answered and not yet published: {counted}. The same command publishes it."
            case "damaged":
                return f"The files of the run are not as it left them: {counted}. overnight verify says what is wrong."
            case _:
                return f"Stopped: {counted}. The same command goes on with it."

    def _figures(self) -> Iterator[dict[str, str]]:
        history = self.record.history
        tally, duration = history.tally, self._generation_s
        done = tally.completed + tally.failed
        yield _figure("answers", f"{done:,}", f"of {history.header.num_answers:,}")
        yield _figure("output tokens a second", _rate(tally.output_tokens, duration))
        yield _figure("of generation", show_duration(duration))
        yield _figure("output tokens", f"{tally.output_tokens:,}")
        if tally.ttft.count:
            yield _figure("to the first token, median", _seconds(tally.ttft.quantile(0.5)))
        if (occupancy := self._occupancy()) is not None:
            yield _figure(f"of {self.record.slots} slots in use", f"{occupancy:.0%}")
        if self.record.peak_bytes:
            yield _figure("of memory at most", show_bytes(self.record.peak_bytes))

    @property
    def _generation_s(self) -> float:
        return sum(session.duration for session in self.record.history.sessions)

    def _occupancy(self) -> float | None:
        slots = self.record.slots
        if not slots or not self._generation_s:
            return None
        return min(1.0, sum(self.record.in_flight_s.totals()) / (slots * self._generation_s))

    def _over_time(self) -> str:
        history = self.record.history
        sessions = history.sessions
        if not sessions or not self.record.axis.length:
            return "No session has generated anything yet."
        load_s = sum(session.load_s for session in sessions)
        said = (
            f"{show_duration(self._generation_s)} of generation and {show_duration(load_s)} of loading in "
            f"{_count(len(sessions), 'session')}"
        )
        faults = sum(session.ended in ("crashed", "stalled", "out_of_memory", "killed") for session in sessions)
        if faults:
            said += f", {faults} of which ended by a fault"
        if history.header.merged:
            said += f", joined from {len(history.header.merged)} shards, which may have worked side by side"
        events = history.tally.out_of_memory_events
        if events:
            said += f"; memory ran out {_count(events, 'time')} and the batch was made smaller"
        return said + (
            ". What was under way at an interruption is drawn where it was finished." if len(sessions) > 1 else "."
        )

    def _sessions(self) -> Iterator[dict[str, Any]]:
        for number, (session, told) in enumerate(zip(self.record.history.sessions, self.record.sessions, strict=False)):
            yield {
                "number": number + 1,
                "began": _moment(session.started_at),
                "loading": show_duration(session.load_s),
                "generation": show_duration(session.duration),
                "answers": f"{session.completed:,}",
                "memory": show_bytes(told.peak_bytes) if told.peak_bytes else _NOTHING,
                "ended": _ENDED.get(session.ended, session.ended),
            }

    def _latency(self) -> str:
        e2el = self.record.history.tally.e2el
        return (
            f"Of {_count(e2el.count, 'answer')}: half took at most {_seconds(e2el.quantile(0.5))}, "
            f"99 of 100 at most {_seconds(e2el.quantile(0.99))}. Values are within one percent."
        )

    def _length(self) -> str:
        record, tally = self.record, self.record.history.tally
        said = f"{tally.input_tokens:,} tokens of prompts, {tally.output_tokens:,} of answers"
        if tally.reasoning_tokens:
            said += f", {tally.reasoning_tokens:,} of them reasoning"
        cut = record.finish_reasons.get("length", 0)
        total = sum(record.finish_reasons.get(reason, 0) for reason in ("stop", "length"))
        return f"{said}. {_count(cut, 'answer')} ({cut / max(1, total):.0%}) ended at the greatest length allowed."

    # --- what was expected

    def _conditions(self) -> Mapping[str, Any]:
        """Of the last session that loaded a model."""
        told = (session.conditions for session in reversed(self.record.sessions))
        return next((conditions for conditions in told if conditions), dict[str, Any]())

    def _foretold(self) -> tuple[int, Mapping[str, Any]] | None:
        """The first forecast that a session made, and the number of that session."""
        for number, session in enumerate(self.record.sessions):
            if forecast := session.conditions.get("forecast"):
                return number, forecast
        return None

    def _prediction_sentence(self, *, has_rows: bool) -> str:
        found = self._foretold()
        if found is None:
            memory = " Of memory the plan says what is needed." if has_rows else ""
            return f"When this run began nothing was known of the speed of its model here.{memory}"
        number, forecast = found
        since = "" if number == 0 else f", from session {number + 1} on"
        is_over = self.record.history.is_complete
        so_far = "" if is_over else " The run is not over: what is actual is what it has taken so far."
        return f"The forecast was made at the beginning{since}. It rests on {forecast['reason']}.{so_far}"

    def _predictions(self) -> Iterator[dict[str, Any]]:
        found = self._foretold()
        if found is not None:
            number, forecast = found
            sessions = self.record.history.sessions[number:]
            generation_s = sum(session.duration for session in sessions)
            yield _prediction("Generation", Estimate(**forecast["generation_s"]), generation_s, show_duration)
            load_s = forecast["load_s"]
            if load_s:
                yield _prediction("Loading, once", _certain(load_s), sessions[0].load_s, show_duration)
            if number == 0:
                tally = self.record.history.tally
                yield _prediction(
                    "Tokens of answers", Estimate(**forecast["output_tokens"]), tally.output_tokens, _whole
                )
        needed = self._conditions().get("needed_bytes", {}).get("host")
        if needed and self.record.peak_bytes:
            yield _prediction(
                "Host memory", _certain(needed), self.record.peak_bytes, lambda size: show_bytes(round(size))
            )

    # --- single lines

    def _error_sentence(self) -> str:
        history = self.record.history
        failed, done = history.tally.failed, history.tally.completed + history.tally.failed
        if not failed:
            return "No line was answered with an error." if done else "Nothing has been answered yet."
        retry = " overnight retry tries them again." if self.record.run.state == "finished" else ""
        return f"{_count(failed, 'line')} of {done:,} ({failed / done:.1%}) answered with an error.{retry}"

    def _errors(self) -> Iterator[dict[str, Any]]:
        kinds = sorted(self.record.errors.items(), key=lambda entry: -entry[1].count)
        most = max((kind.count for _, kind in kinds), default=1)
        for name, kind in kinds:
            yield {
                "name": name,
                "count": f"{kind.count:,}",
                "percent": round(100 * kind.count / most, 2),
                "num_more": kind.count - len(kind.examples),
                "examples": [self._example(answer) for answer in kind.examples],
            }

    def _example(self, answer: Answer) -> dict[str, Any]:
        error = answer["error"]
        id_ = "" if answer["id"] is None else f", id {_as_text(answer['id'])}"
        attempts = f", {error['attempts']} attempts" if error["attempts"] > 1 else ""
        return {
            "message": error["message"],
            "place": f"{error['file']}, line {error['line']}{id_}{attempts}",
            "text": answer["input"] if self.show_text else None,
        }

    def _slow(self, answer: Answer) -> dict[str, Any]:
        timing, usage = answer["timing"], answer["usage"]
        sample = f" sample {answer['sample']}" if self.record.history.header.num_samples > 1 else ""
        return {
            "index": f"{answer['index']}{sample}",
            "id": _NOTHING if answer["id"] is None else _as_text(answer["id"]),
            "total": _seconds(timing["total_s"]),
            "first": _seconds(timing["time_to_first_token_s"]),
            "prompt_tokens": f"{usage['prompt_tokens']:,}",
            "output_tokens": f"{usage['completion_tokens']:,}",
            "reason": answer["finish_reason"],
            "prompt": answer["input"],
            "text": answer["completion"],
        }

    def _details(self) -> list[dict[str, Any]]:
        conditions = dict(self._conditions())
        header = self.record.history.header
        fields = {
            name: value
            if self.show_text or name not in _TEXT_KEYS or value is None
            else "(a text; --show-text shows it)"
            for name, value in sorted(header.fields.items())
        }
        files = {
            "input": ", ".join(str(file.path) for file in header.input.files),
            "input items": header.input.num_items,
            "input SHA-256": header.input.sha256,
            "output": str(self.record.paths.output),
            "output SHA-256": self.record.history.published[-1].sha256
            if self.record.history.is_published
            else _NOTHING,
        }
        versions = conditions.pop("versions", {})
        for name in ("forecast", "plan", "needed_bytes"):
            conditions.pop(name, None)
        groups = {"Files": files, "Last session": conditions, "Versions": versions, "Keys that shape answers": fields}
        return [
            {"name": name, "rows": [(key, _as_text(value)) for key, value in rows.items()]}
            for name, rows in groups.items()
            if rows
        ]


def _figure(label: str, value: str, unit: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "unit": unit}


def _prediction(name: str, expected: Estimate, actual: float, show: Callable[[float], str]) -> dict[str, Any]:
    """A row; the scale of its bar goes a quarter beyond what was expected at most."""
    low, middle, high = expected.low, expected.expected, expected.high
    scale = 1.25 * max(high, middle) or 1.0
    return {
        "name": name,
        "expected": show(middle),
        "range": f"{show(low)} to {show(high)}" if low < high else _NOTHING,
        "actual": show(actual),
        "share": f"{actual / middle:.0%}" if middle else _NOTHING,
        "bar_left": round(100 * low / scale, 2),
        "bar_width": round(100 * max(high - low, scale / 100) / scale, 2) if high else 0,
        "mark": round(min(100.0, 100 * actual / scale), 2),
        "beyond": actual > scale,
    }


def _certain(value: float) -> Estimate:
    return Estimate(value, value, value)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _moment(unix_time: float) -> str:
    return timestamp(unix_time)[:19].replace("T", " ")


def _rate(count: int, seconds: float) -> str:
    rate = count / seconds if seconds else 0.0
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1e3:.3g} ms" if value >= 1e-6 else "0 ms"
    return f"{value:.3g} s" if value < 120 else show_duration(value)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
