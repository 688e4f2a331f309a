"""Virtual tokens at a model's input: a template of them, where they stand in a row, and the side paths that put them in and take them out.

``template.py`` what is written, ``layout.py`` which column is what, ``sides.py`` the side paths, ``method.py`` what the methods share.
"""
