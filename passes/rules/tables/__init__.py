"""The tables, one file a family of ops."""
