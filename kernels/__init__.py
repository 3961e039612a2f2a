"""What the teacher's graph calls: one file a family, a plain-torch reference first."""

if __name__ != "gpdfx.kernels":
    raise ImportError("import gpdfx.kernels, not kernels")
