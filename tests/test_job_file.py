"""The job file from text to JobSpec: every problem at once, in its place and in plain words; and back."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import NotFoundError, OvernightError, SpecError
from pipeline.spec.job_file import MAX_PROBLEMS, build_spec, dump_spec, load_spec
from pipeline.spec.keys import JobSpec, job_keys
from pipeline.spec.rules import broken_rules
from pipeline.spec.yaml_text import read_document
from tests.job_values import jobs

LEAST_TEXT = "model: {path: m}\ninput: {path: in.jsonl}\noutput: {path: out.jsonl}\n"
FULL = """\
name: x
model:
  path: builtin:smollm2-135m
  revision: null
  load_strategy: min-gpu
  gpu_memory: null
  cpu_memory: null
  engine: auto
  trust_remote_code: false
  strict: false
  activation: exact
  repack_cache: auto
  echo:
    delay: 0
    fail_every: null
    crash_at: null
    oom_at: null
    hang_at: null
thinking:
  mode: auto
  budget: null
input:
  path: hello.jsonl
  format: auto
  prompt_field: prompt
  messages_field: messages
  id_field: id
  template: null
  system: null
  chat_template: auto
  over_length: error
  max_line: 64MiB
  max_bytes: null
  allow_control_tokens: false
generation:
  max_new_tokens: 256
  temperature: 0.0
  top_p: 1.0
  top_k: 0
  min_p: 0.0
  repetition_penalty: 1.0
  stop: []
  seed: 0
  num_samples: 1
  ignore_eos: false
  deterministic: false
batch:
  slots: auto
  cache_tokens: auto
output:
  path: runs/hello.jsonl
  local_directory: runs
  format: native
  keep_fields: all
  summary_line: true
run:
  time_limit: null
  resume: if-unchanged
  max_attempts: 3
  stall_timeout: 30m
  save_unfinished: 60s
  metrics: null
  on_finish: null
"""
JOBS = Path(__file__).parent.parent / "jobs"


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the job file of a test lies, beside some input; it is named without its folder, for readable messages."""
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").touch()
    return Path("night.yaml")


def problems(path: Path, text: str, *overrides: str) -> list[str]:
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides=overrides)
    assert caught.value.exit_code == 78
    return str(caught.value).splitlines()


def test_a_job_is_read(job_file: Path) -> None:
    job_file.write_text(
        "\ufeff# byte order mark\r\nmodel:\r\n  path: m\r\nthinking: {mode: off}\r\n"
        "input:\r\n  path: [a.jsonl, b.jsonl.gz]\r\n"
        "generation:\r\n  temperature: 1e-1\r\nbatch:\r\noutput:\r\n  path: out.jsonl\r\nrun: {time_limit: 3h}\r\n",
        encoding="utf-8",
    )
    spec = load_spec(job_file)
    assert spec.name == "night"
    assert spec.thinking.mode == "off"
    assert spec.input.path == ("a.jsonl", "b.jsonl.gz")
    assert spec.generation.temperature == 0.1
    assert spec.run.time_limit == 10800


def test_a_job_may_have_a_name_of_its_own(job_file: Path) -> None:
    job_file.write_text(LEAST_TEXT + "name: morning\n")
    assert load_spec(job_file).name == "morning"


def test_all_problems_at_once_in_order_and_in_place(job_file: Path) -> None:
    text = """\
        model:
          path: builtin:smollm2-135m
          gpu_memory: 14G
        thinking:
          mode: off
          budget: 5
        input:
          path: &in a.jsonl
          top_p: 0.5
        generation:
          max_new_token: 5
          temperature: -1
          seed: 7
          seed: 8
          stop: [a, ""]
          deterministic: yes
        output:
          path: out/
        run: {time_limit: 3:00}
        """
    assert problems(job_file, text, "generation.nsamples=4", "batch.slots=0") == [
        "night.yaml:3:15: model.gpu_memory: must be null or a size of at least 1B and at most 1024TiB, "
        'such as 14GiB or 500MB, not the text "14G"',
        "night.yaml:6:11: thinking.budget: has no meaning with thinking.mode off; leave one of the two out",
        "night.yaml:8:9: input.path: anchors (&) are not used in a job file; if it is text, put it in quotes",
        "night.yaml:9:3: input.top_p: unknown here; `top_p` belongs under `generation`",
        "night.yaml:11:3: generation.max_new_token: unknown key; did you mean `max_new_tokens`?",
        "night.yaml:12:16: generation.temperature: must be a number of at least 0, not -1",
        "night.yaml:14:3: generation.seed: given twice; first in line 13",
        'night.yaml:15:13: generation.stop: must be a list of non-empty texts, not ["a", ""]',
        'night.yaml:16:18: generation.deterministic: must be true or false, not the text "yes"; write true',
        "night.yaml:18:9: output.path: is a directory; name a file in it",
        "night.yaml:19:19: run.time_limit: must be null or a duration above 0s and at most 3650d, "
        'such as 90s, 30m or 3h, not the text "3:00"',
        "--set: generation.nsamples: unknown key; did you mean `num_samples`?",
        "--set: batch.slots: must be auto or a whole number of at least 1, not 0",
    ]


def test_input_that_is_not_there_is_told_with_all_else(job_file: Path) -> None:
    text = LEAST_TEXT.replace("in.jsonl", "[in.jsonl, b.jsonl, 'memory://far/c.jsonl', '*.gz']")
    assert problems(job_file, text + "generation: {seed: -1}\n")[1:] == ["b.jsonl: input.path: no such file"]
    assert load_spec(job_file, overrides=["generation.seed=1"]).generation.seed == 1  # who reads the input will tell


def test_what_is_required(job_file: Path) -> None:
    assert problems(job_file, "name: x\ninput:\n  format: auto\n") == [
        "night.yaml: output.path: is required: a path",
        "night.yaml: model.path: is required: builtin:smollm2-135m, a local directory or a hub id "
        "(only `engine: echo` needs no model)",
        "night.yaml:2:1: input.path: is required: a file, a glob or a list of these",
    ]


def test_what_is_no_value_is_one_problem(job_file: Path) -> None:
    text = LEAST_TEXT + "generation: {seed: *x, top_k: !!str 5, stop: [a, &b c]}\n"
    assert [problem.split(": ")[1] for problem in problems(job_file, text)] == [
        *("generation.seed", "generation.top_k", "generation.stop.1"),
    ]


def test_a_problem_hides_no_contradiction_and_makes_none_up(job_file: Path) -> None:
    text = LEAST_TEXT + "thinking: {mode: off, budget: 5}\nbatch: {slots: 0}\n"
    assert [problem.split(": ")[1] for problem in problems(job_file, text)] == ["thinking.budget", "batch.slots"]
    # What mode would be is not known here, so that nothing can be said about the budget.
    text = LEAST_TEXT + "thinking: {mode: of, budget: 5}\n"
    assert [problem.split(": ")[1] for problem in problems(job_file, text)] == ["thinking.mode"]
    # The engine may be echo by another spelling: do not ask for a model.
    text = "model: {engine: ecko}\ninput: {path: in.jsonl}\noutput: {path: b}\n"
    assert [problem.split(": ")[1] for problem in problems(job_file, text)] == ["model.engine"]


MANY = {
    "unknown keys": "generation:\n" + "".join(f"  max_new_token{n}: 1\n" for n in range(4900)),
    "tags": "input: {path: [" + "!a b, " * 9000 + "]}\n",
    "tags and unknown keys": "".join(f"a{n}: !b c\n" for n in range(40)) + "".join(f"b{n}: c\n" for n in range(4900)),
    "paths": "input: {path: [" + "../a/b/*.jsonl, " * 9000 + "]}\nmodel: {path: m}\noutput: {path: out/}\n",
    "empty texts": "generation: {stop: [" + '"", ' * 9000 + "]}\n",
}


@pytest.mark.parametrize("what", MANY)
def test_a_hostile_job_is_refused_in_under_a_second(what: str) -> None:
    began = time.process_time()
    with pytest.raises(SpecError) as caught:
        build_spec(read_document(MANY[what], "f"), name="x")
    assert time.process_time() - began < 1
    assert len(caught.value.problems) <= MAX_PROBLEMS + 1


def test_very_many_problems_are_counted(job_file: Path) -> None:
    found = problems(job_file, LEAST_TEXT + "".join(f"key{n}: 1\n" for n in range(200)))
    assert len(found) == MAX_PROBLEMS + 1
    assert found[0].startswith("night.yaml:4:1: key0: unknown key")
    assert found[-1] == "night.yaml: and 150 more problems"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("generation.seed=7", "generation", {"seed": 7}),
        (" generation.seed = 7 ", "generation", {"seed": 7}),
        ("thinking.mode=off", "thinking", {"mode": "off"}),
        ("run.time_limit=3h", "run", {"time_limit": 10800.0}),
        ("run.time_limit=", "run", {"time_limit": None}),
        ("input.template=Sum: {text}", "input", {"template": "Sum: {text}", "path": ("in.jsonl",)}),
        ('input.template="{text}"', "input", {"template": "{text}", "path": ("in.jsonl",)}),
        ("input.path=[a, b]", "input", {"path": ("a", "b")}),
        ("input.path=*.jsonl.gz", "input", {"path": ("*.jsonl.gz",)}),
        ("generation={seed: 3}", "generation", {"seed": 3}),
        ("name=other", "name", "other"),
    ],
)
def test_overrides(job_file: Path, override: str, key: str, value: Any) -> None:
    job_file.write_text(LEAST_TEXT + "generation: {temperature: 0.5}\nbatch:\n")
    dumped = load_spec(job_file, overrides=[override]).model_dump()[key]
    assert dumped == value or {name: dumped[name] for name in value} == value


def test_the_last_override_counts_and_one_mends_the_file(job_file: Path) -> None:
    job_file.write_text(LEAST_TEXT + "generation: {seed: x}\n")
    assert load_spec(job_file, overrides=["generation.seed=1", "generation.seed=2"]).generation.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generation.seed", "--set: 'generation.seed' must be KEY=VALUE, such as generation.seed=7"),
        ("=7", "--set: '=7' must be KEY=VALUE, such as generation.seed=7"),
        ("a..b=7", "--set: 'a..b=7' must be KEY=VALUE, such as generation.seed=7"),
        (
            "generation.seed=-1",
            "--set: generation.seed: must be a whole number of at least 0 and at most 9223372036854775807, not -1",
        ),
        (
            "generation={seed: -1}",
            "--set: generation.seed: must be a whole number of at least 0 and at most 9223372036854775807, not -1",
        ),
        ("seed=1", "--set: seed: unknown here; `seed` belongs under `generation`"),
        ("generation.seed.x=1", "--set: generation.seed.x: cannot be set: `seed` has no keys of its own"),
        (
            "input.template={text} please",
            "--set: input.template: '{text} please' is not a YAML value; "
            "put text that begins with a bracket or a quote in double quotes",
        ),
        (
            "thinking.budget=300",
            "--set: thinking.budget: leaves no room for an answer; it must be below "
            "generation.max_new_tokens, which counts reasoning too",
        ),
    ],
)
def test_overrides_are_held_to_the_same_rules(job_file: Path, override: str, message: str) -> None:
    assert problems(job_file, LEAST_TEXT + "generation: {seed: 1}\n", override) == [message]


def test_a_job_file_that_is_not_there(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(NotFoundError) as caught:
            load_spec(path)
        assert str(caught.value) == f"{path}: cannot read the job file: {reason}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: 1\nb: \xff\n", "night.yaml:2: not UTF-8 text; save the file as UTF-8"),
        (b"#" * (2**20 + 1), "night.yaml: larger than 1 MiB; a job file is not that long"),
        (b"", "night.yaml: the file is empty; it needs at least model, input and output"),
    ],
)
def test_a_file_that_is_no_job_file(job_file: Path, data: bytes, message: str) -> None:
    job_file.write_bytes(data)
    with pytest.raises(SpecError) as caught:
        load_spec(job_file)
    assert str(caught.value) == message


def test_a_template_in_a_file_is_checked_with_the_job(job_file: Path) -> None:
    job_file.write_text("model: {path: m}\ninput: {path: a, template: {file: t.txt}}\noutput: {path: b}\n")
    with pytest.raises(NotFoundError, match=r"t\.txt: input\.template: cannot read: No such file"):
        load_spec(job_file)
    Path("t.txt").write_text("Say {")
    with pytest.raises(SpecError, match=r"t\.txt: input\.template: line 1, column 5 of the template"):
        load_spec(job_file)
    Path("t.txt").write_text("Say {text}")
    assert load_spec(job_file).input.template_text() == "Say {text}"
    # What is wrong with the job file comes before what it names and is not there.
    Path("t.txt").unlink()
    with pytest.raises(SpecError):
        load_spec(job_file, overrides=["generation.seed=-1"])


def test_every_job_of_the_project_loads() -> None:
    paths = sorted(JOBS.glob("*.yaml"))
    assert len(paths) >= 7
    assert {load_spec(path).name for path in paths} == {path.stem for path in paths}


@given(jobs())
def test_a_job_dumps_and_loads_to_itself(spec: JobSpec) -> None:
    assert JobSpec.model_validate(read_document(dump_spec(spec), "f").values) == spec


def test_a_dumped_job_is_a_job_file(job_file: Path) -> None:
    for path in JOBS.glob("*.yaml"):
        job_file.write_text(dump_spec(load_spec(path)))
        assert load_spec(job_file) == load_spec(path)


def lines_of_keys() -> dict[str, int]:
    """The line of each key in FULL, from 0."""
    found: dict[str, int] = {}
    sections: list[str] = []
    for number, line in enumerate(FULL.splitlines()):
        name, indent = line.strip().partition(":")[0], (len(line) - len(line.lstrip(" "))) // 2
        sections[indent:] = [name]
        found[".".join(sections)] = number
    return {key: number for key, number in found.items() if key in job_keys()}


def test_the_full_job_is_one_of_defaults() -> None:
    assert set(lines_of_keys()) == set(job_keys())
    least = "model: {path: builtin:smollm2-135m}\ninput: {path: hello.jsonl}\noutput: {path: runs/hello.jsonl}\n"
    assert build_spec(read_document(FULL, "f"), name="x") == build_spec(read_document(least, "f"), name="x")


@pytest.mark.parametrize("key", job_keys())
def test_one_mistake_anywhere_is_one_problem_in_its_place(key: str) -> None:
    number = lines_of_keys()[key]
    lines = FULL.splitlines()
    lines[number] = lines[number].partition(":")[0] + ": {odd: [1]}"
    with pytest.raises(SpecError) as caught:
        build_spec(read_document("\n".join(lines), "f"), name="other")
    (problem,) = caught.value.problems
    assert (problem.line, problem.column, problem.field) == (number + 1, lines[number].index("{") + 1, key)
    assert "must be" in problem.message
    assert 'not {"odd": [1]}' in problem.message


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["auto", "on", "1s"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["file", "seed", "path", "x"]), inner),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(["x", "model.x"]) | st.sampled_from([*job_keys(), "model", "model.echo", "generation"]),
        ODD,
        max_size=6,
    )
)
def test_any_values_make_a_job_or_problems(values: dict[str, Any]) -> None:
    tree: dict[str, Any] = {}
    for key, value in sorted(values.items()):
        *parents, last = key.split(".")
        section: Any = tree
        for name in parents:
            section = section.setdefault(name, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[last] = value
    document = read_document("{}", "f")
    document.values = tree
    try:
        spec = build_spec(document, name="n")
    except OvernightError as error:
        assert error.problems
        assert all(problem.field and problem.message for problem in error.problems)
    else:
        assert not list(broken_rules(spec))
