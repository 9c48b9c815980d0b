"""`make demo`: the quick start with everything it needs, on free ports and in a temporary directory."""
