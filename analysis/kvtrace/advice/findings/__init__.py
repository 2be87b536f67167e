"""One file for each kind of finding; each registers itself with `adviser`."""
