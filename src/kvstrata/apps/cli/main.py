"""The `kvstrata` command: data to stdout, talk to stderr, errors as one sentence and a hint."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final, ParamSpec

import typer

from kvstrata import __version__
from kvstrata.apps.cli.settings import ServeSettings
from kvstrata.apps.cli.tables import print_stats
from kvstrata.core.config import BACKEND_DEFAULT
from kvstrata.core.errors import CallRefusedError, ConfigError, DaemonError, KvstrataError
from kvstrata.runtime.addresses import default_address
from kvstrata.runtime.admin import AdminClient

__all__ = ["app"]

Parameters = ParamSpec("Parameters")

_EXIT_CONFIG: Final = 2
_EXIT_DAEMON: Final = 3

app = typer.Typer(
    name="kvstrata",
    help="KV block manager for LLM inference: keeps KV blocks in tiers and brings them back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Address = Annotated[
    str | None,
    typer.Option(
        help="Daemon to talk to; left out, the one that `kvstrata serve` runs by default."
    ),
]


Backend = Annotated[
    str | None,
    typer.Option(help="Mover to and from disk: posix, nixl, a plug-in's name, or auto."),
]
Guarantees = Annotated[
    list[str] | None,
    typer.Option(help="Guarantee, may be repeated: NAME=30% or NAME=host:8GiB,disk:100GiB."),
]
Sharing = Annotated[
    bool | None,
    typer.Option("--share-tenants", help="Let tenants of one salt find each other's blocks."),
]
Explaining = Annotated[
    bool | None,
    typer.Option(
        "--explain-across-salts", help="Let clients learn of a prompt stored under another salt."
    ),
]


def _told(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Turn our errors into one sentence, a hint and an exit status."""

    @wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ConfigError as error:
            hint = f"\n\nhint: {error.hint}" if error.hint else ""
            typer.echo(f"error: {error.message}{hint}", err=True)
            raise typer.Exit(_EXIT_CONFIG) from error
        except CallRefusedError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(_EXIT_CONFIG) from error
        except DaemonError as error:
            hint = "hint: start a daemon with `kvstrata serve`, or name one with --address"
            typer.echo(f"error: {error}\n\n{hint}", err=True)
            raise typer.Exit(_EXIT_DAEMON) from error
        except KvstrataError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(_EXIT_DAEMON) from error

    return run


@app.command()
@_told
def serve(
    tiers: Annotated[
        str | None,
        typer.Option(
            help="Tiers, host first: host:2GiB,disk:/var/kv:20GiB,object:URL:1TiB; see the guide."
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Eviction policy: lru, arc, lru2, s3fifo, 2q, auto.")
    ] = None,
    backend: Backend = None,
    address: Annotated[
        str | None, typer.Option(help="Where to listen: an absolute ipc:// path.")
    ] = None,
    secret_file: Annotated[
        Path | None, typer.Option(help="File with the cluster secret of 32 bytes.")
    ] = None,
    staging_timeout_s: Annotated[
        float | None, typer.Option(help="Longest wait of a request for blocks from below the host.")
    ] = None,
    offload_priority_min: Annotated[
        int | None, typer.Option(help="Blocks of a lower priority stay in the host.")
    ] = None,
    tenant: Guarantees = None,
    share_tenants: Sharing = None,
    explain_across_salts: Explaining = None,
) -> None:
    """Run the node daemon until it is told to end; KVSTRATA_TIERS and the like set defaults."""
    from kvstrata.apps.cli.prefault import Prefault
    from kvstrata.runtime import daemon

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    given: dict[str, Any] = {
        "tiers": tiers,
        "policy": policy,
        "backend": backend,
        "address": address,
        "secret_file": secret_file,
        "staging_timeout_s": staging_timeout_s,
        "offload_priority_min": offload_priority_min,
        "tenants": ";".join(tenant) if tenant else None,
        "share_tenants": share_tenants,
        "explain_across_salts": explain_across_salts,
    }
    settings = ServeSettings.read(given)
    config = settings.node_config()
    daemon.check(config)

    def ready() -> None:
        typer.echo(
            f"kvstrata {__version__} serves {settings.tiers} at {settings.address}", err=True
        )

    with Prefault() as progress:
        daemon.serve(config, settings.address, ready=ready, progress=progress)


@app.command()
@_told
def stats(
    address: Address = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a daemon's counters and the state of its tiers."""
    with AdminClient(address or default_address()) as admin:
        found = admin.stats()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_stats(found)


@app.command()
@_told
def clear(
    address: Address = None,
    tier: Annotated[
        list[str] | None, typer.Option(help="host, disk, ...; may be given again. Default: all.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Only what this tenant is charged for, in every tier.")
    ] = None,
    namespace: Annotated[
        str, typer.Option(help="Only what was stored for this model, by name or tag.")
    ] = "",
) -> None:
    """Forget every kept block of a daemon, or those of a tenant or a namespace."""
    with AdminClient(address or default_address()) as admin:
        blocks = admin.clear(tier or (), namespace=namespace, tenant=tenant)
    typer.echo(f"{blocks} blocks forgotten")


TraceFile = Annotated[Path, typer.Argument(help="A trace; docs/guides/replay.md lists formats.")]
TraceFormat = Annotated[
    str | None, typer.Option("--format", help="Its format, if the first line does not tell.")
]
BlockTokens = Annotated[
    int | None, typer.Option(min=1, max=65536, help="Block size of a trace of token ids.")
]
HardwareFile = Annotated[
    Path | None, typer.Option("--hardware", help="TOML file; left out, an example is assumed.")
]
Policies = Annotated[
    list[str] | None, typer.Option("--policy", help="Policy to replay; may be given often.")
]
Picture = Annotated[Path | None, typer.Option("--plot", help="Draw the curve to this file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
@_told
def replay(
    trace: TraceFile,
    policy: Policies = None,
    tiers: Annotated[
        str,
        typer.Option(help="host, host:2GiB, or host:5%,disk:50%:on-evict; % of the unique blocks."),
    ] = "host",
    capacity: Annotated[
        str | None, typer.Option(help="Sizes to try where the host has none: 1%,5%,20GiB.")
    ] = None,
    hardware: HardwareFile = None,
    trace_format: TraceFormat = None,
    block_tokens: BlockTokens = None,
    plot: Picture = None,
    *,
    weigh_costs: Annotated[
        bool, typer.Option("--weigh-costs", help="Load only what the hardware computes slower.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Replay a trace through the real manager: hit rates, moves, evictions, time to first token."""
    from kvstrata.apps.cli.traces import Source, run_replay

    source = Source(trace, trace_format, block_tokens, hardware)
    run_replay(
        source, policy or [], tiers, capacity, plot, weigh_costs=weigh_costs, as_json=as_json
    )


@app.command()
@_told
def plan(
    trace: TraceFile,
    budget: Annotated[float, typer.Option(help="Most that tiers may cost, as the prices count.")],
    hardware: HardwareFile = None,
    policy: Policies = None,
    trace_format: TraceFormat = None,
    block_tokens: BlockTokens = None,
    plot: Picture = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Recommend tier sizes and a policy for a trace, a machine and a budget."""
    from kvstrata.apps.cli.traces import Source, run_plan

    source = Source(trace, trace_format, block_tokens, hardware)
    run_plan(source, budget, policy or [], plot, as_json=as_json)


@app.command()
@_told
def doctor(
    directory: Annotated[
        Path | None, typer.Option(help="Where the disk tier is to be; files are tried there.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            envvar="KVSTRATA_BACKEND",
            help="The daemon's mover to and from disk, as kvstrata serve takes it.",
        ),
    ] = BACKEND_DEFAULT,
    *,
    as_json: AsJson = False,
) -> None:
    """Say what works on this machine, what does not and why, and which backends are chosen."""
    from kvstrata.apps.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(directory, backend, as_json=as_json))


@app.command()
@_told
def matrix(*, as_json: AsJson = False) -> None:
    """Say what works with which engine, in which releases; --json names the test of each cell."""
    from kvstrata.apps.cli.matrix import run_matrix

    run_matrix(as_json=as_json)


@app.command()
@_told
def demo(
    engine: Annotated[
        str, typer.Option(help="Engine to play on: vllm, sglang or transformers.")
    ] = "vllm",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures of the table to this file.")
    ] = None,
    object_url: Annotated[
        str | None,
        typer.Option(
            "--object", help="Object store to use too, as s3://BUCKET/PREFIX?endpoint=URL."
        ),
    ] = None,
) -> None:
    """Play a conversation on a real engine: cold, warm, and after kill -9 of everything.

    With --object the slab is deleted at last, and blocks come back from the object store.
    """
    from kvstrata.apps.cli.demo.play import run_demo

    raise typer.Exit(run_demo(json_file, object_url=object_url, engine=engine))


Place = Annotated[
    str,
    typer.Argument(
        help="A slab's directory, file or device (several joined by |), a shared tier's directory, "
        "or an object tier's URL."
    ),
]


@app.command()
@_told
def ls(place: Place, *, as_json: AsJson = False) -> None:
    """List the blocks of a store, without a daemon; a slab in use may be listed."""
    from kvstrata.apps.cli.storetools import list_blocks

    list_blocks(place, as_json=as_json)


@app.command()
@_told
def verify(
    place: Place,
    secret_file: Annotated[
        Path | None, typer.Option(help="Cluster secret, to check encrypted blocks too.")
    ] = None,
    *,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Blank the lines of bad blocks, or delete them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every block of a store again; exit with 1 if one is damaged. Changes nothing."""
    from kvstrata.apps.cli.storetools import verify_place

    raise typer.Exit(verify_place(place, secret_file, quarantine=quarantine, as_json=as_json))


@app.command()
@_told
def gc(
    place: Place,
    other_layouts: Annotated[
        list[str] | None,
        typer.Option(help="Layout to keep, may be repeated; blocks of all others are deleted."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Remove the longest unused blocks of a directory down to it.")
    ] = None,
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would go; change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what dead writers left in a store, and what the options name."""
    from kvstrata.apps.cli.storetools import reclaim_place

    reclaim_place(place, other_layouts or [], size, dry_run=dry_run, as_json=as_json)


bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.callback()
def _bench() -> None:
    """Measure this machine."""


@bench.command()
@_told
def tiers(
    path: Annotated[
        list[str] | None,
        typer.Option(help="memory, slab, object, peer or recovery; may be repeated. Default: all."),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where the slabs lie; left out, a temporary directory.")
    ] = None,
    object_url: Annotated[
        str | None,
        typer.Option("--object", help="Object tier's URL; left out, rclone serves if it is there."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Only shows that it works.")] = False,
) -> None:
    """Measure each path of bytes beside the best that other tools get out of this machine."""
    from kvstrata.apps.cli.bench.tiers import run_tiers

    run_tiers(path or [], directory, object_url, json_file, quick=quick)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


if __name__ == "__main__":
    sys.exit(app())
