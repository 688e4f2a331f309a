"""Hub ids: from the cache without network, and one quick error where neither has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from byway.base import load_base
from byway.errors import ConfigError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(llama_directory: Path, tmp_path: Path) -> Path:
    """The hub's cache layout with one model in it."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(llama_directory, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return tmp_path / "hub"


def test_a_cached_hub_id_loads_offline_under_its_own_name(llama, hub_cache: Path) -> None:
    model, _ = load_base("owner/tiny", cache_dir=hub_cache)
    assert torch.equal(model.model.norm.weight, llama.model.norm.weight)
    assert model.name_or_path == model.config._name_or_path == "owner/tiny"


def test_a_cache_without_the_weights_is_not_taken_for_a_base(hub_cache: Path) -> None:
    (hub_cache / "models--owner--tiny" / "snapshots" / REVISION / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids"):
        load_base("owner/tiny", cache_dir=hub_cache)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids"), ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached")],
)
def test_without_network_the_error_is_quick_and_names_the_id(tmp_path: Path, setting: dict[str, str], message: str) -> None:
    code = "from byway.base.hub import from_hub\ntry:\n    from_hub('owner/absent')\nexcept ValueError as failure:\n    print(failure)"
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", **setting}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert time.monotonic() - started < 20, "imports included; 1 s on an idle machine"
    assert "'owner/absent'" in done.stdout
    assert message in done.stdout


def test_a_server_that_never_answers_costs_seconds(tmp_path: Path) -> None:
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code = (
            "import time, huggingface_hub\nfrom byway.base.hub import from_hub\nstarted = time.monotonic()\n"
            "try:\n    from_hub('owner/absent')\nexcept ValueError as failure:\n    print(time.monotonic() - started, failure)"
        )
        environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
        environment |= {"HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", "HF_ENDPOINT": endpoint}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    seconds, _, message = done.stdout.partition(" ")
    assert float(seconds) < 12, "4 s on an idle machine"
    assert "cannot be reached" in message
