"""Render chat templates, which are foreign code, in a process with limited memory, time and output."""
