"""Draw docs/perplexity.png: the table of README.md, on the texts that nothing was chosen by."""

import sys

import readme_table

sys.path.append(str(readme_table.ROOT / "benchmarks"))
import accuracy

if __name__ == "__main__":
    rows = next(iter(readme_table.comparison_rows().values()))
    rows = [row for row in rows if row["text"] in readme_table.FINAL]
    accuracy.plot(rows, readme_table.ROOT / "docs" / "perplexity.png")
