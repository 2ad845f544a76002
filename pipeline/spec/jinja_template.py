"""A prompt template in Jinja, for what `{field}` cannot say: conditions, loops, filters.

The template is the user's and the line's fields are strangers': the sandbox keeps it from files and Python, an
undefined name is an error and not an empty text, and a line on which it takes long, or needs too much memory, gets an
error.
Blocks leave no blank lines (`trim_blocks`, `lstrip_blocks`), and the file's last line end is not part of the prompt.
"""

# pyright: basic
from __future__ import annotations

import json
import signal
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline.spec.template import MissingFieldError, TemplateFailedError

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

_LINE = "line"  # the whole line, for fields whose names are no names in Jinja
_MAX_CPU_S = 5.0
_MAX_PROMPT_CHARS = 64 << 20


class JinjaTemplate:
    """Raises ValueError with all problems of the text, as `Template` does."""

    def __init__(self, text: str) -> None:
        import jinja2
        from jinja2 import meta, nodes

        environment = _sandbox()(
            undefined=jinja2.StrictUndefined,
            finalize=_written,
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
        )
        try:
            tree = environment.parse(text)
            others = [*tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends))]
            if others:
                raise ValueError(f"line {others[0].lineno} of the template: a template is one file, without others")
            if not meta.find_undeclared_variables(tree) - environment.globals.keys():
                raise ValueError("names no field of the line, so that every prompt would be the same")
            self._template = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno} of the template: {error.message}") from None

    def fill(self, fields: Mapping[str, Any]) -> str:
        """The prompt of one line: strings as they are, other values as JSON; a null counts as lacking.

        Raises MissingFieldError, TemplateFailedError.
        """
        import jinja2

        given = {name: value for name, value in fields.items() if value is not None}
        try:
            with _limited():
                return self._render({_LINE: given, **given})
        except jinja2.UndefinedError as error:
            raise MissingFieldError(_lacking(error, given)) from None
        except _TooLongError:
            raise TemplateFailedError(f"takes more than {_MAX_CPU_S:g} s on this line") from None
        except MemoryError:
            raise TemplateFailedError("needs more memory on this line than there is") from None
        # What a template's expressions do with values that they were not made for.
        except (
            jinja2.TemplateError,
            AttributeError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise TemplateFailedError(f"fails on this line: {error}") from None

    def _render(self, values: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        num_chars = 0
        for piece in self._template.generate(values):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > _MAX_PROMPT_CHARS:
                raise TemplateFailedError(f"makes a prompt of more than {_MAX_PROMPT_CHARS >> 20} MiB of this line")
        return "".join(pieces)


@cache
def _sandbox() -> type[SandboxedEnvironment]:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """With limits to what one operation makes: no signal interrupts it."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and isinstance(left, int) and isinstance(right, int):
                size = left.bit_length() * right
            else:
                size = max(_num_repeated(left, right), _num_repeated(right, left))
            if size > _MAX_PROMPT_CHARS:
                raise MemoryError
            return super().call_binop(context, operator, left, right)

    return Sandbox


def _num_repeated(left: Any, right: Any) -> int:
    return len(left) * right if isinstance(left, str | list | tuple) and isinstance(right, int) else 0


class _TooLongError(BaseException):
    """Not an Exception, so that nothing on the way takes it for its own."""


@contextmanager
def _limited() -> Generator[None]:
    """Ends what takes too much processor time; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, _MAX_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _written(value: Any) -> Any:
    import jinja2

    if isinstance(value, str | jinja2.Undefined):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _lacking(error: Exception, given: Mapping[str, Any]) -> str:
    """The name that Jinja's words speak of: `'title' is undefined`, `'dict object' has no attribute 'x'`."""
    names = str(error).split("'")[1::2]
    return next((name for name in reversed(names) if name not in given), "a field")
