"""`headwater models`: the models that ship with Headwater."""

from __future__ import annotations

import typer

from headwater.command.options import AsJson

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the models that ship with Headwater."""
    if context.invoked_subcommand is not None:
        return
    from headwater.command import output
    from headwater.lens.models.embedded import embedded

    found = embedded()
    typer.echo(output.as_json(found) if as_json else output.models(found))
