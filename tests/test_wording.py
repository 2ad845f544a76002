"""The messages of the job file: what a key takes, what was written instead, and the way out."""

from __future__ import annotations

import pytest

from pipeline.errors import SpecError
from pipeline.spec.job_file import build_spec
from pipeline.spec.keys import job_keys
from pipeline.spec.wording import expectation, nearest
from pipeline.spec.yaml_text import read_document

LEAST = {"model": "{path: m}", "input": "{path: in.jsonl}", "output": "{path: out.jsonl}"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generation: {top_p: 1.5}", "generation.top_p: must be a number above 0 and at most 1, not 1.5"),
        ("generation: {top_p: .nan}", "generation.top_p: must be a number above 0 and at most 1, not NaN"),
        (
            'generation: {max_new_tokens: "5"}',
            "generation.max_new_tokens: must be a whole number of at least 1, "
            'not the text "5"; write it without quotes',
        ),
        (
            "generation: {max_new_tokens: 5.0}",
            "generation.max_new_tokens: must be a whole number of at least 1, not 5.0",
        ),
        (
            "generation: {max_new_tokens: null}",
            "generation.max_new_tokens: must be a whole number of at least 1, not null; "
            "leave the key out for its default",
        ),
        (
            "thinking: 5",
            "thinking: must hold keys of its own (mode, budget), not 5",
        ),
        ("thinking: []", "thinking: must hold keys of its own (mode, budget), not []"),
        ("thinking: false", "thinking: must hold keys of its own (mode, budget), not false"),
        ("name: 5", 'name: must be one line of text, not 5; put it in quotes: "5"'),
        ("thinking: {mode: of}", 'thinking.mode: must be auto, on or off, not the text "of"'),
        ("batch: {slots: many}", 'batch.slots: must be auto or a whole number of at least 1, not the text "many"'),
        (
            "model: {revision: 1234567}",
            'model.revision: must be null or one line of text, not 1234567; put it in quotes: "1234567"',
        ),
        ("model: {strict: on}", 'model.strict: must be true or false, not the text "on"; write true'),
        (
            "input: {template: {text}}",
            'input.template: must be null, non-empty text or {file: PATH}, not {"text": null}; '
            "put text that begins with { in quotes",
        ),
        (
            "input: {template: {file: a, mode: b}}",
            'input.template: must be null, non-empty text or {file: PATH}, not {"file": "a", "mode": "b"}; '
            "put text that begins with { in quotes",
        ),
        (
            "output: {keep_fields: some}",
            'output.keep_fields: must be all, none or a list of non-empty texts, not the text "some"',
        ),
        ("model: {engine: vllm}", 'model.engine: must be auto, transformers or echo, not the text "vllm"'),
        ("run: {on_finish: mail}", 'run.on_finish: must be null or a list of non-empty texts, not the text "mail"'),
        (
            "output: {format: " + "x" * 90 + "}",
            f'output.format: must be native or openai-batch, not the text "{"x" * 36}...',
        ),
        ("generation: {top_k: [1, 2]}", "generation.top_k: must be a whole number of at least 0, not [1, 2]"),
        ("Generation: {}", "Generation: unknown key; did you mean `generation`?"),
        ("max_new_tokens: 5", "max_new_tokens: unknown here; `max_new_tokens` belongs under `generation`"),
        ("model: {name: x}", "model.name: unknown here; `name` belongs at the top level"),
        ("run: {Max-Attempt: 5}", "run.Max-Attempt: unknown key; did you mean `max_attempts`?"),
        ("batch: {num_sample: 5}", "batch.num_sample: unknown key; did you mean `num_samples` under `generation`?"),
        ("batch: {zzz: 5}", "batch.zzz: unknown key; known here are slots, cache_tokens"),
        ("model: {echo: {dealy: 5}}", "model.echo.dealy: unknown key; did you mean `delay`?"),
        ("model: {delay: 5}", "model.delay: unknown here; `delay` belongs under `model.echo`"),
    ],
)
def test_messages_are_for_people(line: str, message: str) -> None:
    # The section of the line takes the place of the least one, so that the keys required of it are missed as well.
    least = {name: value for name, value in LEAST.items() if name != line.partition(":")[0]}
    text = "".join(f"{name}: {value}\n" for name, value in least.items()) + line
    with pytest.raises(SpecError) as caught:
        build_spec(read_document(text, "f"), name="x")
    found = [f"{problem.field}: {problem.message}" for problem in caught.value.problems]
    assert [problem for problem in found if ": is required" not in problem] == [message]


@pytest.mark.parametrize(
    ("key", "phrase"),
    [
        ("name", "one line of text"),
        ("model.gpu_memory", "null or a size of at least 1B and at most 1024TiB, such as 14GiB or 500MB"),
        ("model.echo.delay", "a duration of at least 0s and at most 3650d, such as 90s, 30m or 3h"),
        ("thinking.mode", "auto, on or off"),
        ("input.path", "a file, a glob or a list of these"),
        ("input.template", "null, non-empty text or {file: PATH}"),
        ("generation.top_p", "a number above 0 and at most 1"),
        ("generation.min_p", "a number of at least 0 and at most 1"),
        ("generation.seed", "a whole number of at least 0 and at most 9223372036854775807"),
        ("generation.ignore_eos", "true or false"),
        ("batch.slots", "auto or a whole number of at least 1"),
        ("output.keep_fields", "all, none or a list of non-empty texts"),
        ("run.metrics", "null or a path"),
    ],
)
def test_what_a_key_takes(key: str, phrase: str) -> None:
    assert expectation(job_keys()[key]) == phrase


def test_every_key_can_say_what_it_takes() -> None:
    for key, field in job_keys().items():
        assert expectation(field), key


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("max-new-tokens", "max_new_tokens"),
        ("TOP-P", "top_p"),
        ("max_tokens", "max_new_tokens"),
        ("xyz", None),
        ("x" * 10_000_000, None),  # in no time at all
    ],
)
def test_the_nearest_name(name: str, known: str | None) -> None:
    assert nearest(name, ["max_new_tokens", "temperature", "top_p"]) == known
