"""A base from the hub: the local cache first, then the network; one error within seconds where neither has it."""

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
    """The directory of `name`'s files in the hub's cache (``cache_dir``: instead of the usual one), fetched if they are not there.

    The names of pickled weights are never asked for. ``HF_HUB_OFFLINE`` is respected. ConfigError says what is missing: repository, access
    or network.
    """
    from huggingface_hub import HfApi, snapshot_download

    cached = _cached(name, cache_dir)
    if cached is not None:
        return cached
    try:
        # asked apart from the download, because this call has a time limit for the connection
        revision = HfApi().model_info(name, timeout=SECONDS).sha
    except Exception as failure:
        raise _refused(name, failure) from failure
    say(f"fetching {name!r} (revision {(revision or '')[:8]}) from the hub")
    try:
        path = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=ALLOW, ignore_patterns=IGNORE, etag_timeout=SECONDS
        )
    except Exception as failure:
        raise _refused(name, failure) from failure
    return Path(path)


def _cached(name: str, cache_dir: str | None) -> Path | None:
    """The cached snapshot, if it has a configuration and every weight file; another program may have fetched only some files."""
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, cache_dir=cache_dir, local_files_only=True, allow_patterns=ALLOW, ignore_patterns=IGNORE))
    except OSError:  # LocalEntryNotFoundError: nothing, or not all, in the cache
        return None
    if not (path / "config.json").is_file():
        return None
    if (path / SINGLE).is_file():
        return path
    return path if _has_all_shards(path / INDEX) else None


def _has_all_shards(index: Path) -> bool:
    from byway.disk.files import read_json

    if not index.is_file():
        return False
    names = read_json(index, error=ConfigError).get("weight_map", {})
    return all((index.parent / str(file)).is_file() for file in names.values())


def _refused(name: str, failure: Exception) -> ConfigError:
    """Any failure of the hub's client in one sentence: its exceptions come from three libraries, so the known ones are named first."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    missing = f"the base {name!r} is not a directory here, not in the hub's cache"
    if isinstance(failure, OfflineModeIsEnabled):
        return ConfigError(f"{missing}, and HF_HUB_OFFLINE forbids fetching it", "unset HF_HUB_OFFLINE, or give a directory")
    if isinstance(failure, GatedRepoError):
        return ConfigError(f"{missing}, and the hub asks for access to it", "accept its terms on its page, then `hf auth login`")
    if isinstance(failure, RepositoryNotFoundError):
        return ConfigError(f"{missing}, and not on the hub (or private)", "check the spelling; `hf auth login` for a private one")
    reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]
    return ConfigError(f"{missing}, and the hub cannot be reached: {reason}", "check the network, or give a directory on this disk")
