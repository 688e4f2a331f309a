"""Adapters in Byway's own format, for methods that HF peft has no name for."""
