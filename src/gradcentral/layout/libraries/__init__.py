"""Rule tables: for a module class and a parameter name, which elements make one weight vector."""
