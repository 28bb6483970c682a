"""Tables of the bench scripts: for a terminal, or in Markdown for docs/performance.md."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """Every row is as long as the head."""
    if markdown:
        return "\n".join("| " + " | ".join(words) + " |" for words in [head, ["---"] * len(head), *rows])
    widths = [max(len(words[column]) for words in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(words, widths, strict=True)) for words in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)
