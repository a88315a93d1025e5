"""Run by the serving tests in a process of its own: prompts through a vLLM engine, results as JSON.

Arguments: checkpoint folder, tensor-parallel size, dtype, output file. The prompts' token ids come on
standard input as a JSON list of lists.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Write, per prompt, the greedy tokens and the prompt tokens' log-probabilities (first one null)."""
    folder, ranks, dtype, out = sys.argv[1:]
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        tensor_parallel_size=int(ranks),
        dtype=dtype,
        max_model_len=128,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
    )
    prompts = json.load(sys.stdin)
    parameters = SamplingParams(
        max_tokens=16, temperature=0, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    results = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                entry[token].logprob if entry else None
                for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            ],
        }
        for output in outputs
    ]
    Path(out).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
