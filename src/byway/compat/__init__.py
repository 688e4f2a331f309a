"""The interfaces of other libraries: code written for them works once its imports are changed. One file per library."""
