"""A base from the hub: from the local cache, else from the network; an error within seconds if neither has it."""

from __future__ import annotations

from pathlib import Path

from byway.base.directory import INDEX, SINGLE
from byway.base.quiet import say
from byway.errors import ConfigError

__all__ = ["from_hub"]

ALLOW = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]
IGNORE = ["*/*"]  # other formats, ONNX exports, original checkpoints
SECONDS = 4.0


def from_hub(name: str, cache_dir: str | None = None) -> Path:
    """Return the directory of `name`'s files in the hub's cache, or in `cache_dir`; fetch them if they are not there.

    Pickled weights are never requested. ``HF_HUB_OFFLINE`` is respected. The ConfigError says what is missing: the
    repository, access or the network.
    """
    from huggingface_hub import HfApi, snapshot_download

    cached = _cached(name, cache_dir)
    if cached is not None:
        return cached
    try:
        # a separate call, because this one has a timeout for the connection
        revision = HfApi().model_info(name, timeout=SECONDS).sha
        say(f"fetching {name!r} (revision {(revision or '')[:8]}) from the hub")
        path = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=ALLOW, ignore_patterns=IGNORE, etag_timeout=SECONDS
        )
    except Exception as failure:
        raise _refused(name, failure) from failure
    return Path(path)


def _cached(name: str, cache_dir: str | None) -> Path | None:
    """Return the cached snapshot if it has config and all weight files; another program may have fetched only some."""
    from huggingface_hub import snapshot_download

    from byway.core.disk.files import read_json

    try:
        path = Path(snapshot_download(name, cache_dir=cache_dir, local_files_only=True, allow_patterns=ALLOW, ignore_patterns=IGNORE))
    except OSError:  # LocalEntryNotFoundError: not all files are in the cache
        return None
    if not (path / "config.json").is_file():
        return None
    if (path / SINGLE).is_file():
        return path
    if not (path / INDEX).is_file():
        return None
    names = read_json(path / INDEX, error=ConfigError).get("weight_map", {})
    return path if all((path / str(file)).is_file() for file in names.values()) else None


def _refused(name: str, failure: Exception) -> ConfigError:
    """Turn any failure of the hub's client, whose exceptions come from three libraries, into a ConfigError."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    missing = f"the base {name!r} is not a directory here, not in the hub's cache"
    if isinstance(failure, OfflineModeIsEnabled):
        return ConfigError(f"{missing}, and HF_HUB_OFFLINE forbids fetching it", "unset HF_HUB_OFFLINE, or use a directory")
    if isinstance(failure, GatedRepoError):
        return ConfigError(f"{missing}, and the hub restricts access to it", "accept its terms on its page, then `hf auth login`")
    if isinstance(failure, RepositoryNotFoundError):
        return ConfigError(f"{missing}, and not on the hub (or private)", "check the spelling; `hf auth login` for a private one")
    reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]
    return ConfigError(f"{missing}, and the hub cannot be reached: {reason}", "check the network, or use a directory on this disk")
