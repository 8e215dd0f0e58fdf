"""`estiba prices`: the price table in use."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from estiba_launch.cli import options as opt
from estiba_launch.cli.render import price_table
from estiba_launch.request import prices

app = typer.Typer(help="What instance types cost.", invoke_without_command=True, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
@opt.command
def show(
    context: typer.Context,
    price: opt.PriceFlags,
    only: Annotated[str | None, Option(metavar="TEXT", help="Only types that contain TEXT.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Print the price table in use, with the source and the date of each price."""
    if context.invoked_subcommand:
        return
    table = price.load()
    instances = [one for name, one in sorted(table.instances.items()) if not only or only in name]
    for warning in table.warnings([one.name for one in instances], price.region_of()):
        opt.say(f"warning: {warning}")
    document = [{**vars(one), "date": one.date and one.date.isoformat()} for one in instances]
    opt.show(document if as_json else "\n".join(price_table(instances)))


@app.command("refresh")
@opt.command
def refresh(
    region: Annotated[str, Argument(help="AWS region.")] = "us-east-1",
    url: Annotated[str | None, Option(help="Offer file to read instead of AWS's.")] = None,
) -> None:
    """Read AWS's public price list (no account needed) and store its training prices for this user."""
    opt.say(f"reading {url or prices.OFFER_URL.format(region=region)}")
    print(prices.refresh(region, url))
