"""How the models that ship with ppomax are made and judged; the result lies in assets/default."""
