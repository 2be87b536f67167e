"""The open-loop cache: the stream of lookups is given, the cache varies. One driver per semantics."""
