"""Rule tables: for a module class and a parameter name, which elements form one weight vector.

The file of a library bears its import name and defines ``TABLE``.
"""
