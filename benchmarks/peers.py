"""One peer in a process and an environment of its own; `compare_peers.py` starts it and tells it when to run.

    python benchmarks/peers.py PEER MODEL WORKLOADS.json [--dtype float32] [--slots 128]

WORKLOADS holds `{NAME: [{"token_ids": [...], "max_new_tokens": N}, ...]}`. The first line on standard output says what
was loaded, then each line on standard input, `{"workload": NAME, "number": N}`, has all its requests answered once,
greedily, to exactly their lengths, and gives a line with the seconds and the tokens. This file needs of us nothing: the
peers' own environments run it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import Request, urlopen

Requests = list[dict[str, Any]]
Run = Callable[[Requests], list[list[int]]]  # the tokens of each answer
BATCH = 16
PAGE = 256  # tokens
_OTHER = 1000  # an ordinary token in any vocabulary


def stock(model: str, options: argparse.Namespace) -> Run:
    """transformers' `generate`, in batches of 16 in file order, each as long as its longest answer."""
    import torch
    import transformers

    language_model: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options.dtype))
    language_model.eval()

    def run(requests: Requests) -> list[list[int]]:
        answers: list[list[int]] = []
        for begin in range(0, len(requests), BATCH):
            batch = requests[begin : begin + BATCH]
            width = max(len(one["token_ids"]) for one in batch)
            padding = [width - len(one["token_ids"]) for one in batch]
            rows = zip(padding, batch, strict=True)
            most = max(one["max_new_tokens"] for one in batch)
            output = language_model.generate(
                torch.tensor([[0] * pad + one["token_ids"] for pad, one in rows]),
                attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
                do_sample=False,
                max_new_tokens=most,
                min_new_tokens=most,
                pad_token_id=0,
            )
            answers += [
                row[width : width + one["max_new_tokens"]].tolist() for row, one in zip(output, batch, strict=True)
            ]
        return answers

    return run


def generate_batch(model: str, options: argparse.Namespace) -> Run:
    """transformers' continuous batching."""
    import torch
    import transformers

    language_model: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options.dtype))
    language_model.eval()
    settings = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    # By itself it takes most of the memory that is free, which is the others' too.
    pages = options.slots * options.longest // PAGE
    sizes = transformers.ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=pages, max_requests_per_batch=options.slots
    )

    def run(requests: Requests) -> list[list[int]]:
        found: dict[str, list[int]] = {}
        with language_model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=sizes
        ) as manager:
            for place, one in enumerate(requests):
                manager.add_request(one["token_ids"], request_id=str(place), max_new_tokens=one["max_new_tokens"])
            while len(found) < len(requests):
                output = manager.get_result(timeout=1)
                if output is None and not manager.is_running():
                    raise SystemExit("its continuous batching stopped")
                if output is not None and output.is_finished():
                    found[output.request_id] = output.generated_tokens
        return [found[str(place)] for place in range(len(requests))]

    return run


def openvino(model: str, options: argparse.Namespace) -> Run:
    """OpenVINO GenAI's continuous batching; MODEL is a GGUF file or a directory that optimum-intel exported."""
    import numpy
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = options.slots
    scheduler.max_num_batched_tokens = max(512, options.slots)
    scheduler.cache_size = options.cache_gb
    scheduler.enable_prefix_caching = True
    precision = {"float32": "f32", "bfloat16": "bf16"}[options.dtype]
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        model, scheduler, "CPU", {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": options.threads}
    )

    def settings(max_new_tokens: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = max_new_tokens, True, False
        return config

    def run(requests: Requests) -> list[list[int]]:
        prompts = [openvino.Tensor(numpy.array([one["token_ids"]], dtype=numpy.int64)) for one in requests]
        results = pipeline.generate(prompts, [settings(one["max_new_tokens"]) for one in requests])
        return [list(result.m_generation_ids[0]) for result in results]

    return run


def vllm(model: str, options: argparse.Namespace) -> Run:
    """vLLM on a CPU, compiled, with its prefix cache."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(options.cache_gb))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{options.threads - 1}")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports] - in an environment of its own

    engine = LLM(model=model, dtype=options.dtype, max_num_seqs=options.slots, max_model_len=4096)

    def run(requests: Requests) -> list[list[int]]:
        settings = [
            SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=one["max_new_tokens"]) for one in requests
        ]
        prompts = [{"prompt_token_ids": one["token_ids"]} for one in requests]
        return [list(output.outputs[0].token_ids) for output in engine.generate(prompts, settings, use_tqdm=False)]

    return run


def llama_cpp(model: str, options: argparse.Namespace) -> Run:
    """llama.cpp's server in this process, asked over HTTP by as many clients as it has slots, and some that wait."""
    import xllamacpp  # pyright: ignore[reportMissingImports] - in an environment of its own

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model  # a GGUF file
    parameters.n_parallel = options.slots
    parameters.n_ctx = options.slots * options.longest
    parameters.cache_ram_mib = options.cache_gb * 1024  # of other slots' prompts
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(parameters)

    def ask(one: dict[str, Any]) -> list[int]:
        wish = {"prompt": one["token_ids"], "n_predict": one["max_new_tokens"], "ignore_eos": True}
        wish |= {"samplers": ["top_k"], "top_k": 1, "cache_prompt": True, "return_tokens": True}
        body = json.dumps(wish).encode()
        request = Request(server.listening_address + "/completion", body, {"Content-Type": "application/json"})
        with urlopen(request) as response:
            return json.load(response)["tokens"]

    def run(requests: Requests) -> list[list[int]]:
        with ThreadPoolExecutor(options.slots + BATCH) as clients:
            return list(clients.map(ask, requests))

    return run


PEERS = {"stock": stock, "generate_batch": generate_batch, "openvino": openvino, "vllm": vllm, "llama.cpp": llama_cpp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model")
    parser.add_argument("workloads")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache-gb", type=int, default=2)
    options = parser.parse_args()
    # What libraries print must not come between our lines.
    ours = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with open(options.workloads, encoding="utf-8") as file:  # noqa: PTH123 - no more than a peer's Python may know
        workloads: dict[str, Requests] = json.load(file)
    options.longest = _longest(workloads)
    began = time.perf_counter()
    run = PEERS[options.peer](options.model, options)
    loaded = time.perf_counter()
    by_length = sorted((one for some in workloads.values() for one in some), key=lambda one: len(one["token_ids"]))
    run([one | {"max_new_tokens": 4} for one in by_length[:BATCH]])  # warm-up
    print(json.dumps({"load_s": loaded - began}), file=ours)
    for line in sys.stdin:
        wish = json.loads(line)
        # Prefix caches outlive a pass: another first token keeps what was shared within one, and no more.
        first = _OTHER + wish["number"]
        requests = [one | {"token_ids": [first, *one["token_ids"][1:]]} for one in workloads[wish["workload"]]]
        began = time.perf_counter()
        answers = run(requests)
        duration = time.perf_counter() - began
        exact = all(len(answer) == one["max_new_tokens"] for answer, one in zip(answers, requests, strict=True))
        count = sum(map(len, answers))
        print(
            json.dumps({"duration_s": duration, "output_tokens": count, "exact": exact, "answers": answers}), file=ours
        )


def _longest(workloads: dict[str, Requests]) -> int:
    """Tokens of the longest sequence, prompt and answer, in whole pages."""
    sequences = (len(one["token_ids"]) + one["max_new_tokens"] for some in workloads.values() for one in some)
    return -(-max(sequences) // PAGE) * PAGE


if __name__ == "__main__":
    main()
