"""How a network is called: structures, signatures, sizes, examples."""
