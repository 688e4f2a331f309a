"""Other libraries' names over Byway's core: classic code works after its import is changed. One file a library."""
