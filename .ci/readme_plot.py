"""Draw docs/perplexity.png: the recipes of docs/results.md, on the texts that nothing was chosen by."""

import readme_table
from accuracy_tables import plot

if __name__ == "__main__":
    rows = next(iter(readme_table.comparison_rows().values()))
    rows = [row for row in rows if row["text"] in readme_table.FINAL]
    plot(rows, readme_table.ROOT / "docs" / "perplexity.png")
