"""Load a base model: a hub id, a directory, a GGUF file or the built-in default.

Read in this order: ``load.py`` (the one public function), ``source.py`` (what a name means), then where each kind comes from:
``directory.py``, ``hub.py``, ``gguf.py``, ``builtin.py`` with ``convert.py``; ``architecture.py`` chooses the class and judges the loading
report, ``quant.py`` quantizes while loading. Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from byway.base.load import load_base
from byway.base.source import BUILT_IN
from byway.base.tokenizer import load_tokenizer

__all__ = ["BUILT_IN", "load_base", "load_tokenizer"]
