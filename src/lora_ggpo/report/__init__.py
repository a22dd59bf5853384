"""What runs have to say, as tables and figures; it works on the plain data of run folders."""
