"""Text of other parties, made fit for a terminal."""


def plain(text: object) -> str:
    """Write each character that a terminal would obey, and not show, as its escape.

    Among them: control characters, line ends, changes of direction, halves of characters.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))
