"""A recipe: one training run, strict and typed.

::

    recipe.py    Recipe: read from a file or a dict, written back
    sections.py  the keys of base, data, train and engine; the keys of `method` are the fields of each method
    reading.py   what was typed → sections and methods, with every problem at once
    aliases.py   the names that other trainers give the keys
    names.py     the names of methods and adapters
    schema.py    JSON schema of a recipe
    checks.py    files and directories, before work starts
    yaml12.py    bytes → values by the rules of YAML 1.2, safe and bounded

Importing this package imports neither torch nor transformers; reading a recipe imports the methods that it names.
"""

from __future__ import annotations

from byway.recipe.checks import check_paths
from byway.recipe.names import adapter_names, method_name
from byway.recipe.recipe import Recipe
from byway.recipe.schema import schema
from byway.recipe.sections import Base, Data, Engine, Train

__all__ = ["Base", "Data", "Engine", "Recipe", "Train", "adapter_names", "check_paths", "method_name", "schema"]
