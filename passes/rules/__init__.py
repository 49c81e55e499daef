"""The rules of `canonicalize`, one file a theme; `README.md` has their laws."""
