"""nemoc: a compiler for Nemotron-3-style hybrid language models."""
