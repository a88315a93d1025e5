"""Rewrite the list of recipes in docs/recipes.md from the registry."""

import re
from pathlib import Path

from vllm_flatquant.tools.listing import markdown_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
BLOCK = re.compile(r"(<!-- recipes: .*? -->\n).*?(<!-- end of recipes -->)", re.DOTALL)


def with_table(page: str) -> str:
    """The page with the table of today's registry."""
    return BLOCK.sub(lambda m: m[1] + markdown_table() + m[2], page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
