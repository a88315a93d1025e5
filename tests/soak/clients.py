"""Clients of an OpenAI-compatible vLLM server that behave as real ones do, and check every token they get.

A run sends a random mix of plain and streamed completions, streams that are given up half-way, requests whose
client goes away, prompts that are too long and broken HTTP. Prompts and answers are token ids; answers are
greedy and are compared with references recorded beforehand. Two engines, or one engine with other requests in
the batch, add in another order, so an answer may leave its reference where the two best tokens were nearly
equal; where the reference's margin exceeds a stated delta it may not.
"""

import asyncio
import random
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai

MIX = {"complete": 5, "stream": 3, "cancel": 4, "disconnect": 2, "too_long": 1, "broken": 1}
"""How often each kind of request comes, relative to the others."""
REFUSED = ("too_long", "broken")
"""Kinds that must not be answered with tokens."""


@dataclass(frozen=True)
class Reference:
    """A prompt and its greedy answer; ``margins`` are log-probability leads of each best token, in nats."""

    prompt: list[int]
    tokens: list[int]
    margins: list[float]


@dataclass(frozen=True)
class Request:
    """One thing that a client does. ``cut``: tokens, or ten-milliseconds, after which it gives up."""

    kind: str
    reference: Reference
    cut: int


@dataclass
class Report:
    """What a run did and saw.

    done: requests by kind. checked: tokens that were compared. left: margins, in nats, at which an answer left
    its reference within the delta. wrong: answers that left it beyond the delta. errors: anything else that
    should not be. samples: what ``watch`` returned, with ``seconds`` since the start.
    """

    done: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    left: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> str:
        """One line for a log."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.done.items()))
        return (
            f"{sum(self.done.values())} requests in {self.seconds:.0f} s ({kinds}); {self.checked} tokens checked, "
            f"{len(self.left)} answers left their reference within the delta (largest margin "
            f"{max(self.left, default=0):.3f}), {len(self.wrong)} wrong, {len(self.errors)} errors"
        )


def random_prompts(count: int, vocabulary: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random ids, of 1 to ``longest`` tokens; short ones are as frequent as long ones."""
    draw = random.Random(seed)
    lengths = [min(longest, max(1, round(longest ** draw.random()))) for _ in range(count)]
    lengths[: min(2, count)] = [1, longest][: min(2, count)]
    return [[draw.randrange(2, vocabulary) for _ in range(length)] for length in lengths]


def connect(address: str, timeout: float = 300) -> openai.AsyncOpenAI:
    """A client of the server at ``address`` (``http://host:port``) that never tries again by itself.

    Each connection serves one request: vLLM closes idle ones after five seconds, and a request sent in that
    very moment would fail without any fault of the answer.
    """
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=0)
    return openai.AsyncOpenAI(
        base_url=f"{address}/v1",
        api_key="none",
        timeout=timeout,
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(limits=limits, timeout=timeout),
    )


async def record(
    client: openai.AsyncOpenAI, model: str, prompts: Sequence[list[int]], tokens: int
) -> list[Reference]:
    """The server's own greedy answers of ``tokens`` tokens, one request at a time."""
    references = []
    for prompt in prompts:
        answer = await client.completions.create(
            **_greedy(model, prompt, tokens) | {"logprobs": 2}  # type: ignore[arg-type]
        )
        choice = answer.choices[0]
        assert choice.logprobs is not None and choice.logprobs.top_logprobs is not None
        tops = [sorted(entry.values(), reverse=True) for entry in choice.logprobs.top_logprobs]
        references.append(Reference(prompt, _ids(choice), [top[0] - top[1] for top in tops]))
    return references


def plan(
    references: Sequence[Reference], count: int, seed: int = 0, mix: dict[str, int] = MIX
) -> list[Request]:
    """``count`` requests drawn from ``mix`` and ``references``; the same for the same seed."""
    draw = random.Random(seed)
    kinds = draw.choices(list(mix), list(mix.values()), k=count)
    chosen = [draw.choice(references) for _ in kinds]
    return [
        Request(kind, reference, draw.randrange(1, max(2, len(reference.tokens))))
        for kind, reference in zip(kinds, chosen, strict=True)
    ]


async def run(
    address: str,
    model: str,
    requests: Sequence[Request],
    *,
    clients: int,
    delta: float,
    too_long: int,
    watch: Callable[[], dict[str, float]] | None = None,
    every: float = 1.0,
) -> Report:
    """Send ``requests`` from ``clients`` concurrent clients and compare what comes back.

    delta: nats, see the module. too_long: a prompt length that the server must refuse. watch: called about
    every ``every`` seconds; its figures go to ``Report.samples``.
    """
    report, queue, start = Report(), iter(requests), time.monotonic()
    client = connect(address)

    async def work() -> None:
        for request in queue:
            try:
                await _send(client, address, model, request, delta, too_long, report)
            except Exception as error:  # noqa: BLE001 (a soak reports every failure and goes on)
                report.errors.append(
                    f"{request.kind}: {type(error).__name__}: {error} ({error.__cause__!r})"
                )
            report.done[request.kind] += 1

    async def look() -> None:
        while watch is not None:
            found = await asyncio.to_thread(watch)
            report.samples.append({"seconds": time.monotonic() - start} | found)
            await asyncio.sleep(every)

    looking = asyncio.create_task(look())
    try:
        await asyncio.gather(*(work() for _ in range(clients)))
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await client.close()
    report.seconds = time.monotonic() - start
    return report


async def _send(
    client: openai.AsyncOpenAI,
    address: str,
    model: str,
    request: Request,
    delta: float,
    too_long: int,
    report: Report,
) -> None:
    reference = request.reference
    body: Any = _greedy(model, reference.prompt, len(reference.tokens))
    if request.kind == "broken":
        await _broken_http(address)
    elif request.kind == "too_long":
        body["prompt"] = (reference.prompt * (too_long // len(reference.prompt) + 1))[:too_long]
        try:
            await client.completions.create(**body)
        except openai.BadRequestError as error:
            if str(too_long) not in str(error) and "length" not in str(error):
                report.errors.append(f"too_long: the refusal does not say why: {error}")
        else:
            report.errors.append(f"too_long: a prompt of {too_long} tokens was answered")
    elif request.kind == "disconnect":
        call = asyncio.create_task(client.completions.create(**body))
        done, _ = await asyncio.wait({call}, timeout=request.cut / 100)
        if done:
            _check(report, request, _ids(call.result().choices[0]), delta, whole=True)
        else:
            call.cancel()  # closes the connection
            await asyncio.gather(call, return_exceptions=True)
    elif request.kind == "complete":
        answer = await client.completions.create(**body)
        _check(report, request, _ids(answer.choices[0]), delta, whole=True)
    else:
        tokens: list[int] = []
        stop = request.cut if request.kind == "cancel" else len(reference.tokens)
        async with await client.completions.create(**body, stream=True) as stream:
            async for chunk in stream:
                if chunk.choices:
                    tokens += _ids(chunk.choices[0])
                if request.kind == "cancel" and len(tokens) >= stop:
                    break
        _check(report, request, tokens, delta, whole=request.kind == "stream")


def _check(report: Report, request: Request, tokens: list[int], delta: float, whole: bool) -> None:
    reference = request.reference
    if whole and len(tokens) != len(reference.tokens):
        report.errors.append(f"{request.kind}: {len(tokens)} tokens instead of {len(reference.tokens)}")
    for position, (got, expected) in enumerate(zip(tokens, reference.tokens, strict=False)):
        report.checked += 1
        if got != expected:
            margin = reference.margins[position]
            if margin <= delta:
                report.left.append(margin)
            else:
                report.wrong.append(
                    f"{request.kind}, prompt of {len(reference.prompt)} tokens, position {position}: {got} "
                    f"instead of {expected}, which led by {margin:.3f}"
                )
            return  # from here on the two answer different prompts


def _greedy(model: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    extra = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "extra_body": extra,
    }


def _ids(choice: Any) -> list[int]:
    return list(getattr(choice, "token_ids", None) or [])


async def _broken_http(address: str) -> None:
    """Half a request, then the connection ends."""
    at = urlsplit(address)
    _, writer = await asyncio.open_connection(at.hostname, at.port)
    writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4096\r\n\r\n{"model": ')
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def gauges(address: str) -> dict[str, float]:
    """Requests running and waiting, and the share of the KV cache in use, from the server's /metrics."""
    wanted = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    found: dict[str, float] = {}
    for name in wanted:
        values = [float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{")]
        found[name] = sum(values) if values else float("nan")
    return found


def idle(address: str, timeout: float = 30) -> dict[str, float]:
    """The gauges once nothing runs, waits or holds cache any more, or after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while any((found := gauges(address)).values()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def resident_bytes(pid: int) -> dict[str, float]:
    """Resident memory of the process ``pid`` and all its descendants."""
    import psutil

    total = 0
    for process in [parent := psutil.Process(pid), *parent.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return {"resident_bytes": float(total)}


def growth(samples: Sequence[dict[str, float]], name: str) -> float:
    """Median of the last quarter of ``samples`` minus that of the second: warm-up does not count."""
    quarter = len(samples) // 4
    if not quarter:
        raise ValueError(f"{len(samples)} samples are too few to tell whether {name} grows")
    values = [sample[name] for sample in samples]
    return median(values[-quarter:]) - median(values[quarter : 2 * quarter])
