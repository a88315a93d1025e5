"""``flatquant recipes``: the registry as text."""

import io

from rich.console import Console
from rich.table import Table

from ..calibration.recipe import Recipe
from ..calibration.recipes import RECIPES, Chosen


def bits(recipe: Recipe) -> str:
    """``W4A4KV4``; a KV cache of 16 bits is not mentioned."""
    return recipe.scheme.upper() + ("" if recipe.kv == 16 else f"KV{recipe.kv}")


def recipe_table() -> str:
    """A line per recipe: name, system, bits, cost at run time, what it does."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("recipe", "system", "bits", "run time pays for", "what it does"):
        table.add_column(column, no_wrap=True)
    for name, entry in RECIPES.items():
        recipe = entry.recipe()
        table.add_row(name, recipe.system, bits(recipe), recipe.online, entry.summary)
    text = io.StringIO()
    Console(file=text, width=1000).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(
        [*lines, "", "quantize MODEL --recipe NAME uses one; recipes NAME shows its settings as YAML."]
    )


def recipe_yaml(chosen: Chosen) -> str:
    """Every setting of a recipe, as a file that ``--recipe`` takes."""
    entry = RECIPES[chosen.base]
    return f"# based on {chosen.base}: {entry.summary}\n" + chosen.recipe.to_yaml(chosen.calib)
