"""A recipe: everything about one training run, strict and typed.

::

    recipe.py    Recipe: read from a file or a dict, written back
    sections.py  the keys of base, data, train and engine; `method` is each method's own dataclass
    reading.py   what was typed → sections, with every problem at once
    aliases.py   what other trainers call our keys: one table
    names.py     the names of methods and adapters
    schema.py    JSON schema of a recipe
    checks.py    what can be known of files and directories before work starts
    yaml12.py    bytes → values, by YAML 1.2's rules, safe and bounded

Importing this package imports neither torch nor transformers; reading a recipe imports the methods that it names.
"""

from __future__ import annotations

from byway.recipe.checks import check_paths
from byway.recipe.names import adapter_names, method_name
from byway.recipe.recipe import Recipe
from byway.recipe.schema import schema
from byway.recipe.sections import Base, Data, Engine, Train

__all__ = ["Base", "Data", "Engine", "Recipe", "Train", "adapter_names", "check_paths", "method_name", "schema"]
