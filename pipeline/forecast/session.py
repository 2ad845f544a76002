"""What a session of a run expects when it begins, and what it has taught when it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.forecast.census import Encode, take_sample
from pipeline.forecast.forecast import Forecast, Speed
from pipeline.forecast.speeds import SpeedBook, lengths_of
from pipeline.forecast.streaming import forecast_plan
from pipeline.plan.plan import Plan
from pipeline.source.inputs import InputFile
from pipeline.spec.keys import JobSpec
from pipeline.summary import Session, Tally

# So many lines, evenly spread over the first of the input: they are encoded in a tenth of a second, and an input of
# hundreds of gigabytes is not read once more.
_SAMPLE = 256
_SAMPLED_LINES = 1 << 16
# A session teaches if it was long enough, and either came to its end or filled its slots so many times: what was in
# flight at a stop is not counted, and would make it look slow.
_LEAST_S = 2.0
_LEAST_FILLS = 4


class Expectation:
    """Of one session: `forecast` at its beginning, `learn` at its end."""

    def __init__(self, spec: JobSpec, plan: Plan, versions: Mapping[str, str]) -> None:
        self._spec = spec
        self._plan = plan
        self._versions = versions
        self._book = SpeedBook(plan.speed_key, versions)

    def forecast(self, items: range, num_done: int, files: Sequence[InputFile], encode: Encode) -> Forecast | None:
        """The time for what is left of the answers to these items, from a few of their lines; None where no speed is
        known."""
        speeds = self._book.read()
        num_samples = self._spec.generation.num_samples
        num_left = len(items) * num_samples - num_done
        if not (speeds or self._plan.streaming) or not num_left:
            return None
        items = items[:_SAMPLED_LINES]
        work = take_sample(self._spec, files, items, encode, most=_SAMPLE).work(self._spec, self._plan.slots)
        good_share = work.num_answers / (len(items) * num_samples)
        return forecast_plan(work.part(round(num_left * good_share)), self._plan, speeds)

    def conditions(self, forecast: Forecast | None) -> dict[str, Any]:
        """What the journal keeps for `report`: how the session works, and what was expected of it."""
        plan = self._plan
        return {
            "plan": plan.title,
            "engine": plan.engine,
            "load_strategy": plan.load_strategy,
            "device": plan.device,
            "dtype": plan.dtype,
            "weights": plan.weights,
            "threads": plan.num_threads,
            "slots": plan.slots,
            "needed_bytes": {budget.device: budget.needed_bytes for budget in plan.budgets},
            "versions": dict(self._versions),
            "forecast": None if forecast is None else forecast.to_json(),
        }

    def learn(self, before: Tally, after: Tally, session: Session) -> None:
        """Keep the speed of a session that is over, if it tells one."""
        completed = after.completed - before.completed
        concurrency = min(self._plan.slots, completed)
        is_telling = session.ended == "finished" or completed >= _LEAST_FILLS * self._plan.slots
        if session.duration < _LEAST_S or not completed or not is_telling:
            return
        self._book.write(
            Speed(
                measured_at=time.time(),
                source="run",
                num_answers=completed,
                prompt_tokens=after.input_tokens - before.input_tokens,
                output_tokens=after.output_tokens - before.output_tokens,
                concurrency=concurrency,
                generation_s=session.duration,
                prefill_s=None,
                load_s=session.load_s,
                lengths_of=lengths_of(self._spec),
            )
        )
