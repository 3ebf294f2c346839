"""Rule tables: for a module class and a parameter name, which elements form one weight vector."""
