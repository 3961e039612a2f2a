"""How many rows of the table are signatures."""

from . import SIGNATURES, TABLE

print(f"{SIGNATURES} of {len(TABLE)} rows are signatures")
