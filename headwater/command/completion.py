"""What a shell offers on Tab: names of analyses and of models; for everything else the shell offers files.

Typer keeps those that begin as the word does."""

from __future__ import annotations


def analyses() -> list[tuple[str, str]]:
    """Names of analyses, each with its question."""
    from headwater.analyses._catalogue.about import listed

    return [(name, each.question) for name, each in listed().items()]


def models() -> list[tuple[str, str]]:
    """Names of models that are on this machine, each with what it is."""
    from headwater.lens.models.embedded import embedded

    return [(name, each["description"]) for name, each in embedded().items()] + added() + _joined(True)


def added() -> list[tuple[str, str]]:
    """Names of trained models that have been added."""
    from headwater.lens.trained.registry import TRAINED, is_added

    return [(name, each.about) for name, each in TRAINED.items() if is_added(name)]


def _joined(there: bool) -> list[tuple[str, str]]:
    """Names of models made of trained ones, where all of these have been added or where one is missing."""
    from headwater.lens.trained.joined import joined

    return [(name, each.about) for name, each in joined().items() if each.is_there == there]


def addable() -> list[tuple[str, str]]:
    """Names of trained models that can be added."""
    from headwater.lens.trained.registry import TRAINED, is_added

    return [(name, each.about) for name, each in TRAINED.items() if not is_added(name)] + _joined(False)
