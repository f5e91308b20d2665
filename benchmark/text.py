"""Text of the user's, for places in which some characters mean something."""

import re

from rich.text import Text


def printable(text: object) -> str:
    """Text for one line of a terminal or a figure: line breaks and control characters are written as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )


def plain(line: str) -> str:
    """A line of a program's output without its colors and other commands to the terminal."""
    return printable(Text.from_ansi(line.expandtabs()).plain)


def markdown(text: object) -> str:
    """Text for a cell of a Markdown table, in which nothing means anything but itself.

    An underscore within a word, as in ppo_continuous.py, is none of Markdown's and stays as it is.
    """
    return re.sub(r"([\\`*\[\]<>|$~&]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", printable(text))


def markdown_table(rows: list[list[object]]) -> str:
    """A Markdown table; the first row holds the names of its columns."""
    head, *lines = [f"| {' | '.join(map(markdown, row))} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines])
