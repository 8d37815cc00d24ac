"""The cluster secret: 32 bytes under which every key is made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from blake3 import blake3

from kvstrata.core.config import NodeConfig
from kvstrata.core.errors import ConfigError
from kvstrata.core.tier import TierKind
from kvstrata.storage.footing import is_device
from kvstrata.storage.opening import lossy_codecs

__all__ = ["SECRET_NAME", "load_secret", "lossy_secret", "node_secret", "read_secret"]

SECRET_NAME: Final = "secret"  # noqa: S105  # a file's name
"""Name of the file beside the first disk tier's blocks."""
_SECRET_BYTES: Final = 32
_REMOTE: Final = frozenset({TierKind.OBJECT, TierKind.STORE})


def node_secret(config: NodeConfig) -> bytes:
    """Return the secret under which this node's keys are made; raises as `load_secret`.

    It is the loaded one, unless a tier has a lossy codec: what that gives back, and all that is
    computed behind it, has other numbers, so it belongs to another namespace than exact blocks.
    """
    secret = load_secret(config)
    return lossy_secret(secret, lossy_codecs(tier for tier in config.tiers if tier.kind.keyed))


def lossy_secret(secret: bytes, codecs: Sequence[str]) -> bytes:
    """Return what takes the place of `secret` on a node whose tiers have these lossy codecs."""
    if not codecs:
        return secret
    return blake3(f"kvstrata lossy {'+'.join(codecs)}".encode(), key=secret).digest()


def load_secret(config: NodeConfig) -> bytes:
    """Return the secret: from its file, made there if missing, or a fresh one for a host alone.

    Keys made under a lost secret are never found again, so it is kept where the blocks are: beside
    the first disk tier's, or else the first shared tier's. Raises ConfigError if the file cannot be
    read or does not hold 32 bytes, and if blocks would outlive a secret that is kept nowhere.
    """
    if config.secret_file is not None:
        return read_secret(Path(config.secret_file), "secret_file")
    kept = [(place, "tiers.disk") for tier in config.tiers for place in tier.places]
    shared = [tier.directory for tier in config.tiers if tier.kind is TierKind.SHARED]
    kept += [(place, "tiers.shared") for place in shared if place]
    files = [each for each in kept if not is_device(each[0])]
    remote = [tier.kind for tier in config.tiers if tier.kind in _REMOTE]
    if not files and remote:
        article = "an" if remote[0] is TierKind.OBJECT else "a"
        raise ConfigError(
            f"secret_file: {article} {remote[0].value} tier needs a secret that outlives this "
            "daemon",
            hint="head -c 32 /dev/urandom > FILE; chmod 600 FILE, and name it with --secret-file",
        )
    if kept and not files:
        raise ConfigError(
            f"secret_file: device {kept[0][0]!r} holds no files, so the secret has no place",
            hint="head -c 32 /dev/urandom > FILE; chmod 600 FILE, and name it with --secret-file",
        )
    if not files:
        return os.urandom(_SECRET_BYTES)
    directory, field = files[0]
    path = Path(directory).expanduser() / SECRET_NAME
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _write(unfinished)
            try:
                os.link(unfinished, path)  # whole or not there: a crash leaves no half secret
            finally:
                unfinished.unlink()
    except FileExistsError:
        return read_secret(path, field)
    except OSError as error:
        raise ConfigError(
            f"{field}: directory {directory!r} cannot be written ({error.strerror})",
            hint="choose a directory that this user may write to",
        ) from error
    return read_secret(path, field)


def _write(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(os.urandom(_SECRET_BYTES))
        file.flush()
        os.fsync(descriptor)


def read_secret(path: Path, field: str) -> bytes:
    """Return the secret in a file; raises ConfigError if it cannot be read or is none."""
    try:
        with path.open("rb") as file:
            status, secret = os.fstat(file.fileno()), file.read(_SECRET_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{field}: secret {str(path)!r} cannot be read ({error.strerror})",
            hint="make one with: head -c 32 /dev/urandom > FILE; chmod 600 FILE",
        ) from error
    # Who knows or chooses the secret can name blocks, and so make others use them.
    if status.st_uid not in {0, os.geteuid()} or status.st_mode & 0o022:
        raise ConfigError(
            f"{field}: secret {str(path)!r} can be written by others than this user",
            hint="chown it to this user and chmod 600, or choose another directory",
        )
    if len(secret) != _SECRET_BYTES:
        raise ConfigError(
            f"{field}: secret {str(path)!r} holds {status.st_size} bytes, not {_SECRET_BYTES}",
            hint="make one with: head -c 32 /dev/urandom > FILE; chmod 600 FILE",
        )
    return secret
