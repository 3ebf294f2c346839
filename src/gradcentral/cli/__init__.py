"""The command line ``gradcentral``."""
