"""The compiler's passes, one file each, in the order in which they run."""

if __name__ != "gpdfx.passes":
    raise ImportError("import gpdfx.passes, not passes")
