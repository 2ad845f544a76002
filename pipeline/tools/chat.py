"""`overnight chat`: a conversation with a job's model, loaded and asked as a run would load and ask it."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline import talk
from pipeline.errors import OutputError, Problem, StoppedError
from pipeline.job import locate_model, prepare, say_decisions
from pipeline.records import Completion, Item, Message, Prompt, Rejection, Request
from pipeline.spec.keys import JobSpec
from pipeline.spec.settings import default_settings
from pipeline.stop import Stop

if TYPE_CHECKING:
    from pipeline.engines import Encoder
    from pipeline.engines.draft import Draft, Piece

ThinkingMode = Literal["on", "off", "auto"]

_TOLD_DECISIONS = ("load strategy", "dtype", "weights", "experts")


@dataclass(frozen=True, slots=True)
class Turn:
    """How an answer ended: complete, as an error, or stopped by a signal (then `completion` is None)."""

    completion: Completion | None
    stopped: str | None = None  # the signal


class Chat:
    """The model of a job and one conversation with it.

    The job's input, template and output play no part; its model, thinking, `input.system` and generation do. The
    earlier answers are given to the model without their reasoning, as templates of reasoning models want it. A model
    without a chat template sees each prompt alone, as a run shows it a line.
    """

    def __init__(self, spec: JobSpec, *, quiet: bool = False) -> None:
        """Load the model. Raises whatever keeps a run from starting; StoppedError where a signal comes meanwhile."""
        from pipeline.loading import apply_environment

        # One answer at a time, so memory is planned for one.
        self._spec = spec.model_copy(update={"batch": spec.batch.model_copy(update={"slots": 1})})
        self._settings = default_settings(spec)
        self._num_asked = 0
        self.system = spec.input.system
        self.messages: list[Message] = []
        self.thinking: ThinkingMode = spec.thinking.mode
        say = _silence if quiet else talk.say
        stop = Stop()
        with _interruptible(stop):
            self._facts, _ = locate_model(self._spec, say, quiet=quiet)
            self._plan, choice = prepare(self._spec, self._facts)
            apply_environment(self._plan)
            self._encoders: dict[ThinkingMode, Encoder] = {self.thinking: choice.encoder()}
            say_decisions(self._plan, say, _TOLD_DECISIONS)
            self._engine, self.load_s = choice.open(say, False)

    @property
    def remembers(self) -> bool:
        """Whether the model is shown what was said before."""
        return self._encoders[self.thinking].takes_conversations

    def think(self, mode: ThinkingMode) -> None:
        """Switch the thinking mode from the next prompt on. Raises SpecError where this model has no such mode."""
        from pipeline.engines import choose_engine

        if mode not in self._encoders:
            thinking = self._spec.thinking.model_copy(update={"mode": mode})
            spec = self._spec.model_copy(update={"thinking": thinking})
            self._encoders[mode] = choose_engine(spec, self._plan, self._facts).encoder()
        self.thinking = mode

    def ask(self, text: str, show: Callable[[Piece], None]) -> Turn:
        """Let the model answer; `show` is given the answer piece by piece as it comes.

        What was shown of the answer stays in the conversation, also where a signal stopped it. A prompt that came to no
        answer (an error, nothing but reasoning) is forgotten.
        """
        from pipeline.engines.draft import Draft

        encoder = self._encoders[self.thinking]
        request = encoder.encode(self._prompt(text, encoder))
        self._num_asked += 1
        if isinstance(request, Rejection):
            return Turn(Completion.failed(request.item, 0, request.error))
        draft = Draft(request, encoder.decode, encoder.thinking)
        turn = self._generate(request, draft, show)
        if draft.answer:
            self.messages += [Message("user", text), Message("assistant", draft.answer)]
        return turn

    def forget(self) -> None:
        """Begin a new conversation; the system message stays."""
        self.messages = []

    def save(self, path: Path) -> None:
        """Add the conversation to a file as one line of `messages`, which a run takes as input.

        Raises OutputError where the file cannot be written.
        """
        told = [Message("system", self.system)] if self.system is not None else []
        messages = [{"role": message.role, "content": message.content} for message in (*told, *self.messages)]
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise OutputError(Problem(f"cannot be written: {reason}", file=str(path))) from None

    def close(self) -> None:
        """Give up the model."""
        self._engine.close()

    def _prompt(self, text: str, encoder: Encoder) -> Prompt:
        item = Item(self._num_asked, "chat", self._num_asked + 1, 0, fields={"prompt": text})
        content = (*self.messages, Message("user", text)) if encoder.takes_conversations else text
        return Prompt(item, content, self.system, self._settings)

    def _generate(self, request: Request, draft: Draft, show: Callable[[Piece], None]) -> Turn:
        stop = Stop(grace_s=0.0)
        with stop.signals(), closing(self._engine.generate(iter([request]))) as steps:
            for completion in steps:
                pieces = draft.finish(completion) if completion else self._push(draft)
                for piece in pieces:
                    show(piece)
                if completion is not None:
                    return Turn(completion)
                if stop.overdue:
                    break
        return Turn(None, stop.reason)

    def _push(self, draft: Draft) -> list[Piece]:
        return [piece for row in self._engine.unfinished() for piece in draft.push(row.token_ids)]


@contextmanager
def _interruptible(stop: Stop) -> Generator[None]:
    """Loading, which a signal ends at once; there is no run that could be resumed."""
    try:
        with stop.signals(), stop.interrupting("loading the model"):
            yield
    except StoppedError:
        raise StoppedError(f"stopped ({stop.reason}) while loading the model") from None


def _silence(_text: str) -> None:
    pass
