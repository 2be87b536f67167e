"""Compiled data structures that policies share: linked lists, a heap, a bit set. All state is plain
arrays."""
