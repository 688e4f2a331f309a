"""Load a base model: a hub id, a directory, a GGUF file or the built-in default.

Read in this order: ``load.py`` (the public function), ``request.py`` (its options), ``source.py`` (what a name means),
then the kinds of bases: ``directory.py``, ``hub.py``, ``gguf.py``, ``builtin/``. ``heads.py`` lists the output heads,
``architecture.py`` chooses the class and checks the loading report, ``quantized/`` quantizes while loading. Importing
this package imports neither torch nor transformers.
"""

from __future__ import annotations

from byway.base.load import load_base
from byway.base.source import BUILT_IN
from byway.base.tokenizer import load_tokenizer

__all__ = ["BUILT_IN", "load_base", "load_tokenizer"]
