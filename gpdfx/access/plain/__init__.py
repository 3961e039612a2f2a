"""A teacher without the package: its code once more, on its folded weights, as a plain graph."""
