"""vLLM's side of `benchmarks.peers`: runs in vLLM's own environment and imports nothing of ours.

    python peer_vllm.py FOLDER

Takes one JSON object per line, {"prompts": [[token, …], …], "max_tokens": n}, and answers with one.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, so that its CPU time is all of it
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever vLLM prints goes to stderr

    vllm = importlib.import_module("vllm")  # only here: it starts to print at once
    llm = vllm.LLM(
        model=sys.argv[1],
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=64,
        enforce_eager="--compiled" not in sys.argv,
        enable_prefix_caching=False,
    )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(llm, vllm.SamplingParams, json.loads(line))), file=answers, flush=True)


def answer(llm: Any, sampling: Any, request: dict[str, Any]) -> dict[str, Any]:
    params = sampling(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_s": wall, "cpu_s": cpu, "tokens": [list(each.outputs[0].token_ids) for each in outputs]}


if __name__ == "__main__":
    main()
