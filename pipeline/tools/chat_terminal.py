"""The terminal's side of `overnight chat`: one answer for a script, or a dialogue with commands and a history."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from pipeline.cache import cache_directory
from pipeline.errors import (
    EXIT_OK,
    EXIT_SOME_FAILED,
    DataError,
    NotFoundError,
    OvernightError,
    StoppedError,
    UsageError,
)
from pipeline.output.native import render
from pipeline.records import Completion
from pipeline.spec.keys import JobSpec
from pipeline.spec.wording import nearest
from pipeline.tools.chat import Chat, Turn
from pipeline.tools.chat_screen import Screen

Say = Callable[[str], None]

_HISTORY_LINES = 1000


def chat_about(spec: JobSpec, once: str | None, *, say: Say, quiet: bool, hide_thinking: bool, as_json: bool) -> int:
    """Load the job's model and talk, or answer the one prompt `once`; the exit code."""
    prompt = None if once is None else read_prompt(once)  # before the model is loaded for nothing
    with closing(Chat(spec, quiet=quiet)) as chat:
        if prompt is None:
            return Dialogue(chat, say=say, hide_thinking=hide_thinking).run()
        return answer_once(chat, prompt, say=say, hide_thinking=hide_thinking, as_json=as_json)


def answer_once(chat: Chat, text: str, *, say: Say, hide_thinking: bool, as_json: bool) -> int:
    """Answer one prompt for a script; the exit code: 0, 3 for an answer that is an error, 75 where a signal came.

    The answer (or with `as_json` its record, as a line of a run's output) goes to standard output, thinking and talk to
    standard error.
    """
    screen = Screen(answers=sys.stdout, thoughts=sys.stderr, hide_thinking=hide_thinking)
    turn = chat.ask(text, (lambda _piece: None) if as_json else screen.show)
    screen.end()
    if as_json and turn.completion is not None:
        sys.stdout.buffer.write(render(turn.completion))
    if note := _note(chat, turn):
        say(note)
    if turn.completion is None:
        return StoppedError.exit_code
    return EXIT_OK if turn.completion.error is None else EXIT_SOME_FAILED


def read_prompt(words: str) -> str:
    """The prompt of `--once`: the words themselves, or for `-` what standard input holds, without its last line ends.

    Raises UsageError where it is empty, DataError where it is no UTF-8.
    """
    text = words
    if words == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: byte {error.start} is not UTF-8") from None
    if not text.strip():
        raise UsageError("the prompt is empty; give it as --once 'PROMPT', or --once - with text on standard input")
    return text


class Dialogue:
    """Reads prompts and commands until the end. Without a terminal each line of standard input is a prompt."""

    def __init__(self, chat: Chat, *, say: Say, hide_thinking: bool = False) -> None:
        self._chat = chat
        self._say = say
        self._screen = Screen(answers=sys.stdout, thoughts=sys.stdout, hide_thinking=hide_thinking)
        self._left_with: int | None = None
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "system": ("[TEXT | -]", "set the system message; - for none, alone shows it", self._system),
            "think": ("on|off|auto|show|hide", "switch thinking, or whether it is shown", self._think),
            "save": ("FILE", "add the conversation to FILE, a line of messages for a run", self._save),
            "reset": ("", "forget the conversation; the system message stays", self._reset),
            "help": ("", "show this", self._help),
            "quit": ("", "leave, as Ctrl-D does", self._quit),
        }

    def run(self) -> int:
        """The exit code: 0, or 75 after a signal other than Ctrl-C."""
        if not self._chat.remembers:
            self._say("this model has no chat template: it goes on from each prompt and remembers none")
        read_line = _line_reader(self._say)
        while self._left_with is None:
            try:
                self._take(_read_prompt(read_line))
            except EOFError:
                self._left_with = EXIT_OK
            except KeyboardInterrupt:
                self._say("")
        return self._left_with

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        if line.startswith("/") and not line.startswith("//"):
            self._command(line)
            return
        turn = self._chat.ask(line.removeprefix("/") if line.startswith("//") else line, self._screen.show)
        self._screen.end()
        if note := _note(self._chat, turn):
            self._say(note)
        if turn.stopped not in (None, "SIGINT"):
            self._left_with = StoppedError.exit_code

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].strip().partition(" ")
        if name not in self._commands:
            near = nearest(name, self._commands)
            hint = f"did you mean /{near}?" if near else "/help lists what there is"
            self._say(f"/{name} is no command; {hint} (a prompt that begins with / is written with //)")
            return
        try:
            self._commands[name][2](argument.strip())
        except OvernightError as error:
            for problem in error.problems:
                self._say(str(problem))

    def _system(self, text: str) -> None:
        if text:
            self._chat.system = None if text == "-" else text
        self._say(f"system message: {self._chat.system or 'none'}")

    def _think(self, word: str) -> None:
        if word in ("on", "off", "auto"):
            self._chat.think(word)
        elif word in ("show", "hide"):
            self._screen.hide_thinking = word == "hide"
        elif word:
            self._say("/think takes on, off, auto, show or hide")
            return
        self._say(f"thinking: {self._chat.thinking}, {'hidden' if self._screen.hide_thinking else 'shown'}")

    def _save(self, name: str) -> None:
        if not name:
            self._say("/save takes the name of a file")
        elif not self._chat.messages:
            self._say("there is no conversation to save yet")
        else:
            self._chat.save(Path(name).expanduser())
            self._say(f"added {len(self._chat.messages)} messages to {name}")

    def _reset(self, _argument: str) -> None:
        self._chat.forget()
        self._say("the conversation is forgotten")

    def _help(self, _argument: str) -> None:
        for name, (argument, meaning, _) in self._commands.items():
            self._say(f"  /{f'{name} {argument}':30} {meaning}")
        self._say("  Ctrl-C stops the answer under way; a line that ends with \\ goes on in the next one")

    def _quit(self, _argument: str) -> None:
        self._left_with = EXIT_OK


def _note(chat: Chat, turn: Turn) -> str | None:
    """What to say after an answer that did not come to its own end."""
    completion = turn.completion
    if completion is None:
        return f"stopped ({turn.stopped})"
    if completion.error is not None:
        remedy = "; /reset forgets the conversation" if completion.error.type == "prompt_too_long" else ""
        return f"no answer ({completion.error.type}): {completion.error.message}{remedy if chat.messages else ''}"
    return _cut_note(completion) if completion.finish_reason == "length" else None


def _cut_note(completion: Completion) -> str:
    assert completion.usage is not None
    num_tokens = completion.usage.completion_tokens
    where = "while it was still thinking " if completion.reasoning is not None and not completion.text else ""
    return f"cut off {where}after {num_tokens} tokens (generation.max_new_tokens, or the model's context, is used up)"


def _read_prompt(read_line: Callable[[str], str]) -> str:
    """A line, with those that it continues in by a backslash at its end."""
    lines = [read_line("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read_line(". "))
    return "\n".join(lines)


def _line_reader(say: Say) -> Callable[[str], str]:
    """`input` with editing and history for a person; plain lines for anything else.

    The history is a file in the cache directory that only its owner may read. Python's own readline is used: it edits
    lines and keeps a history wherever Python runs, and a chat needs no more.
    """
    if not sys.stdin.isatty():
        return _read_plain
    try:
        import readline
    except ImportError:  # a Python without it
        return input
    history = _open_history(readline, say)

    def read_line(prompt: str) -> str:
        line = input(prompt)
        if history is not None and line:
            with suppress(OSError, AttributeError):  # a full disk, or a readline without this, costs the history alone
                readline.append_history_file(1, history)  # at once: a closed terminal ends the program
        return line

    return read_line


def _read_plain(_prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _open_history(readline: Any, say: Say) -> Path | None:
    """The file of earlier lines, made if need be; None where there can be none."""
    try:
        path = cache_directory() / "chat-history"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDONLY, 0o600))
        path.chmod(0o600)
        readline.read_history_file(path)
        readline.set_history_length(_HISTORY_LINES)
    except (OSError, NotFoundError) as error:
        say(f"lines of this chat are not kept for the next one: {error}")
        return None
    return path
