"""Rule tables: for a module class and a parameter name, which elements form one weight vector.

Each file is named after the import name of its library and defines ``TABLE``.
"""
