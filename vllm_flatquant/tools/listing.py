"""``flatquant recipes``: the registry as text."""

import io

from rich.console import Console
from rich.table import Table

from ..calibration.recipe import Recipe
from ..calibration.recipes import RECIPES, Chosen


def bits(recipe: Recipe) -> str:
    """``W4A4KV4``; a KV cache of 16 bits is not mentioned."""
    return recipe.scheme.upper() + ("" if recipe.kv == 16 else f"KV{recipe.kv}")


COLUMNS = ("recipe", "system", "bits", "on-line", "what it does")


def lines() -> list[tuple[str, str, str, str, str]]:
    """What the registry's entries say in ``COLUMNS``."""
    found = []
    for name, entry in RECIPES.items():
        recipe = entry.recipe()
        found.append((name, recipe.system, bits(recipe), recipe.online, entry.summary))
    return found


def recipe_table() -> str:
    """A line per recipe: name, system, bits, cost at run time, what it does."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in COLUMNS:
        table.add_column(column, no_wrap=True)
    for line in lines():
        table.add_row(*line)
    text = io.StringIO()
    Console(file=text, width=1000).print(table)
    shown = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(
        [*shown, "", "quantize MODEL --recipe NAME uses one; recipes NAME shows its settings as YAML."]
    )


def markdown_table() -> str:
    """The same in Markdown, for docs/recipes.md."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *((f"`{name}`", *rest) for name, *rest in lines())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def recipe_yaml(chosen: Chosen) -> str:
    """Every setting of a recipe, as a file that ``--recipe`` takes."""
    about = f"# based on {chosen.base}: {RECIPES[chosen.base].summary}\n"
    if not chosen.base_named:
        about = f"# what the file leaves out is from {chosen.base}\n"
    return about + chosen.recipe.to_yaml(chosen.calib)
