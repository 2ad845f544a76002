"""Runs us and our peers on the same lines with the same token counts, in turn, and prints one table.

    python benchmarks/compare_peers.py WORKLOAD.jsonl MODEL [--passes 3]
        [--peer stock:bfloat16] [--peer openvino:float32,python=/envs/openvino/bin/python,model=smollm2.gguf] ...

A peer is NAME[:DTYPE][,python=ITS PYTHON][,model=ITS MODEL]; names are those of `peers.py`. Without --peer, stock
transformers in float32 and bfloat16. Each is loaded once, in a process and, if given, an environment of its own;
loading and a warm-up are left out; the passes alternate, so that a slow minute of the machine hits all. Who does not
start is left out of the table with the reason. `benchmarks/README.md` says how each is installed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pipeline import load_job, talk
from pipeline.tools.contestant import Contestant

HERE = Path(__file__).parent


@dataclass
class Peer:
    """A process of `peers.py` and what it has measured."""

    name: str
    command: list[str]
    load_s: float = 0.0
    durations: list[float] = field(default_factory=list)
    num_tokens: int = 0
    answers: list[list[int]] = field(default_factory=list)
    process: Any = None

    def start(self) -> str:
        """Load and warm up; why that failed, if it did."""
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        if not line:
            return self.process.stderr.read().strip().rpartition("\n")[2][-200:]
        self.load_s = json.loads(line)["load_s"]
        return ""

    def measure(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        if not found["exact"]:
            raise SystemExit(f"{self.name} did not answer with exact lengths")
        self.durations.append(found["duration_s"])
        self.num_tokens, self.answers = found["output_tokens"], found["answers"]


def peer_of(text: str, model: str, requests: Path, slots: int) -> Peer:
    name, *settings = text.split(",")
    given = dict(setting.split("=", 1) for setting in settings)
    peer, _, dtype = name.partition(":")
    command = [given.get("python", sys.executable), str(HERE / "peers.py"), peer, given.get("model", model)]
    return Peer(name, [*command, str(requests), "--dtype", dtype or "float32", "--slots", str(slots)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("model")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        job = Path(directory) / "job.yaml"
        facts = {"model": {"path": options.model}, "input": {"path": str(options.workload)}}
        facts |= {"output": {"path": str(Path(directory) / "out.jsonl")}, "batch": {"slots": options.slots}}
        job.write_text(json.dumps(facts))  # JSON is YAML
        spec = load_job(job)
        requests = Path(directory) / "requests.json"
        requests.write_text(json.dumps(_requests(spec)))
        ours = stack.enter_context(Contestant(spec, limit=None, stock=False))
        ours.measure("warm-up")
        peers: list[Peer] = []
        for text in options.peer or ["stock:float32", "stock:bfloat16"]:
            peer = peer_of(text, options.model, requests, options.slots)
            why = peer.start()
            stack.callback(peer.process.kill)
            if why:
                print(f"{peer.name} is left out: {why}", file=sys.stderr)
            else:
                peers.append(peer)
        passes = []
        for number in range(options.passes):
            passes.append(ours.measure("whole"))
            for peer in peers:
                peer.measure()
            print(f"pass {number + 1} of {options.passes}", file=sys.stderr)
        own = [one.duration_s for one in passes]
        rows = [("overnight:" + ours.introduction.dtype, ours.introduction.load_s, own, passes[0].output_tokens)]
        rows += [(peer.name, peer.load_s, peer.durations, peer.num_tokens) for peer in peers]
        print(_table(rows))
        if options.json:
            facts = [
                {"name": name, "load_s": load, "durations_s": times, "output_tokens": count}
                for name, load, times, count in rows
            ]
            options.json.write_text(json.dumps(facts, indent=1))


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


def _table(rows: list[tuple[str, float, list[float], int]]) -> str:
    ours = median(rows[0][2])
    lines = ["| | output tokens/s | spread | ours is faster by | load s |", "|---|---|---|---|---|"]
    for name, load_s, durations, num_tokens in rows:
        middle = median(durations)
        spread = (max(durations) - min(durations)) / middle
        lines.append(f"| {name} | {num_tokens / middle:.1f} | {spread:.0%} | {middle / ours:.2f} | {load_s:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
