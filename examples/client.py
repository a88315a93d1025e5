"""Ask a running `vllm serve`: a completion, a chat answer and a streamed one, through the openai package.

    vllm serve DIR --port 8000
    python examples/client.py --url http://localhost:8000/v1

The model is the one that the server has. A model without a chat template answers completions only.
"""

import argparse
import sys

from openai import APIConnectionError, BadRequestError, NotFoundError, OpenAI


def complete(client: OpenAI, model: str, prompt: str, tokens: int) -> str:
    """The most likely continuation of ``prompt``, at most ``tokens`` tokens."""
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0)
    return answer.choices[0].text


def chat(client: OpenAI, model: str, question: str, tokens: int) -> str:
    """The whole answer to a chat message."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
    )
    return answer.choices[0].message.content or ""


def stream(client: OpenAI, model: str, question: str, tokens: int) -> int:
    """Print the answer as it comes; returns the number of pieces."""
    pieces = 0
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
    ):
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            print(piece, end="", flush=True)
            pieces += 1
    print()
    return pieces


def main() -> None:
    """Ask all three, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000/v1", help="address that ends in /v1")
    parser.add_argument("--api-key", default="none", help="what `vllm serve --api-key` was given")
    parser.add_argument("--prompt", default="import os\n\ndef read_file(path):\n")
    parser.add_argument("--question", default="Return the names of the files in a directory.")
    parser.add_argument("--max-tokens", type=int, default=48)
    given = parser.parse_args()
    client = OpenAI(base_url=given.url, api_key=given.api_key, timeout=300, max_retries=0)
    try:
        model = client.models.list().data[0].id
        print(f"model: {model}\n\n-- completion\n{given.prompt}", end="")
        print(complete(client, model, given.prompt, given.max_tokens))
        try:
            print(f"\n-- chat\n{chat(client, model, given.question, given.max_tokens)}")
            print("\n-- chat, streamed")
            stream(client, model, given.question, given.max_tokens)
        except BadRequestError as error:
            if "chat template" not in str(error):
                raise
            print(f"\n-- no chat: {model} has no chat template, so it answers completions only")
    except APIConnectionError:
        sys.exit(f"client: nothing answers at {given.url}; start `vllm serve` or correct --url")
    except (BadRequestError, NotFoundError) as error:
        hint = "" if given.url.rstrip("/").endswith("/v1") else "; --url ends in /v1"
        sys.exit(f"client: the server refused: {error}{hint}")


if __name__ == "__main__":
    main()
