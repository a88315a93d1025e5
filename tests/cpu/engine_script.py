"""Run by the serving tests in a process of its own: prompts through a vLLM engine, results as JSON.

Arguments: checkpoint folder, output file, then engine options as ``vllm serve`` takes them. The prompts'
token ids come on standard input as a JSON list of lists.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    """Write, per prompt, the greedy tokens and the prompt tokens' log-probabilities (first one null)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--kv-cache-mib", type=int, default=64)
    parser.add_argument("--options", type=json.loads, default={}, help="more options of the engine")
    parser.add_argument(
        "--metrics",
        type=Path,
        help="where the engine's metrics go; prompts then get no log-probabilities, as what is cached has none",
    )
    arguments = parser.parse_args()

    from vllm import LLM, SamplingParams

    import vllm_flatquant

    vllm_flatquant.register()  # vLLM does this itself where the package is installed

    options = {
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "enforce_eager": arguments.enforce_eager,
        "dtype": arguments.dtype,
        "gpu_memory_utilization": arguments.gpu_memory_utilization,
        "max_model_len": 128,
        "max_num_seqs": arguments.max_num_seqs,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": arguments.kv_cache_mib << 20,
        "disable_log_stats": arguments.metrics is None,
        "seed": 0,
    }
    llm = LLM(model=arguments.folder, **options | arguments.options)
    parameters = SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=0,
        prompt_logprobs=None if arguments.metrics else 0,
        detokenize=False,
        ignore_eos=True,
    )
    prompts = [{"prompt_token_ids": ids} for ids in json.load(sys.stdin)]
    results = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": output.prompt_logprobs
            and [
                entry[token].logprob if entry else None
                for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            ],
        }
        for output in llm.generate(prompts, parameters, use_tqdm=False)
    ]
    arguments.out.write_text(json.dumps(results), encoding="utf-8")
    if arguments.metrics:
        found = {metric.name: vars(metric) for metric in llm.get_metrics()}
        arguments.metrics.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
