"""Machinery that prefix tuning and P-tuning v2 share."""
