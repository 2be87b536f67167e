"""A view of a trace that is still being written: `kvtrace top`."""
