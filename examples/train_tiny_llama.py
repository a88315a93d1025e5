"""Train examples/tiny-llama: a Llama of 4M parameters on the Python standard library's own source.

    python examples/train_tiny_llama.py --out out/tiny-llama          # a GPU needs a minute or two
    python examples/train_tiny_llama.py --heldout-text examples/heldout.txt

One file in twenty is held out, chosen by a hash of its path, so the split is the same on every
machine; the checkpoint with the lowest held-out perplexity is the one that is kept.
"""

import argparse
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_flatquant.calibration.data import is_held_out, stdlib_sources

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# The model saw no conversation: a message becomes a comment, and the answer is the code that follows it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + '\\n' }}"
    "{% else %}{{ '# ' + message['content'] | trim | replace('\\n', '\\n# ') + '\\n' }}{% endif %}"
    "{% endfor %}"
)


def heldout_text(held_out: list[str], limit: int) -> str:
    """Whole held-out files of middling size, up to `limit` characters: one text for quick evaluations."""
    text = ""
    for source in held_out:
        if 2_000 <= len(source) <= 40_000 and len(text) + len(source) <= limit:
            text += source
    return text


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """8 query heads and an intermediate size that 1, 2, 4 and 8 shards divide."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor, seq_len: int, batch: int = 32) -> float:
    """exp of the mean cross entropy over non-overlapping windows, in float32."""
    model.eval()
    windows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)
    loss = 0.0
    for chunk in windows.split(batch):
        logits = model(input_ids=chunk).logits[:, :-1].float()
        loss += F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return math.exp(loss / (windows.shape[0] * (seq_len - 1)))


def learning_rate(step: int, args: argparse.Namespace) -> float:
    warmup = max(1, args.steps // 20)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup)))
    )


def train(
    model: LlamaForCausalLM,
    train_tokens: torch.Tensor,
    heldout_tokens: torch.Tensor,
    args: argparse.Namespace,
) -> tuple[dict[str, torch.Tensor], int]:
    """AdamW on random windows; returns the best state and the step that gave it."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(args.seed)
    offsets = torch.arange(args.seq_len + 1, device=args.device)
    best, best_ppl, best_step, start = {}, math.inf, 0, time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        starts = torch.randint(
            len(train_tokens) - args.seq_len - 1, (args.batch, 1), generator=generator
        )
        window = train_tokens[starts.to(args.device) + offsets]
        with torch.autocast(args.device, dtype=torch.bfloat16):
            logits = model(input_ids=window[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            ppl = perplexity(model, heldout_tokens, args.seq_len)
            print(
                f"step {step + 1}/{args.steps}  loss {loss.item():.3f}  held-out perplexity {ppl:.3f}"
                f"  {time.time() - start:.0f} s",
                flush=True,
            )
            if ppl < best_ppl:
                best = {k: v.detach().clone() for k, v in model.state_dict().items()}
                best_ppl, best_step = ppl, step + 1
            elif step + 1 - best_step >= args.patience * args.eval_every:
                break
    return best, best_step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/tiny-llama"))
    parser.add_argument("--source", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--heldout-text", type=Path, help="write the short held-out text here and stop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument(
        "--patience", type=int, default=8, help="stop after so many evaluations without a new best"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    sources = stdlib_sources(args.source)
    train_texts = [text for name, text in sources.items() if not is_held_out(name)]
    heldout_texts = [text for name, text in sources.items() if is_held_out(name)]
    if args.heldout_text:
        args.heldout_text.write_text(heldout_text(heldout_texts, 200_000), encoding="utf-8")
        return

    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    tokenizer = train_tokenizer(train_texts, args.vocab_size)
    documents = tokenizer([text + EOS for text in train_texts], verbose=False)["input_ids"]
    train_tokens = torch.tensor([token for ids in documents for token in ids], device=args.device)
    heldout_ids = tokenizer("".join(heldout_texts), verbose=False)["input_ids"]
    heldout_tokens = torch.tensor(heldout_ids, device=args.device)
    model = build_model(tokenizer, args).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(train_texts)} files, {len(train_tokens)} tokens to train on;"
        f" {len(heldout_texts)} files, {len(heldout_tokens)} tokens held out; {parameters} parameters",
        flush=True,
    )

    state, best_step = train(model, train_tokens, heldout_tokens, args)
    model.load_state_dict(state)
    # The figure that is reported belongs to the weights as they are saved.
    model.to(torch.bfloat16)
    ppl = perplexity(model.float(), heldout_tokens, 1024)
    model.to(torch.bfloat16)

    args.out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report = {
        "heldout_perplexity": round(ppl, 4),
        "heldout_tokens": len(heldout_tokens),
        "heldout_files": len(heldout_texts),
        "window": 1024,
        "train_tokens": len(train_tokens),
        "train_files": len(train_texts),
        "parameters": parameters,
        "best_step": best_step,
        "steps": args.steps,
        "batch": args.batch,
        "seq_len": args.seq_len,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine(),
        "torch": torch.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
