"""Runs us and our peers on the same lines with the same token counts, in turn, and prints one table.

    python benchmarks/compare_peers.py MODEL WORKLOAD.jsonl ... [--passes 3] [--minutes 35]
        [--peer stock:float32,passes=1] [--peer openvino,python=/envs/openvino/bin/python,model=smollm2.gguf] ...

A peer is NAME[:DTYPE] and then, after commas, python=ITS PYTHON, model=ITS MODEL, slots=N, passes=N; names are those of
`peers.py`. Without --peer, stock transformers in float32 and bfloat16. Each is loaded once, in a process and, if given,
an environment of its own; loading and a warm-up are left out; the passes alternate, so that a slow minute of the
machine hits all. Every pass is a line of JSON as soon as it is over, and the table comes last, whatever happened: who
fails is in it with the reason, and when the minutes are over no further pass begins. `benchmarks/README.md` says how
each is installed.
"""

import argparse
import json
import select
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pipeline import load_job, talk
from pipeline.tools.contestant import Contestant

HERE = Path(__file__).parent
_LEAST_SAME = 0.1  # of the answers; in 16 bits a near tie turns most long ones, a wrong model file all


@dataclass
class Figures:
    """What one contestant has measured on one workload."""

    durations_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    occupancies: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)  # of the first pass


@dataclass
class Peer:
    """A process of `peers.py`; once it has failed it stays out, and says why."""

    name: str
    command: list[str]
    words: Path  # what it says on standard error
    most_passes: int
    load_s: float = 0.0
    failure: str = ""
    process: Any = None

    def start(self, limit_s: float) -> None:
        """Load and warm up."""
        with self.words.open("w") as words:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True
            )
        self.load_s = self._receive(limit_s).get("load_s", 0.0)

    def measure(self, workload: str, number: int, limit_s: float) -> dict[str, Any]:
        """One pass: `duration_s`, `output_tokens` and `answers`, or nothing if it fails."""
        with suppress(OSError):  # it has ended, and what it said last tells why
            self.process.stdin.write(json.dumps({"workload": workload, "number": number}) + "\n")
            self.process.stdin.flush()
        found = self._receive(limit_s)
        if found and not found["exact"]:
            self.failure, found = "its answers have not the lengths that were asked for", {}
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _receive(self, limit_s: float) -> dict[str, Any]:
        """Its next line. It writes one for each that it is sent, so nothing waits in a buffer here."""
        if not select.select([self.process.stdout], [], [], limit_s)[0]:
            self.process.kill()
            self.process.wait()
            self.failure = f"took more than {limit_s:.0f} s"
            return {}
        if line := self.process.stdout.readline():
            return json.loads(line)
        said = self.words.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "nothing said")
        code = self.process.wait()
        ending = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        self.failure = f"{ending}: {last[-200:]}".replace("|", "/")
        return {}


def peer_of(text: str, model: str, workloads: Path, options: argparse.Namespace) -> Peer:
    name, *settings = text.split(",")
    given = dict(setting.split("=", 1) for setting in settings)
    peer, _, dtype = name.partition(":")
    command = [given.get("python", sys.executable), str(HERE / "peers.py"), peer, given.get("model", model)]
    command += [str(workloads), "--dtype", dtype or "float32", "--slots", given.get("slots", str(options.slots))]
    words = workloads.with_name(f"{name}.err")
    return Peer(name, command, words, int(given.get("passes", options.passes)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("workloads", type=Path, nargs="+")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=60, help="after so many no pass begins that may not be over")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a peer may take to load, or for a pass")
    parser.add_argument("--peer", action="append", default=[])
    options = parser.parse_args()
    ends_at = time.monotonic() + options.minutes * 60
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        specs = {path.stem: _job(options, path, Path(directory)) for path in options.workloads}
        workloads = Path(directory) / "workloads.json"
        workloads.write_text(json.dumps({name: _requests(spec) for name, spec in specs.items()}))
        ours: dict[str, Contestant] = {}
        for name, spec in specs.items():
            ours[name] = stack.enter_context(Contestant(spec, limit=None, stock=False))
            ours[name].measure("warm-up")
        introduction = next(iter(ours.values())).introduction
        own = "overnight:" + introduction.dtype
        peers = [
            peer_of(text, options.model, workloads, options)
            for text in options.peer or ["stock:float32", "stock:bfloat16"]
        ]
        for peer in peers:
            stack.callback(peer.close)
            peer.start(options.limit)
            _tell(peer=peer.name, load_s=peer.load_s, failure=peer.failure)
        figures: dict[tuple[str, str], Figures] = {
            (workload, name): Figures() for workload in ours for name in [own, *(peer.name for peer in peers)]
        }
        for number in range(options.passes):
            for workload, contestant in ours.items():
                if _fits(figures[workload, own], ends_at):
                    done = contestant.measure("whole")
                    facts = {"duration_s": done.duration_s, "output_tokens": done.output_tokens}
                    _note(figures[workload, own], facts, workload=workload, peer=own, occupancy=done.occupancy)
                for peer in peers:
                    known = figures[workload, peer.name]
                    if peer.failure or number >= peer.most_passes or not _fits(known, ends_at):
                        continue
                    found = peer.measure(workload, number, options.limit)
                    _note(known, found, workload=workload, peer=peer.name, failure=peer.failure)
        loads = {own: introduction.load_s} | {peer.name: peer.load_s for peer in peers}
        print(table(figures, own, loads, {peer.name: peer.failure for peer in peers}), flush=True)


def _job(options: argparse.Namespace, workload: Path, directory: Path) -> Any:
    job = directory / f"{workload.stem}.yaml"
    facts = {"model": {"path": options.model}, "input": {"path": str(workload)}}
    facts |= {"output": {"path": str(job.with_suffix(".jsonl"))}, "batch": {"slots": options.slots}}
    job.write_text(json.dumps(facts))  # JSON is YAML
    return load_job(job)


def _requests(spec: Any) -> list[dict[str, Any]]:
    """What every contestant is given: token ids as our engine gets them, and lengths."""
    from pipeline.job import locate_model, prepare
    from pipeline.records import Prompt, Request
    from pipeline.source.inputs import expand_inputs
    from pipeline.source.line_parser import LineParser
    from pipeline.source.lines import read_lines

    facts, _ = locate_model(spec, talk.say, quiet=True)
    _, choice = prepare(spec, facts)
    encoder, parser = choice.encoder(), LineParser(spec)
    found: list[dict[str, Any]] = []
    for line in read_lines(expand_inputs(spec.input.path), max_line_bytes=spec.input.max_line):
        prompt = parser.parse(line)
        request = encoder.encode(prompt) if isinstance(prompt, Prompt) else prompt
        if not isinstance(request, Request) or not request.settings.ignore_eos:
            raise SystemExit(f"{spec.input.path} has a line without an exact length (ignore_eos, max_new_tokens)")
        found.append({"token_ids": list(request.token_ids), "max_new_tokens": request.settings.max_new_tokens})
    return found


def _fits(known: Figures, ends_at: float) -> bool:
    """Whether there is time for another pass, as long as the longest so far."""
    return time.monotonic() + max(known.durations_s, default=0.0) < ends_at


def _note(known: Figures, found: dict[str, Any], *, occupancy: float | None = None, **facts: Any) -> None:
    """Keep what a pass has found, and tell it."""
    if found:
        known.durations_s.append(found["duration_s"])
        known.num_tokens = found["output_tokens"]
        known.occupancies += [occupancy] if occupancy is not None else []
        known.answers = known.answers or found.get("answers", [])
        facts |= {"duration_s": found["duration_s"], "output_tokens": found["output_tokens"], "occupancy": occupancy}
    _tell(**facts)


def _tell(**facts: Any) -> None:
    print(json.dumps({name: value for name, value in facts.items() if value not in ("", None)}), flush=True)


def table(figures: dict[tuple[str, str], Figures], own: str, loads: dict[str, float], failures: dict[str, str]) -> str:
    """Medians of each workload and contestant, in Markdown."""
    lines = [
        "| | | output tokens/s | passes, spread | ours is faster by | slots in use | same answers as stock | load s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (workload, name), known in figures.items():
        if not known.durations_s:
            lines.append(f"| {workload} | {name} | {failures.get(name) or 'no time left'} | | | | | |")
            continue
        middle = median(known.durations_s)
        spread = f"{len(known.durations_s)}, {(max(known.durations_s) - min(known.durations_s)) / middle:.0%}"
        first = figures[workload, own].durations_s
        ratio = f"{middle / median(first):.2f}" if first and name != own else ""
        occupancy = f"{median(known.occupancies):.1%}" if known.occupancies else ""
        same = same_as_stock(figures, workload, known)
        rate, load = f"{known.num_tokens / middle:.1f}", f"{loads[name]:.1f}"
        lines.append(f"| {workload} | {name} | {rate} | {spread} | {ratio} | {occupancy} | {same} | {load} |")
    lines += [f"\n{name} failed: {why}" for name, why in failures.items() if why]
    return "\n".join(lines)


def same_as_stock(figures: dict[tuple[str, str], Figures], workload: str, known: Figures) -> str:
    """How many answers are stock's to the last token, with a word where hardly any is; empty where there are none."""
    stock = next((one.answers for key, one in figures.items() if _is_stock(key, workload) and one.answers), [])
    if not known.answers or not stock or known.answers is stock:
        return ""
    pairs = list(zip(known.answers, stock, strict=True))
    num_same = sum(a == b for a, b in pairs)
    doubt = "; is it the same model?" if num_same < _LEAST_SAME * len(pairs) else ""
    return f"{num_same} of {len(pairs)}{doubt}"


def _is_stock(key: tuple[str, str], workload: str) -> bool:
    return key[0] == workload and key[1].partition(":")[0] == "stock"


if __name__ == "__main__":
    main()
