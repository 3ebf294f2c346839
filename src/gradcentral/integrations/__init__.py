"""Adapters for trainers and for other frameworks; each module needs the library that it is named after.

Importing this package imports none of them. docs/integrations.md lists what to type for each library.
"""
