"""References of the methods that were used."""

from __future__ import annotations

from pullback.core.facts import facts, rooms


def cite(*names: str) -> str:
    """BibTeX of the given rooms, or of all of them, each once and in the order given.

    Args:
        *names: names of rooms, for example ``"gradient_noise"``.

    Returns:
        BibTeX entries with an empty line between them.

    Raises:
        UnknownRoomError: if there is no such room; the message names the nearest one.
    """
    chosen = dict.fromkeys(facts(name).room for name in names or rooms())
    return "\n\n".join(facts(room).bibtex for room in chosen)
