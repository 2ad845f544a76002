"""A line of an OpenAI batch file to what it asks: `custom_id`, `method`, `url` and the `body` of a request.

The shapes are those of https://platform.openai.com/docs/api-reference/batch/request-input and of the bodies of
`/v1/chat/completions` and `/v1/completions`, with the further sampling settings that vLLM takes. A field of the body
that asks for something we cannot give is refused, never passed over; so is a field that is not known here. `model` is
not looked at: the job says which model answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from pipeline.records import Message
from pipeline.source.bad_line import BadLineError, missing, show, wrong_type
from pipeline.source.messages import read_messages

ID_FIELD = "custom_id"
CHAT_URL = "/v1/chat/completions"
TEXT_URL = "/v1/completions"

# Fields of a body that are settings of ours, and what we call them.
_SETTINGS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")},
    "ignore_eos": "ignore_eos",
}
# Fields that say nothing about the answer: names and accounts of the service.
_LABELS = frozenset({"model", "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
# Fields that are accepted with a value that asks for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "stream": (False,),
    "store": (False,),
    "logprobs": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
_THINKING_SWITCHES = ("enable_thinking", "thinking")  # of chat_template_kwargs, as the models' templates call them


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a line asks. `settings` are under our names, `written` says how the line wrote each of them."""

    content: str | tuple[Message, ...]
    is_text: bool  # of /v1/completions: no chat template is applied
    thinking: Literal["on", "off"] | None
    settings: Mapping[str, Any]
    written: Mapping[str, str]


def looks_like_request(fields: Mapping[str, Any]) -> bool:
    """Whether a line of unknown kind is one of a batch file."""
    return isinstance(fields.get("body"), dict) and isinstance(fields.get("url"), str)


def read_request(fields: Mapping[str, Any], *, num_samples: int) -> BatchRequest:
    """The request of a line. Raises BadLineError for whatever keeps it from being answered as it asks."""
    if fields.get(ID_FIELD) is None:
        raise missing([ID_FIELD], fields, "it tells whose answer is whose")
    if not isinstance(fields[ID_FIELD], str):
        raise wrong_type(ID_FIELD, "a string", fields[ID_FIELD])
    if fields.get("method", "POST") != "POST":
        raise BadLineError("unsupported_field", 'only "POST" can be answered', field="method")
    if fields.get("generation") is not None:
        reason = "has no place in a batch file; settings belong into the body"
        raise BadLineError("ambiguous_line", reason, field="generation")
    url, body = fields.get("url"), fields.get("body")
    for name, value in (("url", url), ("body", body)):
        if value is None:
            raise missing([name], fields, "a batch file has it")
    if url not in (CHAT_URL, TEXT_URL):
        found = show(url) if isinstance(url, str) else "this"
        raise BadLineError("unsupported_field", f"must be {CHAT_URL} or {TEXT_URL}, not {found}", field="url")
    if not isinstance(body, dict):
        raise wrong_type("body", "an object", cast("object", body))
    given = {name: value for name, value in cast("dict[str, Any]", body).items() if value is not None}
    return _read_body(given, is_text=url == TEXT_URL, num_samples=num_samples)


def _read_body(body: dict[str, Any], *, is_text: bool, num_samples: int) -> BatchRequest:
    content_field = "prompt" if is_text else "messages"
    if content_field not in body:
        raise missing([f"body.{content_field}"], {f"body.{name}": None for name in body}, "the url asks for it")
    value = body.pop(content_field)
    content = _read_text(value) if is_text else read_messages("body.messages", value, {"developer": "system"})
    _check_num_samples(body.pop("n", None), num_samples)
    thinking = None if is_text else _read_thinking(body)
    settings: dict[str, Any] = {}
    written: dict[str, str] = {}
    for name, value in body.items():
        if name in _SETTINGS:
            _set(settings, written, name, value)
        elif name not in _LABELS:
            _refuse_unless_neutral(name, value)
    return BatchRequest(content, is_text, thinking, settings, written)


def _read_text(value: object) -> str:
    """The prompt of a text completion; OpenAI also has lists of them, of which one is one prompt."""
    if isinstance(value, list) and len(cast("list[object]", value)) == 1:
        value = cast("list[object]", value)[0]
    if isinstance(value, list):
        reason = "several prompts, or token ids, in one line are not supported; write one string"
        raise BadLineError("unsupported_field", reason, field="body.prompt")
    if not isinstance(value, str):
        raise wrong_type("body.prompt", "a string", value)
    return value


def _check_num_samples(n: object, num_samples: int) -> None:
    if n is not None and (n != num_samples or isinstance(n, bool)):
        reason = f"must be what the job's generation.num_samples is ({num_samples}): all lines have as many answers"
        raise BadLineError("unsupported_field", reason, field="body.n")


def _read_thinking(body: dict[str, Any]) -> Literal["on", "off"] | None:
    """Takes what switches reasoning out of the body."""
    kwargs = body.pop("chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        raise wrong_type("body.chat_template_kwargs", "an object", kwargs)
    switches = cast("dict[str, object]", kwargs)
    for name, value in switches.items():
        where = f"body.chat_template_kwargs.{name[:40]}"
        if name not in _THINKING_SWITCHES:
            raise BadLineError("unsupported_field", f"is not supported ({_THINKING_SWITCHES[0]} is)", field=where)
        if not isinstance(value, bool):
            raise wrong_type(where, "true or false", value)
    asked = set(switches.values())
    if body.get("reasoning_effort") == "none":
        del body["reasoning_effort"]
        asked.add(False)
    elif "reasoning_effort" in body:
        reason = 'only "none" is supported; thinking.mode and thinking.budget of the job say how a model reasons'
        raise BadLineError("unsupported_field", reason, field="body.reasoning_effort")
    if len(asked) > 1:
        raise BadLineError("ambiguous_line", "reasoning is asked for and switched off", field="body")
    return None if not asked else "on" if asked.pop() else "off"


def _set(settings: dict[str, Any], written: dict[str, str], name: str, value: object) -> None:
    ours, where = _SETTINGS[name], f"body.{name}"
    if ours in settings and settings[ours] != value:
        reason = f"another value than {written[ours]}; keep one of the two"
        raise BadLineError("ambiguous_line", reason, field=where)
    settings[ours] = [value] if name == "stop" and isinstance(value, str) else value
    written[ours] = where


def _refuse_unless_neutral(name: str, value: object) -> None:
    for neutral in _NEUTRAL.get(name, ()):
        if value == neutral and isinstance(value, bool) == isinstance(neutral, bool):  # to Python 0 is False
            return
    hint = " with this value" if name in _NEUTRAL else ""
    reason = f"is not supported{hint}, and passing it over would give another answer than was asked for"
    raise BadLineError("unsupported_field", reason, field=f"body.{name[:40]}")
